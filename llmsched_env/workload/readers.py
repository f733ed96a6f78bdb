"""Readers for recorded request traces.

The format is found by its columns, whatever the file is called; plain text and gzip are accepted.

==============  =======================================================  ===========================
format          columns it is known by                                   clock
==============  =======================================================  ===========================
vidur           arrived_at, num_prefill_tokens, num_decode_tokens        seconds of the run, kept
vidur-lengths   num_prefill_tokens, num_decode_tokens                    none
replay          arrived_at, prompt_tokens, output_tokens [request_id]    seconds of the run, kept
azure           TIMESTAMP, ContextTokens, GeneratedTokens                date and time
burstgpt        Timestamp, Request tokens, Response tokens               seconds
wait-lengths    question_length, answer_length                           none
mooncake        timestamp, input_length, output_length (JSON lines)      milliseconds, in 3 s steps
vllm            queued_ts, input_toks, output_toks (JSON lines)          engine's monotonic seconds
==============  =======================================================  ===========================

``vidur`` and ``replay`` files may have a ``type`` column. Other columns are ignored. Clocks with an
arbitrary origin (date and time, monotonic, start of collection) are shifted so that the first
request arrives at 0; ``arrived_at`` already counts from the start of a run and is kept, so that a
replay shows the recorded times.

Nothing is repaired: a value that cannot be right is a ``ConfigError`` that names file, line, column
and value. Only requests of 0 tokens in formats that record failures so (``burstgpt``,
``wait-lengths``, ``vidur-lengths``) are dropped, and counted.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray, IntArray, Workload

MAX_TOKENS = 2**30


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The requests of a file, in file order.

    Attributes:
        path: the file.
        format: name of the format (table above).
        arrival: (N,) float64 seconds, non-decreasing; None for files with lengths only.
        prompt_tokens, output_tokens: (N,) int32, >= 1.
        type_id: (N,) int32: index into ``type_names``; zeros without a ``type`` column.
        type_names: the distinct values of the ``type`` column, numbers by size, else by alphabet; empty without one.
        request_id: names, empty without a ``request_id`` column.
        dropped: rows left out.
        dropped_reason: why, empty if none.
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

    def __len__(self) -> int:
        return int(self.prompt_tokens.shape[0])

    def workload(self) -> Workload:
        """The rows as a workload, times as recorded. Raises ``ConfigError`` for files with lengths only."""
        if self.arrival is None:
            raise ConfigError(f"{self.path}: has lengths only ({self.format}), no arrival times")
        return Workload.of(self.arrival, self.prompt_tokens, self.output_tokens, self.type_id, self.request_id)


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    prompt: str
    output: str
    arrival: str | None = None
    clock: Literal["seconds", "milliseconds", "datetime"] = "seconds"
    keeps_origin: bool = False
    drops_zero: bool = False
    typed: bool = False
    named: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(c for c in (self.arrival, self.prompt, self.output) if c is not None)


FORMATS: tuple[_Format, ...] = (
    _Format("vidur", "num_prefill_tokens", "num_decode_tokens", "arrived_at", keeps_origin=True, typed=True, named=True),
    _Format("replay", "prompt_tokens", "output_tokens", "arrived_at", keeps_origin=True, typed=True, named=True),
    _Format("azure", "ContextTokens", "GeneratedTokens", "TIMESTAMP", clock="datetime"),
    _Format("burstgpt", "Request tokens", "Response tokens", "Timestamp", drops_zero=True),
    _Format("mooncake", "input_length", "output_length", "timestamp", clock="milliseconds"),
    _Format("vllm", "input_toks", "output_toks", "queued_ts", named=True),
    _Format("wait-lengths", "question_length", "answer_length", drops_zero=True),
    _Format("vidur-lengths", "num_prefill_tokens", "num_decode_tokens", drops_zero=True, typed=True),
)


def read_trace(path: str | Path, *, jitter_seconds: float = 0.0, jitter_seed: int = 0) -> Trace:
    """Read a trace file.

    Args:
        path: CSV or JSON-lines file, gzip or not (told by its first bytes).
        jitter_seconds: adds to every arrival a uniform time in [0, ``jitter_seconds``) and sorts the
            times; requests keep their order. 0 keeps the times as recorded. Mooncake stamps
            arrivals in steps of 3 s, so that ``jitter_seconds=3`` spreads each step's requests over it.
        jitter_seed: seed of that jitter.

    Raises:
        ConfigError: unreadable or damaged file, unknown columns, a bad value or decreasing times
            (``FILE:LINE: column 'X': value 'Y' ...``).
    """
    if not (math.isfinite(jitter_seconds) and jitter_seconds >= 0):
        raise ConfigError(f"jitter_seconds: {jitter_seconds}, must be finite and >= 0 seconds")
    where = str(path)
    text = _text(where)
    start = text.lstrip()
    if not start:
        raise ConfigError(f"{where}: is empty")
    header, rows = _json_lines(where, text) if start[0] in "{[" else _csv_rows(where, text)
    trace = _parse(where, _find_format(where, header), header, rows)
    if jitter_seconds > 0:
        if trace.arrival is None:
            raise ConfigError(f"jitter_seconds: {jitter_seconds}, but {where} has no arrival times")
        rng = np.random.default_rng(jitter_seed)
        times = np.sort(trace.arrival + rng.uniform(0.0, jitter_seconds, len(trace)))
        times -= times[0] - trace.arrival[0]
        trace = replace(trace, arrival=times)
    return trace


# --- file to rows ---------------------------------------------------------------------------------

_Row = tuple[int, list[Any]]
_MISSING = object()


def _text(where: str) -> str:
    try:
        raw = Path(where).read_bytes()
    except OSError as error:
        raise ConfigError(f"{where}: cannot be read ({error.strerror or error})") from error
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{where}: damaged gzip file ({error})") from error
    elif where.endswith(".gz") and raw:
        raise ConfigError(f"{where}: is named .gz but holds no gzip data")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: is not a text file (byte {error.start}: {error.reason})") from error
    if "\0" in text:
        raise ConfigError(f"{where}: is not a text file (it holds NUL bytes)")
    return text


def _csv_rows(where: str, text: str) -> tuple[list[str], Iterator[_Row]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)

    def lines() -> Iterator[_Row]:
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except csv.Error as error:
            raise ConfigError(f"{where}:{reader.line_num}: is not CSV ({error})") from error

    rows = lines()
    header = [name.strip() for name in next(rows)[1]]

    def checked() -> Iterator[_Row]:
        for line, cells in rows:
            if len(cells) > len(header):
                raise ConfigError(f"{where}:{line}: {len(cells)} fields, the header has {len(header)} columns")
            yield line, cells + [_MISSING] * (len(header) - len(cells))

    return header, checked()


def _json_lines(where: str, text: str) -> tuple[list[str], Iterator[_Row]]:
    def records() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{where}:{number}: is not a JSON object on one line ({error})") from error
            if not isinstance(record, dict):
                raise ConfigError(f"{where}:{number}: is not a JSON object, but {type(record).__name__}")
            yield number, record

    stream = records()
    first_line, first = next(stream)
    header = list(first)

    def rows() -> Iterator[_Row]:
        yield first_line, [first[name] for name in header]
        for number, record in stream:
            yield number, [record.get(name, _MISSING) for name in header]

    return header, rows()


def _find_format(where: str, header: list[str]) -> _Format:
    for candidate in FORMATS:
        if set(candidate.columns) <= set(header):
            twice = [name for name in candidate.columns if header.count(name) > 1]
            if twice:
                raise ConfigError(f"{where}:1: column {twice[0]!r} occurs {header.count(twice[0])} times")
            return candidate
    known = "; ".join(f"{f.name} ({', '.join(f.columns)})" for f in FORMATS)
    shown = ", ".join(name if len(name) <= 40 else name[:40] + "..." for name in header[:20])
    nearest = max(FORMATS, key=lambda f: len(set(f.columns) & set(header)))
    hint = ""
    if set(nearest.columns) & set(header):
        missing = [name for name in nearest.columns if name not in header]
        near = difflib.get_close_matches(missing[0], [h for h in header if h not in nearest.columns], n=1)
        hint = f" For {nearest.name}, missing: {', '.join(missing)}" + (f" (is it {near[0]!r}?)" if near else "") + "."
    raise ConfigError(f"{where}: unknown columns: {shown}.{hint} Known formats: {known}")


# --- values ---------------------------------------------------------------------------------------


def _number(cell: Any) -> float | int:
    """A finite number, or ValueError with the reason."""
    value: float | int
    if isinstance(cell, str):
        text = cell.strip()
        if not text:
            raise ValueError("is empty, must be a number")
        try:
            if "_" in text:
                raise ValueError
            value = int(text) if text.isascii() and text.isdigit() and len(text) < 20 else float(text)
        except ValueError:
            raise ValueError("is not a number") from None
    elif isinstance(cell, bool) or not isinstance(cell, int | float):
        raise ValueError("is not a number")
    else:
        value = cell
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is not finite")
    if abs(value) > 1e18:
        raise ValueError("is too large")
    return value


def _tokens(cell: Any) -> int:
    value = _number(cell)
    if value != int(value):
        raise ValueError("is not a whole number of tokens")
    if value < 0:
        raise ValueError("is negative, must be a number of tokens >= 1")
    if value > MAX_TOKENS:
        raise ValueError("is too large, must be at most 2**30 tokens")
    return int(value)


def _seconds_of_number(scale: int) -> Callable[[Any], float]:
    def convert(cell: Any) -> float:
        value = _number(cell)
        if value < 0:
            raise ValueError("is negative, times must be >= 0")
        return float(value) / scale

    return convert


_DATETIME = re.compile(r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)?", re.ASCII)
_EPOCH = datetime(1970, 1, 1)


@lru_cache(maxsize=1024)
def _epoch_seconds(date: str, time: str) -> int:
    return (datetime.fromisoformat(f"{date} {time}") - _EPOCH) // timedelta(seconds=1)


def _datetime_nanoseconds(cell: Any) -> int:
    """Nanoseconds since 1970 (UTC), exact: Azure writes 7 decimals, more than ``datetime`` keeps."""
    match = _DATETIME.fullmatch(cell.strip()) if isinstance(cell, str) else None
    if match is None:
        raise ValueError("is not a time such as '2023-11-16 18:17:03.9799600'")
    date, time, fraction = match.groups()
    try:
        seconds = _epoch_seconds(date, time)
    except ValueError as error:
        raise ValueError(f"is not a time ({error})") from None
    return seconds * 10**9 + int((fraction or "").ljust(9, "0"))


def _label(cell: Any) -> str:
    if isinstance(cell, bool) or not isinstance(cell, str | int) or not str(cell).strip():
        raise ValueError("is empty or not a name or number")
    return str(cell).strip()


def _parse(where: str, layout: _Format, header: list[str], rows: Iterator[_Row]) -> Trace:
    clock: Callable[[Any], float] = {
        "seconds": _seconds_of_number(1),
        "milliseconds": _seconds_of_number(1000),
        "datetime": _datetime_nanoseconds,
    }[layout.clock]
    i_prompt, i_output = header.index(layout.prompt), header.index(layout.output)
    i_arrival = header.index(layout.arrival) if layout.arrival else -1
    i_type = header.index("type") if layout.typed and "type" in header else -1
    i_name = header.index("request_id") if layout.named and "request_id" in header else -1

    arrival: list[float] = []
    prompts: list[int] = []
    outputs: list[int] = []
    labels: list[str] = []
    names: list[str] = []
    dropped = 0
    last = -math.inf
    column = 0
    for line, cells in rows:
        try:
            time = 0.0
            if i_arrival >= 0:
                column = i_arrival
                time = clock(cells[column])
                if time < last:
                    raise ValueError("is earlier than the row before, times must not decrease")
                last = time
            column = i_prompt
            prompt = _tokens(cells[column])
            if prompt < 1 and not layout.drops_zero:
                raise ValueError("must be a number of tokens >= 1")
            column = i_output
            output = _tokens(cells[column])
            if output < 1 and not layout.drops_zero:
                raise ValueError("must be a number of tokens >= 1")
            if prompt < 1 or output < 1:
                dropped += 1
                continue
            if i_type >= 0:
                column = i_type
                labels.append(_label(cells[column]))
            if i_name >= 0:
                column = i_name
                names.append(_label(cells[column]))
        except ValueError as error:
            cell = cells[column]
            value = "is missing" if cell is _MISSING else f"{str(cell)[:60]!r} {error}"
            raise ConfigError(f"{where}:{line}: column {header[column]!r}: value {value}") from error
        arrival.append(time)
        prompts.append(prompt)
        outputs.append(output)
    if not prompts:
        reason = f"all {dropped} rows have 0 prompt or output tokens" if dropped else "no rows under the header"
        raise ConfigError(f"{where}: holds no request ({reason})")

    times: FloatArray | None = None
    if i_arrival >= 0 and layout.clock == "datetime":
        ticks = np.array(arrival, dtype=np.int64)
        times = (ticks - ticks[0]) / 1e9
    elif i_arrival >= 0:
        times = np.array(arrival, dtype=np.float64)
        if not layout.keeps_origin:
            times -= times[0]
    type_names: tuple[str, ...] = ()
    type_id = np.zeros(len(prompts), np.int32)
    if labels:
        distinct = set(labels)
        numeric = all(re.fullmatch(r"\d{1,9}", label, re.ASCII) for label in distinct)
        type_names = tuple(sorted(distinct, key=(lambda s: (int(s), s)) if numeric else (lambda s: (0, s))))
        index = {name: j for j, name in enumerate(type_names)}
        type_id = np.array([index[label] for label in labels], dtype=np.int32)
    return Trace(
        where,
        layout.name,
        times,
        np.array(prompts, dtype=np.int32),
        np.array(outputs, dtype=np.int32),
        type_id,
        type_names,
        tuple(names),
        dropped,
        "0 prompt or output tokens (failed requests)" if dropped else "",
    )
