"""The leaderboard: a submission run again on the suite, its figures, and whether those that it claims hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_agents.statistics import Estimate, bootstrap
from llmsched_env.bench.evaluation import Row
from llmsched_env.bench.results import Results
from llmsched_env.bench.submissions import CLAIMS, Level, Submission
from llmsched_env.bench.suite import SUITE, Bench, Cell
from llmsched_env.bench.variants import Variant, greedy_of
from llmsched_env.errors import ConfigError
from llmsched_env.markdown import cell as shown
from llmsched_env.markdown import table
from llmsched_env.types import FloatArray

SEEDS: dict[Level, int] = {"quick": 3, "full": 20}
REQUESTS: dict[Level, int | None] = {"quick": 400, "full": None}
"""Of one run; None for the suite's own, 3,000 to 6,000."""
FAILED_RUN = 0.1
"""Speed-up of a run without figures: as if it were ten times as slow as greedy FIFO."""
TOLERANCE = 0.01
"""A claim holds that is no better than the measured figure by more than this share, which other machines' arithmetic may make."""


@dataclass(frozen=True, slots=True)
class Score:
    """What is reported of a submission, against greedy FIFO on the same requests.

    Attributes:
        speedup: geometric mean over cells and seeds of greedy FIFO's mean latency over the submission's; higher is better. A run that
            does not take place or leaves requests unserved counts as ``FAILED_RUN``.
        p99_speedup: the same of the P99 latency.
        worst_cell: the lowest mean speed-up of a cell, and ``worst`` its key.
        slo_goodput: mean over cells of the share of requests within both limits.
        failed: runs without figures, or with requests left unserved.
    """

    speedup: Estimate
    p99_speedup: Estimate
    worst_cell: float
    worst: str
    slo_goodput: float
    cells: int
    seeds: int
    failed: int

    def value(self, figure: str) -> float:
        """One of ``CLAIMS``."""
        found = getattr(self, figure)
        return found.value if isinstance(found, Estimate) else float(found)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim beside what was measured."""

    figure: str
    claimed: float
    measured: float

    @property
    def holds(self) -> bool:
        """All figures are better when higher: a claim may be too modest."""
        return self.claimed <= self.measured * (1 + TOLERANCE)


@dataclass(frozen=True, slots=True)
class Entry:
    """A submission with its score at a level."""

    submission: Submission
    level: Level
    score: Score

    @property
    def verdicts(self) -> list[Verdict]:
        claims = self.submission.claimed.get(self.level, {})
        return [Verdict(figure, claims[figure], self.score.value(figure)) for figure in CLAIMS if figure in claims]

    @property
    def holds(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)


def plan_of(submission: Submission, bench: Bench, chosen: Sequence[Cell]) -> dict[Cell, list[Variant]]:
    """What runs in each cell: greedy FIFO and the submission.

    Raises:
        ConfigError: the submission runs in no cell, is told lengths that it says it is not, or has a baseline's label.
    """
    variant = submission.variant
    built = None
    reasons = []
    for cell in chosen:
        try:
            built = variant.build(bench, cell)
            break
        except ConfigError as error:
            reasons.append(str(error))
    if built is None:
        raise ConfigError(f"policy: {submission.policy.text!r} runs in none of {len(chosen)} cells: {reasons[0]}")
    if built.known_lengths and not submission.known_lengths:
        raise ConfigError(f"known_lengths: false, but {submission.policy.text!r} is told output lengths: must be true")
    greedy = {cell: Variant(greedy_of(cell), "default") for cell in chosen}
    if any(variant.label == own.label for own in greedy.values()):
        raise ConfigError(f"name: {submission.name!r} is the label of greedy FIFO, must be another")
    return {cell: [greedy[cell], variant] for cell in chosen}


def score(plan: Mapping[Cell, Sequence[Variant]], rows: Iterable[Row]) -> Score:
    """The score of the submission that a plan runs beside greedy FIFO, from the rows of both."""
    results = Results(plan, rows)
    label = next(iter(plan.values()))[1].label
    cells = list(plan)
    latency = np.array([_ratios(results, cell, label, "latency_mean") for cell in cells])
    tail = np.array([_ratios(results, cell, label, "latency_p99") for cell in cells])
    goodput = [np.where(_served(results, cell, label), results.values(cell, label, "slo_goodput"), 0.0).mean() for cell in cells]
    by_cell = latency.mean(axis=1)
    worst = int(np.argmin(by_cell))
    return Score(
        speedup=_geometric_mean(latency),
        p99_speedup=_geometric_mean(tail),
        worst_cell=float(by_cell[worst]),
        worst=cells[worst].key,
        slo_goodput=float(np.mean(goodput)),
        cells=len(cells),
        seeds=latency.shape[1],
        failed=int(sum((~_served(results, cell, label)).sum() for cell in cells)),
    )


def _geometric_mean(ratios: FloatArray) -> Estimate:
    """Of (cells, S) ratios > 0, the interval from resampled seeds."""
    logs = np.log(ratios).mean(axis=0)
    return bootstrap(lambda index: np.exp(logs[index].mean(axis=-1)), logs.size)


def _served(results: Results, cell: Cell, label: str) -> npt.NDArray[np.bool_]:
    """(S,) whether a run served every request."""
    figures = [row.figures for row in results.rows(cell, label)]
    return np.array([f.completed == f.requests > 0 and math.isfinite(f.latency_mean) for f in figures])


def _ratios(results: Results, cell: Cell, label: str, metric: str) -> FloatArray:
    """(S,) greedy FIFO's figure over the submission's, ``FAILED_RUN`` where it served not all."""
    base = results.values(cell, f"{greedy_of(cell)} (default)", metric)
    own = results.values(cell, label, metric)
    served = _served(results, cell, label)
    return np.where(served, base / np.where(served, own, 1.0), FAILED_RUN)


HEADINGS = ("", "policy", "authors", "told lengths", "speed-up", "P99 speed-up", "worst cell", "SLO goodput", "claims")


def page(entries: Sequence[Entry], level: Level, first_seed: int, command: str) -> list[str]:
    """The table in Markdown, the highest speed-up first."""
    ranked = sorted(entries, key=lambda entry: -entry.score.speedup.value)
    first = ranked[0].score
    requests = "the suite's own numbers of requests" if REQUESTS[level] is None else f"{REQUESTS[level]} requests a run"
    rows = [
        [
            str(rank),
            shown(entry.submission.name),
            shown(", ".join(entry.submission.authors)),
            "yes" if entry.submission.known_lengths else "no",
            _estimate(entry.score.speedup),
            _estimate(entry.score.p99_speedup),
            f"{entry.score.worst_cell:.3f} ({entry.score.worst})",
            f"{entry.score.slo_goodput:.3f}",
            claims_text(entry),
        ]
        for rank, entry in enumerate(ranked, start=1)
    ]
    failed = [f"{entry.submission.name}: {entry.score.failed}" for entry in ranked if entry.score.failed]
    return [
        f"# Leaderboard of {SUITE}",
        "",
        f"Generated by `{command}`: level {level}, {first.cells} cells, evaluation seeds {first_seed} to {first_seed + first.seeds - 1}, "
        f"{requests}. What the columns mean stands in [README.md](README.md).",
        "",
        *table(HEADINGS, rows, "lllllllll"),
        *(["", f"Runs that served not all requests and count as a speed-up of {FAILED_RUN:g}: {'; '.join(failed)}."] if failed else []),
    ]


def claims_text(entry: Entry) -> str:
    """Whether what is claimed holds."""
    verdicts = entry.verdicts
    if not verdicts:
        return "none at this level"
    wrong = [f"{v.figure} {v.claimed:g} claimed" for v in verdicts if not v.holds]
    return "hold" if not wrong else f"do not hold: {', '.join(wrong)}"


def _estimate(found: Estimate) -> str:
    return f"{found.value:.3f}" + (f" [{found.low:.3f}, {found.high:.3f}]" if math.isfinite(found.low) else "")
