"""The suite ``bench-v2``: cells (workload, load, GPU), their requests, and what an operator knows of each.

Iteration times are measured tables (``ENGINES``); ``bench-v1``, the suite before, had a smooth formula for Llama-2-7B, which rewards
token budgets that no GPU likes. A cell is of Llama-2-7B on one A100 unless it names another engine.

Stationary part: scenarios x loads x engines. Non-stationary part, on two scenarios that KV memory binds:

* ``bursts``: MMPP-2, phases of 120 s at 2/3 and of 60 s at 5/3 of the mean rate (mean sojourns).
* ``daily``: a rate that follows one sine a day, 1 +- 0.5 of its mean in 24 steps, two days an episode.
* ``shift``: the first half of the requests from one scenario, the second from the other, each at the
  same load of its own boundary; operators know the lengths of the whole episode as a mixture.

Loads are shares of greedy FIFO's boundary (``llmsched_env.bench.boundary``), measured for each scenario and engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from llmsched_baselines import Setting
from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.comparison import extrapolation_reported
from llmsched_env.bench.seeds import Purpose, seed_of
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_changes import engine_with
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.metrics import Summary, summarize
from llmsched_env.runner import Policy, run_episode
from llmsched_env.types import LengthStatistics, Workload
from llmsched_env.workload import MMPP2, PiecewiseConstant, Scenario, load_scenario

Part = Literal["stationary", "bursts", "daily", "shift"]

SUITE = "bench-v2"
SCENARIOS = ("two-type", "lmsys", "azure-conv", "azure-code", "sharegpt", "mooncake")
LOADS = (0.5, 0.8, 0.9, 1.0, 1.1)


@dataclass(frozen=True, slots=True)
class BenchEngine:
    """A model on a GPU.

    Attributes:
        calibration: iteration times.
        num_blocks: usable KV blocks of 16 tokens.
        title: for people.
    """

    calibration: str
    num_blocks: int
    title: str


ENGINES = {
    "80GB": BenchEngine("a100-llama2-7b-vllm", 7_424, "80 GB"),
    "40GB": BenchEngine("a100-llama2-7b-vllm", 2_816, "40 GB"),
    "llama3-80GB": BenchEngine("a100-llama3-8b-vllm", 27_413, "Llama-3-8B, 80 GB"),
    "llama3-40GB": BenchEngine("a100-llama3-8b-vllm", 8_981, "Llama-3-8B, 40 GB"),
    "rtx4090": BenchEngine("rtx4090-llama31-8b-vllm", 2_587, "Llama-3.1-8B, RTX 4090"),
}
"""Engines by the name that a cell has for them.

Blocks: of Llama-2-7B as ``bench-v1`` had them, of the others from their calibrations; ``llama3-40GB`` has as many fewer than
``llama3-80GB`` as 40 GiB at 0.9 utilisation hold blocks of 2 MiB.
"""
MEMORY = ("80GB", "40GB")
"""Engines of the suite unless others are asked for."""

MOVING: dict[Part, float] = {"bursts": 0.9, "daily": 0.85, "shift": 0.95}
"""Mean load of each kind of the non-stationary part."""

PAIRS = {"azure-conv": "sharegpt", "sharegpt": "azure-conv"}
"""Scenarios of the non-stationary part; ``shift`` goes from the first to the second."""

NUM_REQUESTS = {"stationary": 3_000, "bursts": 6_000, "daily": 6_000, "shift": 6_000}
WARMUP_SHARE = 0.2
"""Requests that arrive in this first share of an episode count in no figure."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One combination of the suite; ``load`` is a share of greedy FIFO's boundary."""

    part: Part
    scenario: str
    kv: str
    load: float

    @property
    def key(self) -> str:
        return f"{self.part}/{self.scenario}/{self.kv}/{self.load:g}"

    @property
    def title(self) -> str:
        name = f"{self.scenario} to {PAIRS[self.scenario]}" if self.part == "shift" else self.scenario
        return f"{name}, {kv_title(self.scenario, self.kv)}"


def kv_title(scenario: str, kv: str) -> str:
    engine = engine_of(scenario, kv)
    return f"C = {engine.capacity_tokens:,}" if engine.preset == "paper" else ENGINES[kv].title


def engine_of(scenario: str, kv: str) -> EngineConfig:
    """The scenario's engine as one of ``ENGINES``; the ``paper`` preset keeps its model and its capacity shrinks as the blocks do."""
    engine, named = load_scenario(scenario).engine, ENGINES[kv]
    if engine.preset == "paper":
        return engine.replace(capacity_tokens=round(engine.capacity_tokens * named.num_blocks / ENGINES["80GB"].num_blocks))
    return engine_with(engine, {"num_blocks": named.num_blocks, "time_model": named.calibration})


def cells(
    parts: Sequence[str] = ("stationary", *MOVING),
    scenarios: Sequence[str] = SCENARIOS,
    kvs: Sequence[str] = MEMORY,
    loads: Sequence[float] = LOADS,
) -> list[Cell]:
    """The cells of the suite that lie in all four selections; loads select in the stationary part alone.

    Raises:
        ConfigError: a name the suite does not have, or a load <= 0.
    """
    allowed = {"part": ("stationary", *MOVING), "scenario": SCENARIOS, "kv": tuple(ENGINES)}
    for kind, chosen in (("part", parts), ("scenario", scenarios), ("kv", kvs)):
        for name in chosen:
            if name not in allowed[kind]:
                hint = did_you_mean(name, allowed[kind])
                raise ConfigError(f"{kind}: {name!r} is not in {SUITE}{hint} (known: {', '.join(allowed[kind])})")
    for load in loads:
        if not 0 < load < 10:
            raise ConfigError(f"load: {load}, must be in (0, 10)")
    found: list[Cell] = []
    if "stationary" in parts:
        found += [Cell("stationary", s, kv, load) for s in scenarios for kv in kvs if _has(s, kv) for load in loads]
    for part, load in MOVING.items():
        if part in parts:
            found += [Cell(part, s, kv, load) for s in scenarios if s in PAIRS for kv in kvs]
    return found


def _has(scenario: str, kv: str) -> bool:
    """The ``paper`` preset has a model of its own, so it is run with the two memories alone."""
    return kv in MEMORY or load_scenario(scenario).engine.preset != "paper"


@dataclass(frozen=True, slots=True)
class Bench:
    """Workloads and settings of cells.

    Attributes:
        boundaries: rates that loads are shares of.
        num_requests: of one run; None for the suite's own.
    """

    boundaries: Boundaries
    num_requests: int | None = None

    def count(self, cell: Cell) -> int:
        return self.num_requests or NUM_REQUESTS[cell.part]

    def rate(self, cell: Cell) -> float:
        """Mean arrival rate of the episode, requests/s."""
        rates = [cell.load * self.boundaries.rate(name, cell.kv) for name in self._names(cell)]
        return len(rates) / sum(1.0 / rate for rate in rates)

    def setting(self, cell: Cell) -> Setting:
        """What an operator knows."""
        rate = self.rate(cell)
        statistics = _mixture([load_scenario(name).statistics for name in self._names(cell)])
        return Setting(statistics, rate, engine_of(cell.scenario, cell.kv), horizon_seconds=self.count(cell) / rate)

    def workload(self, cell: Cell, purpose: Purpose, seed: int) -> Workload:
        """The requests of one episode: the same for every policy, others for every purpose and seed."""
        n = self.count(cell)
        if cell.part == "shift":
            first, second = (
                load_scenario(name).generate(
                    seed_of(purpose, seed, part), rate=cell.load * self.boundaries.rate(name, cell.kv), num_requests=count
                )
                for part, (name, count) in enumerate(zip(self._names(cell), (n - n // 2, n // 2), strict=True))
            )
            return one_after_the_other(first, second)
        return self._scenario(cell).generate(seed_of(purpose, seed), rate=self.rate(cell), num_requests=n)

    def limits(self, cell: Cell) -> tuple[float, float]:
        """TTFT and TPOT limits of SLO goodput, seconds."""
        scenario = load_scenario(cell.scenario)
        return scenario.ttft_slo, scenario.tpot_slo

    @staticmethod
    def _names(cell: Cell) -> list[str]:
        return [cell.scenario, PAIRS[cell.scenario]] if cell.part == "shift" else [cell.scenario]

    def _scenario(self, cell: Cell) -> Scenario:
        scenario = load_scenario(cell.scenario)
        if cell.part == "bursts":
            return replace(scenario, arrivals=MMPP2(2 / 3, 5 / 3, 120.0, 60.0))
        if cell.part == "daily":
            hour = self.count(cell) / self.rate(cell) / 48
            share = 1.0 + 0.5 * np.sin(2 * np.pi * (np.arange(24) + 0.5) / 24)
            return replace(scenario, arrivals=PiecewiseConstant((hour,) * 24, tuple(float(s) for s in share)))
        return scenario


def warmup_seconds(workload: Workload) -> float:
    """Arrival of the first request that counts."""
    return float(workload.arrival[int(WARMUP_SHARE * len(workload))])


def run_counted(policy: Policy, workload: Workload, backend: SimBackend, limits: tuple[float, float]) -> tuple[Summary, float]:
    """One episode: its figures without the warm-up, against TTFT and TPOT limits in seconds, and the wall seconds it took."""
    with extrapolation_reported():
        result = run_episode(policy, workload, backend=backend)
    figures = summarize(
        result.log,
        result.counters,
        kv_capacity=policy.engine.kv_capacity,
        warmup=warmup_seconds(workload),
        ttft_limit=limits[0],
        tpot_limit=limits[1],
    )
    return figures, result.wall_seconds


def one_after_the_other(first: Workload, second: Workload) -> Workload:
    """The requests of two workloads, the second's times counted from the last arrival of the first."""
    offset = float(first.arrival[-1]) if len(first) else 0.0
    return Workload.of(
        np.concatenate([first.arrival, second.arrival + offset]),
        np.concatenate([first.prompt_tokens, second.prompt_tokens]),
        np.concatenate([first.output_tokens, second.output_tokens]),
    )


def _mixture(parts: Sequence[LengthStatistics]) -> LengthStatistics:
    """Each part with equal weight."""
    if len(parts) == 1:
        return parts[0]
    return LengthStatistics.of(
        np.concatenate([p.prompt for p in parts]),
        np.concatenate([p.output for p in parts]),
        np.concatenate([p.weight for p in parts]),
        source="; ".join(p.source for p in parts),
    )
