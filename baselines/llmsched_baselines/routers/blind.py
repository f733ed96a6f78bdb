"""Routers that look at no queue: one after the other, or at random."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from llmsched_baselines.routers.router import Chances, Door, Router, draw_legal, next_legal
from llmsched_env.cluster.routing import RouterRule
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled


def chances() -> Chances:
    """A record with a generator of its own."""
    return Chances(memory=np.zeros(1, dtype=np.int64))


@compiled
def round_robin(cluster: Cluster, own: Chances) -> int:
    """``own.last`` is one more than the replica before, so that the first call of an episode goes to replica 0."""
    i = next_legal(cluster, own.last if own.last < cluster.num_replicas else 0)
    own.last = i + 1
    return i


@compiled
def at_random(cluster: Cluster, own: Chances) -> int:
    return draw_legal(cluster, own)


class RoundRobin(Router):
    """One replica after the other; one that refuses is left out.

    vLLM's production stack has it as ``roundrobin`` (``src/vllm_router/routers/routing_logic.py``, ``RoundRobinRouter``, commit 008a23b).
    """

    name: ClassVar[str] = "round-robin"

    def __init__(self, door: Door) -> None:
        super().__init__(door)
        self.rule = RouterRule(round_robin, chances())


class Random(Router):
    """Any replica, all alike."""

    name: ClassVar[str] = "random"

    def __init__(self, door: Door) -> None:
        super().__init__(door)
        self.rule = RouterRule(at_random, chances())
