"""What an environment does in one step, compiled: decode, step, observe, mask, reward.

The scalar and the vector environment enter here with handles (``llmsched_env.records``).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from llmsched_env.action import CodecRecord, decode, is_legal, mask
from llmsched_env.compiled import compiled
from llmsched_env.engine.state import RUNNING
from llmsched_env.engine.step import decision_at, engine_at, reset
from llmsched_env.observation import encode
from llmsched_env.pointers import call, call_float
from llmsched_env.records import Numbers, Record, reader

LOOK = np.empty(0, dtype=np.int64)
"""Instead of an action: nothing is done."""

ILLEGAL = -1
"""Instead of how the episode stands: the action is outside its space, nothing has been done."""


class EnvRecord(Record):
    """What an environment keeps beside its engine."""

    codec: CodecRecord
    reward: int  # address; 0: an ordinary callable computes it
    reward_numbers: Numbers
    hold: int  # iterations for which an action stays in force
    hold_seconds: float  # and how long at least
    discount_seconds: float  # time constant of discounting within a step; infinite: none
    episode_return: float
    episode_length: int


env_at = reader(EnvRecord)


@compiled
def look(e, own, observation, legal):  # type: ignore[no-untyped-def]
    """Write observation and mask. Takes records."""
    encode(e, own.codec.forecast, observation)
    mask(e, own.codec, legal)


@compiled
def hold_action(e, own, action, d):  # type: ignore[no-untyped-def]
    """Step under one action while it stays in force: at least one iteration, fewer than ``hold`` where the episode ends.

    Each iteration has a decision of its own, what the action means by then. Takes records, ``Engine``, ``EnvRecord``, ``Decision``.

    Returns:
        the sum of the rewards, each discounted to the start of the step, exp(-t / discount_seconds) for an iteration that
        starts t seconds after it.
    """
    total = 0.0
    start = e.clock
    count = 0
    while True:
        elapsed = e.clock - start
        decode(e, own.codec, action, d)
        call(e.code.step, e, d)
        if own.reward != 0:
            reward = call_float(own.reward, e, own.reward_numbers)
            if elapsed > 0.0 and own.discount_seconds < math.inf:
                reward *= math.exp(-elapsed / own.discount_seconds)
            total += reward
        count += 1
        if e.end != RUNNING or (count >= own.hold and e.clock - start >= own.hold_seconds):
            return total


@compiled
def env_step(engine, env, decision, action, observation, legal):  # type: ignore[no-untyped-def]
    """One step, or, where ``hold`` says so, several iterations under one action; with an empty action a look alone.

    Args:
        engine, env, decision: handles of ``Engine``, ``EnvRecord``, ``Decision``.
        action: (W,) int64, or (0,).
        observation: (size,) float32, written.
        legal: (mask size,) bool, written.

    Returns:
        (reward, how the episode stands: END_* or ``ILLEGAL``, clock in seconds).
    """
    e, own, d = engine_at(engine), env_at(env), decision_at(decision)
    reward = 0.0
    if action.shape[0] > 0:
        if not is_legal(own.codec, action):
            return 0.0, ILLEGAL, e.clock
        reward = hold_action(e, own, action, d)
    look(e, own, observation, legal)
    return reward, e.end, e.clock


@compiled
def env_decode(engine, env, decision, action):  # type: ignore[no-untyped-def]
    """The decision of an action alone; False where the action is outside its space."""
    e, own = engine_at(engine), env_at(env)
    if not is_legal(own.codec, action):
        return False
    decode(e, own.codec, action, decision_at(decision))
    return True


@compiled
def env_look(engine, env, observation, legal):  # type: ignore[no-untyped-def]
    """Observation and mask alone."""
    look(engine_at(engine), env_at(env), observation, legal)


@compiled
def env_mask(engine, env, legal):  # type: ignore[no-untyped-def]
    mask(engine_at(engine), env_at(env).codec, legal)


@compiled
def env_reset(engine, env, observation, legal):  # type: ignore[no-untyped-def]
    """Start the episode whose requests are in the engine's ``hidden`` rows, and observe it."""
    e, own = engine_at(engine), env_at(env)
    reset(e)
    own.episode_return = 0.0
    own.episode_length = 0
    memory = own.reward_numbers.memory
    for i in range(memory.shape[0]):
        memory[i] = 0
    scored = own.codec.peak.scored
    for j in range(scored.shape[0]):
        scored[j] = 0
    look(e, own, observation, legal)


@compiled
def step_range(first, last, handles, actions, observations, masks, rewards, seconds, ends):  # type: ignore[no-untyped-def]
    """``env_step`` for environments ``first`` .. ``last`` - 1 whose episode runs; the others keep still with reward 0.

    Args:
        handles: (E, 3): engine, environment, decision.
        actions: (E, W) int64, all legal.
        observations, masks, rewards, seconds: (E, size) float32, (E, mask size) bool, (E,) and (E,) float64, written.
        ends: (E,) int64: END_* of those that stepped; ``RUNNING`` of those that kept still.

    Returns:
        how many episodes ended.
    """
    ended = 0
    for i in range(first, last):
        e, own, d = engine_at(handles[i, 0]), env_at(handles[i, 1]), decision_at(handles[i, 2])
        rewards[i] = 0.0
        seconds[i] = 0.0
        ends[i] = RUNNING
        if e.end == RUNNING:
            start = e.clock
            rewards[i] = hold_action(e, own, actions[i], d)
            seconds[i] = e.clock - start
            own.episode_return += rewards[i]
            own.episode_length += 1
            ends[i] = e.end
            ended += e.end != RUNNING
        look(e, own, observations[i], masks[i])
    return ended


@compiled
def first_illegal(env: Any, actions):  # type: ignore[no-untyped-def]
    """Row of the first of (E, W) int64 actions outside its space; -1 if none is."""
    codec = env_at(env).codec
    for i in range(actions.shape[0]):
        if not is_legal(codec, actions[i]):
            return i
    return -1
