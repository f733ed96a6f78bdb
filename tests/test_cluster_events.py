"""What happens to replicas, by hand: one event, and every figure that follows from it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from cluster_policies import Crowds
from cluster_walk import Builder, check_cluster, check_end, drive

from llmsched_env.cluster.calls import CallChunk
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec
from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf import LinearTime

SECOND = 1.0
"""An iteration takes a second, whatever is in it."""


def engine(**options: Any) -> EngineConfig:
    settings: dict[str, Any] = {"time_model": LinearTime(SECOND, 0.0), "num_blocks": 64, "max_num_seqs": 2, "max_model_len": 512}
    return EngineConfig.vllm(**settings | options)


def first_legal(sim: ClusterSim) -> int:
    return int(np.flatnonzero(sim.legal())[0])


def cluster(*events: ReplicaEvent, count: int = 2, replica: ReplicaSpec | None = None, **settings: Any) -> ClusterSim:
    return ClusterSim(ClusterSpec.equal(count, replica or ReplicaSpec(engine()), events=events, **settings))


def test_a_slow_replica_takes_so_many_times_as_long_from_its_next_iteration_on() -> None:
    replica = ReplicaSpec(engine(), slowdown=2.0)
    events = (ReplicaEvent(3.0, 0, "slow_down", 4.0), ReplicaEvent(20.0, 0, "slow_down", 1.0))
    run = drive(cluster(*events, count=1, replica=replica), [CallChunk.single([0.0], [10], [5])], first_legal)
    # Iterations begin at 0, 2 and, slower, 4, 12, 20: the last as before.
    assert run.rows["first_token"][0] == 2.0 and run.rows["completed"][0] == 2 + 2 + 8 + 8 + 2


def test_measured_iteration_times_are_those_of_iterations_alone() -> None:
    for overlaps in (False, True):
        seen: list[float] = []
        sim = cluster(count=1, replica=ReplicaSpec(engine(async_scheduling=overlaps)))
        chunk = CallChunk.single([0.0, 30.5, 31.0, 70.0, 71.0], [10] * 5, [4] * 5)
        drive(sim, [chunk], first_legal, watch=lambda sim, seen=seen: seen.append(float(sim.record.replicas.iteration_seconds[0])))
        assert set(seen) == {0.0, 1.0}, "idle steps and those that only begin a batch do not count"


def test_who_is_drained_ends_whom_it_has_admitted() -> None:
    sim = cluster(ReplicaEvent(2.5, 0, "drain"))
    run = drive(sim, [CallChunk.single(np.zeros(4), [10] * 4, [6] * 4)], lambda sim: 0 if sim.legal()[0] else 1, watch=check_cluster)
    check_end(sim, run.rows, 4)
    assert run.rows["replica"].tolist() == [0, 0, 1, 1] and run.rows["routed"].tolist() == [1, 1, 2, 2]
    assert run.rows["completed"].tolist() == [6.0, 6.0, 8.5, 8.5] and run.rows["arrival"].tolist() == [0.0] * 4
    assert sim.record.replicas.accepts.tolist() == [0, 0]  # the door of the other has closed
    assert math.isclose(sim.record.system_seconds, 6 + 6 + 8.5 + 8.5)


def test_who_fails_loses_all_it_has() -> None:
    replica = ReplicaSpec(engine(enable_prefix_caching=True))
    events = (ReplicaEvent(2.5, 0, "fail"), ReplicaEvent(4.0, 0, "come_back"))
    made = Builder()
    p = made.program(0.0)
    node = made.node(p)
    made.call(p, node, 40, 6)
    made.call(p, node, 60, 1, parent=0, think=1.0)
    made.call(p, node, 70, 1, parent=1, think=1.0)
    sim = cluster(*events, replica=replica)
    homes: list[int] = []

    def choose(sim: ClusterSim) -> int:
        homes.append(int(sim.record.call.home))
        return first_legal(sim)

    run = drive(sim, [made.chunk()], choose, watch=check_cluster)
    check_end(sim, run.rows, 3)
    first, second, third = run.rows
    assert (first["first_token"], first["completed"], first["routed"], first["replica"]) == (1.0, 8.5, 2, 1), "its first token was out"
    assert (second["arrival"], second["replica"], second["cached"]) == (9.5, 0, 0), "the cache is empty after a failure"
    assert (third["replica"], third["cached"]) == (0, 48), "and fills again"
    assert homes == [-1, 0, 1, 0]
    assert sim.machines[0].record.iterations == 2 + 1 + 1


def test_a_call_waits_for_a_replica_to_come_back_or_is_rejected() -> None:
    made = Builder()
    for start in (1.0, 2.0, 30.0):
        p = made.program(start)
        node = made.node(p)
        made.call(p, node, 10, 2)
        made.call(p, node, 20, 2, parent=len(made.calls) - 1)
    events = [ReplicaEvent(0.5, i, "fail") for i in range(2)] + [ReplicaEvent(5.0, 1, "come_back"), ReplicaEvent(20.0, 1, "fail")]
    sim = cluster(*events)
    run = drive(sim, [made.chunk()], first_legal, watch=check_cluster)
    check_end(sim, run.rows, 6)
    assert run.rows["number"].tolist() == [0, 1, 2, 3, 4], "the last turn never came"
    assert run.rows["admitted"][[0, 2]].tolist() == [5.0, 5.0]
    assert run.rows["rejected"].tolist() == [0, 0, 0, 0, 1] and run.rows["replica"][4] == -1 and run.rows["ends_program"][4] == 1
    assert (sim.record.rejected, sim.record.dropped) == (1, 1)


def test_a_drained_replica_holds_nobody_back() -> None:
    crowd = ReplicaSpec(policy=Crowds(engine(max_num_seqs=4), crowd=3, runs=0))  # type: ignore[arg-type]
    sim = cluster(ReplicaEvent(40.0, 0, "drain"), replica=crowd)
    chunk = CallChunk.single([0.0, 0.0, 0.0, 100.0], [10] * 4, [3] * 4)
    run = drive(sim, [chunk], lambda sim: 0 if sim.legal()[0] else 1, watch=check_cluster)
    check_end(sim, run.rows, 4)
    assert (run.rows["completed"][:3] < 60.0).all(), "it waits neither for the call at 100 s"
    assert sim.machines[0].record.drain_iterations > 0


def test_calls_that_wait_for_one_that_is_held_back_let_time_go_on() -> None:
    """The replica of the first session has waited since before the other's last call: its iterations begin after that, not before."""
    crowd = ReplicaSpec(policy=Crowds(engine(max_num_seqs=4), crowd=9, runs=0))  # type: ignore[arg-type]
    plain = ReplicaSpec(engine())
    made = Builder()
    for start in (0.0, 0.5):
        p = made.program(start)
        node = made.node(p)
        made.call(p, node, 10, 2)
        made.call(p, node, 20, 20, parent=len(made.calls) - 1, think=0.25)
    clocks: list[float] = []
    sim = ClusterSim(ClusterSpec((crowd, plain)))

    def choose(sim: ClusterSim) -> int:
        clocks.append(float(sim.record.clock))
        return int(sim.record.call.program) if sim.record.call.turn == 0 else 1

    run = drive(sim, [made.chunk()], choose, watch=check_cluster)
    check_end(sim, run.rows, 4)
    assert clocks == sorted(clocks)
    first, turn, _, other = run.rows
    assert first["admitted"] >= other["completed"]
    assert turn["arrival"] == first["completed"] + 0.25


@pytest.mark.parametrize("overlaps", [False, True])
def test_the_horizon_stops_everybody_at_once(overlaps: bool) -> None:
    sim = cluster(ReplicaEvent(9.0, 1, "fail"), horizon=4.5, replica=ReplicaSpec(engine(async_scheduling=overlaps)))
    run = drive(sim, [CallChunk.single([0.0, 0.0, 1.0, 8.0], [10] * 4, [2, 9, 1, 1])], lambda sim: int(sim.record.arrived) % 2)
    assert run.rows["number"].tolist() == [0, 2] and sim.record.in_system == 1 and sim.record.arrived == 3
    assert [m.record.clock for m in sim.machines] == [4.5, 4.5] and [m.record.end for m in sim.machines] == [3, 3]
    latencies = (run.rows["completed"] - run.rows["arrival"]).sum()
    assert sim.record.system_seconds == pytest.approx(latencies + 4.5, rel=1e-12)


def test_completions_come_before_events_and_events_before_calls() -> None:
    """All at 2 s: a call completes, its replica fails, and the next call, which follows from it, goes elsewhere."""
    made = Builder()
    p = made.program(0.0)
    node = made.node(p)
    made.call(p, node, 10, 2)
    made.call(p, node, 20, 1, parent=0)
    for start in (1.25, 1.75):  # while the last iteration runs
        p = made.program(start)
        made.call(p, made.node(p), 10, 1)
    sim = cluster(ReplicaEvent(2.0, 0, "fail"))
    seen: list[list[bool]] = []

    def choose(sim: ClusterSim) -> int:
        seen.append(sim.legal().tolist())
        return 0 if sim.record.clock < 1.0 else 1

    run = drive(sim, [made.chunk()], choose, watch=check_cluster)
    check_end(sim, run.rows, 4)
    assert seen == [[True, True]] * 3 + [[False, True]]
    assert run.rows["completed"].tolist() == [2.0, 3.25, 2.25, 3.25] and run.rows["routed"].tolist() == [1] * 4
