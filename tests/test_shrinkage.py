"""Work expected of a prediction that is trusted in part, and the order of admission by it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_baselines import Setting, make_policy
from llmsched_baselines.predicted import PredictedWork
from llmsched_env.compiled import compiled
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.forecast import class_weights
from llmsched_env.records import reader
from llmsched_env.shrinkage import REACH, TRUST_STEPS, Prior, PriorRecord, prompt_bucket, shrunk_work
from llmsched_env.types import LengthStatistics, QueueLayout
from llmsched_env.workload import PredictionModel, load_scenario

prior_at = reader(PriorRecord)


@compiled
def work_at(prior: Any, prompt: int, predicted: int) -> float:
    return shrunk_work(prior_at(prior), prompt, predicted)


@compiled
def bucket_at(prior: Any, prompt: int) -> int:
    return prompt_bucket(prior_at(prior), prompt)


ENGINE = EngineConfig.vllm()
STATISTICS = load_scenario("sharegpt").statistics
PRIOR = Prior.of(STATISTICS, ENGINE)


def work(prompt: int, predicted: int, trust: float, offset: float = 0.0, scale: float = 1.0, error: float = 0.0) -> float:
    record = PRIOR.record()
    belief = record.belief
    belief.trust, belief.offset, belief.scale, belief.error = trust, offset, scale, error
    return float(work_at(record.handle, prompt, predicted))


def cost(prompt: int, output: float, square: float) -> float:
    weights = PRIOR.weights
    return weights.c * prompt + weights.w0 * output + weights.w1 * (output * prompt + square / 2)


prompts, predictions = st.integers(1, 4000), st.integers(1, 5000)


@settings(max_examples=100, deadline=None)
@given(prompt=prompts, one=predictions, other=predictions)
def test_without_trust_the_prompt_alone_counts(prompt: int, one: int, other: int) -> None:
    assert work(prompt, one, 0.0) == pytest.approx(work(prompt, other, 0.0)) == pytest.approx(work(prompt, 0, 1.0))


@settings(max_examples=100, deadline=None)
@given(prompt=prompts, predicted=predictions)
def test_with_full_trust_the_prediction_is_the_length(prompt: int, predicted: int) -> None:
    b = int(bucket_at(PRIOR.record().handle, prompt))
    if abs(math.log(predicted) - PRIOR.mean[b]) < REACH:
        assert work(prompt, predicted, 1.0) == pytest.approx(cost(prompt, predicted, predicted**2))


@settings(max_examples=100, deadline=None)
@given(prompt=prompts, short=predictions, long=predictions, trust=st.floats(0.0, 1.0))
def test_who_is_predicted_longer_costs_no_less(prompt: int, short: int, long: int, trust: float) -> None:
    short, long = min(short, long), max(short, long)
    assert work(prompt, short, trust) <= work(prompt, long, trust) * (1 + 1e-9)


@pytest.mark.parametrize("step", [0, 3, 7])
def test_the_table_is_the_mean_over_the_lengths_reweighed_by_the_error(step: int) -> None:
    """Drawn: lengths of a bucket, normal errors of the variance that the trust stands for, and those whose x comes out near one value."""
    rng, trust, b = np.random.default_rng(0), step / TRUST_STEPS, 20
    lengths = np.unique(STATISTICS.output)
    weights = class_weights(STATISTICS, QueueLayout("prompt", tuple(PRIOR.edges.tolist())))[b]
    drawn = rng.choice(STATISTICS.output, 2_000_000, p=weights)
    assert lengths.size > 20 and np.log(drawn).var() == pytest.approx(PRIOR.variance[b], rel=0.02)
    error = PRIOR.variance[b] * (1 - trust) / trust if trust > 0 else 1.0
    x = np.log(drawn) + math.sqrt(error) * rng.standard_normal(drawn.size) - PRIOR.mean[b]
    for i in (12, 16, 19):
        near = np.abs(x - (i * 0.25 - REACH)) < 0.03 if trust > 0 else slice(None)
        assert np.exp(PRIOR.output[b, step, i]) == pytest.approx(drawn[near].mean(), rel=0.03)
        assert np.exp(PRIOR.square[b, step, i]) == pytest.approx((drawn[near] ** 2).mean(), rel=0.05)


def test_bias_is_taken_off_before_the_prediction_counts() -> None:
    assert work(100, 400, 0.5, offset=math.log(2.0)) == pytest.approx(work(100, 200, 0.5))
    b = int(bucket_at(PRIOR.record().handle, 100))
    centre = math.exp(PRIOR.mean[b])
    twice = round(centre * math.exp(1.0))
    assert work(100, twice, 0.5, scale=2.0) == pytest.approx(work(100, round(centre * math.exp(0.5)), 0.5), rel=0.01)


def test_the_error_stands_for_a_trust_of_each_prompt() -> None:
    for prompt in (5, 100, 2000):
        v = PRIOR.variance[int(bucket_at(PRIOR.record().handle, prompt))]
        assert work(prompt, 300, -1.0, error=0.4) == pytest.approx(work(prompt, 300, v / (v + 0.4)))
    assert work(100, 300, -1.0, error=0.0) == pytest.approx(work(100, 300, 1.0))


# --- the walk -----------------------------------------------------------------------------------------------
def test_the_least_work_enters_first() -> None:
    """With one request a queue, the requests that enter are those of least work, whatever their queues."""
    model = PredictionModel(0.8)
    statistics = model.statistics(STATISTICS)
    engine = ENGINE.replace(num_blocks=400, max_num_batched_tokens=4096)
    for trust in (0.0, 0.4, 1.0):
        policy = make_policy("predicted-work", Setting(statistics, 5.0, engine), shrink=trust, level=1.0, prompts=64, buckets=64)
        workload = model.predict(load_scenario("sharegpt").generate(3, num_requests=25).with_backlog(25), 3)
        backend = SimBackend()
        policy.reset()
        view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits())
        assert view.waiting.max() <= 2
        backend.advance(policy.decide(view))
        inside = set(view.resident_requests().id.tolist())
        heads = [view.waiting_requests(j, 1).id for j in range(policy.layout.num_classes)]
        outside = [int(ids[0]) for ids in heads if ids.size]
        assert inside and outside
        works = {r: work(int(workload.prompt_tokens[r]), int(workload.predicted_tokens[r]), trust) for r in range(25)}
        assert max(works[r] for r in inside) <= min(works[r] for r in outside) * (1 + 1e-6)


def test_scores_are_kept_only_while_they_hold() -> None:
    """An episode after another one, and decisions one by one, are those of a fresh policy played as a whole."""
    model = PredictionModel(0.6)
    setting = Setting(model.statistics(STATISTICS), 8.0, ENGINE.replace(num_blocks=700))
    workloads = [model.predict(load_scenario("sharegpt").generate(seed, rate=12.0, num_requests=150), seed) for seed in (0, 1)]
    used = make_policy("predicted-work", setting)
    for workload in (workloads[1], workloads[0]):
        backend = SimBackend()
        used.reset()
        view = backend.reset(workload, used.layout, used.engine, EpisodeLimits())
        while not backend.done:
            backend.advance(used.decide(view))
    fresh, other = make_policy("predicted-work", setting), SimBackend()
    fresh.reset()
    other.reset(workloads[0], fresh.layout, fresh.engine, EpisodeLimits())
    assert fresh.rule is not None
    fresh.rule.play(other)
    assert other.log().completed.tobytes() == backend.log().completed.tobytes()


def test_statistics_of_one_length_have_nothing_to_shrink() -> None:
    one = LengthStatistics.of(100, 50, 1.0)
    prior = Prior.of(one, ENGINE)
    assert prior.variance.tolist() == [0.0] and np.exp(prior.output[0, 3]) == pytest.approx(50.0)
    policy = PredictedWork(Setting(PredictionModel(0.5).statistics(one), 5.0, ENGINE))
    assert policy.layout.by == "predicted"
