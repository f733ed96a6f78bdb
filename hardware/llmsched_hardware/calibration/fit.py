"""Iteration-time models fitted to measured batches: non-negative least squares on relative error.

Every model here is linear in its coefficients. Rows are divided by the predicted time, found in a few rounds: divided by the measured
time they would draw the fit to what happened to be short, which biases its sum low. Coefficients below 0 would make an iteration
shorter by adding work to it; they are excluded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_env.errors import ConfigError, require
from llmsched_env.perf import FormulaTime, IterationTimeModel, LinearTime, TableTime
from llmsched_env.perf.base import FloatArray
from llmsched_env.perf.batch import DECODE_KV, DECODES, LOAD, PREFILL_SQUARES, PREFILL_TOKENS, PREFILL_WORK
from llmsched_env.perf.tables import H_CONSTANT, H_DECODE, H_LINEAR, H_PER_REQUEST, H_PREFILL
from llmsched_hardware.calibration.points import Point, seconds_of

# The constant term stays above this share of the shortest iteration: an empty batch takes time.
FLOOR = 0.01
# A step in the token line must repay its two coefficients: by this share of the mean relative error, and by this much of it.
KNEE_GAIN = 0.10
KNEE_LEAST = 0.002
KNEE_POINTS = 6
MOST_KNEES = 40
ROUNDS = 4
MANY_ROWS, RIDGE = 2_000, 1e-10
"""From where on rows are put together. Columns may be multiples of one another, as tokens and decodes are where nothing is prefilled."""
# How strongly a table is drawn to the formula, and its deviation from it to that of the neighbours.
TO_FORMULA = 0.02
TO_NEIGHBOURS = 0.15
# Points of a table's axis are at least this far apart, as a ratio.
AXIS_RATIO = 1.2


@dataclass(frozen=True, slots=True)
class FitError:
    """Relative errors of a model on measured iterations, model over measured - 1.

    Attributes:
        mape: mean of their absolute values.
        median, p90: of their absolute values.
        bias: sum of modelled over sum of measured seconds - 1.
        count: iterations.
    """

    mape: float
    median: float
    p90: float
    bias: float
    count: int

    def __str__(self) -> str:
        return (
            f"MAPE {100 * self.mape:.1f} %, median {100 * self.median:.1f} %, P90 {100 * self.p90:.1f} %, "
            f"total {100 * self.bias:+.1f} %, {self.count:,} iterations"
        )


def modelled(model: IterationTimeModel, batches: FloatArray) -> FloatArray:
    """(n,) seconds of (n, BATCH_FIELDS) batches."""
    return model.seconds_of(batches)


def fit_error(model: IterationTimeModel, batches: FloatArray, seconds: FloatArray) -> FitError:
    """Error of a model on (n, BATCH_FIELDS) batches that took (n,) seconds."""
    ours = modelled(model, batches)
    error = np.abs(ours / seconds - 1.0)
    median, p90 = np.percentile(error, (50, 90))
    return FitError(float(error.mean()), float(median), float(p90), float(ours.sum() / seconds.sum() - 1.0), int(seconds.size))


def batches_of(points: Sequence[Point]) -> FloatArray:
    """(n, BATCH_FIELDS) sums of the measured batches."""
    return np.array([point.batch.array() for point in points])


def fit_linear(points: Sequence[Point]) -> LinearTime:
    """The paper's two terms, tau = d0 + d1 * load (arXiv 2504.11320).

    Raises:
        ConfigError: fewer than two points.
    """
    return linear_of(*_data(points, 2))


def linear_of(batches: FloatArray, seconds: FloatArray) -> LinearTime:
    """The paper's two terms of (n, BATCH_FIELDS) batches that took (n,) seconds."""
    columns = np.stack([np.ones(seconds.size), batches[:, LOAD]], axis=1)
    d0, d1 = non_negative(columns, seconds, floors=(0,))
    return LinearTime(float(d0), float(d1))


def fit_formula(points: Sequence[Point]) -> FormulaTime:
    """The compact formula. The token line gets a step where the points ask for one.

    Raises:
        ConfigError: fewer than two points.
    """
    return formula_of(*_data(points, 2))


def formula_of(batches: FloatArray, seconds: FloatArray) -> FormulaTime:
    """The compact formula of (n, BATCH_FIELDS) batches that took (n,) seconds."""
    tokens = batches[:, DECODES] + batches[:, PREFILL_TOKENS]
    best = _fit_knee(batches, seconds, tokens, math.inf)
    error = _mape(best, batches, seconds)
    allowed = min((1.0 - KNEE_GAIN) * error, error - KNEE_LEAST)
    for knee in _knees(tokens):
        if min(np.count_nonzero(tokens <= knee), np.count_nonzero(tokens > knee)) < KNEE_POINTS:
            continue
        model = _fit_knee(batches, seconds, tokens, float(knee))
        error = _mape(model, batches, seconds)
        if error < allowed:
            best, allowed = model, error
    decodes = batches[:, DECODES]
    contexts = batches[decodes > 0, DECODE_KV] / decodes[decodes > 0]
    return dataclasses.replace(
        best,
        max_tokens=float(tokens.max()),
        max_decodes=float(decodes.max()) or math.inf,
        max_context=float(contexts.max(initial=0.0)) or math.inf,
    )


def _knees(tokens: FloatArray) -> FloatArray:
    """Where a step may be: behind each number of tokens, of many at equal shares."""
    values: FloatArray = np.unique(tokens)[:-1]
    if values.size <= MOST_KNEES:
        return values
    chosen: FloatArray = np.unique(np.quantile(tokens, np.linspace(0.0, 1.0, MOST_KNEES), method="lower"))[:-1]
    return chosen


def _fit_knee(batches: FloatArray, seconds: FloatArray, tokens: FloatArray, knee: float) -> FormulaTime:
    """The formula with a step after ``knee`` tokens; one line for an infinite one."""
    n, kv = batches[:, DECODES], batches[:, DECODE_KV]
    low = tokens <= knee
    root = np.sqrt(n, out=np.ones_like(n), where=n > 0)
    common = [kv, kv / root, batches[:, PREFILL_WORK], n]
    ones = np.ones_like(tokens)
    if math.isinf(knee):
        a, b, *rest = non_negative(np.stack([ones, tokens, *common], axis=1), seconds, floors=(0,))
        s, c, knee = a, b, 0.0
    else:
        lines = [ones * low, tokens * low, ones * ~low, tokens * ~low]
        a, b, s, c, *rest = non_negative(np.stack([*lines, *common], axis=1), seconds, floors=(0, 2))
    d1, d2, d3, d4 = (float(x) for x in rest)
    return FormulaTime(a=float(a), b=float(b), s=float(s), c=float(c), d1=d1, d2=d2, d3=d3, d4=d4, knee=knee)


def _mape(model: IterationTimeModel, batches: FloatArray, seconds: FloatArray) -> float:
    return float(np.abs(modelled(model, batches) / seconds - 1.0).mean())


def _data(points: Sequence[Point], least: int) -> tuple[FloatArray, FloatArray]:
    if len(points) < least:
        raise ConfigError(f"points: {len(points)} measured, a fit needs at least {least}")
    return batches_of(points), seconds_of(points)


def non_negative(
    columns: FloatArray, seconds: FloatArray, floors: Sequence[int], rounds: int = ROUNDS, clip: float = math.inf
) -> FloatArray:
    """Coefficients >= 0 of the smallest squared relative error; those at ``floors`` stay above 0.

    Args:
        rounds: how often the predicted times that rows are divided by are found anew.
        clip: residuals beyond so many typical ones (median absolute) count as that many (Huber).
    """
    floor = np.zeros(columns.shape[1])
    floor[list(floors)] = FLOOR * seconds.min()
    predicted, result, weight = seconds, floor, np.ones(seconds.size)
    for _ in range(rounds):
        rows = columns * (weight / predicted)[:, None]
        scale = np.abs(rows).max(axis=0)  # coefficients differ by ten orders of magnitude
        scale[scale == 0] = 1.0
        result = floor + _nnls(rows / scale, (seconds - columns @ floor) * weight / predicted) / scale
        predicted = columns @ result
        if math.isfinite(clip):
            error = np.abs(seconds / predicted - 1.0)
            weight = np.sqrt(np.minimum(1.0, clip * max(float(np.median(error)), 1e-6) / np.maximum(error, 1e-12)))
    return result


def _nnls(rows: FloatArray, sides: FloatArray) -> FloatArray:
    """Non-negative least squares; of many rows first the same squares in as many rows as columns."""
    nnls = require("scipy.optimize", "cli").nnls
    if len(rows) > MANY_ROWS:
        squares = rows.T @ rows
        root: FloatArray = np.linalg.cholesky(squares + RIDGE * np.trace(squares) * np.eye(len(squares)))
        rows, sides = root.T, np.asarray(np.linalg.solve(root, rows.T @ sides), dtype=np.float64)
    solution: FloatArray = nnls(rows, sides, maxiter=50 * rows.shape[1])[0]
    return solution


# --- tables ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Cells:
    """Where one table of a packed ``TableTime`` stands: ``start``, and its shape."""

    start: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def fit_tables(points: Sequence[Point], formula: FormulaTime) -> TableTime:
    """Tables through the measured points.

    A whole step is the sum of what depends on tokens, of decode attention and of prefill attention,
    and only the sum is measured; cells without a point have no measurement at all. Both are settled
    by the formula: weak extra rows draw every cell to its value there, and a cell's deviation from
    it to that of its neighbours.

    Raises:
        ConfigError: fewer than two points.
    """
    batches, seconds = _data(points, 2)
    start = _formula_tables(points, formula)
    packed = start.pack()
    cells = {
        "linear": _Cells(int(packed[H_LINEAR]), start.linear.shape),
        "decode": _Cells(int(packed[H_DECODE]), start.decode.shape),
        "prefill": _Cells(int(packed[H_PREFILL]), start.prefill.shape),
    }
    where = np.concatenate([np.arange(c.start, c.start + c.size) for c in cells.values()])
    initial = packed[where]
    scale = _iteration_scale(start, formula)
    rows = _weights(packed, where, batches)
    # What is unknown is the deviation of a cell in units of its iteration, shifted so that >= 0 means seconds >= 0.
    columns = rows * scale / seconds[:, None]
    measured = 1.0 - (rows @ initial) / seconds
    smooth = _differences(list(cells.values()))
    identity = np.eye(where.size)
    system = np.concatenate([columns, TO_FORMULA * identity, TO_NEIGHBOURS * smooth])
    target = np.concatenate([measured, np.zeros(where.size + smooth.shape[0])])
    lowest = -initial / scale
    # At least a hundredth of the formula's seconds by tokens stays: an iteration takes time.
    linear = slice(0, cells["linear"].size)
    lowest[linear] *= 1.0 - FLOOR
    nnls = require("scipy.optimize", "cli").nnls
    solution, _ = nnls(system, target - system @ lowest)
    values = np.maximum(initial + scale * (lowest + solution), 0.0)
    tables, at = {}, 0
    for name, table in cells.items():
        tables[name] = values[at : at + table.size].reshape(table.shape)
        at += table.size
    return dataclasses.replace(start, **tables)


def _axis(values: Sequence[float] | FloatArray, first: float, last: float) -> FloatArray:
    """Increasing axis from ``first`` to ``last`` through the values, those too close to another left out."""
    axis = [first]
    for value in sorted({float(v) for v in values}):
        if value >= max(axis[-1], 1.0) * AXIS_RATIO and value * AXIS_RATIO <= last:
            axis.append(value)
    if last > axis[-1]:
        axis.append(last)
    if len(axis) < 2:
        axis.append(axis[-1] + 1.0)
    return np.array(axis)


def _formula_tables(points: Sequence[Point], formula: FormulaTime) -> TableTime:
    """The formula as tables on the axes of what was measured."""
    batches = batches_of(points)
    n, total = batches[:, DECODES], batches[:, DECODES] + batches[:, PREFILL_TOKENS]
    own = [point.probe for point in points]
    decode = n > 0
    contexts = batches[decode, DECODE_KV] / n[decode]
    chunk = np.sqrt(batches[:, PREFILL_SQUARES])
    prefill = chunk > 0
    behind = (batches[prefill, PREFILL_WORK] - 0.5 * chunk[prefill] ** 2) / chunk[prefill]
    tokens = _axis([p.decodes + p.chunk for p in own], 0.0, total.max())  # from 0: an empty batch takes time
    decode_batch = _axis([p.decodes for p in own if p.decodes], 1.0, n.max(initial=1.0))
    decode_kv = _axis([p.context + 1 for p in own if p.decodes], 1.0, contexts.max(initial=1.0))
    prefill_chunk = _axis([p.chunk for p in own if p.chunk], 1.0, chunk.max(initial=1.0))
    prefill_context = _axis([p.chunk_context for p in own if p.chunk], 0.0, behind.max(initial=0.0))
    f = formula
    kv = np.outer(decode_batch, decode_kv)
    return TableTime(
        tokens=tokens,
        linear=np.where(tokens <= f.knee, f.a + f.b * tokens, f.s + f.c * tokens),
        decode_batch=decode_batch,
        decode_kv=decode_kv,
        decode=f.d1 * kv + f.d2 * kv / np.sqrt(decode_batch)[:, None] + f.d4 * decode_batch[:, None],
        prefill_context=prefill_context,
        prefill_chunk=prefill_chunk,
        prefill=f.d3 * prefill_chunk * (prefill_chunk / 2 + prefill_context[:, None]),
    )


def _iteration_scale(tables: TableTime, formula: FormulaTime) -> FloatArray:
    """(cells,) seconds of the iteration that a cell is part of: what its relative deviation refers to."""
    linear = np.maximum(tables.linear, formula.a)
    with_decode = tables.decode + np.interp(tables.decode_batch, tables.tokens, linear)[:, None]
    with_prefill = tables.prefill + np.interp(tables.prefill_chunk, tables.tokens, linear)
    return np.concatenate([linear, with_decode.ravel(), with_prefill.ravel()])


def _weights(packed: FloatArray, where: FloatArray, batches: FloatArray) -> FloatArray:
    """(n, cells): how much of each cell a batch reads; the model is linear in its cells, so unit cells tell."""
    unit = packed.copy()
    unit[where] = 0.0
    unit[[H_CONSTANT, H_PER_REQUEST]] = 0.0
    rows = np.empty((batches.shape[0], where.size))
    for column, cell in enumerate(where):
        unit[cell] = 1.0
        rows[:, column] = TableTime.evaluate(unit, batches)[0]
        unit[cell] = 0.0
    return rows


def _differences(tables: Sequence[_Cells]) -> FloatArray:
    """(pairs, cells) rows: one cell minus its next along each axis of its table."""
    size = sum(table.size for table in tables)
    rows: list[FloatArray] = []
    offset = 0
    for table in tables:
        index = offset + np.arange(table.size).reshape(table.shape)
        for axis in range(len(table.shape)):
            first = np.take(index, range(table.shape[axis] - 1), axis=axis).ravel()
            second = np.take(index, range(1, table.shape[axis]), axis=axis).ravel()
            row = np.zeros((first.size, size))
            row[np.arange(first.size), first] = 1.0
            row[np.arange(first.size), second] = -1.0
            rows.append(row)
        offset += table.size
    return np.concatenate(rows)
