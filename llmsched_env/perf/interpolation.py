"""Linear interpolation in tables that lie inside one packed array (compiled).

An axis is ``model[start : start + size]``, increasing. A position between two of its points is a
triple (i, j, w): the value there is ``v[i] + w (v[j] - v[i])``.

Beyond the last point the line goes on through the last point and the first one at or above half its
coordinate. On the doubling grids of kernel profiles that is the last interval; on fine grids of a
step-like table (a random forest's plateaus) the last interval alone would have no meaningful slope.
Before the first point the line of the first interval goes on.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled


@compiled
def last_at_or_below(model, start, size, x):  # type: ignore[no-untyped-def]
    """Index of the last axis point <= x; 0 if there is none."""
    low = 0
    high = size
    first = model[start]
    guess = int((x - first) / (model[start + size - 1] - first) * (size - 1))  # right at once on an even grid
    if 0 <= guess < size and model[start + guess] <= x:
        if guess == size - 1 or x < model[start + guess + 1]:
            return guess
        low = guess + 1
    while high - low > 1:
        middle = (low + high) // 2
        if model[start + middle] <= x:
            low = middle
        else:
            high = middle
    return low


@compiled
def inside(model, start, size, x):  # type: ignore[no-untyped-def]
    """Whether x lies on the axis, up to the rounding of a coordinate that was computed."""
    return model[start] * (1.0 - 1e-12) <= x <= model[start + size - 1] * (1.0 + 1e-12)


@compiled
def locate(model, start, size, x, clip):  # type: ignore[no-untyped-def]
    """(i, j, w) of x on an axis of at least two points; ``clip`` holds the edge value beyond the ends."""
    last = size - 1
    if x >= model[start + last]:
        if clip or x == model[start + last]:
            return last, last, 0.0
        half = 0.5 * model[start + last]
        i = last_at_or_below(model, start, size, half)
        if model[start + i] < half and i < last - 1:
            i += 1
        j = last
    elif x < model[start]:
        if clip:
            return 0, 0, 0.0
        i, j = 0, 1
    else:
        i = last_at_or_below(model, start, size, x)
        if model[start + i] == x:
            return i, i, 0.0
        j = i + 1
    low = model[start + i]
    return i, j, (x - low) / (model[start + j] - low)


@compiled
def value_1d(model, axis, values, x, clip):  # type: ignore[no-untyped-def]
    """Value of a table on one axis at x, never below 0.

    Args:
        axis: place in the header of (start, size) of the axis.
        values: place in the header of the start of the table.
    """
    i, j, w = locate(model, int(model[axis]), int(model[axis + 1]), x, clip)
    start = int(model[values])
    v = model[start + i]
    return max(v + w * (model[start + j] - v), 0.0)


@compiled
def value_2d(model, rows, columns, values, y, x, clip):  # type: ignore[no-untyped-def]
    """Value of a table (row axis, column axis) at (y, x), bilinear, never below 0; places as for ``value_1d``."""
    a, b, u = locate(model, int(model[rows]), int(model[rows + 1]), y, clip)
    i, j, w = locate(model, int(model[columns]), int(model[columns + 1]), x, clip)
    num_columns, start = int(model[columns + 1]), int(model[values])
    v = model[start + a * num_columns + i]
    low = v + w * (model[start + a * num_columns + j] - v)
    v = model[start + b * num_columns + i]
    high = v + w * (model[start + b * num_columns + j] - v)
    return max(low + u * (high - low), 0.0)
