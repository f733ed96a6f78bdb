"""Machine work of requests: the fit of a linear batch, whom the fixed part is charged to, and layouts by work."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.perf import FormulaTime, load_calibration
from llmsched_env.types import LengthStatistics, QueueLayout
from llmsched_env.work import WorkWeights, expected_work, kv_of_a_resident, linear_batch, memory_binds, seats, work_weights

STATISTICS = LengthStatistics.of([100, 300], [50, 20], [1, 1])
# d0 = 10 ms, 50 us a token of the batch, 1 us a token of decode context, 30 us a decode besides.
PLANE = FormulaTime(a=0.010, b=5e-5, s=0.010, c=5e-5, d1=1e-6, d2=0.0, d3=0.0, d4=3e-5)


def test_work_is_that_of_each_token() -> None:
    weights = WorkWeights(c=2.0, w0=3.0, w1=0.5)
    # 10 prompt tokens, 4 output tokens over contexts 10, 11, 12, 13 and half a token on average.
    assert float(weights.of(10, 4)) == 2 * 10 + 3 * 4 + 0.5 * (4 * 10 + 4 * 4 / 2)
    np.testing.assert_allclose(weights.of([10, 1], [4, 1]), [56.0, 2 + 3 + 0.5 * 1.5])


@pytest.mark.parametrize("wrong", [{"c": -1.0}, {"w0": float("nan")}, {"w1": float("inf")}, {"c": 0.0, "w0": 0.0, "w1": 0.0}])
def test_weights_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="work"):
        WorkWeights(**{"c": 1.0, "w0": 1.0, "w1": 1.0, **wrong})


def test_a_model_that_is_linear_is_found_exactly() -> None:
    engine = EngineConfig.vllm(time_model=PLANE, num_blocks=1_000, max_num_seqs=64)
    fit = linear_batch(engine, STATISTICS)
    np.testing.assert_allclose([fit.d0, fit.c, fit.b, fit.w1], [0.010, 5e-5, 8e-5, 1e-6], rtol=1e-6)
    assert fit.error < 1e-9


def test_the_papers_model_has_its_two_coefficients() -> None:
    engine = EngineConfig.paper(4_000, 1.0, 1e-3)
    fit = linear_batch(engine, STATISTICS)
    np.testing.assert_allclose([fit.d0, fit.c, fit.b, fit.w1], [1.0, 1e-3, 0.0, 1e-3], rtol=1e-6, atol=1e-9)
    assert memory_binds(engine, STATISTICS)


@pytest.mark.parametrize("name", ["a100-llama2-7b-vllm", "a100-llama2-7b-c10", "a100-llama3-8b-vllm", "rtx4090-llama31-8b-vllm"])
def test_calibrations_are_near_a_linear_batch(name: str) -> None:
    fit = linear_batch(EngineConfig.vllm(time_model=load_calibration(name), num_blocks=2_560), STATISTICS)
    assert fit.d0 > 0 and fit.c > 0 and fit.w1 > 0
    assert fit.error < 0.1


def test_the_fixed_part_goes_to_what_binds() -> None:
    assert kv_of_a_resident(STATISTICS) == pytest.approx((50 * 125 + 20 * 310) / 70)
    few_seats = EngineConfig.vllm(time_model=PLANE, num_blocks=1_000, max_num_seqs=8)
    assert seats(few_seats, STATISTICS) == 8 and not memory_binds(few_seats, STATISTICS)
    weights = work_weights(few_seats, STATISTICS)
    np.testing.assert_allclose([weights.c, weights.w0, weights.w1], [5e-5, 8e-5 + 0.010 / 8, 1e-6], rtol=1e-6)
    many = EngineConfig.vllm(time_model=PLANE, num_blocks=1_000, max_num_seqs=256)
    assert memory_binds(many, STATISTICS)
    weights = work_weights(many, STATISTICS)
    np.testing.assert_allclose([weights.c, weights.w0, weights.w1], [5e-5, 8e-5, 1e-6 + 0.010 / 16_000], rtol=1e-6)
    half = work_weights(many, STATISTICS, 0.5)
    np.testing.assert_allclose([half.w0, half.w1], [8e-5 + 0.005 / 256, 1e-6 + 0.005 / 16_000], rtol=1e-6)
    with pytest.raises(ConfigError, match="memory_share"):
        work_weights(many, STATISTICS, 1.5)


def test_a_full_machine_works_off_its_seconds() -> None:
    """n requests of one size that fill the memory all the time: their works add up to the seconds of the iterations."""
    engine = EngineConfig.vllm(time_model=PLANE, num_blocks=1_000, max_num_seqs=1_000, max_num_batched_tokens=10_000)
    prompt, output = 200.0, 100.0
    one = LengthStatistics.of([prompt], [output], [1.0])
    weights = work_weights(engine, one, 1.0)
    residents = engine.kv_capacity_tokens / (prompt + output / 2)
    # In steady state residents / output requests begin and end in each iteration.
    seconds = 0.010 + 5e-5 * (residents + residents / output * prompt) + 3e-5 * residents + 1e-6 * engine.kv_capacity_tokens
    assert float(weights.of(prompt, output)) * residents / output == pytest.approx(seconds, rel=1e-9)


def test_expected_work_is_that_of_the_classes() -> None:
    layout, weights = QueueLayout("prompt", (200,)), WorkWeights(1.0, 2.0, 0.1)
    found = expected_work(STATISTICS, layout, weights)
    of = weights.of(STATISTICS.prompt, STATISTICS.output)
    np.testing.assert_allclose(found, 0.95 * of + 0.05 * of.mean(), rtol=1e-3)


@given(hs.integers(1, 5_000), hs.integers(1, 5_000))
def test_a_layout_by_work_classifies_as_the_weights_say(prompt: int, output: int) -> None:
    weights = WorkWeights(5e-5, 1e-4, 1e-6)
    layout = QueueLayout("work", (1_000, 20_000, 300_000), weights=(weights.c, weights.w0, weights.w1))
    micros = 1e6 * float(weights.of(prompt, output))
    expected = sum(micros > edge for edge in layout.edges)
    assert int(layout.classify([prompt], [output], [0])[0]) == expected
    assert layout.reveals_output_length and layout.num_classes == 4


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"by": "work", "edges": (5,)}, "layout.weights"),
        ({"by": "work", "weights": (1.0, 2.0)}, "layout.weights"),
        ({"by": "work", "weights": (1.0, 2.0, -1.0)}, "layout.weights"),
        ({"by": "prompt", "edges": (5,), "weights": (1.0, 2.0, 1.0)}, "layout.weights"),
    ],
)
def test_layouts_by_work_are_checked(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        QueueLayout(**fields)  # type: ignore[arg-type]
