"""What a cluster hands to its sinks: the same rows to all of them, and the same figures from rows and from sketches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsched_env.cluster.calls import CallChunk
from llmsched_env.cluster.metrics import Terms, summarize_calls
from llmsched_env.cluster.parquet import ParquetSink, read_calls
from llmsched_env.cluster.routing import RouterRule, first_legal, run_cluster
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.sinks import KeepAll, Several
from llmsched_env.cluster.sketches import SketchSink
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec
from llmsched_env.compiled import compiled


@compiled
def in_turn(cluster: Any, own: Any) -> int:
    own.memory[0] = (own.memory[0] + 1) % 2
    return own.memory[0]


@compiled
def first_that_takes_it(cluster: Any, own: Any) -> int:
    return first_legal(cluster)


def calls(number: int) -> Iterator[CallChunk]:
    rng, now = np.random.default_rng(0), 0.0
    for _ in range(4):
        arrival = now + np.cumsum(rng.exponential(0.1, number // 4))
        now = float(arrival[-1])
        yield CallChunk.single(arrival, rng.integers(1, 800, number // 4), rng.integers(1, 200, number // 4))


@pytest.mark.slow  # compiles a cluster
def test_every_sink_gets_every_call(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (extra: cluster)")
    pytest.importorskip("datasketches", reason="datasketches is not installed (extra: cluster)")
    kept, sketches, files = KeepAll(), SketchSink(Terms(2, warmup=3.0)), ParquetSink(tmp_path / "run", seed=0)
    with Several(kept, sketches, files) as sink:
        run_cluster(ClusterSim(ClusterSpec((ReplicaSpec(), ReplicaSpec()))), RouterRule(in_turn, memory=1), calls(800), (), sink)
    rows = kept.rows()
    assert rows["number"].tolist() == list(range(800))
    assert read_calls(tmp_path / "run").tobytes() == rows.tobytes()
    exact, found = summarize_calls(rows, replicas=2, warmup=3.0), sketches.summary()
    assert 700 < exact.completed == sum(exact.replica_requests) < 800
    for name, value in dataclasses.asdict(exact).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-12), name


@pytest.mark.slow  # compiles a cluster
@pytest.mark.parametrize(("events", "rerouted"), [((), 0), ((ReplicaEvent(0.2, 1, "fail"), ReplicaEvent(0.5, 1, "come_back")), 1)])
def test_a_call_with_two_parts_is_not_rerouted_unless_it_is_handed_over_again(events: tuple[ReplicaEvent, ...], rerouted: int) -> None:
    spec, kept = ClusterSpec((ReplicaSpec(role="prefill"), ReplicaSpec(role="decode")), events), KeepAll()
    assert spec.separated
    run_cluster(ClusterSim(spec), RouterRule(first_that_takes_it), iter([CallChunk.single([0.0, 1.0], [100, 100], [50, 50])]), (), kept)
    assert kept.rows()["routed"].tolist() == [2 + 2 * rerouted, 2]
    assert summarize_calls(kept.rows(), replicas=2, separated=True).rerouted == rerouted
