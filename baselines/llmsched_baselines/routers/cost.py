import math
from typing import ClassVar
import numpy as np
from llmsched_baselines.routers.router import Door, Router
from llmsched_env import checks
from llmsched_env.cluster.replicas import expected_seconds
from llmsched_env.cluster.routing import RouterRule, may_take
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Counts, Record

MICRO = 1_000_000
LOWEST_PACE, HIGHEST_PACE = 0.5, 8.0


class CostRecord(Record):
    pending: float
    uncached: float
    hinder: float
    waiting: float
    running: float
    trust: float
    memory_seconds: float
    output: float
    mode: int
    pace: Counts
    looked: Counts
    flow: Counts  # (R,) micro: tokens/s


@compiled
def pace_of(cluster: Cluster, own: CostRecord, i: int, modelled: float) -> float:
    now = int(cluster.clock * MICRO)
    weight = 1.0 - math.exp((own.looked[i] - now) / (MICRO * own.memory_seconds))
    own.looked[i] = now
    own.flow[i] = int(own.flow[i] * (1.0 - weight))
    pace = 1.0 + own.pace[i] / MICRO
    measured = cluster.replicas.iteration_seconds[i]
    ratio = 1.0
    if measured > 0.0 and cluster.replicas.running[i] > 0:
        if own.mode == 2:
            modelled += cluster.replicas.prefill_seconds[i] * own.flow[i] / MICRO * measured
        ratio = min(max(measured / modelled, LOWEST_PACE), HIGHEST_PACE)
    if own.mode == 0 and ratio < pace:
        pace = ratio
    else:
        pace = pace + weight * (ratio - pace)
    own.pace[i] = int((pace - 1.0) * MICRO)
    return pace


@compiled
def seconds_on(cluster: Cluster, own: CostRecord, i: int) -> float:
    replicas, call = cluster.replicas, cluster.call
    modelled = expected_seconds(cluster, i)
    pace = pace_of(cluster, own, i, modelled)
    output = float(call.predicted) if call.predicted > 0 else own.output
    fresh = call.prompt - replicas.cached[i]
    prefill = own.pending * (replicas.waiting_tokens[i] + replicas.prefill_tokens[i]) + (own.uncached + own.hinder * replicas.running[i]) * fresh
    iterations = output + own.waiting * replicas.waiting[i] + own.running * replicas.running[i]
    return (prefill * replicas.prefill_seconds[i] + iterations * modelled) * pace**own.trust


@compiled
def least_cost(cluster: Cluster, own: CostRecord) -> int:
    best, least = -1, math.inf
    for i in range(cluster.num_replicas):
        cost = seconds_on(cluster, own, i)
        if may_take(cluster, i) and (best < 0 or cost < least):
            best, least = i, cost
    weight_tokens = cluster.call.prompt - cluster.replicas.cached[best]
    own.flow[best] += int(weight_tokens * MICRO / own.memory_seconds)
    return best


class Cost(Router):
    name: ClassVar[str] = "cost"

    def __init__(self, door: Door, pending: float = 1.0, uncached: float = 4.0, hinder: float = 0.0, waiting: float = 8.0, running: float = 2.0,
        trust: float = 1.0, memory_seconds: float = 10.0, mode: int = 0) -> None:
        super().__init__(door)
        n = len(door.engines)
        record = CostRecord(pace=np.zeros(n, dtype=np.int64), looked=np.zeros(n, dtype=np.int64), flow=np.zeros(n, dtype=np.int64))
        for k, v in dict(pending=pending, uncached=uncached, hinder=hinder, waiting=waiting, running=running, trust=trust, memory_seconds=memory_seconds).items():
            setattr(record, k, float(v))
        record.output, record.mode = door.statistics.mean_output, mode
        self.rule = RouterRule(least_cost, record, reads_cache=True)
