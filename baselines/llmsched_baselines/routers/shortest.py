"""Routers that look at queues or memory and at nothing else: power of two choices, shortest queue, least KV."""

from __future__ import annotations

from typing import ClassVar

from llmsched_baselines.routers.blind import chances
from llmsched_baselines.routers.router import Chances, Door, Router, draw_legal
from llmsched_env.cluster.routing import RouterRule, chance, first_legal, may_take, outstanding
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Numbers


@compiled
def shortest_queue(cluster: Cluster) -> int:
    """The replica with the fewest calls that have not ended; of equal ones the first."""
    best = first_legal(cluster)
    least = outstanding(cluster, best)
    for i in range(best + 1, cluster.num_replicas):
        if may_take(cluster, i) and outstanding(cluster, i) < least:
            best, least = i, outstanding(cluster, i)
    return best


@compiled
def join_shortest(cluster: Cluster, own: Numbers) -> int:
    return shortest_queue(cluster)


@compiled
def power_of_two(cluster: Cluster, own: Chances) -> int:
    first = draw_legal(cluster, own)
    if cluster.num_replicas == 1:
        return first
    second = chance(own, 0, cluster.num_replicas - 1)
    if second >= first:
        second += 1
    if may_take(cluster, second) and outstanding(cluster, second) < outstanding(cluster, first):
        return second
    return first


@compiled
def least_kv(cluster: Cluster, own: Numbers) -> int:
    """Shares of the KV blocks that are in use; of equal ones the shorter queue, then the first."""
    replicas = cluster.replicas
    best = first_legal(cluster)
    for i in range(best + 1, cluster.num_replicas):
        if may_take(cluster, i):
            here, there = replicas.kv_used[i] * replicas.kv_capacity[best], replicas.kv_used[best] * replicas.kv_capacity[i]
            if here < there or (here == there and outstanding(cluster, i) < outstanding(cluster, best)):
                best = i
    return best


class PowerOfTwo(Router):
    """Of two different replicas drawn at random the one with fewer calls that have not ended.

    Mitzenmacher, "The power of two choices in randomized load balancing", IEEE TPDS 12(10), 2001; SGLang's router has it as
    ``power_of_two`` (``sgl-router/src/policies``, commit 08fc574). A replica that refuses leaves the other one. Looks at two replicas,
    however many there are.
    """

    name: ClassVar[str] = "power-of-two"

    def __init__(self, door: Door) -> None:
        super().__init__(door)
        self.rule = RouterRule(power_of_two, chances())


class JoinShortestQueue(Router):
    """The replica with the fewest calls that have not ended, waiting and running; of equal ones the first."""

    name: ClassVar[str] = "join-shortest-queue"

    def __init__(self, door: Door) -> None:
        super().__init__(door)
        self.rule = RouterRule(join_shortest)


class LeastKv(Router):
    """The replica with the least share of its KV blocks in use; of equal ones the shorter queue.

    Blocks that only hold a cached prefix are not in use, as in vLLM's own ``vllm:kv_cache_usage_perc``.
    """

    name: ClassVar[str] = "least-kv"

    def __init__(self, door: Door) -> None:
        super().__init__(door)
        self.rule = RouterRule(least_kv)
