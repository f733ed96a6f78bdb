"""Metrics against figures worked out by hand, and the edges: nothing completed, single tokens, warm-up."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from llmsched_env.backend import Counters
from llmsched_env.errors import ConfigError, MissingExtraError
from llmsched_env.metrics import jain_index, latency, lost, mean_interval, normalized_latency, summarize, tpot, ttft
from llmsched_env.reward import SloGoodputReward
from llmsched_env.types import RequestLog

NAN = math.nan


def make_log(rows: list[tuple[float, int, float, float]], rejected: tuple[int, ...] = ()) -> RequestLog:
    """Rows of (arrival, output tokens, first token, completed)."""
    arrival, output, first, completed = (np.array(column) for column in zip(*rows, strict=True)) if rows else (np.empty(0),) * 4
    n = len(rows)
    flags = np.zeros(n, dtype=bool)
    flags[list(rejected)] = True
    zeros = np.zeros(n, np.int32)
    return RequestLog(
        arrival=arrival.astype(float),
        prompt_tokens=np.full(n, 10, np.int32),
        output_tokens=output.astype(np.int32),
        class_id=zeros,
        admitted=first.astype(float),
        first_token=first.astype(float),
        completed=completed.astype(float),
        evictions=zeros,
        forced_evictions=zeros,
        rejected=flags,
    )


def make_counters(**changes: object) -> Counters:
    base = Counters(
        clock=10.0,
        iterations=7,
        idle_steps=2,
        drain_iterations=1,
        evictions=5,
        forced_evictions=3,
        kv_seconds=250.0,
        kv_peak=80,
        busy_seconds=9.0,
        system_seconds=12.0,
        finished=3,
        rejected=1,
        end="finished",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


# arrival, output, first token, completed -> ttft, latency, tpot
LOG = make_log(
    [
        (0.0, 5, 0.5, 2.5),  # .5, 2.5, .5
        (1.0, 1, 1.5, 1.5),  # .5, .5, none
        (2.0, 3, 5.0, 6.0),  # 3, 4, .5
        (4.0, 9, 4.5, NAN),  # first token out, cut off
        (5.0, 9, NAN, NAN),  # rejected
    ],
    rejected=(4,),
)


def test_metrics_of_requests_are_those_of_the_definitions() -> None:
    np.testing.assert_allclose(ttft(LOG), [0.5, 0.5, 3.0, 0.5, NAN])
    np.testing.assert_allclose(latency(LOG), [2.5, 0.5, 4.0, NAN, NAN])
    np.testing.assert_allclose(tpot(LOG), [0.5, NAN, 0.5, NAN, NAN])
    np.testing.assert_allclose(normalized_latency(LOG), [0.5, 0.5, 4 / 3, NAN, NAN])
    np.testing.assert_array_equal(lost(LOG), [False, False, False, True, False])


def test_summary_by_hand() -> None:
    s = summarize(LOG, make_counters(), kv_capacity=100, ttft_limit=1.0, tpot_limit=0.6)
    assert (s.requests, s.completed, s.rejected) == (5, 3, 1)
    assert s.throughput_tok_s == pytest.approx((5 + 1 + 3) / 10)
    assert s.throughput_req_s == pytest.approx(3 / 10)
    assert s.latency_mean == pytest.approx((2.5 + 0.5 + 4.0) / 3)
    assert s.latency_p50 == pytest.approx(2.5)
    assert s.latency_p95 == pytest.approx(2.5 + 0.9 * 1.5)
    assert s.latency_p99 == pytest.approx(2.5 + 0.98 * 1.5)
    assert s.latency_max == 4.0
    assert s.slowdown_jain == pytest.approx((0.5 + 0.5 + 4 / 3) ** 2 / (3 * (0.25 + 0.25 + 16 / 9)))
    assert s.ttft_mean == pytest.approx((0.5 + 0.5 + 3.0 + 0.5) / 4)
    assert s.tpot_mean == pytest.approx(0.5)
    assert s.slo_goodput == pytest.approx(2 / 5)
    assert (s.evictions, s.forced_evictions, s.iterations, s.idle_steps, s.drain_iterations) == (5, 3, 7, 2, 1)
    assert s.kv_mean == pytest.approx(250 / (10 * 100))
    assert s.kv_max == pytest.approx(0.8)
    assert s.sim_seconds == 10.0
    assert not s.truncated


def test_jain_index_of_known_cases() -> None:
    assert jain_index(np.full(7, 0.3)) == pytest.approx(1.0)
    assert jain_index(np.array([0.0, 0.0, 0.0, 5.0])) == pytest.approx(1 / 4)
    # the example of the report: k of n users share equally, the others have nothing: k / n
    assert jain_index(np.array([1.0, 1.0, 0.0, 0.0, 0.0])) == pytest.approx(2 / 5)
    assert jain_index(np.zeros(3)) == 1.0
    assert math.isnan(jain_index(np.array([NAN])))


@given(hs.lists(hs.just(0.0) | hs.floats(1e-100, 1e100), min_size=1, max_size=30), hs.floats(1e-6, 1e6))
def test_jain_index_lies_between_its_bounds_in_any_unit(values: list[float], unit: float) -> None:
    index = jain_index(np.array(values))
    assert 1 / len(values) - 1e-12 <= index <= 1 + 1e-12
    assert jain_index(np.array(values) * unit) == pytest.approx(index)


def test_slo_limits_bind_separately_and_default_to_the_reward() -> None:
    assert summarize(LOG, make_counters(), kv_capacity=1, ttft_limit=3.0, tpot_limit=0.5).slo_goodput == pytest.approx(3 / 5)
    assert summarize(LOG, make_counters(), kv_capacity=1, ttft_limit=3.0, tpot_limit=0.4).slo_goodput == pytest.approx(1 / 5)
    reward = SloGoodputReward()
    given_limits = summarize(LOG, make_counters(), kv_capacity=1, ttft_limit=reward.ttft, tpot_limit=reward.tpot)
    assert summarize(LOG, make_counters(), kv_capacity=1).slo_goodput == given_limits.slo_goodput


def test_warmup_leaves_early_arrivals_out_and_shortens_the_window() -> None:
    s = summarize(LOG, make_counters(), kv_capacity=100, warmup=2.0)
    assert (s.requests, s.completed, s.rejected) == (3, 1, 1)
    assert s.latency_mean == pytest.approx(4.0)
    # the first request completes at 2.5 s, inside the window, although it arrived before it
    assert s.throughput_tok_s == pytest.approx((5 + 3) / 8)
    assert s.evictions == 5


def test_nothing_completed_is_nan_and_not_zero() -> None:
    s = summarize(make_log([(0.0, 4, NAN, NAN)]), make_counters(end="horizon"), kv_capacity=100)
    assert s.completed == 0
    assert s.throughput_tok_s == 0.0
    assert math.isnan(s.latency_max) and math.isnan(s.slowdown_jain)
    assert math.isnan(s.latency_mean) and math.isnan(s.ttft_p99) and math.isnan(s.tpot_p50)
    assert s.slo_goodput == 0.0


def test_no_request_and_no_time() -> None:
    s = summarize(make_log([]), make_counters(clock=0.0, kv_seconds=0.0), kv_capacity=100)
    assert s.requests == 0
    assert math.isnan(s.slo_goodput) and math.isnan(s.throughput_tok_s) and math.isnan(s.kv_mean)


def test_safety_net_is_told() -> None:
    assert summarize(LOG, make_counters(end="max_iterations"), kv_capacity=100).truncated


def test_as_dict_holds_every_number() -> None:
    s = summarize(LOG, make_counters(), kv_capacity=100)
    numbers = s.as_dict()
    assert [f.name for f in dataclasses.fields(s) if f.name != "end"] == list(numbers)
    assert all(isinstance(float(value), float) for value in numbers.values())


@pytest.mark.parametrize("warmup", [-1.0, NAN, math.inf])
def test_bad_warmup_is_refused(warmup: float) -> None:
    with pytest.raises(ConfigError, match="warmup"):
        summarize(LOG, make_counters(), kv_capacity=100, warmup=warmup)


@pytest.mark.parametrize("limits", [{"ttft_limit": 0.0}, {"tpot_limit": NAN}])
def test_bad_limits_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(limits))):
        summarize(LOG, make_counters(), kv_capacity=100, **limits)


def test_interval_of_a_textbook_sample() -> None:
    # n = 5, mean 3, s = sqrt(2.5); t quantile .975 with 4 degrees of freedom is 2.776 (any t table)
    interval = mean_interval([1, 2, 3, 4, 5])
    assert (interval.mean, interval.n) == (3.0, 5)
    assert interval.half_width == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-4)
    assert interval.low + interval.high == pytest.approx(6.0)


def test_interval_of_one_value_and_of_nan() -> None:
    one = mean_interval([2.0])
    assert one.mean == 2.0 and math.isnan(one.half_width)
    assert math.isnan(mean_interval([1.0, NAN]).mean)


@given(hs.lists(hs.floats(-1e6, 1e6), min_size=2, max_size=30), hs.sampled_from([0.5, 0.9, 0.99]))
def test_wider_confidence_gives_wider_intervals(values: list[float], confidence: float) -> None:
    narrow, wide = mean_interval(values, confidence), mean_interval(values, 0.999)
    assert narrow.low <= narrow.mean <= narrow.high
    assert wide.low <= narrow.low and narrow.high <= wide.high


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]]])
def test_interval_refuses_no_values(values: list[float]) -> None:
    with pytest.raises(ConfigError, match="values"):
        mean_interval(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_interval_refuses_confidence_outside_0_1(confidence: float) -> None:
    with pytest.raises(ConfigError, match="confidence"):
        mean_interval([1.0, 2.0], confidence)


def test_interval_without_scipy_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(MissingExtraError, match=r"\[cli\]"):
        mean_interval([1.0, 2.0])
