"""What every batch takes at least: time models from below, by straight lines.

For every batch of P prompt tokens and n decodes that hold K tokens of context, with T = n + P tokens, m requests and s of
them sampling::

    seconds(batch) >= constant + (u + v T) + (b n + w K) + per_request m + per_sample s + per_work W

where W is the attention work of prefill (``Batch.prefill_work``), for any line (u, v) of ``tokens`` and any line (b, w) of ``decode``.
A table that is linear between its points lies above a line if its points do; one that is linear in n and in the mean context k does
so if the corners of its cells do, as n k is linear in both, too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf import mixed_attention as mixed
from llmsched_env.perf.base import IterationTimeModel
from llmsched_env.perf.interpolation import value_1d
from llmsched_env.perf.mixed_attention import MixedAttentionTime
from llmsched_env.perf.models import FormulaTime, LinearTime
from llmsched_env.perf.tables import H_LINEAR, H_PER_SEQUENCE, H_SEQUENCES, H_TOKENS, TableTime, decode_attention
from llmsched_env.perf.traffic import H_LINEAR as TRAFFIC_LINEAR
from llmsched_env.perf.traffic import H_TOKENS as TRAFFIC_TOKENS
from llmsched_env.perf.traffic import TrafficTime
from llmsched_env.types import FloatArray

Line = tuple[float, float]
"""(value at 0, slope)."""


@dataclass(frozen=True, slots=True)
class Minorant:
    """Lines below a time model, over batches of 1 to ``most_tokens`` tokens and at most ``most_requests`` decodes.

    Nobody's share of a line is below 0: ``constant + u`` of an iteration, ``v`` of a token, ``b + w k`` of a decode at any context k >= 1.

    Attributes:
        constant: seconds of every iteration.
        tokens: lines (seconds, seconds a token) below the part that tokens take; any one of them holds.
        decode: lines (seconds a decode, seconds a token of its context) below the part that decodes take; any one of them holds.
        per_request, per_sample: seconds of a request in the batch, and of one that samples a token.
        per_work: seconds of a unit of ``Batch.prefill_work``.
    """

    constant: float
    tokens: tuple[Line, ...]
    decode: tuple[Line, ...]
    per_request: float = 0.0
    per_sample: float = 0.0
    per_work: float = 0.0


def minorant(model: IterationTimeModel, most_tokens: int, most_requests: int, longest: int) -> Minorant:
    """Lines below a built-in time model.

    Args:
        most_tokens, most_requests: of a batch.
        longest: context of a decode, tokens.

    Raises:
        ConfigError: a model of which this is not proven.
    """
    if type(model) is LinearTime:
        return Minorant(0.0, ((model.d0, model.d1),), ((-model.d1, model.d1),))  # load is K + P at least: n of the T tokens are in K
    if type(model) is FormulaTime:
        return _of_formula(model, most_tokens, most_requests)
    if type(model) is TableTime and model.lookup == "linear":
        return _of_tables(model, most_tokens, most_requests, longest)
    if type(model) is TrafficTime:
        return _of_traffic(model, most_tokens, most_requests)
    if type(model) is MixedAttentionTime:
        return _of_mixed(model, most_tokens, most_requests)
    kind = f"{type(model).__name__}(lookup='vidur')" if type(model) is TableTime else type(model).__name__
    proven = "LinearTime, FormulaTime, TrafficTime, MixedAttentionTime or TableTime(lookup='linear')"
    raise ConfigError(f"engine.time_model: {kind}, must be {proven} for a bound")


def _of_formula(model: FormulaTime, most_tokens: int, most_requests: int) -> Minorant:
    ends = [(1.0, model.a + model.b)]
    if most_tokens <= model.knee:
        ends.append((float(most_tokens), model.a + model.b * most_tokens))
    else:
        if model.knee >= 1:
            ends.append((model.knee, model.a + model.b * model.knee))
        start = max(model.knee, 1.0)
        ends += [(start, model.s + model.c * start), (float(most_tokens), model.s + model.c * most_tokens)]
    if model.knee < 1:
        ends = ends[1:]
    decode = (model.d4, model.d1 + model.d2 / math.sqrt(most_requests))
    return Minorant(0.0, _from_above_0(lower_lines(ends)), (decode,), per_work=model.d3)


def _of_traffic(model: TrafficTime, most_tokens: int, most_requests: int) -> Minorant:
    packed = model.pack()
    points = [(x, float(value_1d(packed, TRAFFIC_TOKENS, TRAFFIC_LINEAR, x, False))) for x in _within(model.tokens, most_tokens)]
    _check_positive(points)
    decode = (model.decode, model.decode_kv + model.decode_kv_root / math.sqrt(most_requests))
    return Minorant(0.0, _from_above_0(lower_lines(points)), (decode,), per_work=model.prefill_work)


def _of_mixed(model: MixedAttentionTime, most_tokens: int, most_requests: int) -> Minorant:
    """Operators alone: attention is read from a table of whole batches and corrected for unequal contexts; it is at least 0."""
    packed = model.pack()
    linear = [(x, float(value_1d(packed, mixed.H_TOKENS, mixed.H_LINEAR, x, False))) for x in _within(model.tokens, most_tokens)]
    _check_positive(linear)
    requests = _within(model.sequences, most_requests)
    samples = [(x, float(value_1d(packed, mixed.H_SEQUENCES, mixed.H_PER_SEQUENCE, x, False))) for x in requests]
    _check_positive(samples)
    return Minorant(0.0, _from_above_0(lower_lines(linear)), ((0.0, 0.0),), per_request=min(value / x for x, value in samples))


def _of_tables(model: TableTime, most_tokens: int, most_requests: int, longest: int) -> Minorant:
    packed, clip = model.pack(), model.beyond == "clip"
    linear = [(x, float(value_1d(packed, H_TOKENS, H_LINEAR, x, clip))) for x in _within(model.tokens, most_tokens)]
    _check_positive(linear)
    sizes = _within(model.decode_batch, most_requests)
    shares = []
    for k in _within(model.decode_kv, longest):
        seconds = [(n, float(decode_attention(packed, n, k, clip))) for n in sizes]
        _check_positive(seconds)
        shares.append((k, min(value / n for n, value in seconds)))
    per_sample = 0.0
    if model.sequences.size:
        samples = [(x, float(value_1d(packed, H_SEQUENCES, H_PER_SEQUENCE, x, clip))) for x in _within(model.sequences, most_requests)]
        _check_positive(samples)
        per_sample = min(value / x for x, value in samples)
    tokens = tuple(line for line in lower_lines(linear) if model.constant + line[0] >= 0)
    decode = tuple(line for line in lower_lines(shares) if line[0] + line[1] >= 0)
    return Minorant(model.constant, tokens, decode, model.per_request, per_sample)


def _from_above_0(lines: tuple[Line, ...]) -> tuple[Line, ...]:
    return tuple(line for line in lines if line[0] >= 0)


def _within(axis: FloatArray | tuple[float, ...], most: int) -> list[float]:
    """1, the points of an axis between, and ``most``: between two of these a table is one straight line."""
    return sorted({1.0, float(most), *(float(x) for x in axis if 1 < x < most)})


def _check_positive(points: list[tuple[float, float]]) -> None:
    """Refuse a line that has been cut off at 0: between its ends it may lie below the line through them."""
    for x, seconds in points:
        if not seconds > 0:
            raise ConfigError(f"engine.time_model: {seconds} seconds at {x:g}, must be above 0 where the engine may read it, for a bound")


def lower_lines(points: list[tuple[float, float]]) -> tuple[Line, ...]:
    """The lines with slope >= 0 along the lower side of the convex hull of points (x, y); one at least, the flat one below all."""
    best: dict[float, float] = {}
    for x, y in points:
        best[x] = min(y, best.get(x, math.inf))
    hull: list[tuple[float, float]] = []
    for x, y in sorted(best.items()):
        while len(hull) >= 2 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (hull[-1][0] - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    slopes = [0.0]
    slopes += [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(hull) if b[1] > a[1]]
    xs, ys = np.array(list(best)), np.array(list(best.values()))
    return tuple((float((ys - slope * xs).min()), float(slope)) for slope in slopes)  # below every point, whatever was rounded


__all__ = ["Minorant", "lower_lines", "minorant"]
