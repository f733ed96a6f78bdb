"""What an environment does in one step, compiled: decode, step, observe, mask, reward.

The scalar and the vector environment enter here with handles (``llmsched_env.records``).
"""

from __future__ import annotations

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
    episode_return: float
    episode_length: int


env_at = reader(EnvRecord)


@compiled
def env_step(engine, env, decision, action, observation, legal):  # type: ignore[no-untyped-def]
    """One step; with an empty action a look alone.

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
        if not is_legal(own.codec.kind, action, e.settings.num_queues, own.codec.levels):
            return 0.0, ILLEGAL, e.clock
        decode(e, own.codec, action, d)
        call(e.code.step, e, d)
        if own.reward != 0:
            reward = call_float(own.reward, e, own.reward_numbers)
    encode(e, own.codec.forecast, observation)
    mask(e, own.codec, legal)
    return reward, e.end, e.clock


@compiled
def env_decode(engine, env, decision, action):  # type: ignore[no-untyped-def]
    """The decision of an action alone; False where the action is outside its space."""
    e, own = engine_at(engine), env_at(env)
    if not is_legal(own.codec.kind, action, e.settings.num_queues, own.codec.levels):
        return False
    decode(e, own.codec, action, decision_at(decision))
    return True


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
    encode(e, own.codec.forecast, observation)
    mask(e, own.codec, legal)


@compiled
def step_range(first, last, handles, actions, observations, masks, rewards, ends):  # type: ignore[no-untyped-def]
    """``env_step`` for environments ``first`` .. ``last`` - 1 whose episode runs; the others keep still with reward 0.

    Args:
        handles: (E, 3): engine, environment, decision.
        actions: (E, W) int64, all legal.
        observations, masks, rewards: (E, size) float32, (E, mask size) bool, (E,) float64, written.
        ends: (E,) int64: END_* of those that stepped; ``RUNNING`` of those that kept still.

    Returns:
        how many episodes ended.
    """
    ended = 0
    for i in range(first, last):
        e, own, d = engine_at(handles[i, 0]), env_at(handles[i, 1]), decision_at(handles[i, 2])
        rewards[i] = 0.0
        ends[i] = RUNNING
        if e.end == RUNNING:
            decode(e, own.codec, actions[i], d)
            call(e.code.step, e, d)
            if own.reward != 0:
                rewards[i] = call_float(own.reward, e, own.reward_numbers)
                own.episode_return += rewards[i]
            own.episode_length += 1
            ends[i] = e.end
            ended += e.end != RUNNING
        encode(e, own.codec.forecast, observations[i])
        mask(e, own.codec, masks[i])
    return ended


@compiled
def first_illegal(env: Any, num_queues: int, actions):  # type: ignore[no-untyped-def]
    """Row of the first of (E, W) int64 actions outside its space; -1 if none is."""
    codec = env_at(env).codec
    for i in range(actions.shape[0]):
        if not is_legal(codec.kind, actions[i], num_queues, codec.levels):
            return i
    return -1
