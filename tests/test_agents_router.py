"""The learned router: its rule, its checkpoints and its training."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

pytest.importorskip("safetensors", reason="safetensors is not installed (extra: checkpoints)")

from llmsched_agents import lookup, router_episodes
from llmsched_agents.checkpoint import CONFIG, RECORD, WEIGHTS, shipped_agents
from llmsched_agents.router_agent import SHIPPED_ROUTER, RouterNetwork, load_router, read_router_record, save_router
from llmsched_agents.router_episodes import Episode, RouterTraining, objective
from llmsched_agents.router_rule import COST, INPUTS
from llmsched_agents.router_training import STATE, RouterTrainer
from llmsched_baselines.routers import Door, make_router
from llmsched_env import ConfigError, EngineConfig
from llmsched_env.cluster import state as cs
from llmsched_env.cluster.routing import run_cluster
from llmsched_env.cluster.scenarios import chat_sessions, load_cluster_scenario
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.sinks import KeepAll
from llmsched_env.cluster.spec import ClusterSpec, ReplicaSpec

COLUMNS = ("waiting", "running", "waiting_tokens", "prefill_tokens", "kv_used", "cached")
BLOCKS = 1_000


def network(seed: int = 0, hidden: int = 5) -> RouterNetwork:
    """Random, but of a size that makes choices differ."""
    start = RouterNetwork.start(hidden, seed)
    return RouterNetwork.from_vector(start.vector() + np.random.default_rng(seed).normal(0.0, 0.5, start.vector().size))


def door(count: int) -> Door:
    engine = EngineConfig.vllm(enable_prefix_caching=True, num_blocks=BLOCKS)
    return Door((engine,) * count, chat_sessions().statistics, 10.0)


def table(rng: np.random.Generator, count: int) -> ClusterSim:
    """A cluster at rest with a call to be routed and numbers that are drawn."""
    engine = EngineConfig.vllm(enable_prefix_caching=True, num_blocks=BLOCKS)
    sim = ClusterSim(ClusterSpec.equal(count, ReplicaSpec(engine)))
    sim.reset([])
    rows, seen = sim.record.replicas.rows, sim.record.call
    rows["legal"] = rng.integers(0, 2, count)
    rows["legal"][rng.integers(count)] = 1
    for name in COLUMNS:
        rows[name] = rng.integers(0, 60, count) * (16 if name == "cached" or name.endswith("tokens") else 1)
    rows["iteration_seconds"] = rng.uniform(0.0, 0.1, count)
    rows["ttft_seconds"] = rng.uniform(0.0, 2.0, count)
    seen.prompt, seen.home, seen.part, seen.turn = 1_000, int(rng.integers(-1, count)), cs.WHOLE, int(rng.integers(5))
    sim.record.clock = float(rng.uniform(1.0, 100.0))
    return sim


def scores(learned: RouterNetwork, sim: ClusterSim, output: float) -> npt.NDArray[np.float64]:
    """(R,) by the definition, written anew with numpy; infinite where the call cannot go. For the first call of an episode."""
    rows, call, size = sim.record.replicas.rows, sim.record.call, sim.record.block_size
    legal = rows["legal"] == 1
    c = np.exp(learned.cost)
    calls = rows["waiting"] + rows["running"]
    decoding = rows["base_seconds"] + rows["running_seconds"] * rows["running"] + rows["kv_seconds"] * rows["kv_used"] * size
    measured = rows["iteration_seconds"]
    known = (measured > 0) & (rows["running"] > 0)
    ratio = np.where(known, np.log(np.clip(measured / decoding, 0.5, 8.0)), 0.0)
    pace = (1.0 - math.exp(-sim.record.clock / c[6])) * ratio
    at_pace = np.exp(pace)
    fresh = call.prompt - rows["cached"]
    pending = (rows["waiting_tokens"] + rows["prefill_tokens"]) * rows["prefill_seconds"]
    longer = rows["running_seconds"] + rows["kv_seconds"] * (call.prompt + output / 2)
    cost = c[0] * pending + c[1] * fresh * rows["prefill_seconds"] + (c[2] * output + c[3] * rows["waiting"]) * decoding
    cost = cost + c[4] * calls * (fresh * rows["prefill_seconds"] + output * longer)
    log_cost = np.log(cost) + c[5] * pace
    tokens = size * rows["kv_used"] + rows["waiting_tokens"] + fresh + output
    same = np.ones(len(rows))
    columns = (
        np.log1p(4 * pending * at_pace),
        np.log1p(4 * fresh * rows["prefill_seconds"] * at_pace),
        np.log1p(calls / 8),
        pace,
        rows["kv_used"] / BLOCKS,
        np.minimum(tokens / (size * BLOCKS), 3.0),
        rows["cached"] / call.prompt,
        np.arange(len(rows)) == call.home,
        np.log1p(4 * rows["ttft_seconds"]),
        np.log(measured / 0.03),
        np.minimum(log_cost - log_cost[legal].min(), 4.0),
        log_cost - log_cost[legal].mean(),
        same * call.prompt / 4096,
        same * np.log1p(call.turn),
        same * np.log1p(calls[legal].mean() / 8),
        same * pace[legal].mean(),
        np.log(decoding / 0.03) + pace,
        np.zeros(len(rows)),  # nothing has been sent yet
    )
    inputs = np.stack(columns, axis=1)
    assert inputs.shape[1] == len(INPUTS)
    hidden = np.tanh(inputs @ learned.hidden_weight.T + learned.hidden_bias)
    return np.where(legal, log_cost + inputs @ learned.direct_weight + hidden @ learned.output_weight, np.inf)


# --- the rule -------------------------------------------------------------------------------------------------
def test_the_rule_is_its_definition() -> None:
    rng, chosen = np.random.default_rng(0), set()
    for k in range(60):
        count = int(rng.integers(1, 8))
        sim, learned, at = table(rng, count), network(k), door(count)
        expected = scores(learned, sim, at.statistics.mean_output)
        choice = learned.rule(at).choose(sim)
        assert expected[choice] <= expected.min() + 1e-4  # what is remembered of the pace is whole millionths
        assert sim.record.replicas.legal[choice] == 1
        chosen.add(choice)
    assert len(chosen) > 3


def test_the_order_of_the_replicas_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    for k in range(40):
        sim, learned = table(rng, 6), network(k)
        order = rng.permutation(6)
        first = learned.rule(door(6)).choose(sim)
        rows, call = sim.record.replicas.rows, sim.record.call
        rows[:] = rows[order].copy()
        call.home = int(np.flatnonzero(order == call.home)[0]) if call.home >= 0 else -1
        assert order[learned.rule(door(6)).choose(sim)] == first


def test_without_the_pace_measured_iterations_do_not_matter() -> None:
    rng = np.random.default_rng(2)
    differ = 0
    for k in range(20):
        sim, learned = table(rng, 5), network(k)
        seeing, blind = learned.rule(door(5)), learned.rule(door(5), sees_pace=False)
        before = blind.choose(sim), seeing.choose(sim)
        sim.record.replicas.rows["iteration_seconds"] = rng.permutation(sim.record.replicas.rows["iteration_seconds"])
        after = []
        for rule in (blind, seeing):
            rule.reset()
            after.append(rule.choose(sim))
        assert after[0] == before[0]
        differ += after[1] != before[1]
    assert differ


def episode(learned: RouterNetwork, scenario: str = "failing", calls: int = 150, seconds: float = 20.0) -> npt.NDArray[Any]:
    made = load_cluster_scenario(scenario)
    spec = made.make(4, 3, seconds)
    rate = made.total_rate()
    sink = KeepAll()
    rule = learned.rule(Door.of(spec, made.source, rate))
    run_cluster(ClusterSim(spec), rule, made.source.chunks(3, rate=rate, num_calls=calls), made.source.app_tokens, sink)
    return sink.rows()


def test_python_and_compiled_code_route_alike(tmp_path: Path) -> None:
    learned = network(4)
    save_router(tmp_path, learned, {})
    program = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_agents_router import episode, load_router
print(",".join(map(str, episode(load_router({str(tmp_path)!r}), calls=15)["replica"])))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ",".join(map(str, episode(learned, calls=15)["replica"]))


def test_an_episode_repeats_itself_and_loses_nothing() -> None:
    rows = episode(network(5))
    assert np.isfinite(rows["completed"]).all() and len(set(rows["replica"])) == 4
    assert rows.tobytes() == episode(network(5)).tobytes()


# --- checkpoints ----------------------------------------------------------------------------------------------
def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    learned = network(6)
    save_router(tmp_path / "r", learned, {"seed": 7})
    assert load_router(tmp_path / "r").vector().tobytes() == learned.vector().tobytes()
    assert json.loads((tmp_path / "r" / RECORD).read_text()) == {"seed": 7}
    made = make_router("learned-router", door(3), checkpoint=str(tmp_path / "r"))
    sim = table(np.random.default_rng(3), 3)
    assert made.rule.choose(sim) == learned.rule(door(3)).choose(sim)


def test_the_router_that_ships_has_a_name_and_a_record() -> None:
    assert "learned-router" in lookup.ROUTERS and "learned-router" not in shipped_agents()
    made = make_router("learned-router", door(2))
    assert made.name == "learned-router" and made.rule.reads_cache
    record = json.loads((SHIPPED_ROUTER / RECORD).read_text())
    assert {"training", "versions", "wall_seconds", "trials", "curve", "started_from"} <= set(record)
    assert read_router_record(SHIPPED_ROUTER) == record


def test_programs_that_run_routers_know_its_name() -> None:
    """Worker processes import ``llmsched_env.bench.cluster`` alone."""
    program = """
import llmsched_env.bench.cluster
from llmsched_baselines.routers import router_names, router_options
assert "learned-router" in router_names() and list(router_options("learned-router")) == ["checkpoint", "sees_pace"]
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint: .*is not one"):
        load_router(tmp_path)
    with pytest.raises(ConfigError, match=r"checkpoint: .*is not one"):
        make_router("learned-router", door(2), checkpoint=str(tmp_path))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "has format 2"),
        ({"environment": {"id": "LLMSched-v1", "package": "0.1.0"}}, "train it again"),
        ({"inputs": ["pending"]}, "inputs .*train it again"),
        ({"cost": None}, "cost .*train it again"),
        ({"hidden": 4}, "5 hidden units"),
        ({"hidden": "5"}, "hidden"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    save_router(tmp_path, network(), {})
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(ConfigError, match=f"checkpoint: .*{says}"):
        load_router(tmp_path)


def test_corrupt_files_are_refused(tmp_path: Path) -> None:
    save_router(tmp_path, network(), {})
    data = (tmp_path / WEIGHTS).read_bytes()
    for broken in (data[:-9], b"", b"\x00" * 64, data.replace(b"hidden_bias", b"hidden_bits")):
        (tmp_path / WEIGHTS).write_bytes(broken)
        with pytest.raises(ConfigError, match="checkpoint: "):
            load_router(tmp_path)
    nan = np.frombuffer(data[-8:])[0]
    (tmp_path / WEIGHTS).write_bytes(data.replace(np.float64(nan).tobytes(), np.float64(np.nan).tobytes()))
    with pytest.raises(ConfigError, match="must be finite"):
        load_router(tmp_path)
    (tmp_path / CONFIG).write_text("[]")
    with pytest.raises(ConfigError, match="checkpoint: "):
        load_router(tmp_path)


def test_a_network_of_another_shape_is_refused() -> None:
    learned = network()
    with pytest.raises(ConfigError, match=r"network\.cost"):
        dataclasses.replace(learned, cost=np.zeros(len(COST) + 1))
    with pytest.raises(ConfigError, match=r"network\.hidden_weight"):
        dataclasses.replace(learned, hidden_weight=np.full((5, len(INPUTS)), np.inf))


# --- training ---------------------------------------------------------------------------------------------------
SMALL = RouterTraining(
    scenarios=("drifting", "equal"),
    seconds=20.0,
    replicas=(2, 4),
    first_generations=3,
    generations=2,
    population=6,
    hidden=3,
    validate_every=1,
    validation=1,
)


def test_the_objective_is_zero_for_the_reference_and_counts_what_is_worse_twice() -> None:
    results = [("drifting", -0.2, -0.4), ("equal", 0.1, 0.2)]
    assert objective(SMALL, [("drifting", 0.0, 0.0), ("equal", 0.0, 0.0)]) == 0.0
    weight = SMALL.miss_weight
    expected = (-0.2 - 0.4 * weight + (1 + SMALL.worse_weight) * (0.1 + 0.2 * weight)) / 2
    assert objective(SMALL, results) == pytest.approx(expected)


def test_episodes_are_the_same_whenever_they_are_routed() -> None:
    one = Episode(SMALL, "drifting", 3, 0.9, 2)
    rule = make_router("prefix-affinity", one.door).rule
    assert one.figures(network().rule(one.door)) != one.reference
    assert one.figures(rule) == one.reference == Episode(SMALL, "drifting", 3, 0.9, 2).reference


def test_training_improves_a_bad_start_and_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("cmaes", reason="cmaes is not installed (extra: agents)")
    bad = RouterNetwork.start(3, 0)
    bad = dataclasses.replace(bad, direct_weight=np.where(np.array(INPUTS) == "above_mean", -1.2, 0.0))  # prefers what costs most
    training = dataclasses.replace(SMALL, sigma=0.5)
    whole = RouterTrainer(training, tmp_path / "whole", start=bad)
    best = whole.run()
    trials = dict(whole.progress.trials)
    assert min(trials.values()) < trials[0] - 0.05

    class StopError(Exception):
        pass

    def stop(line: str, done: int, total: int) -> None:
        if done in (2, 4):
            raise StopError

    part = tmp_path / "part"
    for _ in range(2):
        with pytest.raises(StopError):
            RouterTrainer(training, part, stop, bad).run()
        load_router(part)  # the best so far is there
    resumed = RouterTrainer(training, part, start=bad)
    assert len(resumed.progress.values) == 4
    assert resumed.run().vector().tobytes() == best.vector().tobytes()
    assert (part / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    with pytest.raises(ConfigError, match="is of another training"):
        RouterTrainer(dataclasses.replace(training, seed=1), part, start=bad)
    state = json.loads((part / STATE).read_text())
    for broken in ({**state, "values": 3}, {**state, "values": [[1.0]]}):
        (part / STATE).write_text(json.dumps(broken))
        with pytest.raises(ConfigError, match="training: "):
            RouterTrainer(training, part, start=bad)


@pytest.mark.parametrize(
    ("field", "value"),
    [("scenarios", ("no-such",)), ("scenarios", ()), ("replicas", (0,)), ("loads", (1.0, 0.5)), ("population", 3), ("sigma", 0.0)],
)
def test_a_training_is_checked(field: str, value: Sequence[Any]) -> None:
    with pytest.raises(ConfigError):
        dataclasses.replace(SMALL, **{field: value})


def test_episodes_use_no_seed_of_a_table() -> None:
    from llmsched_env.bench.cluster import episode_seed

    assert router_episodes.FIRST_VALIDATION_SEED >= 901 * router_episodes.SEEDS_OF_A_TRAINING
    assert min(episode_seed("evaluation", k) for k in range(200)) > 10**12
