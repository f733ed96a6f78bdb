"""Classes by predicted length: queues, what is forecast of them, and where they are refused."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env import ConfigError, EngineConfig, EpisodeLimits, QueueLayout, Workload
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.fluid.wait import class_profiles
from llmsched_env.forecast import class_weights, classes_of, expected_output_by_class
from llmsched_env.peak import PREDICTED_ORDERS
from llmsched_env.spec import PREDICTED_CLASSES, EnvSpec
from llmsched_env.types import Decision
from llmsched_env.workload import PredictionModel, load_scenario
from llmsched_env.workload.scenario import predicted_layout
from llmsched_hardware.live import LiveMirror

STATISTICS = PredictionModel(0.6).statistics(load_scenario("azure-conv").statistics)
LAYOUT = QueueLayout("predicted", (100, 300), prompt_edges=(500,))

edges = st.lists(st.integers(1, 500), max_size=4, unique=True).map(lambda found: tuple(sorted(found)))


@settings(max_examples=60, deadline=None)
@given(
    edges=edges,
    prompt_edges=edges,
    requests=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=20),
)
def test_a_class_is_a_bucket_by_prompt_and_one_by_prediction(
    edges: tuple[int, ...], prompt_edges: tuple[int, ...], requests: list[tuple[int, int]]
) -> None:
    layout = QueueLayout("predicted", edges, prompt_edges=prompt_edges)
    prompt, predicted = map(np.array, zip(*requests, strict=True))
    found = layout.classify(prompt, np.ones_like(prompt), np.zeros_like(prompt), predicted=predicted)
    for j, p, f in zip(found.tolist(), prompt.tolist(), predicted.tolist(), strict=True):
        longer, bucket = divmod(j, len(edges) + 1)
        assert longer == sum(p > edge for edge in prompt_edges) and bucket == sum(f > edge for edge in edges)
    assert layout.num_classes == (len(edges) + 1) * (len(prompt_edges) + 1) > found.max()
    assert not layout.reveals_output_length


def test_classes_by_prediction_need_predictions() -> None:
    plain = load_scenario("azure-conv").statistics
    with pytest.raises(ConfigError, match=r"layout\.by: 'predicted', but no lengths are predicted"):
        classes_of(plain, LAYOUT)
    workload = Workload.of([0.0], [5], [5])
    with pytest.raises(ConfigError, match="no lengths are predicted"):
        SimBackend().reset(workload, LAYOUT, EngineConfig.vllm(), EpisodeLimits())
    with pytest.raises(ConfigError, match="the scenario has no predictions"):
        EnvSpec.of("azure-conv", class_by="predicted")
    with pytest.raises(ConfigError, match="nothing predicts the lengths on a live server"):
        LiveMirror(LAYOUT, EngineConfig.vllm())
    with pytest.raises(ConfigError, match=r"layout\.prompt_edges"):
        QueueLayout("prompt", (5,), prompt_edges=(5,))


def test_what_is_expected_of_a_class_is_what_its_requests_turn_out_to_be() -> None:
    workload = PredictionModel(0.6).predict(load_scenario("azure-conv").generate(0, num_requests=40_000), 0)
    index = LAYOUT.classify(workload.prompt_tokens, workload.output_tokens, workload.type_id, predicted=workload.predicted_tokens)
    means = np.array([workload.output_tokens[index == j].mean() for j in range(LAYOUT.num_classes)])
    assert expected_output_by_class(STATISTICS, LAYOUT) == pytest.approx(means, rel=0.15)
    weights = class_weights(STATISTICS, LAYOUT)
    assert weights.sum(axis=1) == pytest.approx(np.ones(LAYOUT.num_classes))
    shares = np.bincount(class_profiles(STATISTICS, LAYOUT).class_id, STATISTICS.weight)
    assert shares == pytest.approx(np.bincount(index) / len(workload), abs=0.03)


def test_default_classes_are_buckets_by_prompt_times_quarters_of_the_predictions() -> None:
    spec = EnvSpec.of("azure-conv-40gb", predictions=0.6, class_by="predicted")
    base = load_scenario("azure-conv-40gb").layout
    assert spec.layout.prompt_edges == base.edges and spec.layout.segment_ends == base.segment_ends
    assert len(spec.layout.edges) == PREDICTED_CLASSES - 1
    assert spec.codec.orders == PREDICTED_ORDERS  # type: ignore[attr-defined]
    workload = spec.workload(np.random.default_rng(0))
    shares = np.bincount(np.searchsorted(spec.layout.edges, workload.predicted_tokens), minlength=4) / len(workload)
    assert shares == pytest.approx([0.25] * 4, abs=0.08)
    own = EnvSpec.of("azure-conv-40gb", predictions=0.6, class_by="predicted", class_edges=(50, 60), segment_ends=(9,))
    assert own.layout == QueueLayout("predicted", (50, 60), segment_ends=(9,), prompt_edges=base.edges)
    assert predicted_layout(STATISTICS, 1).num_classes == 1


def test_predictions_without_classes_by_them_change_nothing_but_what_is_seen() -> None:
    plain, predicted = gym.make("LLMSched-v1"), gym.make("LLMSched-v1", predictions=0.6)
    assert plain.observation_space == predicted.observation_space and plain.action_space == predicted.action_space
    for env in (plain, predicted):
        env.reset(seed=3)
    action = np.array([4, 1])
    for _ in range(20):
        one, other = plain.step(action), predicted.step(action)
        assert one[1] == other[1] and one[4]["clock"] == other[4]["clock"]
    assert predicted.unwrapped.backend.record.arrived.predicted.any()
    assert not plain.unwrapped.backend.record.arrived.predicted.any()


def test_queues_are_those_of_the_predictions() -> None:
    workload = Workload.of(np.zeros(4), [400, 400, 600, 600], [50, 50, 50, 50], predicted_tokens=[90, 301, 100, 200])
    backend = SimBackend()
    view = backend.reset(workload, LAYOUT, EngineConfig.vllm(), EpisodeLimits())
    assert view.waiting[:, 0].tolist() == [1, 0, 1, 1, 1, 0]
    assert view.waiting_requests(2, 5).predicted_tokens.tolist() == [301]
    backend.step(Decision.greedy(LAYOUT.num_queues))
    assert sorted(view.resident_requests().predicted_tokens.tolist()) == [90, 100, 200, 301]
