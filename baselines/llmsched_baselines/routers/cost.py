"""Expected seconds until the call is done, with iteration times as measured."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from llmsched_baselines.routers.router import Door, Router
from llmsched_env import checks
from llmsched_env.cluster.routing import RouterRule, may_take
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Counts, Record, Vector

MICRO = 1_000_000
"""What is remembered is whole numbers: millionths of a second, and of a pace of 1."""
LOWEST_PACE, HIGHEST_PACE = 0.5, 8.0


class CostRecord(Record):
    pending: float
    uncached: float
    waiting: float
    running: float
    trust: float
    memory_seconds: float
    output: float  # tokens to expect
    block_size: float
    base: Vector  # (R,) seconds of an iteration, of which
    by_decode: Vector  # (R,) for each resident
    by_context: Vector  # (R,) for each token of its context
    by_prompt: Vector  # (R,) for each prompt token
    pace: Counts  # (R,) measured over modelled iteration seconds less 1, in millionths
    looked: Counts  # (R,) when that was, in microseconds


@compiled
def iteration(cluster: Cluster, own: CostRecord, i: int) -> float:
    """Seconds of a decode iteration of replica i's present batch by its calibration."""
    replicas = cluster.replicas
    return own.base[i] + own.by_decode[i] * replicas.running[i] + own.by_context[i] * replicas.kv_used[i] * own.block_size


@compiled
def pace_of(cluster: Cluster, own: CostRecord, i: int, modelled: float) -> float:
    """How many times longer than by its calibration replica i's iterations take.

    The lower envelope of measured over modelled seconds: an iteration that carries prefill takes longer than a decode alone, so that only
    a ratio that stays up tells that the replica is slow. The envelope follows down at once, and up with a time constant. Of a replica that
    runs nothing there is no measurement, and what was known of it fades.
    """
    now = int(cluster.clock * MICRO)
    weight = 1.0 - math.exp((own.looked[i] - now) / (MICRO * own.memory_seconds))
    own.looked[i] = now
    pace = 1.0 + own.pace[i] / MICRO
    measured = cluster.replicas.iteration_seconds[i]
    ratio = 1.0
    if measured > 0.0 and cluster.replicas.running[i] > 0:
        ratio = min(max(measured / modelled, LOWEST_PACE), HIGHEST_PACE)
    pace = ratio if ratio < pace else pace + weight * (ratio - pace)
    own.pace[i] = int((pace - 1.0) * MICRO)
    return pace


@compiled
def seconds_on(cluster: Cluster, own: CostRecord, i: int) -> float:
    """Seconds until the call would be done on replica i."""
    replicas, call = cluster.replicas, cluster.call
    modelled = iteration(cluster, own, i)
    pace = pace_of(cluster, own, i, modelled)
    output = float(call.predicted) if call.predicted > 0 else own.output
    prefill = own.pending * (replicas.waiting_tokens[i] + replicas.prefill_tokens[i]) + own.uncached * (call.prompt - replicas.cached[i])
    iterations = output + own.waiting * replicas.waiting[i] + own.running * replicas.running[i]
    return (prefill * own.by_prompt[i] + iterations * modelled) * pace**own.trust


@compiled
def least_cost(cluster: Cluster, own: CostRecord) -> int:
    best, least = -1, math.inf
    for i in range(cluster.num_replicas):
        cost = seconds_on(cluster, own, i)
        if may_take(cluster, i) and (best < 0 or cost < least):
            best, least = i, cost
    return best


class Cost(Router):
    """The replica on which the call is expected to be done first.

    Seconds = pace^trust x ((pending x prompt tokens pending there + uncached x tokens of the call not cached there) x seconds of a prompt token
    + (output to expect + waiting x calls that wait + running x residents) x seconds of an iteration of its present batch). Seconds of a token
    and of an iteration are those of the replica's calibration, as a linear function of the batch; the pace is what is measured over what is
    modelled, which tells a slow replica from a busy one.

    Args:
        pending, uncached: weights of tokens; an uncached one also holds up everybody who is resident there.
        waiting, running: iterations for each call.
        trust: exponent of the pace; 0: as if all replicas were as calibrated.
        memory_seconds: time constant with which the pace rises.
    """

    name: ClassVar[str] = "cost"

    def __init__(
        self,
        door: Door,
        pending: float = 1.0,
        uncached: float = 4.0,
        waiting: float = 8.0,
        running: float = 2.0,
        trust: float = 1.0,
        memory_seconds: float = 10.0,
    ) -> None:
        super().__init__(door)
        models, n = door.time_models(), len(door.engines)
        record = CostRecord(
            base=np.array([model.d0 for model in models]),
            by_decode=np.array([model.b for model in models]),
            by_context=np.array([model.w1 for model in models]),
            by_prompt=np.array([model.c for model in models]),
            pace=np.zeros(n, dtype=np.int64),
            looked=np.zeros(n, dtype=np.int64),
        )
        record.pending = checks.number("router.pending", pending, high=1e6)
        record.uncached = checks.number("router.uncached", uncached, high=1e6)
        record.waiting = checks.number("router.waiting", waiting, high=1e6)
        record.running = checks.number("router.running", running, high=1e6)
        record.trust = checks.number("router.trust", trust, high=16.0)
        record.memory_seconds = checks.number("router.memory_seconds", memory_seconds, high=1e6, unit="seconds", open_low=True)
        record.output, record.block_size = door.statistics.mean_output, float(door.block_size)
        self.rule = RouterRule(least_cost, record, reads_cache=True)
