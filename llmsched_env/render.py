"""Frames of a running environment: KV by segment, queues, recent history (pygame)."""

from __future__ import annotations

import os
from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.backend import View
from llmsched_env.errors import require
from llmsched_env.types import EngineConfig, QueueLayout

WIDTH, HEIGHT = 800, 480
HISTORY = 240
# Okabe-Ito colours: told apart by colour-blind readers.
PALETTE = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66))
BACKGROUND, INK, GRID, FREE, EVICTION = (255, 255, 255), (40, 40, 40), (225, 225, 225), (240, 240, 240), (200, 30, 30)


class Viewer:
    """Draws one frame per call of ``draw``.

    Args:
        layout, engine: what the queues and the capacity mean.
        human: show a window, else return the frame as an array.
        fps: frames per second of the window.
    """

    def __init__(self, layout: QueueLayout, engine: EngineConfig, *, human: bool, fps: int) -> None:
        if not human:
            os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        self._pygame: Any = require("pygame", "render")
        self._layout, self._engine, self._human, self._fps = layout, engine, human, fps
        pygame = self._pygame
        pygame.font.init()
        if human:
            pygame.display.init()
            self._window = pygame.display.set_mode((WIDTH, HEIGHT))
            pygame.display.set_caption("llmsched_env")
        self._clock = pygame.time.Clock()
        self._canvas = pygame.Surface((WIDTH, HEIGHT))
        self._font = pygame.font.Font(None, 20)
        self._small = pygame.font.Font(None, 17)
        self._kv: deque[float] = deque(maxlen=HISTORY)
        self._queued: deque[int] = deque(maxlen=HISTORY)
        self._evicted: deque[bool] = deque(maxlen=HISTORY)
        self._last_evictions = 0

    def draw(self, view: View) -> npt.NDArray[np.uint8] | None:
        """(HEIGHT, WIDTH, 3) uint8 in ``rgb_array`` mode, None in ``human`` mode."""
        if view.evictions < self._last_evictions or view.clock == 0.0:
            for history in (self._kv, self._queued, self._evicted):
                history.clear()
            self._last_evictions = 0
        capacity = view.engine.kv_capacity
        self._kv.append(view.kv_used / capacity)
        self._queued.append(view.num_waiting)
        self._evicted.append(view.evictions > self._last_evictions)
        self._last_evictions = view.evictions
        self._canvas.fill(BACKGROUND)
        unit = "tokens" if view.engine.preset == "paper" else "blocks"
        self._text(
            f"t = {view.clock:,.2f} s    residents {view.num_residents}    waiting {view.num_waiting}    "
            f"KV {view.kv_used:,} / {capacity:,} {unit}    evictions {view.evictions}",
            (20, 14),
        )
        self._memory(view, capacity)
        self._queues(view)
        self._history()
        pygame = self._pygame
        if self._human:
            self._window.blit(self._canvas, (0, 0))
            pygame.event.pump()
            pygame.display.flip()
            self._clock.tick(self._fps)
            return None
        return np.ascontiguousarray(np.transpose(pygame.surfarray.array3d(self._canvas), (1, 0, 2)))

    def _text(self, text: str, at: tuple[int, int], small: bool = False) -> None:
        font = self._small if small else self._font
        self._canvas.blit(font.render(text, True, INK), at)

    def _memory(self, view: View, capacity: int) -> None:
        """One bar: KV of each segment in full colour, of its boundary queue hatched, free in grey."""
        pygame = self._pygame
        left, top, width, height = 20, 62, WIDTH - 40, 34
        self._text("KV memory by segment (hatched: boundary queue)", (left, top - 20), small=True)
        pygame.draw.rect(self._canvas, FREE, (left, top, width, height))
        x = float(left)
        for k in range(self._layout.num_segments):
            colour = PALETTE[k % len(PALETTE)]
            for kv, hatched in ((int(view.boundary_kv[:, k].sum()), True), (int(view.resident_kv[:, k].sum()), False)):
                w = width * kv / capacity
                if w < 0.5:
                    continue
                area = pygame.Rect(round(x), top, max(1, round(x + w) - round(x)), height)
                pygame.draw.rect(self._canvas, colour, area)
                if hatched:
                    for s in range(area.left, area.right, 6):
                        pygame.draw.line(self._canvas, BACKGROUND, (s, top), (s, top + height - 1))
                x += w
        pygame.draw.rect(self._canvas, INK, (left, top, width, height), 1)

    def _queues(self, view: View) -> None:
        """A bar for each queue (outside, boundary) and for the residents of each segment."""
        pygame = self._pygame
        left, top, height, bottom = 20, 132, 130, 262
        self._text("requests per class.segment (outline: its queue, filled: inside the segment)", (left, top - 22), small=True)
        waiting, residents = view.waiting, view.residents
        most = max(10, int(waiting.max()), int(residents.max()))
        num_queues = self._layout.num_queues
        step = (WIDTH - 40) / num_queues
        bar = max(2, min(34, int(step / 2.6)))
        pygame.draw.line(self._canvas, INK, (left, bottom), (WIDTH - 20, bottom))
        for q in range(num_queues):
            j, k = divmod(q, self._layout.num_segments)
            x = left + int(q * step + step / 2) - bar
            colour = PALETTE[k % len(PALETTE)]
            for n, offset, filled in ((int(waiting[j, k]), 0, False), (int(residents[j, k]), bar + 2, True)):
                h = round((height - 16) * n / most)
                pygame.draw.rect(self._canvas, colour, (x + offset, bottom - h, bar, h), 0 if filled else 2)
                if bar >= 12:
                    self._text(str(n), (x + offset, bottom - h - 14), small=True)
            if step >= 24:
                self._text(f"{j}.{k + 1}", (x + bar - 9, bottom + 5), small=True)

    def _history(self) -> None:
        """Recent KV share and outside queue; red ticks mark evictions."""
        pygame = self._pygame
        left, top, width, height = 20, 318, WIDTH - 40, 140
        most = max(10, *self._queued)
        self._text(
            f"recent steps: KV share (blue, full height = 100 %), requests outside (orange, full height = {most}), evictions (red)",
            (left, top - 20),
            small=True,
        )
        pygame.draw.rect(self._canvas, GRID, (left, top, width, height), 1)
        for share in (0.25, 0.5, 0.75):
            y = top + round(height * (1 - share))
            pygame.draw.line(self._canvas, GRID, (left, y), (left + width, y))
        xs = [left + width * i / (HISTORY - 1) for i in range(len(self._kv))]
        for x, hit in zip(xs, self._evicted, strict=True):
            if hit:
                pygame.draw.line(self._canvas, EVICTION, (x, top + 1), (x, top + 12), 2)
        if len(xs) > 1:
            kv = [(x, top + height * (1 - v)) for x, v in zip(xs, self._kv, strict=True)]
            queued = [(x, top + height * (1 - v / most)) for x, v in zip(xs, self._queued, strict=True)]
            pygame.draw.lines(self._canvas, PALETTE[1], False, queued, 2)
            pygame.draw.lines(self._canvas, PALETTE[0], False, kv, 2)

    def close(self) -> None:
        if self._human:
            self._pygame.display.quit()
