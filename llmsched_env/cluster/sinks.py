"""Where the finished calls of a cluster go: a sink is handed batch after batch while the cluster runs.

``KeepAll`` holds every row, ``llmsched_env.cluster.parquet.ParquetSink`` writes them to files, and
``llmsched_env.cluster.sketches.SketchSink`` keeps figures in memory that does not grow.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Protocol, Self

import numpy as np

from llmsched_env.cluster.finished import FINISHED_DTYPE
from llmsched_env.cluster.metrics import Rows, check_calls, check_rows


class Sink(Protocol):
    """What a cluster writes its finished calls to. Used with ``with``: leaving the block closes it, an error included."""

    def write(self, rows: Rows) -> None:
        """Take a batch of ``FINISHED_DTYPE``, in the order in which replicas report calls.

        The caller uses the array again: copy what is kept.

        Raises:
            ConfigError: another type or shape.
        """

    def close(self) -> None:
        """The run is over; nothing is written after it. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class KeepAll(Sink):
    """Every row in memory, about 100 bytes a call."""

    def __init__(self) -> None:
        self._batches: list[Rows] = []

    def write(self, rows: Rows) -> None:
        check_rows(rows)
        if len(rows):
            self._batches.append(rows.copy())

    def close(self) -> None:
        pass

    def __len__(self) -> int:
        """Calls."""
        return sum(map(len, self._batches))

    def rows(self) -> Rows:
        """All of them so far, by the number of the call.

        Raises:
            ConfigError: see ``check_calls``.
        """
        if not self._batches:
            return np.empty(0, dtype=FINISHED_DTYPE)
        rows = np.concatenate(self._batches)
        check_calls(rows)
        return rows[np.argsort(rows["number"], kind="stable")]


class Several(Sink):
    """Each batch to every one of these sinks, in this order. All of them are closed, even where one fails."""

    def __init__(self, *sinks: Sink) -> None:
        self.sinks = sinks

    def write(self, rows: Rows) -> None:
        for sink in self.sinks:
            sink.write(rows)

    def close(self) -> None:
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as entered:
            for sink in self.sinks:
                entered.enter_context(sink)
            entered.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.ExitStack() as stack:
            for sink in reversed(self.sinks):
                # Not ExitStack's own view of the error: each sink hears how the run ended, not how another one closed.
                stack.callback(sink.__exit__, kind, error, trace)
