"""The runs of an evaluation: every variant in every cell on every seed, one row each."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmsched_env.bench.suite import SUITE, Bench, Cell, run_counted
from llmsched_env.bench.tuning import TOGETHER, Tuned, default_options
from llmsched_env.bench.variants import SUFFIXES, Variant, known_lengths, runs_on
from llmsched_env.compiled import CACHE_FOLDER
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.errors import ConfigError, policy_named
from llmsched_env.metrics import Summary
from llmsched_env.runner import Policy

METRICS = {
    "latency_mean": "mean latency (s)",
    "latency_p99": "P99 latency (s)",
    "latency_max": "longest latency (s)",
    "slowdown_jain": "Jain's index of slowdown",
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
        digest: of an agent's checkpoint, empty for what has none.
        figures: of the requests that arrived after the warm-up, against the cell's limits (evictions, iterations and the like are of
            the whole run); ``Summary.absent()`` where nothing ran.
        notes: of the policy; why nothing ran where there are no figures.
        sources: digest of the simulator's sources.
    """

    cell: str
    variant: str
    options: str
    digest: str
    seed: int
    num_requests: int
    figures: Summary
    wall_seconds: float
    notes: str
    sources: str

    @property
    def task(self) -> tuple[str, str, str, str, int, int]:
        return self.cell, self.variant, self.options, self.digest, self.seed, self.num_requests

    @property
    def extrapolated(self) -> float:
        """Share of the iterations outside the data behind the iteration times."""
        return round(self.figures.out_of_range / max(self.figures.iterations, 1), 6)


def variants_of(
    cell: Cell,
    policies: Sequence[str],
    tuned: Mapping[tuple[str, str], Tuned],
    agents: Iterable[Variant],
    bench: Bench,
) -> list[Variant]:
    """What runs in a cell: defaults, tuned baselines where the file has them, agents.

    Args:
        tuned: by (cell key, policy); parameters tuned together run in the cells of their search.
        agents: run in every cell.
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
    return [*found, *agents]


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
    workload, limits, backend = bench.workload(cell, "evaluation", seed), bench.limits(cell), SimBackend()
    rows = []
    for variant in variants:
        policy = _policy(bench, cell, variant)
        if isinstance(policy, str):
            rows.append(_row(bench, cell, seed, variant, Summary.absent(), 0.0, policy))
        else:
            with policy_named(f"{variant.label} in {cell.key}, seed {seed}"):
                figures, wall_seconds = run_counted(policy, workload, backend, limits)
            rows.append(_row(bench, cell, seed, variant, figures, wall_seconds, policy.notes))
    return rows


def _row(bench: Bench, cell: Cell, seed: int, variant: Variant, figures: Summary, wall_seconds: float, notes: str) -> Row:
    return Row(
        cell=cell.key,
        variant=variant.label,
        options=variant.options_text,
        digest=variant.digest,
        seed=seed,
        num_requests=bench.count(cell),
        figures=figures,
        wall_seconds=round(wall_seconds, 6),
        notes=notes,
        sources=sources_digest(),
    )


def settings_of(bench: Bench) -> dict[str, Any]:
    """What rows of one file must have in common and do not state themselves, as plain values: the rates that loads are shares of."""
    rates = {f"boundary of {entry.scenario} with {entry.kv}": entry.rate for entry in bench.boundaries.entries}
    return {"suite": SUITE, **rates}


def sources_digest() -> str:
    """Of the simulator's sources, as rows and ablations record it."""
    return CACHE_FOLDER.name.rpartition("-")[2]


def missing_tasks(
    bench: Bench, plan: Mapping[Cell, Sequence[Variant]], seeds: Iterable[int], rows: Iterable[Row]
) -> list[tuple[Bench, Cell, int, tuple[Variant, ...]]]:
    """What has no row yet, as arguments of ``run_cell``; the longest cells first, so that none comes last alone."""
    done = {row.task for row in rows}
    tasks = []
    numbers = list(seeds)
    for cell in sorted(plan, key=lambda cell: (-bench.count(cell) * cell.load, cell.key)):
        for seed in numbers:
            open_ = tuple(v for v in plan[cell] if (cell.key, v.label, v.options_text, v.digest, seed, bench.count(cell)) not in done)
            if open_:
                tasks.append((bench, cell, seed, open_))
    return tasks
