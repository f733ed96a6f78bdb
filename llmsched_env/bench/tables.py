"""Rows to figures with intervals: one cell for each policy and rate, the same for terminal, plots and HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmsched_env.bench.comparison import Row
from llmsched_env.metrics import Interval, mean_interval

METRICS = (
    "latency_mean", "latency_p99", "latency_max", "slowdown_jain", "ttft_mean", "ttft_p99", "tpot_mean", "throughput_tok_s", "evictions",
    "kv_mean", "kv_max",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cell:
    """Means over the seeds of one policy at one rate; ``cell[metric]`` is an ``Interval``.

    Attributes:
        requests, completed: summed over seeds.
        notes: distinct notes of the runs.
        iterations, out_of_range: engine iterations, and those outside the data behind the time model; summed over seeds.
    """

    policy: str
    rate: float
    seeds: int
    requests: int
    completed: int
    known_lengths: bool
    notes: tuple[str, ...]
    intervals: dict[str, Interval]
    iterations: int = 0
    out_of_range: int = 0

    def __getitem__(self, metric: str) -> Interval:
        return self.intervals[metric]

    @property
    def overload(self) -> bool:
        """The policy said that this rate is outside the region its theory covers."""
        return any("overload" in note.lower() for note in self.notes)

    @property
    def marks(self) -> tuple[str, ...]:
        """What must stand beside the policy's name wherever its figures stand."""
        known = ("known lengths",) if self.known_lengths else ()
        return known + (("overload",) if self.overload else ())

    @property
    def unfinished(self) -> int:
        return self.requests - self.completed


def cells(rows: Sequence[Row], policies: Sequence[str]) -> list[Cell]:
    """By rate, then in the order of ``policies``."""
    result = []
    for rate in sorted({row.rate for row in rows}):
        for policy in policies:
            own = [row for row in rows if row.policy == policy and row.rate == rate]
            if own:
                result.append(_cell(own))
    return result


def _cell(rows: Sequence[Row]) -> Cell:
    return Cell(
        policy=rows[0].policy,
        rate=rows[0].rate,
        seeds=len(rows),
        requests=sum(row.figures.requests for row in rows),
        completed=sum(row.figures.completed for row in rows),
        known_lengths=rows[0].known_lengths,
        notes=tuple(sorted({row.notes for row in rows if row.notes})),
        intervals={metric: mean_interval([float(getattr(row.figures, metric)) for row in rows]) for metric in METRICS},
        iterations=sum(row.figures.iterations for row in rows),
        out_of_range=sum(row.figures.out_of_range for row in rows),
    )


def policy_labels(rows: Sequence[Row], policies: Sequence[str]) -> dict[str, str]:
    """Names for legends, in the order of ``policies``."""
    known = {row.policy for row in rows if row.known_lengths}
    return {policy: f"{policy} (known lengths)" if policy in known else policy for policy in policies}


@dataclass(frozen=True, slots=True)
class Column:
    """A printed column: heading, metric, factor, most decimals."""

    heading: str
    metric: str
    factor: float = 1.0
    decimals: int = 2

    def show(self, cell: Cell) -> str:
        """``mean ± half width``; three significant digits where that needs no more than ``decimals``."""
        interval = cell[self.metric]
        mean, half = interval.mean * self.factor, interval.half_width * self.factor
        if math.isnan(mean):
            return "-"
        digits = min(max(2 - math.floor(math.log10(abs(mean))), 0), self.decimals) if mean else 0
        text = f"{mean:,.{digits}f}"
        if math.isnan(half):
            return text
        if half < 0.5 * 10**-digits and half > 0:
            return f"{text} ± {half:.1g}"
        return f"{text} ± {half:,.{digits}f}"


COLUMNS = (
    Column("latency (s)", "latency_mean", decimals=3),
    Column("TTFT P99 (s)", "ttft_p99", decimals=3),
    Column("throughput (tok/s)", "throughput_tok_s"),
    Column("evictions", "evictions", decimals=1),
    Column("KV mean (%)", "kv_mean", 100.0, 1),
)
"""Of the terminal, which is narrow."""

REPORT_COLUMNS = (
    COLUMNS[0],
    Column("latency max (s)", "latency_max", decimals=3),
    Column("fairness", "slowdown_jain", decimals=3),
    *COLUMNS[1:],
)
"""Of the report."""


def footnotes(table: Sequence[Cell]) -> list[str]:
    """One line for each distinct note of a policy, naming the rates it holds at."""
    rates: dict[tuple[str, str], list[float]] = {}
    for cell in table:
        for note in cell.notes:
            rates.setdefault((cell.policy, note), []).append(cell.rate)
    return [f"{policy} at {', '.join(f'{r:g}' for r in own)} req/s: {note}" for (policy, note), own in rates.items()]


def short_footnotes(table: Sequence[Cell]) -> list[str]:
    """In few words: which policy is in overload at which rates, what was extrapolated, and what is unfinished."""
    overload: dict[str, list[float]] = {}
    for cell in table:
        if cell.overload:
            overload.setdefault(cell.policy, []).append(cell.rate)
    rates = {policy: ", ".join(f"{r:g}" for r in own) for policy, own in overload.items()}
    lines = [f"overload: {policy} at {own} req/s, outside the region its theory covers" for policy, own in rates.items()]
    outside: dict[str, list[str]] = {}
    for cell in table:
        if cell.out_of_range:
            outside.setdefault(cell.policy, []).append(f"{cell.rate:g} req/s ({100 * cell.out_of_range / cell.iterations:.2g} %)")
    reach = "share of iterations outside the range of the time model's data, their times extrapolated"
    lines += [f"extrapolated: {policy} at {', '.join(own)}, {reach}" for policy, own in outside.items()]
    left = [f"{c.policy} at {c.rate:g} req/s: {c.unfinished:,} of {c.requests:,} requests not completed" for c in table if c.unfinished]
    return lines + left
