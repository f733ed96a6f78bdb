"""The cluster's own tables: equal bytes for equal seeds, growth in mid-run, rows used again, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cluster_policies import POLICIES, engine_of, replica_of
from cluster_walk import Builder, Kept, drive, open_stream, programs

from llmsched_agents.learned_shrinkage import LearnedShrinkage
from llmsched_baselines import make_policy
from llmsched_baselines.policy import Policy, Setting
from llmsched_env.backend import View
from llmsched_env.cluster import machine as machine_module
from llmsched_env.cluster import simulator as simulator_module
from llmsched_env.cluster.calls import CallChunk, app_parent
from llmsched_env.cluster.routing import RouterRule, chance, may_take, run_cluster
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec, Transfer
from llmsched_env.compiled import compiled
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime
from llmsched_env.types import Decision, LengthStatistics


@compiled
def at_random(cluster, own):  # type: ignore[no-untyped-def]
    i = chance(own, 0, cluster.num_replicas)
    while not may_take(cluster, i):
        i = (i + 1) % cluster.num_replicas
    return i


def everything(seed: int) -> tuple[ClusterSim, list[CallChunk], list[int]]:
    """Several kinds of replicas, sessions in several chunks, and a timeline."""
    g = np.random.default_rng(seed)
    caching, overlaps = seed % 2 == 0, seed % 3 == 0
    base = engine_of(g, caching=caching, overlaps=overlaps)
    members = tuple(replica_of(g, base, name) for name in POLICIES[: 2 + seed % 4])
    if seed % 4 == 3:
        members = tuple(ReplicaSpec(m.engine, m.policy, "prefill" if i % 2 else "decode", 1.0 + i) for i, m in enumerate(members))
    longest = min(member.engine.longest_request for member in members)
    app = longest // 4
    chunks = [programs(g, 12, 0.05, longest, app) for _ in range(4)]
    shift = 0.0
    for k, chunk in enumerate(chunks):
        fields = {name: getattr(chunk, name) for name in CallChunk.__slots__}
        chunks[k] = CallChunk(**fields | {"start": chunk.start + shift})
        shift = float(chunks[k].start[-1])
    events = tuple(
        ReplicaEvent(float(t), int(i), kind, 3.0 if kind == "slow_down" else 1.0)  # type: ignore[arg-type]
        for t, i, kind in zip(
            (0.2, 0.4, 0.7, 1.1, 1.3), (0, 1, 0, 1, 0), ("slow_down", "fail", "drain", "come_back", "come_back"), strict=True
        )
    )
    return ClusterSim(ClusterSpec(members, events, Transfer(0.001, 1e-5))), chunks, [app]


def outcome(seed: int, *, compiled_loop: bool = True) -> tuple[bytes, ClusterSim]:
    """All that an episode leaves behind."""
    sim, chunks, apps = everything(seed)
    rule = RouterRule(at_random, memory=1)
    if compiled_loop:
        kept = Kept()
        run_cluster(sim, rule, chunks, apps, kept, seed)
        rows = kept.rows
    else:
        rule.reset(seed)
        rows = drive(sim, chunks, rule.choose, apps).rows
    totals = [sim.record.system_seconds, sim.record.met, sim.record.completed_tokens]
    totals += [(m.record.clock, m.record.kv_seconds, m.record.busy_seconds, m.record.iterations) for m in sim.machines]
    return rows.tobytes() + repr(totals).encode(), sim


def digest() -> str:
    return hashlib.sha256(b"".join(outcome(seed)[0] for seed in range(8))).hexdigest()


# --- equal bytes --------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_equal_seeds_equal_bytes_call_by_call_or_at_once(seed: int) -> None:
    first, sim = outcome(seed)
    assert first == outcome(seed)[0] == outcome(seed, compiled_loop=False)[0]
    assert first != outcome(seed + 100)[0]
    rule, kept = RouterRule(at_random, memory=1), Kept()
    _, chunks, apps = everything(seed)
    run_cluster(sim, rule, chunks, apps, kept, seed)  # the same object again
    assert first.startswith(kept.rows.tobytes())


def test_compiled_kernel_equals_plain_python() -> None:
    here = Path(__file__).resolve().parent
    paths = os.pathsep.join([str(here), str(here.parent), *sys.path])
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1", PYTHONPATH=paths)
    code = "import test_cluster_kernel as t; print(t.digest())"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=here.parent, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == digest()


# --- tables -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(8))
def test_tables_grow_in_mid_run(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    expected, _ = outcome(seed)
    monkeypatch.setattr(machine_module, "FIRST_ROWS", 1)
    monkeypatch.setattr(simulator_module, "FIRST_ROWS", 1)
    monkeypatch.setattr(simulator_module, "FINISHED_ROWS", 4)
    monkeypatch.setattr(simulator_module, "EVENTS_PER_CALL", 3)
    found, sim = outcome(seed)
    assert found == expected
    assert max(len(m.record.requests) for m in sim.machines) > 1 and len(sim.record.calls) > 1
    assert outcome(seed, compiled_loop=False)[0] == expected


def test_finished_calls_are_flushed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulator_module, "FINISHED_ROWS", 40)
    sim = ClusterSim(ClusterSpec.equal(2, ReplicaSpec(EngineConfig.vllm(max_num_seqs=4, num_blocks=400, max_model_len=400))))
    kept = Kept()
    run_cluster(sim, RouterRule(at_random, memory=1), [open_stream(np.random.default_rng(0), 500, 0.01, 100)], (), kept)
    assert len(kept.parts) > 10 and len(kept.rows) == 500 == len(np.unique(kept.rows["number"]))


def sizes(sim: ClusterSim) -> dict[str, int]:
    tables: dict[str, npt.NDArray[Any]] = sim._tables
    return {name: table.nbytes for name, table in tables.items()} | {f"replica {i}": m.nbytes for i, m in enumerate(sim.machines)}


def test_memory_does_not_grow_with_the_number_of_calls() -> None:
    engine = EngineConfig.vllm(
        time_model=LinearTime(0.002, 1e-7), max_num_seqs=16, num_blocks=400, max_model_len=400, enable_prefix_caching=True
    )

    def run(parts: int) -> dict[str, int]:
        sim = ClusterSim(ClusterSpec.equal(3, ReplicaSpec(engine)))

        def chunks() -> Any:
            shift = 0.0
            for k in range(parts):
                chunk = programs(np.random.default_rng(k % 5), 100, 0.05, 200)
                fields = {name: getattr(chunk, name) for name in CallChunk.__slots__}
                made = CallChunk(**fields | {"start": chunk.start + shift})
                shift = float(made.start[-1])
                yield made

        kept = Kept()
        run_cluster(sim, RouterRule(at_random, memory=1), chunks(), (), kept)
        assert len(kept.rows) > 100 * parts
        return sizes(sim)

    assert run(10) == run(100)


def test_a_head_longer_than_any_call_of_its_node_is_nobody_elses() -> None:
    made = Builder()
    p = made.program(0.0)
    short, other = made.node(p), made.node(p)
    long = made.node(p, short, 64)
    for k, (node, prompt) in enumerate(((short, 15), (other, 70), (long, 70), (long, 70))):
        made.call(p, node, prompt, 1, parent=k - 1)
    sim = ClusterSim(ClusterSpec.equal(1, ReplicaSpec(EngineConfig.vllm(num_blocks=200, max_model_len=100, enable_prefix_caching=True))))
    assert drive(sim, [made.chunk()], lambda _: 0).rows["cached"].tolist() == [0, 0, 0, 64]


# --- what is refused ------------------------------------------------------------------------------------
class NoRule(Policy):
    name = "no-rule"

    def decide(self, view: View) -> Decision:
        return Decision.greedy(1)


SETTING = Setting(LengthStatistics.of([8, 16], [4, 8], [1, 1]), 1.0, EngineConfig.vllm())
PREDICTED = Setting(LengthStatistics.of([8, 16], [4, 8], [1, 1], predicted=[5, 7]), 1.0, EngineConfig.vllm())


def refusals() -> dict[str, Any]:
    return {
        r"replica\.role: 'half', must be": lambda: ReplicaSpec(role="half"),  # type: ignore[arg-type]
        r"replica\.slowdown: 0\.0, must be": lambda: ReplicaSpec(slowdown=0.0),
        r"replica\.engine: str, must be an EngineConfig": lambda: ReplicaSpec("vllm"),  # type: ignore[arg-type]
        r"replica\.engine\.preset: 'paper', must be 'vllm'": lambda: ReplicaSpec(EngineConfig.paper(100, 0.1, 0.1)),
        r"replica\.engine\.scheduling_policy: 'priority', must be 'fcfs'": lambda: ReplicaSpec(
            EngineConfig.vllm(scheduling_policy="priority")
        ),
        r"replica\.engine\.eviction: 'lose_progress', must be 'recompute'": lambda: ReplicaSpec(
            EngineConfig.vllm(eviction="lose_progress")
        ),
        r"replica\.policy: 'no-rule' has no compiled rule": lambda: ReplicaSpec(policy=NoRule(SETTING)),
        r"replica\.policy: 'oracle-sjf' is told output lengths": lambda: ReplicaSpec(policy=make_policy("oracle-sjf", SETTING)),
        r"replica\.policy: 'predicted-work' has queues by 'predicted'": lambda: ReplicaSpec(
            policy=make_policy("predicted-work", PREDICTED)
        ),
        r"event\.time: -1": lambda: ReplicaEvent(-1.0, 0, "fail"),
        r"event\.kind: 'burn'": lambda: ReplicaEvent(0.0, 0, "burn"),  # type: ignore[arg-type]
        r"event\.value: 0\.0": lambda: ReplicaEvent(0.0, 0, "slow_down", 0.0),
        r"event\.replica: 2, must be below 2": lambda: ClusterSpec.equal(2, events=(ReplicaEvent(0.0, 2, "fail"),)),
        r"transfer\.latency: -1": lambda: Transfer(-1.0),
        r"transfer\.bytes_per_second: 0": lambda: Transfer.of_link(1.0, 0.0),
        r"replicas: 0, must be from 1": lambda: ClusterSpec(()),
        r"replicas: roles \['prefill'\], must be": lambda: ClusterSpec((ReplicaSpec(role="prefill"),)),
        r"replicas: block sizes \[8, 16\], must be the same": lambda: ClusterSpec(
            tuple(ReplicaSpec(EngineConfig.vllm(block_size=b)) for b in (8, 16))
        ),
        r"horizon: 0": lambda: ClusterSpec.equal(1, horizon=0.0),
    }


@pytest.mark.parametrize("match", list(refusals()))
def test_bad_settings_are_refused(match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        refusals()[match]()


def test_a_policy_that_walks_requests_by_number_is_refused() -> None:
    assert LearnedShrinkage.reads_arrivals and not make_policy("vllm", SETTING).reads_arrivals

    class Single(NoRule):
        reads_arrivals = True
        constant = Decision.greedy(1)

    with pytest.raises(ConfigError, match="reads requests by their number"):
        ReplicaSpec(policy=Single(SETTING))


def changed(**columns: Any) -> CallChunk:
    """Two programs, of two calls and of one, with some columns replaced."""
    made = Builder()
    a, b = made.program(0.0), made.program(1.0)
    first = made.node(a)
    made.call(a, first, 10, 2)
    made.call(a, first, 20, 2, parent=0)
    made.call(b, made.node(b), 5, 1)
    chunk = made.chunk()
    fields = {name: getattr(chunk, name) for name in CallChunk.__slots__}
    return CallChunk(**fields | {name: np.asarray(values, dtype=fields[name].dtype) for name, values in columns.items()})


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"start": [1.0, 0.0]}, r"calls\.start: 0\.0 in row 1, must be finite, >= 0 and in order"),
        ({"program": [0, 1, 0]}, r"calls\.program: 0 in row 2"),
        ({"program": [0, 0, 0]}, r"calls\.node: 1 in row 2, must be a node of the call's program"),
        ({"program": [0, 0, 0], "node_program": [0, 0]}, r"calls\.program: no call of program 1, must be at least one"),
        ({"parent": [-1, 0, 1]}, r"calls\.parent: 1 in row 2, must be a call of the same program"),
        ({"parent": [-1, 1, -1]}, r"calls\.parent: 1 in row 1, must be an earlier row, or -1"),
        ({"think": [0.0, -1.0, 0.0]}, r"calls\.think: -1\.0 in row 1"),
        ({"prompt_tokens": [0, 1, 1]}, r"calls\.prompt_tokens: 0 in row 0, must be >= 1"),
        ({"output_tokens": [1, 1, 0]}, r"calls\.output_tokens: 0 in row 2, must be >= 1"),
        ({"node": [0, 0, 2]}, r"calls\.node: 2 in row 2"),
        ({"node_program": [0, 2]}, r"calls\.node_program: 2 in row 1"),
        ({"node_parent": [-1, 0]}, r"calls\.node_parent: 0 in row 1, must be a node of the same program"),
        ({"node_parent": [-1, 1]}, r"calls\.node_parent: 1 in row 1, must be an earlier row"),
        ({"think": [0.0]}, r"calls\.think: shape \(1,\), must be \(3,\)"),
    ],
)
def test_bad_chunks_are_refused(columns: dict[str, Any], match: str) -> None:
    sim = ClusterSim(ClusterSpec.equal(1))
    sim.reset([changed(**columns)])
    with pytest.raises(ConfigError, match=match):
        sim.advance()


def test_chunks_out_of_order_and_heads_that_no_application_has_are_refused() -> None:
    sim = ClusterSim(ClusterSpec.equal(1))
    sim.reset([changed(), changed()])
    assert sim.advance()
    sim.give(0)
    with pytest.raises(ConfigError, match=r"calls\.start: 0\.0 in row 0, must be >= 1\.0"):
        while sim.advance():
            sim.give(0)
    for shared, parent, match in ((5, 1, "application 1 in row 0, must be one of 1"), (9, 0, "node_shared: 9 in row 0, must be <= 8")):
        sim.reset([changed(node_parent=[app_parent(parent), -1], node_shared=[shared, 0])], [8])
        with pytest.raises(ConfigError, match=match):
            sim.advance()


@compiled
def nobody(cluster, own):  # type: ignore[no-untyped-def]
    return 7


def test_a_choice_that_is_not_allowed_is_refused() -> None:
    events = (ReplicaEvent(0.0, 1, "drain"),)
    sim = ClusterSim(ClusterSpec.equal(2, events=events))
    sim.reset([changed()])
    assert sim.advance()
    for choice in (1, 2, -1, True, 0.0):
        with pytest.raises(ConfigError, match=r"must be one of \[0\] for this call"):
            sim.give(choice)  # type: ignore[arg-type]
    sim.give(0)
    with pytest.raises(RuntimeError, match="no call is to be routed"):
        sim.give(0)
    with pytest.raises(ConfigError, match=r"replica: 7, must be one of \[0\]"):
        run_cluster(sim, RouterRule(nobody), [changed()])
