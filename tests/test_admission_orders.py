"""Orders of admission by class rank and lateness, backlog at reset, the ``reserve`` action set, expected lengths."""

from __future__ import annotations

import math

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as hs

from llmsched_baselines import Setting, make_policy
from llmsched_env import ConfigError, EngineConfig, EpisodeLimits, QueueLayout, Workload
from llmsched_env.action import decode_reserve
from llmsched_env.backends import make_backend
from llmsched_env.engine import state as st
from llmsched_env.forecast import expected_output, expected_output_by_class, expected_remaining, make_forecast
from llmsched_env.runner import run_episode
from llmsched_env.types import Decision, LengthStatistics
from llmsched_env.workload import load_scenario
from tests.env_settings import RESERVE

SMALL = {"num_blocks": 40, "max_model_len": 256, "max_num_seqs": 6, "max_num_batched_tokens": 96}


def draw_workload(seed: int, n: int) -> Workload:
    rng = np.random.default_rng(seed)
    return Workload.of(np.cumsum(rng.exponential(0.01, n)), rng.integers(1, 120, n), rng.integers(1, 60, n))


def global_order(backend, engine: EngineConfig, clock: float) -> list[int]:
    """Waiting requests in the order of admission, sorted from scratch: late last, then class rank, then queue key."""
    requests, hidden = backend.record.requests, backend.record.hidden
    waiting = np.flatnonzero(requests.status == st.WAITING)
    ranks = engine.class_rank or tuple(range(backend.layout.num_classes))

    def place(r: int) -> tuple[bool, int, int]:
        new = math.isnan(hidden.admitted[r])
        late = engine.late_after > 0 and new and clock - hidden.arrival[r] > engine.late_after
        rank = ranks[requests.outside[r]] if engine.admission_order == "class" else 0
        return bool(late), rank, int(requests.key[r])

    return sorted(waiting.tolist(), key=place)


@settings(max_examples=40, deadline=None)
@given(
    seed=hs.integers(0, 10_000),
    preset=hs.sampled_from(["vllm", "paper"]),
    by_class=hs.booleans(),
    ranks=hs.permutations([0, 1, 1, 3]),
    late_after=hs.sampled_from([0.0, 0.02, 0.2, 1.0]),
)
def test_admissions_follow_the_stated_order(seed: int, preset: str, by_class: bool, ranks: list[int], late_after: float) -> None:
    options = {"admission_order": "class", "class_rank": tuple(ranks)} if by_class else {}
    if preset == "vllm":
        engine = EngineConfig.vllm(**SMALL, late_after=late_after, **options)
    else:
        engine = EngineConfig.paper(500, 0.01, 1e-5, late_after=late_after, **options)
    layout = QueueLayout(by="prompt", edges=(20, 50, 80))
    workload = draw_workload(seed, 60)
    backend = make_backend("sim")
    backend.reset(workload, layout, engine, EpisodeLimits())
    rng = np.random.default_rng(seed)
    decision = Decision(layout.num_queues)
    late_admitted = 0
    while not backend.done:
        decision.run[:] = 1
        decision.admit[:] = rng.integers(0, 4, layout.num_queues)
        before = global_order(backend, engine, backend.record.clock)
        counts = decision.admit.copy()
        allowed = []  # the order, restricted to what the decision admits of each class
        for r in before:
            j = backend.record.requests.outside[r]
            if counts[j] > 0:
                counts[j] -= 1
                allowed.append(r)
        view = backend.snapshot()
        assert view.late.sum() == sum(backend.record.requests.key[r] >= st.LATE_KEY // 2 for r in before)
        listed = [view.waiting_requests(j, 10**6).id.tolist() for j in range(4)]
        assert sorted(r for queue in listed for r in queue) == sorted(before)
        late = {r for r in before if backend.record.requests.key[r] >= st.LATE_KEY // 2}
        step = backend.step(decision)
        if step.forced_drain:
            continue
        resident = set(view.resident_requests().id.tolist()) | set(step.finished)
        admitted = [r for r in before if r in resident]
        assert admitted == [r for r in allowed if r in resident]
        assert admitted == allowed[: len(admitted)]
        late_admitted += len(late & set(admitted))
        assert step.admitted == len(admitted)
    assert backend.end == "finished"
    assert np.isfinite(backend.log().completed).all()


def test_late_last_serves_more_within_the_limit() -> None:
    """At overload first come first served lets everyone be late; serving late requests last keeps the others in time."""
    scenario = load_scenario("azure-conv")
    workload = scenario.generate(3, rate=9.0, num_requests=1500)
    in_time = {}
    for late_after in (0.0, 1.0):
        setting = Setting(scenario.statistics, 9.0, scenario.engine, overrides={"late_after": late_after})
        log = run_episode(make_policy("vllm", setting), workload).log
        assert np.isfinite(log.completed).all()
        in_time[late_after] = np.mean(log.first_token - log.arrival <= 1.0)
    assert in_time[1.0] > 1.5 * in_time[0.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_rank": (0, 1)}, "class_rank"),
        ({"class_rank": (-1, 1), "admission_order": "class"}, r"class_rank\[0\]: -1, must be an integer from 0"),
        ({"late_after": -1.0}, "late_after"),
        ({"late_after": math.inf}, "late_after"),
    ],
)
def test_refusals(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.vllm(**changes)


def test_one_rank_for_each_class() -> None:
    engine = EngineConfig.vllm(admission_order="class", class_rank=(1, 0))
    with pytest.raises(ConfigError, match=r"2 ranks, must be one for each of 1 classes"):
        make_backend("sim").reset(draw_workload(0, 5), QueueLayout(), engine, EpisodeLimits())


# --- backlog --------------------------------------------------------------------------------------
def test_backlog_waits_at_time_zero() -> None:
    env = gym.make("LLMSched-v1", num_requests=200, backlog=50)
    env.reset(seed=1)
    assert env.unwrapped.view().num_waiting == 50
    plain = gym.make("LLMSched-v1", num_requests=200)
    plain.reset(seed=1)
    a, b = (e.unwrapped.backend.record.hidden.arrival for e in (env, plain))
    np.testing.assert_array_equal(a[:50], 0.0)
    np.testing.assert_allclose(np.diff(a[49:]), np.diff(b[49:]), atol=1e-9)
    env.reset(seed=1, options={"backlog": 0})
    assert env.unwrapped.view().num_waiting == 0


def test_backlog_is_drawn_from_its_range_by_the_seed() -> None:
    env = gym.make("LLMSched-v1", num_requests=100, backlog=(5, 40))
    drawn = []
    for seed in range(12):
        env.reset(seed=seed)
        drawn.append(env.unwrapped.view().num_waiting)
    assert min(drawn) >= 5 and max(drawn) <= 40 and len(set(drawn)) > 5
    env.reset(seed=0)
    assert env.unwrapped.view().num_waiting == drawn[0]
    for bad in (-1, (3, 2), (1, 2, 3)):
        with pytest.raises(ConfigError, match="backlog"):
            gym.make("LLMSched-v1", backlog=bad)


# --- the reserve action set -----------------------------------------------------------------------
@pytest.mark.parametrize("theta", [0.9, 1.05, 1.3])
def test_a_constant_action_is_the_reserve_policy(theta: float) -> None:
    scenario = load_scenario("azure-conv")
    workload = scenario.generate(5, rate=7.0, num_requests=600)
    env = gym.make("LLMSched-v1", **RESERVE, rate=7.0, num_requests=600, engine={"num_blocks": 2816}, segment_ends=(), thetas=(0.0, theta))
    env.reset(seed=0, options={"workload": workload})
    done = False
    while not done:
        _, _, terminated, truncated, _ = env.step(1)
        done = terminated or truncated
    got = env.unwrapped.backend.log()
    setting = Setting(scenario.statistics, 7.0, scenario.engine, overrides={"num_blocks": 2816})
    wanted = run_episode(make_policy("reserve", setting, theta=theta), workload).log
    np.testing.assert_array_equal(got.completed, wanted.completed)
    np.testing.assert_array_equal(got.evictions, wanted.evictions)


def test_reserve_env_passes_the_checker_and_holds_at_zero() -> None:
    env = gym.make("LLMSched-v1", **RESERVE, num_requests=40, backlog=10)
    check_env(env.unwrapped, skip_render_check=True)
    assert env.action_space == gym.spaces.Discrete(10)
    env.reset(seed=0)
    env.step(0)
    assert env.unwrapped.view().num_residents == 0
    env.step(9)
    assert env.unwrapped.view().num_residents > 0
    assert env.unwrapped.action_masks().all()
    with pytest.raises(ConfigError, match="action_set: 'nope', must be 'peak', 'admit', 'reserve' or 'operate'"):
        gym.make("LLMSched-v1", action_set="nope")
    with pytest.raises(ConfigError, match="thetas"):
        gym.make("LLMSched-v1", action_set="reserve", thetas=(-1.0,))


def test_reserve_reads_no_output_length() -> None:
    """Two workloads that differ in hidden lengths alone give the same first decision."""
    scenario = load_scenario("azure-conv")
    base = scenario.generate(1, rate=5.0, num_requests=100).with_backlog(100)
    layout = QueueLayout(by="prompt", edges=(500, 1000))
    engine = scenario.engine.replace(num_blocks=1000)
    forecast = make_forecast(scenario.statistics, 5.0, engine, layout)
    found = []
    for outputs in (base.output_tokens, np.full(100, 7, np.int32)):
        backend = make_backend("sim")
        backend.reset(Workload.of(base.arrival, base.prompt_tokens, outputs), layout, engine, EpisodeLimits())
        decision = Decision(3)
        decode_reserve(backend.record, 1.0, forecast, decision)
        found.append(decision.admit.tolist())
    assert found[0] == found[1]
    assert sum(found[0]) > 1


# --- expected lengths -----------------------------------------------------------------------------
def test_expected_lengths_by_hand() -> None:
    statistics = LengthStatistics.of([10, 10, 30], [2, 6, 4], [0.25, 0.25, 0.5])
    np.testing.assert_allclose(expected_output(statistics)[:6], [4.0, 4.0, 14 / 3, 14 / 3, 6.0, 6.0])
    layout = QueueLayout(by="prompt", edges=(20,), segment_ends=(3,))
    np.testing.assert_allclose(expected_output_by_class(statistics, layout), [4.0, 4.0])
    # class 0, first three lengths: seen 1, 1, 0.5 times with 4, 3, 4 tokens to go; after them only the one of 6
    np.testing.assert_allclose(expected_remaining(statistics, layout)[0], [(4 + 3 + 2) / 2.5, (3 + 2 + 1) / 3])
    # class 1: always 4 tokens
    np.testing.assert_allclose(expected_remaining(statistics, layout)[1], [(4 + 3 + 2) / 3, 1.0])


def test_expected_remaining_agrees_with_a_simulation() -> None:
    scenario = load_scenario("sharegpt")
    layout = scenario.layout
    workload = scenario.generate(0, num_requests=40_000)
    ends = [0, *layout.segment_ends, 10**6]
    expected = expected_remaining(scenario.statistics, layout)[0]
    for k in range(layout.num_segments):
        rest = [np.arange(max(o - ends[k + 1], 0), o - ends[k]) + 1 for o in workload.output_tokens if o > ends[k]]
        assert np.concatenate(rest).mean() == pytest.approx(expected[k], rel=0.05)
