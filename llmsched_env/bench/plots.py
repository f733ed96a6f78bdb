"""Figures of a comparison, as PNG files. Nothing is decided here: every number comes from the rows or a recording."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.bench.comparison import Recording
from llmsched_env.bench.tables import Cell
from llmsched_env.errors import require
from llmsched_env.metrics import Interval

# Okabe and Ito's colours, told apart by colour-blind readers; marker and dash repeat the distinction.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F", "#B8A800")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES: tuple[Any, ...] = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (3, 1)), "-", "--", "-.")
EVICTION_COLOUR = "#C00000"


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture on disk and what it shows."""

    path: Path
    title: str
    caption: str


def load_pyplot() -> Any:
    require("matplotlib", "cli").use("Agg")
    pyplot = require("matplotlib.pyplot", "cli")
    pyplot.rcParams.update({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def save_figure(pyplot: Any, figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _curve(axes: Any, cells: Sequence[Cell], metric: str, policies: Sequence[str], labels: dict[str, str]) -> None:
    for i, policy in enumerate(policies):
        own = sorted((c for c in cells if c.policy == policy and math.isfinite(c[metric].mean)), key=lambda c: c.rate)
        if not own:
            continue
        rates = [c.rate for c in own]
        mean = np.array([c[metric].mean for c in own])
        bands = [c[metric].on_log_axis() for c in own]
        low, high = np.array([band.low for band in bands]), np.array([band.high for band in bands])
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
        axes.plot(rates, mean, label=labels[policy], markersize=5, **style)
        outside = [c.overload for c in own]
        axes.plot(np.array(rates)[outside], mean[outside], style["marker"], markersize=5, color=style["color"], markerfacecolor="white")
        axes.fill_between(rates, low, high, where=np.isfinite(low), color=style["color"], alpha=0.15, linewidth=0)


def _range(intervals: Sequence[Interval]) -> tuple[float, float]:
    """Limits of a logarithmic axis: all means and their intervals, those at most one decade beyond the means."""
    shown = [i.on_log_axis() for i in intervals if i.mean > 0 and math.isfinite(i.mean)]
    if not shown:
        return 0.1, 10.0
    lowest, highest = min(i.mean for i in shown), max(i.mean for i in shown)
    low = min((i.low for i in shown if i.low > 0), default=lowest)
    high = max((i.high for i in shown if math.isfinite(i.high)), default=highest)
    return max(min(low, lowest / 1.3), lowest / 10) / 1.1, min(max(high, highest * 1.3), highest * 10) * 1.1


def _boundary_line(axes: Any, rates: Sequence[float], boundary: float) -> None:
    """The fluid stability boundary, where it is near enough not to squeeze the data; else it is named in the legend."""
    name = f"fluid stability boundary, {boundary:.2f} req/s"
    if math.isfinite(boundary) and min(rates) / 1.5 <= boundary <= 1.5 * max(rates):
        axes.axvline(boundary, color="#555555", linestyle=":", linewidth=1.5, label=name)
    else:
        axes.plot([], [], color="#555555", linestyle=":", label=f"{name} (outside the plot)")


def plot_against_rate(
    path: Path, cells: Sequence[Cell], panels: Sequence[tuple[str, str]], labels: dict[str, str], boundary: float, seeds: int
) -> None:
    """One log panel a metric over the arrival rate. ``panels``: (metric, axis label)."""
    pyplot = load_pyplot()
    policies = [p for p in labels if any(c.policy == p for c in cells)]
    rates = sorted({c.rate for c in cells})
    figure, grid = pyplot.subplots(1, len(panels), figsize=(5.2 * len(panels), 4.6), squeeze=False, layout="constrained")
    for axes, (metric, label) in zip(grid[0], panels, strict=True):
        _curve(axes, cells, metric, policies, labels)
        _boundary_line(axes, rates, boundary)
        axes.set_yscale("log")
        axes.set_ylim(*_range([c[metric] for c in cells]))
        axes.yaxis.set_major_formatter(_plain_number)
        axes.yaxis.set_minor_formatter(_plain_minor(axes))
        axes.set_xlabel("arrival rate (requests/s)")
        axes.set_ylabel(label)
        if len(rates) <= 8:
            axes.set_xticks(rates, [f"{r:g}" for r in rates])
    if any(c.overload for c in cells):
        grid[0][0].plot([], [], "o", color="#555555", markerfacecolor="white", label="hollow: overload, outside the policy's theory")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(3, len(names)), frameon=False)
    band = "bands: 95 % intervals of the mean on the log scale" if seeds > 1 else "one seed, no intervals"
    grid[0][0].set_title(f"{seeds} seed{'s' if seeds > 1 else ''}; {band}", fontsize=9, loc="left")
    save_figure(pyplot, figure, path)


def _plain_number(value: float, _position: int | None = None) -> str:
    return f"{value:g}"


def _plain_minor(axes: Any) -> Any:
    """Minor labels of a log axis (2 and 5 of each decade) where it spans less than two decades, else none."""

    def label(value: float, _position: int | None = None) -> str:
        low, high = axes.get_ylim()
        leading = round(value / 10 ** math.floor(math.log10(value) + 1e-9))
        few = (2, 3, 4, 5, 6, 8) if high < 10 * low else (2, 5)
        return f"{value:g}" if high < 300 * low and leading in few else ""

    return label


def plot_kv(path: Path, recordings: Sequence[Recording], labels: dict[str, str]) -> None:
    """KV occupancy over time, one panel a policy, evictions marked above."""
    pyplot = load_pyplot()
    n = len(recordings)
    figure, grid = pyplot.subplots(n, 1, figsize=(9, 1.1 + 1.7 * n), sharex=True, sharey=True, squeeze=False, layout="constrained")
    for i, (axes, one) in enumerate(zip(grid[:, 0], recordings, strict=True)):
        colour = COLOURS[i % len(COLOURS)]
        time, kv = _envelope(one.time, one.kv)
        axes.fill_between(time, 0, 100 * kv, step="pre", color=colour, alpha=0.3, linewidth=0)
        axes.step(time, 100 * kv, where="pre", color=colour, linewidth=0.8)
        axes.axhline(100, color="#555555", linestyle=":", linewidth=1)
        if one.eviction_times.size:
            axes.plot(one.eviction_times, np.full(one.eviction_times.size, 108.0), "|", color=EVICTION_COLOUR, markersize=7, alpha=0.6)
        count = one.eviction_times.size
        axes.set_title(f"{labels[one.task.policy]}: {count:,} eviction{'' if count == 1 else 's'}", fontsize=9.5, loc="left")
        axes.set_ylim(0, 116)
        axes.set_yticks((0, 50, 100))
    grid[-1][0].set_xlim(0, 1.01 * max(one.time[-1] for one in recordings))
    grid[-1][0].set_xlabel("simulated time (s)")
    figure.supylabel("KV occupancy (% of capacity); red marks: evictions", fontsize=10)
    save_figure(pyplot, figure, path)


def _envelope(time: np.ndarray[Any, Any], values: np.ndarray[Any, Any], points: int = 3000) -> tuple[Any, Any]:
    """At most ``points`` groups of neighbouring steps, the largest value of each: peaks stay visible."""
    if time.size <= points:
        return time, values
    starts = np.linspace(0, time.size, points, endpoint=False).astype(np.int64)
    ends = np.append(starts[1:], time.size) - 1
    return time[ends], np.maximum.reduceat(values, starts)


def plot_ttft_cdf(path: Path, recordings: Sequence[Recording], labels: dict[str, str]) -> None:
    """Share of requests whose first token came within x seconds."""
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8.6, 4.4), layout="constrained")
    for i, one in enumerate(recordings):
        if one.ttft.size == 0:
            continue
        share = np.arange(1, one.ttft.size + 1) / one.ttft.size
        axes.step(
            one.ttft, share, where="post", label=labels[one.task.policy], color=COLOURS[i % len(COLOURS)], linestyle=DASHES[i % len(DASHES)]
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(_plain_number)
    axes.set_ylim(0, 1.01)
    axes.set_xlabel("TTFT (s)")
    axes.set_ylabel("share of requests")
    # Curves cross the whole of the axes: no corner is free for every comparison.
    figure.legend(loc="outside right upper", frameon=False)
    save_figure(pyplot, figure, path)
