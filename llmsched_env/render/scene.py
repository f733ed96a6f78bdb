"""What a frame shows, and the latest decision in words."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.backend import Counters, View
from llmsched_env.render.history import History, LastStep
from llmsched_env.render.names import Names, admission_words
from llmsched_env.types import RequestLog


@dataclass(frozen=True, slots=True)
class Scene:
    """What a frame shows.

    Attributes:
        title: of the run.
        view, counters, log, history: of one backend at one moment.
        asked: the latest action in words; empty for those of its decision.
        token_budget: tokens that the latest iteration might compute; 0 where there is none.
        admitted: requests that entered for the first time in the latest step.
    """

    title: str
    view: View
    counters: Counters
    log: RequestLog
    history: History
    asked: str
    names: Names
    token_budget: int
    admitted: int

    @property
    def tokens(self) -> bool:
        """KV is counted in tokens, not in blocks."""
        return self.view.engine.preset == "paper"


def decision_words(scene: Scene) -> str:
    """The latest decision, and what the engine admitted."""
    last = scene.history.last
    if last is None:
        return "No decision yet"
    engine, layout = scene.view.engine, scene.view.layout
    parts = [scene.asked or admission_words(last.admit, layout)]
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
    held = held_residents(last, scene)
    closed = (last.admit <= 0).reshape(shape) * view.waiting
    closed[:, 0] = 0
    waiting = np.zeros(1, dtype=np.int64) if names.bands else names.grouped(closed).sum(axis=0)
    found = []
    if held.any():
        found.append("hold " + ("everything" if (last.run == 0).all() else " and ".join(np.array(names.columns)[held > 0])))
    if waiting.any():
        found.append("nobody enters " + " and ".join(np.array(names.columns)[waiting > 0]))
    if last.evict.any():
        found.append(f"evict {int(last.evict.sum()):,}")
    return found


def held_residents(last: LastStep, scene: Scene) -> npt.NDArray[np.int64]:
    """(columns,) residents of segments that the decision holds."""
    held = (last.run == 0).reshape(scene.view.waiting.shape) * scene.view.residents
    if scene.names.bands:
        return np.full(len(scene.names.columns), int(held.sum()), dtype=np.int64)
    found: npt.NDArray[np.int64] = scene.names.grouped(held).sum(axis=0)
    return found


def nobody_enters(last: LastStep, scene: Scene) -> bool:
    """Requests wait outside and the decision admits none of them."""
    return scene.view.num_waiting > 0 and scene.admitted == 0 and not (last.admit[:: scene.view.layout.num_segments] > 0).any()
