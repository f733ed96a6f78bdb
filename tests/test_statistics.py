"""Statistics of paired comparisons, against scipy and numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmsched_agents.statistics import (
    Estimate,
    bootstrap,
    interquartile_mean,
    mean_of,
    performance_profile,
    relative_difference,
    share_of_gap,
    verdict,
)
from llmsched_env.errors import ConfigError

RNG = np.random.default_rng(7)


def test_the_interval_of_a_mean_is_scipys() -> None:
    values = RNG.lognormal(size=20)
    ours = mean_of(values)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1)).confidence_interval
    assert ours.value == pytest.approx(values.mean(), rel=1e-12)
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width
    assert abs(ours.high - theirs.high) < 0.05 * width
    assert mean_of(values) == ours, "the same figures give the same interval"


def test_a_paired_difference_is_a_ratio_of_means() -> None:
    d = relative_difference([9.0, 18.0], [10.0, 20.0])
    assert d.value == pytest.approx(27.0 / 30.0 - 1.0)
    # Both pairs have the same ratio: whatever is drawn, the difference is the same.
    assert d.low == pytest.approx(-0.1)
    assert d.high == pytest.approx(-0.1)
    assert d.excludes_zero


def test_pairing_removes_what_the_seeds_share() -> None:
    common = RNG.lognormal(sigma=1.0, size=20)
    ours, theirs = 0.95 * common * (1 + 0.01 * RNG.standard_normal(20)), common
    paired = relative_difference(ours, theirs)
    shuffled = relative_difference(ours, RNG.permutation(theirs))
    assert paired.high < 0
    assert paired.high - paired.low < 0.1 * (shuffled.high - shuffled.low)


def test_equal_figures_differ_by_nothing() -> None:
    assert relative_difference([3.0, 4.0, 5.0], [3.0, 4.0, 5.0]) == Estimate(0.0, 0.0, 0.0, 3)


def test_the_interval_covers_the_truth() -> None:
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        theirs = rng.gamma(4.0, size=20)
        ours = theirs * 0.9 + 0.2 * rng.standard_normal(20)
        d = relative_difference(ours, theirs)
        hits += d.low <= -0.1 <= d.high
    assert 0.87 <= hits / 200 <= 0.99


@pytest.mark.parametrize(
    ("low", "high", "margin", "expected"),
    [
        (-0.2, -0.1, 0.0, "better"),
        (0.1, 0.2, 0.0, "worse"),
        (-0.1, 0.1, 0.0, "equal"),
        (0.005, 0.015, 0.02, "equal"),
        (0.021, 0.03, 0.02, "worse"),
        (math.nan, math.nan, 0.0, "undecided"),
    ],
)
def test_verdicts(low: float, high: float, margin: float, expected: str) -> None:
    estimate = Estimate((low + high) / 2, low, high, 20)
    assert verdict(estimate, margin=margin) == expected
    mirrored = Estimate(-(low + high) / 2, -high, -low, 20)
    assert verdict(mirrored, margin=margin, lower_is_better=False) == expected


def test_one_seed_has_no_interval() -> None:
    d = relative_difference([1.0], [2.0])
    assert d.value == -0.5
    assert math.isnan(d.low) and math.isnan(d.high)
    assert not d.excludes_zero


def test_a_missing_figure_is_not_passed_over() -> None:
    assert math.isnan(mean_of([1.0, math.nan, 2.0]).value)
    assert math.isnan(relative_difference([1.0, math.nan], [1.0, 2.0]).value)


def test_the_interquartile_mean_is_of_the_middle_half() -> None:
    scores = np.arange(16.0).reshape(4, 4)
    assert interquartile_mean(scores).value == pytest.approx(np.arange(4, 12).mean())
    assert interquartile_mean(scores).value == pytest.approx(stats.trim_mean(scores.ravel(), 0.25))
    # A run that went wrong does not move it as it moves the mean.
    spoilt = scores.copy()
    spoilt[3, 3] = 1e9
    assert interquartile_mean(spoilt).value == pytest.approx(interquartile_mean(scores).value)


def test_seeds_are_drawn_together_for_all_cells() -> None:
    # What one cell gains on a seed another loses: the sum is the same for every set of seeds.
    first = RNG.standard_normal(12)
    joint = bootstrap(lambda i: np.stack([first, -first])[:, i].sum(axis=0).mean(axis=-1), 12)
    assert joint.value == pytest.approx(0.0, abs=1e-12)
    assert joint.high - joint.low == pytest.approx(0.0, abs=1e-12)


def test_the_share_of_a_gap() -> None:
    reference, bound = np.array([[10.0, 20.0], [1.0, 1.0]]), np.array([[6.0, 12.0], [0.5, 0.5]])
    ours = reference - 0.25 * (reference - bound)
    assert share_of_gap(ours, reference, bound).value == pytest.approx(0.25)
    assert share_of_gap(reference, reference, bound).value == pytest.approx(0.0)
    assert share_of_gap(bound, reference, bound).value == pytest.approx(1.0)
    assert math.isnan(share_of_gap(ours, reference, reference).value), "no gap, no share"


def test_a_performance_profile() -> None:
    scores = np.array([[1.0, 2.0, 3.0, np.nan], [0.5, 2.0, 2.0, 4.0]])
    profile = performance_profile(scores, [0.0, 1.0, 2.0, 3.5, 5.0])
    np.testing.assert_allclose(profile.share, [7 / 8, 6 / 8, 5 / 8, 1 / 8, 0.0])
    assert np.all(profile.low <= profile.share) and np.all(profile.share <= profile.high)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.1, 100.0), min_size=2, max_size=8), st.integers(-5, 5))
def test_a_difference_does_not_depend_on_the_unit(values: list[float], power: int) -> None:
    unit = 2.0**power  # rounds nothing
    theirs = np.arange(1.0, len(values) + 1)
    one, two = relative_difference(values, theirs), relative_difference(np.multiply(values, unit), theirs * unit)
    np.testing.assert_allclose([one.value, one.low, one.high], [two.value, two.low, two.high], rtol=1e-12)


@pytest.mark.parametrize(
    "call",
    [
        lambda: relative_difference([1.0, 2.0], [1.0]),
        lambda: relative_difference([], []),
        lambda: mean_of([1.0], confidence=1.0),
        lambda: interquartile_mean([1.0, 2.0]),
        lambda: share_of_gap([[1.0]], [[1.0, 2.0]], [[1.0]]),
        lambda: bootstrap(lambda i: i.mean(axis=-1), 0),
    ],
)
def test_bad_input_is_refused(call: object) -> None:
    with pytest.raises(ConfigError):
        call()  # type: ignore[operator]
