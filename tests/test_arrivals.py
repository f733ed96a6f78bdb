"""Arrival processes: rates, dispersion, determinism, invariants, refusals."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_env.errors import ConfigError
from llmsched_env.workload import MMPP2, ArrivalProcess, Gamma, PiecewiseConstant, Poisson, TraceArrivals

PROCESSES: list[ArrivalProcess] = [
    Poisson(4.0),
    Gamma(4.0, 0.5),
    Gamma(4.0, 3.0),
    MMPP2(1.0, 10.0, 20.0, 10.0),
    MMPP2(0.0, 12.0, 20.0, 10.0),
    PiecewiseConstant((10.0, 30.0, 5.0), (8.0, 1.0, 14.0)),
    PiecewiseConstant((10.0, 10.0), (0.0, 8.0)),
    TraceArrivals(np.array([0.0, 0.1, 0.1, 0.9, 1.0])),
]
# Index of dispersion of counts over long windows: 1, cv^2, and for MMPP-2 the formula of
# ``test_mmpp_phases_and_dispersion``. A whole cycle of a piecewise-constant rate adds none.
DISPERSION = [1.0, 0.25, 9.0, 61.0, 107.7, 1.0, 1.0, 0.0]
IDS = [type(p).__name__ + str(i) for i, p in enumerate(PROCESSES)]

rate = st.floats(0.01, 100.0)
seconds = st.floats(0.05, 200.0)
processes = st.one_of(
    st.builds(Poisson, rate),
    st.builds(Gamma, rate, st.floats(0.05, 20.0)),
    st.builds(lambda low, extra, a, b: MMPP2(low, low + extra, a, b), st.sampled_from([0.0, 0.3, 5.0]), rate, seconds, seconds),
    st.lists(st.tuples(seconds, st.sampled_from([0.0, 0.2, 3.0, 40.0])), min_size=1, max_size=5)
    .filter(lambda steps: any(r > 0 for _, r in steps))
    .map(lambda steps: PiecewiseConstant(tuple(d for d, _ in steps), tuple(r for _, r in steps))),
    st.lists(st.integers(0, 50_000), min_size=1, max_size=20).map(lambda v: TraceArrivals(np.sort(v) / 1000)),
)


@given(processes, st.integers(0, 300), st.integers(0, 2**32))
def test_sample_is_sorted_finite_and_as_long_as_asked(process: ArrivalProcess, n: int, seed: int) -> None:
    times = process.sample(np.random.default_rng(seed), n)
    assert times.shape == (n,) and times.dtype == np.float64
    assert np.all(np.isfinite(times)) and np.all(times >= 0) and np.all(np.diff(times) >= 0)
    assert times.tobytes() == process.sample(np.random.default_rng(seed), n).tobytes()


@given(processes, st.floats(0.01, 100.0), st.integers(0, 2**32))
@settings(max_examples=50)
def test_sample_until_stays_within_the_horizon(process: ArrivalProcess, horizon: float, seed: int) -> None:
    times = process.sample_until(np.random.default_rng(seed), horizon)
    assert times.dtype == np.float64 and np.all(times >= 0) and np.all(times <= horizon) and np.all(np.diff(times) >= 0)
    assert times.tobytes() == process.sample_until(np.random.default_rng(seed), horizon).tobytes()


@given(processes, rate)
def test_with_rate_sets_the_mean_rate(process: ArrivalProcess, target: float) -> None:
    if isinstance(process, TraceArrivals) and process.times[-1] == process.times[0]:
        with pytest.raises(ConfigError, match="fewer than two distinct times"):
            process.with_rate(process.rate * 2)
        return
    assert process.with_rate(target).rate == pytest.approx(target)
    assert type(process.with_rate(target)) is type(process)


@pytest.mark.parametrize(("process", "dispersion"), list(zip(PROCESSES, DISPERSION, strict=True)), ids=IDS)
def test_mean_rate(process: ArrivalProcess, dispersion: float) -> None:
    assert process.rate == pytest.approx(4.0)
    n = 200_000
    # Four standard errors of the count, and one cycle (45 s at most) cut short.
    tolerance = 4 * math.sqrt(dispersion / n) + 45.0 * 4.0 / n
    times = process.sample(np.random.default_rng(0), n)
    assert n / times[-1] == pytest.approx(4.0, rel=tolerance)
    until = process.sample_until(np.random.default_rng(1), n / 4.0)
    assert until.size == pytest.approx(n, rel=tolerance)


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(Poisson(2.0).sample(np.random.default_rng(3), 100_000), prepend=0.0)
    assert gaps.mean() == pytest.approx(0.5, rel=0.01)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.02)
    for q in (0.1, 0.5, 0.9, 0.99):
        assert np.quantile(gaps, q) == pytest.approx(-math.log(1 - q) * 0.5, rel=0.03)


@pytest.mark.parametrize("cv", [0.3, 1.0, 4.0])
def test_gamma_gap_cv(cv: float) -> None:
    gaps = np.diff(Gamma(5.0, cv).sample(np.random.default_rng(4), 400_000), prepend=0.0)
    assert gaps.mean() == pytest.approx(0.2, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.03)


@pytest.mark.parametrize("process", [Poisson(4.0), Gamma(4.0, 3.0), MMPP2(1.0, 10.0, 2.0, 1.0), PiecewiseConstant((1.0, 2.0), (8.0, 2.0))])
def test_counts_until_a_horizon_are_distributed_as_in_a_sample(process: ArrivalProcess) -> None:
    """The two ways to draw agree: mean and variance of the count in [0, 5], 3,000 draws each."""
    first = np.array([np.searchsorted(process.sample(np.random.default_rng([i, 0]), 250), 5.0, side="right") for i in range(3000)])
    second = np.array([process.sample_until(np.random.default_rng([i, 1]), 5.0).size for i in range(3000)])
    assert first.max() < 250
    error = math.sqrt((first.var() + second.var()) / 3000)
    assert abs(first.mean() - second.mean()) < 4 * error
    assert first.var() / second.var() == pytest.approx(1.0, abs=0.2)


def test_mmpp_phases_and_dispersion() -> None:
    """Long windows: variance over mean of counts is 1 + 2 (r1 - r2)^2 p1 p2 / ((s1 + s2) rate) (Fischer, Meier-Hellstern 1993)."""
    process = MMPP2(1.0, 10.0, 4.0, 2.0)
    times = process.sample(np.random.default_rng(5), 400_000)
    window = 200.0
    counts = np.histogram(times, np.arange(0.0, times[-1], window))[0]
    s1, s2 = 1 / 4.0, 1 / 2.0
    p1, p2 = s2 / (s1 + s2), s1 / (s1 + s2)
    expected = 1 + 2 * (1.0 - 10.0) ** 2 * p1 * p2 / ((s1 + s2) * process.rate)
    assert counts.var() / counts.mean() == pytest.approx(expected, rel=0.15)


def test_mmpp_starts_in_its_stationary_phase() -> None:
    process = MMPP2(0.0, 9.0, 20.0, 10.0)
    early = [process.sample_until(np.random.default_rng(i), 1.0).size for i in range(3000)]
    assert np.mean(early) == pytest.approx(process.rate, rel=0.1)


def test_piecewise_constant_follows_its_steps_over_cycles() -> None:
    process = PiecewiseConstant((10.0, 30.0, 5.0), (8.0, 0.0, 14.0))
    times = process.sample_until(np.random.default_rng(6), 45.0 * 400)
    phase = np.mod(times, 45.0)
    counts = np.histogram(phase, [0.0, 10.0, 40.0, 45.0])[0] / 400
    assert counts[1] == 0
    assert counts[[0, 2]] == pytest.approx([80.0, 70.0], rel=0.03)


def test_piecewise_scaling_keeps_the_shape() -> None:
    process = PiecewiseConstant((1.0, 3.0), (6.0, 2.0)).with_rate(6.0)
    assert process.rates == pytest.approx((12.0, 4.0)) and process.durations == (1.0, 3.0)


def test_trace_replays_repeats_and_rescales() -> None:
    recorded = np.array([0.5, 1.0, 1.0, 2.0, 4.5])
    trace = TraceArrivals(recorded)
    rng = np.random.default_rng(0)
    state = rng.bit_generator.state
    assert trace.rate == 1.0
    assert trace.sample(rng, 3).tolist() == [0.5, 1.0, 1.0]
    assert trace.sample(rng, 7).tolist() == [0.5, 1.0, 1.0, 2.0, 4.5, 5.5, 6.0]
    assert trace.sample_until(rng, 2.0).tolist() == [0.5, 1.0, 1.0, 2.0]
    assert trace.sample_until(rng, 5.5).tolist() == [0.5, 1.0, 1.0, 2.0, 4.5, 5.5]
    assert trace.with_rate(4.0).times.tolist() == (recorded / 4).tolist()
    assert trace.with_rate(1.0).times.tobytes() == recorded.tobytes()
    assert rng.bit_generator.state == state, "a replay is not random"
    recorded[0] = 9.0
    assert trace.times[0] == 0.5, "the trace keeps a copy"
    with pytest.raises(ValueError, match="read-only"):
        trace.times[0] = 1.0


def test_a_single_burst_has_a_rate_by_convention() -> None:
    assert TraceArrivals(np.zeros(3)).rate == 3.0
    assert TraceArrivals(np.array([2.0])).sample(np.random.default_rng(0), 2).tolist() == [2.0, 3.0]


BAD = [math.nan, math.inf, -math.inf, 0.0, -1.0, "4", None, True]


@pytest.mark.parametrize("bad", BAD, ids=repr)
def test_bad_rates_are_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match=r"arrivals\.rate"):
        Poisson(bad)
    with pytest.raises(ConfigError, match=r"arrivals\.rate"):
        Gamma(bad, 1.0)
    with pytest.raises(ConfigError, match=r"arrivals\.cv"):
        Gamma(1.0, bad)
    with pytest.raises(ConfigError, match=r"arrivals\.durations\[0\]"):
        PiecewiseConstant((bad,), (1.0,))
    with pytest.raises(ConfigError, match=r"arrivals\.mean_low_seconds"):
        MMPP2(1.0, 2.0, bad, 1.0)
    for process in PROCESSES:
        with pytest.raises(ConfigError, match=r"arrivals\.rate"):
            process.with_rate(bad)
        with pytest.raises(ConfigError, match="horizon"):
            process.sample_until(np.random.default_rng(0), bad)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MMPP2(-1.0, 2.0, 1.0, 1.0), r"arrivals\.rate_low: -1\.0"),
        (lambda: MMPP2(math.nan, 2.0, 1.0, 1.0), r"arrivals\.rate_low: nan"),
        (lambda: MMPP2(3.0, 2.0, 1.0, 1.0), r"arrivals\.rate_high: 2\.0, must be >= rate_low"),
        (lambda: MMPP2(0.0, 0.0, 1.0, 1.0), r"arrivals\.rate_high: 0\.0"),
        (lambda: PiecewiseConstant((1.0,), (-2.0,)), r"arrivals\.rates\[0\]: -2\.0"),
        (lambda: PiecewiseConstant((1.0, 1.0), (0.0, 0.0)), r"arrivals\.rate"),
        (lambda: PiecewiseConstant((1.0,), (1.0, 2.0)), "2 rates for 1 durations"),
        (lambda: PiecewiseConstant((), ()), "0 rates"),
        (lambda: TraceArrivals(np.array([])), "not empty"),
        (lambda: TraceArrivals(np.array([0.0, 2.0, 1.0])), r"entry 2 is 1\.0 after 2\.0"),
        (lambda: TraceArrivals(np.array([0.0, math.nan])), "entry 1 is nan"),
        (lambda: TraceArrivals(np.array([-1.0, 0.0])), r"entry 0 is -1\.0"),
        (lambda: Poisson(1e9).sample_until(np.random.default_rng(0), 1e6), r"horizon: 1000000\.0 s at 1e\+09 requests/s"),
        (lambda: TraceArrivals(np.array([0.0, 1e-38])).sample_until(np.random.default_rng(0), 1.0), r"horizon: 1\.0 s at 1e\+38"),
        (lambda: Poisson(1.0).sample(np.random.default_rng(0), -1), "num_requests: -1"),
    ],
)
def test_refusals_name_field_and_value(build: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build()
