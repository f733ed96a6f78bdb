"""Policies for the tests of the live server, named in LLMSCHED_POLICY as ``serve_policies:NAME``."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from baselines import Setting
from llmsched_env.backend import View
from llmsched_env.types import Decision, EngineConfig, QueueLayout

RAISING_PROMPT = 61
"""Prompt length (tokens) at whose sight `Stubborn` raises."""


class Scripted:
    """Decides what a test's function says; queues and engine options are set by the test."""

    name = "scripted"
    known_lengths = False
    notes = ""
    layout: ClassVar[QueueLayout] = QueueLayout()
    changes: ClassVar[dict[str, object]] = {}
    script: ClassVar[Callable[[View], Decision] | None] = None

    def __init__(self, setting: Setting) -> None:
        self.engine: EngineConfig = setting.engine.replace(**self.changes)

    def reset(self) -> None:
        pass

    def decide(self, view: View) -> Decision:
        script = type(self).script
        return Decision.greedy(self.layout.num_queues) if script is None else script(view)


class Stubborn:
    """Admits nobody and lets nobody run; raises where it sees a prompt of ``RAISING_PROMPT`` tokens."""

    name = "stubborn"
    known_lengths = False
    notes = ""

    def __init__(self, setting: Setting) -> None:
        self.layout, self.engine = QueueLayout(segment_ends=(4,)), setting.engine

    def reset(self) -> None:
        pass

    def decide(self, view: View) -> Decision:
        if RAISING_PROMPT in view.waiting_requests(0, 64).prompt_tokens:
            raise ArithmeticError("a mistake in the policy")
        return Decision(2)
