"""Policies for the tests of the live server: ``serve_policies:NAME`` in LLMSCHED_POLICY, and a checkpoint made here."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from llmsched_baselines import Setting
from llmsched_env.backend import View
from llmsched_env.engine_config import EngineConfig
from llmsched_env.types import Decision, QueueLayout

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


class Moody:
    """Admits and lets run a few requests at a time, and does as a prompt's length says (``MOODS``) while that request waits."""

    name = "moody"
    known_lengths = False
    notes = ""

    def __init__(self, setting: Setting) -> None:
        self.layout, self.engine, self.calls = QueueLayout(segment_ends=(8,)), setting.engine, 0

    def reset(self) -> None:
        self.calls = 0

    def decide(self, view: View) -> Decision:
        self.calls += 1
        for length in view.waiting_requests(0, 1_000).prompt_tokens.tolist():
            if length in MOODS:
                return _follow(MOODS[length])
        return Decision.of([1, 1], [3, 4], [0, int(self.calls % 20 == 0)])


MOODS = {201: "raise", 202: "nonsense", 203: "take a while", 204: "hang", 205: "spin", 206: "exit"}
"""What `Moody` does at the sight of a prompt of so many tokens."""


def _follow(mood: str) -> Any:
    if mood == "raise":
        raise ArithmeticError("a mistake in the policy")
    if mood == "take a while":
        time.sleep(0.2)
    elif mood == "hang":
        time.sleep(3.0)
    elif mood == "exit":
        sys.exit(1)
    while mood == "spin":
        pass
    return "admit all" if mood == "nonsense" else Decision.greedy(2)


def random_agent(folder: Path, **recipe: Any) -> Path:
    """A learned agent with random weights."""
    from llmsched_agents.checkpoint import save_checkpoint
    from llmsched_agents.domain import Domain
    from llmsched_agents.interface import Interface
    from llmsched_agents.network import Network
    from llmsched_agents.recipe import Recipe

    made, domain = Recipe(**recipe), Domain(scenarios=("sharegpt",))
    interface = Interface(made, domain.grid()[0].setting)
    width, components, g = interface.width, interface.components, np.random.default_rng(0)

    def layer(rows: int, columns: int) -> tuple[Any, Any]:
        return g.normal(size=(rows, columns)).astype(np.float32), np.zeros(rows, np.float32)

    mean, scale = np.full(width, 0.5, np.float32), np.full(width, 2.0, np.float32)
    network = Network(mean, scale, (layer(16, width),), layer(sum(components), 16), components)
    save_checkpoint(folder, network, made, domain, interface.layout, name="random", deterministic=False, record={})
    return folder
