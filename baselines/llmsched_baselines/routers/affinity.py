"""To where most of the prompt is cached, unless too many are there already."""

from __future__ import annotations

import math
from typing import ClassVar

from llmsched_baselines.routers.router import Door, Router
from llmsched_env import checks
from llmsched_env.cluster.routing import RouterRule, first_legal, may_take, outstanding
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Record


class AffinityRecord(Record):
    share: float
    excess: float
    factor: float


@compiled
def prefix_affinity(cluster: Cluster, own: AffinityRecord) -> int:
    cached = cluster.replicas.cached
    best = first_legal(cluster)  # most cached, of equal ones the shortest queue
    shortest = best  # the shortest queue, of equal ones most cached
    for i in range(best + 1, cluster.num_replicas):
        if may_take(cluster, i):
            calls = outstanding(cluster, i)
            if cached[i] > cached[best] or (cached[i] == cached[best] and calls < outstanding(cluster, best)):
                best = i
            least = outstanding(cluster, shortest)
            if calls < least or (calls == least and cached[i] > cached[shortest]):
                shortest = i
    if cached[best] < own.share * cluster.call.prompt:
        return shortest
    if outstanding(cluster, best) > own.factor * outstanding(cluster, shortest) + own.excess:
        return shortest
    return best


class PrefixAffinity(Router):
    """The replica whose prefix cache holds most of the prompt, unless its queue is too long or what it holds too little; else the shortest.

    Operators' routers weigh the two in ways of their own; ``sglang``, ``llm-d`` and ``dynamo`` are three of them. Without a threshold
    (``excess`` infinite, ``share`` 0) it is the rule of vLLM's production stack, ``prefixaware``
    (``src/vllm_router/routers/routing_logic.py``, ``PrefixAwareRouter``, commit 008a23b), which goes to the longest match, drawing among
    equal ones. That router matches the texts it has sent, in pieces of 128 characters (``prefix/hashtrie.py``, commit 35e4ad3), and
    assumes that nothing leaves a cache; this one sees the caches themselves.

    Args:
        share: of the prompt that must be cached there, 0 to 1.
        excess: calls that it may have more than ``factor`` times the shortest queue.
        factor: at least 1.
    """

    name: ClassVar[str] = "prefix-affinity"

    def __init__(self, door: Door, share: float = 0.0, excess: float = 16.0, factor: float = 1.0) -> None:
        super().__init__(door)
        record = AffinityRecord()
        record.share = checks.number("router.share", share, high=1.0)
        record.excess = checks.number("router.excess", excess, high=math.inf, unit="calls")
        record.factor = checks.number("router.factor", factor, low=1.0, high=1e6)
        self.rule = RouterRule(prefix_affinity, record, reads_cache=True)
