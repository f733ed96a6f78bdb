"""Curves with intervals, as small PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmsched_env.bench.plots import COLOURS, DASHES, MARKERS
from llmsched_env.errors import require
from llmsched_env.metrics import Interval

DPI = 80

Scale = Literal["", "y", "xy", "symlog"]
"""Logarithmic axes; "symlog": y, linear between 0 and 1, for counts."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A line with intervals. ``style``: index of colour, marker and dash; the same policy keeps it in every figure."""

    label: str
    x: Sequence[float]
    y: Sequence[Interval]
    style: int


@contextmanager
def figure(path: Path, rows: int, columns: int, *, width: float = 4.6, height: float = 3.5) -> Iterator[Any]:
    """(rows, columns) axes, saved when the block ends."""
    require("matplotlib", "cli").use("Agg")
    pyplot = require("matplotlib.pyplot", "cli")
    settings = {"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(settings):
        picture, axes = pyplot.subplots(rows, columns, figsize=(columns * width, rows * height), layout="constrained", squeeze=False)
        try:
            yield axes
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.savefig(path, dpi=DPI)
            shrink(path)
        finally:
            pyplot.close(picture)


def shrink(path: Path) -> None:
    """A palette is enough for lines on white, in half of the bytes."""
    image = require("PIL.Image", "cli")
    with image.open(path) as picture:
        small = picture.convert("RGB").quantize(256)
    small.save(path, optimize=True)


def draw(axes: Any, curves: Sequence[Curve], *, scale: Scale = "") -> None:
    """Lines with 95 % intervals as error bars; points without a mean are left out.

    Args:
        scale: which axes are logarithmic. It is set here and nowhere else, as the interval depends on it: where y is logarithmic
            it is ``Interval.on_log_axis``, elsewhere the symmetric one.
    """
    for curve in curves:
        y = [i.on_log_axis() for i in curve.y] if scale in ("y", "xy", "symlog") else curve.y
        mean = np.array([i.mean for i in y])
        bars = bars_of(y)
        keep = np.isfinite(mean)
        s = curve.style
        axes.errorbar(
            np.asarray(curve.x, dtype=np.float64)[keep],
            mean[keep],
            yerr=bars[:, keep],
            label=curve.label,
            color=COLOURS[s % len(COLOURS)],
            marker=MARKERS[s % len(MARKERS)],
            linestyle=DASHES[s % len(DASHES)],
            markersize=3.5,
            linewidth=1.2,
            capsize=2,
        )
    if scale == "xy":
        axes.set_xscale("log")
    if scale in ("y", "xy"):
        axes.set_yscale("log")
    if scale == "symlog":
        axes.set_yscale("symlog", linthresh=1)


def bars_of(intervals: Sequence[Interval]) -> npt.NDArray[np.float64]:
    """(2, n) lengths of error bars below and above the means; zero where there is no interval."""
    below = [i.mean - i.low for i in intervals]
    above = [i.high - i.mean for i in intervals]
    return np.nan_to_num(np.array([below, above], dtype=np.float64).reshape(2, -1))


def limit_to_means(axes: Any, curves: Sequence[Curve]) -> None:
    """The range of a logarithmic axis by the means alone: the interval of two seeds can span decades."""
    means = [i.mean for curve in curves for i in curve.y if i.mean > 0]
    if means:
        axes.set_ylim(min(means) / 1.6, max(means) * 1.6)


def finish(axes: Any, title: str, x: str, y: str, *, legend: bool = True) -> None:
    axes.set_title(title, fontsize=9.5, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if legend:
        axes.legend(frameon=False, fontsize=7.5)


def thin(time: npt.NDArray[np.float64], values: npt.NDArray[np.float64], points: int = 1500) -> tuple[Any, Any]:
    """At most ``points`` groups of neighbouring steps, the largest value of each."""
    if time.size <= points:
        return time, values
    starts = np.linspace(0, time.size, points, endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], time.size) - 1
    return time[ends], np.maximum.reduceat(values, starts)
