"""What the parts of the fidelity page share: where the raw data lie, and the table of checks."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llmsched_env.errors import ConfigError
from llmsched_env.markdown import table

_FOLDERS = {"calibration": "LLMSCHED_CALIBRATION", "peers": "LLMSCHED_PEERS", "traces": "LLMSCHED_TRACES"}


@dataclass(frozen=True, slots=True)
class Paths:
    """Folders of raw data, which are no part of the project.

    Attributes:
        calibration: kernel profiles and predictor tables.
        peers: runs of other simulators.
        traces: workloads and recorded runs.
    """

    calibration: Path
    peers: Path
    traces: Path

    @classmethod
    def find(cls) -> Paths:
        """The folders that ``LLMSCHED_CALIBRATION``, ``LLMSCHED_PEERS`` and ``LLMSCHED_TRACES`` name.

        Raises:
            ConfigError: a variable is not set, or names no folder.
        """
        return cls(**{name: folder_of(name) for name in _FOLDERS})


def folder_of(name: str) -> Path:
    """One of the folders of ``Paths``; raises as ``Paths.find`` does."""
    variable = _FOLDERS[name]
    named = os.environ.get(variable, "")
    if not named or not Path(named).is_dir():
        raise ConfigError(f"{variable}: {named!r}, must name the folder of the {name} data")
    return Path(named)


@dataclass(frozen=True, slots=True)
class Check:
    """One line of a table of checks: a figure of ours beside the same figure of something else.

    Attributes:
        against: what it is compared with.
        figure: which figure, in the words of ``RequestLog``.
        ours, theirs: the two figures, with their unit.
        error: as shown, such as "0.3 %".
        bar: what was asked for, such as "within 1 %"; "reported" where nothing was.
        holds: whether the bar is met; None where nothing was asked for.
    """

    against: str
    figure: str
    ours: str
    theirs: str
    error: str
    bar: str = "reported"
    holds: bool | None = None

    @classmethod
    def relative(cls, against: str, figure: str, ours: float, theirs: float, bar: float | None, unit: str = "s", digits: int = 4) -> Check:
        """A figure whose relative error is to stay within ``bar`` (0.01 for 1 %; None: reported alone)."""
        error = abs(ours - theirs) / abs(theirs) if theirs else math.inf if ours else 0.0
        return cls(
            against=against,
            figure=figure,
            ours=f"{ours:.{digits}g} {unit}".strip(),
            theirs=f"{theirs:.{digits}g} {unit}".strip(),
            error=percent(error),
            bar="reported" if bar is None else f"within {percent(bar)}",
            holds=None if bar is None else error <= bar,
        )

    @classmethod
    def equal(cls, against: str, figure: str, ours: int, theirs: int) -> Check:
        """A count that is to be the same."""
        return cls(against, figure, f"{ours:,}", f"{theirs:,}", f"{ours - theirs:+,}" if ours != theirs else "0", "equal", ours == theirs)

    @property
    def verdict(self) -> str:
        return {True: "holds", False: MISSED, None: "-"}[self.holds]


MISSED = "**missed**"


def percent(share: float) -> str:
    """0.00512 as "0.512 %"; what is smaller than a millionth of a percent as an inequality."""
    if 0 < abs(share) < 1e-8:
        return "< 0.000001 %"
    return f"{100 * share:.3g} %" if abs(share) >= 1e-4 or share == 0 else f"{100 * share:.1g} %"


def check_table(checks: Iterable[Check]) -> list[str]:
    """The checks as lines of a Markdown table."""
    headings = ("against", "figure", "ours", "theirs", "error", "bar", "verdict")
    return table(headings, ((c.against, c.figure, c.ours, c.theirs, c.error, c.bar, c.verdict) for c in checks), "llrrrll")
