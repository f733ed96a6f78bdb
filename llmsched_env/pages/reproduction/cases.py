"""One configuration of the reproduction as a record, its run over seeds, and what is kept of each run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_baselines import Policy, Setting, make_policy
from llmsched_env import __version__
from llmsched_env.backend import Counters
from llmsched_env.batch_runner import Run, run_batch
from llmsched_env.bench.comparison import extrapolation_reported
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.metrics import Interval, mean_interval
from llmsched_env.perf import load_calibration
from llmsched_env.perf.models import FormulaTime
from llmsched_env.types import FloatArray, LengthStatistics, RequestLog, Workload
from llmsched_env.workload import MMPP2, PiecewiseConstant, Poisson, Scenario, Types, load_scenario

WINDOW = (0.2, 0.9)
"""Requests that arrive in this part of a run count for latency and TTFT: the same central window for every policy."""

CALIBRATION = "a100-llama2-7b-c10"
"""Iteration times of the ``vllm`` preset: a formula of the kind that the page is about, whose prefill can be made free."""

DRIFT_FROM = 0.3
DRIFT_SAMPLES = 200
FORMAT = 1

Pairs = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One configuration: workload, engine, policy, and how often it is run.

    Attributes:
        policy, options: name and constructor options of the policy.
        rate: arrival rate, requests/s.
        engine: fields of ``EngineConfig``; ``d0`` and ``d1`` stand for a linear time model, ``decode_only`` for prefill
            without cost (its KV comes from another machine).
        preset: ``paper`` or ``vllm``.
        types: (prompt, output, weight) of each type; empty for ``lengths``.
        lengths: name of a built-in scenario whose lengths are drawn.
        arrivals: ("poisson",), ("mmpp", low, high, seconds low, seconds high) or ("steps", durations, rates); all scaled to ``rate``.
        planned_rate: the rate the policy is built for; 0 for ``rate``.
        horizon: seconds of a run without drain; 0 for ``requests`` that are all served.
        seeds: first_seed, first_seed + 1, ...
    """

    policy: str
    rate: float
    options: Pairs = ()
    engine: Pairs = ()
    preset: str = "paper"
    types: tuple[tuple[int, int, float], ...] = ()
    lengths: str = ""
    arrivals: tuple[Any, ...] = ("poisson",)
    planned_rate: float = 0.0
    horizon: float = 0.0
    requests: int = 0
    seeds: int = 10
    first_seed: int = 0

    @property
    def key(self) -> str:
        """Name of the result: a hash of everything that decides it but the code."""
        text = json.dumps([FORMAT, __version__, dataclasses.asdict(self)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    def base_engine(self) -> EngineConfig:
        """The engine before the policy's own preset."""
        fields = dict(self.engine)
        decode_only = fields.pop("decode_only", False)
        if self.preset == "paper":
            return EngineConfig.paper(fields.pop("capacity_tokens"), fields.pop("d0"), fields.pop("d1"), **fields)
        engine = EngineConfig.vllm(time_model=load_calibration(CALIBRATION))
        return engine.replace(time_model=without_prefill(engine)) if decode_only else engine

    def overrides(self) -> dict[str, Any]:
        """Engine fields that hold whatever the policy's preset says (``vllm`` preset)."""
        return {} if self.preset == "paper" else {name: value for name, value in self.engine if name != "decode_only"}

    def scenario(self) -> Scenario:
        base = load_scenario(self.lengths or "p512d20")
        if self.types:
            prompt, output, weight = zip(*self.types, strict=True)
            base = dataclasses.replace(base, name="types", lengths=Types(prompt, output, weight))
        process = {"poisson": Poisson, "mmpp": MMPP2, "steps": PiecewiseConstant}[self.arrivals[0]]
        arrivals = Poisson(self.rate) if process is Poisson else process(*self.arrivals[1:]).with_rate(self.rate)
        return dataclasses.replace(base, arrivals=arrivals)

    def statistics(self) -> LengthStatistics:
        return self.scenario().statistics

    def policy_engine(self) -> EngineConfig:
        return self.build().engine

    def build(self) -> Policy:
        seconds = self.horizon or self.requests / self.rate
        setting = Setting(self.statistics(), self.planned_rate or self.rate, self.base_engine(), seconds, self.overrides())
        return make_policy(self.policy, setting, overload=True, **dict(self.options))

    def workload(self, seed: int) -> Workload:
        scenario = self.scenario()
        return scenario.generate(seed, horizon=self.horizon) if self.horizon else scenario.generate(seed, num_requests=self.requests)

    def limits(self) -> EpisodeLimits:
        return EpisodeLimits(drain=False, horizon=self.horizon) if self.horizon else EpisodeLimits(max_iterations=3_000_000)


def without_prefill(engine: EngineConfig) -> FormulaTime:
    """The calibrated formula with prefill tokens free, for an engine that only decodes.

    The knee of the formula counts prefill tokens too, so the line below it is used throughout: above 128 decodes
    it is from 8 % above the other one to 5 % below it at 185 decodes, the most that fit with 640 tokens each.
    """
    model = engine.time_model
    assert isinstance(model, FormulaTime)
    return dataclasses.replace(model, b=0.0, s=model.a, c=0.0, d3=0.0, d4=model.d4 + model.b)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run. Seconds, tokens, requests; NaN where no request counts.

    Attributes:
        offered, completed: requests/s that arrived and that completed in [0.2 T, T], T the last arrival or the horizon.
        tokens: output tokens/s of those completed.
        latency, latency_p99, ttft, ttft_p99: of requests that arrived in [0.2 T, 0.9 T].
        drift: slope of the number in system over [0.3 T, T], as a share of the arrival rate.
        gap: output tokens of requests that arrived but did not complete by T.
        evictions: forced and asked for.
        evicted_share: share of requests evicted at least once.
        kv_peak: KV units; kv_mean: share of the capacity, time average.
    """

    offered: float
    completed: float
    tokens: float
    latency: float
    latency_p99: float
    ttft: float
    ttft_p99: float
    drift: float
    gap: float
    evictions: int
    evicted_share: float
    iterations: int
    kv_peak: int
    kv_mean: float


@dataclass(frozen=True, slots=True)
class Group:
    """All seeds of a case."""

    case: Case
    notes: str
    outcomes: tuple[Outcome, ...]
    wall_seconds: float

    def values(self, name: str) -> FloatArray:
        return np.array([getattr(o, name) for o in self.outcomes], dtype=np.float64)

    def interval(self, name: str) -> Interval:
        return mean_interval(self.values(name))

    def mean(self, name: str) -> float:
        return float(self.values(name).mean())


def run_case(case: Case) -> Group:
    """Every seed of a case; for a worker process."""
    start = time.perf_counter()
    policy = case.build()
    with extrapolation_reported():
        runs = (Run(policy, case.workload(case.first_seed + s), case.limits()) for s in range(case.seeds))
        outcomes = tuple(measure(r.log, r.counters, case.horizon, policy.engine.kv_capacity) for r in run_batch(runs))
    return Group(case, policy.notes, outcomes, time.perf_counter() - start)


def measure(log: RequestLog, counters: Counters, horizon: float, capacity: int) -> Outcome:
    """The figures of one run.

    Args:
        horizon: T; 0 for the last arrival.
    """
    end = horizon or float(log.arrival[-1])
    low = WINDOW[0] * end
    counted = (log.arrival >= low) & (log.arrival <= WINDOW[1] * end)
    done = np.isfinite(log.completed) & (log.completed <= end)
    inside = done & (log.completed >= low)
    latency = (log.completed - log.arrival)[counted]
    first = (log.first_token - log.arrival)[counted]
    arrived = log.arrival <= end
    return Outcome(
        offered=float(np.count_nonzero(log.arrival[arrived] >= low)) / (end - low),
        completed=float(np.count_nonzero(inside)) / (end - low),
        tokens=float(log.output_tokens[inside].sum(dtype=np.int64)) / (end - low),
        latency=_mean(latency),
        latency_p99=_percentile(latency, 99),
        ttft=_mean(first),
        ttft_p99=_percentile(first, 99),
        drift=drift(log.arrival[arrived], log.completed[done], end) / (float(np.count_nonzero(arrived)) / end),
        gap=float(log.output_tokens[arrived].sum(dtype=np.int64) - log.output_tokens[done].sum(dtype=np.int64)),
        evictions=counters.evictions,
        evicted_share=float(np.mean(log.evictions > 0)),
        iterations=counters.iterations,
        kv_peak=counters.kv_peak,
        kv_mean=counters.kv_seconds / (counters.clock * capacity),
    )


def drift(arrival: FloatArray, completed: FloatArray, end: float) -> float:
    """Least-squares slope of the number in system over [0.3, 1] x ``end``, requests per second."""
    at = np.linspace(DRIFT_FROM * end, end, DRIFT_SAMPLES)
    number = np.searchsorted(np.sort(arrival), at, side="right") - np.searchsorted(np.sort(completed), at, side="right")
    return float(np.polyfit(at - at.mean(), number.astype(np.float64), 1)[0])


def _mean(values: FloatArray) -> float:
    present = values[np.isfinite(values)]
    return float(present.mean()) if present.size else math.nan


def _percentile(values: FloatArray, percent: float) -> float:
    present = values[np.isfinite(values)]
    return float(np.percentile(present, percent)) if present.size else math.nan


def group_to_json(group: Group) -> dict[str, Any]:
    return dataclasses.asdict(group)


def group_from_json(data: Mapping[str, Any]) -> Group:
    """Raises ValueError, KeyError or TypeError where the data is not a group of this version."""
    case = Case(**{name: _tuples(value) for name, value in data["case"].items()})
    return Group(case, data["notes"], tuple(Outcome(**o) for o in data["outcomes"]), data["wall_seconds"])


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
