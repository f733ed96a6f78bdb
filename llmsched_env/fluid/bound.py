"""A mean latency that no policy can go below, whatever it knows: least remaining work first on one pooled machine.

Every iteration takes at least what its lines (``llmsched_env.fluid.minorant``) say. Of that, most belongs to the requests whose tokens
are computed. What is left, u seconds an iteration, is shared out over the requests in the batch: with N of them at most and
C tokens of memory,

    u >= u (a m / N + (1 - a) G / C)        for any a from 0 to 1,

m requests that hold G tokens of blocks. So a request has a work w that it costs whoever serves it, and the seconds of an iteration
are at least the works done in it. Any schedule is then one of a single machine that works for one second a second, on requests of
works w that arrive when they do; there least remaining work first has the least mean (Schrage 1968, "A proof of the optimality of
the shortest remaining processing time discipline"). A request computed again after a preemption costs more, not less.

No request is faster than alone, either: its iterations, each as short as one that computes its tokens can be. The bound is
the larger of both means. ``docs/theory.md`` has the proof step by step.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.fluid.minorant import Line, Minorant, minorant
from llmsched_env.perf.models import LinearTime
from llmsched_env.types import FloatArray, Workload

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Values of ``a`` that are tried; each gives a bound, the largest counts."""
ROUNDING = 1.0 - 1e-9
"""The bound is this much lower: sums of millions of iterations are rounded."""


@dataclass(frozen=True, slots=True)
class LatencyBound:
    """Seconds.

    Attributes:
        mean: no schedule of the engine has a lower mean latency of these requests.
        pooled: that of least remaining work first on one machine.
        alone: mean latency of requests that are alone on the engine, at least.
        requests: that count.
        seat_share: ``a`` of ``pooled``.
    """

    mean: float
    pooled: float
    alone: float
    requests: int
    seat_share: float


@dataclass(frozen=True, slots=True)
class _Demand:
    """(N,) of each request, at least: what its tokens ask of the iterations."""

    iterations: FloatArray  # in whose batch it is
    tokens: FloatArray  # computed
    decodes: FloatArray
    decode_kv: FloatArray  # sum over them of context + 1
    held: FloatArray  # sum over its iterations of the tokens of its KV units
    samples: FloatArray
    prefill_work: FloatArray


def latency_bound(workload: Workload, engine: EngineConfig, *, since: float = 0.0) -> LatencyBound:
    """The bound of an episode in which every request completes, on the simulator.

    It holds for every policy on this engine, and on one that differs from it in a smaller ``max_num_batched_tokens``,
    ``max_num_seqs`` or ``max_num_active_seqs``, or in anything that only keeps requests back.

    Args:
        since: seconds. Requests that arrived earlier do not count: leaving them out can only help the others.

    Raises:
        ConfigError: prefix caching, under which prompts may cost nothing; a time model of which no lines below are proven; a
            ``since`` that is no time.
    """
    checks.number("since", since, unit="seconds")
    if engine.enable_prefix_caching:
        raise ConfigError("engine.enable_prefix_caching: True, must be False for a bound: a cached prompt is no work")
    served = workload.prompt_tokens.astype(np.int64) + workload.output_tokens <= engine.longest_request
    counted = np.flatnonzero((workload.arrival >= since) & served)
    if counted.size == 0:
        return LatencyBound(0.0, 0.0, 0.0, 0, 0.0)
    prompt, output = (values[counted].astype(np.float64) for values in (workload.prompt_tokens, workload.output_tokens))
    demand, lines, seats = _demand(prompt, output, engine), _lines(engine), _seats(engine)
    arrival = workload.arrival[counted]
    pooled, share = max((_pooled_mean(arrival, demand, lines, a / seats, (1 - a) / engine.kv_capacity_tokens), a) for a in _shares(engine))
    alone = float(np.mean(alone_seconds(demand, lines)))
    mean = ROUNDING * max(pooled, alone)
    return LatencyBound(mean, ROUNDING * pooled, ROUNDING * alone, int(counted.size), share)


def _shares(engine: EngineConfig) -> tuple[float, ...]:
    return (0.0,) if engine.preset == "paper" else SHARES  # no seats


def _seats(engine: EngineConfig) -> float:
    """Most requests in a batch: each has a token at least. Infinite where nothing but memory limits them."""
    return np.inf if engine.preset == "paper" else float(min(engine.most_active, engine.max_num_batched_tokens))


def _lines(engine: EngineConfig) -> Minorant:
    model = engine.time_model
    if engine.preset == "paper":
        if type(model) is not LinearTime:
            raise ConfigError(f"engine.time_model: {type(model).__name__}, must be LinearTime in the paper preset for a bound")
        return minorant(model, 1, 1, 1)
    # Vidur's accounting counts prompts alone: decodes come on top.
    most_tokens = engine.max_num_batched_tokens + (engine.most_active if engine.padded_prefill else 0)
    return minorant(model, most_tokens, min(engine.most_active, engine.max_num_batched_tokens), engine.max_model_len)


def _demand(prompt: FloatArray, output: FloatArray, engine: EngineConfig) -> _Demand:
    """The ``vllm`` preset's first token comes with the prompt's last, the ``paper`` preset's with a decode."""
    paper = engine.preset == "paper"
    decodes = output if paper else output - 1.0
    prefills = np.ones_like(prompt) if paper else np.ceil(prompt / engine.max_num_batched_tokens)
    decode_kv = decodes * prompt + decodes * (decodes + 1.0) / 2.0
    unit = 1.0 if paper else float(engine.block_size)
    held = unit * (_units_up_to(prompt + decodes, unit) - _units_up_to(prompt - 1.0, unit))
    return _Demand(
        iterations=prefills + decodes,
        tokens=prompt + decodes,
        decodes=decodes,
        decode_kv=decode_kv,
        held=held,
        samples=decodes if paper else output,
        prefill_work=prompt * prompt / 2.0,  # however the prompt is cut into chunks
    )


def _units_up_to(tokens: FloatArray, unit: float) -> FloatArray:
    """sum over x = 1 .. tokens of ceil(x / unit)."""
    whole = np.floor(tokens / unit)
    found: FloatArray = unit * whole * (whole + 1.0) / 2.0 + (tokens - unit * whole) * (whole + 1.0)
    return found


def _own(demand: _Demand, lines: Minorant, decode: Line, slope: float) -> FloatArray:
    """(N,) seconds that belong to the request alone."""
    b, w = decode
    own: FloatArray = (
        slope * demand.tokens
        + b * demand.decodes
        + w * demand.decode_kv
        + lines.per_request * demand.iterations
        + lines.per_sample * demand.samples
        + lines.per_work * demand.prefill_work
    )
    return own


def _best_decode(demand: _Demand, lines: Minorant) -> Line:
    """The line that gives all requests together the most seconds."""
    return max(lines.decode, key=lambda line: line[0] * demand.decodes.sum() + line[1] * demand.decode_kv.sum())


def works(demand: _Demand, lines: Minorant, by_seat: float, by_token: float) -> FloatArray:
    """(N,) seconds of machine work, with what a request in a batch and a token of its memory have of an iteration's fixed seconds."""
    share = by_seat * demand.iterations + by_token * demand.held
    u, v = max(lines.tokens, key=lambda line: (lines.constant + line[0]) * share.sum() + line[1] * demand.tokens.sum())
    work: FloatArray = (lines.constant + u) * share + _own(demand, lines, _best_decode(demand, lines), v)
    return work


def _pooled_mean(arrival: FloatArray, demand: _Demand, lines: Minorant, by_seat: float, by_token: float) -> float:
    return least_remaining_first(arrival, works(demand, lines, by_seat, by_token))


def alone_seconds(demand: _Demand, lines: Minorant) -> FloatArray:
    """(N,) seconds of the iterations of each request, by the best line for it."""
    decode = _best_decode(demand, lines)
    found = [(lines.constant + u) * demand.iterations + _own(demand, lines, decode, v) for u, v in lines.tokens]
    most: FloatArray = np.max(found, axis=0)
    return most


def least_remaining_first(arrival: FloatArray, work: FloatArray) -> float:
    """Mean seconds from arrival to completion on one machine that always serves the request with the least work left.

    Args:
        arrival: (n,) seconds, non-decreasing; n >= 1.
        work: (n,) seconds >= 0.
    """
    left: list[float] = []
    now = total = 0.0
    for time, seconds in zip(arrival.tolist(), work.tolist(), strict=True):
        total += _run(left, now, time)
        now = time
        heapq.heappush(left, seconds)
    total += _run(left, now, np.inf)
    return (total - float(arrival.sum())) / arrival.size


def _run(left: list[float], now: float, until: float) -> float:
    """Serve from ``now`` to ``until``; returns the sum of the completion times between."""
    total = 0.0
    while left and now < until:
        first = left[0]
        if now + first <= until:
            heapq.heappop(left)
            now += first
            total += now
        else:
            heapq.heapreplace(left, first - (until - now))
            return total
    return total


__all__ = ["LatencyBound", "alone_seconds", "latency_bound", "least_remaining_first", "works"]
