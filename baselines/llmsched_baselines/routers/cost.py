"""Expected seconds until the call is done, and what it costs the others, at the pace that is measured."""

from __future__ import annotations

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
"""What is remembered is whole numbers: microseconds, and millionths."""
LOWEST_PACE, HIGHEST_PACE = 0.5, 8.0


class CostRecord(Record):
    pending: float
    uncached: float
    hinder: float
    waiting: float
    trust: float
    memory_seconds: float
    output: float  # tokens to expect
    pace: Counts  # (R,) measured over modelled iteration seconds less 1, in millionths
    looked: Counts  # (R,) when that was, in microseconds
    flow: Counts  # (R,) uncached prompt tokens that were sent there, in millionths of one per second


@compiled
def pace_of(cluster: Cluster, own: CostRecord, i: int, modelled: float) -> float:
    """How many times longer than by its calibration replica i's iterations take, remembered for ``memory_seconds``.

    An iteration takes longer than a decode of the residents because it carries prefill: as many prompt tokens a second as were sent there
    lately. What is measured beyond both is the pace. A replica that runs nothing measures nothing, and what was known of it fades.
    """
    replicas, now = cluster.replicas, int(cluster.clock * MICRO)
    weight = 1.0 - math.exp((own.looked[i] - now) / (MICRO * own.memory_seconds))
    own.looked[i] = now
    own.flow[i] = int(own.flow[i] * (1.0 - weight))
    measured, ratio = replicas.iteration_seconds[i], 1.0
    if measured > 0.0 and replicas.running[i] > 0:
        with_prefill = modelled + replicas.prefill_seconds[i] * own.flow[i] / MICRO * measured
        ratio = min(max(measured / with_prefill, LOWEST_PACE), HIGHEST_PACE)
    pace = 1.0 + own.pace[i] / MICRO
    pace += weight * (ratio - pace)
    own.pace[i] = int((pace - 1.0) * MICRO)
    return float(pace)


@compiled
def seconds_on(cluster: Cluster, own: CostRecord, i: int) -> float:
    """Seconds that the call costs on replica i, its own and those of others, weighted."""
    replicas, call = cluster.replicas, cluster.call
    modelled = expected_seconds(cluster, i)
    pace = pace_of(cluster, own, i, modelled)
    output = float(call.predicted) if call.predicted > 0 else own.output
    fresh = (call.prompt - replicas.cached[i]) * replicas.prefill_seconds[i]
    pending = (replicas.waiting_tokens[i] + replicas.prefill_tokens[i]) * replicas.prefill_seconds[i]
    others = replicas.waiting[i] + replicas.running[i]
    longer = replicas.running_seconds[i] + replicas.kv_seconds[i] * (call.prompt + 0.5 * output)
    seconds = own.pending * pending + own.uncached * fresh + (output + own.waiting * replicas.waiting[i]) * modelled
    return float((seconds + own.hinder * others * (fresh + output * longer)) * pace**own.trust)


@compiled
def least_cost(cluster: Cluster, own: CostRecord) -> int:
    best, least = -1, math.inf
    for i in range(cluster.num_replicas):
        cost = seconds_on(cluster, own, i)  # of all of them: the pace is to be followed
        if may_take(cluster, i) and (best < 0 or cost < least):
            best, least = i, cost
    own.flow[best] += int((cluster.call.prompt - cluster.replicas.cached[best]) * MICRO / own.memory_seconds)
    return best


class Cost(Router):
    """The replica where the call costs the fewest seconds, its own and those of the others there, at the pace that is measured.

    seconds = pace^trust x (pending x prefill of the prompt tokens that are pending there + uncached x prefill of what of the call is not
    cached there + (output to expect + waiting x calls that wait there) x an iteration of the present residents
    + hinder x calls there x (prefill of what is not cached + output to expect x by how much the call makes an iteration longer)).

    Seconds of prefill and of iterations are those of the replica's calibration, linear in the batch (``llmsched_env.cluster.speed``). The
    pace is what iterations take as measured over what they would take by the calibration, with as much prefill as was sent there lately: it
    tells a slow replica from a busy one, and every number in it is one that an operator has.

    Args:
        pending, uncached, waiting, hinder: weights, as above.
        trust: exponent of the pace; 0: as if all replicas were as calibrated.
        memory_seconds: time constant of the pace and of what was sent.

    Raises:
        ConfigError: an argument out of range.
    """

    name: ClassVar[str] = "cost"

    def __init__(
        self,
        door: Door,
        pending: float = 1.0,
        uncached: float = 4.0,
        waiting: float = 0.0,
        hinder: float = 0.5,
        trust: float = 1.0,
        memory_seconds: float = 10.0,
    ) -> None:
        super().__init__(door)
        n = len(door.engines)
        counts = {name: np.zeros(n, dtype=np.int64) for name in ("pace", "looked", "flow")}
        record = CostRecord(**counts)
        record.pending = checks.number("router.pending", pending, high=1e6)
        record.uncached = checks.number("router.uncached", uncached, high=1e6)
        record.waiting = checks.number("router.waiting", waiting, high=1e6)
        record.hinder = checks.number("router.hinder", hinder, high=1e6)
        record.trust = checks.number("router.trust", trust, high=16.0)
        record.memory_seconds = checks.number("router.memory_seconds", memory_seconds, high=1e6, unit="seconds", open_low=True)
        record.output = door.statistics.mean_output
        self.rule = RouterRule(least_cost, record, reads_cache=True)
