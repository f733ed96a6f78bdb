"""The table of requests: a row a class, a column a place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmsched_env.render import painter as p
from llmsched_env.render.names import Names
from llmsched_env.render.painter import HUGE, LARGE, PLAIN, SMALL, Box, Painter
from llmsched_env.render.places import places_of
from llmsched_env.render.scene import Scene, held_residents, nobody_enters

TABLE = Box(288, 60, 500, 184)
HEAD = 32.0
"""Height of the table's head."""
TALL_ROW = 60.0
"""Rows at least as high have upright bars, where there are several columns."""
CLASS_WORDS = {"single": "", "type": "type", "prompt": "prompt tokens", "output": "output tokens", "work": "work (us)", "tenant": "tenant"}


def queue_colours(names: Names) -> list[list[p.Colour]]:
    """Colour of each (row, column)."""
    if names.by_class:
        return [[colour] for colour in p.scale_colours(len(names.rows))]
    return [p.scale_colours(len(names.columns))] * len(names.rows)


@dataclass(frozen=True, slots=True)
class Columns:
    """Left edges and widths of the table: names of classes, outside queues, segments."""

    name: float
    outside: Box
    segments: tuple[Box, ...]


def table_columns(count: int, named: bool) -> Columns:
    """Where the columns stand; without names of classes there is more room for the others."""
    name = 112.0 if named else 0.0
    outside = 116.0
    left = TABLE.left + name + outside + 14
    width = (TABLE.right - left) / count
    boxes = tuple(Box(left + k * width, TABLE.top, width - 8, TABLE.height) for k in range(count))
    return Columns(name, Box(TABLE.left + name, TABLE.top, outside, TABLE.height), boxes)


def draw_queues(paint: Painter, scene: Scene) -> None:
    """Requests by class (rows) and place (columns): outside, then segment by segment. Red: the decision keeps them where they are."""
    view, names = scene.view, scene.names
    columns = table_columns(len(names.columns), len(names.rows) > 1)
    colours = queue_colours(names)
    top = TABLE.top
    segments, rows = len(names.columns) > 1, len(names.rows) > 1
    if rows:
        paint.text(CLASS_WORDS[view.layout.by], TABLE.left, top - 2, PLAIN, width=columns.name)
    last = scene.history.last
    shut = last is not None and nobody_enters(last, scene)
    paint.text("waiting outside", columns.outside.left, top - 2, PLAIN, p.RED if shut else p.INK, width=columns.outside.width)
    if rows and segments:
        paint.text("oldest", columns.outside.right, top + 15, SMALL, p.FAINT, "right")
    held = np.zeros(len(names.columns)) if last is None else held_residents(last, scene)
    paint.text("on GPU, by tokens generated" if segments else "on GPU", columns.segments[0].left, top - 2, PLAIN)
    if not segments and held[0]:
        paint.text("held", columns.segments[0].right, top - 2, PLAIN, p.RED, "right")
    for k, (name, box) in enumerate(zip(names.columns, columns.segments, strict=True)):
        if segments:
            paint.fill(Box(box.left, top + 16, 9, 9), colours[0][k])
            colour = p.RED if held[k] else p.INK
            paint.text(name.removeprefix("tokens "), box.left + 13, top + 15, SMALL, colour, width=box.width - 13)
    head = HEAD if segments else 18.0
    places = places_of(view, names)
    outside = names.by_row(view.waiting[:, 0])
    most_outside, most_inside = nice(int(outside.max())), nice(int((places.boundary + places.residents).max()))
    ages = oldest(scene, "" if rows else "oldest ")
    height = (TABLE.height - head) / len(names.rows)
    draw_cell = draw_upright if height >= TALL_ROW and segments else draw_level
    for i, name in enumerate(names.rows):
        row = Box(TABLE.left, top + head + i * height, TABLE.width, height)
        if i:
            paint.rule(row.left, row.right, row.top)
        if columns.name:
            middle = row.top + height / 2 - 6
            if names.by_class:
                paint.fill(Box(row.left, middle + 1, 9, 9), colours[i][0])
            shift = 13.0 if names.by_class else 0.0
            paint.text(name.removeprefix(f"{view.layout.by} "), row.left + shift, middle, PLAIN, width=columns.name - 8 - shift)
        draw_cell(paint, cell_box(columns.outside, row), Cell(int(outside[i]), 0, most_outside, p.ORANGE, ages[i]))
        for k, box in enumerate(columns.segments):
            cell = Cell(int(places.residents[i, k]), int(places.boundary[i, k]), most_inside, colours[i][k], "")
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


def draw_level(paint: Painter, box: Box, cell: Cell) -> None:
    """A number and a bar beside it."""
    size = LARGE if box.height > 34 else PLAIN
    bar = min(box.height - 4, 26.0 if box.height > 50 else 14.0)
    middle = box.top + (box.height - bar) / 2
    colour = p.INK if cell.inside else p.FAINT
    numbers = paint.text(f"{cell.inside:,}", box.left, box.top + box.height / 2 - size * 0.35, size, colour)
    if cell.boundary:
        text = f"+{cell.boundary:,}"
        numbers += 3 + paint.text(text, box.left + numbers + 3, box.top + box.height / 2 - SMALL * 0.35, SMALL, p.FAINT)
    start = max(34.0, numbers + 6)
    note = 0.0
    if cell.note:
        note = 4 + paint.text(cell.note, box.right, box.top + box.height / 2 - SMALL * 0.35, SMALL, p.FAINT, "right")
    room = max(box.width - start - note, 0.0)
    paint.fill(Box(box.left + start, middle, room, bar), p.FREE)
    first = room * cell.inside / cell.most
    paint.fill(Box(box.left + start, middle, first, bar), cell.colour)
    paint.fill(Box(box.left + start + first, middle, room * cell.boundary / cell.most, bar), cell.colour, hatched=True)


def draw_upright(paint: Painter, box: Box, cell: Cell) -> None:
    """A number and a bar below it."""
    numbers = paint.text(f"{cell.inside:,}", box.left, box.top + 3, HUGE)
    if cell.boundary:
        text = f"+{cell.boundary:,}"
        paint.text(text, box.left + numbers + 4, box.top + 7, SMALL, p.FAINT, width=box.width - numbers - 4)
    if cell.note:
        paint.text(cell.note, box.left + numbers + 6, box.top + 7, SMALL, p.FAINT, width=box.width - numbers - 6)
    room, width = box.height - 26, min(box.width, 84.0)
    paint.fill(Box(box.left, box.bottom - room, width, room), p.FREE)
    first = room * cell.inside / cell.most
    second = room * cell.boundary / cell.most
    paint.fill(Box(box.left, box.bottom - first, width, first), cell.colour)
    paint.fill(Box(box.left, box.bottom - first - second, width, second), cell.colour, hatched=True)


def nice(number: int) -> int:
    """The full scale of bars up to ``number``: 10, 20, 50, 100, ..."""
    most = 10
    while most < number:
        most = p.next_round(most)
    return most


def oldest(scene: Scene, word: str) -> list[str]:
    """How long the head of each row's outside queues has waited, after ``word``."""
    arrival = scene.view.head_arrival
    found = []
    for row in range(len(scene.names.rows)):
        heads = arrival[scene.names.row_of == row]
        heads = heads[np.isfinite(heads)]
        found.append(f"{word}{short_seconds(scene.counters.clock - float(heads.min()))}" if heads.size else "")
    return found


def short_seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:,.0f} s"
