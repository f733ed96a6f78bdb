"""Admission by expected final KV: over-commit memory by a factor theta, no more."""

from __future__ import annotations

import math
from typing import ClassVar

from llmsched_baselines.policy import RulePolicy, Setting, prompt_classes
from llmsched_env.action import decode_reserve
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.state import Engine
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.forecast import Forecast, make_forecast
from llmsched_env.records import Record
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout


class ReserveRecord(Record):
    theta: float
    forecast: Forecast  # what an operator knows


@compiled
def reserve(engine: Engine, policy: ReserveRecord, decision: Decision) -> None:
    """One action of the action set ``reserve``."""
    decode_reserve(engine, policy.theta, policy.forecast, decision)


def reservation(setting: Setting, theta: float, engine: EngineConfig, layout: QueueLayout) -> Rule:
    """Admits in the engine's order while the final KV to expect of all residents fits theta * C."""
    if not (math.isfinite(theta) and theta > 0):
        raise ConfigError(f"policy.theta: {theta}, must be finite and > 0")
    record = ReserveRecord(forecast=make_forecast(setting.statistics, setting.rate, engine, layout))
    record.theta = theta
    return Rule(reserve, layout.num_queues, record)


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
