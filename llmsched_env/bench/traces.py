"""Policies on recorded traces: their own timestamps, stretched to a share of greedy FIFO's boundary.

The boundary is that of the trace's own lengths on the engine (``llmsched_env.bench.boundary``), so a load means what it means in the
suite. Requests that the engine can never serve are left out for all policies alike. A trace is one run: intervals are over
20 blocks of consecutive arrivals, paired between policies, and take blocks for independent, which neighbours of a backlog are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from llmsched_agents.lookup import NamedPolicy
from llmsched_agents.statistics import Estimate, relative_difference
from llmsched_baselines import Setting
from llmsched_env.bench.boundary import measure
from llmsched_env.bench.comparison import extrapolation_reported
from llmsched_env.bench.suite import ENGINES
from llmsched_env.engine_changes import engine_with
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import summarize
from llmsched_env.runner import run_episode
from llmsched_env.types import FloatArray, Workload
from llmsched_env.workload import Scenario, scenario_from_trace
from llmsched_env.workload.arrivals import TraceArrivals

BLOCKS = 20
LONGEST = 32_768
"""Tokens of a request, at most."""


@dataclass(frozen=True, slots=True)
class TraceCase:
    """A trace on an engine.

    Attributes:
        trace: name of the file without suffixes.
        engine_name: of ``ENGINES``.
        left_out: requests that the engine can never serve.
        rate: mean arrival rate, requests/s.
    """

    trace: str
    engine_name: str
    scenario: Scenario
    engine: EngineConfig
    workload: Workload
    left_out: int
    rate: float

    @classmethod
    def of(cls, path: Path, engine_name: str, load: float, most: int | None) -> TraceCase:
        """A case at ``load`` of greedy FIFO's boundary.

        Args:
            most: requests, the first of the file; None: all.

        Raises:
            ConfigError: an unknown engine, a file that is refused or has no arrival times, or too few requests for the blocks.
        """
        if engine_name not in ENGINES:
            raise ConfigError(f"engine: {engine_name!r}, must be one of {', '.join(ENGINES)}")
        named = ENGINES[engine_name]
        recorded = scenario_from_trace(path)  # refuses files with lengths only: they have no rate
        assert recorded.rows is not None
        longest = min(named.num_blocks * recorded.engine.block_size, LONGEST)
        changes = {"num_blocks": named.num_blocks, "time_model": named.calibration, "max_model_len": longest}
        engine = engine_with(recorded.engine, changes)
        rows = recorded.rows
        kept = np.flatnonzero(rows.prompt_tokens.astype(np.int64) + rows.output_tokens <= longest)[:most]
        if kept.size < 2 * BLOCKS:
            raise ConfigError(f"{path}: {kept.size} requests fit the engine, must be at least {2 * BLOCKS}")
        arrival = rows.arrival[kept] - rows.arrival[kept[0]]
        served = Workload.of(arrival, rows.prompt_tokens[kept], rows.output_tokens[kept])
        alone = replace(recorded, rows=served)
        boundary = measure(alone, engine, engine_name, requests=min(4_000, kept.size), seeds=1).rate
        stretched = TraceArrivals(arrival).with_rate(load * boundary)
        times = stretched.sample(np.random.default_rng(0), kept.size)
        workload = Workload.of(times, served.prompt_tokens, served.output_tokens)
        return cls(path.name.split(".")[0], engine_name, recorded, engine, workload, len(rows) - len(workload), load * boundary)

    @property
    def setting(self) -> Setting:
        """What an operator knows: the trace's own statistics, and the rate."""
        return Setting(self.scenario.statistics, self.rate, self.engine, horizon_seconds=float(self.workload.arrival[-1]))


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One policy on one trace; seconds.

    Attributes:
        blocks: (BLOCKS,) mean latency of the requests that arrived in each block.
    """

    trace: str
    engine: str
    policy: str
    requests: int
    left_out: int
    rate: float
    mean: float
    p99: float
    longest: float
    jain: float
    blocks: tuple[float, ...]


def run_case(case: TraceCase, policies: Mapping[str, NamedPolicy]) -> list[TraceRow]:
    """Every policy on a trace."""
    rows = []
    for name, named in policies.items():
        policy = named.build(case.setting)
        with extrapolation_reported():
            result = run_episode(policy, case.workload)
        figures = summarize(result.log, result.counters, kv_capacity=policy.engine.kv_capacity)
        latency: FloatArray = result.log.completed - result.log.arrival
        blocks = tuple(float(np.nanmean(block)) for block in np.array_split(latency, BLOCKS))
        shown = (figures.latency_mean, figures.latency_p99, figures.latency_max, figures.slowdown_jain)
        rows.append(TraceRow(case.trace, case.engine_name, name, len(case.workload), case.left_out, case.rate, *shown, blocks))
    return rows


def against(ours: TraceRow, theirs: TraceRow) -> Estimate:
    """Relative difference of the mean latencies, with its interval over blocks."""
    return relative_difference(ours.blocks, theirs.blocks)


def lines_of(rows: Sequence[TraceRow], reference: str) -> list[Sequence[str]]:
    """Cells of a table: trace, engine, policy, mean, difference to a policy, P99, maximum, Jain's index."""
    found: list[Sequence[str]] = []
    by_case = {(row.trace, row.engine, row.policy): row for row in rows}
    for row in rows:
        base = by_case[row.trace, row.engine, reference]
        difference = "" if row is base else _shown(against(row, base))
        numbers = (f"{row.mean:.4g}", difference, f"{row.p99:.4g}", f"{row.longest:.4g}", f"{row.jain:.2f}")
        found.append((row.trace, ENGINES[row.engine].title, row.policy, *numbers))
    return found


def _shown(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} % [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
