"""One picture of an engine: what is decided, KV memory, queues, figures so far, and the course over time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from llmsched_env.metrics import latency, ttft
from llmsched_env.render import painter as p
from llmsched_env.render.course import draw_course
from llmsched_env.render.painter import HUGE, LARGE, PLAIN, SMALL, Box, Painter
from llmsched_env.render.places import places_of
from llmsched_env.render.scene import Scene, decision_words
from llmsched_env.render.table import draw_queues, queue_colours

MARGIN = 12.0
MEMORY = Box(MARGIN, 77, 256, 136)
TILES = Box(MARGIN, 252, p.WIDTH - 2 * MARGIN, 42)
COURSE = Box(MARGIN, 304, p.WIDTH - 2 * MARGIN, 170)
SMALLEST_SQUARE = 6.0


def draw_frame(paint: Painter, scene: Scene) -> None:
    """Draw everything."""
    paint.clear()
    draw_header(paint, scene)
    draw_memory(paint, scene)
    draw_queues(paint, scene)
    draw_figures(paint, scene)
    engine = scene.view.engine
    draw_course(paint, COURSE, scene.history, engine.kv_capacity, "evicted" if scene.tokens else "preempted")


# --- header ------------------------------------------------------------------------------------------
def draw_header(paint: Painter, scene: Scene) -> None:
    """The run, the decision in words, the clock."""
    counters = scene.counters
    right = p.WIDTH - MARGIN
    clock = paint.text(f"{counters.clock:,.2f} s", right, 8, HUGE, align="right")
    ended = "" if counters.end == "running" else f", {END_WORDS.get(counters.end, counters.end)}"
    below = paint.text(f"iteration {counters.iterations:,}{ended}", right, 32, SMALL, p.FAINT, "right")
    paint.text(scene.title, MARGIN, 9, LARGE, width=right - MARGIN - clock - 16)
    paint.text(decision_words(scene), MARGIN, 31, PLAIN, p.FAINT, width=right - MARGIN - below - 16)
    paint.rule(MARGIN, right, 51)


END_WORDS = {"finished": "all served", "stranded": "ended with requests left", "horizon": "horizon reached", "max_iterations": "cut off"}


# --- KV memory -----------------------------------------------------------------------------------------
def draw_memory(paint: Painter, scene: Scene) -> None:
    """A square for every few units of KV memory, by who holds it."""
    view, engine = scene.view, scene.view.engine
    capacity, used = engine.kv_capacity, view.kv_used
    name = paint.text("KV memory", MARGIN, 58, PLAIN)
    paint.text(f"{100 * used / capacity:.0f} %", MEMORY.right, 58, PLAIN, align="right")
    unit, grid = square_unit(paint, capacity, 10 if scene.tokens else 2)
    word = "token" if scene.tokens else "block"
    paint.text(f"a square is {unit:,} {word}{'s' if unit > 1 else ''}", MARGIN + name + 10, 59, SMALL, p.FAINT)
    places = places_of(view, scene.names)
    shares: list[tuple[int, p.Colour, bool]] = []
    colours = queue_colours(scene.names)
    cells = [(i, k) for k in reversed(range(len(scene.names.columns))) for i in range(len(scene.names.rows))]
    for i, k in cells:
        shares += [(int(places.decode_kv[i, k]), colours[i][k], False), (int(places.boundary_kv[i, k]), colours[i][k], True)]
    shares.append((places.prefill_kv, p.PURPLE, False))
    total = math.ceil(capacity / unit)
    counts = whole_squares(shares, unit, used)
    taken = sum(count for count, _, _ in counts)
    reserve = min(math.ceil(engine.watermark_blocks / unit), total - taken)
    counts += [(total - taken - reserve, p.FREE, False), (reserve, p.LINE, True)]
    paint.squares(MEMORY, counts, grid)
    kind = "tokens" if scene.tokens else f"blocks of {engine.block_size} tokens"
    paint.text(f"{used:,} of {capacity:,} {kind}", MARGIN, 216, SMALL, p.FAINT)
    draw_memory_legend(paint, scene)


def draw_memory_legend(paint: Painter, scene: Scene) -> None:
    """What the squares stand for, beside the colours of the table."""
    x = MARGIN
    entries = [("prefill", p.PURPLE, False)]
    if scene.view.layout.num_segments > 1:
        entries.append(("boundary queue", p.FAINT, True))
    if scene.view.engine.watermark_blocks:
        entries.append(("reserve", p.LINE, True))
    for word, colour, hollow in entries:
        paint.fill(Box(x, 234, 8, 8), colour)
        if hollow:
            paint.fill(Box(x + 2.5, 236.5, 3, 3), p.BACKGROUND)
        x += 12 + paint.text(word, x + 12, 232, SMALL, p.FAINT) + 10


def square_unit(paint: Painter, capacity: int, base: int) -> tuple[int, p.Grid]:
    """KV units of one square and the grid of them all: the finest that can be told apart.

    Args:
        base: 2 for units of 1, 2, 4, 8, ...; 10 for 1, 2, 5, 10, ...
    """
    unit = 1
    while True:
        grid = paint.grid(MEMORY, math.ceil(capacity / unit), SMALLEST_SQUARE)
        if grid is not None:
            return unit, grid
        unit = unit * 2 if base == 2 else p.next_round(unit)


def whole_squares(shares: Sequence[tuple[int, p.Colour, bool]], unit: int, used: int) -> list[tuple[int, p.Colour, bool]]:
    """Shares in squares of ``unit``: rounded where one ends, so that their sum, ``used``, is right too.

    Requests may hold blocks in common; each then shows a part of them.
    """
    sums = np.cumsum([amount for amount, _, _ in shares], dtype=np.float64)
    ends = np.rint(sums * (used / max(sums[-1], 1.0) / unit)).astype(int)
    counts = np.diff(ends, prepend=0)
    return [(int(n), colour, hatched) for n, (_, colour, hatched) in zip(counts, shares, strict=True)]


# --- figures -------------------------------------------------------------------------------------------
def draw_figures(paint: Painter, scene: Scene) -> None:
    """The numbers one asks for: requests now, latency and TTFT so far, evictions."""
    log, counters, view = scene.log, scene.counters, scene.view
    whole, first = latency(log), ttft(log)
    whole, first = whole[np.isfinite(whole)], first[np.isfinite(first)]
    evicted = "evicted" if scene.tokens else "preempted"
    tiles = [
        ("waiting", f"{view.num_waiting:,}"),
        ("on GPU", f"{view.num_residents:,}"),
        ("completed", f"{counters.finished:,}"),
        ("mean latency", _mean(whole)),
        ("P99 latency", _p99(whole)),
        ("mean TTFT", _mean(first)),
        ("P99 TTFT", _p99(first)),
        (evicted, f"{counters.evictions:,}"),
    ]
    width = TILES.width / len(tiles)
    paint.rule(TILES.left, TILES.right, TILES.top - 3)
    for n, (name, value) in enumerate(tiles):
        x = TILES.left + n * width
        paint.text(name, x, TILES.top + 3, SMALL, p.FAINT, width=width - 4)
        paint.text(value, x, TILES.top + 18, HUGE, p.RED if name == evicted and counters.evictions else p.INK, width=width - 4)
    paint.rule(TILES.left, TILES.right, TILES.bottom + 1)


def _mean(seconds: npt.NDArray[np.float64]) -> str:
    return seconds_words(float(seconds.mean())) if seconds.size else "\N{EN DASH}"


def _p99(seconds: npt.NDArray[np.float64]) -> str:
    return seconds_words(float(np.percentile(seconds, 99))) if seconds.size else "\N{EN DASH}"


def seconds_words(seconds: float) -> str:
    """Three digits or so."""
    return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s" if seconds < 999.5 else f"{seconds:,.0f} s"
