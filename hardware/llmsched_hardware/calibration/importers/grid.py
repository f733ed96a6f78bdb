"""Measured values on a full grid: cells that were not measured are interpolated from those that were.

A profile may be the union of several grids, or lack cells that did not fit the GPU's memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import FloatArray

Cell = tuple[int, ...]
_NARROW = 2.0  # the steps of kernel profiles double


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """Error of predicting each interior point of a profile from its two neighbours along one axis, relative to the measurement."""

    name: str
    points: int
    bias: float
    mean: float
    p95: float

    @classmethod
    def of(cls, name: str, errors: Sequence[float]) -> LeaveOneOut:
        """Of relative errors; all 0 where no point is between two others."""
        values = np.array(errors) if errors else np.zeros(1)
        size = np.abs(values)
        return cls(name, len(errors), float(values.mean()), float(size.mean()), float(np.quantile(size, 0.95)))


@dataclass(frozen=True, slots=True)
class Filled:
    """A full grid.

    Attributes:
        values: one axis of the array an axis of the grid.
        interpolated: cells between measured ones that were filled.
        extrapolated: cells beyond all measured ones that were filled.
    """

    values: FloatArray
    interpolated: int
    extrapolated: int


def neighbour_errors(line: Mapping[int, float]) -> list[float]:
    """Relative error of each interior point of a line {coordinate: value} when it is read off its two neighbours."""
    points = sorted(line)
    found = []
    for low, x, high in zip(points, points[1:], points[2:], strict=False):
        weight = (x - low) / (high - low)
        found.append((line[low] + weight * (line[high] - line[low])) / line[x] - 1.0)
    return found


def errors_along(cells: Mapping[Cell, float], axis: int) -> list[float]:
    """``neighbour_errors`` of every line of the cells along one axis."""
    lines: dict[Cell, dict[int, float]] = {}
    for cell, value in cells.items():
        lines.setdefault((*cell[:axis], *cell[axis + 1 :]), {})[cell[axis]] = value
    return list(itertools.chain.from_iterable(neighbour_errors(line) for line in lines.values()))


def fill(name: str, cells: Mapping[Cell, float], axes: Sequence[Sequence[int]]) -> Filled:
    """The cells on the grid of these axes.

    Measured cells stay. One between two known cells of a line is read off them, first where they are at most a factor of 2
    apart, and along the axis first whose measured points are told best by their neighbours. What lies beyond all known cells of a line
    goes on through the last one and the first one at or above half its coordinate, not below the last one.

    Args:
        name: of the file, for messages.
        cells: {coordinates: value}; cells off the grid are not used.
        axes: increasing coordinates of each axis.

    Raises:
        ConfigError: too few cells were measured to tell the others.
    """
    places = [{x: i for i, x in enumerate(axis)} for axis in axes]
    values: FloatArray = np.full([len(axis) for axis in axes], np.nan)
    inside = {cell: v for cell, v in cells.items() if all(x in known for x, known in zip(cell, places, strict=True))}
    for cell, value in inside.items():
        values[tuple(known[x] for x, known in zip(cell, places, strict=True))] = value
    lacking = int(np.isnan(values).sum())
    if lacking == 0:
        return Filled(values, 0, 0)
    several = [i for i, axis in enumerate(axes) if len(axis) > 1]
    order = sorted(several, key=lambda i: LeaveOneOut.of("", errors_along(inside, i)).mean)
    coordinates = [np.array(axis, dtype=np.float64) for axis in axes]
    _fill_between(values, coordinates, order)
    interpolated = lacking - int(np.isnan(values).sum())
    while np.isnan(values).any():
        before = int(np.isnan(values).sum())
        for axis in order:
            _each_line(values, coordinates[axis], axis, _beyond)
        _fill_between(values, coordinates, order)
        if int(np.isnan(values).sum()) == before:
            raise ConfigError(f"{name}: {before:,} of {values.size:,} cells of its grid were not measured and do not follow from others")
    return Filled(values, interpolated, lacking - interpolated)


def _fill_between(values: FloatArray, axes: Sequence[FloatArray], order: Sequence[int]) -> None:
    for widest in (_NARROW, np.inf):
        known = -1
        while known != (known := int(np.isnan(values).sum())):
            for axis in order:
                _each_line(values, axes[axis], axis, lambda x, line, widest=widest: _between(x, line, widest))


def _each_line(values: FloatArray, x: FloatArray, axis: int, change) -> None:  # type: ignore[no-untyped-def]
    """Apply ``change(x, line)`` to every line along an axis that is known in part."""
    lines = np.moveaxis(values, axis, -1)
    for i in np.ndindex(lines.shape[:-1]):
        missing = np.isnan(lines[i])
        if missing.any() and (~missing).sum() >= 2:
            change(x, lines[i])


def _between(x: FloatArray, line: FloatArray, widest: float) -> None:
    """Fill a line between known cells at most a factor ``widest`` apart (from 0: over one cell)."""
    known = np.flatnonzero(~np.isnan(line))
    for low, high in itertools.pairwise(known):
        near = widest == np.inf or x[high] <= widest * x[low] or (x[low] == 0 and high == 2)
        if high - low > 1 and near:
            between = slice(low + 1, high)
            line[between] = line[low] + (x[between] - x[low]) / (x[high] - x[low]) * (line[high] - line[low])


def _beyond(x: FloatArray, line: FloatArray) -> None:
    """Fill a line after its last known cell, and before the first one down to 0 at the least."""
    known = np.flatnonzero(~np.isnan(line))
    last = known[-1]
    half = next(i for i in known if x[i] >= 0.5 * x[last])
    if half == last:
        half = known[-2]
    slope = max((line[last] - line[half]) / (x[last] - x[half]), 0.0)
    line[last + 1 :] = line[last] + slope * (x[last + 1 :] - x[last])
    first, second = known[0], known[1]
    slope = (line[second] - line[first]) / (x[second] - x[first])
    line[:first] = np.clip(line[first] + slope * (x[:first] - x[first]), 0.0, None)
