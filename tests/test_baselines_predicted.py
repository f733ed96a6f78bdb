"""``predicted-work``: its queues, its options, and what predictions are worth to it."""

from __future__ import annotations

import numpy as np
import pytest

from llmsched_baselines import Setting, make_policy
from llmsched_env import ConfigError
from llmsched_env.runner import run_episode
from llmsched_env.workload import PredictionModel, load_scenario

SCENARIO = load_scenario("azure-conv-40gb")
PLAIN = Setting(SCENARIO.statistics, SCENARIO.rate, SCENARIO.engine)


def predicted(sigma: float) -> Setting:
    return Setting(PredictionModel(sigma).statistics(SCENARIO.statistics), SCENARIO.rate, SCENARIO.engine)


def test_without_predictions_it_orders_by_prompts_whatever_the_trust() -> None:
    workload = SCENARIO.generate(0, num_requests=120)
    results = []
    for shrink in (0.0, 1.0):
        policy = make_policy("predicted-work", PLAIN, shrink=shrink)
        assert policy.layout.by == "prompt" and not policy.known_lengths
        results.append(run_episode(policy, workload).log.completed.tobytes())
    assert results[0] == results[1]


def test_trust_pays_where_predictions_are_good() -> None:
    means = {}
    for shrink in (0.0, 1.0):
        policy = make_policy("predicted-work", predicted(0.0), shrink=shrink)
        workloads = [PredictionModel(0.0).predict(SCENARIO.generate(seed, num_requests=300), seed) for seed in range(4)]
        means[shrink] = np.mean([run_episode(policy, workload).summary.latency_mean for workload in workloads])
    assert means[1.0] < 0.95 * means[0.0]


def test_everything_completes_on_the_papers_engine_too() -> None:
    scenario = load_scenario("two-type")
    model = PredictionModel(0.6)
    setting = Setting(model.statistics(scenario.statistics), scenario.rate, scenario.engine)
    result = run_episode(make_policy("predicted-work", setting), model.predict(scenario.generate(0, num_requests=100), 0))
    assert result.counters.finished == 100


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"shrink": 1.5}, "shrink"),
        ({"level": 0.0}, "level"),
        ({"spare": -1.0}, "spare"),
        ({"prompts": 0}, "prompts"),
        ({"buckets": 0}, "buckets"),
    ],
)
def test_what_is_refused(options: dict[str, float], field: str) -> None:
    with pytest.raises(ConfigError, match=rf"policy\.{field}"):
        make_policy("predicted-work", PLAIN, **options)
