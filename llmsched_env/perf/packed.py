"""What the numbers of the built-in iteration-time models must be, so that compiled code, which checks nothing, can read them."""

from __future__ import annotations

import math

import numpy as np

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.perf import mixed_attention as mixed
from llmsched_env.perf import skew, tables, traffic
from llmsched_env.perf.base import CHECKED_TYPES, MOST, PACKED_CHECKS, FloatArray, check_axis
from llmsched_env.perf.mixed_attention import MixedAttentionTime, mixed_attention_seconds
from llmsched_env.perf.models import FormulaTime, LinearTime, formula_seconds, linear_seconds
from llmsched_env.perf.tables import TableTime, table_seconds
from llmsched_env.perf.traffic import TrafficTime, traffic_seconds

_Axes = tuple[tuple[int, int], ...]
_Values = tuple[tuple[int, tuple[int, ...]], ...]

# (place of an axis in the header, least points) and (place of a table, axes).
_TABLE: tuple[_Axes, _Values] = (
    ((tables.H_TOKENS, 2), (tables.H_DECODES, 2), (tables.H_DECODE_KV, 2), (tables.H_CONTEXT, 2), (tables.H_CHUNK, 2)),
    (
        (tables.H_LINEAR, (tables.H_TOKENS,)),
        (tables.H_DECODE, (tables.H_DECODES, tables.H_DECODE_KV)),
        (tables.H_PREFILL, (tables.H_CONTEXT, tables.H_CHUNK)),
    ),
)
_MIXED: tuple[_Axes, _Values] = (
    ((mixed.H_TOKENS, 2), (mixed.H_SEQUENCES, 2), (mixed.H_CHUNK, 2), (mixed.H_CONTEXT, 2), (mixed.H_DECODES, 2), (mixed.H_DECODE_KV, 2)),
    (
        (mixed.H_LINEAR, (mixed.H_TOKENS,)),
        (mixed.H_PER_SEQUENCE, (mixed.H_SEQUENCES,)),
        (mixed.H_ATTENTION, (mixed.H_CHUNK, mixed.H_CONTEXT, mixed.H_DECODES, mixed.H_DECODE_KV)),
    ),
)


def _check_linear(owner: str, packed: FloatArray) -> None:
    _coefficients(owner, packed, 2, range(2))
    if packed[0] + packed[1] == 0:
        raise ConfigError(f"{owner}[0], [1]: both 0, an iteration must take time")


def _check_formula(owner: str, packed: FloatArray) -> None:
    _coefficients(owner, packed, 12, range(9))
    for i in range(9, 12):
        checks.number(f"{owner}[{i}]", packed[i], high=np.inf, open_low=True)
    if packed[1] == 0:
        raise ConfigError(f"{owner}[1]: 0, an iteration must take time")


def _check_table(owner: str, packed: FloatArray) -> None:
    _coefficients(owner, packed, tables.H_FIELDS, (tables.H_CONSTANT, tables.H_PER_REQUEST))
    axes, values = _TABLE
    if packed[tables.H_SEQUENCES + 1] > 0:
        axes, values = (*axes, (tables.H_SEQUENCES, 2)), (*values, (tables.H_PER_SEQUENCE, (tables.H_SEQUENCES,)))
    if packed[tables.H_PROMPTS + 1] > 0:
        axes = (*axes, (tables.H_PROMPTS, 2), (tables.H_PROMPT_LENGTH, 2))
        values = (*values, (tables.H_SEVERAL, (tables.H_PROMPTS, tables.H_PROMPT_LENGTH)))
    _tables(owner, packed, axes, values)


def _check_mixed(owner: str, packed: FloatArray) -> None:
    _coefficients(owner, packed, mixed.H_FIELDS, (mixed.H_MIXED_DECODES,))
    axes, values = _MIXED
    _tables(owner, packed, axes, values)
    if packed[mixed.H_SKEW + skew.S_ALPHA] != 0:
        _check_skew(owner, packed)


def _check_skew(owner: str, packed: FloatArray) -> None:
    cells = 1
    for edges in (skew.S_CHUNK, skew.S_DECODES, skew.S_RATE, skew.S_LONGEST, skew.S_CONTEXT):
        _tables(owner, packed, ((mixed.H_SKEW + edges, 1),), ())
        cells *= int(packed[mixed.H_SKEW + edges + 1]) + 1
    alpha = _part(owner, packed, mixed.H_SKEW + skew.S_ALPHA, cells)
    if not np.all(np.abs(alpha) <= MOST):
        raise ConfigError(f"{owner}[{mixed.H_SKEW + skew.S_ALPHA}]: its table, must be finite and from -{MOST:g} to {MOST:g}")


def _check_traffic(owner: str, packed: FloatArray) -> None:
    _coefficients(owner, packed, traffic.H_FIELDS, range(traffic.H_SHAPES))
    shapes = packed[traffic.H_SHAPES]
    if not (shapes == np.floor(shapes) and 0 <= shapes <= traffic.MOST_SHAPES):
        raise ConfigError(f"{owner}[{traffic.H_SHAPES}]: {shapes}, must be a whole number from 0 to {traffic.MOST_SHAPES}")
    for i in (traffic.H_MAX_TOKENS, traffic.H_MAX_DECODES, traffic.H_MAX_CONTEXT):
        checks.number(f"{owner}[{i}]", packed[i], high=np.inf, open_low=True)
    _tables(owner, packed, ((traffic.H_TOKENS, 2),), ((traffic.H_LINEAR, (traffic.H_TOKENS,)),))


def _coefficients(owner: str, packed: FloatArray, size: int, places: tuple[int, ...] | range) -> None:
    if packed.size < size:
        raise ConfigError(f"{owner} gives {packed.size} numbers, must be at least {size}")
    for i in places:
        checks.number(f"{owner}[{i}]", packed[i], high=MOST)


def _part(owner: str, packed: FloatArray, place: int, size: int) -> FloatArray:
    """The ``size`` numbers that start where the header says."""
    start = packed[place]
    if not (start == np.floor(start) and 1 <= start <= packed.size - size):
        raise ConfigError(f"{owner}[{place}]: {start}, must be where {size} of its {packed.size} numbers start")
    return packed[int(start) : int(start) + size]


def _tables(owner: str, packed: FloatArray, axes: _Axes, values: _Values) -> None:
    sizes: dict[int, int] = {}
    for place, least in axes:
        size = packed[place + 1]
        if not (size == np.floor(size) and least <= size <= packed.size):
            raise ConfigError(f"{owner}[{place + 1}]: {size}, must be the length of an axis, from {least}")
        sizes[place] = int(size)
        check_axis(owner, f"[{place}]", _part(owner, packed, place, sizes[place]), least)
    for place, over in values:
        found = _part(owner, packed, place, math.prod(sizes[axis] for axis in over))
        if not np.all(np.abs(found) <= MOST):  # below 0 a line may go where it is extrapolated; it is read as 0
            raise ConfigError(f"{owner}[{place}]: its table, must be finite and <= {MOST:g} seconds")


for _reader, _check in (
    (linear_seconds, _check_linear),
    (formula_seconds, _check_formula),
    (table_seconds, _check_table),
    (mixed_attention_seconds, _check_mixed),
    (traffic_seconds, _check_traffic),
):
    PACKED_CHECKS[_reader] = _check
CHECKED_TYPES.update((LinearTime, FormulaTime, TableTime, MixedAttentionTime, TrafficTime))
