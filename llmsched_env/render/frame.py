"""One picture of an engine: what is decided, KV memory, queues, figures so far, and the course over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.backend import Counters, View
from llmsched_env.metrics import latency, ttft
from llmsched_env.render import painter as p
from llmsched_env.render.course import draw_course
from llmsched_env.render.history import History, LastStep
from llmsched_env.render.names import Names, admission_words
from llmsched_env.render.painter import Box, Painter
from llmsched_env.types import RequestLog

MARGIN = 12.0
MEMORY = Box(MARGIN, 80, 248, 132)
TABLE = Box(280, 60, 508, 182)
TILES = Box(MARGIN, 252, p.WIDTH - 2 * MARGIN, 42)
COURSE = Box(MARGIN, 304, p.WIDTH - 2 * MARGIN, 170)
SMALL, PLAIN, LARGE, HUGE = 15.0, 17.0, 22.0, 25.0
SMALLEST_SQUARE = 7.0
TALL_ROW = 60.0
"""Rows at least as high have upright bars."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a frame shows.

    Attributes:
        title: of the run.
        queue_share: KV of prefills by queue is not part of a view: ``prefill_kv`` (J, K), KV units.
    """

    title: str
    view: View
    counters: Counters
    log: RequestLog
    history: History
    names: Names
    token_budget: int
    admitted: int

    @property
    def tokens(self) -> bool:
        """KV is counted in tokens, not in blocks."""
        return self.view.engine.preset == "paper"


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


def decision_words(scene: Scene) -> str:
    """The latest decision, and what the engine admitted."""
    last = scene.history.last
    if last is None:
        return "No decision yet"
    engine, layout = scene.view.engine, scene.view.layout
    parts = [admission_words(last.admit, layout) if last.level is None else f"level {last.level:g}"]
    parts[0] += f" ({scene.admitted:,} entered)" if scene.admitted or (last.admit > 0).any() else ""
    parts += held_words(last, scene)
    if engine.preset == "vllm" and 0 < scene.token_budget < engine.max_num_batched_tokens:
        parts.append(f"token budget {scene.token_budget:,}")
    seconds = scene.counters.clock - last.start
    parts.append(f"step of {seconds:.3f} s" if seconds < 1 else f"step of {seconds:.1f} s")
    return "Decision: " + ", ".join(parts)


def held_words(last: LastStep, scene: Scene) -> list[str]:
    """Segments that do not run, boundary queues that nobody leaves, evictions asked for."""
    names, view = scene.names, scene.view
    shape = view.waiting.shape
    held = names.grouped((last.run == 0).reshape(shape) * view.residents).sum(axis=0)
    closed = (last.admit <= 0).reshape(shape) * view.waiting
    closed[:, 0] = 0
    waiting = names.grouped(closed).sum(axis=0)
    found = []
    if held.any():
        found.append("hold " + ("everything" if (last.run == 0).all() else " and ".join(np.array(names.columns)[held > 0])))
    if waiting.any():
        found.append("nobody enters " + " and ".join(np.array(names.columns)[waiting > 0]))
    if last.evict.any():
        found.append(f"evict {int(last.evict.sum()):,}")
    return found


# --- KV memory -----------------------------------------------------------------------------------------
def queue_colours(names: Names) -> list[list[p.Colour]]:
    """Colour of each (row, column)."""
    if names.by_class:
        return [[colour] for colour in p.scale_colours(len(names.rows))]
    return [p.scale_colours(len(names.columns))] * len(names.rows)


def prefill_kv(view: View) -> npt.NDArray[np.int64]:
    """(J, K) KV units of the residents whose prefill is unfinished."""
    residents, engine, layout = view.resident_requests(), view.engine, view.layout
    unfinished = (residents.computed < residents.prefill_target) & ~residents.at_boundary
    tokens = residents.computed[unfinished].astype(np.int64)
    units = tokens if engine.preset == "paper" else -(-tokens // engine.block_size)
    found = np.bincount(residents.queue[unfinished], weights=units, minlength=layout.num_queues)
    shape = (layout.num_classes, layout.num_segments)
    return np.minimum(found.astype(np.int64).reshape(shape), view.resident_kv)


def draw_memory(paint: Painter, scene: Scene) -> None:
    """A square for every few units of KV memory, by who holds it."""
    view, engine = scene.view, scene.view.engine
    capacity, used = engine.kv_capacity, view.kv_used
    paint.text("KV memory", MARGIN, 58, PLAIN)
    paint.text(f"{100 * used / capacity:.0f} %", MEMORY.right, 58, PLAIN, align="right")
    unit, pitch = square_unit(paint, capacity, 10 if scene.tokens else 2)
    prefill = prefill_kv(view)
    decode = scene.names.grouped(view.resident_kv - prefill)
    boundary = scene.names.grouped(view.boundary_kv)
    shares: list[tuple[int, p.Colour, bool]] = []
    colours = queue_colours(scene.names)
    cells = [(i, k) for k in reversed(range(len(scene.names.columns))) for i in range(len(scene.names.rows))]
    for i, k in cells:
        shares += [(int(decode[i, k]), colours[i][k], False), (int(boundary[i, k]), colours[i][k], True)]
    shares.append((int(prefill.sum()), p.PURPLE, False))
    total = math.ceil(capacity / unit)
    counts = whole_squares(shares, unit)
    taken = min(sum(count for count, _, _ in counts), total)
    reserve = min(math.ceil(engine.watermark_blocks / unit), total - taken)
    counts += [(total - taken - reserve, p.FREE, False), (reserve, p.LINE, True)]
    paint.squares(MEMORY, counts, pitch)
    kind = "tokens" if scene.tokens else f"blocks of {engine.block_size} tokens"
    paint.text(f"{used:,} of {capacity:,} {kind}", MARGIN, 216, SMALL, p.FAINT)
    draw_memory_legend(paint, scene, unit)


def draw_memory_legend(paint: Painter, scene: Scene, unit: int) -> None:
    """What the squares stand for, beside the colours of the table."""
    x = MARGIN
    entries = [("prefill", p.PURPLE, False)]
    if len(scene.names.columns) > 1:
        entries.append(("at boundary", p.FAINT, True))
    if scene.view.engine.watermark_blocks:
        entries.append(("reserve", p.LINE, True))
    for word, colour, hollow in entries:
        paint.fill(Box(x, 234, 8, 8), colour)
        if hollow:
            paint.fill(Box(x + 2.5, 236.5, 3, 3), p.BACKGROUND)
        x += 12 + paint.text(word, x + 12, 232, SMALL, p.FAINT) + 10
    kind = "token" if scene.tokens else "block"
    text = f"square: {unit:,} {kind}{'s' if unit > 1 else ''}"
    paint.text(text, MEMORY.right, 232, SMALL, p.FAINT, "right", width=MEMORY.right - x)


def square_unit(paint: Painter, capacity: int, base: int) -> tuple[int, int]:
    """KV units of one square and pixels from a square to the next: the finest that can be told apart.

    Args:
        base: 2 for units of 1, 2, 4, 8, ...; 10 for 1, 2, 5, 10, ...
    """
    unit = 1
    while True:
        pitch = paint.square_pitch(MEMORY, math.ceil(capacity / unit))
        if pitch >= SMALLEST_SQUARE * paint.scale:
            return unit, pitch
        unit = unit * 2 if base == 2 else next_round(unit)


def next_round(number: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    first = int(str(number)[0])
    return number * 5 // 2 if first == 2 else number * 2


def whole_squares(shares: Sequence[tuple[int, p.Colour, bool]], unit: int) -> list[tuple[int, p.Colour, bool]]:
    """Shares in squares of ``unit``: rounded where one ends, so that their sum is right too."""
    ends = np.rint(np.cumsum([amount for amount, _, _ in shares]) / unit).astype(int)
    counts = np.diff(ends, prepend=0)
    return [(int(n), colour, hatched) for n, (_, colour, hatched) in zip(counts, shares, strict=True)]


# --- queues --------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True)
class Columns:
    """Left edges and widths of the table: names of classes, outside queues, segments."""

    name: float
    outside: Box
    segments: tuple[Box, ...]


def table_columns(count: int, named: bool) -> Columns:
    """Where the columns stand; without names of classes there is more room for the others."""
    name = 112.0 if named else 0.0
    outside = 116.0 if named else 132.0
    left = TABLE.left + name + outside + 12
    width = (TABLE.right - left) / count
    boxes = tuple(Box(left + k * width, TABLE.top, width - 8, TABLE.height) for k in range(count))
    return Columns(name, Box(TABLE.left + name, TABLE.top, outside, TABLE.height), boxes)


def draw_queues(paint: Painter, scene: Scene) -> None:
    """Requests by class (rows) and place (columns): outside, then segment by segment."""
    view, names = scene.view, scene.names
    columns = table_columns(len(names.columns), len(names.rows) > 1)
    colours = queue_colours(names)
    top = TABLE.top
    paint.text("waiting outside", columns.outside.left, top - 2, PLAIN, width=columns.outside.width)
    for k, (name, box) in enumerate(zip(names.columns, columns.segments, strict=True)):
        shift = 0.0
        if not names.by_class:
            paint.fill(Box(box.left, top, 9, 9), colours[0][k])
            shift = 13.0
        paint.text(name, box.left + shift, top - 2, PLAIN, width=box.width - shift)
    outside = names.by_row(view.waiting[:, 0])
    queued = view.waiting.copy()
    queued[:, 0] = 0
    boundary, residents = names.grouped(queued), names.grouped(view.residents)
    most_outside, most_inside = nice(int(outside.max())), nice(int((boundary + residents).max()))
    ages = oldest(scene)
    height = (TABLE.height - 18) / len(names.rows)
    for i, name in enumerate(names.rows):
        row = Box(TABLE.left, top + 18 + i * height, TABLE.width, height)
        if i:
            paint.rule(row.left, row.right, row.top)
        if columns.name:
            middle = row.top + height / 2 - 6
            if names.by_class:
                paint.fill(Box(row.left, middle + 1, 9, 9), colours[i][0])
            shift = 13.0 if names.by_class else 0.0
            paint.text(name, row.left + shift, middle, PLAIN, width=columns.name - 8 - shift)
        draw_cell(paint, cell_box(columns.outside, row), Cell(int(outside[i]), 0, most_outside, p.ORANGE, ages[i]))
        for k, box in enumerate(columns.segments):
            cell = Cell(int(residents[i, k]), int(boundary[i, k]), most_inside, colours[i][k], "")
            draw_cell(paint, cell_box(box, row), cell)


def cell_box(column: Box, row: Box) -> Box:
    return Box(column.left, row.top + 2, column.width, row.height - 4)


@dataclass(frozen=True, slots=True)
class Cell:
    """Requests at one place of the table: inside, in the boundary queue before it, full scale, and a word on them."""

    inside: int
    boundary: int
    most: int
    colour: p.Colour
    note: str


def draw_cell(paint: Painter, box: Box, cell: Cell) -> None:
    """Bars and numbers; upright where the row is high."""
    if box.height >= TALL_ROW - 4:
        draw_upright(paint, box, cell)
        return
    size = LARGE if box.height > 34 else PLAIN
    bar = min(box.height - 4, 14.0)
    middle = box.top + (box.height - bar) / 2
    numbers = paint.text(str(cell.inside), box.left, box.top + box.height / 2 - size * 0.35, size)
    if cell.boundary:
        text = f"+{cell.boundary:,}"
        numbers += 3 + paint.text(text, box.left + numbers + 3, box.top + box.height / 2 - SMALL * 0.35, SMALL, p.FAINT)
    start = max(34.0, numbers + 6)
    note = 0.0
    if cell.note:
        note = 4 + paint.text(cell.note, box.right, box.top + box.height / 2 - SMALL * 0.35, SMALL, p.FAINT, "right")
    room = max(box.width - start - note, 0.0)
    first = room * cell.inside / cell.most
    paint.fill(Box(box.left + start, middle, first, bar), cell.colour)
    paint.fill(Box(box.left + start + first, middle, room * cell.boundary / cell.most, bar), cell.colour, hatched=True)


def draw_upright(paint: Painter, box: Box, cell: Cell) -> None:
    numbers = paint.text(f"{cell.inside:,}", box.left, box.top + 3, HUGE)
    if cell.boundary:
        text = f"+{cell.boundary:,}"
        paint.text(text, box.left + numbers + 4, box.top + 7, SMALL, p.FAINT, width=box.width - numbers - 4)
    if cell.note:
        paint.text(cell.note, box.left + numbers + 6, box.top + 7, SMALL, p.FAINT, width=box.width - numbers - 6)
    room, width = box.height - 26, min(box.width, 64.0)
    paint.fill(Box(box.left, box.bottom - room, width, room), p.FREE)
    first = room * cell.inside / cell.most
    second = room * cell.boundary / cell.most
    paint.fill(Box(box.left, box.bottom - first, width, first), cell.colour)
    paint.fill(Box(box.left, box.bottom - first - second, width, second), cell.colour, hatched=True)


def nice(number: int) -> int:
    """The full scale of bars up to ``number``: 10, 20, 50, 100, ..."""
    most = 10
    while most < number:
        most = next_round(most)
    return most


def oldest(scene: Scene) -> list[str]:
    """How long the head of each row's outside queues has waited, in words."""
    arrival = scene.view.head_arrival
    found = []
    for row in range(len(scene.names.rows)):
        heads = arrival[scene.names.row_of == row]
        heads = heads[np.isfinite(heads)]
        found.append(f"since {short_seconds(scene.counters.clock - float(heads.min()))}" if heads.size else "")
    return found


def short_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:,.0f} s"


# --- figures -------------------------------------------------------------------------------------------
def draw_figures(paint: Painter, scene: Scene) -> None:
    """The numbers one asks for: requests now, latency and TTFT so far, evictions."""
    log, counters, view = scene.log, scene.counters, scene.view
    whole, first = latency(log), ttft(log)
    whole, first = whole[np.isfinite(whole)], first[np.isfinite(first)]
    evicted = "evicted" if scene.tokens else "preempted"
    tiles = [
        ("waiting", f"{view.num_waiting:,}"),
        ("on the GPU", f"{view.num_residents:,}"),
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
