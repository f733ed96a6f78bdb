"""The experiments: which policy on which engine, and one seed of each.

Two types (prompt, output, rate) = (10, 10, 2) and (10, 20, 1), d1 = 1 ms per token, the first 20 % of the horizon left out.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from llmsched_baselines import Setting, make_policy
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.metrics import summarize
from llmsched_env.runner import run_episode
from llmsched_env.workload import load_scenario

WARMUP_SHARE = 0.2
COLLAPSE_EVICTIONS_PER_ITERATION = 0.01


@dataclass(frozen=True)
class Line:
    """One line: a policy at one capacity, and the figures (throughput, latency, TTFT, evictions, peak KV) of an independent event-driven
    simulation of the same model with seed 0 (own calculation, another random stream), so agreement is statistical."""

    d0: float
    horizon: float
    policy: str
    label: str
    capacity: int
    reference: tuple[float, float, float, int, int]
    thresholds: tuple[float, ...] | None = None
    variant: str = "B"

    @property
    def key(self) -> tuple[float, str, int]:
        return (self.d0, self.label, self.capacity)

    def describe(self) -> dict[str, Any]:
        """What a run depends on, as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "reference"}


@dataclass(frozen=True)
class Run:
    """One seed of one line; ``d0``, ``label`` and ``capacity`` name the line. Times in seconds."""

    d0: float
    label: str
    capacity: int
    seed: int
    throughput: float
    latency: float
    ttft: float
    evictions: int
    kv_peak: int
    collapsed: bool

    @property
    def line(self) -> tuple[float, str, int]:
        return (self.d0, self.label, self.capacity)


def lines() -> list[Line]:
    """In the order of the table."""
    fast, slow = (0.1, 4000.0), (1.0, 20000.0)
    return [
        Line(*fast, "wait", "WAIT (2,1)", 750, (40.79, 15.05, 2.86, 0, 750), (2, 1)),
        Line(*fast, "fcfs", "FCFS", 750, (40.83, 7.35, 1.26, 53, 750)),
        Line(*fast, "fcfs", "FCFS, C = M*", 300, (31.90, 530, 521, 11151, 300)),
        Line(*fast, "fcfs", "FCFS", 450, (34.99, 299, 287, 11223, 450)),
        Line(*fast, "nested-wait", "Nested B (4,2), C = M_req", 1406, (40.80, 22.17, 3.63, 0, 1270), (4, 2)),
        Line(*fast, "nested-wait", "Nested A (4,2), C = M_req", 1406, (40.82, 23.03, 3.85, 0, 1310), (4, 2), "A"),
        Line(*slow, "wait", "WAIT (10,5)", 3750, (40.16, 77.5, 16.2, 0, 3750), (10, 5)),
        Line(*slow, "fcfs", "FCFS", 3750, (35.38, 802, 711, 37635, 3750)),
        Line(*slow, "fcfs", "FCFS, C = M*", 3000, (32.43, 2294.5, 2207.9, 53218, 3000)),
        Line(*slow, "fcfs", "FCFS", 3375, (33.35, 1750, 1656, 50684, 3375)),
        Line(*slow, "fcfs", "FCFS", 4500, (40.20, 60.9, 10.3, 0, 4452)),
        Line(*slow, "nested-wait", "Nested B (16,6), C = M_req", 5003, (40.17, 83.9, 15.1, 0, 4570), (16, 6)),
        Line(*slow, "nested-wait", "Nested B (16,6), C = M^pi", 4170, (37.8, 798, float("nan"), 10108, 4170), (16, 6)),
        Line(*slow, "nested-wait", "Nested A (16,6), C = M_req", 5003, (40.19, 87.6, 16.8, 0, 4690), (16, 6), "A"),
        Line(*slow, "nested-wait", "Nested B (18,7), C = M_req", 5435, (40.18, 93.8, 15.9, 0, 5155), (18, 7)),
        Line(*slow, "nested-wait", "Nested B (24,10), C = M_req", 7075, (40.17, 125.3, 19.6, 0, 6830), (24, 10)),
    ]


def run_line(line: Line, seed: int) -> Run:
    """One seed of one line."""
    scenario = load_scenario("two-type")
    engine = EngineConfig.paper(line.capacity, line.d0, 1e-3)
    setting = Setting(scenario.statistics, 3.0, engine, horizon_seconds=line.horizon)
    options: dict[str, Any] = {}
    if line.thresholds is not None:
        # Below M_req the safety-buffer condition is broken on purpose.
        options = {"thresholds": line.thresholds, "overload": True}
    if line.policy == "nested-wait":
        options |= {"segment_ends": (10,), "variant": line.variant}
    policy = make_policy(line.policy, setting, **options)
    workload = scenario.generate(seed, rate=3.0, horizon=line.horizon)
    result = run_episode(policy, workload, limits=EpisodeLimits(drain=False, horizon=line.horizon))
    s = summarize(result.log, result.counters, kv_capacity=line.capacity, warmup=WARMUP_SHARE * line.horizon)
    return Run(
        d0=line.d0,
        label=line.label,
        capacity=line.capacity,
        seed=seed,
        throughput=s.throughput_tok_s,
        latency=s.latency_mean,
        ttft=s.ttft_mean,
        evictions=s.evictions,
        kv_peak=result.counters.kv_peak,
        collapsed=s.evictions > COLLAPSE_EVICTIONS_PER_ITERATION * s.iterations,
    )
