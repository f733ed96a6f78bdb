"""Text, rectangles and curves on a pygame surface, in units of a picture of 800 x 480."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

WIDTH, HEIGHT = 800, 480
Colour = tuple[int, int, int]
Align = Literal["left", "centre", "right"]

BACKGROUND: Colour = (255, 255, 255)
INK: Colour = (28, 32, 38)
FAINT: Colour = (92, 98, 108)
LINE: Colour = (206, 210, 216)
FREE: Colour = (233, 235, 239)
# Told apart by colour-blind readers: hues of Okabe and Ito, and a scale that grows lighter from blue to yellow.
BLUE: Colour = (0, 114, 178)
ORANGE: Colour = (230, 159, 0)
PURPLE: Colour = (204, 121, 167)
RED: Colour = (196, 60, 0)
_SCALE = np.array([(32, 60, 126), (0, 124, 168), (52, 172, 134), (232, 202, 62)], dtype=np.float64)
SMALL, PLAIN, LARGE, HUGE = 15.0, 17.0, 22.0, 25.0
"""Heights of lines."""
CURVE_SAMPLES = 3
"""Curves are drawn this many times as large and scaled down: smooth lines of any width."""
LARGEST_SQUARE = 22.0
TEXT_SAMPLES = 4
"""The same for letters: small ones would stand on whole pixels, with uneven gaps."""


def scale_colours(count: int) -> list[Colour]:
    """``count`` colours in order, dark to light."""
    if count == 1:
        return [BLUE]
    at = np.linspace(0, len(_SCALE) - 1, count)
    mixed = np.stack([np.interp(at, np.arange(len(_SCALE)), _SCALE[:, channel]) for channel in range(3)], axis=1)
    return [(int(r), int(g), int(b)) for r, g, b in np.rint(mixed)]


def next_round(number: int) -> int:
    """The next of 1, 2, 5, 10, 20, 50, ..."""
    first = int(str(number)[0])
    return number * 5 // 2 if first == 2 else number * 2


def towards(colour: Colour, other: Colour, share: float) -> Colour:
    """A colour with ``share`` of another mixed in."""
    r, g, b = (round(a + (b - a) * share) for a, b in zip(colour, other, strict=True))
    return r, g, b


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the picture."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells in rows: how many a row, and pixels from one to the next."""

    columns: int
    width: int
    height: int


class Painter:
    """Draws on ``surface``; the picture of 800 x 480 is made as large as it fits and stands in the middle.

    Args:
        pygame: the module.
        size: (width, height) in pixels.
    """

    def __init__(self, pygame: Any, size: tuple[int, int]) -> None:
        self._pygame = pygame
        self.surface = pygame.Surface(size)
        self.scale = min(size[0] / WIDTH, size[1] / HEIGHT)
        self._left, self._top = (size[0] - WIDTH * self.scale) / 2, (size[1] - HEIGHT * self.scale) / 2
        self._fonts: dict[float, Any] = {}

    def clear(self) -> None:
        self.surface.fill(BACKGROUND)

    def pixels(self, box: Box) -> Any:
        """The pixels of a box, its edges rounded, as pygame's ``Rect``."""
        left, right = (math.floor(self._left + x * self.scale + 0.5) for x in (box.left, box.right))
        top, bottom = (math.floor(self._top + y * self.scale + 0.5) for y in (box.top, box.bottom))
        return self._pygame.Rect(left, top, right - left, bottom - top)

    def fill(self, box: Box, colour: Colour, *, hatched: bool = False, radius: float = 0.0) -> None:
        area = self.pixels(box)
        if area.width < 1 or area.height < 1:
            return
        self._pygame.draw.rect(self.surface, colour, area, border_radius=round(radius * self.scale))
        if hatched:
            self.hatch(area)

    def hatch(self, area: Any) -> None:
        """White diagonal lines over pixels."""
        step, thick = max(round(5 * self.scale), 3), max(round(1.5 * self.scale), 1)
        self.surface.set_clip(area)
        for x in range(area.left - area.height, area.right, step):
            self._pygame.draw.line(self.surface, BACKGROUND, (x, area.bottom), (x + area.height, area.top), thick)
        self.surface.set_clip(None)

    def frame(self, box: Box, colour: Colour = LINE) -> None:
        self._pygame.draw.rect(self.surface, colour, self.pixels(box), max(round(self.scale), 1))

    def rule(self, left: float, right: float, y: float, colour: Colour = LINE) -> None:
        """A level line."""
        self.fill(Box(left, y, right - left, max(1.0 / self.scale, 1.0)), colour)

    def _font(self, size: float) -> Any:
        if size not in self._fonts:
            self._fonts[size] = self._pygame.font.Font(None, round(size * self.scale * TEXT_SAMPLES))
        return self._fonts[size]

    def text(
        self,
        text: str,
        x: float,
        y: float,
        size: float,
        colour: Colour = INK,
        align: Align = "left",
        *,
        width: float | None = None,
    ) -> float:
        """Write a line; returns how wide it is.

        Args:
            x: its left edge, middle or right edge, as ``align`` says; y: its top.
            width: what it may take; a longer text ends in an ellipsis.
        """
        if width is not None and self.text_width(text, size) > width:
            while text and self.text_width(text + "\N{HORIZONTAL ELLIPSIS}", size) > width:
                text = text[:-1]
            text = text.rstrip() + "\N{HORIZONTAL ELLIPSIS}"
        large = self._font(size).render(text, True, colour)
        wide: float = large.get_width() / TEXT_SAMPLES / self.scale
        image = self._pygame.transform.smoothscale(large, [round(pixels / TEXT_SAMPLES) for pixels in large.get_size()])
        left = x - {"left": 0.0, "centre": wide / 2, "right": wide}[align]
        self.surface.blit(image, (round(self._left + left * self.scale), round(self._top + y * self.scale)))
        return wide

    def text_width(self, text: str, size: float) -> float:
        pixels: int = self._font(size).size(text)[0]
        return pixels / TEXT_SAMPLES / self.scale

    def squares(self, box: Box, counts: Sequence[tuple[int, Colour, bool]], grid: Grid) -> None:
        """Squares row by row from the lower left.

        Args:
            counts: (how many, colour, hollow), in order.
        """
        area, gap, at = self.pixels(box), max(round(self.scale), 1), 0
        width, height = grid.width - gap, grid.height - gap
        for count, colour, hollow in counts:
            for n in range(at, at + count):
                row, column = divmod(n, grid.columns)
                left, bottom = area.left + column * grid.width, area.bottom - row * grid.height
                square = self._pygame.Rect(left, bottom - height, width, height)
                self.surface.fill(colour, square)
                if hollow:
                    mark = max(min(width, height) // 3, 1)
                    self.surface.fill(BACKGROUND, square.inflate(-2 * mark, -2 * mark))
            at += count

    def grid(self, box: Box, count: int, smallest: float) -> Grid | None:
        """The grid of nearly square cells that covers most of the box with ``count`` of them; None if they would be too small.

        Args:
            smallest: side of a cell, in units.
        """
        area = self.pixels(box)
        best: Grid | None = None
        for columns in range(1, area.width // max(round(smallest * self.scale), 1) + 1):
            rows = -(-count // columns)
            largest = round(LARGEST_SQUARE * self.scale)
            cell = Grid(columns, min(area.width // columns, largest), min(area.height // rows, largest))
            if cell.height < smallest * self.scale or not 0.7 <= cell.width / cell.height <= 1.45:
                continue
            if best is None or cell.width * cell.height > best.width * best.height:
                best = cell
        return best

    def curves(self, box: Box, lines: Sequence[tuple[npt.NDArray[np.float64], Colour, float, bool]]) -> None:
        """Curves in a box.

        Args:
            lines: ((n, 2) points in units of the box, 0 to 1 from its lower left; colour; width; whether what is below is filled).
        """
        area = self.pixels(box)
        size = (area.width * CURVE_SAMPLES, area.height * CURVE_SAMPLES)
        large = self._pygame.Surface(size)
        large.blit(self._pygame.transform.scale(self.surface.subsurface(area), size), (0, 0))
        for points, colour, width, filled in lines:
            if len(points) < 2:
                continue
            thick = max(round(width * self.scale * CURVE_SAMPLES), 1)
            x = points[:, 0] * size[0]
            y = (1.0 - points[:, 1]) * (size[1] - thick) + thick / 2
            path = np.stack([x, y], axis=1)
            if filled:
                closed = [(path[0, 0], size[1]), *path.tolist(), (path[-1, 0], size[1])]
                self._pygame.draw.polygon(large, towards(colour, BACKGROUND, 0.72), closed)
            self._pygame.draw.lines(large, colour, False, path.tolist(), thick)
        self.surface.blit(self._pygame.transform.smoothscale(large, area.size), area.topleft)


def film_colours() -> list[Colour]:
    """At most 256 colours that stand for all of a picture: each of its own, and its way to white, where edges are smooth."""
    pure = [INK, FAINT, ORANGE, PURPLE, RED, towards(ORANGE, INK, 0.35), *(c for n in (1, 2, 3, 4) for c in scale_colours(n))]
    mixed = [towards(colour, BACKGROUND, share) for colour in pure for share in (0.0, 0.2, 0.4, 0.6, 0.8)]
    others = [BACKGROUND, LINE, FREE, towards(BLUE, BACKGROUND, 0.72), *(c for n in range(5, 9) for c in scale_colours(n))]
    return list(dict.fromkeys([*others, *mixed]))
