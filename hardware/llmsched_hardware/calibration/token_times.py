"""The engine's iterations, seen through the times at which clients got tokens.

Every running request gets one token an iteration. So the times of all tokens of all requests tell which requests were in
which iteration, with which contexts, and from one iteration to the next the seconds that it took; who got a first token
had its prompt computed in that iteration, or in those before it as far as the token budget forced it (vLLM 0.28.0 to 0.33.0,
``v1/core/sched/scheduler.py`` ``schedule``: running requests first, then the waiting in order of arrival).

Where a file has the times of first and last tokens alone, a request's time from one to the other is the sum of its iterations.

Either way one row is an equation: seconds = number of iterations x a + tokens x b + ... (``COLUMNS``). A row of a request that found the
engine idle has the front end's seconds in it, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf.base import FloatArray
from llmsched_env.types import BoolArray, IntArray
from llmsched_hardware.calibration.bench_results import BenchResult

COLUMNS = ("iterations", "tokens", "kv", "work", "decodes", "frontend")
"""Of a row: iterations, their tokens, KV tokens of their decodes, prefill work (``Batch.prefill_work``), decodes; 1 for the front end."""
ITERATIONS, TOKENS, KV, WORK, DECODES, FRONTEND = range(len(COLUMNS))
SPLIT = 0.3
"""A first token that comes this share of a usual gap after all others is of the next iteration."""
NEAR = 12
"""Iterations about the nearest that are tried for a first token."""
LATE, PAUSED, LONG = 0.6, 3, 8
"""A request was preempted where its tokens come later than this share of an iteration, for so many to its last one, or for so many."""
LEAST_DELAYS = 10
"""First tokens that tell when a request had come, for the front end's seconds."""
DISAGREE = 4
MOST_WITHOUT_GAPS = 0.1
"""Share of requests whose tokens have no times that still lets iterations be told apart."""


@dataclass(frozen=True, slots=True)
class Equations:
    """What one run says about iteration times.

    Attributes:
        rows: (M, len(COLUMNS)) float64.
        seconds: (M,) float64.
        time: (M,) float64 seconds of the run at which a row begins.
        single: (M,) bool: the row is one iteration.
        longest_chunk: most prompt tokens of a request in one iteration of the rows.
        iterations: counted; 0 where they cannot be told apart.
        delay: (lowest, best, highest) seconds from a request's sending to its being seen by the scheduler and back, by the iteration
            that it entered; it is the front end's part in the time to the first token. NaN where that is not known.
        stalled: iterations left out because a request that had been preempted computed its tokens again, or because the prompts that
            ended in them do not fit the token budget.
    """

    rows: FloatArray
    seconds: FloatArray
    time: FloatArray
    single: BoolArray
    longest_chunk: int
    iterations: int
    delay: tuple[float, float, float]
    stalled: int


@dataclass(slots=True)
class _Seen:
    """One iteration: when its first token was seen, requests that got a token, those of them that got their first."""

    members: dict[int, int]  # request -> number of the token, from 0
    begun: list[int]
    whole: bool = True  # nobody computes again what a preemption has cost
    time: float = math.inf


def equations(result: BenchResult, engine: EngineConfig) -> Equations:
    """The rows of a run on an engine, whose time model is not read."""
    idle_rows, idle_seconds, idle_time = _found_idle(result, engine)
    told = 1.0 - result.has_gaps.mean() <= MOST_WITHOUT_GAPS
    seen = _iterations(result) if told else []
    if told:
        rows, seconds, time, longest, stalled = _single_rows(result, seen, engine)
    else:
        rows, seconds, time = _request_rows(result)
        longest, stalled = int(result.prompt_tokens.max()), 0
    longest = min(max(longest, int(idle_rows[:, TOKENS].max(initial=0.0))), engine.max_num_batched_tokens)
    return Equations(
        np.concatenate([rows, idle_rows]),
        np.concatenate([seconds, idle_seconds]),
        np.concatenate([time, idle_time]),
        np.concatenate([np.full(len(seconds), told), np.zeros(len(idle_seconds), np.bool_)]),
        longest,
        len(seen),
        _delay(result, seen, engine) if seen else (math.nan, math.nan, math.nan),
        stalled,
    )


# --- every token's time is known --------------------------------------------------------------------
def _iterations(result: BenchResult) -> list[_Seen]:
    """Iterations in order, of the requests whose tokens all have times.

    A request's tokens are in consecutive iterations, so one number a request is sought: the iteration of its first token, such that its
    times agree with those of the requests before it. A late token, or two that a client reads at once, then move nothing. After a
    preemption the rest of a request's tokens is placed anew.
    """
    known = np.flatnonzero(result.has_gaps)
    times = {i: result.arrival[i] + result.first[i] + np.concatenate([[0.0], np.cumsum(result.gaps[i])]) for i in known.tolist()}
    gaps = np.concatenate([result.gaps[i] for i in known]) if len(known) else np.empty(0)
    usual = float(np.median(gaps)) if gaps.size else 0.0
    ends = np.empty(sum(len(t) for t in times.values()))
    found: list[_Seen] = []
    for i in sorted(times, key=lambda r: float(times[r][0])):
        rest, number = times[i], 0
        missed = len(found)
        while len(rest):
            k = _place(ends[: len(found)], rest, usual)
            count = _early(ends[: len(found)], rest, k)
            if count:  # most of the tokens are of a time after a preemption
                k = _place(ends[: len(found)], rest[:count], usual)
            else:
                count = _fitting(ends[k : len(found)], rest)
                if count < len(rest) and not _paused(ends[: len(found)], rest[count:], k + count, usual):
                    count = len(rest)
            for _ in range(k + count - len(found)):
                ends[len(found)] = np.inf
                found.append(_Seen({}, []))
            for seen in found[missed : k + 1] if number else ():
                seen.whole = False  # preempted before, and its tokens computed again
            if number == 0:
                found[k].begun.append(i)
            for offset in range(count):
                found[k + offset].members[i] = number + offset
            ends[k : k + count] = np.minimum(ends[k : k + count], rest[:count])
            missed, rest, number = k + count, rest[count:], number + count
    for seen, end in zip(found, ends.tolist(), strict=False):
        seen.time = end
    return found


def _place(ends: FloatArray, times: FloatArray, usual: float) -> int:
    """The iteration of the first of a request's tokens that agrees best with the ends of iterations seen so far."""
    if not len(ends) or times[0] > ends[-1] + SPLIT * usual:
        return len(ends)
    near = int(np.searchsorted(ends, times[0]))
    tried = range(max(near - NEAR, 0), min(near + NEAR, len(ends) - 1) + 1)
    return min(tried, key=lambda k: (_apart(ends, times, k), abs(k - near)))


def _apart(ends: FloatArray, times: FloatArray, k: int) -> float:
    """Median seconds by which a request's times differ from the ends of the iterations from ``k`` on."""
    count = min(len(times), len(ends) - k)
    return float(np.median(np.abs(times[:count] - ends[k : k + count]))) if count > 0 else math.inf


def _paused(ends: FloatArray, rest: FloatArray, k: int, usual: float) -> bool:
    """Whether the rest of a request's tokens agrees with later iterations far better than with those from ``k`` on: it was preempted."""
    later = _place(ends, rest, usual)
    if later <= k:
        return False
    if later == len(ends):  # nobody else got a token since
        return float(rest[0] - ends[-1]) > LATE * usual
    return _apart(ends, rest, later) < 0.5 * min(_apart(ends, rest, k), usual)


def _early(ends: FloatArray, times: FloatArray, k: int) -> int:
    """How many of a request's first tokens come well before the iterations from ``k`` on."""
    count = min(len(ends) - k, len(times))
    if k == 0 or count < 2:
        return 0
    early = ends[k : k + count] - times[:count] > LATE * np.diff(ends[k - 1 : k + count])
    return 0 if early.all() else int(np.argmin(early))


def _fitting(ends: FloatArray, times: FloatArray) -> int:
    """How many of a request's tokens come in time, the first in the iteration of ``ends[0]``: all, or those before a preemption."""
    count = min(len(ends), len(times))
    if count <= PAUSED:
        return len(times)
    late = times[: count - 1] - ends[: count - 1] > LATE * np.diff(ends[:count])
    run = 0
    for j in range(count - 2, 0, -1):  # from the end: how long it stays late
        run = run + 1 if late[j] else 0
        if run >= PAUSED and not late[j - 1] and (run >= LONG or j + run == count - 1):
            return j
    return len(times)


def _single_rows(result: BenchResult, seen: list[_Seen], engine: EngineConfig) -> tuple[FloatArray, FloatArray, FloatArray, int, int]:
    """A row for every iteration that began when another ended; the longest chunk, and how many were left out as not whole."""
    ends = np.array([s.time for s in seen])
    chunks = _chunks(result, seen, ends, engine)
    prompt = result.prompt_tokens
    others = [_unseen(result, i, ends) for i in np.flatnonzero(~result.has_gaps).tolist()]
    rows, seconds, time = [], [], []
    longest = stalled = 0
    for k in range(1, len(seen)):
        before, now = seen[k - 1], seen[k]
        if not any(i in now.members for i in before.members):
            continue  # the engine may have been idle
        if not now.whole:
            stalled += 1
            continue
        decodes = [(i, j) for i, j in now.members.items() if j > 0]
        n, kv = float(len(decodes)), float(sum(int(prompt[i]) + j for i, j in decodes))
        for first, last, context in others:
            if first < k <= last:
                n, kv = n + 1.0, kv + context
        tokens = n + sum(size for size, _ in chunks[k])
        if tokens > engine.max_num_batched_tokens:  # part of it was computed earlier, unseen
            stalled += 1
            continue
        longest = max(longest, *(size for size, _ in chunks[k]), 0)
        work = sum(size * (size / 2 + context) for size, context in chunks[k])
        rows.append((1.0, tokens, kv, work, n, 0.0))
        seconds.append(now.time - before.time)
        time.append(before.time)
    return np.array(rows).reshape(-1, len(COLUMNS)), np.array(seconds), np.array(time), longest, stalled


def _unseen(result: BenchResult, i: int, ends: FloatArray) -> tuple[int, int, float]:
    """First and last iteration of a request whose tokens have no times, and its mean context."""
    first, last = (int(np.searchsorted(ends, result.arrival[i] + t, "right")) - 1 for t in (result.first[i], result.last[i]))
    return first, last, float(result.prompt_tokens[i] + result.output_tokens[i] / 2)


def _chunks(result: BenchResult, seen: list[_Seen], ends: FloatArray, engine: EngineConfig) -> list[list[tuple[int, int]]]:
    """(tokens, context) of the prefill chunks of every iteration, by the token budget and the order of arrival."""
    order: list[tuple[int, int]] = [(k, i) for k, s in enumerate(seen) for i in s.begun]
    order += [(max(_unseen(result, i, ends)[0], 0), i) for i in np.flatnonzero(~result.has_gaps).tolist()]
    order.sort(key=lambda pair: (pair[0], result.arrival[pair[1]]))
    chunks: list[list[tuple[int, int]]] = [[] for _ in seen]
    done = np.zeros(len(result), np.int64)
    lag = _lag(engine)
    delay = np.nan_to_num(_delay(result, seen, engine)[1])
    free = [engine.max_num_batched_tokens - sum(j > 0 for j in s.members.values()) for s in seen]
    at = 0
    for k in range(len(seen)):
        room = free[k]
        while at < len(order) and order[at][0] <= k:
            i = order[at][1]
            size = int(result.prompt_tokens[i] - done[i])
            chunks[k].append((size, int(done[i])))
            room -= size
            at += 1
        if at < len(order) and room > 0 and k >= lag and engine.enable_chunked_prefill:
            last, i = order[at]  # its first token comes later: if it had arrived, it got what was left
            left = int(result.prompt_tokens[i] - done[i]) - room
            if result.arrival[i] + delay <= ends[k - lag] and _ends_at(left, free[k + 1 : last + 1]):
                chunks[k].append((room, int(done[i])))
                done[i] += room
    return chunks


def _ends_at(left: int, free: list[int]) -> bool:
    """Whether a prompt with so many tokens left ends in the last of the next iterations, of which it takes all that is free.

    If not, it was kept out by something else: no blocks, or no place.
    """
    before = sum(free[:-1])
    return before < left <= before + free[-1]


def _lag(engine: EngineConfig) -> int:
    """How many iterations before one the last has ended that its scheduler waits for."""
    return 2 if engine.async_scheduling else 1


def _delay(result: BenchResult, seen: list[_Seen], engine: EngineConfig) -> tuple[float, float, float]:
    """Seconds from a request's sending to its being seen by the scheduler and back, with which the fewest first tokens disagree.

    In the middle; before and after it the lowest and the highest with which ``DISAGREE`` more do.

    A request that got its first token in an iteration had come when that one was scheduled, and had not when the one before it was,
    if there was room for its whole prompt. NaN where there are too few of these.
    """
    lag = _lag(engine)
    prompt = result.prompt_tokens.tolist()
    most, least = [], []
    for k in range(lag + 1, len(seen)):
        before = seen[k - 1]
        room = engine.max_num_batched_tokens - sum(j > 0 for j in before.members.values()) - sum(prompt[i] for i in before.begun)
        places = engine.most_active - len(before.members)
        for i in sorted(seen[k].begun):  # in order of sending
            room, places = room - prompt[i], places - 1
            most.append(seen[k - lag].time - result.arrival[i])
            if room >= 0 and places >= 0:
                least.append(seen[k - 1 - lag].time - result.arrival[i])
    if len(least) < LEAST_DELAYS:
        return math.nan, math.nan, math.nan
    upper, lower = np.sort(most), np.sort(least)
    tried = np.unique(np.concatenate([[0.0], upper[upper > 0], lower[lower > 0]]))
    against = np.searchsorted(upper, tried, "left") + len(lower) - np.searchsorted(lower, tried, "left")
    best, near = (np.flatnonzero(against <= against.min() + more) for more in (0, DISAGREE))
    return float(tried[near[0]]), float(0.5 * (tried[best[0]] + tried[best[-1]])), float(tried[near[-1]])


# --- first and last tokens alone --------------------------------------------------------------------
def _request_rows(result: BenchResult) -> tuple[FloatArray, FloatArray, FloatArray]:
    """A row for every request of more than one token: its time from the first to the last, and what the others did meanwhile."""
    begin, end = result.arrival + result.first, result.arrival + result.last
    prompt, rest = result.prompt_tokens.astype(float), result.output_tokens - 1.0
    span = np.maximum(end - begin, 1e-9)
    rows, seconds, time = [], [], []
    for i in np.flatnonzero(rest > 0):
        low, high = np.maximum(begin, begin[i]), np.minimum(end, end[i])
        tokens = rest * np.clip(high - low, 0.0, None) / span
        middle = prompt + 1.0 + rest * ((low + high) / 2 - begin) / span
        entered = (begin > begin[i]) & (begin <= end[i])
        decodes = float(tokens.sum())
        work = 0.5 * float((prompt[entered] ** 2).sum())
        rows.append((rest[i], decodes + prompt[entered].sum(), float(tokens @ middle), work, decodes, 0.0))
        seconds.append(float(end[i] - begin[i]))
        time.append(float(begin[i]))
    return np.array(rows).reshape(-1, len(COLUMNS)), np.array(seconds), np.array(time)


def _found_idle(result: BenchResult, engine: EngineConfig) -> tuple[FloatArray, FloatArray, FloatArray]:
    """A row for every request that came when all before it had ended: front end and prefill."""
    ended = np.concatenate([[-np.inf], np.maximum.accumulate(result.arrival + result.last)[:-1]])
    following = np.concatenate([result.arrival[1:], [np.inf]])
    alone = (ended < result.arrival) & (following >= result.arrival + 0.5 * result.first)
    budget = engine.max_num_batched_tokens if engine.enable_chunked_prefill else engine.max_model_len
    prompt: IntArray = result.prompt_tokens[alone]
    rows = np.zeros((len(prompt), len(COLUMNS)))
    rows[:, ITERATIONS] = -(-prompt // budget)
    rows[:, TOKENS] = prompt
    rows[:, WORK] = 0.5 * prompt.astype(float) ** 2
    rows[:, FRONTEND] = 1.0
    return rows, result.first[alone], result.arrival[alone]
