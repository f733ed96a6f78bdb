"""Queues and KV of all replicas over time, with where the calls went."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.bench.cluster_course import Course
from llmsched_env.bench.plots import COLOURS, load_pyplot, save_figure
from llmsched_env.types import FloatArray

BINS = 300
"""Spans of time in which calls are counted."""
SLOW, AWAY = "#F4D7A6", "#D9D9D9"


def spans(course: Course, replica: int) -> Iterator[tuple[float, float, str]]:
    """(start, end, colour) of the times at which a replica was slow or took no calls."""
    end = float(course.clock[-1])
    since: dict[str, float] = {}
    for event in (e for e in course.events if e.replica == replica):
        kind = SLOW if event.kind == "slow_down" else AWAY
        begins = event.value != 1.0 if kind == SLOW else event.kind != "come_back"
        if kind in since:
            yield since.pop(kind), min(event.time, end), kind
        if begins:
            since[kind] = event.time
    for kind, start in since.items():
        yield start, end, kind


def draw(courses: Sequence[Course], path: Path) -> None:
    """Two rows of axes a course, KV above calls, a colour a replica, means of spans; below them a lane a replica with the calls it gets.

    Replicas' slow times and times away are shaded in their lanes.
    """
    pyplot = load_pyplot()
    figure, grid = pyplot.subplots(
        3, len(courses), figsize=(7.0 * len(courses), 7.2), squeeze=False, sharex="col", gridspec_kw={"height_ratios": (2, 2, 1.5)}
    )
    most = max(float(smooth(course, values)[1].max()) for course in courses for values in course.outstanding.T)
    for column, course in enumerate(courses):
        above, middle, below = grid[:, column]
        for i in range(course.kv_share.shape[1]):
            colour = COLOURS[i % len(COLOURS)]
            above.plot(*smooth(course, course.kv_share[:, i]), color=colour, linewidth=1.2, label=f"replica {i}")
            middle.plot(*smooth(course, course.outstanding[:, i]), color=colour, linewidth=1.2)
        above.set_title(f"{course.router}, scenario {course.scenario}")
        above.set_ylim(0.0, 1.02)
        middle.set_ylim(0, 1.05 * max(most, 1.0))
        _lanes(below, course)
        below.set_xlabel("time (s)")
        above.legend(loc="upper left", fontsize=8, ncols=2)
    grid[0][0].set_ylabel("KV in use")
    grid[1][0].set_ylabel("calls (waiting and running)")
    grid[2][0].set_ylabel("calls routed there")
    figure.tight_layout()
    save_figure(pyplot, figure, path)


def smooth(course: Course, values: npt.NDArray[Any]) -> tuple[FloatArray, FloatArray]:
    """(n,) seconds and means of what the calls of one span saw, the spans without a call left out."""
    edges = np.linspace(0.0, float(course.clock[-1]), BINS + 1)
    counts, _ = np.histogram(course.clock, edges)
    sums, _ = np.histogram(course.clock, edges, weights=values)
    seen = counts > 0
    return (edges[:-1] + edges[1:])[seen] / 2, sums[seen] / counts[seen]


def _lanes(axes: Any, course: Course) -> None:
    replicas = course.kv_share.shape[1]
    edges = np.linspace(0.0, float(course.clock[-1]), BINS + 1)
    for i in range(replicas):
        for start, end, colour in spans(course, i):
            axes.axvspan(start, end, ymin=1.0 - (i + 1) / replicas, ymax=1.0 - i / replicas, color=colour, linewidth=0)
        counts, _ = np.histogram(course.clock[course.chosen == i], edges)
        axes.bar(edges[:-1], 0.85 * counts / max(counts.max(), 1), np.diff(edges), bottom=replicas - 1 - i, align="edge",
                 color=COLOURS[i % len(COLOURS)], linewidth=0)  # fmt: skip
    axes.set_ylim(0, replicas)
    axes.set_yticks([replicas - 0.5 - i for i in range(replicas)], [f"{i}" for i in range(replicas)])
    axes.grid(False)
