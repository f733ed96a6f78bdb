"""The runs of an evaluation: every variant in every cell on every seed, one row each."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from llmsched_env.bench.suite import Bench, Cell, warmup_seconds
from llmsched_env.bench.tuning import TOGETHER, Tuned, default_options
from llmsched_env.bench.variants import POLICIES, SUFFIXES, Variant, known_lengths, runs_on
from llmsched_env.compiled import CACHE_FOLDER
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import Summary, summarize
from llmsched_env.perf.base import CalibrationRangeWarning
from llmsched_env.runner import EpisodeResult, Policy, run_episode

METRICS = {
    "latency_mean": "mean latency (s)",
    "latency_p99": "P99 latency (s)",
    "ttft_mean": "mean TTFT (s)",
    "ttft_p99": "P99 TTFT (s)",
    "slo_goodput": "SLO goodput",
    "throughput_tok_s": "throughput (tok/s)",
    "evictions": "evictions",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One run: a line of the CSV file.

    Attributes:
        cell: ``Cell.key``.
        options: of a tuned baseline, as text.
        requests, completed: after the warm-up; metrics are of these requests, evictions of the whole run.
        out_of_range: share of iterations outside the data behind the iteration times.
        drained: iterations in which the engine overrode a policy that scheduled nothing.
        notes: of the policy; why nothing ran where ``requests`` is 0.
        sources: digest of the simulator's sources.
    """

    cell: str
    variant: str
    options: str
    seed: int
    num_requests: int
    requests: int
    completed: int
    latency_mean: float
    latency_p99: float
    ttft_mean: float
    ttft_p99: float
    slo_goodput: float
    throughput_tok_s: float
    evictions: int
    drained: int
    out_of_range: float
    wall_seconds: float
    notes: str
    sources: str

    @property
    def task(self) -> tuple[str, str, str, int, int]:
        return self.cell, self.variant, self.options, self.seed, self.num_requests


def variants_of(
    cell: Cell,
    policies: Sequence[str],
    tuned: Mapping[tuple[str, str], Tuned],
    agents: Mapping[str, str],
    bench: Bench,
) -> list[Variant]:
    """What runs in a cell: defaults, tuned baselines where the file has them, agents.

    Args:
        tuned: by (cell key, policy); parameters tuned together run in the cells of their search.
        agents: folders by name.
    """
    found = []
    for name in policies:
        if runs_on(name, cell):
            found.append(Variant(name, "default", tuple(default_options(name, bench, cell).items())))
            if (cell.key, name) in tuned:
                found.append(Variant(name, "tuned", tuple(tuned[cell.key, name].options.items())))
            shared = tuned.get((TOGETHER, name))
            if shared is not None and cell.key in shared.over:
                found.append(Variant(name, "together", tuple(shared.options.items())))
    return found + [Variant(name, "agent", folder=folder) for name, folder in agents.items()]


def default_policies() -> list[str]:
    return list(POLICIES)


def lengths_known(variant: str) -> bool:
    """Whether a label is of a baseline that is told output lengths."""
    name, _, kind = variant.rpartition(" (")
    return f" ({kind}" in SUFFIXES.values() and known_lengths(name)


@functools.lru_cache(maxsize=64)
def _policy(bench: Bench, cell: Cell, variant: Variant) -> Policy | str:
    """The policy, or why it cannot run; kept, as thresholds take longer to find than an episode."""
    try:
        return variant.build(bench, cell)
    except ConfigError as error:
        return str(error)


def run_cell(bench: Bench, cell: Cell, seed: int, variants: Sequence[Variant]) -> list[Row]:
    """One seed of a cell: the same requests for every variant."""
    workload = bench.workload(cell, "evaluation", seed)
    warmup = warmup_seconds(workload)
    ttft_limit, tpot_limit = bench.limits(cell)
    backend = SimBackend()
    rows = []
    for variant in variants:
        policy = _policy(bench, cell, variant)
        if isinstance(policy, str):
            rows.append(_row(bench, cell, seed, variant, None, None, policy))
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CalibrationRangeWarning)  # the row states how often
            result = run_episode(policy, workload, backend=backend)
        summary = summarize(
            result.log,
            result.counters,
            kv_capacity=policy.engine.kv_capacity,
            warmup=warmup,
            ttft_limit=ttft_limit,
            tpot_limit=tpot_limit,
        )
        rows.append(_row(bench, cell, seed, variant, result, summary, policy.notes))
    return rows


def _row(
    bench: Bench, cell: Cell, seed: int, variant: Variant, result: EpisodeResult | None, summary: Summary | None, notes: str
) -> Row:
    figures = {name: math.nan for name in METRICS} if summary is None else {name: getattr(summary, name) for name in METRICS}
    iterations = max(summary.iterations, 1) if summary else 1
    return Row(
        cell=cell.key,
        variant=variant.label,
        options=variant.options_text,
        seed=seed,
        num_requests=bench.count(cell),
        requests=summary.requests if summary else 0,
        completed=summary.completed if summary else 0,
        **{**figures, "evictions": summary.evictions if summary else 0},
        drained=summary.drain_iterations if summary else 0,
        out_of_range=round(summary.out_of_range / iterations, 6) if summary else 0.0,
        wall_seconds=round(result.wall_seconds, 6) if result else 0.0,
        notes=notes,
        sources=CACHE_FOLDER.name.rpartition("-")[2],
    )


def missing_tasks(
    bench: Bench, plan: Mapping[Cell, Sequence[Variant]], seeds: Iterable[int], rows: Iterable[Row]
) -> list[tuple[Bench, Cell, int, tuple[Variant, ...]]]:
    """What has no row yet, as arguments of ``run_cell``; the longest cells first, so that none comes last alone."""
    done = {row.task for row in rows}
    tasks = []
    numbers = list(seeds)
    for cell in sorted(plan, key=lambda cell: (-bench.count(cell) * cell.load, cell.key)):
        for seed in numbers:
            open_ = tuple(v for v in plan[cell] if (cell.key, v.label, v.options_text, seed, bench.count(cell)) not in done)
            if open_:
                tasks.append((bench, cell, seed, open_))
    return tasks
