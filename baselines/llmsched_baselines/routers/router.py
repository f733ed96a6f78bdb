"""What a router is: a compiled rule with parameters, built from what an operator knows of the cluster."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Annotated, ClassVar

from llmsched_env import checks
from llmsched_env.cluster.calls import CallSource
from llmsched_env.cluster.routing import RouterRule, chance, may_take
from llmsched_env.cluster.spec import ClusterSpec
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.records import Counts, Memory, Record
from llmsched_env.types import LengthStatistics

TRIES = 4
"""Draws of a replica before the next one that can take the call is taken instead."""


@dataclass(frozen=True, slots=True, eq=False)
class Door:
    """What an operator knows before the first call.

    Attributes:
        engines: of the replicas, one each, with their calibrations; at least one, all of one block size.
        statistics: lengths of the calls' prompts and outputs.
        rate: calls per second to expect.

    Raises:
        ConfigError: no engine, something else than an engine, or a rate that is not positive.
    """

    engines: tuple[EngineConfig, ...]
    statistics: LengthStatistics
    rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "engines", tuple(self.engines))
        if not self.engines:
            raise ConfigError("door.engines: none, must be at least one")
        for engine in self.engines:
            if not isinstance(engine, EngineConfig):
                raise ConfigError(f"door.engines: {checks.shown(engine)}, must be an EngineConfig")
        if not isinstance(self.statistics, LengthStatistics):
            raise ConfigError(f"door.statistics: {checks.shown(self.statistics)}, must be LengthStatistics")
        checks.number("door.rate", self.rate, unit="calls/s", open_low=True)

    @classmethod
    def of(cls, spec: ClusterSpec, source: CallSource, rate: float | None = None) -> Door:
        """The door of a cluster; what will happen to its replicas is not part of it.

        Args:
            rate: calls per second; None: the source's own.
        """
        return cls(tuple(replica.engine for replica in spec.replicas), source.statistics, source.rate if rate is None else rate)

    @property
    def block_size(self) -> int:
        """Tokens of a KV block."""
        return self.engines[0].block_size


class Router(ABC):
    """A router for one cluster.

    Args:
        door: what is known beforehand; a router with options of its own takes them as further arguments.

    Attributes:
        name: as it stands in tables.
        notes: what a reader of a table must know; empty if nothing.
        rule: what decides, compiled; whole episodes run without Python (``llmsched_env.cluster.routing.run_cluster``). For a cluster of
            as many replicas as the door has.
    """

    name: ClassVar[str]
    notes: str = ""

    def __init__(self, door: Door) -> None:
        self.door = door

    @property
    def rule(self) -> RouterRule:
        """What decides, compiled."""
        return self._rule

    @rule.setter
    def rule(self, rule: RouterRule) -> None:
        rule.num_replicas = len(self.door.engines)
        self._rule = rule

    def reset(self, seed: int = 0) -> None:
        """Forget the last episode; ``seed`` is that of a router that draws."""
        self.rule.reset(seed)


class Chances(Record):
    """The record of a rule that does nothing but draw, and remember one replica."""

    memory: Counts  # (1,) the generator's state
    last: Annotated[int, Memory]


@compiled
def next_legal(cluster: Cluster, i: int) -> int:
    """Replica i, or the first after it, all round, that the call can go to."""
    while not may_take(cluster, i):
        i = i + 1 if i + 1 < cluster.num_replicas else 0
    return i


@compiled
def draw_legal(cluster: Cluster, own: Chances) -> int:
    """A replica that the call can go to, all alike where all of them can; its cost does not grow with their number unless most refuse."""
    i = 0
    for _ in range(TRIES):
        i = chance(own, 0, cluster.num_replicas)
        if may_take(cluster, i):
            return i
    return next_legal(cluster, i)
