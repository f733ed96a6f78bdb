"""A replica equals the single engine on what it was handed, to the last bit (hypothesis)."""

from __future__ import annotations

import math
import os

import numpy as np
import pytest
from cluster_policies import POLICIES, engine_of, replica_of
from cluster_walk import check_cluster, check_end, check_equal, drive, open_stream, programs
from hypothesis import given, settings
from hypothesis import strategies as hs

from llmsched_env.cluster.calls import CallChunk
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec


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


@settings(max_examples=int(os.environ.get("LLMSCHED_CLUSTER_EXAMPLES", "40")))
@given(hs.integers(0, 2**32), hs.booleans(), hs.booleans(), hs.booleans(), hs.booleans())
def test_one_replica_is_the_single_engine(seed: int, caching: bool, overlaps: bool, closed: bool, cut: bool) -> None:
    episode(seed, 1, POLICIES, caching, overlaps, closed, cut)


@settings(max_examples=int(os.environ.get("LLMSCHED_CLUSTER_EXAMPLES", "40")))
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
