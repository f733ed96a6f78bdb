"""What a scheduling policy is: queues it wants, an engine it stands for, and one method `decide`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmsched_env.backend import View
from llmsched_env.env import engine_with
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision, EngineConfig, IntArray, LengthStatistics, QueueLayout


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

    Attributes:
        name: as in ``policy_names()``.
        known_lengths: needs output lengths at arrival; marked so in every table.
        layout: the queues it wants the engine to keep.
        engine: the engine it runs on (a token budget is part of what ``sarathi`` means).
        notes: what a reader of a table must know, such as overload mode; empty if nothing.
        constant: the one decision of a policy that always decides the same; episodes then run without asking it.
    """

    name: ClassVar[str]
    known_lengths: ClassVar[bool] = False
    layout: QueueLayout
    engine: EngineConfig
    notes: str = ""
    constant: Decision | None = None

    @abstractmethod
    def decide(self, view: View) -> Decision:
        """The decision for the next iteration. The object returned may be reused by the next call."""

    def reset(self) -> None:  # noqa: B027 - most policies have no memory
        """Forget the previous episode."""


def need_vllm(name: str, engine: EngineConfig) -> None:
    """Refuse the ``paper`` preset, where a token budget has no meaning."""
    if engine.preset != "vllm":
        raise ConfigError(f"policy {name!r}: engine.preset is {engine.preset!r}, must be 'vllm' (use 'fcfs' with the paper preset)")


def first_head_fits(view: View, admit: IntArray) -> bool:
    """Whether the oldest of the outside requests that ``admit`` asks for fits while all residents are held.

    A policy that freezes residents can freeze memory with them: where this is False and nothing
    else would run, no later decision of the same kind could ever run anything again.
    """
    engine, outside = view.engine, admit[:: view.layout.num_segments]
    classes = np.flatnonzero((outside > 0) & (view.waiting[:, 0] > 0))
    if classes.size == 0:
        return False
    if engine.admission_order == "arrival":
        classes = classes[np.argmin(view.head_key[classes])][None]
    tokens = int(view.head_tokens[classes[0]])
    if engine.preset == "paper":  # a resident outside a boundary queue is charged one token more than it holds
        return tokens <= view.kv_free - int(view.residents.sum())
    if not engine.scheduler_reserve_full_isl:
        tokens = min(tokens, engine.max_num_batched_tokens)
    return -(-tokens // engine.block_size) <= view.kv_free and view.num_residents < engine.max_num_seqs


def output_classes(statistics: LengthStatistics, num_classes: int) -> QueueLayout:
    """Classes with known lengths: the workload's types, else buckets of equal probability by output length."""
    if statistics.num_types > 1:
        return QueueLayout(by="type", num_types=statistics.num_types)
    edges = bucket_edges(statistics.output, statistics.weight, num_classes)
    return QueueLayout(by="output", edges=edges) if edges else QueueLayout()


def prompt_classes(statistics: LengthStatistics, num_classes: int) -> QueueLayout:
    """Buckets of equal probability by prompt length, which a server knows at arrival."""
    edges = bucket_edges(statistics.prompt, statistics.weight, num_classes)
    return QueueLayout(by="prompt", edges=edges) if edges else QueueLayout()


def bucket_edges(values: np.ndarray, weight: np.ndarray, num_classes: int) -> tuple[int, ...]:
    """Upper edges of ``num_classes`` buckets of equal probability; fewer where lengths coincide."""
    order = np.argsort(values, kind="stable")
    mass = np.cumsum(weight[order])
    edges: list[int] = []
    for share in np.arange(1, num_classes) / num_classes:
        edge = int(np.floor(values[order][min(np.searchsorted(mass, share), values.size - 1)]))
        if edge >= 1 and edge < values.max() and (not edges or edge > edges[-1]):
            edges.append(edge)
    return tuple(edges)
