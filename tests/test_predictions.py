"""Predictions of output lengths: how they err, that requests stay the same, and what an operator knows of both."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env import ConfigError, EngineConfig, Workload
from llmsched_env.types import LengthStatistics
from llmsched_env.workload import PredictionModel, load_scenario, read_scenario, read_trace, scenario_from_trace
from llmsched_env.workload.predictions import NODES, noise_quantiles

MODEL = PredictionModel(0.6)
models = st.builds(
    PredictionModel,
    sigma=st.floats(0.0, 2.0),
    factor=st.tuples(st.floats(0.2, 5.0)),
    slope=st.floats(0.0, 2.0),
    pivot=st.floats(1.0, 1000.0),
    tail=st.sampled_from([1.0, 2.5, 10.0, math.inf]),
)


def logarithms(model: PredictionModel, n: int = 40_000, output: int = 150) -> np.ndarray:
    drawn = model.draw(np.random.default_rng(3), np.full(n, output, np.int32), np.zeros(n, np.int32))
    return np.log(drawn / output)


@pytest.mark.parametrize("sigma", [0.0, 0.3, 0.6, 1.0])
def test_the_error_of_the_logarithm_is_normal(sigma: float) -> None:
    errors = logarithms(PredictionModel(sigma))
    assert errors.mean() == pytest.approx(0.0, abs=0.02)
    assert errors.std() == pytest.approx(sigma, abs=0.02)


def test_bias_by_type_by_length_and_heavy_tails() -> None:
    rng = np.random.default_rng(0)
    types = np.array([0, 1, 2] * 1000, np.int32)
    drawn = PredictionModel(0.0, (0.5, 1.0, 2.0)).draw(rng, np.full(3000, 100, np.int32), types)
    assert [set(drawn[types == t].tolist()) for t in range(3)] == [{50}, {100}, {200}]
    flat = PredictionModel(0.0, slope=0.0, pivot=120.0).draw(rng, np.array([1, 50, 4000], np.int32), np.zeros(3, np.int32))
    assert flat.tolist() == [120, 120, 120]
    heavy, light = logarithms(PredictionModel(0.3, tail=2.0)), logarithms(PredictionModel(0.3))
    assert np.quantile(np.abs(heavy), 0.999) > 3 * np.quantile(np.abs(light), 0.999)


@settings(max_examples=40, deadline=None)
@given(model=models, outputs=st.lists(st.integers(1, 2**20), min_size=1, max_size=30))
def test_predictions_are_whole_tokens(model: PredictionModel, outputs: list[int]) -> None:
    drawn = model.draw(np.random.default_rng(1), np.array(outputs, np.int32), np.zeros(len(outputs), np.int32))
    assert drawn.dtype == np.int32 and (drawn >= 1).all() and (drawn <= 2**30).all()


@settings(max_examples=25, deadline=None)
@given(model=models, seed=st.integers(0, 2**40), n=st.integers(1, 50))
def test_a_seed_gives_the_same_requests_with_predictions_and_without(model: PredictionModel, seed: int, n: int) -> None:
    plain = load_scenario("azure-conv")
    predicted = dataclasses.replace(plain, predictions=model)
    for make in (lambda: seed, lambda: np.random.SeedSequence(seed, spawn_key=(4,)), lambda: np.random.default_rng(seed)):
        a, b, again = (scenario.generate(make(), num_requests=n) for scenario in (plain, predicted, predicted))
        assert a.predicted_tokens is None and b.predicted_tokens is not None
        for name in ("arrival", "prompt_tokens", "output_tokens", "type_id"):
            assert (getattr(a, name) == getattr(b, name)).all()
        assert (b.predicted_tokens == again.predicted_tokens).all()
    one, other = np.random.default_rng(seed), np.random.default_rng(seed)
    plain.generate(one, num_requests=n)
    predicted.generate(other, num_requests=n)
    assert (plain.generate(one, num_requests=n).output_tokens == plain.generate(other, num_requests=n).output_tokens).all()


def test_the_same_noise_at_every_sigma() -> None:
    workload = load_scenario("sharegpt").generate(5, num_requests=500)
    small, large = (PredictionModel(sigma).predict(workload, 5).predicted_tokens for sigma in (0.3, 0.6))
    long = workload.output_tokens > 100
    one, other = (np.log(found[long] / workload.output_tokens[long]) for found in (small, large))
    assert other == pytest.approx(2.0 * one, abs=0.05)


# --- what an operator knows ---------------------------------------------------------------------------
@pytest.mark.parametrize("model", [MODEL, PredictionModel(0.0), PredictionModel(0.8, (1.5,), 0.6, tail=3.0)])
def test_statistics_keep_the_lengths_and_know_the_joint_law(model: PredictionModel) -> None:
    plain = load_scenario("azure-conv").statistics
    joint = model.statistics(plain)
    assert joint.weight.sum() == pytest.approx(1.0)
    assert joint.mean_output == pytest.approx(plain.mean_output) and joint.mean_prompt == pytest.approx(plain.mean_prompt)
    drawn = model.predict(load_scenario("azure-conv").generate(0, num_requests=40_000), 0)
    assert drawn.predicted_tokens is not None and joint.predicted is not None
    for share in (0.25, 0.5, 0.75):
        expected = np.quantile(drawn.predicted_tokens, share)
        below = joint.weight[joint.predicted <= expected].sum()
        assert below == pytest.approx(share, abs=0.03)
    long = drawn.predicted_tokens > np.median(drawn.predicted_tokens)
    chosen = joint.predicted > np.median(drawn.predicted_tokens)
    expected = joint.weight[chosen] @ joint.output[chosen] / joint.weight[chosen].sum()
    assert expected == pytest.approx(drawn.output_tokens[long].mean(), rel=0.06)


def test_lengths_without_predictions_are_the_lengths_again() -> None:
    plain = load_scenario("azure-conv").statistics
    back = MODEL.statistics(plain).without_predictions()
    assert back.predicted is None and back.weight.size <= plain.weight.size < plain.weight.size * NODES
    assert back.mean_output == pytest.approx(plain.mean_output) and back.survival(200.0) == pytest.approx(plain.survival(200.0))
    assert plain.without_predictions() is plain


@pytest.mark.parametrize("tail", [1.0, 3.0, 30.0, math.inf])
def test_quantiles_of_the_noise(tail: float) -> None:
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal(400_000) if tail == math.inf else rng.standard_t(tail, 400_000)
    found = noise_quantiles(tail, 8)
    assert found == pytest.approx(-found[::-1], abs=1e-3)
    assert found == pytest.approx(np.quantile(drawn, (np.arange(8) + 0.5) / 8), abs=0.03 if tail > 1 else 0.1)


def test_a_model_is_fitted_to_recorded_pairs() -> None:
    truth = PredictionModel(0.5, (1.4,), 0.7, 100.0)
    workload = truth.predict(load_scenario("sharegpt").generate(1, num_requests=30_000), 1)
    found = PredictionModel.fitted(workload.output_tokens, workload.predicted_tokens)
    assert found.sigma == pytest.approx(0.5, abs=0.02) and found.slope == pytest.approx(0.7, abs=0.02)
    long = np.array([20.0, 200.0, 1000.0])
    assert found.centre(long, np.zeros(3, np.int32)) == pytest.approx(truth.centre(long, np.zeros(3, np.int32)), abs=0.05)
    assert PredictionModel.fitted(np.array([5, 5]), np.array([10, 10])).sigma == 0.0


# --- what people write ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"sigma": -0.1}, "predictions.sigma"),
        ({"sigma": math.nan}, "predictions.sigma"),
        ({"factor": ()}, "predictions.factor"),
        ({"factor": (0.0,)}, "predictions.factor"),
        ({"slope": 3.0}, "predictions.slope"),
        ({"pivot": 0.0}, "predictions.pivot"),
        ({"tail": 0.0}, "predictions.tail"),
        ({"sigm": 1.0}, "predictions.sigm: unknown field"),
        ("0.6", "predictions"),
        (True, "predictions"),
    ],
)
def test_what_is_refused(given: object, field: str) -> None:
    with pytest.raises(ConfigError, match=field.replace(".", r"\.")):
        PredictionModel.of(given)


def test_what_stands_for_a_model() -> None:
    assert PredictionModel.of(None) is None and PredictionModel.of(MODEL) is MODEL
    assert PredictionModel.of(0.6) == MODEL == PredictionModel.of({"sigma": 0.6})
    assert PredictionModel(0.6, 2.0).factor == (2.0,)  # type: ignore[arg-type]


def test_more_types_than_factors_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"predictions\.factor: 2 factors, must be one, or one for each of 3 types"):
        PredictionModel(0.0, (1.0, 2.0)).draw(np.random.default_rng(0), np.array([5, 5]), np.array([0, 2]))


@pytest.mark.parametrize(
    ("predicted", "match"), [([5], "shape"), ([0, 5], "row 0"), ([1.5, 2.0], "predicted_tokens"), ([2**31, 4], "predicted_tokens")]
)
def test_a_workload_refuses_other_predictions(predicted: list[float], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        Workload.of([0.0, 1.0], [5, 5], [5, 5], predicted_tokens=predicted)


def test_statistics_refuse_other_predictions() -> None:
    with pytest.raises(ConfigError, match=r"statistics\.predicted: shape"):
        LengthStatistics.of([5, 5], [5, 6], [1, 1], predicted=[5])
    with pytest.raises(ConfigError, match=r"statistics\.predicted: row 1"):
        LengthStatistics.of([5, 5], [5, 6], [1, 1], predicted=[5, 0])


def test_a_trace_may_have_predictions(tmp_path: Path) -> None:
    path = tmp_path / "requests.csv"
    path.write_text("arrived_at,prompt_tokens,output_tokens,predicted_tokens\n1.1,20,9,7\n1.0,10,5,6\n2.0,30,8,8\n")
    trace = read_trace(path)
    assert trace.predicted_tokens.tolist() == [6, 7, 8]
    scenario = scenario_from_trace(path, engine=EngineConfig.vllm())
    assert scenario.generate(0, num_requests=2).predicted_tokens.tolist() == [6, 7]
    assert scenario.statistics.predicted is not None
    path.write_text("arrived_at,prompt_tokens,output_tokens,predicted_tokens\n1.0,10,5,0\n")
    with pytest.raises(ConfigError, match=r"2: column 'predicted_tokens': value '0' must be a number of tokens >= 1"):
        read_trace(path)
    path.write_text("arrived_at,prompt_tokens,output_tokens\n1.0,10,5\n")
    assert read_trace(path).predicted_tokens is None


def test_a_scenario_file_may_have_a_predictor(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = '[lengths]\ntable = "azure-conv"\n[arrivals]\nrate = 5.0\n[layout]\nby = "predicted"\nedges = [100]\nprompt_edges = [500]\n'
    path.write_text(text + "[predictions]\nsigma = 0.4\nfactor = [1.2]\n")
    scenario = read_scenario(path)
    assert scenario.predictions == PredictionModel(0.4, (1.2,)) and scenario.layout.num_classes == 4
    assert scenario.generate(0, num_requests=3).predicted_tokens is not None
    path.write_text(text + "[predictions]\nsigma = -1\n")
    with pytest.raises(ConfigError, match=r"predictions\.sigma: -1"):
        read_scenario(path)
