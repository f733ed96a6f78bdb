"""Least pooled work first: its buckets, its order, its memory, and that it is the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from llmsched_baselines import Setting, make_policy
from llmsched_baselines.pooled_work import work_classes
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime, load_calibration
from llmsched_env.runner import run_episode
from llmsched_env.types import LengthStatistics, QueueLayout, Workload
from llmsched_env.work import WorkWeights, work_weights
from llmsched_env.workload import load_scenario

CROSSED = LengthStatistics.of([100, 100, 400, 400], [600, 400, 10, 30], [1, 1, 1, 1])
ENGINE = EngineConfig.vllm(time_model=LinearTime(0.01, 1e-6), num_blocks=320, max_model_len=1_024, max_num_seqs=64)


def setting(**engine: Any) -> Setting:
    return Setting(CROSSED, 1.0, ENGINE.replace(**engine))


def crossed_workload(n: int = 200) -> Workload:
    kind = np.random.default_rng(3).integers(4, size=n)
    return Workload.of(np.zeros(n), CROSSED.prompt[kind], CROSSED.output[kind])


def test_buckets_grow_by_one_factor_and_reach_beyond_the_statistics() -> None:
    weights = WorkWeights(1e-4, 1e-3, 1e-6)
    layout = work_classes(CROSSED, weights, 16)
    work = 1e6 * weights.of(CROSSED.prompt, CROSSED.output)
    edges = np.array(layout.edges, dtype=float)
    assert layout.by == "work" and layout.num_classes == 16
    assert edges[0] < work.min() and edges[-1] > work.max()
    np.testing.assert_allclose(edges[1:] / edges[:-1], (2.25 * work.max() / work.min()) ** (1 / 14), rtol=1e-3)
    assert work_classes(CROSSED, weights, 1) == QueueLayout()
    same = LengthStatistics.of([10], [10], [1])
    assert work_classes(same, weights, 4).num_classes >= 2


def test_one_at_a_time_it_is_least_work_first_and_an_empty_engine_takes_anything() -> None:
    policy = make_policy("pooled-work", setting(), level=1e-9)
    assert policy.known_lengths and policy.engine.admission_order == "class"
    workload = crossed_workload(40)
    log = run_episode(policy, workload).log
    work = work_weights(policy.engine, CROSSED).of(log.prompt_tokens, log.output_tokens)
    assert np.all(np.diff(work[np.argsort(log.admitted)]) >= 0)
    assert np.all(np.isfinite(log.completed))


def test_long_prompts_with_short_answers_come_before_short_prompts_with_long_ones() -> None:
    log = run_episode(make_policy("pooled-work", setting()), crossed_workload()).log
    long_prompts = log.prompt_tokens == 400
    assert log.admitted[long_prompts].max() <= np.median(log.admitted[~long_prompts])


@pytest.mark.parametrize("level", [0.6, 0.99])
def test_the_memory_never_overflows(level: float) -> None:
    summary = run_episode(make_policy("pooled-work", setting(), level=level), crossed_workload()).summary
    assert summary.evictions == 0 and 0.7 * level < summary.kv_max <= level + 0.02


def test_it_runs_in_the_paper_preset_and_says_the_same_step_by_step() -> None:
    scenario = load_scenario("two-type")
    workload = scenario.generate(1, num_requests=60)
    policy = make_policy("pooled-work", Setting(scenario.statistics, scenario.rate, scenario.engine))
    whole = run_episode(policy, workload)
    stepped = run_episode(policy, workload, on_step=lambda report, view: None)
    np.testing.assert_array_equal(whole.log.completed, stepped.log.completed)


@pytest.mark.filterwarnings("ignore::llmsched_env.perf.base.CalibrationRangeWarning")
@pytest.mark.parametrize(("name", "rate"), [("mooncake", 0.37), ("azure-conv", 5.6)])
def test_it_is_below_the_other_policies_that_know_lengths(name: str, rate: float) -> None:
    scenario = load_scenario(name)
    engine = scenario.engine.replace(time_model=load_calibration("a100-llama2-7b-vllm"), num_blocks=2_816)
    workload = scenario.generate(5, rate=rate, num_requests=600).with_backlog(60)
    mean = {
        policy: run_episode(make_policy(policy, Setting(scenario.statistics, rate, engine)), workload).summary.latency_mean
        for policy in ("vllm", "mc-sf", "oracle-sjf", "pooled-work")
    }
    assert mean["pooled-work"] < min(mean["mc-sf"], mean["oracle-sjf"]) < mean["vllm"]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_classes": 0}, "num_classes"),
        ({"num_classes": 5_000}, "num_classes"),
        ({"level": 0.0}, "level"),
        ({"level": float("inf")}, "level"),
        ({"memory_share": 1.1}, "memory_share"),
    ],
)
def test_options_are_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_policy("pooled-work", setting(), **options)
