"""Routers on hand-made clusters where the right choice is known."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from llmsched_baselines.routers import Door, Router, make_router, router_names, router_options
from llmsched_env import ConfigError, EngineConfig, registry
from llmsched_env.cluster import state as cs
from llmsched_env.cluster.routing import run_cluster
from llmsched_env.cluster.scenarios import chat_sessions, gpu
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.sinks import KeepAll
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec

NAMES = router_names()


def table(count: int = 4, prompt: int = 1_000, **call: int) -> ClusterSim:
    """A cluster at rest with a call to be routed; what a router sees is then written by hand."""
    sim = ClusterSim(ClusterSpec.equal(count, ReplicaSpec(EngineConfig.vllm(enable_prefix_caching=True, num_blocks=1_000))))
    sim.reset([])
    sim.record.replicas.rows["legal"] = 1
    seen = sim.record.call
    seen.prompt, seen.home, seen.part = prompt, -1, cs.WHOLE
    for name, value in call.items():
        setattr(seen, name, value)
    return sim


def put(sim: ClusterSim, **columns: Sequence[float]) -> ClusterSim:
    for name, column in columns.items():
        sim.record.replicas.rows[name] = column
    return sim


def door(count: int = 4) -> Door:
    engine = EngineConfig.vllm(enable_prefix_caching=True, num_blocks=1_000)
    return Door((engine,) * count, chat_sessions().statistics, 10.0)


def router(name: str, count: int = 4, seed: int = 0, **options: Any) -> Router:
    made = make_router(name, door(count), **options)
    made.reset(seed)
    return made


def choices(name: str, sim: ClusterSim, calls: int = 40, seed: int = 0, **options: Any) -> list[int]:
    made = router(name, len(sim.machines), seed, **options)
    return [made.rule.choose(sim) for _ in range(calls)]


# --- each rule ------------------------------------------------------------------------------------------
def test_round_robin_begins_with_the_first_and_leaves_out_who_refuses() -> None:
    assert choices("round-robin", table(), 6) == [0, 1, 2, 3, 0, 1]
    assert choices("round-robin", put(table(), legal=[1, 0, 1, 0]), 5) == [0, 2, 0, 2, 0]


def test_random_goes_everywhere_about_equally_often() -> None:
    count = Counter(choices("random", table(), 4_000))
    assert set(count) == {0, 1, 2, 3}
    assert max(count.values()) < 1.15 * min(count.values())


def test_power_of_two_never_takes_the_longest_queue_and_each_other_one_as_often_as_it_should() -> None:
    count = Counter(choices("power-of-two", put(table(), waiting=[1, 0, 3, 2]), 6_000))
    assert 2 not in count  # two different ones are drawn, one of which is shorter
    assert [round(6 * count[i] / 6_000) for i in (1, 0, 3)] == [3, 2, 1]


def test_shortest_queue_counts_who_waits_and_who_runs() -> None:
    assert choices("join-shortest-queue", put(table(), waiting=[0, 3, 1, 0], running=[9, 2, 2, 8]), 1) == [2]
    assert choices("join-shortest-queue", put(table(), waiting=[1, 1, 1, 1]), 1) == [0]


def test_least_kv_compares_shares() -> None:
    sim = put(table(), kv_used=[500, 400, 300, 90], kv_capacity=[1_000, 1_000, 1_000, 100])
    assert choices("least-kv", sim, 1) == [2]
    assert choices("least-kv", put(sim, kv_used=[0, 0, 0, 0], running=[2, 1, 1, 3]), 1) == [1]


def test_sticky_stays_at_home_and_leaves_only_where_home_refuses() -> None:
    sim = put(table(home=1), waiting=[5, 50, 0, 7])
    assert choices("sticky", sim, 1) == [1]
    assert choices("sticky", put(sim, legal=[1, 0, 1, 1]), 1) == [2]
    assert choices("sticky", put(table(), waiting=[5, 50, 4, 7]), 1) == [2]


def test_prefix_affinity_leaves_the_cache_only_for_its_thresholds() -> None:
    sim = put(table(), cached=[0, 800, 320, 0], waiting=[2, 9, 4, 1])
    assert choices("prefix-affinity", sim, 1, excess=8.0) == [1]  # 9 is not more than 1 + 8
    assert choices("prefix-affinity", sim, 1, excess=7.9) == [3]
    assert choices("prefix-affinity", sim, 1, excess=7.0, factor=2.0) == [1]
    assert choices("prefix-affinity", sim, 1, excess=math.inf, share=0.8) == [1]
    assert choices("prefix-affinity", sim, 1, excess=math.inf, share=0.81) == [3]
    assert choices("prefix-affinity", put(sim, cached=[320, 320, 0, 320]), 1) == [3]  # equal ones by their queue


def test_sglang_goes_by_match_then_by_tree_and_by_queue_where_unbalanced() -> None:
    sim = put(table(), cached=[0, 501, 0, 0], waiting=[3, 35, 4, 10])
    assert choices("sglang", sim, 1) == [1]  # 35 - 3 is not more than 32
    assert choices("sglang", put(sim, waiting=[3, 36, 4, 10]), 1) == [0]
    assert choices("sglang", put(sim, waiting=[400, 436, 401, 410]), 1) == [1]  # by more than 32, but not by a tenth
    sim = put(table(), cached=[0, 500, 0, 0])
    assert choices("sglang", sim, 5) == [0, 1, 2, 3, 1]  # not more than half: the smallest tree; 1 has had 500 tokens less


def test_llm_d_adds_up_its_scores() -> None:
    sim = put(table(prompt=1_600), cached=[0, 1_584, 0, 0], waiting=[4, 4, 4, 4], kv_used=[500, 500, 500, 499])
    assert choices("llm-d", sim, 1) == [1]
    # Queue 2 x (4 - 4) / 4 = 0 against 2 x 1 and prefix 3 x 99 / 100 = 2.97 against 0: the cache wins by 0.97, unless KV decides.
    assert choices("llm-d", put(sim, waiting=[4, 4, 4, 0]), 1) == [1]
    assert choices("llm-d", put(sim, kv_used=[500, 1_000, 500, 499]), 1) == [3]
    assert choices("llm-d", sim, 1, prefix=0.0) == [3]
    assert set(choices("llm-d", table(), 60)) == {0, 1, 2, 3}  # equal ones are drawn


def test_dynamo_weighs_blocks_to_prefill_against_blocks_held() -> None:
    sim = put(table(prompt=1_600), cached=[0, 800, 0, 0], kv_used=[10, 50, 40, 0])
    # In blocks: 100 + 10 + 100, 50 + 50 + 100, 100 + 40 + 100, 100 + 0 + 100.
    assert set(choices("dynamo", sim, 60)) == {1, 3}
    assert choices("dynamo", sim, 1, overlap_weight=1.01) == [1]
    assert choices("dynamo", sim, 1, overlap_weight=0.99) == [3]
    assert choices("dynamo", put(sim, prefill_tokens=[0, 16, 0, 0]), 1) == [3]
    assert set(choices("dynamo", sim, 200, temperature=0.5)) == {0, 1, 2, 3}
    assert set(choices("dynamo", sim, 200, temperature=0.01)) == {1, 3}


def test_cost_tells_a_slow_replica_from_a_busy_one() -> None:
    sim = put(table(), running=[20, 20, 20, 20], kv_used=[600, 600, 600, 600])
    columns = sim.record.replicas.rows
    expected = columns["base_seconds"] + 20 * columns["running_seconds"] + 600 * 16 * columns["kv_seconds"]
    put(sim, iteration_seconds=list(expected * [3.0, 1.0, 3.0, 3.0]))
    made = router("cost")
    found = []
    for second in range(60):
        sim.record.clock = float(second)
        found.append(made.rule.choose(sim))
    assert found[-1] == 1
    blind = router("cost", trust=0.0)
    sim.record.clock = 1.0
    assert blind.rule.choose(sim) == 0  # all alike
    # An iteration that is longer because more run there is no slower.
    put(sim, running=[40, 40, 20, 40], iteration_seconds=[1.0, 1.0, float(expected[2]), 1.0])
    assert router("cost").rule.choose(sim) == 2


def test_cost_goes_to_the_cache_and_not_into_a_long_queue() -> None:
    sim = put(table(prompt=3_000), cached=[0, 2_000, 0, 0])
    assert choices("cost", sim, 1) == [1]
    assert choices("cost", put(sim, waiting=[0, 30, 0, 0], waiting_tokens=[0, 60_000, 0, 0]), 1) != [1]


# --- what holds for all of them -----------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_only_one_replica_that_can_be_chosen_is_chosen(name: str) -> None:
    for only in range(5):
        legal = [int(i == only) for i in range(5)]
        sim = put(table(5, home=(only + 1) % 5), legal=legal, cached=[16, 900, 32, 0, 800])
        put(sim, waiting=[0, 9, 1, 2, 40], running=[0, 1, 0, 3, 0])
        assert set(choices(name, sim, 12)) == {only}


@pytest.mark.parametrize("name", NAMES)
def test_one_replica(name: str) -> None:
    assert set(choices(name, table(1), 5)) == {0}


@pytest.mark.parametrize("name", NAMES)
def test_masks_on_random_tables_and_the_same_seed_gives_the_same_choices(name: str) -> None:
    rng = np.random.default_rng(1)
    tables = []
    for _ in range(60):
        legal = rng.integers(0, 2, 7)
        legal[rng.integers(7)] = 1
        numbers = {column: list(rng.integers(0, 50, 7)) for column in ("waiting", "running", "kv_used", "prefill_tokens")}
        tables.append(put(table(7, home=int(rng.integers(-1, 7))), legal=list(legal), cached=list(rng.integers(0, 62, 7) * 16), **numbers))
    runs = []
    for seed in (3, 3, 4):
        made = router(name, 7, seed)
        runs.append([made.rule.choose(sim) for sim in tables])
    assert all(sim.record.replicas.legal[i] == 1 for sim, i in zip(tables, runs[0], strict=True))
    assert runs[0] == runs[1]
    if name in ("random", "power-of-two"):
        assert runs[0] != runs[2]


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_episode_with_a_replica_that_fails_loses_nothing_and_repeats_itself(name: str) -> None:
    events = (
        ReplicaEvent(10.0, 0, "fail"),
        ReplicaEvent(20.0, 1, "drain"),
        ReplicaEvent(25.0, 0, "come_back"),
        ReplicaEvent(30.0, 1, "come_back"),
    )
    spec, source = ClusterSpec((gpu("rtx4090"),) * 2 + (gpu("a100-40GB"),), events), chat_sessions()
    rows = []
    for _ in range(2):
        made, sink = make_router(name, Door.of(spec, source, 8.0)), KeepAll()
        run_cluster(ClusterSim(spec), made.rule, source.chunks(5, rate=8.0, num_calls=300), source.app_tokens, sink, seed=5)
        rows.append(sink.rows())
    calls = sum(len(chunk) for chunk in source.chunks(5, rate=8.0, num_calls=300))
    assert len(rows[0]) == calls and np.isfinite(rows[0]["completed"]).all()
    assert rows[0].tobytes() == rows[1].tobytes()


def test_rules_that_look_at_two_replicas_read_two_rows() -> None:
    """The same functions as ordinary Python, on a table that counts."""
    program = """
from types import SimpleNamespace as Space
import numpy as np
from llmsched_baselines.routers.blind import at_random, chances, round_robin
from llmsched_baselines.routers.shortest import power_of_two
from llmsched_baselines.routers.sticky import sticky

class Column:
    def __init__(self, values): self.values, self.read = values, set()
    def __getitem__(self, i): self.read.add(i); return self.values[i]

R = 1000
for rule, most in ((power_of_two, 2), (at_random, 1), (round_robin, 1), (sticky, 1)):
    own = chances()
    for _ in range(50):
        columns = {name: Column(np.ones(R, int)) for name in ("legal", "waiting", "running")}
        rule(Space(replicas=Space(**columns), call=Space(part=0, home=7), num_replicas=R), own)
        assert len(set().union(*(column.read for column in columns.values()))) <= most, rule
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- errors ---------------------------------------------------------------------------------------------------
def test_unknown_names_and_options_are_told_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="router: 'round-robbin' is unknown; did you mean 'round-robin'"):
        make_router("round-robbin", door())
    with pytest.raises(ConfigError, match=r"router\.exces: not an option of 'prefix-affinity'.*excess"):
        make_router("prefix-affinity", door(), exces=3)
    with pytest.raises(ConfigError, match="door: 'x', must be a Door"):
        make_router("sticky", "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("prefix-affinity", "share", 1.1),
        ("prefix-affinity", "factor", 0.9),
        ("sglang", "balance_abs_threshold", 1.5),
        ("sglang", "cache_threshold", math.nan),
        ("llm-d", "queue", -1.0),
        ("dynamo", "temperature", -0.1),
        ("cost", "memory_seconds", 0.0),
        ("cost", "trust", "much"),
    ],
)
def test_options_out_of_range_are_refused(name: str, option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"router\.{option}: "):
        make_router(name, door(), **{option: value})


def test_a_door_is_checked() -> None:
    statistics = chat_sessions().statistics
    for wrong, field in (((), "engines"), (("x",), "engines")):
        with pytest.raises(ConfigError, match=rf"door\.{field}: "):
            Door(wrong, statistics, 1.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"door\.rate: "):
        Door((EngineConfig.vllm(),), statistics, 0.0)


def test_a_router_of_ones_own_has_a_name_once_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry.ROUTERS, "_here", dict(registry.ROUTERS._here))
    registry.register_router("mine", type(router("sticky")))
    assert make_router("mine", door()).name == "sticky"
    assert list(router_options("prefix-affinity")) == ["share", "excess", "factor"]
    with pytest.raises(ConfigError, match="must be a class or a function"):
        registry.register_router("other", 3)  # type: ignore[arg-type]
