"""The agent ``adaptive`` as a whole: what it may read, what it forgets, and engines of every kind."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from llmsched_agents.adaptive import MULTIPLES, Adaptive, AdaptiveAged, class_edges, groups_of, prompts
from llmsched_agents.adaptive_times import seconds_of
from llmsched_agents.lookup import named_policies
from llmsched_baselines import Setting, make_policy, policy_names
from llmsched_env.batch_runner import Run, run_batch
from llmsched_env.engine.simulator import PrefixCachingBackend, SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime
from llmsched_env.runner import EpisodeResult, run_episode
from llmsched_env.types import TILE_TOKENS, LengthStatistics, RequestLog, Workload
from llmsched_env.workload import load_scenario

ROOT = Path(__file__).resolve().parents[1]
CONV = load_scenario("azure-conv-40gb")
CODE = load_scenario("azure-code")
NOTHING = LengthStatistics.of([1.0], [1.0], [1.0])
SMALL = EngineConfig.vllm(num_blocks=600, max_model_len=4_096, time_model=LinearTime(0.01, 1e-6))


def agent(engine: EngineConfig = CONV.engine, **options: Any) -> Adaptive:
    return Adaptive(Setting(NOTHING, 1.0, engine), **options)


def drawn(seed: int = 0, n: int = 300, rate: float = 4.0, longest: int = 1_500) -> Workload:
    g = np.random.default_rng(seed)
    prompt = np.ceil(g.lognormal(5, 1, n)).clip(1, longest)
    output = np.ceil(g.lognormal(4, 1, n)).clip(1, longest)
    return Workload.of(np.cumsum(g.exponential(1 / rate, n)), prompt.astype(int), output.astype(int))


def assert_same_log(one: RequestLog, other: RequestLog) -> None:
    for field in dataclasses.fields(RequestLog):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a == b if a is None or field.name == "request_id" else a.tobytes() == b.tobytes(), field.name


def assert_complete(result: EpisodeResult, workload: Workload) -> None:
    assert result.counters.finished == len(workload)
    assert np.isfinite(result.log.completed).all()


def assert_sane(policy: Adaptive) -> None:
    """No number of the agent is lost."""
    record = policy.rule.policy
    assert np.isfinite(record.cost).all() and (record.cost > 0).all()
    for values in (record.lengths.survival, record.lengths.mean, record.times.found, record.peak.survival, record.arrivals):
        assert np.isfinite(values).all()
    assert record.flow.most > 0 and 0 <= record.choice < record.budgets.size


# --- what it is called and what it takes -----------------------------------------------------------------
def test_both_are_found_by_name() -> None:
    assert {"adaptive", "adaptive-aged"} <= set(policy_names())
    setting = Setting(CONV.statistics, CONV.rate, CONV.engine)
    for named, kind, tau0 in zip(
        named_policies("--policies", ("adaptive", "adaptive-aged")).values(), (Adaptive, AdaptiveAged), (math.inf, 30.0), strict=True
    ):
        policy = named.build(setting)
        assert type(policy) is kind and policy.name == named.name and policy.rule.policy.tau0 == tau0
    assert make_policy("adaptive-aged", setting, tau0=7.0, budget=256).rule.policy.budgets.tolist() == [256.0]


@pytest.mark.parametrize("kind", [Adaptive, AdaptiveAged])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tau0": -1.0}, "policy.tau0: -1"),
        ({"tau0": math.nan}, "policy.tau0: nan"),
        ({"level": 0.0}, "policy.level: 0"),
        ({"level": 2.5}, "policy.level: 2.5"),
        ({"level": math.inf}, "policy.level: inf"),
        ({"spare": -0.5}, "policy.spare: -0.5"),
        ({"spare": 65.0}, "policy.spare: 65"),
        ({"drain": 0.0}, "policy.drain: 0"),
        ({"drain": "soon"}, "policy.drain: 'soon'"),
        ({"budget": 127}, "policy.budget: 127"),
        ({"budget": 2_049}, "policy.budget: 2049"),
        ({"budget": 256.5}, "policy.budget: 256.5"),
    ],
)
def test_arguments_are_refused_by_name(kind: type[Adaptive], options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        kind(Setting(NOTHING, 1.0, SMALL), **options)


@pytest.mark.parametrize(
    "engine", [EngineConfig.paper(20_000, 0.02, 1e-6), SMALL.replace(enable_chunked_prefill=False, max_num_batched_tokens=4_096)]
)
def test_a_budget_is_refused_where_it_would_mean_nothing(engine: EngineConfig) -> None:
    with pytest.raises(ConfigError, match=r"policy.budget: 256, must be None"):
        agent(engine, budget=256)


def test_classes_are_geometric() -> None:
    edges = class_edges(SMALL)
    assert edges[0] == 16 and edges[-1] < 4_096 and len(edges) == 64
    assert {16, 32, 64, 128, 256, 512, 1_024, 2_048} <= set(edges)
    middles = prompts(edges)
    assert middles.shape == (65,) and (middles[1:-1] > edges[:-1]).all() and (middles[1:-1] < edges[1:]).all()
    groups = groups_of(edges)
    assert len(groups) == 65 and groups[0] == 0 and set(np.diff(groups)) == {0, 1}
    assert class_edges(EngineConfig.vllm(num_blocks=10, max_model_len=16)) == ()
    assert len(class_edges(EngineConfig.vllm(num_blocks=100_000, max_model_len=10**6))) == 96


# --- what it may read --------------------------------------------------------------------------------------
def decisions(policy: Adaptive, workload: Workload, limits: EpisodeLimits | None = None) -> tuple[list[bytes], RequestLog]:
    """Every decision of an episode, byte by byte, and the log."""
    backend = SimBackend()
    policy.reset()
    view = backend.reset(workload, policy.layout, policy.engine, limits or EpisodeLimits())
    made = []
    while not backend.done:
        decision = policy.decide(view)
        made.append(decision.rows.tobytes() + decision.token_budget.to_bytes(8))
        backend.step(decision)
    return made, backend.log()


@pytest.mark.parametrize("name", ["azure-conv-40gb", "two-type"])
def test_of_its_setting_it_reads_the_engine_alone(name: str) -> None:
    scenario = load_scenario(name)
    workload = scenario.generate(3, rate=1.2 * scenario.rate, num_requests=400)
    told = Adaptive(Setting(scenario.statistics, scenario.rate, scenario.engine, horizon_seconds=10.0))
    misled = Adaptive(Setting(CODE.statistics, 1_000.0, scenario.engine, horizon_seconds=1e6))
    mine, log = decisions(told, workload)
    other, other_log = decisions(misled, workload)
    assert mine == other
    assert_same_log(log, other_log)
    assert_same_log(log, run_episode(misled, workload).log)  # whole episodes, without Python between iterations


def test_nor_the_time_model_that_it_is_told() -> None:
    """Built for an engine that is ten times as slow, run on the true one."""
    workload = CONV.generate(3, rate=1.2 * CONV.rate, num_requests=400)
    misled = agent(CONV.engine.replace(time_model=LinearTime(1.0, 1e-3)))
    misled.engine = CONV.engine
    mine, log = decisions(agent(), workload)
    other, other_log = decisions(misled, workload)
    assert mine == other
    assert_same_log(log, other_log)


def test_what_is_hidden_changes_nothing_before_it_shows() -> None:
    """Outputs of those still resident, and requests still to come."""
    workload = drawn(n=200)
    half = float(workload.arrival[100])
    result, _ = decisions(agent(), workload, EpisodeLimits(horizon=half))
    late = workload.arrival > half
    output = np.where(late, 1, workload.output_tokens)
    known = np.asarray(run_episode(agent(), workload, limits=EpisodeLimits(horizon=half)).log.completed)
    output = np.where(np.isnan(known), np.minimum(output + 500, 2_000), output)
    other, _ = decisions(agent(), Workload.of(workload.arrival, workload.prompt_tokens, output), EpisodeLimits(horizon=half))
    assert result == other


# --- memory --------------------------------------------------------------------------------------------
def test_the_same_twice_is_the_same() -> None:
    workload = CONV.generate(1, num_requests=300)
    assert_same_log(run_episode(agent(), workload).log, run_episode(agent(), workload).log)


@pytest.mark.parametrize("engine", [CONV.engine, EngineConfig.paper(20_000, 0.02, 1e-6)])
def test_an_episode_leaves_nothing_behind(engine: EngineConfig) -> None:
    first, second = CODE.generate(0, rate=8.0, num_requests=500), drawn(4)
    policy = agent(engine)
    for workload in (first, second, first):
        made, log = decisions(policy, workload)
        fresh, fresh_log = decisions(agent(engine), workload)
        assert made == fresh
        assert_same_log(log, fresh_log)


def test_a_broken_off_episode_leaves_nothing_behind() -> None:
    policy = agent()
    for seconds in (1.0, 20.0, 60.0):
        run_episode(policy, CODE.generate(0, rate=8.0, num_requests=500), limits=EpisodeLimits(horizon=seconds, drain=False))
        assert_same_log(run_episode(policy, drawn(4)).log, run_episode(agent(), drawn(4)).log)


def test_pickled_it_is_the_same() -> None:
    used = agent()
    run_episode(used, drawn(2))
    for policy in (agent(), used):
        copied = pickle.loads(pickle.dumps(policy))
        assert decisions(copied, drawn(3))[0] == decisions(agent(), drawn(3))[0]
        assert copied.rule.policy.cost is not policy.rule.policy.cost


def completed_elsewhere(policy: Adaptive) -> bytes:
    return run_episode(policy, drawn(3)).log.completed.tobytes()


def test_a_worker_process_decides_the_same() -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(completed_elsewhere, (agent(),)) == completed_elsewhere(agent())


def test_many_at_once_are_one_by_one() -> None:
    runs = [Run(agent(), drawn(seed)) for seed in range(6)]
    for run, result in zip(runs, run_batch(runs), strict=True):
        assert_same_log(result.log, run_episode(agent(), run.workload).log)


# --- engines ---------------------------------------------------------------------------------------------
ENGINES = {
    "own": CONV.engine,
    "paper": EngineConfig.paper(20_000, 0.02, 1e-6),
    "whole prompts": SMALL.replace(enable_chunked_prefill=False, max_num_batched_tokens=4_096),
    "padded": SMALL.replace(padded_prefill=True, max_num_batched_tokens=4_096),
    "cached": SMALL.replace(enable_prefix_caching=True),
    "asynchronous": SMALL.replace(async_scheduling=True),
    "long prompts in parts": SMALL.replace(long_prefill_token_threshold=100),
    "prefill now and then": SMALL.replace(prefill_schedule_interval=4),
    "few active": SMALL.replace(max_num_active_seqs=5),
    "one seat": SMALL.replace(max_num_seqs=1),
    "one seat, one token": SMALL.replace(max_num_seqs=1, max_num_batched_tokens=1, num_blocks=256),
    "few tokens": SMALL.replace(max_num_seqs=16, max_num_batched_tokens=60),
    "large batches": SMALL.replace(max_num_batched_tokens=16_384, num_blocks=8_000),
    "32k": SMALL.replace(max_model_len=32_768, num_blocks=4_096),
    "a million": SMALL.replace(max_model_len=1_000_000, num_blocks=70_000),
    "one request's memory": SMALL.replace(num_blocks=256, max_model_len=4_096),
    "blocks of one": SMALL.replace(block_size=1, num_blocks=6_000),
}


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_serves_everybody(name: str) -> None:
    engine = ENGINES[name]
    workload = drawn(6, n=60 if "one" in name else 250)
    policy = agent(engine)
    result = run_episode(policy, workload)
    assert_complete(result, workload)
    assert_sane(policy)
    assert result.counters.drain_iterations == 0
    assert_complete(run_episode(agent(engine, tau0=0.0), workload), workload)


@pytest.mark.parametrize("longest", [2, 3, 8, 16, 17, 18, 40])
def test_a_tiny_max_model_len(longest: int) -> None:
    g = np.random.default_rng(longest)
    prompt = g.integers(1, longest, 200)
    workload = Workload.of(np.cumsum(g.exponential(0.1, 200)), prompt, (g.random(200) * (longest - prompt)).astype(int) + 1)
    policy = agent(EngineConfig.vllm(num_blocks=30, max_model_len=longest, time_model=LinearTime(0.01, 1e-6)))
    assert_complete(run_episode(policy, workload), workload)
    assert_sane(policy)


def test_without_chunked_prefill_the_budget_is_the_engines() -> None:
    for engine in (ENGINES["paper"], ENGINES["whole prompts"], ENGINES["padded"]):
        policy = agent(engine)
        seen = set()
        run_episode(policy, drawn(6), on_step=lambda report, view, p=policy, s=seen: s.add(p.rule.decision.token_budget))  # type: ignore[misc]
        assert seen == {0}


def test_budgets_are_multiples_of_the_tile_and_a_given_one_is_kept() -> None:
    seen: set[int] = set()
    policy = agent(SMALL)
    run_episode(policy, drawn(6, rate=8.0), on_step=lambda report, view: seen.add(policy.rule.decision.token_budget))
    assert seen <= {k * TILE_TOKENS for k in MULTIPLES} and len(seen) > 1 and max(seen) <= 2_048
    fixed = agent(SMALL, budget=300)
    most = 0

    def note(report: Any, view: Any) -> None:
        nonlocal most
        assert fixed.rule.decision.token_budget == 300
        most = max(most, int(view.record.batch.decodes + view.record.batch.prefill_tokens))

    run_episode(fixed, drawn(6, rate=8.0), on_step=note)
    assert most == 300


def test_under_asynchronous_scheduling_seconds_go_with_the_batch_before() -> None:
    """The times are those that synchronous scheduling teaches; with the batch seen in place of the one before, large ones are not."""
    conversations = load_scenario("azure-conv")
    workload = conversations.generate(0, rate=3.0, num_requests=400)
    learned = []
    for engine in (conversations.engine, conversations.engine.replace(async_scheduling=True)):
        policy = agent(engine)
        run_episode(policy, workload)
        times = policy.rule.policy.times
        learned.append([seconds_of(times, n, 1_000.0, prefill, 450.0) for n, prefill in ((2.0, 0.0), (20.0, 0.0), (8.0, 1_000.0))])
    assert learned[1] == pytest.approx(learned[0], rel=0.02)


def test_prefix_caching_on_a_backend_of_its_own() -> None:
    workload = drawn(6)
    result = run_episode(agent(SMALL), workload, backend=PrefixCachingBackend())
    assert_complete(result, workload)


def test_nobody_comes() -> None:
    for engine in ENGINES.values():
        policy = agent(engine)
        result = run_episode(policy, Workload.of([], [], []))
        assert result.counters.finished == 0


@pytest.mark.parametrize("engine", ["own", "paper", "asynchronous", "one seat"])
def test_one_comes(engine: str) -> None:
    for arrival, prompt, output in ((0.0, 1, 1), (1e5, 1_000, 1_000), (0.0, 4_000, 90)):
        workload = Workload.of([arrival], [prompt], [output])
        policy = agent(ENGINES[engine])
        assert_complete(run_episode(policy, workload), workload)
        assert_sane(policy)


def test_a_long_silence_forgets_the_rate() -> None:
    workload = Workload.of([*np.arange(300) / 4.0, 1e6, 1e6 + 1], np.full(302, 100), np.full(302, 100))
    policy = agent()
    assert_complete(run_episode(policy, workload), workload)
    assert_sane(policy)


@pytest.mark.parametrize("engine", ["own", "paper", "asynchronous"])
def test_two_thousand_come_at_once(engine: str) -> None:
    crowd = drawn(8, n=2_000)
    workload = Workload.of(np.zeros(2_000), crowd.prompt_tokens, crowd.output_tokens)
    policy = agent(ENGINES[engine])
    result = run_episode(policy, workload)
    assert_complete(result, workload)
    assert_sane(policy)
    fcfs = run_episode(make_policy("fcfs", Setting(NOTHING, 1.0, ENGINES[engine])), workload)
    assert np.mean(result.log.completed) < np.mean(fcfs.log.completed)


@pytest.mark.parametrize(("blocks", "largest"), [(2_816, 16_384), (1_000, 2_048)])
def test_a_budget_that_memory_never_fills_is_not_tried_for_ever(blocks: int, largest: int) -> None:
    """In an overload that memory binds the budget that has been chosen is in force."""
    workload = CONV.generate(0, rate=1.5 * CONV.rate, num_requests=1_000)
    policy = agent(CONV.engine.replace(num_blocks=blocks, max_num_batched_tokens=largest))
    record = policy.rule.policy
    iterations = trials = 0

    def note(report: Any, view: Any) -> None:
        nonlocal iterations, trials
        if view.clock > workload.arrival[300] and view.num_waiting > 0:
            iterations += 1
            trials += policy.rule.decision.token_budget != record.budgets[record.choice]

    run_episode(policy, workload, on_step=note)
    assert iterations > 1_000 and trials < 0.02 * iterations


def test_ageing_bounds_the_longest_wait() -> None:
    """In overload the costliest wait until the end; with ageing they enter among the others."""
    workload = CONV.generate(2, rate=1.1 * CONV.rate, num_requests=3_000)

    def longest_wait(**options: Any) -> float:
        log = run_episode(agent(**options), workload).log
        return float((log.admitted - log.arrival).max())

    none, some, all_ = longest_wait(), longest_wait(tau0=30.0), longest_wait(tau0=0.0)
    assert all_ < some < none
    assert all_ < 0.7 * none


def test_patience_bounds_how_long_fewer_residents_are_served_first() -> None:
    """A quarter of an hour of overload: serving fewer at a time is better for a while, and starves the longest in the end."""
    conversations = load_scenario("azure-conv")
    engine, workload = conversations.engine, conversations.generate(3, rate=6.5, num_requests=6_000)

    def longest(patience: float) -> float:
        log = run_episode(agent(engine, patience=patience), workload).log
        return float((log.completed - log.arrival).max())

    assert longest(60.0) < 0.5 * longest(math.inf)


def digest() -> str:
    """Of every decision and the log of a short episode."""
    made, log = decisions(agent(SMALL.replace(num_blocks=60, max_model_len=400)), drawn(9, n=100, rate=6.0, longest=150))
    return f"{len(made)} {hashlib.sha256(b''.join([*made, log.completed.tobytes()])).hexdigest()}"


def test_plain_python_decides_the_same() -> None:
    if numba.config.DISABLE_JIT:
        return
    command = [sys.executable, "-c", "from tests.test_adaptive import digest; print(digest())"]
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1")
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest()
