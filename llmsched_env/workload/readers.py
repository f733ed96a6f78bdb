"""Readers for recorded request traces.

The format is found by its columns, whatever the file is called; plain text and gzip are accepted, and CSV with commas,
semicolons, tabs or bars.

==============  =======================================================  ===========================
format          columns it is known by                                   clock
==============  =======================================================  ===========================
vidur           arrived_at, num_prefill_tokens, num_decode_tokens        seconds
vidur-lengths   num_prefill_tokens, num_decode_tokens                    none
replay          arrived_at, prompt_tokens, output_tokens [request_id]    seconds
azure           TIMESTAMP, ContextTokens, GeneratedTokens                date and time, UTC or offset
burstgpt        Timestamp, Request tokens, Response tokens               seconds
wait-lengths    question_length, answer_length                           none
bailian         those of mooncake, and chat_id, parent_chat_id or turn   seconds
mooncake        timestamp, input_length, output_length (JSON lines)      milliseconds, in 3 s steps
vllm            queued_ts, input_toks, output_toks (JSON lines)          engine's monotonic seconds
==============  =======================================================  ===========================

``vidur`` and ``replay`` files may have a ``type`` and a ``tenant`` column, and a ``predicted_tokens`` column with a predictor's word
on each output. Other columns are ignored. A file whose first time is a date holds dates, whatever its format.

Clocks: every clock is shifted so that the first request arrives at 0, wherever the file's own begins (0, the start of a
slice, 1970): latencies and rates must not depend on it. ``Trace.origin`` keeps what was taken off. Times that are
unlikely in the format's unit are refused until ``time_unit`` says which it is. Rows a little out of order, as logs of
concurrent requests have them, are put in order and counted; a larger step back is refused, since it may be two files in
one.

Nothing is repaired: a value that cannot be right is a ``ConfigError`` that names file, line, column and value, or with
``invalid_rows="drop"`` a row left out and counted. Requests of 0 tokens in formats that record failures so
(``burstgpt``, ``wait-lengths``, ``vidur-lengths``) are always dropped, and counted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray, IntArray, Workload
from llmsched_env.workload import trace_values
from llmsched_env.workload.trace_files import MISSING, REPEATED, BadRow, Row, read_rows, read_text
from llmsched_env.workload.trace_formats import (
    FORMATS,
    KNOWN_COLUMNS,
    PER_SECOND,
    Format,
    TimeUnit,
    check_time_unit,
    doubtful_unit,
    find_format,
)

__all__ = ["FORMATS", "REORDER_SECONDS", "InvalidRows", "TimeUnit", "Trace", "read_trace"]

InvalidRows = Literal["error", "drop"]

REORDER_SECONDS = 0.25
"""How late a row may stand in its file by default: requests sent together reach the log of a server in another order."""

_LONGEST = 10 * 366 * 86_400
"""Seconds that a trace may last. Beyond it a time is no time of the same clock (0 for "unknown" among Unix times)."""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The requests of a file, in order of arrival; requests that arrive together in file order.

    Attributes:
        path: the file.
        format: name of the format (table above).
        arrival: (N,) float64 seconds, non-decreasing, the first 0; None for files with lengths only.
        prompt_tokens, output_tokens: (N,) int32, >= 1.
        type_id: (N,) int32: index into ``type_names``; zeros without a ``type`` column.
        type_names: the distinct values of the ``type`` column, numbers by size, else by alphabet; empty without one.
        request_id: names, empty without a ``request_id`` column.
        dropped: rows left out.
        dropped_reason: why, empty if none.
        origin: seconds on the file's own clock (dates: since 1970, UTC) at which the first request arrives.
        reordered: rows that stood after a later one and were put in order.
        tenant: (N,) int32: index into ``tenant_names``; None without a ``tenant`` column.
        tenant_names: the distinct values of the ``tenant`` column, in the order of ``type_names``; empty without one.
        predicted_tokens: (N,) int32, >= 1; None without a ``predicted_tokens`` column.
    """

    path: str
    format: str
    arrival: FloatArray | None
    prompt_tokens: IntArray
    output_tokens: IntArray
    type_id: IntArray
    type_names: tuple[str, ...] = ()
    request_id: tuple[str, ...] = ()
    dropped: int = 0
    dropped_reason: str = ""
    origin: float = 0.0
    reordered: int = 0
    tenant: IntArray | None = None
    tenant_names: tuple[str, ...] = ()
    predicted_tokens: IntArray | None = None

    def __len__(self) -> int:
        return int(self.prompt_tokens.shape[0])

    def workload(self) -> Workload:
        """The rows as a workload, from time 0. Raises ``ConfigError`` for files with lengths only."""
        if self.arrival is None:
            raise ConfigError(f"{self.path}: has lengths only ({self.format}), no arrival times")
        lengths = (self.prompt_tokens, self.output_tokens, self.type_id, self.request_id)
        return Workload.of(self.arrival, *lengths, tenant=self.tenant, predicted_tokens=self.predicted_tokens)


def read_trace(
    path: str | Path,
    *,
    jitter_seconds: float = 0.0,
    jitter_seed: int = 0,
    time_unit: TimeUnit | None = None,
    invalid_rows: InvalidRows = "error",
    reorder_seconds: float = REORDER_SECONDS,
) -> Trace:
    """Read a trace file.

    Args:
        path: CSV or JSON-lines file, gzip or not (told by its first bytes).
        jitter_seconds: adds to every arrival a uniform time in [0, ``jitter_seconds``) and sorts the
            times; requests keep their order. 0 keeps the times as recorded. Mooncake stamps
            arrivals in steps of 3 s, so that ``jitter_seconds=3`` spreads each step's requests over it.
        jitter_seed: seed of that jitter, >= 0.
        time_unit: unit of the file's times: ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``; None for the
            format's own (table above), which is refused where the times make it unlikely.
        invalid_rows: ``"error"`` refuses a file with a row that cannot be right; ``"drop"`` leaves such
            rows out and counts them (``Trace.dropped``).
        reorder_seconds: a row up to this much earlier than a row before it is put in order; more is
            refused. ``inf`` puts any file in order.

    Raises:
        ConfigError: an option out of range, unreadable or damaged file, unknown columns, a bad value or
            times that run back (``FILE:LINE: column 'X': value 'Y' ...``).
    """
    for name, value, most in (("jitter_seconds", jitter_seconds, "finite and "), ("reorder_seconds", reorder_seconds, "")):
        real = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not (real and value >= 0 and (math.isfinite(value) or not most)):
            raise ConfigError(f"{name}: {value!r}, must be {most}>= 0 seconds")
    if isinstance(jitter_seed, bool) or not isinstance(jitter_seed, int | np.integer) or jitter_seed < 0:
        raise ConfigError(f"jitter_seed: {jitter_seed!r}, must be an integer >= 0")
    if invalid_rows not in ("error", "drop"):
        raise ConfigError(f"invalid_rows: {invalid_rows!r}, must be 'error' or 'drop'")
    where = str(path)
    header, rows = read_rows(where, read_text(where), KNOWN_COLUMNS)
    layout = find_format(where, header)
    check_time_unit(where, layout, time_unit)
    found = _collect(where, layout, header, rows, time_unit, invalid_rows == "drop", reorder_seconds)
    if not found.prompts:
        reason = f"{found.dropped} rows dropped: {found.dropped_reason}" if found.dropped else "no rows under the header"
        if found.dropped and not found.invalid:
            reason = f"all {found.dropped} rows have 0 prompt or output tokens"
        raise ConfigError(f"{where}: holds no request ({reason})")
    trace = _trace(where, layout, found)
    if jitter_seconds > 0:
        if trace.arrival is None:
            raise ConfigError(f"jitter_seconds: {jitter_seconds}, but {where} has no arrival times")
        rng = np.random.default_rng(jitter_seed)
        times = np.sort(trace.arrival + rng.uniform(0.0, jitter_seconds, len(trace)))
        trace = replace(trace, arrival=times - times[0])
    return trace


# --- rows to columns ------------------------------------------------------------------------------

_DROP = "invalid_rows='drop' (on the command line --invalid-rows drop) leaves such rows out and counts them"


@dataclass(frozen=True, slots=True)
class _Clock:
    """How the times of a file are read: ``per_second`` units to the second, which are ``assumed`` where nobody said them."""

    read: Callable[[Any], float | int] = trace_values.time
    per_second: int = 1
    assumed: bool = False

    @classmethod
    def of(cls, layout: Format, unit: TimeUnit | None, cell: Any) -> _Clock:
        """Dates if ``cell``, a time of the file, is one or the format has no other; else numbers."""
        if unit is None and (layout.unit is None or trace_values.is_datetime(cell)):
            return cls(trace_values.datetime_nanoseconds, PER_SECOND["ns"])
        return cls(trace_values.time, PER_SECOND[unit or layout.unit or "s"], unit is None)


@dataclass(slots=True)
class _Columns:
    """What has been read, in file order; times in the unit of ``clock``."""

    clock: _Clock = field(default_factory=_Clock)
    times: list[float | int] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)
    prompts: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    predictions: list[int] = field(default_factory=list)
    late: int = 0
    failed: int = 0
    invalid: int = 0
    first_invalid: str = ""

    @property
    def dropped(self) -> int:
        return self.failed + self.invalid

    @property
    def dropped_reason(self) -> str:
        failed = "0 prompt or output tokens (failed requests)"
        if not self.invalid:
            return failed if self.failed else ""
        invalid = f"{self.invalid} invalid, the first at line {self.first_invalid}"
        return f"{self.failed} with {failed}, {invalid}" if self.failed else invalid


class _ClockError(ValueError):
    """A time that does not fit the rows before it: of the file rather than of the row, so that no row is dropped for it."""


@dataclass(slots=True)
class _Order:
    """The times read so far, and which one may come next: ``slack`` seconds before the latest, or later."""

    slack: float
    first: float | int | None = None
    latest: float | int = 0

    def is_late(self, time: float | int, per_second: int) -> bool:
        """Whether ``time`` stands after a later one. Raises ``_ClockError`` where it cannot be of the same trace."""
        if self.first is None:
            self.first = self.latest = time
        if abs(time - self.first) > _LONGEST * per_second:
            raise _ClockError(f"is {(time - self.first) / per_second:.3g} s after the first row, must be within 10 years of it")
        back = self.latest - time
        if back > self.slack * per_second:
            raise _ClockError(
                f"is earlier than the row before, by {back / per_second:.6g} s, times must not decrease: rows up to "
                f"{self.slack:g} s late are put in order, reorder_seconds (--reorder-seconds) sets how late"
            )
        self.latest = max(self.latest, time)
        return back > 0


def _collect(
    where: str, layout: Format, header: list[str], rows: Iterator[Row], unit: TimeUnit | None, drop: bool, reorder_seconds: float
) -> _Columns:
    i_prompt, i_output = header.index(layout.prompt), header.index(layout.output)
    i_arrival = header.index(layout.arrival) if layout.arrival else -1
    i_type = header.index("type") if layout.typed and "type" in header else -1
    i_tenant = header.index("tenant") if layout.typed and "tenant" in header else -1
    i_name = header.index("request_id") if layout.named and "request_id" in header else -1
    i_predicted = header.index("predicted_tokens") if layout.predicts and "predicted_tokens" in header else -1

    columns = _Columns()
    clock: _Clock | None = None
    order = _Order(reorder_seconds)
    column = 0
    for line, cells in rows:
        try:
            if isinstance(cells, BadRow):
                raise ValueError(cells.reason)
            time: float | int = 0
            if i_arrival >= 0:
                column = i_arrival
                found = clock or _Clock.of(layout, unit, cells[column])
                time = found.read(cells[column])
                clock = found  # of the first time that can be read
            column = i_prompt
            prompt = trace_values.tokens(cells[column])
            if prompt < 1 and not layout.drops_zero:
                raise ValueError("must be a number of tokens >= 1")
            column = i_output
            output = trace_values.tokens(cells[column])
            if output < 1 and not layout.drops_zero:
                raise ValueError("must be a number of tokens >= 1")
            late = False
            if clock is not None:
                # Last, so that a row that is left out for its lengths sets no clock for the others.
                column = i_arrival
                late = order.is_late(time, clock.per_second)
            if prompt < 1 or output < 1:
                columns.failed += 1
                continue
            label = name = tenant = ""
            if i_type >= 0:
                column = i_type
                label = trace_values.label(cells[column])
            if i_tenant >= 0:
                column = i_tenant
                tenant = trace_values.label(cells[column])
            if i_name >= 0:
                column = i_name
                name = trace_values.label(cells[column])
            predicted = 0
            if i_predicted >= 0:
                column = i_predicted
                predicted = trace_values.tokens(cells[column])
                if predicted < 1:
                    raise ValueError("must be a number of tokens >= 1")
        except ValueError as error:
            problem = _problem(header[column], cells if isinstance(cells, BadRow) else cells[column], error)
            if isinstance(error, _ClockError):
                raise ConfigError(f"{where}:{line}: {problem}") from error
            if not drop:
                raise ConfigError(f"{where}:{line}: {problem}; {_DROP}") from error
            columns.invalid += 1
            columns.first_invalid = columns.first_invalid or f"{line}: {problem}"
            continue
        columns.times.append(time)
        columns.lines.append(line)
        columns.prompts.append(prompt)
        columns.outputs.append(output)
        columns.late += late
        if i_type >= 0:
            columns.labels.append(label)
        if i_tenant >= 0:
            columns.tenants.append(tenant)
        if i_name >= 0:
            columns.names.append(name)
        if i_predicted >= 0:
            columns.predictions.append(predicted)
    columns.clock = clock or columns.clock
    return columns


def _problem(name: str, cell: Any, error: ValueError) -> str:
    if isinstance(cell, BadRow):
        return cell.reason
    value = cell.why if cell is MISSING or cell is REPEATED else f"{trace_values.shown(cell)} {error}"
    return f"column {name!r}: value {value}"


# --- columns to a trace ---------------------------------------------------------------------------


def _trace(where: str, layout: Format, found: _Columns) -> Trace:
    arrival, order, origin = _arrivals(where, layout, found)
    type_id, type_names = _types(found.labels, len(found.prompts))
    tenant, tenant_names = _types(found.tenants, len(found.prompts))
    return Trace(
        where,
        layout.name,
        arrival,
        np.array(found.prompts, dtype=np.int32)[order],
        np.array(found.outputs, dtype=np.int32)[order],
        type_id[order],
        type_names,
        tuple(found.names[i] for i in order.tolist()) if found.names else (),
        found.dropped,
        found.dropped_reason,
        origin,
        found.late,
        tenant[order] if tenant_names else None,
        tenant_names,
        np.array(found.predictions, dtype=np.int32)[order] if found.predictions else None,
    )


def _arrivals(where: str, layout: Format, found: _Columns) -> tuple[FloatArray | None, Any, float]:
    """(N,) seconds from the first arrival, in order; the (N,) rows in that order; and the first time, seconds."""
    if layout.arrival is None:
        return None, np.arange(len(found.prompts)), 0.0
    first = min(found.times)
    # Taken off before anything is rounded: nanoseconds since 1970 are more than a float holds.
    since = np.array([time - first for time in found.times], dtype=np.float64)
    if found.clock.assumed:
        _check_likely(where, layout, found, float(since.max()))
    order = np.argsort(since, kind="stable")
    return since[order] / found.clock.per_second, order, first / found.clock.per_second


def _check_likely(where: str, layout: Format, found: _Columns, span: float) -> None:
    n = len(found.times)
    part = next((i for i, time in enumerate(found.times) if time != int(time)), None) if layout.unit == "ms" else None
    i = part if part is not None else found.times.index(min(found.times))
    doubt = doubtful_unit(layout, min(found.times), span / max(n - 1, 1), part is not None)
    if doubt:
        raise ConfigError(
            f"{where}:{found.lines[i]}: column {layout.arrival!r}: value '{found.times[i]}' {doubt}; "
            f"time_unit (--time-unit), one of {', '.join(map(repr, PER_SECOND))}, says which unit it is"
        )


def _types(labels: list[str], count: int) -> tuple[IntArray, tuple[str, ...]]:
    if not labels:
        return np.zeros(count, np.int32), ()
    distinct = set(labels)
    numeric = all(re.fullmatch(r"\d{1,9}", label, re.ASCII) for label in distinct)
    names = tuple(sorted(distinct, key=(lambda s: (int(s), s)) if numeric else (lambda s: (0, s))))
    index = {name: j for j, name in enumerate(names)}
    return np.array([index[label] for label in labels], dtype=np.int32), names
