"""Rows of an evaluation as arrays by cell and variant, and what follows from them: bests, marks, bars."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_agents.statistics import Estimate, Verdict, mean_of, relative_difference, share_of_gap, verdict
from llmsched_env.bench.evaluation import METRICS, Row, lengths_known
from llmsched_env.bench.suite import MOVING, Cell
from llmsched_env.bench.variants import Kind, Variant, greedy_of
from llmsched_env.types import FloatArray

USED_TODAY = ("fcfs", "vllm", "sarathi", "wait", "nested-wait", "shortest-prompt", "reserve")
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


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar, what was found, and whether it is reached: ``reached``, ``not reached`` or why there is no answer."""

    number: int
    text: str
    found: str
    answer: str


NOT_TUNED = "no tuned baseline"
NOT_TOGETHER = "no baseline tuned together"
NO_AGENT = "no agent given"
BAR_TEXTS = {
    1: "zero tuning, never worse: within 2 % of the best tuned baseline's mean latency in every stationary cell",
    2: "against defaults in use: at least 10 % below the best of them, and 20 % below the better of WAIT and Nested WAIT, in two "
    "thirds of the cells at loads 1.0 and 1.1, intervals excluding zero",
    3: "where adapting pays: on the non-stationary part at least 5 % below the best baseline tuned on average for it",
    4: "share of the gap between the best tuned baseline and the oracle bound closed at loads 1.0 and 1.1: above 0 (25 % aimed at)",
    5: "SLO goodput at loads 1.0 and 1.1: at least 1 % above tuned late-last with an interval excluding zero, and 1.3 times the best "
    "default that does not look at limits",
}


def bars(results: Results, agent: str, slo_agent: str) -> list[Bar]:
    """All bars; an empty name means that no such agent was given."""
    found = []
    tests = {1: _never_worse, 2: _against_defaults, 3: _adapting, 4: _gap, 5: _slo}
    for number, test in tests.items():
        name = slo_agent if number == 5 else agent
        text, answer = test(results, name) if name else ("", NO_AGENT)
        found.append(Bar(number, BAR_TEXTS[number], text, answer))
    return found


def _answer(reached: bool) -> str:
    return "reached" if reached else "not reached"


def _stationary(results: Results, loads: Sequence[float] = ()) -> list[Cell]:
    return [c for c in results.cells if c.part == "stationary" and (not loads or c.load in loads)]


def _never_worse(results: Results, agent: str) -> tuple[str, str]:
    worst, within, total = -math.inf, 0, 0
    where = ""
    for cell in _stationary(results):
        best = results.best_tuned(cell)
        if best:
            difference = results.against(cell, agent, best).value
            total += 1
            within += difference <= 0.02
            if not difference <= worst:
                worst, where = difference, f"{cell.title}, load {cell.load:g}, against {best}"
    if not total:
        return "", NOT_TUNED
    return f"within 2 % in {within} of {total} cells; worst {percent(worst)} ({where})", _answer(within == total)


def _against_defaults(results: Results, agent: str) -> tuple[str, str]:
    chosen = _stationary(results, OVERLOADED)
    if not chosen:
        return "", "no cell at loads 1.0 and 1.1"
    ten = twenty = bound = 0
    for cell in chosen:
        labels = results.labels(cell, ("default",))
        used = [f"{name} (default)" for name in USED_TODAY if f"{name} (default)" in labels]
        waits = [label for label in used if label.startswith(("wait ", "nested-wait "))]
        if not waits:
            return "", "no default WAIT or Nested WAIT"
        best = results.best(cell, used)
        ten += _below(results.against(cell, agent, best), 0.10)
        oracle = results.oracle(cell)
        bound += bool(oracle) and _below(results.against(cell, oracle, best), 0.10)
        twenty += _below(results.against(cell, agent, results.best(cell, waits)), 0.20)
    text = f"10 % below in {ten} (the oracle bound: in {bound}), 20 % below WAIT and Nested WAIT in {twenty} of {len(chosen)} cells"
    return text, _answer(min(ten, twenty) >= 2 * len(chosen) / 3)


def _below(difference: Estimate, share: float) -> bool:
    return difference.value <= -share and difference.high < 0


def _adapting(results: Results, agent: str) -> tuple[str, str]:
    """Decided by the best single baseline with one set of parameters for the part; that of each cell is told beside it."""
    moving = [cell for cell in results.cells if cell.part in MOVING]
    shared = [cell for cell in moving if results.labels(cell, ("together",))]
    single = [cell for cell in moving if results.best_tuned(cell)]
    best = results.best_together(shared)
    found, answer = [], NOT_TOGETHER if single else NOT_TUNED
    if best:
        pooled = pooled_difference(results, shared, lambda _: agent, lambda _: best)
        found.append(f"{interval(pooled)} against {best}, the best with one set of parameters for all {len(shared)} cells")
        answer = _answer(_below(pooled, 0.05))
    if single:
        pooled = pooled_difference(results, single, lambda _: agent, results.best_tuned)
        found.append(f"{interval(pooled)} against the best tuned in each of {len(single)} cells separately, more than the bar asks")
    return "; ".join(found), answer


def _gap(results: Results, agent: str) -> tuple[str, str]:
    tuned = [cell for cell in _stationary(results, OVERLOADED) if results.best_tuned(cell)]
    if not tuned:
        return "", NOT_TUNED
    chosen = results.with_gap(tuned, results.best_tuned)
    if not chosen:
        return f"the bound is nowhere 1 % below the best tuned baseline ({len(tuned)} cells)", "no gap"
    matrices = [matrix(results, chosen, of) for of in (lambda _: agent, results.best_tuned, results.oracle)]
    share = share_of_gap(*matrices)
    return f"{interval(share)} over the {len(chosen)} of {len(tuned)} cells with a gap", _answer(share.value > 0 and share.low > 0)


def _slo(results: Results, agent: str) -> tuple[str, str]:
    def blind(cell: Cell) -> str:
        labels = [x for x in results.labels(cell, ("default",)) if not lengths_known(x) and not x.startswith("late-last")]
        return results.best(cell, labels, "slo_goodput", lowest=False)

    chosen = [c for c in _stationary(results, OVERLOADED) if "late-last (tuned)" in results.labels(c) and blind(c)]
    if not chosen:
        return "", "no tuned late-last beside a default"
    late = pooled_difference(results, chosen, lambda _: agent, lambda _: "late-last (tuned)", "slo_goodput")
    defaults = pooled_difference(results, chosen, lambda _: agent, blind, "slo_goodput")
    text = f"{interval(late)} against tuned late-last; {1 + defaults.value:.2f} times the best blind default, over {len(chosen)} cells"
    return text, _answer(late.value >= 0.01 and late.low > 0 and 1 + defaults.value >= 1.3)


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
