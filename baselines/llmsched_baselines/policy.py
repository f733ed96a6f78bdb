"""What a scheduling policy is: queues it wants, an engine it stands for, and one method `decide`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmsched_env.backend import View
from llmsched_env.engine.rules import Rule
from llmsched_env.engine_changes import engine_with
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision, LengthStatistics, QueueLayout
from llmsched_env.workload.scenario import bucket_edges, interpolated_edges


@dataclass(frozen=True)
class Setting:
    """What an operator knows before the first request: the basis of every threshold.

    Attributes:
        statistics: length distribution of the workload.
        rate: arrival rate in requests/s.
        engine: the engine as the scenario gives it.
        horizon_seconds: length of the run, for the overflow probability of Nested WAIT's safety buffer.
        overrides: engine fields the user set; they win over the policy's own engine preset.
    """

    statistics: LengthStatistics
    rate: float
    engine: EngineConfig
    horizon_seconds: float = 3600.0
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def engine_for(self, **preset: Any) -> EngineConfig:
        """The engine with a policy's preset, the user's own settings last."""
        return engine_with(self.engine, {**preset, **self.overrides})


class Policy(ABC):
    """A scheduling policy for one setting.

    Args:
        setting: what is known beforehand; a policy with options of its own takes them as further arguments.

    Attributes:
        name: as it stands in tables.
        known_lengths: needs output lengths at arrival; marked so in every table.
        reads_arrivals: its rule walks requests by their number (``engine.predictions.arrived``), which is good where a row holds one
            request for the whole episode; an engine of a cluster uses rows again.
        layout: the queues it wants the engine to keep; one, unless it says otherwise.
        engine: the engine it runs on (a token budget is part of what ``sarathi`` means).
        notes: what a reader of a table must know, such as overload mode; empty if nothing.
        constant: the one decision of a policy that always decides the same; episodes then run without asking it.
        rule: the decision as compiled code; episodes on the simulator then run without Python between iterations.
    """

    name: ClassVar[str]
    known_lengths: ClassVar[bool] = False
    reads_arrivals: ClassVar[bool] = False
    layout: QueueLayout = QueueLayout()
    engine: EngineConfig
    notes: str = ""
    constant: Decision | None = None
    rule: Rule | None = None

    def __init__(self, setting: Setting) -> None:
        self.engine = setting.engine_for()

    @abstractmethod
    def decide(self, view: View) -> Decision:
        """The decision for the next iteration. The object returned may be reused by the next call."""

    def reset(self) -> None:  # noqa: B027 - most policies have no memory
        """Forget the previous episode."""


class RulePolicy(Policy):
    """A policy whose decision is a compiled rule, so that whole episodes run without Python (``llmsched_env.engine.rules``)."""

    rule: Rule

    def reset(self) -> None:
        self.rule.reset()

    def decide(self, view: View) -> Decision:
        return self.rule.decide(view)


def need_vllm(name: str, engine: EngineConfig) -> None:
    """Refuse the ``paper`` preset, where a token budget has no meaning."""
    if engine.preset != "vllm":
        raise ConfigError(f"policy {name!r}: engine.preset is {engine.preset!r}, must be 'vllm' (use 'fcfs' with the paper preset)")


def output_classes(statistics: LengthStatistics, num_classes: int) -> QueueLayout:
    """Classes with known lengths: the workload's types, else buckets of equal probability by output length."""
    if statistics.num_types > 1:
        return QueueLayout(by="type", num_types=statistics.num_types)
    edges = bucket_edges(statistics.output, statistics.weight, num_classes)
    return QueueLayout(by="output", edges=edges) if edges else QueueLayout()


def prompt_classes(statistics: LengthStatistics, num_classes: int) -> QueueLayout:
    """Buckets of about equal probability by prompt length, which a server knows at arrival.

    Where there are to be more buckets than the statistics know prompt lengths, ``interpolated_edges``.
    """
    if num_classes > np.unique(statistics.prompt).size:
        edges = interpolated_edges(statistics, num_classes)
    else:
        edges = bucket_edges(statistics.prompt, statistics.weight, num_classes)
    return QueueLayout(by="prompt", edges=edges) if edges else QueueLayout()
