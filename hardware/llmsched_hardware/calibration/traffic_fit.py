"""Iteration times fitted to the iterations of live traffic: non-negative, stalls set aside, terms chosen by cross-validation.

Rows are divided by the predicted time and not by the measured one, which would draw the fit to the short ones (on its own data by
several percent); the level is then set so that predicted seconds have the sum of measured ones, since sums are what clocks show.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.errors import ConfigError
from llmsched_env.perf import IterationTimeModel, TrafficTime
from llmsched_env.perf.base import FloatArray
from llmsched_env.perf.batch import DECODE_KV, DECODES, FINISHED, PREFILL_TOKENS, PREFILL_WORK, PREFILLS, STARTED
from llmsched_env.perf.traffic import COEFFICIENTS
from llmsched_hardware.calibration.fit import non_negative

IntArray = npt.NDArray[np.int64]

ROUNDS = 6
"""Of a fit: predicted times, which the rows are divided by, settle within a few."""
CLIP = 4.0
"""Residuals beyond so many typical ones (median absolute) count as that many (Huber)."""
STALL = 8.0
"""An iteration of so many times its predicted time is a stall of the machine: left out of the fit, reported."""
GAIN = 0.01
"""More points of the line, or shapes to remember, must lower the cross-validated error by this share of it."""
SURE, BLOCK = 2.0, 50
"""A group of terms stays where the error without it is larger by so many standard errors, taken over blocks of so many iterations."""
FOLDS = 5
LEAST_ROWS = 100
KNOTS = (4, 8, 12)
SHAPES = (0, 16, 32, 64, 128)
_ATTENTION = ("decode", "decode_kv", "decode_kv_root", "prefill_work")
GROUPS: tuple[tuple[str, ...], ...] = (
    ("prefill",),
    ("started",),
    ("finished",),
    ("changed", "changed_decode"),
    ("new_shape", "new_shape_token"),
)
"""Terms that are taken in together, beside the line by tokens and attention."""


@dataclass(frozen=True, slots=True, eq=False)
class Iterations:
    """What is fitted.

    Attributes:
        batches: (n, BATCH_FIELDS), in order.
        seconds: (n,).
        run: (n,) which run each belongs to; runs are what cross-validation leaves out, and where shapes seen go on is ``engine``.
        engine: (n,) which engine process: at a new one nothing has been seen.
    """

    batches: FloatArray
    seconds: FloatArray
    run: IntArray
    engine: IntArray

    def __len__(self) -> int:
        return int(self.seconds.size)

    @property
    def tokens(self) -> FloatArray:
        """(n,) tokens of each batch."""
        return np.asarray(self.batches[:, DECODES] + self.batches[:, PREFILL_TOKENS])


@dataclass(frozen=True, slots=True)
class Terms:
    """Which terms a model has: points of the line by tokens, groups, and how many shapes are remembered."""

    knots: tuple[float, ...]
    groups: tuple[tuple[str, ...], ...] = ()
    shapes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Fitted:
    """A model, what it was chosen by and what was set aside.

    Attributes:
        model: without provenance.
        terms: chosen ones.
        predicted: (n,) cross-validated seconds: each run by a fit to the others.
        error: mean of the clipped squared relative errors, cross-validated, with all groups; without: with one less, by its first name.
        stalls: (n,) iterations left out of the fit.
    """

    model: TrafficTime
    terms: Terms
    predicted: FloatArray
    error: float
    without: dict[str, float]
    stalls: npt.NDArray[np.bool_]


def new_shapes(tokens: FloatArray, engine: IntArray, shapes: int) -> npt.NDArray[np.bool_]:
    """(n,) whether each number of tokens is not among the last ``shapes`` different ones of its engine (``perf.traffic.recall``)."""
    fresh = np.zeros(tokens.size, dtype=bool)
    if shapes == 0:
        return fresh
    seen: dict[float, None] = {}
    before = -1
    for i, (value, which) in enumerate(zip(tokens.tolist(), engine.tolist(), strict=True)):
        if which != before:
            seen, before = {}, which
        fresh[i] = value not in seen
        seen.pop(value, None)
        seen[value] = None
        if len(seen) > shapes:
            del seen[next(iter(seen))]
    return fresh


def knots_of(tokens: FloatArray, count: int) -> tuple[float, ...]:
    """Points of the line by tokens: between the fewest and the most, as quantiles of different numbers, each with iterations beside it."""
    values, counts = np.unique(tokens, return_counts=True)
    if values.size == 1:
        return float(values[0]), float(values[0]) + 1.0
    # Half way between equal shares of iterations and equal ratios of tokens: common batches are told apart, rare ones bridged.
    share = (np.cumsum(counts) - 0.5 * counts) / counts.sum()
    ratio = np.log(values / values[0]) / math.log(values[-1] / values[0])
    places = np.searchsorted(0.5 * (share - share[0]) / (share[-1] - share[0]) + 0.5 * ratio, np.linspace(0.0, 1.0, count))
    chosen = np.unique(values[np.clip(places, 0, values.size - 1)])
    return tuple(float(v) for v in np.unique(np.concatenate([values[:1], chosen, values[-1:]])))


def columns(data: Iterations, terms: Terms) -> FloatArray:
    """(n, knots + coefficients) what the values of the line and the coefficients are multiplied with; 0 for a term left out."""
    b, tokens = data.batches, data.tokens
    n, kv = b[:, DECODES], b[:, DECODE_KV]
    changes = (b[:, STARTED] + b[:, FINISHED]) > 0
    fresh = new_shapes(tokens, data.engine, terms.shapes)
    by_name = {
        "decode": n,
        "decode_kv": kv,
        "decode_kv_root": kv / np.sqrt(np.maximum(n, 1.0)),
        "prefill": b[:, PREFILLS],
        "prefill_work": b[:, PREFILL_WORK],
        "started": b[:, STARTED],
        "finished": b[:, FINISHED],
        "changed": changes * 1.0,
        "changed_decode": changes * n,
        "new_shape": fresh * 1.0,
        "new_shape_token": fresh * tokens,
    }
    kept = {*_ATTENTION, *itertools.chain(*terms.groups)}
    own = [by_name[name] * (1.0 if name in kept else 0.0) for name in COEFFICIENTS]
    return np.concatenate([line_columns(tokens, np.array(terms.knots)), np.stack(own, axis=1)], axis=1)


def line_columns(tokens: FloatArray, knots: FloatArray) -> FloatArray:
    """(n, knots) shares of the values at the points in a line's value at ``tokens``, all within the first and last point."""
    unit = np.eye(knots.size)
    return np.stack([np.interp(tokens, knots, unit[k]) for k in range(knots.size)], axis=1)


def solve(rows: FloatArray, seconds: FloatArray, num_knots: int) -> FloatArray:
    """Coefficients >= 0, those of the line above a floor; predicted seconds have the sum of measured ones, stalls apart."""
    found = non_negative(rows, seconds, range(num_knots), ROUNDS, CLIP)
    predicted = rows @ found
    kept = seconds < STALL * predicted
    result: FloatArray = found * (seconds[kept].sum() / predicted[kept].sum())
    return result


def model_of(terms: Terms, values: FloatArray, data: Iterations) -> TrafficTime:
    """The model with these coefficients, valid where the data are."""
    count = len(terms.knots)
    n = data.batches[:, DECODES]
    contexts = data.batches[n > 0, DECODE_KV] / n[n > 0]
    return TrafficTime(
        tokens=terms.knots,
        linear=tuple(values[:count].tolist()),
        **dict(zip(COEFFICIENTS, values[count:].tolist(), strict=True)),
        shapes=terms.shapes,
        max_tokens=float(data.tokens.max()),
        max_decodes=float(n.max()) or math.inf,
        max_context=float(contexts.max(initial=0.0)) or math.inf,
    )


def folds_of(run: IntArray) -> IntArray:
    """(n,) fold of each iteration: whole runs, or stretches of equal length where there are fewer than two."""
    names, inverse = np.unique(run, return_inverse=True)
    if names.size == 1:
        return np.asarray(np.arange(run.size) * FOLDS // run.size, dtype=np.int64)
    return np.asarray(inverse % min(FOLDS, names.size), dtype=np.int64)


def cross_validated(data: Iterations, terms: Terms, fold: IntArray, stalls: npt.NDArray[np.bool_]) -> FloatArray:
    """(n,) seconds of each fold predicted by a fit to the others."""
    rows = columns(data, terms)
    predicted = np.empty(len(data))
    for which in np.unique(fold):
        inside = fold == which
        train = ~inside & ~stalls
        predicted[inside] = rows[inside] @ solve(rows[train], data.seconds[train], len(terms.knots))
    return predicted


def cross_validated_with(
    fit: Callable[[FloatArray, FloatArray], IterationTimeModel], data: Iterations, fold: IntArray, stalls: npt.NDArray[np.bool_]
) -> FloatArray:
    """The same by a model that ``fit`` makes of (n, BATCH_FIELDS) batches and (n,) seconds."""
    predicted = np.empty(len(data))
    for which in np.unique(fold):
        inside = fold == which
        train = ~inside & ~stalls
        predicted[inside] = fit(data.batches[train], data.seconds[train]).seconds_of(data.batches[inside])
    return predicted


def clipped_errors(predicted: FloatArray, seconds: FloatArray) -> FloatArray:
    """(n,) squared error relative to the prediction, large ones clipped; its mean is what terms are chosen by."""
    error = np.abs(seconds / predicted - 1.0)
    return np.asarray(np.minimum(error, CLIP * np.median(error)) ** 2)


def surely_larger(without: FloatArray, errors: FloatArray) -> bool:
    """Whether (n,) errors without a term are larger than those with it beyond chance."""
    blocks = max(errors.size // BLOCK, 2)
    differences = np.array([part.mean() for part in np.array_split(without - errors, blocks)])
    return bool(differences.mean() > SURE * differences.std(ddof=1) / math.sqrt(blocks))


def fit_traffic(data: Iterations, shapes: Sequence[int] = SHAPES) -> Fitted:
    """The model of the terms that cross-validation keeps.

    Args:
        shapes: how many numbers of tokens a cache of kernels may keep; what fits best is chosen, 0 if none helps.

    Raises:
        ConfigError: fewer than ``LEAST_ROWS`` iterations, or times that are not above 0.
    """
    if len(data) < LEAST_ROWS:
        raise ConfigError(f"iterations: {len(data)}, a fit needs at least {LEAST_ROWS}")
    if not (data.seconds > 0).all():
        raise ConfigError(f"iterations: number {int(np.argmin(data.seconds)) + 1} takes {data.seconds.min():g} s, must be above 0")
    fold = folds_of(data.run)
    stalls = np.zeros(len(data), dtype=bool)

    def errors_of(terms: Terms) -> FloatArray:
        return clipped_errors(cross_validated(data, terms, fold, stalls), data.seconds)

    def error_of(terms: Terms) -> float:
        return float(errors_of(terms).mean())

    start = Terms(knots_of(data.tokens, KNOTS[1]))
    rows = columns(data, start)
    stalls = data.seconds > STALL * (rows @ solve(rows, data.seconds, len(start.knots)))
    every = [Terms(start.knots, GROUPS[:-1])]
    every += [Terms(start.knots, GROUPS, count) for count in shapes if count]
    errors = [error_of(terms) for terms in every]
    best = int(np.argmin(errors))
    if errors[best] > (1.0 - GAIN) * errors[0]:
        best = 0
    terms, error = every[best], errors[best]
    for count in (KNOTS[0], KNOTS[2]):
        other = Terms(knots_of(data.tokens, count), terms.groups, terms.shapes)
        found = error_of(other)
        if found < (error if count < len(terms.knots) else (1.0 - GAIN) * error):
            terms, error = other, found
    without: dict[str, float] = {}
    kept: list[tuple[str, ...]] = []
    errors_with = errors_of(terms)
    for group in terms.groups:
        other = Terms(terms.knots, tuple(g for g in terms.groups if g != group), terms.shapes if group != GROUPS[-1] else 0)
        errors_without = errors_of(other)
        without[group[0]] = float(errors_without.mean())
        if surely_larger(errors_without, errors_with):
            kept.append(group)
    terms = Terms(terms.knots, tuple(kept), terms.shapes if GROUPS[-1] in kept else 0)
    rows = columns(data, terms)
    values = solve(rows[~stalls], data.seconds[~stalls], len(terms.knots))
    return Fitted(
        model=model_of(terms, values, data),
        terms=terms,
        predicted=cross_validated(data, terms, fold, stalls),
        error=error,
        without=without,
        stalls=stalls,
    )
