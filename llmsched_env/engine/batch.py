"""One step of many engines in one compiled call: actions in; observations, rewards, masks and ends out."""

from __future__ import annotations

from numba import prange

from llmsched_env.action import decode, mask
from llmsched_env.compiled import compiled, inlined, parallel
from llmsched_env.engine.array_table import float_rows, floats, int_rows, ints, small_ints
from llmsched_env.engine.kernel import reset, step
from llmsched_env.engine.state import (
    END_FINISHED,
    END_NOT,
    F_CLOCK,
    F_STEP_SYSTEM_SECONDS,
    I_COMPLETED,
    I_COMPLETED_TOKENS,
    I_DONE,
    R_OUTPUT,
    T_ARRIVAL,
    T_COMPLETED,
    T_FIRST_TOKEN,
)
from llmsched_env.observation import encode
from llmsched_env.reward import REWARD_LATENCY, REWARD_THROUGHPUT


@inlined
def reward_of(kind, ttft, tpot, requests, times, scalars, clocks, events):  # type: ignore[no-untyped-def]
    """``llmsched_env.reward`` for one engine."""
    num_requests = requests.shape[1]
    if kind == REWARD_LATENCY:
        return -clocks[F_STEP_SYSTEM_SECONDS] / num_requests
    if kind == REWARD_THROUGHPUT:
        return float(scalars[I_COMPLETED_TOKENS])
    met = 0
    for i in range(scalars[I_COMPLETED]):
        r = events[2, i]
        first = times[T_FIRST_TOKEN, r] - times[T_ARRIVAL, r]
        rest = requests[R_OUTPUT, r] - 1
        each = (times[T_COMPLETED, r] - times[T_ARRIVAL, r] - first) / rest if rest > 0 else 0.0
        met += first <= ttft and each <= tpot
    return met / num_requests


@compiled
def step_one(  # type: ignore[no-untyped-def]
    action, action_kind, levels, reward_kind, ttft, tpot, decision, model, settings, ends, requests, times, slots, queues, queue_f,
    scalars, clocks, batch, events, trace, context, observation, legal,
):  # fmt: skip
    """Decode, step, observe, mask. Returns (reward, END_* state, clock)."""
    decode(action_kind, levels, action, settings, context, requests, slots, queues, scalars, decision)
    step(decision, model, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batch, events, trace)
    encode(settings, context, queues, queue_f, scalars, clocks, observation)
    mask(action_kind, levels, queues, legal)
    reward = reward_of(reward_kind, ttft, tpot, requests, times, scalars, clocks, events)
    return reward, scalars[I_DONE], clocks[F_CLOCK]


@compiled
def step_from(table, action, action_kind, reward_kind, ttft, tpot, observation, legal):  # type: ignore[no-untyped-def]
    """``step_one`` with the other arrays, in its order, in an ``ArrayTable``."""
    return step_one(
        action, action_kind, floats(table, 0), reward_kind, ttft, tpot, int_rows(table, 1), floats(table, 2), ints(table, 3),
        small_ints(table, 4), int_rows(table, 5), float_rows(table, 6), int_rows(table, 7), int_rows(table, 8), float_rows(table, 9),
        ints(table, 10), floats(table, 11), floats(table, 12), int_rows(table, 13), int_rows(table, 14), floats(table, 15), observation,
        legal,
    )  # fmt: skip


@parallel
def step_all(  # type: ignore[no-untyped-def]
    actions, action_kind, levels, reward_kind, ttft, tpot, decisions, models, settings, ends, requests, times, slots,
    queues, queue_f, scalars, clocks, batches, events, trace, contexts, observations, masks, rewards, terminated, truncated,
    returns, lengths,
):  # fmt: skip
    """``step_one`` for every engine whose episode runs; the others keep still with reward 0. Leading axis: engine.

    Returns how many episodes ended.
    """
    ended = 0
    for e in prange(actions.shape[0]):
        if scalars[e, I_DONE] != END_NOT:
            rewards[e] = 0.0
            terminated[e] = False
            truncated[e] = False
            encode(settings[e], contexts[e], queues[e], queue_f[e], scalars[e], clocks[e], observations[e])
            mask(action_kind, levels, queues[e], masks[e])
            continue
        rewards[e], end, _ = step_one(
            actions[e], action_kind, levels, reward_kind, ttft, tpot, decisions[e], models[e], settings[e], ends[e], requests[e], times[e],
            slots[e], queues[e], queue_f[e], scalars[e], clocks[e], batches[e], events[e], trace[e], contexts[e],
            observations[e], masks[e],
        )  # fmt: skip
        terminated[e] = end == END_FINISHED
        truncated[e] = end > END_FINISHED
        returns[e] += rewards[e]
        lengths[e] += 1
        ended += end != END_NOT
    return ended


@compiled
def reset_one(  # type: ignore[no-untyped-def]
    action_kind, levels, settings, requests, times, queues, queue_f, scalars, clocks, context, observation, legal
):
    """Start the episode whose requests are in the arrays, and observe it."""
    reset(settings, requests, times, queues, queue_f, scalars, clocks)
    encode(settings, context, queues, queue_f, scalars, clocks, observation)
    mask(action_kind, levels, queues, legal)
