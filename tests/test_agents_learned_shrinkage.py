"""``learned-shrinkage``: what it learns of a predictor, and what that is worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from llmsched_agents.learned_shrinkage import LearnedShrinkage, with_fluid_budget
from llmsched_agents.lookup import named_policy
from llmsched_baselines import Setting, make_policy
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EpisodeLimits
from llmsched_env.runner import run_episode
from llmsched_env.types import Workload
from llmsched_env.workload import PredictionModel, load_scenario

SCENARIO = load_scenario("sharegpt")


def setting(model: PredictionModel, rate: float = 8.0) -> Setting:
    return Setting(model.statistics(SCENARIO.statistics), rate, SCENARIO.engine)


def learned(model: PredictionModel, n: int = 3000, seed: int = 0) -> Any:
    policy = LearnedShrinkage(setting(model))
    policy.reset()
    workload = model.predict(SCENARIO.generate(seed, rate=8.0, num_requests=n), seed)
    run_episode(policy, workload)
    return policy.rule.policy.peak.prior.belief


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6, 1.0])
def test_the_error_is_learned(sigma: float) -> None:
    belief = learned(PredictionModel(sigma))
    assert belief.trust == -1.0
    assert belief.error == pytest.approx(sigma**2, abs=0.12)
    assert belief.offset == pytest.approx(0.0, abs=0.12) and belief.scale == pytest.approx(1.0, abs=0.12)


def test_bias_is_learned() -> None:
    belief = learned(PredictionModel(0.4, (2.0,), 0.6))
    assert belief.scale == pytest.approx(0.6, abs=0.15)
    # what a prediction of an ordinary request exceeds it by: log 2 + (0.6 - 1) (E log output - log 200)
    expected = np.log(2.0) - 0.4 * (SCENARIO.statistics.weight @ np.log(SCENARIO.statistics.output) - np.log(200.0))
    assert belief.offset == pytest.approx(expected, abs=0.15)


def test_it_forgets_with_the_episode() -> None:
    model = PredictionModel(0.6)
    policy = LearnedShrinkage(setting(model))
    workload = model.predict(SCENARIO.generate(1, rate=10.0, num_requests=300), 1)
    times = []
    for _ in range(2):
        run_episode(policy, PredictionModel(1.5).predict(SCENARIO.generate(2, rate=10.0, num_requests=200), 2))
        times.append(run_episode(policy, workload).log.completed.tobytes())
    assert times[0] == times[1]


def test_decision_by_decision_is_the_whole_episode() -> None:
    model = PredictionModel(0.6)
    policy, backend = LearnedShrinkage(setting(model)), SimBackend()
    workload = model.predict(SCENARIO.generate(1, rate=12.0, num_requests=200), 1)
    policy.reset()
    view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits())
    while not backend.done:
        backend.advance(policy.decide(view))
    assert backend.log().completed.tobytes() == run_episode(policy, workload).log.completed.tobytes()


def test_lengths_count_only_once_they_are_known() -> None:
    """Two episodes with the same predictions and other lengths: the same decisions until something completes."""
    model = PredictionModel(0.6)
    base = model.predict(SCENARIO.generate(3, rate=40.0, num_requests=150), 3)
    courses = []
    for output in (60, 80):
        workload = replace(base, output_tokens=np.full(len(base), output, np.int32))
        policy, backend = LearnedShrinkage(setting(model)), SimBackend()
        policy.reset()
        view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits())
        course = []
        while not backend.done and backend.record.finished == 0:
            decision = policy.decide(view)
            course.append((decision.admit.tobytes(), backend.record.clock))
            backend.advance(decision)
        courses.append(course)
    common = min(map(len, courses))
    assert common > 20 and courses[0][:common] == courses[1][:common]


def test_without_predictions_it_is_predicted_work() -> None:
    plain = with_fluid_budget(Setting(SCENARIO.statistics, 8.0, SCENARIO.engine))
    workload: Workload = SCENARIO.generate(0, rate=12.0, num_requests=150)
    one, other = LearnedShrinkage(plain), make_policy("predicted-work", plain)
    assert run_episode(one, workload).log.completed.tobytes() == run_episode(other, workload).log.completed.tobytes()


def test_it_has_a_name() -> None:
    policy = named_policy("learned-shrinkage").build(setting(PredictionModel(0.6)), level=0.95)
    assert isinstance(policy, LearnedShrinkage) and policy.rule.policy.level == 0.95  # type: ignore[attr-defined]
    assert policy.engine.max_num_batched_tokens < SCENARIO.engine.max_num_batched_tokens or policy.engine == SCENARIO.engine
    kept = replace(setting(PredictionModel(0.6)), overrides={"max_num_batched_tokens": 1024})
    assert LearnedShrinkage(kept).engine.max_num_batched_tokens == 1024


@pytest.mark.slow
def test_it_gains_where_the_best_constant_does_and_loses_nowhere() -> None:
    for sigma in (0.6, 1.0):
        model = PredictionModel(sigma)
        known = with_fluid_budget(setting(model, 14.0))  # about 1.4 of what the engine bears
        workloads = [model.predict(SCENARIO.generate(seed, rate=14.0, num_requests=1500), seed) for seed in range(6)]

        def mean(policy: Any, workloads: list[Workload] = workloads) -> float:
            return float(np.mean([run_episode(policy, workload).summary.latency_mean for workload in workloads]))

        hidden, raw = (mean(make_policy("predicted-work", known, shrink=w)) for w in (0.0, 1.0))
        found = mean(LearnedShrinkage(known))
        assert found < 0.97 * hidden and found < raw
