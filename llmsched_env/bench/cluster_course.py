"""One episode of a cluster call by call: what every replica had, and where each call went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_baselines.routers import Door
from llmsched_env.bench.cluster_routers import build_router, router_named
from llmsched_env.cluster.scenarios import load_cluster_scenario
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ReplicaEvent
from llmsched_env.types import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Course:
    """N calls to R replicas, in the order in which they were routed.

    Attributes:
        scenario, router: names.
        clock: (N,) seconds.
        chosen: (N,) replica that got the call.
        kv_share: (N, R) KV in use when the call came, of each replica's own capacity.
        outstanding: (N, R) calls that each had.
        events: what happened to replicas.
    """

    scenario: str
    router: str
    clock: FloatArray
    chosen: IntArray
    kv_share: FloatArray
    outstanding: IntArray
    events: tuple[ReplicaEvent, ...]


def record_course(scenario: str, router: str, options: Mapping[str, Any], seed: int, *, num_calls: int | None = None) -> Course:
    """Run one episode and keep what the router saw.

    Args:
        seed: of calls and events, ``llmsched_env.bench.cluster.episode_seed``.
        num_calls: None: the scenario's.

    Raises:
        ConfigError: a name or an option that is refused.
    """
    chosen_scenario = load_cluster_scenario(scenario)
    count = chosen_scenario.num_calls if num_calls is None else num_calls
    spec, source = chosen_scenario.cluster(seed, num_calls=count), chosen_scenario.source
    rate = chosen_scenario.total_rate()
    rule = build_router(router, Door.of(spec, source, rate), options).rule
    sim = ClusterSim(spec)
    sim.reset(source.chunks(seed, rate=rate, num_calls=count), source.app_tokens)
    sim.record.shows_cached = rule.reads_cache
    rule.reset(seed)
    clock, went, share, calls = [], [], [], []
    while sim.advance():
        with router_named(router):
            replica = rule.choose(sim)
            sim.check_choice(replica)
        shown = sim.record.replicas.rows
        clock.append(sim.record.clock)
        went.append(replica)
        share.append(shown["kv_used"] / shown["kv_capacity"])
        calls.append(shown["waiting"] + shown["running"])
        sim.give(replica)
    return Course(scenario, router, np.array(clock), np.array(went, dtype=np.int32), np.array(share), np.array(calls), spec.events)
