"""Comparing policies on paired seeds: differences with intervals, interquartile means, performance profiles.

Every function resamples seeds, never single runs: the same seed gives every policy the same requests,
and what is drawn together must be drawn again together. Intervals are two-sided bootstrap intervals
(``scipy.stats.bootstrap``, bias-corrected and accelerated) from a fixed generator, so that the same
figures give the same intervals. Interquartile means and performance profiles are those of Agarwal et
al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import stats

from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray

Verdict = Literal["better", "equal", "worse", "undecided"]

RESAMPLES = 2_000
_SEED = 20_240_601
Statistic = Callable[[npt.NDArray[np.int64]], FloatArray]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval; ``low`` and ``high`` are NaN where one seed gives none."""

    value: float
    low: float
    high: float
    seeds: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap(statistic: Statistic, seeds: int, *, confidence: float = 0.95, resamples: int = RESAMPLES) -> Estimate:
    """A statistic of the seeds with its interval.

    Args:
        statistic: (..., S) int64 indices of seeds -> (...) float64.
        seeds: S.

    Raises:
        ConfigError: no seed, or ``confidence`` outside (0, 1).
    """
    if seeds < 1:
        raise ConfigError(f"seeds: {seeds}, must be >= 1")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence: {confidence}, must be in (0, 1)")
    index = np.arange(seeds)
    value = float(statistic(index))
    if seeds == 1 or not math.isfinite(value):
        return Estimate(value, math.nan, math.nan, seeds)

    def along(sample: npt.NDArray[np.int64], axis: int = -1) -> FloatArray:
        return statistic(np.moveaxis(sample.astype(np.int64), axis, -1))

    def run(method: str) -> tuple[float, float]:
        rng = np.random.default_rng(_SEED)
        with warnings.catch_warnings():
            # A statistic that is equal for every resample has an interval without width, not an error.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            warnings.simplefilter("ignore", RuntimeWarning)
            result = stats.bootstrap(
                (index,), along, n_resamples=resamples, confidence_level=confidence, method=method, vectorized=True, rng=rng
            )
        return float(result.confidence_interval.low), float(result.confidence_interval.high)

    low, high = run("BCa")
    if not (math.isfinite(low) and math.isfinite(high)):
        low, high = run("percentile")
    return Estimate(value, low, high, seeds)


def mean_of(values: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean over seeds of (S,) values; a NaN among them makes it NaN."""
    array = _vector("values", values)
    return bootstrap(lambda i: array[i].mean(axis=-1), array.size, confidence=confidence)


def relative_difference(ours: npt.ArrayLike, theirs: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """mean(ours) / mean(theirs) - 1 over paired seeds: -0.1 is 10 % lower.

    Args:
        ours, theirs: (S,) one metric of two policies on the same seeds, in the same order.

    Raises:
        ConfigError: different shapes, or no seed.
    """
    a, b = _vector("ours", ours), _vector("theirs", theirs)
    if a.shape != b.shape:
        raise ConfigError(f"ours, theirs: shapes {a.shape} and {b.shape}, must be equal: runs are paired by seed")
    if np.array_equal(a, b):
        return Estimate(0.0, 0.0, 0.0, a.size)
    return bootstrap(lambda i: _ratio(a[i].mean(axis=-1), b[i].mean(axis=-1)) - 1.0, a.size, confidence=confidence)


def verdict(difference: Estimate, *, lower_is_better: bool = True, margin: float = 0.0) -> Verdict:
    """What an interval of a difference says.

    ``better`` or ``worse`` where the whole interval lies beyond ``margin`` on that side, ``equal`` where
    it includes zero or stays within the margin; ``undecided`` without an interval.
    """
    if not (math.isfinite(difference.low) and math.isfinite(difference.high)):
        return "undecided"
    low, high = (difference.low, difference.high) if lower_is_better else (-difference.high, -difference.low)
    if high < -margin:
        return "better"
    return "worse" if low > margin else "equal"


def interquartile_mean(scores: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """Mean of the middle half of all runs, over cells and seeds.

    Args:
        scores: (cells, S), column s of every cell from the same seed.
    """
    array = _matrix(scores)

    def statistic(index: npt.NDArray[np.int64]) -> FloatArray:
        drawn = np.moveaxis(array[:, index], 0, -2)  # (..., cells, S)
        trimmed: FloatArray = stats.trim_mean(drawn.reshape(*drawn.shape[:-2], -1), 0.25, axis=-1)
        return trimmed

    return bootstrap(statistic, array.shape[1], confidence=confidence)


def share_of_gap(ours: npt.ArrayLike, reference: npt.ArrayLike, bound: npt.ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """How much of the gap between a reference and a bound is closed: (reference - ours) / (reference - bound), of sums over cells.

    Args:
        ours, reference, bound: (cells, S), one metric that is better when lower. Each cell is divided by
            its mean of the reference first, so that all cells count alike.

    Raises:
        ConfigError: different shapes.
    """
    a, r, o = _matrix(ours), _matrix(reference), _matrix(bound)
    if not a.shape == r.shape == o.shape:
        raise ConfigError(f"ours, reference, bound: shapes {a.shape}, {r.shape}, {o.shape} must be equal")
    scale = r.mean(axis=1, keepdims=True)
    closed, gap = ((r - a) / scale).sum(axis=0), ((r - o) / scale).sum(axis=0)
    return bootstrap(lambda i: _ratio(closed[i].mean(axis=-1), gap[i].mean(axis=-1)), a.shape[1], confidence=confidence)


@dataclass(frozen=True, slots=True)
class Profile:
    """Share of runs whose score reaches each threshold: (T,) arrays, the band by percentiles of resampled seeds."""

    thresholds: FloatArray
    share: FloatArray
    low: FloatArray
    high: FloatArray


def performance_profile(
    scores: npt.ArrayLike, thresholds: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 500
) -> Profile:
    """Share of runs with score >= threshold.

    Args:
        scores: (cells, S), higher is better; column s of every cell from the same seed. NaN counts as missed.
        thresholds: (T,).
    """
    array, levels = _matrix(scores), _vector("thresholds", thresholds)
    reached = (array[:, :, None] >= levels).mean(axis=0)  # (S, T)
    drawn = np.random.default_rng(_SEED).integers(array.shape[1], size=(resamples, array.shape[1]))
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(reached[drawn].mean(axis=1), (tail, 100.0 - tail), axis=0)
    return Profile(levels, reached.mean(axis=0), low, high)


def _ratio(a: FloatArray, b: FloatArray) -> FloatArray:
    zero = b == 0
    return np.where(zero, np.nan, a / np.where(zero, 1.0, b))


def _vector(name: str, values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ConfigError(f"{name}: shape {array.shape}, must be (n,) with n >= 1")
    return array


def _matrix(values: npt.ArrayLike) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ConfigError(f"scores: shape {array.shape}, must be (cells, seeds) with at least one of each")
    return array
