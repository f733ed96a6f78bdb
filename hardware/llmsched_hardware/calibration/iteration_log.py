"""Iterations of a real engine in a small text file: what each computed, and when.

The first line is a JSON heading: ``format``, ``engine`` (what was measured, by field) and ``columns``. Every other line is one iteration,
its numbers separated by commas, or a JSON object ``{"segment": k, ...}`` that stands before the rows of segment k and says what
they are of: the policy, the rate, which run; ``engine`` holds what is not as in the heading. A file whose name ends in ``.gz`` holds
the same, packed in pieces.

Times are seconds of one clock within a segment, and only there: a file that an engine goes on with later has a new segment, whose
clock begins anew. Rows of a segment are consecutive iterations of one engine, none left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import logging
import math
import os
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch
from llmsched_hardware.live_background import Background

logger = logging.getLogger("vllm.llmsched")  # below vLLM's logger: its format, its level

FORMAT = 1
MAX_ROWS = 1_000_000
MOST_WAITING = 50_000
"""Rows kept in memory while the disk takes none: a few minutes of a busy engine."""
_FLUSH_SECONDS = 0.5
_PIECE = 200
"""Lines that are put together before they are written: the engine's loop waits for Python's lock no longer than that takes."""
_DIGITS = 7
"""Of times, in decimal places of a second."""
MAY_DIFFER = frozenset(
    {
        *("driver", "torch", "date", "num_blocks", "max_num_seqs", "max_num_batched_tokens", "max_model_len", "max_num_active_seqs"),
        *("enable_chunked_prefill", "long_prefill_token_threshold", "prefill_schedule_interval", "watermark"),
        *("scheduler_reserve_full_isl", "prefix_caching"),
    }
)
"""Of the heading's engine, what runs in one file and files that are read together need not share: which batches come, not how long one
takes."""


@dataclass(frozen=True, slots=True)
class IterationRow:
    """One iteration; its columns are the fields of ``Batch`` and then those below.

    Attributes:
        batch: what it computed.
        begin: seconds since the segment's clock began, when ``schedule()`` was entered.
        end: when ``update_from_output`` had processed its outputs. Under asynchronous scheduling the next iteration begins before.
        execute_seconds: execution and sampling alone; -1 where they are not known, as under asynchronous scheduling.
        blocks: KV blocks in use after scheduling.
        waiting, running: requests after scheduling.
        preempted: requests preempted in this iteration, by the engine or by a policy.
        segment: rises when the engine is new, when another run begins, or when rows were lost.
    """

    batch: Batch
    begin: float
    end: float
    execute_seconds: float
    blocks: int
    waiting: int
    running: int
    preempted: int
    segment: int


_BATCH = tuple(field.name for field in dataclasses.fields(Batch))
_OWN = tuple(field.name for field in dataclasses.fields(IterationRow) if field.name != "batch")
COLUMNS = (*_BATCH, *_OWN)
_batch_values, _own_values = attrgetter(*_BATCH), attrgetter(*_OWN)
_TIMES = frozenset({"begin", "end", "execute_seconds"})
_WHOLE = frozenset({"blocks", "waiting", "running", "preempted", "segment"})


# --- reading ------------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class IterationLog:
    """What one or several files hold.

    Attributes:
        engine: what was measured, of the first file's heading.
        table: (n, len(COLUMNS)) float64, iterations in order. Segments are numbered through all files, from 0.
        segments: what is known of each segment, by its number in ``table``.
    """

    engine: Mapping[str, Any]
    table: npt.NDArray[np.float64]
    segments: Mapping[int, Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.table)

    def column(self, name: str) -> npt.NDArray[np.float64]:
        """(n,) float64 of one of ``COLUMNS``."""
        return self.table[:, COLUMNS.index(name)]

    def batches(self) -> npt.NDArray[np.float64]:
        """(n, BATCH_FIELDS) float64, as ``Batch.array`` has them."""
        return self.table[:, : len(_BATCH)]

    def seconds(self) -> npt.NDArray[np.float64]:
        """(n,) how long each iteration lasted: from its begin, or from the end of the one before where that is later, to its end."""
        begin, end, segment = self.column("begin"), self.column("end"), self.column("segment")
        from_before = np.full(len(self), -math.inf)
        same = segment[1:] == segment[:-1]
        from_before[1:][same] = end[:-1][same]
        lasted: npt.NDArray[np.float64] = end - np.maximum(begin, from_before)
        return lasted

    def between(self) -> npt.NDArray[np.float64]:
        """(n,) from the end of the iteration before to the begin of this one, while requests were running; NaN elsewhere.

        That is what a server does between two steps, such as taking in requests. It is below 0 where iterations overlap.
        """
        gap = np.full(len(self), math.nan)
        segment, running, finished = self.column("segment"), self.column("running"), self.column("finished")
        busy = (segment[1:] == segment[:-1]) & (running[:-1] > finished[1:])
        gap[1:][busy] = (self.column("begin")[1:] - self.column("end")[:-1])[busy]
        return gap

    def rows(self) -> Iterator[IterationRow]:
        """The iterations one by one."""
        for values in self.table.tolist():
            own = {name: int(v) if name in _WHOLE else v for name, v in zip(_OWN, values[len(_BATCH) :], strict=True)}
            yield IterationRow(Batch(*values[: len(_BATCH)]), **own)


def read_iteration_logs(paths: Iterable[str | Path]) -> IterationLog:
    """The iterations of several files of one engine, in the order of the files.

    Raises:
        ConfigError: no file, one that cannot be read or is damaged (its name and line), or files of different engines (the field).
    """
    files = [(Path(path), *_read(Path(path))) for path in paths]
    if not files:
        raise ConfigError("iteration logs: none given, must be at least one file")
    first, engine, _, _ = files[0]
    for path, other, _, _ in files[1:]:
        different = _difference(engine, other)
        if different:
            raise ConfigError(f"{path}: engine.{different} is {other.get(different)!r}, but {engine.get(different)!r} in {first}")
    tables: list[npt.NDArray[np.float64]] = []
    segments: dict[int, Mapping[str, Any]] = {}
    column, following = COLUMNS.index("segment"), 0
    for path, _, table, about in files:
        renumbered = table.copy()
        for k in dict.fromkeys(table[:, column].astype(int).tolist()):
            renumbered[table[:, column] == k, column] = following
            segments[following] = {**about.get(k, {}), "file": str(path)}
            following += 1
        tables.append(renumbered)
    return IterationLog(engine, np.concatenate(tables), segments)


def read_iteration_log(path: str | Path) -> IterationLog:
    """The iterations of one file. Raises as ``read_iteration_logs``."""
    return read_iteration_logs([path])


def _difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """The first field that must agree and does not."""
    return next((name for name in {**a, **b} if name not in MAY_DIFFER and a.get(name) != b.get(name)), "")


def _unpacked(path: Path) -> str:
    """The whole lines of a file; a last one that a kill cut off is left out.

    Raises:
        ConfigError: it cannot be read, or is no text.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".gz":
        data = _gunzipped(path, data)
    try:
        return data[: data.rfind(b"\n") + 1].decode("ascii")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        raise ConfigError(f"{path}, line {line}: not text") from error


def _gunzipped(path: Path, data: bytes) -> bytes:
    """Of a last piece that a kill cut off, as much as is there."""
    found = []
    while data:
        piece = zlib.decompressobj(wbits=31)
        try:
            found.append(piece.decompress(data))
        except zlib.error as error:
            raise ConfigError(f"{path}: not a gzip file, or a damaged one ({error})") from error
        data = piece.unused_data
    return b"".join(found)


def _heading(path: Path, line: str) -> dict[str, Any]:
    """The engine of a heading whose columns are those of this version."""
    found = checks.json_object(f"{path}, line 1", line)
    if found.get("format") != FORMAT or not isinstance(found.get("engine"), dict) or not isinstance(found.get("columns"), list):
        raise ConfigError(f"{path}, line 1: not the heading of an iteration log of format {FORMAT}")
    if tuple(found["columns"]) != COLUMNS:
        wrong = sorted(set(COLUMNS) ^ set(map(str, found["columns"]))) or ["their order"]
        raise ConfigError(f"{path}, line 1: columns: those of another version ({', '.join(wrong)}), must be {', '.join(COLUMNS)}")
    engine: dict[str, Any] = found["engine"]
    return engine


def _read(path: Path) -> tuple[dict[str, Any], npt.NDArray[np.float64], dict[int, dict[str, Any]]]:
    """Engine, rows and what is known of segments of one file."""
    lines = _unpacked(path).split("\n")[:-1]
    if not lines:
        raise ConfigError(f"{path}: empty, must begin with the heading of an iteration log")
    engine = _heading(path, lines[0])
    segments: dict[int, dict[str, Any]] = {}
    rows: list[str] = []
    numbers: list[int] = []
    for number, line in enumerate(lines[1:], start=2):
        if line.startswith("{"):
            about = checks.json_object(f"{path}, line {number}", line)
            segments[checks.integer(f"{path}, line {number}: segment", about.pop("segment", None))] = about
        else:
            rows.append(line)
            numbers.append(number)
    return engine, _table(path, rows, numbers), segments


def _table(path: Path, rows: Sequence[str], numbers: Sequence[int]) -> npt.NDArray[np.float64]:
    """(n, len(COLUMNS)) of lines with these numbers in the file."""
    width = len(COLUMNS)
    try:
        if any(row.count(",") != width - 1 for row in rows):
            raise ValueError
        table = np.array(",".join(rows).split(",") if rows else [], dtype=np.float64).reshape(-1, width)
    except ValueError:
        table = np.array([_values(path, number, row) for row, number in zip(rows, numbers, strict=True)])
    position = {name: k for k, name in enumerate(COLUMNS)}
    limited = [k for name, k in position.items() if name != "execute_seconds"]
    counts = table[:, [position[name] for name in sorted(_WHOLE)]]
    late = np.zeros(len(table), dtype=bool)
    late[1:] = (np.diff(table[:, position["segment"]]) == 0) & (np.diff(table[:, position["end"]]) < 0)
    for wrong, why in (
        (~np.isfinite(table).all(axis=1), "a number that is not finite"),
        ((table[:, limited] < 0).any(axis=1), "a number below 0"),
        (((counts != np.floor(counts)) | (counts > checks.MOST_TOKENS)).any(axis=1), f"{', '.join(sorted(_WHOLE))} must be whole numbers"),
        (table[:, position["end"]] < table[:, position["begin"]], "it ends before it begins"),
        (late, "it ends before the iteration before it"),
    ):
        if wrong.any():
            raise ConfigError(f"{path}, line {numbers[int(np.argmax(wrong))]}: {why}")
    return table


def _values(path: Path, number: int, row: str) -> list[float]:
    cells = row.split(",")
    if len(cells) != len(COLUMNS):
        raise ConfigError(f"{path}, line {number}: {len(cells)} numbers, must be {len(COLUMNS)}")
    try:
        return [float(cell) for cell in cells]
    except ValueError as error:
        raise ConfigError(f"{path}, line {number}: not a row of numbers ({error})") from error


# --- writing ------------------------------------------------------------------------------------------
class IterationLogWriter:
    """Appends iterations to a file from a thread of its own: whoever appends waits for no disk, and no error of a disk reaches him.

    A file that is there is gone on with, in a new segment. On a disk that takes nothing the rows wait, ``MOST_WAITING`` at most; what is
    lost beyond them ends the segment. A failure is logged once, as ``live_background.Background`` does.

    Attributes:
        path: the file.
        engine: as the heading has it.
        full: ``max_rows`` are written or wait to be; whatever else is appended is thrown away.
        segment: number of the segment that rows are now of, -1 before the first.

    Args:
        engine: plain values that say what is measured, by name.
        max_rows: of the file; the log says once that it has ended.

    Raises:
        ConfigError: a path or number that is refused, a file that cannot be written or is not a log of this engine.
    """

    def __init__(self, path: str | Path, engine: Mapping[str, Any], *, max_rows: int = MAX_ROWS) -> None:
        self.path = Path(path)
        check_log_path("iteration_log", self.path)
        self._max_rows = checks.integer("iteration_log_max_rows", max_rows, low=1)
        self.engine: dict[str, Any] = json.loads(json.dumps(dict(engine)))
        self._rows: deque[IterationRow | dict[str, Any]] = deque()
        self._unwritten: list[bytes] = []
        self._count = self._lost = 0
        self._about: dict[str, Any] = {}
        self._ended = False
        self.segment = -1
        try:
            self.path.open("ab").close()
            self._go_on()
        except OSError as error:
            raise ConfigError(f"iteration_log: {self.path}, cannot be written ({error.strerror})") from error
        self._heading = _line({"format": FORMAT, "engine": self.engine, "columns": list(COLUMNS)})
        self.full = self._count >= self._max_rows
        self._background = Background(f"iteration log {self.path}", self._write, _FLUSH_SECONDS)

    def _go_on(self) -> None:
        """Behind the rows of an earlier process; what a kill cut off is taken away."""
        text = _unpacked(self.path)
        if text:
            own, (self.engine, table, segments) = self.engine, _read(self.path)
            self.differing(own)
            self._count = len(table)
            self.segment = int(max([*table[:, COLUMNS.index("segment")].tolist(), *segments, -1]))
        if self.path.suffix != ".gz":
            os.truncate(self.path, len(text))
        elif text:
            part = self.path.with_name(self.path.name + ".part")
            part.write_bytes(gzip.compress(text.encode("ascii")))
            os.replace(part, self.path)

    def differing(self, engine: Mapping[str, Any]) -> dict[str, Any]:
        """What of an engine is not as the heading says, by name.

        Raises:
            ConfigError: its iterations cannot stand in this file.
        """
        found: dict[str, Any] = json.loads(json.dumps(dict(engine)))
        wrong = _difference(self.engine, found)
        if wrong:
            raise ConfigError(
                f"iteration_log: {self.path} holds iterations of another engine ({wrong} {self.engine.get(wrong)!r}, "
                f"now {found.get(wrong)!r}); name another file"
            )
        return {name: found.get(name) for name in {**self.engine, **found} if self.engine.get(name) != found.get(name)}

    # --- what the engine's loop calls: no lock, no file ---------------------------------------------------

    def begin_segment(self, **about: Any) -> None:
        """The rows from now on are not of the iterations that follow those before.

        Args:
            about: plain values that say what they are of.
        """
        if self.full:
            return
        self._about = about
        self.segment += 1
        self._rows.append({"segment": self.segment, **about})

    def append(self, row: IterationRow) -> None:
        """One iteration; of what segment is the log's to say, whatever the row has."""
        if self.full:
            return
        if len(self._rows) >= MOST_WAITING:
            self._lost += 1
            return
        if self._lost or self.segment < 0:
            lost, self._lost = self._lost, 0
            self.begin_segment(**{**self._about, **({"lost": lost} if lost else {})})
        self._rows.append(row if row.segment == self.segment else dataclasses.replace(row, segment=self.segment))
        self._count += 1
        if self._count >= self._max_rows:
            self.full = True

    # --- the thread ---------------------------------------------------------------------------------------

    def _write(self) -> None:
        """Everything that waits, in pieces.

        Raises:
            OSError: the disk takes nothing; it is tried again with the next call.
        """
        full = self.full
        while True:
            self._flush()
            with contextlib.suppress(IndexError):
                while len(self._unwritten) < _PIECE:
                    row = self._rows.popleft()
                    self._unwritten.append(_line(row) if isinstance(row, dict) else _row_line(row))
            if not self._unwritten:
                break
        if full and not self._ended:
            self._ended = True
            logger.info("iteration log %s has its %d rows and ends", self.path, self._max_rows)

    def _flush(self) -> None:
        """Append what is to be written, in whole lines or not at all."""
        if not self._unwritten:
            return
        with self.path.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            lines = self._unwritten if before else [self._heading, *self._unwritten]
            data = b"".join(lines)
            data = gzip.compress(data) if self.path.suffix == ".gz" else data
            written = 0
            try:
                while written < len(data):
                    written += file.write(data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(before)
                raise
        self._unwritten = []

    def close(self, seconds: float = 2.0) -> bool:
        """Write what waits, for at most so long; returns whether that has ended."""
        return self._background.close(seconds)


def check_log_path(name: str, path: Path) -> None:
    """Refuse a place where no log can be.

    Raises:
        ConfigError: it is a folder, or its folder does not exist.
    """
    try:
        if path.is_dir():
            raise ConfigError(f"{name}: {str(path)!r} is a folder, must be a file")
        if path.absolute().parent.is_dir():
            return
    except OSError:  # a name that is too long
        pass
    raise ConfigError(f"{name}: {str(path)!r}, its folder does not exist")


def _line(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")


def _row_line(row: IterationRow) -> bytes:
    own = (round(value, _DIGITS) if name in _TIMES else value for name, value in zip(_OWN, _own_values(row), strict=True))
    return (",".join(map(_compact, (*_batch_values(row.batch), *own))) + "\n").encode("ascii")


def _compact(value: float) -> str:
    """The shortest text that reads back as the number."""
    whole = int(value)
    return str(whole) if whole == value else repr(float(value))
