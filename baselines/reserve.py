"""Admission by expected final KV: over-commit memory by a factor theta, no more."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from baselines.policy import RulePolicy, Setting, prompt_classes
from llmsched_env.action import decode_reserve
from llmsched_env.compiled import compiled
from llmsched_env.engine.fleet import Rule
from llmsched_env.errors import ConfigError
from llmsched_env.observation import static_context
from llmsched_env.types import ADMIT_ALL, Decision, EngineConfig, QueueLayout


@compiled
def reserve(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision):  # type: ignore[no-untyped-def]
    """One action of the action set ``reserve``. ``parameters``: theta, then what an operator knows (``static_context``)."""
    decode_reserve(parameters[0], settings, parameters[1:], requests, slots, queues, scalars, decision)
    decision[2, :] = 0


def reservation(setting: Setting, theta: float, engine: EngineConfig, layout: QueueLayout) -> Rule:
    """Admits in the engine's order while the final KV to expect of all residents fits theta * C."""
    if not (math.isfinite(theta) and theta > 0):
        raise ConfigError(f"policy.theta: {theta}, must be finite and > 0")
    known = static_context(setting.statistics, setting.rate, engine, layout)
    return Rule(reserve, layout.num_queues, np.concatenate([[theta], known]))


class Reserve(RulePolicy):
    """First come, first served while sum(prompt + E[output | generated]) of residents <= theta * C.

    Expected lengths come from the scenario's statistics; no request's own output length is read.

    Args:
        theta: over-commitment; 1 plans for the mean, above 1 bets on requests ending before others grow.
    """

    name: ClassVar[str] = "reserve"

    def __init__(self, setting: Setting, theta: float = 1.1) -> None:
        self.layout = QueueLayout()
        self.engine = setting.engine_for()
        self.rule = reservation(setting, theta, self.engine, self.layout)


class ShortestPrompt(RulePolicy):
    """Prompt-length buckets, shortest first; greedy, or with a reservation.

    Args:
        num_classes: buckets of equal probability.
        theta: over-commitment of the reservation; None admits everything that fits.
    """

    name: ClassVar[str] = "shortest-prompt"

    def __init__(self, setting: Setting, num_classes: int = 8, theta: float | None = None) -> None:
        if num_classes < 1:
            raise ConfigError(f"policy.num_classes: {num_classes}, must be >= 1")
        self.layout = prompt_classes(setting.statistics, num_classes)
        self.engine = setting.engine_for(admission_order="class")
        if theta is None:
            self.constant = Decision.of([1] * self.layout.num_queues, [ADMIT_ALL] * self.layout.num_queues)
            self.rule = Rule.constant(self.constant)
        else:
            self.rule = reservation(setting, theta, self.engine, self.layout)
