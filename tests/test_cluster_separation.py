"""Prompts on some replicas and answers on others: KV is carried over, and what becomes of it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from cluster_walk import Kept, check_cluster, check_end, drive, open_stream

from llmsched_env.cluster import state as cs
from llmsched_env.cluster.calls import CallChunk
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec, Transfer
from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf import LinearTime

TAU0, TAU1 = 0.01, 1e-4
"""An iteration takes TAU0 seconds, and TAU1 for every token of KV that its batch attends to."""


def engine(**options: Any) -> EngineConfig:
    settings: dict[str, Any] = {
        "time_model": LinearTime(TAU0, TAU1),
        "block_size": 16,
        "num_blocks": 64,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "max_model_len": 512,
    }
    return EngineConfig.vllm(**settings | options)


AT_ONCE = Transfer()


def separated(
    prefill: EngineConfig, decode: EngineConfig, *events: ReplicaEvent, transfer: Transfer = AT_ONCE, decodes: int = 1
) -> ClusterSim:
    replicas = (ReplicaSpec(prefill, role="prefill"), *(ReplicaSpec(decode, role="decode") for _ in range(decodes)))
    return ClusterSim(ClusterSpec(replicas, events, transfer))


def first_legal(sim: ClusterSim) -> int:
    return int(np.flatnonzero(sim.legal())[0])


def seconds(kv: int) -> float:
    return TAU0 + TAU1 * kv


def test_one_call_by_hand() -> None:
    transfer = Transfer(0.25, 1e-3)
    sim = separated(engine(), engine(), transfer=transfer)
    kept = Kept()
    sim.reset([CallChunk.single([1.0], [100], [3])], sink=kept)
    assert sim.advance()
    record = sim.record
    assert (record.clock, record.call.part, sim.legal().tolist()) == (1.0, cs.PREFILLS, [True, False])
    sim.give(0)
    assert sim.advance()
    ready = 1.0 + seconds(100)
    assert (record.clock, record.call.part, record.call.home) == (ready + 0.25 + 1e-3 * 100, cs.DECODES, 0)
    assert record.call.age == record.clock - 1.0 and record.call.routed == 1 and sim.legal().tolist() == [False, True]
    assert record.in_system == 1 and record.replicas.kv_used[0] == 0, "the prefill replica keeps no KV"
    arrived = record.clock
    sim.give(1)
    assert not sim.advance()
    row = kept.rows[0]
    clock = arrived
    for token in range(3):  # the last token of the prompt is computed here, and gives the first of the answer
        clock += seconds(100 + token)
        if token == 0:
            assert row["first_token"] == clock
    assert row["completed"] == clock and row["admitted"] == 1.0 and (row["replica"], row["routed"], row["evictions"]) == (1, 2, 0)
    prefilling, decoding = (machine.record for machine in sim.machines)
    assert (prefilling.iterations, decoding.iterations) == (1, 3)
    assert decoding.kv_peak == 7 == -(-103 // 16), "the KV carried over takes blocks"
    assert record.replicas.ttft_seconds[0] == 0.0
    assert math.isclose(record.replicas.ttft_seconds[1], seconds(100)), "from when it was handed over"


def test_carried_kv_waits_for_blocks() -> None:
    sim = separated(engine(), engine(num_blocks=32))
    run = drive(sim, [CallChunk.single(np.zeros(4), [250] * 4, [5] * 4)], first_legal, watch=check_cluster)
    check_end(sim, run.rows, 4)
    decoding = sim.machines[1].record
    assert decoding.kv_peak == 32, "two prompts of 16 blocks at once"
    assert sorted(run.rows["first_token"] - run.rows["arrival"])[2] > sorted(run.rows["completed"])[1] - 1e-9


def test_preemption_computes_the_prompt_anew() -> None:
    decode = engine(num_blocks=34, max_model_len=512)
    sim = separated(engine(), decode)
    prefilled: list[float] = []

    def watch(sim: ClusterSim) -> None:
        check_cluster(sim)
        prefilled.append(float(sim.machines[1].record.batch.prefill_tokens))

    # The second grows out of the KV that the first leaves it, and goes back outside; small ones come so that somebody looks.
    arrival = np.concatenate([[0.0, 0.0], 0.3 + 0.05 * np.arange(200)])
    chunk = CallChunk.single(arrival, [250, 250] + [1] * 200, [60, 60] + [1] * 200)
    run = drive(sim, [chunk], first_legal, watch=watch)
    check_end(sim, run.rows, len(chunk))
    assert run.rows["evictions"][:2].sum() > 0 == run.rows["evictions"][2:].sum()
    assert max(prefilled) >= 250
    assert (run.rows["routed"] == 2).all(), "the prefill replica has no part in it"


def test_without_preemption_the_decode_replica_computes_one_token_of_each_prompt() -> None:
    g = np.random.default_rng(1)
    chunk = open_stream(g, 60, 0.02, 200)
    sim = separated(engine(), engine(num_blocks=2_000), decodes=2)
    computed = np.zeros(2)

    def watch(sim: ClusterSim) -> None:
        for i in (1, 2):
            batch = sim.machines[i].record.batch
            assert batch.prefill_tokens == batch.prefills
            computed[i - 1] += batch.prefills

    run = drive(sim, [chunk], lambda sim: int(g.choice(np.flatnonzero(sim.legal()))), watch=watch)
    check_end(sim, run.rows, len(chunk))
    assert computed.min() > 0 and not run.rows["evictions"].any()
    assert set(run.rows["replica"].tolist()) == {1, 2}


def test_a_decode_replica_that_fails_sends_its_calls_back_to_prefill() -> None:
    fail = ReplicaEvent(0.2, 1, "fail")
    back = ReplicaEvent(0.5, 1, "come_back")
    parts: list[int] = []

    def choose(sim: ClusterSim) -> int:
        parts.append(int(sim.record.call.part))
        return first_legal(sim)

    sim = separated(engine(), engine(), fail, back)
    run = drive(sim, [CallChunk.single([0.0], [100], [50])], choose)
    check_end(sim, run.rows, 1)
    assert parts == [cs.PREFILLS, cs.DECODES] * 2
    row = run.rows[0]
    assert row["routed"] == 4 and row["first_token"] < 0.2 and row["completed"] > 0.5
    assert sim.machines[0].record.iterations == 2, "the prompt was computed twice"


def test_a_hit_in_the_decode_replica_shares_blocks() -> None:
    cached = engine(enable_prefix_caching=True, num_blocks=64)
    sim = separated(cached, cached)
    both = CallChunk(
        **{name: getattr(CallChunk.single([0.0, 0.0], [160, 160], [20, 20]), name) for name in CallChunk.__slots__}
        | {"node": np.array([0, 1], np.int32), "node_parent": np.array([-2, -2], np.int32), "node_shared": np.array([160, 160], np.int32)}
    )
    run = drive(sim, [both], first_legal, [160], watch=check_cluster)
    check_end(sim, run.rows, 2)
    decoding = sim.machines[1].record
    assert decoding.pool.hit_tokens == 144, "whole blocks of all tokens but one"
    assert decoding.kv_peak == 9 + 2 * 3, "nine blocks in common; each has the last of its prompt and two of its answer"
