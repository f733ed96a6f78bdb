"""What routers, and the policies of replicas, cannot know: lengths of answers, calls to come, what will happen to replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from cluster_policies import engine_of
from cluster_walk import drive, open_stream, programs
from engine_walk import differing, shown

from llmsched_env.cluster.calls import CallChunk
from llmsched_env.cluster.routing import RouterRule, first_legal, outstanding
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime
from llmsched_env.records import Level
from llmsched_env.types import QueueLayout


@compiled
def reads_calls(cluster, own):  # type: ignore[no-untyped-def]
    return cluster.calls.output[0] % cluster.num_replicas


@compiled
def reads_row(cluster, own):  # type: ignore[no-untyped-def]
    return cluster.row * 0


@compiled
def reads_machines(cluster, own):  # type: ignore[no-untyped-def]
    return cluster.machines.handed[0] * 0


@compiled
def reads_timeline(cluster, own):  # type: ignore[no-untyped-def]
    return cluster.timeline.kind[0] * 0


@compiled
def reads_starts(cluster, own):  # type: ignore[no-untyped-def]
    return cluster.starts.program[0] * 0


@compiled
def reads_dues(cluster, own):  # type: ignore[no-untyped-def]
    return cluster.dues.item[0]


@compiled
def reads_pending(cluster, own):  # type: ignore[no-untyped-def]
    return cluster.pending.count * 0


@compiled
def reads_finished(cluster, own):  # type: ignore[no-untyped-def]
    return cluster.finished.output[0] * 0


@compiled
def reads_totals(cluster, own):  # type: ignore[no-untyped-def]
    return cluster.unreleased * 0


@compiled
def helper(cluster):  # type: ignore[no-untyped-def]
    return cluster.nodes.base[0]


@compiled
def reads_through_a_helper(cluster, own):  # type: ignore[no-untyped-def]
    return helper(cluster) * 0


@compiled
def writes(cluster, own):  # type: ignore[no-untyped-def]
    cluster.replicas.waiting[0] = 0
    return 0


@compiled
def least(cluster, own):  # type: ignore[no-untyped-def]
    best = first_legal(cluster)
    for i in range(best, cluster.num_replicas):
        if outstanding(cluster, i) < outstanding(cluster, best):
            best = i
    return best


HIDDEN = [
    reads_calls,
    reads_row,
    reads_machines,
    reads_timeline,
    reads_starts,
    reads_dues,
    reads_pending,
    reads_finished,
    reads_totals,
    reads_through_a_helper,
    writes,
]
ENGINE = EngineConfig.vllm(num_blocks=100, max_model_len=300, max_num_seqs=8, time_model=LinearTime(0.01, 1e-6))


@pytest.mark.parametrize("function", HIDDEN, ids=lambda f: f.__name__)
def test_a_router_that_reads_what_is_hidden_is_refused(function: Callable[..., Any]) -> None:
    sim, rule = ClusterSim(ClusterSpec.equal(2, ReplicaSpec(ENGINE), events=(ReplicaEvent(9.0, 0, "fail"),))), RouterRule(function)
    sim.reset([CallChunk.single([0.0], [5], [5])])
    assert sim.advance()
    before = sim.record._memory.tobytes()
    for attempt in (rule.choose, rule.play):
        with pytest.raises((ConfigError, AttributeError, ValueError) if numba.config.DISABLE_JIT else ConfigError):
            attempt(sim)
    assert sim.record._memory.tobytes() == before or function is writes
    sim.give(0)


def test_a_policy_of_a_replica_reads_no_more_than_any_policy() -> None:
    @compiled
    def reads_handed(engine, policy, decision):  # type: ignore[no-untyped-def]
        decision.run[0] = engine.handed.call[0]

    class Spy:
        name, known_lengths, notes, layout, engine = "spy", False, "", QueueLayout(), ENGINE
        rule = Rule(reads_handed, 1)

    sim = ClusterSim(ClusterSpec.equal(1, ReplicaSpec(policy=Spy())))  # type: ignore[arg-type]
    with pytest.raises((ConfigError, AttributeError)):
        drive(sim, [CallChunk.single([0.0], [5], [5])], lambda _: 0)


def sights(sim: ClusterSim, chunk: CallChunk, app: int, until: int) -> list[dict[str, bytes]]:
    """Every byte that a router, and the policies of the replicas, could read at each call before number ``until`` in order."""
    g = np.random.default_rng(0)
    seen: list[dict[str, bytes]] = []

    def choose(sim: ClusterSim) -> int:
        if len(seen) < until:
            found = shown(sim.record.at_level(Level.VISIBLE))
            for i, machine in enumerate(sim.machines):
                found |= {f"{i}.{name}": value for name, value in shown(machine.record.at_level(Level.VISIBLE)).items()}
            seen.append(found)
        return int(g.choice(np.flatnonzero(sim.legal())))

    drive(sim, [chunk], choose, [app])
    return seen


@pytest.mark.parametrize("seed", range(24))
def test_lengths_to_come_change_no_byte_that_is_shown(seed: int) -> None:
    g = np.random.default_rng(seed)
    caching, overlaps, closed = (bool(seed >> k & 1) for k in range(3))
    # The longest request is so long that no answer makes a replica refuse: what a request may ask for is known, with its ``max_tokens``.
    engine = engine_of(g, caching=caching, overlaps=overlaps).replace(max_model_len=600, num_blocks=160, max_num_batched_tokens=700)
    longest = 200
    chunk = programs(g, 25, 0.03, longest, 20) if closed else open_stream(g, 40, 0.02, longest)
    until = int(g.integers(2, 20))
    events = (ReplicaEvent(0.15, 0, "fail"), ReplicaEvent(0.3, 0, "come_back"), ReplicaEvent(0.5, 1, "drain"))
    spec = ClusterSpec.equal(2, ReplicaSpec(engine), events=events)
    sim = ClusterSim(spec)
    first = sights(sim, chunk, 20, until)
    at = float(np.frombuffer(first[-1]["clock"], dtype=np.float64)[0])
    run = drive(ClusterSim(spec), [chunk], _random_choice(), [20])
    ended = {int(row["number"]) for row in run.rows if row["completed"] <= at}
    with_others = chunk.output_tokens.copy()
    for number in range(len(chunk)):
        if number not in ended:
            with_others[number] = int(g.integers(with_others[number], 300))
    fields = {name: getattr(chunk, name) for name in CallChunk.__slots__}
    second = sights(ClusterSim(spec), CallChunk(**fields | {"output_tokens": with_others}), 20, len(first))
    assert (with_others != chunk.output_tokens).any()
    for one, other in zip(first, second, strict=True):
        assert not differing(one, other)


def _random_choice() -> Callable[[ClusterSim], int]:
    g = np.random.default_rng(0)
    return lambda sim: int(g.choice(np.flatnonzero(sim.legal())))


def test_the_test_above_sees_lengths_of_calls_that_have_ended() -> None:
    chunk = CallChunk.single([0.0, 5.0], [8, 8], [3, 3])
    other = CallChunk.single([0.0, 5.0], [8, 8], [9, 3])
    one, two = (sights(ClusterSim(ClusterSpec.equal(2, ReplicaSpec(ENGINE))), c, 0, 2)[1] for c in (chunk, other))
    assert differing(one, two)


def test_a_router_sees_no_time_at_which_something_will_happen() -> None:
    chunk = open_stream(np.random.default_rng(3), 40, 0.05, 100)
    last = float(chunk.start[-1])
    spec = ClusterSpec.equal(2, ReplicaSpec(ENGINE))
    events = (ReplicaEvent(last + 1.0, 0, "fail"), ReplicaEvent(last + 2.0, 1, "slow_down", 5.0))
    one, two = (sights(ClusterSim(s), chunk, 0, 40) for s in (spec, ClusterSpec.equal(2, ReplicaSpec(ENGINE), events=events)))
    assert [differing(a, b) for a, b in zip(one, two, strict=True)] == [[]] * 40


def test_a_router_that_reads_what_is_shown_runs() -> None:
    rule, sim = RouterRule(least), ClusterSim(ClusterSpec.equal(3, ReplicaSpec(ENGINE)))
    run = drive(sim, [open_stream(np.random.default_rng(2), 60, 0.01, 100)], rule.choose)
    assert set(run.rows["replica"].tolist()) == {0, 1, 2}
