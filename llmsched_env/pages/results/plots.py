"""Figures of an evaluation. Every number comes from ``llmsched_env.bench.results``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_agents.statistics import Estimate, interquartile_mean, performance_profile
from llmsched_env.bench.plots import COLOURS, DASHES, MARKERS
from llmsched_env.bench.results import Results
from llmsched_env.bench.suite import Cell, kv_title
from llmsched_env.bench.variants import greedy_of
from llmsched_env.errors import require

Choice = tuple[str, Callable[[Cell], str]]
"""A name for the legend, and which variant stands for it in a cell (empty where none does)."""


def choices(results: Results, agents: Sequence[str]) -> list[Choice]:
    """What the figures compare, the bests chosen cell by cell."""
    found: list[Choice] = [
        ("greedy FIFO", lambda cell: f"{greedy_of(cell)} (default)"),
        ("best default baseline", results.best_default),
        ("best tuned baseline", results.best_tuned),
        ("oracle bound (known lengths)", results.oracle),
    ]
    found += [(name, lambda cell, name=name: name) for name in agents]  # type: ignore[misc]
    return [(name, of) for name, of in found if any(of(cell) for cell in results.cells)]


def plot_loads(path: Path, results: Results, shown: Sequence[Choice]) -> None:
    """Mean latency over load, a panel for each scenario and memory."""
    pyplot = _pyplot()
    own = [cell for cell in results.cells if cell.part == "stationary"]
    scenarios = list(dict.fromkeys(cell.scenario for cell in own))
    kvs = list(dict.fromkeys(cell.kv for cell in own))
    size = (3.4 * len(scenarios) + 0.4, 2.9 * len(kvs) + 0.7)
    figure, grid = pyplot.subplots(len(kvs), len(scenarios), figsize=size, squeeze=False, layout="constrained")
    for r, kv in enumerate(kvs):
        for c, scenario in enumerate(scenarios):
            axes = grid[r][c]
            cells = sorted((x for x in own if (x.scenario, x.kv) == (scenario, kv)), key=lambda x: x.load)
            for i, (name, of) in enumerate(shown):
                points = [(x.load, results.mean(x, of(x))) for x in cells if of(x)]
                if points:
                    loads, means = zip(*points, strict=True)
                    axes.plot(loads, means, label=name, color=COLOURS[i], marker=MARKERS[i], linestyle=DASHES[i], markersize=4)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axes.yaxis.set_minor_formatter(_minor(axes))
            axes.set_xticks([x.load for x in cells])
            axes.set_title(f"{scenario}, {kv_title(scenario, kv)}", fontsize=9, loc="left")
            if c == 0:
                axes.set_ylabel("mean latency (s)")
            if r == len(kvs) - 1:
                axes.set_xlabel("load")
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=min(len(names), 2 * len(scenarios)), frameon=False)
    _save(pyplot, figure, path)


def plot_profiles(path: Path, results: Results, shown: Sequence[Choice]) -> int:
    """Share of runs at least tau times as fast as greedy FIFO on the same requests; returns how many cells have all that is shown."""
    cells = [cell for cell in results.cells if all(of(cell) for _, of in shown)]
    if not cells:
        return 0
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.0, 4.4), layout="constrained")
    thresholds = np.geomspace(0.5, 8.0, 120)
    for i, (name, of) in enumerate(shown[1:], start=1):
        profile = performance_profile(results.speedups(of, cells), thresholds)
        axes.plot(thresholds, profile.share, label=name, color=COLOURS[i], linestyle=DASHES[i])
        axes.fill_between(thresholds, profile.low, profile.high, color=COLOURS[i], alpha=0.15, linewidth=0)
    axes.axvline(1.0, color="#555555", linestyle=":", linewidth=1)
    axes.set_xscale("log")
    ticks = (0.5, 1, 1.5, 2, 3, 5, 8)
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("mean latency of greedy FIFO / mean latency, at least")
    axes.set_ylabel("share of runs")
    axes.legend(frameon=False, loc="upper right")
    _save(pyplot, figure, path)
    return len(cells)


def plot_middles(path: Path, middles: Sequence[tuple[str, Estimate]]) -> None:
    """Interquartile means with their intervals, one line each, in the order given; a colour for each kind of variant."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7.0, 0.9 + 0.3 * len(middles)), layout="constrained")
    for i, (label, estimate) in enumerate(reversed(middles)):
        # Those that are told lengths bear a mark behind the bracket; agents have no bracket.
        kinds = {"(tuned)": COLOURS[1], "(default)": COLOURS[0]}
        colour = COLOURS[2] if "(" in label and not label.endswith(")") else kinds.get(label.rpartition(" ")[2], COLOURS[3])
        if math.isfinite(estimate.low):
            axes.plot((estimate.low, estimate.high), (i, i), color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(estimate.value, i, "o", color=colour, markersize=5)
    axes.axvline(1.0, color="#555555", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(middles)), [label for label, _ in reversed(middles)])
    axes.set_ylim(-0.7, len(middles) - 0.3)
    axes.set_xlabel("speed-up over greedy FIFO: interquartile mean")
    _save(pyplot, figure, path)


def middle(results: Results, label: str) -> tuple[Estimate, int] | None:
    """Interquartile mean of the speed-ups of a label over the cells in which it runs, and their number."""
    cells = [cell for cell in results.cells if label in results.labels(cell)]
    scores = results.speedups(lambda _: label, cells) if cells else np.empty((0, 0))
    scores = scores[~np.isnan(scores).any(axis=1)] if scores.size else scores
    return (interquartile_mean(scores), scores.shape[0]) if scores.size else None


def _minor(axes: Any) -> Callable[[float, Any], str]:
    def label(value: float, _position: Any = None) -> str:
        low, high = axes.get_ylim()
        leading = round(value / 10 ** math.floor(math.log10(value) + 1e-9))
        return f"{value:g}" if leading in ((2, 3, 4, 5, 6, 8) if high < 5 * low else (2, 3, 5) if high < 50 * low else (3,)) else ""

    return label


def _pyplot() -> Any:
    require("matplotlib", "cli").use("Agg")
    pyplot = require("matplotlib.pyplot", "cli")
    pyplot.rcParams.update({"font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot


def _save(pyplot: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
