"""A replica equals the single engine on what it was handed, to the last bit (hypothesis)."""

from __future__ import annotations

import math
import os
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from cluster_walk import check_cluster, check_end, check_equal, drive, open_stream, programs
from hypothesis import given, settings
from hypothesis import strategies as hs

from llmsched_agents.adaptive import Adaptive
from llmsched_baselines import make_policy
from llmsched_baselines.policy import Setting
from llmsched_env.cluster.calls import CallChunk
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec, ReplicaSpec
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf import LinearTime
from llmsched_env.types import LengthStatistics, QueueLayout


@compiled
def in_crowds(engine, policy, decision):  # type: ignore[no-untyped-def]
    """Nobody moves until ``parameters[0]`` wait; then all do. With ``parameters[1]`` residents go on meanwhile."""
    policy.memory[0] += 1
    ready = engine.num_waiting >= policy.parameters[0] or policy.memory[0] % 7 == 0
    for q in range(engine.settings.num_queues):
        decision.run[q] = 1 if ready or policy.parameters[1] > 0 else 0
        decision.admit[q] = 1_000 if ready else 0
        decision.evict[q] = 0


class Crowds:
    """A policy that holds back, classes by prompt length."""

    name, known_lengths, notes = "crowds", False, ""

    def __init__(self, engine: EngineConfig, crowd: int, runs: int, edges: tuple[int, ...] = ()) -> None:
        self.engine = engine
        self.layout = QueueLayout(by="prompt", edges=edges) if edges else QueueLayout()
        self.rule = Rule(in_crowds, self.layout.num_queues, [crowd, runs], memory=1)

    def reset(self) -> None:
        self.rule.reset()

    def decide(self, view: Any) -> Any:
        return self.rule.decide(view)


def engine_of(g: np.random.Generator, *, caching: bool, overlaps: bool) -> EngineConfig:
    """Little KV, so that it runs out; every option that a cluster allows."""
    block = int(g.choice([4, 8, 16]))
    blocks = int(g.integers(8, 40))
    longest = min(blocks * block, int(g.integers(30, 200)))
    seqs = int(g.integers(2, 12))
    chunked = bool(g.random() < 0.7)
    budget = int(g.integers(max(seqs, 8), 160))
    return EngineConfig.vllm(
        time_model=LinearTime(0.01, 1e-6),
        block_size=block,
        num_blocks=blocks,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget if chunked else max(budget, longest),
        max_model_len=longest,
        enable_chunked_prefill=chunked,
        watermark=float(g.choice([0, 0, 0.05])),
        scheduler_reserve_full_isl=bool(g.random() < 0.3),
        prefill_schedule_interval=int(g.choice([1, 1, 3])),
        long_prefill_token_threshold=int(g.choice([0, 0, 12])),
        late_after=float(g.choice([0, 0, 0.2])),
        enable_prefix_caching=caching,
        async_scheduling=overlaps,
    )


@lru_cache
def statistics() -> LengthStatistics:
    g = np.random.default_rng(0)
    return LengthStatistics.of(g.integers(1, 60, 200), g.integers(1, 40, 200), np.ones(200))


POLICIES = ("none", "none", "crowds", "crowds-by-prompt", "adaptive")


def replica_of(g: np.random.Generator, engine: EngineConfig, name: str) -> ReplicaSpec:
    if name == "none":
        return ReplicaSpec(engine)
    if name.startswith("crowds"):
        edges = (8, 20) if name.endswith("prompt") else ()
        return ReplicaSpec(engine, Crowds(engine, int(g.integers(1, 6)), int(g.integers(0, 2)), edges))
    setting = Setting(statistics(), 20.0, engine)
    if name == "adaptive":
        return ReplicaSpec(policy=Adaptive(setting))
    return ReplicaSpec(policy=make_policy(name, setting, overload=True))


def episode(seed: int, replicas: int, policies: tuple[str, ...], caching: bool, overlaps: bool, closed: bool, cut: bool) -> tuple[int, ...]:
    """One cluster against its single engines. Returns how many were compared, preemptions, cached tokens and calls.

    Args:
        cut: a horizon, beyond which a call is still to come.
    """
    g = np.random.default_rng(seed)
    engines = [engine_of(g, caching=caching, overlaps=overlaps) for _ in range(replicas)]
    engines = [e.replace(block_size=engines[0].block_size, max_model_len=min(e.max_model_len, e.num_blocks * 4)) for e in engines]
    members = tuple(replica_of(g, engine, str(g.choice(policies))) for engine in engines)
    longest = min(member.engine.longest_request for member in members)
    gap = float(g.choice([0.004, 0.02, 0.2]))
    app = int(g.integers(1, longest // 4 + 2)) if caching else 0
    count = int(g.integers(5, 40))
    chunks = [programs(g, count, gap, longest, app) if closed else open_stream(g, count, gap, longest)]
    horizon = float(np.round(g.uniform(0.1, 40 * gap + 0.5), 2)) if cut else math.inf
    spec = ClusterSpec(members, horizon=horizon)
    if cut:
        last = max(horizon, float(chunks[0].start[-1])) + 1.0
        chunks.append(CallChunk.single([last], [1], [1]))
    sim = ClusterSim(spec)
    choices = np.random.default_rng(seed)
    run = drive(sim, chunks, lambda _: int(choices.integers(replicas)), [app] if app else [], watch=check_cluster)
    if not cut:
        check_end(sim, run.rows, sum(map(len, chunks)))
    compared = check_equal(run, chunks, more=cut, closed=closed)
    evictions = sum(m.record.forced_evictions for m in sim.machines)
    hits = sum(m.record.pool.hit_tokens for m in sim.machines) if caching else 0
    return compared, evictions, hits, len(run.rows)


@settings(max_examples=int(os.environ.get("LLMSCHED_CLUSTER_EXAMPLES", "60")))
@given(hs.integers(0, 2**32), hs.booleans(), hs.booleans(), hs.booleans(), hs.booleans())
def test_one_replica_is_the_single_engine(seed: int, caching: bool, overlaps: bool, closed: bool, cut: bool) -> None:
    episode(seed, 1, POLICIES, caching, overlaps, closed, cut)


@settings(max_examples=int(os.environ.get("LLMSCHED_CLUSTER_EXAMPLES", "60")))
@given(hs.integers(0, 2**32), hs.booleans(), hs.booleans(), hs.booleans(), hs.integers(2, 4))
def test_replicas_are_single_engines_on_what_they_were_handed(
    seed: int, caching: bool, overlaps: bool, closed: bool, replicas: int
) -> None:
    # An engine that knows that nobody is to come ends with its last completion; one of a cluster computes the superfluous token.
    episode(seed, replicas, POLICIES, caching, overlaps, closed, cut=overlaps)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sarathi", "vllm-v0", "wait-cp", "nested-wait", "reserve", "expected-work", "late-last", "operate"])
def test_with_the_shipped_policies(name: str) -> None:
    totals = np.zeros(4, dtype=np.int64)
    for seed in range(40):
        caching, overlaps, closed = (bool(seed >> k & 1) for k in range(3))
        totals += episode(seed, 1 + seed % 2, (name,), caching and name != "vllm-v0", overlaps, closed, overlaps or seed % 5 == 0)
    assert totals[0] > 30


def test_the_episodes_above_preempt_and_find_what_is_cached() -> None:
    totals = np.zeros(4, dtype=np.int64)
    for seed in range(30):
        totals += episode(seed, 1 + seed % 3, POLICIES, seed % 2 == 0, False, seed % 4 < 2, False)
    compared, evictions, hits, calls = totals.tolist()
    print(compared, evictions, hits, calls)
    assert compared > 40 and evictions > 50 and hits > 100 and calls > 500
