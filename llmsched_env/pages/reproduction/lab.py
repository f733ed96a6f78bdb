"""Where the reproduction's runs happen: worker processes, a result file per configuration, the search for the largest stable rate."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmsched_env.compiled import CACHE_FOLDER
from llmsched_env.files import check_folder, replacing
from llmsched_env.metrics import Interval
from llmsched_env.pages.reproduction.cases import Case, Group, group_from_json, group_to_json, run_case
from llmsched_env.parallel import unordered

PILING_UP, PILING_UP_QUICK = 0.01, 0.03
"""A rate is unstable where more than this share of the arrivals stays in the system; short runs cannot resolve as little."""

SOURCES = CACHE_FOLDER.name.rsplit("-", 1)[-1]
"""Digest of the package's sources: results remember with which they were made."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A line of the summary. ``verdict``: ``agrees``, ``differs`` or ``not comparable``, with the reason in ``why``."""

    claim: str
    paper: str
    ours: str
    verdict: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        body: Markdown lines.
        facts: numbers that the closing section quotes, by name.
    """

    title: str
    claims: list[Claim]
    body: list[str]
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StableRate:
    """Result of a search. ``rate`` is the largest rate found with a mean drift below the bar.

    Attributes:
        low: largest tested rate whose interval (95 %) lies below the bar; 0 if none.
        high: smallest tested rate whose interval lies above it; infinity if none.
        groups: every tested case.
    """

    rate: float
    low: float
    high: float
    groups: tuple[Group, ...]


class Lab:
    """Runs cases that have no result yet.

    Args:
        folder: results, a JSON file per case.
        figures: where plots go.
        quick: fewer seeds and shorter runs.
        jobs: processes.

    Attributes:
        progress: called with (label, done, total) as cases finish; None for nothing.
        computed: configurations run in this call.
        seconds: processor seconds of every configuration asked for, by its key.
        other_sources: keys of results made with another version of the package's sources.

    Raises:
        ConfigError: a folder cannot be written.
    """

    def __init__(self, folder: Path, figures: Path, *, quick: bool, jobs: int) -> None:
        check_folder("--results", folder)
        check_folder("--out", figures)
        self.folder, self.figures, self.quick = folder, figures, quick
        self._jobs = jobs
        self.progress: Callable[[str, int, int], None] | None = None
        self.bar = PILING_UP_QUICK if quick else PILING_UP
        self.computed = 0
        self.seconds: dict[str, float] = {}
        self.other_sources: set[str] = set()

    def pick(self, full: Any, quick: Any) -> Any:
        return quick if self.quick else full

    def run(self, label: str, cases: Sequence[Case]) -> list[Group]:
        """One group a case, in order."""
        wanted = {case.key: case for case in cases}
        found = {key: group for key in wanted if (group := self._load(key)) is not None}
        missing = [case for key, case in wanted.items() if key not in found]
        self._report(label, len(found), len(wanted))
        if missing:
            run_case(_warm(missing[0]))  # compiled here once, before several processes want it at the same time
        with contextlib.closing(self._results(missing)) as results:  # closed by Ctrl-C too: that ends the workers
            for i, group in enumerate(results, start=1):
                self._store(group)
                found[group.case.key] = group
                self._report(label, len(wanted) - len(missing) + i, len(wanted))
        return [found[case.key] for case in cases]

    def _results(self, missing: Sequence[Case]) -> Generator[Group]:
        if self._jobs == 1:
            yield from map(run_case, missing)
            return
        with contextlib.closing(unordered("loky", self._jobs, run_case, [(case,) for case in missing])) as results:
            yield from results

    def largest_stable(self, label: str, searches: Sequence[tuple[Case, float, float]], steps: int) -> list[StableRate]:
        """Bisection on the mean drift for every (case, low, high), all searches side by side."""
        brackets = [[low, high] for _, low, high in searches]
        tested: list[list[Group]] = [[] for _ in searches]
        for step in range(-2, steps):  # both ends first, so that a bracket is known to be one
            rates = [b[0] if step == -2 else b[1] if step == -1 else (b[0] + b[1]) / 2 for b in brackets]
            cases = [case.but(rate=round(rate, 6)) for (case, _, _), rate in zip(searches, rates, strict=True)]
            for i, group in enumerate(self.run(f"{label}, search {step + 3}/{steps + 2}", cases)):
                tested[i].append(group)
                if step >= 0:
                    brackets[i][0 if group.mean("drift") < self.bar else 1] = rates[i]
                elif step == -1 and group.mean("drift") < self.bar:
                    brackets[i][0] = rates[i]
        return [stable_rate(groups, self.bar) for groups in tested]

    def _report(self, label: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(label, done, total)

    def _load(self, key: str) -> Group | None:
        try:
            data = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
            group = group_from_json(data)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # cut off or of another version: run again
        if data.get("sources") != SOURCES:
            self.other_sources.add(key)
        self.seconds[key] = group.wall_seconds
        return group

    def _store(self, group: Group) -> None:
        self.computed += 1
        self.seconds[group.case.key] = group.wall_seconds
        with replacing(self.folder / f"{group.case.key}.json") as file:
            json.dump({**group_to_json(group), "sources": SOURCES}, file)


def _warm(case: Case) -> Case:
    return case.but(seeds=1, horizon=min(case.horizon, 20 / case.rate + 1.0), requests=min(case.requests, 5))


def stable_rate(groups: Sequence[Group], bar: float) -> StableRate:
    """What the tested rates say about the largest stable one."""
    rate, low, high = 0.0, 0.0, float("inf")
    for group in groups:
        interval, at = group.interval("drift"), group.case.rate
        if interval.mean < bar:
            rate = max(rate, at)
        if interval.high < bar:
            low = max(low, at)
        if interval.low > bar:
            high = min(high, at)
    return StableRate(rate, low, high, tuple(groups))


def show(interval: Interval, digits: int = 3) -> str:
    """Mean and half width to some significant digits."""
    if interval.mean != interval.mean:
        return "-"
    if interval.half_width != interval.half_width:
        return f"{interval.mean:.{digits}g}"
    return f"{number(interval.mean, digits)} ± {number(interval.half_width, 2)}"


def number(value: float, digits: int = 3) -> str:
    """Significant digits without an exponent."""
    if value != value:
        return "-"
    if value == 0 or abs(value) == float("inf"):
        return f"{value:g}"
    return f"{value:,.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def picture(name: str, caption: str) -> list[str]:
    return [f"![{caption}](figures/{name})", "", f"*{caption}*", ""]


__all__ = ["Claim", "Lab", "Section", "StableRate", "number", "picture", "show"]
