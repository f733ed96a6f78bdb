"""Iteration times learned from measured iterations, compiled.

The seconds of an iteration are taken as

    tau = f(T) + a KV + b W + c X + d n

with T tokens in the batch, KV tokens of context of its n decodes, W the attention work of its prefill chunks and X their context
(``llmsched_env.perf.batch``; it is read once a chunk, so smaller chunks read it more often), and f linear between knots. All
coefficients come from weighted least squares, an iteration's weight being 1 / tau^2, so that the error is relative. The knots lie at
multiples of the tile of a GPU's matrix products, where its steps end. Where no iteration has been, f goes on as a straight line: a
penalty on its bends, worth a twentieth of an iteration, says so.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.perf.batch import BatchSums
from llmsched_env.records import Record, Vector

KNOTS = (1, 16, 32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1_024, 1_536, 2_048, 4_096, 8_192, 16_384)
"""Tokens; those up to the engine's budget are used."""
OTHERS = 4
"""Coefficients beside those of the knots."""
UNITS = (1e-5, 1e-6, 1e-4, 1e-2)
"""What KV, W, X and n are multiplied by, so that coefficients are of one size."""
KEEP = 0.99
"""Share that counts of the iterations before each time the coefficients are found."""
BEND = 0.05
"""Iterations that the penalty on a bend is worth."""
RIDGE = 0.01
"""Iterations that the pull of the other coefficients towards 0 is worth."""
STEADY = 1e-9
"""The same for knots: the system is singular without it, and a pull that counted would bend the line beyond what has been seen."""


class TimesRecord(Record):
    """What has been learned. K knots, M = K + 4 coefficients."""

    knots: Vector  # (K,) tokens
    normal: Vector  # (M * M,) sums of products
    right: Vector  # (M,)
    found: Vector  # (M,) coefficients, seconds
    scratch: Vector  # (M * (M + 1),)
    row: Vector  # (M,) of the iteration being noted
    iterations: float  # weight of those noted
    scale: float  # mean of 1 / tau^2


def times_record(budget: int) -> TimesRecord:
    """A record that knows nothing yet, for iterations of up to ``budget`` tokens."""
    last = max(budget, KNOTS[0] + 1)
    knots = np.array([*(k for k in KNOTS if k < last), last], dtype=np.float64)
    size = knots.size + OTHERS
    empty = {"normal": size * size, "right": size, "found": size, "scratch": size * (size + 1), "row": size}
    return TimesRecord(knots=knots, **{name: np.zeros(n) for name, n in empty.items()})


@compiled
def forget_times(times: TimesRecord) -> None:
    """Know nothing again."""
    for i in range(times.normal.shape[0]):
        times.normal[i] = 0.0
    for i in range(times.right.shape[0]):
        times.right[i] = 0.0
        times.found[i] = 0.0
    times.iterations = 0.0
    times.scale = 0.0


@compiled
def knot_below(times: TimesRecord, tokens: float) -> int:
    """The knot at which the piece with ``tokens`` begins."""
    k = 0
    while k < times.knots.shape[0] - 2 and tokens >= times.knots[k + 1]:
        k += 1
    return k


@compiled
def note_iteration(times: TimesRecord, batch: BatchSums, seconds: float) -> None:
    """Learn from an iteration that took ``seconds``."""
    size, knots, row = times.right.shape[0], times.knots.shape[0], times.row
    tokens = batch.decodes + batch.prefill_tokens
    k = knot_below(times, tokens)
    share = (tokens - times.knots[k]) / (times.knots[k + 1] - times.knots[k])
    for i in range(size):
        row[i] = 0.0
    row[k] = (1.0 - share) / seconds
    row[k + 1] = share / seconds
    row[knots] = batch.decode_kv * UNITS[0] / seconds
    row[knots + 1] = batch.prefill_work * UNITS[1] / seconds
    row[knots + 2] = batch.prefill_context * UNITS[2] / seconds
    row[knots + 3] = batch.decodes * UNITS[3] / seconds
    for i in range(size):
        if row[i] != 0.0:
            times.right[i] += row[i]
            for j in range(size):
                times.normal[i * size + j] += row[i] * row[j]
    times.iterations += 1.0
    times.scale += (1.0 / (seconds * seconds) - times.scale) / times.iterations


@compiled
def learn_times(times: TimesRecord) -> None:
    """Find the coefficients; those of before where no iteration has been noted."""
    if times.iterations == 0.0:
        return
    size, knots, matrix = times.right.shape[0], times.knots.shape[0], times.scratch
    width = size + 1
    for i in range(size):
        for j in range(size):
            matrix[i * width + j] = times.normal[i * size + j]
        matrix[i * width + size] = times.right[i]
        matrix[i * width + i] += (RIDGE if i >= knots else STEADY) * times.scale
    for k in range(1, knots - 1):
        # By how much the middle one of three knots lies off the line through the others.
        share = (times.knots[k] - times.knots[k - 1]) / (times.knots[k + 1] - times.knots[k - 1])
        for i in range(3):
            for j in range(3):
                bend = (share - 1.0, 1.0, -share)
                matrix[(k - 1 + i) * width + k - 1 + j] += BEND * times.scale * bend[i] * bend[j]
    eliminate(matrix, size, times.found)
    for k in range(1, knots):  # more tokens take no less time
        times.found[k] = max(times.found[k], times.found[k - 1])
    for i in range(knots, size):
        times.found[i] = max(times.found[i], 0.0)
    for i in range(size):
        times.right[i] *= KEEP
    for i in range(size * size):
        times.normal[i] *= KEEP
    times.iterations *= KEEP


@compiled
def eliminate(matrix: Vector, size: int, out: Vector) -> None:
    """Solve a positive definite system given as ``size`` rows of coefficients and right side; ``matrix`` is used up."""
    width = size + 1
    for i in range(size):
        pivot = matrix[i * width + i]
        for j in range(i + 1, size):
            factor = matrix[j * width + i] / pivot
            if factor != 0.0:
                for k in range(i, width):
                    matrix[j * width + k] -= factor * matrix[i * width + k]
    for i in range(size - 1, -1, -1):
        total = matrix[i * width + size]
        for j in range(i + 1, size):
            total -= matrix[i * width + j] * out[j]
        out[i] = total / matrix[i * width + i]


@compiled
def seconds_of(times: TimesRecord, decodes: float, context: float, prefill: float, work: float) -> float:
    """Seconds of an iteration to expect.

    Args:
        decodes: requests.
        context: tokens of context of each decode.
        prefill: prompt tokens.
        work: attention work of a prompt token, and so the mean context of a chunk.
    """
    knots = times.knots.shape[0]
    tokens = decodes + prefill
    k = knot_below(times, tokens)
    share = (tokens - times.knots[k]) / (times.knots[k + 1] - times.knots[k])
    seconds = times.found[k] + share * (times.found[k + 1] - times.found[k])
    seconds += times.found[knots] * UNITS[0] * decodes * context
    seconds += times.found[knots + 1] * UNITS[1] * prefill * work
    if prefill > 0.0:
        seconds += times.found[knots + 2] * UNITS[2] * work
    seconds += times.found[knots + 3] * UNITS[3] * decodes
    return float(max(seconds, 1e-4))
