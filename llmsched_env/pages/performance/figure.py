"""One line of the page, and how a figure is measured: the median of repeated measurements."""

from __future__ import annotations

import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numba

from llmsched_env import __version__


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        ours, yardstick: with their units.
        ratio: ours over the yardstick; None where there is none.
        bar: what ``ratio``, or ``rate`` where there is one, is held against.
        rate: the figure that the bar is about, where it is not the ratio.
        reason: where the time goes.
    """

    what: str
    ours: str
    yardstick: str = "-"
    ratio: float | None = None
    bar: float = 1.0
    rate: float | None = None
    higher_is_better: bool = True
    reason: str = ""

    @property
    def measured(self) -> float:
        """What is held against the bar."""
        found = self.rate if self.rate is not None else self.ratio
        assert found is not None, self.what
        return found

    @property
    def holds(self) -> bool:
        return self.measured >= self.bar if self.higher_is_better else self.measured <= self.bar

    def describe(self) -> dict[str, Any]:
        """Plain values, with the verdict."""
        return {**asdict(self), "holds": self.holds}


def median_and_best(measure: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Of rates: on a machine that others use too, the best tells what it does undisturbed."""
    rates = [measure() for _ in range(repeats)]
    return statistics.median(rates), max(rates)


def median(measure: Callable[[], float], repeats: int) -> float:
    return median_and_best(measure, repeats)[0]


def machine() -> str:
    """Processor, cores and the versions that matter."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = f"{names[0]}, {len(names)} cores" if names else model
    return f"{model}; Python {platform.python_version()}, numba {numba.__version__}, llmsched_env {__version__}"


def same_imports(**variables: str) -> dict[str, str]:
    """The environment of a process of its own that finds the packages where this one does, with these variables besides."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
