"""Benchmark runs again in the simulator, and the coefficients moved until measured and simulated figures agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_baselines import Setting, make_policy
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import require
from llmsched_env.metrics import latency, ttft
from llmsched_env.perf import FormulaTime
from llmsched_env.perf.base import FloatArray
from llmsched_env.runner import run_episode
from llmsched_env.types import IntArray, LengthStatistics
from llmsched_hardware.calibration.bench_results import BenchResult

EXACT = 0.01
"""Of a figure: how closely it is to be matched, as a standard deviation, beyond what chance leaves open."""
STEPS = 6
LEAST_GAIN = 0.01
"""Of the sum of squares, for another step."""
FLOOR = 0.01
"""Share of their seconds that the constant of an iteration keeps at least: an iteration takes time."""
NAMES = ("a", "b", "d1", "d3", "d4", "frontend")
_Times = tuple[FloatArray, FloatArray]
KNEE_NAMES = ("a", "b", "s", "c", "d1", "d3", "d4", "frontend")


@dataclass(frozen=True, slots=True)
class Parameters:
    """Coefficients of ``FormulaTime`` in use, then the front end's seconds.

    Attributes:
        values: (P,) float64.
        knee: tokens at which the token line has a step; 0 for one line.
    """

    values: FloatArray
    knee: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return KNEE_NAMES if self.knee else NAMES

    @property
    def frontend(self) -> float:
        return float(self.values[-1])

    def formula(self) -> FormulaTime:
        """The time model."""
        known = {name: float(value) for name, value in zip(self.names, self.values, strict=True)}
        line = {"s": known["a"], "c": known["b"], **known}
        return FormulaTime(
            a=line["a"], b=line["b"], s=line["s"], c=line["c"], d1=line["d1"], d2=0.0, d3=line["d3"], d4=line["d4"], knee=float(self.knee)
        )


@dataclass(frozen=True, slots=True)
class Replayed:
    """A run in the simulator, per request: seconds to the first and to the last token, the front end's added; forced evictions."""

    first: FloatArray
    last: FloatArray
    preemptions: int
    iterations: int


class Replay:
    """Runs again in the simulator under policy ``vllm``."""

    def __init__(self, results: Sequence[BenchResult], engine: EngineConfig) -> None:
        self._engine = engine
        self._backend = SimBackend()
        self._runs = [(r.workload, LengthStatistics.of(r.prompt_tokens, r.output_tokens, np.ones(len(r))), r.rate) for r in results]

    def __call__(self, parameters: Parameters) -> list[Replayed]:
        """Every run."""
        engine = self._engine.replace(time_model=parameters.formula())
        found = []
        for workload, statistics, rate in self._runs:
            policy = make_policy("vllm", Setting(statistics, rate if math.isfinite(rate) else 1.0, engine))
            log = run_episode(policy, workload, backend=self._backend).log
            first, last = ttft(log) + parameters.frontend, latency(log) + parameters.frontend
            found.append(Replayed(first, last, int(log.forced_evictions.sum()), int(self._backend.counters().iterations)))
        return found


@dataclass(frozen=True, slots=True)
class _Groups:
    """Requests of a run whose figures are compared: thirds by how many were in the system when they came."""

    counted: IntArray
    thirds: tuple[IntArray, ...]

    @classmethod
    def of(cls, result: BenchResult) -> _Groups:
        ended = np.sort(result.arrival + result.last)
        present = np.arange(len(result)) - np.searchsorted(ended, result.arrival)
        counted = np.flatnonzero(result.counted).astype(np.int32)
        order = counted[np.argsort(present[counted], kind="stable")]
        return cls(counted, tuple(np.sort(part) for part in np.array_split(order, 3)))

    def figures(self, first: FloatArray, last: FloatArray, output: IntArray, weight: FloatArray) -> FloatArray:
        """(F,) means and quantiles of a run, requests weighted."""
        rest = output.astype(np.float64) - 1.0
        found = []
        for third in self.thirds:
            w = weight[third]
            found.append(_mean(w, first[third]))
            found.append(_mean(w, (last - first)[third], rest[third]))
        w = weight[self.counted]
        found.append(_mean(w, last[self.counted]))
        for values, share in ((first, 0.9), (last, 0.9)):
            found.append(_quantile(values[self.counted], w, share))
        return np.array(found)


def _mean(weight: FloatArray, values: FloatArray, count: FloatArray | float = 1.0) -> float:
    """Weighted mean of values that are sums over ``count`` each; 0 where nothing has weight."""
    below = float((weight * count).sum())
    return float((weight * values).sum()) / below if below > 0 else 0.0


def _quantile(values: FloatArray, weight: FloatArray, share: float) -> float:
    """Weighted quantile, interpolated."""
    order = np.argsort(values, kind="stable")
    at = np.cumsum(weight[order]) - 0.5 * weight[order]
    return float(np.interp(share * weight.sum(), at, values[order]))


@dataclass(frozen=True, slots=True)
class _Target:
    """What is pulled to: measured figures and the coefficients of the rows, each with a standard deviation; never below ``low``."""

    figures: FloatArray
    tolerance: FloatArray
    prior: FloatArray
    covariance: FloatArray
    low: FloatArray

    def step(self, at: FloatArray, simulated: FloatArray, slopes: FloatArray) -> FloatArray:
        """The parameters that are best if figures are linear in them."""
        lsq = require("scipy.optimize", "cli").lsq_linear
        whiten = np.linalg.inv(np.linalg.cholesky(self.covariance))
        # in units of the prior's deviation, which differ by ten orders of magnitude
        unit = np.sqrt(np.diag(self.covariance))
        system = np.concatenate([slopes / self.tolerance[:, None] * unit, whiten * unit])
        wanted = np.concatenate([(self.figures - simulated + slopes @ at) / self.tolerance, whiten @ self.prior])
        found: FloatArray = lsq(system, wanted, bounds=(self.low / unit, np.inf)).x * unit
        return found

    def cost(self, at: FloatArray, simulated: FloatArray) -> float:
        off = at - self.prior
        figures = ((simulated - self.figures) / self.tolerance) ** 2
        return float(figures.sum() + off @ np.linalg.solve(self.covariance, off))


@dataclass(frozen=True, slots=True)
class Prior:
    """What the rows have said of the parameters.

    Attributes:
        values: (P,) best.
        covariance: (P, P) how far they may be moved.
        replicates: (R, P) best for resampled runs.
        weights: R times the weight of every request of every run, as resampled.
        units: (P,) the value at which a term alone would make up all seconds.
    """

    values: FloatArray
    covariance: FloatArray
    replicates: FloatArray
    weights: Sequence[Sequence[FloatArray]]
    units: FloatArray


class Matching:
    """Measured and simulated figures of the runs, requests weighted."""

    def __init__(self, results: Sequence[BenchResult], engine: EngineConfig, knee: int, units: FloatArray) -> None:
        self._results, self._knee = results, knee
        self._replay = Replay(results, engine)
        self._groups = [_Groups.of(result) for result in results]
        self._even = [np.ones(len(result)) for result in results]
        self._measured = [(result.first, result.last) for result in results]
        self._steps = 0.01 * units
        self._steps[-1] = 1e-3  # seconds of the front end

    def __call__(self, prior: Prior) -> tuple[FloatArray, FloatArray]:
        """(P,) parameters that agree best with the rows and the figures, and (R, P) those of resampled runs."""
        at = prior.values.copy()
        at[0] = max(at[0], FLOOR * float(prior.units[0]))
        runs = self._simulated(at)
        wanted, base = self._figures(self._measured, self._even), self._figures(runs, self._even)
        chance = np.array([self._figures(self._measured, w) - self._figures(runs, w) for w in prior.weights]).std(axis=0)
        low = np.zeros(len(at))
        low[[0, 2] if self._knee else [0]] = FLOOR * at[0]
        target = _Target(wanted, np.hypot(chance, EXACT * np.maximum(wanted, 1e-6)), prior.values, prior.covariance, low)
        cost = target.cost(at, base)
        for _ in range(STEPS):
            aim = target.step(at, base, self._slope(self._moved(at), base, self._even))
            for share in (1.0, 0.5, 0.25):
                tried = at + share * (aim - at)
                there = self._simulated(tried)
                found = self._figures(there, self._even)
                if target.cost(tried, found) < cost:
                    break
            else:
                break
            gain = cost - target.cost(tried, found)
            at, runs, base, cost = tried, there, found, cost - gain
            if gain < LEAST_GAIN:
                break
        moved = self._moved(at)
        replicates = []
        for best, w in zip(prior.replicates, prior.weights, strict=True):
            base = self._figures(runs, w)
            own = _Target(self._figures(self._measured, w), target.tolerance, best, prior.covariance, low)
            replicates.append(own.step(at, base, self._slope(moved, base, w)))
        return at, np.array(replicates)

    def _figures(self, runs: Sequence[_Times], weight: Sequence[FloatArray]) -> FloatArray:
        parts = zip(self._groups, runs, self._results, weight, strict=True)
        return np.concatenate([g.figures(first, last, r.output_tokens, w) for g, (first, last), r, w in parts])

    def _simulated(self, values: FloatArray) -> list[_Times]:
        return [(run.first, run.last) for run in self._replay(Parameters(values, self._knee))]

    def _moved(self, values: FloatArray) -> list[list[_Times]]:
        """Runs with one parameter after the other a step larger."""
        return [self._simulated(values + np.where(np.arange(len(values)) == k, self._steps, 0.0)) for k in range(len(values))]

    def _slope(self, moved: Sequence[list[_Times]], base: FloatArray, weight: Sequence[FloatArray]) -> FloatArray:
        """(F, P) change of each figure by each parameter."""
        return np.stack([(self._figures(run, weight) - base) / h for run, h in zip(moved, self._steps, strict=True)], axis=1)
