"""What an environment with a ``render_mode`` keeps: the course of its episode, and the viewer once somebody looks."""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmsched_env.action import ActionCodec, OperateCodec
from llmsched_env.backend import Backend
from llmsched_env.render.history import History
from llmsched_env.render.names import bands, class_names
from llmsched_env.render.viewer import SIZE, Viewer
from llmsched_env.types import Decision, QueueLayout
from llmsched_env.workload import Scenario

ORDER_WORDS = {"arrival": "in order of arrival", "work": "least work first"}


class Rendered(Protocol):
    """What is read of an environment; ``render_size``, (width, height) in pixels, where it has one."""

    backend: Backend
    scenario: Scenario
    layout: QueueLayout
    codec: Any
    render_mode: str | None
    metadata: dict[str, Any]


class EnvViewer:
    """Frames of an environment. Nothing but a few numbers an iteration is kept until the first frame; pygame is not imported before.

    Args:
        env: it is kept, and read when a frame is drawn; an episode of it runs.
        rate: of the episode, requests/s.
    """

    def __init__(self, env: Rendered, rate: float) -> None:
        self._env = env
        self._viewer: Viewer | None = None
        self.start(rate)

    def start(self, rate: float) -> None:
        """An episode begins, at ``rate`` requests/s."""
        self._rate = rate
        self._history = History(self._env.backend.record)
        self._action: npt.NDArray[np.int64] | None = None

    def begin(self, action: npt.NDArray[np.int64] | None) -> None:
        """A step begins, under an action (W,) or under a decision alone."""
        self._action = action
        self._history.begin()

    def note(self, decision: Decision) -> None:
        """An iteration of it has been made; ``decision`` is what was asked of the engine."""
        self._history.note(self._env.backend.record, decision)

    def draw(self) -> npt.NDArray[np.uint8] | None:
        """(height, width, 3) uint8; None in ``human`` mode, whose window is drawn anew.

        Raises:
            MissingExtraError: pygame is not installed.
        """
        env = self._env
        if self._viewer is None:
            self._viewer = Viewer(
                env.scenario.name,
                env.layout,
                type_names=class_names(env.scenario, env.layout),
                bands=bands(env.scenario),
                size=getattr(env, "render_size", SIZE),
                human=env.render_mode == "human",
                fps=int(env.metadata["render_fps"]),
            )
        self._viewer.title = f"{env.scenario.name}, {self._rate:g} requests/s"
        frame = self._viewer.draw(env.backend, self._history, asked_words(env.codec, self._action))
        return None if env.render_mode == "human" else frame

    def close(self) -> None:
        """Close the window, where there is one."""
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None


def asked_words(codec: Any, action: npt.NDArray[np.int64] | None) -> str:
    """An action that chooses a level, and an order where the set has one, in words; empty for any other."""
    if action is None or isinstance(codec, ActionCodec):
        return ""
    level = float(getattr(codec, "thetas" if hasattr(codec, "thetas") else "levels")[int(action[0])])
    words = "no limit" if level == math.inf else f"level {level:g}"
    orders = getattr(codec, "orders", ())
    if isinstance(codec, OperateCodec) and codec.ageing:
        tau0 = codec.ageing[int(action[1])]
        return f"{words}, least work first" if tau0 == math.inf else f"{words}, ageing {tau0:g} s"
    return f"{words}, {ORDER_WORDS.get(orders[int(action[1])], orders[int(action[1])])}" if orders else words
