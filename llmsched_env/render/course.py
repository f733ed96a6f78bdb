"""The course of an episode: KV, evictions and requests over engine time."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from llmsched_env.render import painter as p
from llmsched_env.render.history import CLOCK, EVICTIONS, KV, RUNNING, WAITING, History
from llmsched_env.render.painter import SMALL, Box, Painter

LABELS = 66.0
"""Left of the plots, for what stands beside them."""
ENDS = (10, 20, 30, 60, 90, 120, 180, 240, 300, 420, 600, 900, 1200, 1800, 2700, 3600)
BIN = 3.0
"""Width of a bar of evictions, in units of the picture."""


def axis_end(clock: float) -> float:
    """Where the axis ends, seconds: it grows in steps, so that the picture stands still between them."""
    for end in ENDS:
        if clock <= end:
            return float(end)
    hours = 1
    while hours * 3600 < clock:
        hours *= 2
    return hours * 3600.0


def tick_step(end: float) -> float:
    """Seconds from a tick to the next: five to eight of them."""
    for step in (2, 5, 10, 15, 20, 30, 60, 120, 300, 600):
        if end / step <= 8:
            return float(step)
    return end / 6


def draw_course(paint: Painter, box: Box, history: History, capacity: int, evicted: str) -> None:
    """Two plots and a strip of evictions on one axis of seconds.

    Args:
        capacity: KV units.
        evicted: what an eviction is called.
    """
    samples = history.samples
    end = axis_end(float(samples[-1, CLOCK]))
    left, width = box.left + LABELS, box.width - LABELS
    memory, strip = Box(left, box.top, width, 58), Box(left, box.top + 63, width, 14)
    requests = Box(left, box.top + 82, width, 68)
    shown = thinned(samples, end / (2 * width))
    x = shown[:, CLOCK] / end
    for plot in (memory, strip, requests):
        paint.fill(plot, p.BACKGROUND)
        for second in np.arange(0.0, end + 1e-9, tick_step(end)):
            paint.fill(Box(left + width * second / end - 0.5, plot.top, 1, plot.height), p.FREE)
    paint.curves(memory, [(stairs(x, shown[:, KV] / capacity), p.BLUE, 1.6, True)])
    most = full_scale(float(samples[:, WAITING : RUNNING + 1].max()))
    waiting, running = shown[:, WAITING] / most, shown[:, RUNNING] / most
    paint.curves(requests, [(stairs(x, running), p.BLUE, 1.8, False), (stairs(x, waiting), p.ORANGE, 1.8, False)])
    draw_evictions(paint, strip, samples, end)
    for plot in (memory, strip, requests):
        paint.rule(plot.left, plot.right, plot.bottom)
    draw_labels(paint, memory, strip, requests, most, evicted)
    draw_seconds(paint, requests, end)


def thinned(samples: npt.NDArray[np.float64], seconds: float) -> npt.NDArray[np.float64]:
    """One sample for those within the same ``seconds``, with their highest values; the last of all stays as it is."""
    starts = np.flatnonzero(np.diff(np.floor(samples[:-1, CLOCK] / seconds), prepend=-1.0))
    return np.concatenate([np.maximum.reduceat(samples[:-1], starts), samples[-1:]]) if starts.size else samples


def stairs(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(2 n - 1, 2) points of a line that keeps its value until the next sample."""
    points = np.empty((2 * len(x) - 1, 2))
    points[0::2, 0], points[0::2, 1] = x, y
    points[1::2, 0], points[1::2, 1] = x[1:], y[:-1]
    return points


def full_scale(most: float) -> int:
    """A round number of requests that the plot ends at."""
    unit = 1
    while True:
        for factor in (10, 20, 30, 40, 60, 80):
            if most <= factor * unit:
                return factor * unit
        unit *= 10


def draw_evictions(paint: Painter, box: Box, samples: npt.NDArray[np.float64], end: float) -> None:
    """Bars of how many there were in a few pixels' time."""
    bins = int(box.width / BIN)
    at = np.minimum(samples[:, CLOCK] / end * bins, bins - 1).astype(int)
    counts = np.bincount(at, weights=samples[:, EVICTIONS], minlength=bins)
    most = max(float(counts.max()), 4.0)
    for n in np.flatnonzero(counts):
        height = max(box.height * counts[n] / most, 2.0)
        paint.fill(Box(box.left + n * BIN, box.bottom - height, BIN - 0.5, height), p.RED)


def draw_labels(paint: Painter, memory: Box, strip: Box, requests: Box, most: int, evicted: str) -> None:
    """Names and scales, beside the plots."""
    edge = memory.left - 5
    paint.text("100 %", edge, memory.top - 3, SMALL, p.FAINT, "right")
    paint.text("KV", memory.left - LABELS, memory.top + 22, SMALL + 2, p.BLUE)
    paint.text("0", edge, memory.bottom - 9, SMALL, p.FAINT, "right")
    paint.text(evicted, strip.left - LABELS, strip.top + 2, SMALL, p.RED, width=LABELS - 3)
    paint.text(f"{most:,}", edge, requests.top - 3, SMALL, p.FAINT, "right")
    paint.text("waiting", memory.left - LABELS, requests.top + 17, SMALL, p.towards(p.ORANGE, p.INK, 0.35))
    paint.text("on GPU", memory.left - LABELS, requests.top + 34, SMALL, p.BLUE)
    paint.text("0", edge, requests.bottom - 9, SMALL, p.FAINT, "right")


def draw_seconds(paint: Painter, plot: Box, end: float) -> None:
    """The axis."""
    for second in np.arange(0.0, end + 1e-9, tick_step(end)):
        x = plot.left + plot.width * second / end
        last = second + tick_step(end) > end + 1e-9
        text = f"{second:,.0f} s" if last else f"{second:,.0f}"
        align: p.Align = "centre" if x < plot.right - 12 else "right"
        paint.text(text, x, plot.bottom + 4, SMALL, p.FAINT, align)
