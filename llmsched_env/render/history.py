"""What a frame shows over engine time: sampled after every iteration, whether or not anybody looks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.engine.state import Engine
from llmsched_env.types import Decision, IntArray

MOST_SAMPLES = 4096
"""Kept at once; more than a frame has columns. Beyond it neighbours are merged, so that an episode of any length fits."""
COLUMNS = ("clock", "kv", "waiting", "running", "evictions")
CLOCK, KV, WAITING, RUNNING, EVICTIONS = range(len(COLUMNS))


@dataclass(frozen=True, slots=True)
class LastStep:
    """The latest decision, and when its step began: one iteration of it or more.

    Attributes:
        start: seconds.
        run, admit, evict: (Q,) int32, of ``Decision``.
    """

    start: float
    run: IntArray
    admit: IntArray
    evict: IntArray


class History:
    """The course of one episode.

    Attributes:
        last: the latest decision; None before the first.

    Args:
        record: the engine at the start of the episode.
    """

    def __init__(self, record: Engine) -> None:
        self.last: LastStep | None = None
        self._rows = np.zeros((MOST_SAMPLES, len(COLUMNS)))
        self._count = 0
        self._stride, self._merged = 1, 0
        self._evictions = record.evictions
        self._start = record.clock
        self._add(record)

    @property
    def samples(self) -> npt.NDArray[np.float64]:
        """(n, 5): ``COLUMNS``, oldest first.

        ``clock`` is the end of the interval that the sample stands for, in seconds; ``kv`` (KV units), ``waiting`` and ``running``
        (requests) are the highest values of the interval, ``evictions`` how many took place in it.
        """
        return self._rows[: self._count]

    def begin(self) -> None:
        """A step begins, of the iterations noted until the next one begins."""
        self._start = float(self._rows[self._count - 1, CLOCK])

    def note(self, record: Engine, decision: Decision) -> None:
        """Take an iteration down; ``record`` is the engine after it."""
        self.last = LastStep(self._start, decision.run.copy(), decision.admit.copy(), decision.evict.copy())
        self._add(record)

    def _add(self, record: Engine) -> None:
        kv = record.kv_tokens if record.settings.paper else record.kv_blocks
        row = (record.clock, kv, record.num_waiting, record.num_residents, record.evictions - self._evictions)
        self._evictions = record.evictions
        if 0 < self._merged < self._stride:
            last = self._rows[self._count - 1]
            last[CLOCK] = row[CLOCK]
            last[KV:EVICTIONS] = np.maximum(last[KV:EVICTIONS], row[KV:EVICTIONS])
            last[EVICTIONS] += row[EVICTIONS]
            self._merged += 1
            return
        if self._count == MOST_SAMPLES:
            self._halve()
        self._rows[self._count] = row
        self._count += 1
        self._merged = 1

    def _halve(self) -> None:
        first, second = self._rows[0::2], self._rows[1::2]
        half = MOST_SAMPLES // 2
        merged = np.maximum(first, second)
        merged[:, EVICTIONS] = first[:, EVICTIONS] + second[:, EVICTIONS]
        self._rows[:half] = merged
        self._count = half
        self._stride *= 2
