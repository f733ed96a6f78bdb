"""expected-work, late-last and the oracle bound: what they ask of the engine, whom they serve first, and that they help."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmsched_baselines import Setting, make_policy
from llmsched_baselines.expected_work import expected_prompt_by_class
from llmsched_baselines.policy import prompt_classes
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.forecast import expected_output_by_class, middles
from llmsched_env.metrics import summarize
from llmsched_env.perf import LinearTime
from llmsched_env.runner import Policy, run_episode
from llmsched_env.types import LengthStatistics, QueueLayout, Workload
from llmsched_env.workload import load_scenario

# Short prompts with long answers, long prompts with short ones: the order by prompt is the wrong one.
CROSSED = LengthStatistics.of([100, 100, 400, 400], [600, 400, 10, 30], [1, 1, 1, 1])
ENGINE = EngineConfig.vllm(time_model=LinearTime(0.01, 1e-6), num_blocks=320, max_model_len=1_024, max_num_seqs=64)
NAMES = ("expected-work", "late-last", "oracle-sjf")


def setting(statistics: LengthStatistics = CROSSED, engine: EngineConfig = ENGINE, rate: float = 1.0) -> Setting:
    return Setting(statistics, rate, engine)


def crossed_workload(n: int = 200, gap: float = 0.0) -> Workload:
    rng = np.random.default_rng(3)
    kind = rng.integers(4, size=n)
    return Workload.of(gap * np.arange(n), CROSSED.prompt[kind], CROSSED.output[kind])


def test_expected_work_ranks_classes_by_prompt_plus_c_times_expected_output() -> None:
    by_prompt = make_policy("expected-work", setting(), num_classes=2, c=0.0)
    assert by_prompt.layout == QueueLayout("prompt", (100,))
    assert by_prompt.engine.admission_order == "class"
    assert by_prompt.engine.class_rank == (0, 1)
    # 100 + c 500 against 400 + c 20: the order turns at c = 300 / 480.
    assert make_policy("expected-work", setting(), num_classes=2, c=0.6).engine.class_rank == (0, 1)
    assert make_policy("expected-work", setting(), num_classes=2, c=0.7).engine.class_rank == (1, 0)


def test_expected_prompt_by_class_weighs_and_fills_unknown_classes() -> None:
    statistics = LengthStatistics.of([10, 20, 90], [1, 1, 1], [3, 1, 4])
    layout = QueueLayout("prompt", (20, 50))
    np.testing.assert_allclose(expected_prompt_by_class(statistics, layout), [12.5, 35.0, 90.0])


def test_buckets_finer_than_the_statistics_lie_between_known_lengths_and_take_after_the_nearest() -> None:
    statistics = LengthStatistics.of([100, 200, 400, 800], [10, 20, 40, 80], [1, 1, 1, 1])
    assert prompt_classes(statistics, 4).edges == (100, 200, 400)  # a known length each
    layout = prompt_classes(statistics, 8)
    assert layout.edges == (100, 150, 200, 300, 400, 600)
    np.testing.assert_allclose(middles(statistics, layout), [50.5, 125, 175, 250, 350, 500, 700])
    np.testing.assert_allclose(expected_prompt_by_class(statistics, layout), [100, 125, 200, 250, 400, 500, 800])
    np.testing.assert_allclose(expected_output_by_class(statistics, layout), [10, 10, 20, 20, 40, 40, 80])
    policy = make_policy("expected-work", setting(statistics), num_classes=8, c=1.0)
    assert policy.layout == layout and policy.engine.class_rank == tuple(range(7))


def test_expected_work_serves_the_cheapest_bucket_first() -> None:
    result = run_episode(make_policy("expected-work", setting(), num_classes=2, c=4.0), crossed_workload())
    short_answers = result.log.prompt_tokens == 400
    assert result.log.admitted[short_answers].max() <= np.median(result.log.admitted[~short_answers])
    wrong_order = run_episode(make_policy("shortest-prompt", setting(), num_classes=2, theta=1.1), crossed_workload())
    assert result.summary.latency_mean < 0.9 * wrong_order.summary.latency_mean


def test_with_one_class_expected_work_is_reserve() -> None:
    ours = run_episode(make_policy("expected-work", setting(), num_classes=1, theta=1.2), crossed_workload())
    theirs = run_episode(make_policy("reserve", setting(), theta=1.2), crossed_workload())
    np.testing.assert_array_equal(ours.log.completed, theirs.log.completed)


def test_late_last_saves_the_timely_under_overload() -> None:
    workload = crossed_workload(600, gap=0.05)
    goodput = {}
    for name, options in (("reserve", {}), ("late-last", {"limit": 2.0})):
        policy = make_policy(name, setting(), **options)
        result = run_episode(policy, workload)
        assert np.all(np.isfinite(result.log.completed)), "late requests are served all the same"
        summary = summarize(result.log, result.counters, kv_capacity=policy.engine.kv_capacity, ttft_limit=2.5, tpot_limit=1.0)
        goodput[name] = summary.slo_goodput
    assert goodput["late-last"] > 1.3 * goodput["reserve"]


def test_late_last_with_a_limit_nobody_misses_is_reserve() -> None:
    workload = crossed_workload(100, gap=0.05)
    ours = run_episode(make_policy("late-last", setting(), limit=1e6, theta=1.15), workload)
    theirs = run_episode(make_policy("reserve", setting(), theta=1.15), workload)
    np.testing.assert_array_equal(ours.log.completed, theirs.log.completed)


def committed(policy: Policy, workload: Workload) -> float:
    """Largest sum of true final lengths of residents, over several residents."""
    admitted, completed = [], []
    result = run_episode(policy, workload)
    admitted, completed = result.log.admitted, result.log.completed
    final = result.log.prompt_tokens + result.log.output_tokens
    worst = 0.0
    for t in admitted:
        inside = (admitted <= t) & (completed > t)
        if np.count_nonzero(inside) > 1:
            worst = max(worst, float(final[inside].sum()))
    return worst


@pytest.mark.parametrize("theta", [0.5, 0.8, 1.0])
def test_the_oracle_never_commits_more_than_theta(theta: float) -> None:
    policy = make_policy("oracle-sjf", setting(), theta=theta, num_classes=4)
    assert policy.known_lengths
    limit = theta * ENGINE.kv_capacity_tokens
    found = committed(policy, crossed_workload())
    assert 0.7 * limit < found <= limit
    assert run_episode(policy, crossed_workload()).summary.evictions == 0


def test_the_oracle_serves_short_outputs_first_and_an_empty_engine_takes_anything() -> None:
    policy = make_policy("oracle-sjf", setting(), num_classes=4, theta=0.01)
    result = run_episode(policy, crossed_workload(40))
    order = np.argsort(result.log.admitted)
    assert np.all(np.diff(result.log.output_tokens[order]) >= 0), "one at a time, shortest first"
    assert np.all(np.isfinite(result.log.completed))


def test_the_oracle_can_order_by_prompt() -> None:
    policy = make_policy("oracle-sjf", setting(), by="prompt", num_classes=2, theta=0.01)
    order = np.argsort(run_episode(policy, crossed_workload(40)).log.admitted)
    assert np.all(np.diff(crossed_workload(40).prompt_tokens[order]) >= 0)


@pytest.mark.parametrize("name", NAMES)
def test_they_run_in_the_paper_preset_and_say_the_same_step_by_step(name: str) -> None:
    scenario = load_scenario("two-type")
    workload = scenario.generate(1, num_requests=60)
    policy = make_policy(name, Setting(scenario.statistics, scenario.rate, scenario.engine))
    whole = run_episode(policy, workload)
    stepped = run_episode(policy, workload, on_step=lambda report, view: None)
    np.testing.assert_array_equal(whole.log.completed, stepped.log.completed)
    assert np.all(np.isfinite(whole.log.completed))


def test_the_bound_is_below_what_knows_no_lengths() -> None:
    scenario = load_scenario("azure-conv")
    engine = scenario.engine.replace(num_blocks=2_816)
    workload = scenario.generate(5, rate=5.2, num_requests=1_500)
    mean = {
        name: run_episode(make_policy(name, Setting(scenario.statistics, 5.2, engine)), workload).summary.latency_mean
        for name in ("vllm", "reserve", "expected-work", "oracle-sjf")
    }
    assert mean["oracle-sjf"] < mean["expected-work"] < mean["reserve"] < mean["vllm"]


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("expected-work", {"num_classes": 0}, "num_classes"),
        ("expected-work", {"c": -1.0}, "policy.c"),
        ("expected-work", {"c": float("nan")}, "policy.c"),
        ("expected-work", {"theta": 0.0}, "theta"),
        ("late-last", {"limit": 0.0}, "limit"),
        ("late-last", {"limit": float("inf")}, "limit"),
        ("oracle-sjf", {"theta": float("inf")}, "theta"),
        ("oracle-sjf", {"num_classes": 0}, "num_classes"),
        ("oracle-sjf", {"by": "luck"}, "policy.by"),
    ],
)
def test_bad_options_are_refused(name: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_policy(name, setting(), **options)


def test_what_an_operator_set_wins() -> None:
    policy = make_policy("late-last", Setting(CROSSED, 1.0, ENGINE, overrides={"late_after": 9.0}), limit=2.0)
    assert policy.engine.late_after == 9.0
