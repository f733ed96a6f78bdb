"""Arrival processes: when requests reach the server.

Every process is a small frozen record. It samples whole arrays at once and consumes nothing but the
generator it is given, so that the same seed yields the same bytes. Times are float64 seconds from
the start of the episode, non-decreasing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray

MAX_ARRIVALS = 2**30


def check_positive(name: str, value: Any, unit: str) -> float:
    """``value`` as a float, or ``ConfigError`` unless it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise ConfigError(f"{name}: {value!r}, must be a number of {unit} > 0")
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}: {value}, must be finite and > 0 {unit}")
    return float(value)


def check_count(name: str, value: Any, low: int = 0) -> int:
    """``value`` as an int, or ``ConfigError`` unless it is an integer >= ``low``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= 2**30:
        raise ConfigError(f"{name}: {value!r}, must be an integer from {low} to 2**30")
    return int(value)


class ArrivalProcess(ABC):
    """A random (or recorded) sequence of arrival times."""

    @property
    @abstractmethod
    def rate(self) -> float:
        """Long-run mean rate, requests per second."""

    @abstractmethod
    def with_rate(self, rate: float) -> ArrivalProcess:
        """The same shape at another mean rate. Raises ``ConfigError`` unless ``rate`` is finite and > 0."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, num_requests: int) -> FloatArray:
        """The first ``num_requests`` arrivals: (num_requests,) float64 seconds, non-decreasing."""

    @abstractmethod
    def sample_until(self, rng: np.random.Generator, horizon: float) -> FloatArray:
        """All arrivals in [0, ``horizon``]: (n,) float64 seconds, non-decreasing; n is random.

        Raises ``ConfigError`` unless ``horizon`` is finite, > 0 and holds at most 2**30 arrivals on average.
        """

    def _end(self, horizon: float) -> float:
        end = check_positive("horizon", horizon, "seconds")
        if not end * self.rate <= MAX_ARRIVALS:
            raise ConfigError(f"horizon: {horizon} s at {self.rate:g} requests/s, must be at most 2**30 requests")
        return end


class _Renewal(ArrivalProcess):
    """Independent, identically distributed gaps; the first arrival comes one gap after 0."""

    @abstractmethod
    def _gaps(self, rng: np.random.Generator, count: int) -> FloatArray: ...

    def sample(self, rng: np.random.Generator, num_requests: int) -> FloatArray:
        return np.cumsum(self._gaps(rng, check_count("num_requests", num_requests)))

    def sample_until(self, rng: np.random.Generator, horizon: float) -> FloatArray:
        end = self._end(horizon)
        chunks: list[FloatArray] = []
        last = 0.0
        while last <= end:
            # Gaps are appended, never redrawn: redrawing a block that came out too short would
            # condition the process on being fast.
            expected = (end - last) * self.rate
            times = last + np.cumsum(self._gaps(rng, int(expected + 4.0 * math.sqrt(expected)) + 16))
            chunks.append(times)
            last = float(times[-1])
        times = np.concatenate(chunks)
        return times[: int(np.searchsorted(times, end, side="right"))]


@dataclass(frozen=True, slots=True)
class Poisson(_Renewal):
    """Poisson process: exponential gaps, CV 1.

    Attributes:
        rate: mean rate, requests/s, > 0.
    """

    rate: float = field()  # the explicit field keeps the inherited property from becoming a default

    def __post_init__(self) -> None:
        check_positive("arrivals.rate", self.rate, "requests/s")

    def with_rate(self, rate: float) -> Poisson:
        return Poisson(rate)

    def _gaps(self, rng: np.random.Generator, count: int) -> FloatArray:
        return rng.standard_exponential(count) / self.rate


@dataclass(frozen=True, slots=True)
class Gamma(_Renewal):
    """Renewal process with Gamma gaps: shape 1/cv**2, scale cv**2/rate.

    CV 1 is Poisson, above 1 bursty, below 1 regular. At a large CV the realised rate of n requests
    scatters by about cv/sqrt(n).

    Attributes:
        rate: mean rate, requests/s, > 0.
        cv: standard deviation of the gap over its mean, > 0.
    """

    rate: float = field()
    cv: float

    def __post_init__(self) -> None:
        check_positive("arrivals.rate", self.rate, "requests/s")
        cv = check_positive("arrivals.cv", self.cv, "(gap CV)")
        if not (cv**2 > 0 and math.isfinite(cv**2)):
            raise ConfigError(f"arrivals.cv: {self.cv}, cv**2 must be finite and > 0")

    def with_rate(self, rate: float) -> Gamma:
        return Gamma(rate, self.cv)

    def _gaps(self, rng: np.random.Generator, count: int) -> FloatArray:
        square = float(self.cv) ** 2
        return rng.standard_gamma(1.0 / square, count) * (square / self.rate)


class _Modulated(ArrivalProcess):
    """Poisson arrivals whose intensity is piecewise constant.

    With the cumulated intensity L(t), arrivals are L^-1 of a unit-rate Poisson process (time change).
    """

    @staticmethod
    def _uniform_in(rng: np.random.Generator, mass: float) -> FloatArray:
        """A unit-rate Poisson process on [0, mass]: a Poisson count of sorted uniforms."""
        return np.sort(rng.uniform(0.0, mass, int(rng.poisson(mass))))


@dataclass(frozen=True, slots=True)
class MMPP2(_Modulated):
    """Markov-modulated Poisson process with two phases, started in its stationary phase.

    ``with_rate`` scales both phase rates and keeps the sojourn times.

    Attributes:
        rate_low, rate_high: requests/s in each phase; one of them may be 0 (on/off arrivals).
        mean_low_seconds, mean_high_seconds: mean sojourn in each phase (exponential), > 0.
    """

    rate_low: float
    rate_high: float
    mean_low_seconds: float
    mean_high_seconds: float

    def __post_init__(self) -> None:
        for name in ("rate_low", "rate_high"):
            value = getattr(self, name)
            if value != 0:
                check_positive(f"arrivals.{name}", value, "requests/s")
        for name in ("mean_low_seconds", "mean_high_seconds"):
            check_positive(f"arrivals.{name}", getattr(self, name), "seconds")
        if self.rate_high < self.rate_low:
            raise ConfigError(f"arrivals.rate_high: {self.rate_high}, must be >= rate_low = {self.rate_low}")
        check_positive("arrivals.rate_high", self.rate_high, "requests/s")

    @property
    def rate(self) -> float:
        low, high = self.mean_low_seconds, self.mean_high_seconds
        return float((self.rate_low * low + self.rate_high * high) / (low + high))

    def with_rate(self, rate: float) -> MMPP2:
        factor = check_positive("arrivals.rate", rate, "requests/s") / self.rate
        return replace(self, rate_low=self.rate_low * factor, rate_high=self.rate_high * factor)

    def _path(self, rng: np.random.Generator, *, mass: float = 0.0, seconds: float = 0.0) -> tuple[FloatArray, FloatArray]:
        """Phase changes: (M,) times and (M,) cumulated intensity, covering ``mass`` and ``seconds``."""
        means = (float(self.mean_low_seconds), float(self.mean_high_seconds))
        rates = (float(self.rate_low), float(self.rate_high))
        first = int(rng.random() * (means[0] + means[1]) >= means[0])
        means, rates = (means[first], means[1 - first]), (rates[first], rates[1 - first])
        times, masses = [np.zeros(1)], [np.zeros(1)]
        while times[-1][-1] < seconds or masses[-1][-1] < mass:
            missing = max(seconds - times[-1][-1], (mass - masses[-1][-1]) / self.rate)
            sojourns = rng.standard_exponential((int(1.2 * missing / (means[0] + means[1])) + 8, 2)) * means
            times.append(times[-1][-1] + np.cumsum(sojourns))
            masses.append(masses[-1][-1] + np.cumsum(sojourns * rates))
        return np.concatenate(times), np.concatenate(masses)

    def sample(self, rng: np.random.Generator, num_requests: int) -> FloatArray:
        unit = np.cumsum(rng.standard_exponential(check_count("num_requests", num_requests)))
        if not unit.size:
            return unit
        times, masses = self._path(rng, mass=float(unit[-1]))
        return np.maximum.accumulate(np.interp(unit, masses, times))

    def sample_until(self, rng: np.random.Generator, horizon: float) -> FloatArray:
        end = self._end(horizon)
        times, masses = self._path(rng, seconds=end)
        unit = self._uniform_in(rng, float(np.interp(end, times, masses)))
        return np.minimum(np.maximum.accumulate(np.interp(unit, masses, times)), end)


@dataclass(frozen=True, slots=True)
class PiecewiseConstant(_Modulated):
    """Poisson arrivals with a rate that steps through a cycle and starts over.

    ``with_rate`` scales every rate and keeps the durations.

    Attributes:
        durations: seconds of each step, > 0.
        rates: requests/s in each step, >= 0, at least one > 0.
    """

    durations: tuple[float, ...]
    rates: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.durations) != len(self.rates) or not self.rates:
            raise ConfigError(f"arrivals.rates: {len(self.rates)} rates for {len(self.durations)} durations, must be as many and >= 1")
        for i, (duration, rate) in enumerate(zip(self.durations, self.rates, strict=True)):
            check_positive(f"arrivals.durations[{i}]", duration, "seconds")
            if rate != 0:
                check_positive(f"arrivals.rates[{i}]", rate, "requests/s")
        check_positive("arrivals.rate (mean over the cycle)", self.rate, "requests/s")

    @property
    def rate(self) -> float:
        return float(np.dot(self.durations, self.rates) / np.sum(self.durations))

    def with_rate(self, rate: float) -> PiecewiseConstant:
        factor = check_positive("arrivals.rate", rate, "requests/s") / self.rate
        return replace(self, rates=tuple(r * factor for r in self.rates))

    def _cycle(self) -> tuple[FloatArray, FloatArray]:
        """(M+1,) step ends and (M+1,) cumulated intensity within one cycle, both from 0."""
        durations = np.asarray(self.durations, dtype=np.float64)
        times = np.concatenate([[0.0], np.cumsum(durations)])
        masses = np.concatenate([[0.0], np.cumsum(durations * np.asarray(self.rates, dtype=np.float64))])
        return times, masses

    def _times_of(self, unit: FloatArray) -> FloatArray:
        times, masses = self._cycle()
        cycles, rest = np.divmod(unit, masses[-1])
        return np.maximum.accumulate(cycles * times[-1] + np.interp(rest, masses, times))

    def sample(self, rng: np.random.Generator, num_requests: int) -> FloatArray:
        return self._times_of(np.cumsum(rng.standard_exponential(check_count("num_requests", num_requests))))

    def sample_until(self, rng: np.random.Generator, horizon: float) -> FloatArray:
        end = self._end(horizon)
        times, masses = self._cycle()
        cycles, rest = divmod(end, float(times[-1]))
        mass = cycles * float(masses[-1]) + float(np.interp(rest, times, masses))
        return np.minimum(self._times_of(self._uniform_in(rng, mass)), end)


@dataclass(frozen=True, slots=True, eq=False)
class TraceArrivals(ArrivalProcess):
    """Recorded timestamps, replayed as they are; nothing is random.

    The mean rate is (n - 1) / (last - first); a single burst (all times equal) counts as n requests
    per second, and cannot be rescaled. More than n requests repeat the trace, each round starting
    n / rate seconds after the round before. ``with_rate`` stretches all times (counted from 0) by one factor.

    Attributes:
        times: (n,) float64 seconds, non-decreasing, >= 0; a read-only copy is kept.
    """

    times: FloatArray

    def __post_init__(self) -> None:
        times = np.array(self.times, dtype=np.float64)
        if times.ndim != 1 or not times.size:
            raise ConfigError(f"arrivals.times: shape {times.shape}, must be one-dimensional and not empty")
        bad = np.flatnonzero(~(np.isfinite(times) & (times >= 0)))
        if bad.size:
            raise ConfigError(f"arrivals.times: entry {bad[0]} is {times[bad[0]]}, must be finite and >= 0 seconds")
        bad = np.flatnonzero(np.diff(times) < 0)
        if bad.size:
            i = int(bad[0])
            raise ConfigError(f"arrivals.times: entry {i + 1} is {times[i + 1]} after {times[i]}, times must not decrease")
        times.flags.writeable = False
        object.__setattr__(self, "times", times)

    @property
    def _span(self) -> float:
        return float(self.times[-1] - self.times[0])

    @property
    def rate(self) -> float:
        return (self.times.size - 1) / self._span if self._span > 0 else float(self.times.size)

    def with_rate(self, rate: float) -> TraceArrivals:
        target = check_positive("arrivals.rate", rate, "requests/s")
        if math.isclose(target, self.rate, rel_tol=1e-12):
            return self  # the recorded times, not their product with 1 +- rounding
        if not self._span > 0:
            raise ConfigError(f"arrivals.rate: {rate}, but a trace with fewer than two distinct times has no rate to rescale")
        return TraceArrivals(self.times * (self.rate / target))

    def sample(self, rng: np.random.Generator, num_requests: int) -> FloatArray:
        count, size = check_count("num_requests", num_requests), self.times.size
        if count <= size:
            return self.times[:count].copy()
        rounds, row = np.divmod(np.arange(count), size)
        return np.maximum.accumulate(rounds * (size / self.rate) + self.times[row])

    def sample_until(self, rng: np.random.Generator, horizon: float) -> FloatArray:
        end = self._end(horizon)
        size = self.times.size
        rounds = int(end * self.rate / size) + 1
        times = self.sample(rng, rounds * size)
        return times[: int(np.searchsorted(times, end, side="right"))]
