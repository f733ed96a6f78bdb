"""Classes and segments in words, and which of them share a row or a column where there are many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.fluid.segments import equal_probability_ends
from llmsched_env.types import ADMIT_ALL, IntArray, QueueLayout
from llmsched_env.workload import Scenario

MOST_ROWS = 8
MOST_COLUMNS = 4


@dataclass(frozen=True, slots=True)
class Names:
    """How the queues of a layout are shown: rows of classes, columns of segments.

    Neighbouring classes (segments) share a row (column) where there are more than ``MOST_ROWS`` (``MOST_COLUMNS``).

    Attributes:
        rows, columns: in words.
        row_of: (J,) row of each class; column_of: (K,) column of each segment, or of each band.
        bands: decode lengths at which the columns change where the engine keeps one queue alone; else empty.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_of: IntArray
    column_of: IntArray
    bands: tuple[int, ...] = ()

    @classmethod
    def of(cls, layout: QueueLayout, type_names: Sequence[str] = (), bands: Sequence[int] = ()) -> Names:
        """The names of a layout's queues.

        Args:
            type_names: of ``by="type"`` or ``by="tenant"``, one a class; without them classes are numbered.
            bands: decode lengths, increasing: where the layout has one queue alone, they tell its residents apart.
        """
        used = tuple(bands) if layout.num_queues == 1 else ()
        ends = used or layout.segment_ends
        row_of, column_of = _groups(layout.num_classes, MOST_ROWS), _groups(len(ends) + 1, MOST_COLUMNS)
        rows = tuple(_class_name(layout, type_names, *_ends(row_of, i)) for i in range(row_of[-1] + 1))
        columns = tuple(_segment_name(ends, *_ends(column_of, i)) for i in range(column_of[-1] + 1))
        return cls(rows, columns, row_of, column_of, used)

    @property
    def by_class(self) -> bool:
        """Colours stand for classes: there are no segments to tell apart."""
        return len(self.columns) == 1 and len(self.rows) > 1

    def grouped(self, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """(J, K) numbers of queues summed over those that are shown as one, (rows, columns)."""
        out = np.zeros((len(self.rows), len(self.columns)), dtype=np.int64)
        np.add.at(out, (self.row_of[:, None], self.column_of[None, :]), np.asarray(values))
        return out

    def by_row(self, values: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """(J,) numbers of classes summed, (rows,)."""
        return np.bincount(self.row_of, weights=np.asarray(values), minlength=len(self.rows)).astype(np.int64)


def _groups(count: int, most: int) -> IntArray:
    """(count,) group of each of ``count`` neighbours: as many alike in each as ``most`` groups need."""
    size = -(-count // most)
    return (np.arange(count) // size).astype(np.int32)


def _ends(group_of: IntArray, group: int) -> tuple[int, int]:
    members = np.flatnonzero(group_of == group)
    return int(members[0]), int(members[-1])


def _class_name(layout: QueueLayout, type_names: Sequence[str], first: int, last: int) -> str:
    if layout.by == "single":
        return "all requests"
    if layout.by in ("type", "tenant"):
        if first == last:
            return type_names[first] if len(type_names) == layout.num_types else f"{layout.by} {first + 1}"
        return f"{layout.by}s {first + 1}\N{EN DASH}{last + 1}"
    return f"{layout.by} {_range((0, *layout.edges), first, last)}"


def _segment_name(ends: Sequence[int], first: int, last: int) -> str:
    return f"tokens {_range((0, *ends), first, last)}" if ends else "running"


def _range(bounds: Sequence[int], first: int, last: int) -> str:
    """The lengths above ``bounds[first]`` up to ``bounds[last + 1]``."""
    if last + 1 >= len(bounds):
        return f"> {bounds[first]:,}" if first > 0 else "of any length"
    if first == 0:
        return f"\N{LESS-THAN OR EQUAL TO} {bounds[last + 1]:,}"
    return f"{bounds[first] + 1:,}\N{EN DASH}{bounds[last + 1]:,}"


def class_names(scenario: Scenario, layout: QueueLayout) -> tuple[str, ...]:
    """Names of the classes of a layout that have some: the tenants', or those of the types."""
    if layout.by == "tenant":
        return () if scenario.tenants is None else scenario.tenants.names
    return type_names(scenario)


def type_names(scenario: Scenario) -> tuple[str, ...]:
    """Names of a scenario's types: those of its trace, else the prompt and output tokens where a type has fixed ones."""
    if scenario.trace is not None and scenario.trace.type_names:
        return tuple(scenario.trace.type_names)
    statistics = scenario.statistics
    names = []
    for t in range(statistics.num_types):
        points = np.flatnonzero(statistics.type_id == t)
        if points.size != 1:
            return ()
        names.append(f"{statistics.prompt[points[0]]:g} + {statistics.output[points[0]]:g} tokens")
    return tuple(names)


def bands(scenario: Scenario) -> tuple[int, ...]:
    """Decode lengths that part the outputs of a scenario into ``MOST_COLUMNS`` equal shares."""
    return tuple(equal_probability_ends(scenario.statistics, MOST_COLUMNS)[:-1])


def admission_words(admit: IntArray, layout: QueueLayout) -> str:
    """What a decision asks to admit from the outside queues, in words. ``admit``: (Q,) of ``Decision``."""
    counts = admit[:: layout.num_segments]
    if (counts >= ADMIT_ALL).all():
        return "admit as many as fit"
    if (counts <= 0).all():
        return "admit nobody"
    if counts.size == 1:
        return f"admit up to {int(counts[0]):,}"
    if counts.size <= 4:
        return "admit " + " / ".join("all" if n >= ADMIT_ALL else f"{int(n):,}" for n in counts) + " by class"
    return f"admit from {int(np.count_nonzero(counts > 0))} of {counts.size} classes"
