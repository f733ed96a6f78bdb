"""Rows of an evaluation as arrays by cell and variant, and what follows from them: bests and marks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_agents.statistics import Estimate, Verdict, mean_of, relative_difference, verdict
from llmsched_env.bench.evaluation import METRICS, Row, lengths_known
from llmsched_env.bench.suite import Cell
from llmsched_env.bench.variants import Kind, Variant, greedy_of
from llmsched_env.types import FloatArray

OVERLOADED = (1.0, 1.1)


class Results:
    """Rows of the planned variants.

    Args:
        plan: the variants of each cell; rows of others are left out.
        rows: of any cells; one for each (cell, variant, seed).
    """

    def __init__(self, plan: Mapping[Cell, Sequence[Variant]], rows: Iterable[Row]) -> None:
        self.plan = plan
        wanted = {(cell.key, v.label, v.options_text, v.digest) for cell, own in plan.items() for v in own}
        self._rows: dict[tuple[str, str], dict[int, Row]] = {}
        for row in rows:
            if (row.cell, row.variant, row.options, row.digest) in wanted:
                self._rows.setdefault((row.cell, row.variant), {})[row.seed] = row
        self.cells = [cell for cell in plan if any((cell.key, v.label) in self._rows for v in plan[cell])]

    def rows(self, cell: Cell, label: str) -> list[Row]:
        """By seed."""
        own = self._rows.get((cell.key, label), {})
        return [own[seed] for seed in sorted(own)]

    def seeds(self, cell: Cell) -> list[int]:
        """Seeds on which every variant of the cell ran."""
        sets = [set(self._rows.get((cell.key, v.label), {})) for v in self.plan[cell]]
        return sorted(set.intersection(*sets)) if sets else []

    def values(self, cell: Cell, label: str, metric: str = "latency_mean") -> FloatArray:
        """(S,) over the seeds of the cell."""
        own = self._rows.get((cell.key, label), {})
        return np.array([getattr(own[seed].figures, metric) for seed in self.seeds(cell)], dtype=np.float64)

    def mean(self, cell: Cell, label: str, metric: str = "latency_mean") -> float:
        values = self.values(cell, label, metric)
        return float(values.mean()) if values.size else math.nan

    def labels(self, cell: Cell, kinds: Sequence[Kind] = ("default", "tuned", "agent")) -> list[str]:
        """Those tuned together only where asked for: elsewhere a baseline stands there once as it ships and once at its best."""
        return [v.label for v in self.plan[cell] if v.kind in kinds]

    def best(self, cell: Cell, labels: Iterable[str], metric: str = "latency_mean", *, lowest: bool = True) -> str:
        """The label with the best mean on the evaluation seeds themselves; empty if none has one. This favours the baselines."""
        means = {label: self.mean(cell, label, metric) for label in labels}
        known = {label: value for label, value in means.items() if math.isfinite(value)}
        if not known:
            return ""
        return min(known, key=lambda label: known[label] if lowest else -known[label])

    def best_default(self, cell: Cell, metric: str = "latency_mean", *, lowest: bool = True) -> str:
        """Among baselines as they ship that are not told output lengths."""
        return self.best(cell, [x for x in self.labels(cell, ("default",)) if not lengths_known(x)], metric, lowest=lowest)

    def best_tuned(self, cell: Cell, metric: str = "latency_mean", *, lowest: bool = True) -> str:
        """Among tuned baselines that are not told output lengths; empty where nothing was tuned."""
        return self.best(cell, [x for x in self.labels(cell, ("tuned",)) if not lengths_known(x)], metric, lowest=lowest)

    def best_together(self, chosen: Sequence[Cell]) -> str:
        """The one baseline with parameters tuned together that has the least mean latency over these cells, as a share of greedy FIFO's.

        Among those not told output lengths that run in all of them, on the evaluation seeds themselves; empty where there is none.
        """
        scores = {label: self.relative_mean(chosen, label) for label in self.together(chosen) if not lengths_known(label)}
        known = {label: score for label, score in scores.items() if math.isfinite(score)}
        return min(known, key=known.__getitem__) if known else ""

    def together(self, chosen: Sequence[Cell]) -> list[str]:
        """Labels with parameters tuned together that run in all of these cells."""
        own = [self.labels(cell, ("together",)) for cell in chosen]
        return [label for label in own[0] if all(label in others for others in own)] if own else []

    def relative_mean(self, chosen: Sequence[Cell], label: str) -> float:
        """Mean over cells of a label's mean latency as a share of greedy FIFO's."""
        return float(np.mean([self.mean(cell, label) / self.mean(cell, f"{greedy_of(cell)} (default)") for cell in chosen]))

    def oracle(self, cell: Cell) -> str:
        """The best of the bounds that know output lengths: tuned ones, or the defaults where nothing was tuned anywhere."""
        names = ("mc-sf", "oracle-sjf", "pooled-work")
        found = self.best(cell, [f"{name} (tuned)" for name in names if f"{name} (tuned)" in self.labels(cell)])
        if found or any(v.kind == "tuned" for own in self.plan.values() for v in own):
            return found
        return self.best(cell, [f"{name} (default)" for name in names if f"{name} (default)" in self.labels(cell)])

    def with_gap(self, chosen: Iterable[Cell], reference: Callable[[Cell], str]) -> list[Cell]:
        """The cells whose bound is at least 1 % below a reference: elsewhere there is no gap to close."""
        found = []
        for cell in chosen:
            bound = self.oracle(cell)
            if bound and reference(cell) and self.mean(cell, bound) < 0.99 * self.mean(cell, reference(cell)):
                found.append(cell)
        return found

    def tail_exceeds(self, cell: Cell, label: str) -> bool:
        """Whether the 99th percentile of a label's latencies is above greedy FIFO's on the same requests."""
        greedy = f"{greedy_of(cell)} (default)"
        return label != greedy and self.mean(cell, label, "latency_p99") > self.mean(cell, greedy, "latency_p99")

    def against(self, cell: Cell, ours: str, theirs: str, metric: str = "latency_mean") -> Estimate:
        return relative_difference(self.values(cell, ours, metric), self.values(cell, theirs, metric))

    def speedups(self, label_of: Callable[[Cell], str], chosen: Sequence[Cell]) -> FloatArray:
        """(cells, S) mean latency of greedy FIFO over that of a label, seed by seed; cells without common seeds are left out.

        A label that does not run in a cell scores NaN there.
        """
        common = sorted(set.intersection(*(set(self.seeds(cell)) for cell in chosen))) if chosen else []
        out = np.full((len(chosen), len(common)), math.nan)
        for i, cell in enumerate(chosen):
            base = self._rows.get((cell.key, f"{greedy_of(cell)} (default)"), {})
            own = self._rows.get((cell.key, label_of(cell)), {})
            if base and own:
                out[i] = [base[seed].figures.latency_mean / own[seed].figures.latency_mean for seed in common]
        return out


@dataclass(frozen=True, slots=True)
class Line:
    """A variant in a cell.

    Attributes:
        cell: ``Cell.key``.
        variant, options: of ``Variant``, as text.
        seeds: on which every variant of the cell ran.
        figures: mean over them by metric, with its interval; None where there is none.
    """

    cell: str
    variant: str
    options: str
    seeds: int
    figures: Mapping[str, Estimate | None]


def lines_of(results: Results) -> list[Line]:
    """Every cell, variant and metric."""
    found = []
    for cell in results.cells:
        for variant in results.plan[cell]:
            by_metric = {metric: results.values(cell, variant.label, metric) for metric in METRICS}
            figures = {metric: mean_of(values) if values.size else None for metric, values in by_metric.items()}
            found.append(Line(cell.key, variant.label, variant.options_text, len(results.seeds(cell)), figures))
    return found


@dataclass(frozen=True, slots=True)
class Mark:
    """One cell of one challenger against one baseline."""

    cell: Cell
    challenger: str
    baseline: str
    difference: Estimate
    verdict: Verdict


def mark(results: Results, cell: Cell, ours: str, theirs: str, metric: str = "latency_mean", *, lower: bool = True) -> Mark:
    difference = results.against(cell, ours, theirs, metric)
    return Mark(cell, ours, theirs, difference, verdict(difference, lower_is_better=lower))


def matrix(results: Results, chosen: Sequence[Cell], label_of: Callable[[Cell], str], metric: str = "latency_mean") -> FloatArray:
    """(cells, S) of one metric on the seeds that all cells share."""
    seeds = set.intersection(*(set(results.seeds(cell)) for cell in chosen))

    def common(cell: Cell) -> list[float]:
        values = results.values(cell, label_of(cell), metric)
        return [float(value) for seed, value in zip(results.seeds(cell), values, strict=True) if seed in seeds]

    return np.array([common(cell) for cell in chosen])


def pooled_difference(
    results: Results,
    chosen: Sequence[Cell],
    ours: Callable[[Cell], str],
    theirs: Callable[[Cell], str],
    metric: str = "latency_mean",
) -> Estimate:
    """Relative difference of sums over cells, each cell first divided by its baseline's mean so that all count alike."""
    a, b = matrix(results, chosen, ours, metric), matrix(results, chosen, theirs, metric)
    scale = b.mean(axis=1, keepdims=True)
    scale = np.where(scale > 0, scale, 1.0)
    return relative_difference((a / scale).sum(axis=0), (b / scale).sum(axis=0))


def percent(value: float) -> str:
    return "-" if not math.isfinite(value) else f"{100 * value:+.1f} %"


def interval(estimate: Estimate) -> str:
    if not math.isfinite(estimate.low):
        return percent(estimate.value)
    return f"{percent(estimate.value)} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
