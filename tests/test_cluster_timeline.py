"""What happens to replicas: slow periods, drains, failures; no call is lost, whatever the order (hypothesis)."""

from __future__ import annotations

import math
import os

import numpy as np
from cluster_policies import POLICIES, engine_of, replica_of
from cluster_walk import check_cluster, check_end, drive, open_stream, programs, system_integral
from hypothesis import given, settings
from hypothesis import strategies as hs

from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec, Transfer

KINDS = ("slow_down", "drain", "fail", "come_back")


def timeline(g: np.random.Generator, replicas: int, until: float, count: int) -> tuple[ReplicaEvent, ...]:
    """Events in any order, some at one instant, some of all replicas at once, some long after the last call."""
    events = []
    for _ in range(count):
        time = float(np.round(g.uniform(0, until), 1 if g.random() < 0.5 else 4)) * (30.0 if g.random() < 0.05 else 1.0)
        kind = str(g.choice(KINDS))
        which = range(replicas) if g.random() < 0.2 else [int(g.integers(replicas))]
        values = [float(g.choice([0.3, 1.0, 4.0])) for _ in which]
        events += [ReplicaEvent(time, i, kind, v if kind == "slow_down" else 1.0) for i, v in zip(which, values, strict=True)]  # type: ignore[arg-type]
    return tuple(events)


def lossy(seed: int, caching: bool, overlaps: bool, closed: bool, separated: bool, policies: tuple[str, ...] = POLICIES) -> dict[str, int]:
    """One episode in which everything happens. Returns what has come about."""
    g = np.random.default_rng(seed)
    replicas = int(g.integers(2 if separated else 1, 5))
    base = engine_of(g, caching=caching, overlaps=overlaps).replace(oversize="reject")  # what is too long for all is lost, too
    engines = [base]
    for _ in range(replicas - 1):
        other = engine_of(g, caching=caching, overlaps=overlaps).replace(oversize="reject")
        longest = min(other.max_model_len, other.num_blocks * base.block_size)
        engines.append(other.replace(block_size=base.block_size, max_model_len=longest))
    members = [replica_of(g, engine, str(g.choice(policies))) for engine in engines]
    if separated:
        members = [ReplicaSpec(m.engine, m.policy, "prefill" if i % 2 == 0 else "decode", m.slowdown) for i, m in enumerate(members)]
    longest = max(member.engine.longest_request for member in members)
    gap = float(g.choice([0.004, 0.02, 0.2]))
    app = int(g.integers(1, longest // 4 + 2))
    count = int(g.integers(5, 40))
    chunk = programs(g, count, gap, longest, app) if closed else open_stream(g, count, gap, longest)
    events = timeline(g, replicas, count * gap + 0.5, int(g.integers(0, 12)))
    transfer = Transfer(float(g.choice([0.0, 0.01])), float(g.choice([0.0, 1e-4])))
    sim = ClusterSim(ClusterSpec(tuple(members), events, transfer))

    def choose(sim: ClusterSim) -> int:
        return int(g.choice(np.flatnonzero(sim.legal())))

    run = drive(sim, [chunk], choose, [app], watch=check_cluster)
    check_end(sim, run.rows, len(chunk))
    rows, record = run.rows, sim.record
    if not rows["rejected"].any():
        assert math.isclose(record.system_seconds, system_integral(rows), rel_tol=1e-9)
    assert record.arrived == len(rows) and record.completed_tokens == int(rows["output"][rows["rejected"] == 0].sum())
    ends = np.bincount(rows["program"], rows["ends_program"], minlength=len(chunk.start))
    assert set(ends) == {1.0}
    return {
        "calls": len(rows),
        "routed again": int((rows["routed"] > 1 + separated).sum()),
        "rejected": record.rejected,
        "dropped": record.dropped,
        "failed": sum(event.kind == "fail" for event in events),
    }


EXAMPLES = int(os.environ.get("LLMSCHED_CLUSTER_EXAMPLES", "50"))


@settings(max_examples=EXAMPLES)
@given(hs.integers(0, 2**32), hs.booleans(), hs.booleans(), hs.booleans(), hs.booleans())
def test_every_call_ends_once_whatever_happens(seed: int, caching: bool, overlaps: bool, closed: bool, separated: bool) -> None:
    lossy(seed, caching, overlaps, closed, separated)


def test_the_episodes_above_lose_replicas_and_reject_calls() -> None:
    totals: dict[str, int] = {}
    for seed in range(60):
        for name, value in lossy(seed, *(bool(seed >> k & 1) for k in range(4))).items():
            totals[name] = totals.get(name, 0) + value
    print(totals)
    assert totals["routed again"] > 100 and totals["rejected"] > 20 and totals["dropped"] > 5 and totals["failed"] > 50
