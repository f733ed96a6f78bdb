"""NVIDIA Dynamo's cost in blocks."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from llmsched_baselines.routers.router import Door, Router
from llmsched_env import checks
from llmsched_env.cluster.routing import RouterRule, chance, first_legal, may_take
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Counts, Record, Vector

_STEPS = 2**30  # of a number from 0 to 1


class DynamoRecord(Record):
    overlap_weight: float
    temperature: float
    block_size: int
    cost: Vector  # (R,) scratch, blocks
    memory: Counts  # (1,) the generator's state


@compiled
def block_cost(cluster: Cluster, own: DynamoRecord, i: int) -> float:
    """Blocks to prefill on replica i, weighted, and blocks that would be held there, this call's included."""
    replicas, prompt = cluster.replicas, cluster.call.prompt
    prefill = replicas.waiting_tokens[i] + replicas.prefill_tokens[i] + prompt - replicas.cached[i]
    held = replicas.kv_used[i] + (replicas.waiting_tokens[i] + prompt) / own.block_size
    return float(own.overlap_weight * prefill / own.block_size + held)


@compiled
def cheapest(cluster: Cluster, own: DynamoRecord) -> int:
    """At temperature 0; each of equal ones is as likely."""
    best, least, equal = -1, math.inf, 0
    for i in range(cluster.num_replicas):
        if may_take(cluster, i):
            cost = block_cost(cluster, own, i)
            if cost < least:
                best, least, equal = i, cost, 1
            elif cost == least:
                equal += 1
                if chance(own, 0, equal) == 0:
                    best = i
    return best


@compiled
def dynamo(cluster: Cluster, own: DynamoRecord) -> int:
    if own.temperature == 0.0:
        return cheapest(cluster, own)
    first = first_legal(cluster)
    least, most = math.inf, -math.inf
    for i in range(first, cluster.num_replicas):
        if may_take(cluster, i):
            own.cost[i] = block_cost(cluster, own, i)
            least, most = min(least, own.cost[i]), max(most, own.cost[i])
    if most == least:
        return cheapest(cluster, own)
    total = 0.0
    for i in range(first, cluster.num_replicas):
        if may_take(cluster, i):
            own.cost[i] = math.exp((least - own.cost[i]) / (most - least) / own.temperature)
            total += own.cost[i]
    left = total * chance(own, 0, _STEPS) / _STEPS
    best = first
    for i in range(first, cluster.num_replicas):
        if may_take(cluster, i):
            best = i
            left -= own.cost[i]
            if left < 0.0:
                break
    return best


class Dynamo(Router):
    """The cost of NVIDIA Dynamo's KV router: ``overlap_weight`` x blocks to prefill + blocks held, the least of all.

    To prefill are the prompt tokens that are pending on the replica and those of the call that are not cached there; held are the blocks
    in use there, those of calls that wait, and those of the call. At a temperature T above 0 a replica is drawn with a probability
    proportional to exp(-cost / (largest - least cost) / T). (``lib/llm/src/kv_router/scheduler.rs``, ``DefaultWorkerSelector`` and
    ``softmax_sample``, commit db19bd2; defaults of weight and temperature, 1 and 0, from Dynamo's documentation of its router.)

    Dynamo counts the uncached part of what is pending, and a block that several calls share once; here the whole prompts of those who wait
    count. Of equal ones Dynamo takes the one with the smaller tree of cached blocks before it draws.

    Args:
        overlap_weight: of blocks to prefill.
        temperature: 0 for the least cost.
    """

    name: ClassVar[str] = "dynamo"

    def __init__(self, door: Door, overlap_weight: float = 1.0, temperature: float = 0.0) -> None:
        super().__init__(door)
        record = DynamoRecord(cost=np.zeros(len(door.engines)), memory=np.zeros(1, dtype=np.int64))
        record.overlap_weight = checks.number("router.overlap_weight", overlap_weight, high=1e6)
        record.temperature = checks.number("router.temperature", temperature, high=1e6)
        record.block_size = door.block_size
        self.rule = RouterRule(dynamo, record, reads_cache=True)
