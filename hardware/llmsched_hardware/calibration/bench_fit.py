"""An iteration-time formula and the front end's seconds from benchmark runs.

Two stages. The first solves the equations of ``token_times`` by non-negative least squares; a row is divided by the seconds that the
formula gives it, so that no bias towards short ones comes in. The second replays the runs in the simulator, policy ``vllm``, with
the arrivals and lengths of the files, and moves the coefficients, as far as the first stage left them open, until the figures agree:
mean times to the first token and between tokens, each in thirds of the requests by how many were in the system, mean latency and the
90th percentiles (Gauss-Newton, bounds at 0). Intervals: both stages again with blocks of consecutive time drawn with replacement, and
the profile likelihood of the first stage, which sees coefficients that only their sum is known of.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, require
from llmsched_env.perf.base import FloatArray
from llmsched_env.types import BoolArray, IntArray
from llmsched_hardware.calibration.bench_replay import Matching, Parameters, Prior, Replay
from llmsched_hardware.calibration.bench_results import BenchResult
from llmsched_hardware.calibration.token_times import (
    DECODES,
    FRONTEND,
    ITERATIONS,
    KV,
    TOKENS,
    WORK,
    Equations,
    equations,
)

KNEES = (16, 32, 64, 128, 256, 512)
KNEE_ROWS = 30
KNEE_GAIN = 0.05
"""Share of the spread of relative errors that a step in the token line must take away."""
STALL = 8.0
"""A row that took so many times its modelled seconds is a pause of the machine and is left out."""
PASSES = 6
BIAS_PASSES = 2
LEAST_ROWS = 20
BLOCKS = 25
REPLICATES = 200
LEAST_IDLE = 10
"""Requests that found the engine idle, for the rows to tell the front end's seconds."""
UNSURE = 0.1
"""Of the front end's seconds, where the iterations that requests entered are all that tells them, beyond what these leave open."""
LOOSE, LOOSE_SUMS = 0.02, 0.1
"""Of a coefficient: how far the second stage may move it, as a standard deviation, beyond what the rows leave open. Farther where rows are
sums over a request's life, in which the tokens of others are spread evenly."""
CHI = 3.84
"""95 % of the chi-squared distribution with one degree of freedom."""
TRADE = -0.7
"""Correlation of two estimates below which the runs tell their sum alone."""
DETERMINED = 0.25


@dataclass(frozen=True, slots=True)
class Interval:
    """What the runs say about one coefficient.

    Attributes:
        name: of ``FormulaTime``, or ``frontend``.
        value, low, high: of the fit, and the wider of two intervals of 95 %: of fits to resampled blocks, and by profile likelihood.
        share: of the seconds of all rows that the term accounts for; NaN for the front end.
        determined: the interval excludes 0 and reaches no farther than a quarter of the value to either side.
        partner: the coefficient against which the runs trade it (correlation below ``TRADE``), else empty.
    """

    name: str
    value: float
    low: float
    high: float
    share: float
    determined: bool
    partner: str = ""


@dataclass(frozen=True, slots=True)
class Fit:
    """Outcome of both stages.

    Attributes:
        parameters, first: after the second and the first stage.
        intervals: a coefficient each.
        equations: of every run.
        spread: standard deviation of measured over modelled seconds of single iterations; NaN without such rows.
        drift: by run, measured over modelled seconds of its rows - 1.
        stalls: rows left out as pauses.
    """

    parameters: Parameters
    first: Parameters
    intervals: tuple[Interval, ...]
    equations: tuple[Equations, ...]
    spread: float
    drift: tuple[float, ...]
    stalls: int


def off_formula(parameters: Parameters, e: Equations) -> float:
    """Measured over modelled seconds of a run's rows - 1, pauses left out."""
    modelled = _design(e.rows, parameters.knee) @ parameters.values
    keep = e.seconds <= STALL * modelled
    return float(e.seconds[keep].sum() / modelled[keep].sum() - 1.0)


# --- first stage ------------------------------------------------------------------------------------
def _design(rows: FloatArray, knee: int) -> FloatArray:
    """(M, P) what a row says of each parameter."""
    tail = [rows[:, KV], rows[:, WORK], rows[:, DECODES], rows[:, FRONTEND]]
    if not knee:
        return np.stack([rows[:, ITERATIONS], rows[:, TOKENS], *tail], axis=1)
    low = rows[:, TOKENS] <= knee * rows[:, ITERATIONS]
    lines = [rows[:, ITERATIONS] * low, rows[:, TOKENS] * low, rows[:, ITERATIONS] * ~low, rows[:, TOKENS] * ~low]
    return np.stack([*lines, *tail], axis=1)


def _solve(design: FloatArray, seconds: FloatArray, weight: FloatArray) -> FloatArray:
    """Non-negative coefficients of the smallest squared error relative to the modelled seconds."""
    nnls = require("scipy.optimize", "cli").nnls
    root = np.sqrt(weight)
    modelled = np.full(len(seconds), max(float(np.average(seconds, weights=weight)), 1e-9))
    values = np.zeros(design.shape[1])
    for _ in range(PASSES):
        factor, scale = _condensed(design, seconds, root / modelled)
        solution, _ = nnls(factor[:, :-1], factor[:, -1])
        values = solution / scale
        modelled = np.maximum(design @ values, 0.05 * modelled)
    return values


def _condensed(design: FloatArray, seconds: FloatArray, weight: FloatArray) -> tuple[FloatArray, FloatArray]:
    """The weighted equations as (P + 1, P + 1) with the same sums of squares, columns divided by (P,) scales."""
    scaled = np.column_stack([design, seconds]) * weight[:, None]
    squares = scaled.T @ scaled
    scale = np.sqrt(np.diag(squares)[:-1])  # coefficients differ by ten orders of magnitude
    scale[scale == 0] = 1.0
    whole = np.append(scale, 1.0)
    values, vectors = np.linalg.eigh(squares / np.outer(whole, whole))
    condensed: FloatArray = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    return condensed, scale


@dataclass(frozen=True, slots=True)
class _Profile:
    """What the rows alone leave open.

    Attributes:
        low, high: (P,) values at which the squared error, all others free, has grown by what chance explains (profile likelihood).
        correlation: (P, P) of the unconstrained estimates.
    """

    low: FloatArray
    high: FloatArray
    correlation: FloatArray

    def moved(self, by: FloatArray) -> _Profile:
        """The same about estimates that (P,) ``by`` has been added to."""
        return _Profile(np.maximum(self.low + by, 0.0), np.maximum(self.high + by, 0.0), self.correlation)


def _profile(design: FloatArray, seconds: FloatArray, values: FloatArray, blocks: IntArray) -> _Profile:
    """Intervals of 95 % by profile likelihood; errors within a block may go together (``blocks``: a number for each row)."""
    nnls = require("scipy.optimize", "cli").nnls
    modelled = np.maximum(design @ values, 1e-12)
    factor, scale = _condensed(design, seconds, 1.0 / modelled)
    off = seconds / modelled - 1.0
    best = float((off**2).sum())
    together = float((np.bincount(blocks, off) ** 2).sum()) / best if best > 0 else 1.0
    allowed = best + CHI * max(together, 1.0) * best / max(len(seconds) - len(values), 1)

    def cost(k: int, value: float) -> float:
        others = np.delete(factor[:, :-1], k, axis=1)
        return float(nnls(others, factor[:, -1] - value * scale[k] * factor[:, k])[1]) ** 2

    def edge(k: int, inside: float, outside: float) -> float:
        for _ in range(40):
            middle = 0.5 * (inside + outside)
            inside, outside = (middle, outside) if cost(k, middle) <= allowed else (inside, middle)
        return inside

    most = 2.0 * _units(design, seconds)
    low, high = np.zeros(len(values)), np.zeros(len(values))
    for k, value in enumerate(values):
        low[k] = 0.0 if cost(k, 0.0) <= allowed else edge(k, value, 0.0)
        high[k] = most[k] if cost(k, most[k]) <= allowed else edge(k, value, most[k])
    gram = factor[:, :-1].T @ factor[:, :-1] + 1e-9 * np.eye(len(values))
    inverse = np.linalg.inv(gram)
    deviation = np.sqrt(np.diag(inverse))
    return _Profile(low, high, inverse / np.outer(deviation, deviation))


def _spread(design: FloatArray, seconds: FloatArray, values: FloatArray) -> float:
    modelled = design @ values
    return float(np.sqrt(np.mean((seconds / np.maximum(modelled, 1e-12) - 1.0) ** 2)))


def _first_stage(rows: FloatArray, seconds: FloatArray, single: BoolArray) -> Parameters:
    """The best of one line and of the steps for which there are rows on both sides."""
    ones = np.ones(len(seconds))
    design = _design(rows, 0)
    best = Parameters(_solve(design, seconds, ones))
    allowed = (1.0 - KNEE_GAIN) * _spread(design, seconds, best.values)
    each = rows[:, TOKENS] / np.maximum(rows[:, ITERATIONS], 1.0)
    if not single.any():
        return best
    for knee in KNEES:
        if min(np.count_nonzero(single & (each <= knee)), np.count_nonzero(single & (each > knee))) < KNEE_ROWS:
            continue
        design = _design(rows, knee)
        values = _solve(design, seconds, ones)
        spread = _spread(design, seconds, values)
        if spread < allowed and values[0] > 0 and values[2] > 0:
            best, allowed = Parameters(values, knee), spread
    return best


def fit(results: Sequence[BenchResult], engine: EngineConfig, seed: int = 0) -> Fit:
    """Both stages and their intervals.

    Args:
        results: runs of one server.
        engine: its settings; the time model is not read.
        seed: of the resampling.

    Raises:
        ConfigError: the runs say too little.
    """
    found = tuple(equations(result, engine) for result in results)
    rows, seconds, single, _ = _joined(found)
    if len(seconds) < LEAST_ROWS:
        raise ConfigError(f"RESULT: {len(seconds)} iterations or requests to fit, must be at least {LEAST_ROWS}: outputs of several tokens")
    parameters = _first_stage(rows, seconds, single)
    keep = seconds <= STALL * (_design(rows, parameters.knee) @ parameters.values)
    if not keep.all():
        parameters = _first_stage(rows[keep], seconds[keep], single[keep])
    blocks = [_Blocks.of(result, e) for result, e in zip(results, found, strict=True)]
    weights = _resampled(blocks, keep, np.random.default_rng(seed))
    design, taken, solved = _design(rows, parameters.knee)[keep], seconds[keep], parameters
    firsts = np.array([_solve(design, taken, w) for w, _ in weights])
    if not single.any():
        better = _without_bias(results, engine, parameters)
        firsts = np.maximum(firsts + better.values - parameters.values, 0.0)
        parameters = better
    loose = LOOSE if single.any() else LOOSE_SUMS
    covariance = np.cov(firsts.T) + np.diag((loose * parameters.values) ** 2 + (1e-3 * _units(design, taken)) ** 2)
    if np.count_nonzero(rows[:, FRONTEND]) < LEAST_IDLE:  # rows say too little of the front end
        parameters, unsure = _with_delay(parameters, found, results)
        covariance[-1, :] = covariance[:, -1] = 0.0
        covariance[-1, -1] = unsure**2
        firsts[:, -1] = parameters.frontend
    prior = Prior(parameters.values, covariance, firsts, [w for _, w in weights], _units(design, taken))
    values, replicates = Matching(results, engine, parameters.knee, prior.units)(prior)
    final = Parameters(values, parameters.knee)
    profile = _profile(design, taken, solved.values, _numbered(blocks)[keep]).moved(parameters.values - solved.values)
    delays = _delays(found)
    if len(delays):  # the iterations that requests entered bound the front end's seconds, whatever the rows say
        profile.low[-1], profile.high[-1] = delays[:, 0].min(), delays[:, 2].max()
    intervals = _intervals(final, replicates, design, profile)
    modelled = design @ final.values
    relative = (taken / modelled)[single[keep]]
    drift = tuple(off_formula(final, e) for e in found)
    spread = float(np.std(relative)) if relative.size else math.nan
    return Fit(final, parameters, intervals, found, spread, drift, int(np.count_nonzero(~keep)))


def _with_delay(parameters: Parameters, found: Sequence[Equations], results: Sequence[BenchResult]) -> tuple[Parameters, float]:
    """The front end's seconds by the iterations that requests entered, and how unsure they are; unknown without single iterations."""
    delays = _delays(found)
    if not len(delays):
        return parameters, float(np.mean([np.median(r.first) for r in results]))
    delay = float(delays[:, 1].mean())
    unsure = 0.5 * float(delays[:, 2].max() - delays[:, 0].min())
    return Parameters(np.append(parameters.values[:-1], delay), parameters.knee), UNSURE * delay + 0.5 * unsure


def _delays(found: Sequence[Equations]) -> FloatArray:
    """(runs, 3) of the runs that tell it, ``Equations.delay``."""
    delays = np.array([e.delay for e in found])
    known: FloatArray = delays[~np.isnan(delays[:, 1])]
    return known


def _without_bias(results: Sequence[BenchResult], engine: EngineConfig, solved: Parameters) -> Parameters:
    """The coefficients at which the first stage, on runs simulated with them, gives what it gave on the measured ones.

    Rows that are sums over requests spread the tokens of others evenly over their lives, which is not so.
    """
    replay = Replay(results, engine)
    values = solved.values
    for _ in range(BIAS_PASSES):
        runs = replay(Parameters(np.append(np.maximum(values[:1], 0.1 * solved.values[:1]), values[1:])))
        again = [equations(dataclasses.replace(r, first=run.first, last=run.last), engine) for r, run in zip(results, runs, strict=True)]
        rows, seconds, _, _ = _joined(again)
        values = np.maximum(values + solved.values - _solve(_design(rows, 0), seconds, np.ones(len(seconds))), 0.0)
    return Parameters(values)


def _joined(found: Sequence[Equations]) -> tuple[FloatArray, FloatArray, BoolArray, FloatArray]:
    rows, seconds = np.concatenate([e.rows for e in found]), np.concatenate([e.seconds for e in found])
    return rows, seconds, np.concatenate([e.single for e in found]), np.concatenate([e.time for e in found])


def _units(design: FloatArray, seconds: FloatArray) -> FloatArray:
    """(P,) the value at which a term alone would make up all seconds."""
    total = design.sum(axis=0)
    units: FloatArray = np.divide(seconds.sum(), total, out=np.full(len(total), float(seconds.mean())), where=total > 0)
    return units


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of consecutive time of a run with equally many requests: how many, and the number of each row's and each request's."""

    count: int
    rows: IntArray
    requests: IntArray

    @classmethod
    def of(cls, result: BenchResult, e: Equations) -> _Blocks:
        count = min(BLOCKS, max(len(result) // 4, 2))
        begun = result.arrival + result.first  # arrivals may be all at once
        edges = np.quantile(begun, np.linspace(0, 1, count + 1)[1:-1])
        rows, requests = (np.searchsorted(edges, times).astype(np.int32) for times in (e.time, begun))
        return cls(count, rows, requests)


def _numbered(blocks: Sequence[_Blocks]) -> IntArray:
    """The block of every row, blocks of all runs numbered together."""
    begin = np.cumsum([0, *(b.count for b in blocks)])
    return np.concatenate([b.rows + first for b, first in zip(blocks, begin[:-1], strict=True)])


def _resampled(blocks: Sequence[_Blocks], keep: BoolArray, rng: np.random.Generator) -> list[tuple[FloatArray, list[FloatArray]]]:
    """Weights of the kept rows and of each run's requests when blocks of its time are drawn with replacement."""
    drawn = []
    for _ in range(REPLICATES):
        counts = [np.bincount(rng.integers(0, b.count, b.count), minlength=b.count).astype(float) for b in blocks]
        rows = np.concatenate([count[b.rows] for count, b in zip(counts, blocks, strict=True)])
        if not rows[keep].any():
            continue
        drawn.append((rows[keep], [count[b.requests] for count, b in zip(counts, blocks, strict=True)]))
    return drawn


def _intervals(final: Parameters, replicates: FloatArray, design: FloatArray, profile: _Profile) -> tuple[Interval, ...]:
    """What (R, P) replicates and the profile say about each parameter: the wider of the two."""
    values, names = final.values, final.names
    low, high = np.percentile(replicates, (2.5, 97.5), axis=0)
    low, high = np.minimum.reduce([low, values, profile.low]), np.maximum.reduce([high, values, profile.high])
    shares = design.sum(axis=0) * values
    shares /= shares[:-1].sum()
    shares[-1] = math.nan
    correlation = profile.correlation
    found = []
    for k, name in enumerate(names):
        rival = int(np.argmin(correlation[k]))
        determined = bool(low[k] > 0 and max(high[k] - values[k], values[k] - low[k]) <= DETERMINED * values[k])
        partner = "" if determined or correlation[k, rival] > TRADE else names[rival]
        found.append(Interval(name, float(values[k]), float(low[k]), float(high[k]), float(shares[k]), determined, partner))
    return tuple(found)
