"""``Viewer``: frames of a backend, as arrays or in a window."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.backend import Backend
from llmsched_env.errors import ConfigError, require
from llmsched_env.render.frame import draw_frame
from llmsched_env.render.history import History
from llmsched_env.render.names import Names
from llmsched_env.render.painter import HEIGHT, WIDTH, Painter
from llmsched_env.render.scene import Scene
from llmsched_env.types import QueueLayout

SIZE = (WIDTH, HEIGHT)
MOST_PIXELS = 7_680


class Viewer:
    """Draws one frame per call of ``draw``.

    Args:
        title: of the run, such as its scenario and rate.
        layout: what the queues mean.
        type_names: of the classes where they are types.
        bands: decode lengths that tell residents apart where the layout has one queue alone.
        size: (width, height) of a frame in pixels; the picture is made for 800 x 480 and its multiples.
        human: show a window, else return the frame as an array.
        fps: frames per second of the window.

    Raises:
        MissingExtraError: pygame is not installed.
        ConfigError: a size that is too small to be read, or too large.
    """

    def __init__(
        self,
        title: str,
        layout: QueueLayout,
        *,
        type_names: Sequence[str] = (),
        bands: Sequence[int] = (),
        size: tuple[int, int] = SIZE,
        human: bool = False,
        fps: int = 30,
    ) -> None:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
        self._pygame: Any = require("pygame", "render")
        self.title, self._human, self._fps = title, human, fps
        size = checked_size("size", size)
        self._names = Names.of(layout, type_names, bands)
        self._pygame.font.init()
        self._window: Any = None
        if human:
            self._pygame.display.init()
            self._window = self._pygame.display.set_mode(size)
            self._pygame.display.set_caption(f"llmsched_env: {title}")
        self._clock = self._pygame.time.Clock()
        self._paint = Painter(self._pygame, size)

    def draw(self, backend: Backend, history: History, asked: str = "") -> npt.NDArray[np.uint8]:
        """The engine as it stands, in the window where there is one.

        Args:
            history: of this backend's episode.
            asked: the latest action in words; empty for those of its decision.

        Returns:
            (height, width, 3) uint8.
        """
        log, last = backend.log(), history.last
        admitted = 0 if last is None else int(np.count_nonzero(log.admitted >= last.start))
        scene = Scene(
            title=self.title,
            view=backend.snapshot(),
            counters=backend.counters(),
            log=log,
            history=history,
            asked=asked,
            names=self._names,
            token_budget=getattr(backend.record, "token_budget", 0),
            admitted=admitted,
        )
        draw_frame(self._paint, scene)
        surface = self._paint.surface
        if self._window is not None:
            self._window.blit(surface, (0, 0))
            self._pygame.event.pump()
            self._pygame.display.flip()
            self._clock.tick(self._fps)
        width, height = surface.get_size()
        pixels = np.frombuffer(self._pygame.image.tobytes(surface, "RGB"), dtype=np.uint8)
        return pixels.reshape(height, width, 3).copy()

    def close(self) -> None:
        """Close the window, where there is one."""
        if self._window is not None:
            self._pygame.display.quit()
            self._window = None


def checked_size(name: str, size: Any) -> tuple[int, int]:
    """(width, height) in pixels.

    Raises:
        ConfigError: naming ``name``; a frame is at least half as large as the picture is made for.
    """
    values = checks.integers(name, size, low=1, most=2)
    if len(values) != 2 or values[0] < WIDTH // 2 or values[1] < HEIGHT // 2 or max(values) > MOST_PIXELS:
        least = f"{WIDTH // 2} x {HEIGHT // 2}"
        raise ConfigError(f"{name}: {checks.shown(size)}, must be (width, height) in pixels, from {least} to {MOST_PIXELS} each")
    return values[0], values[1]
