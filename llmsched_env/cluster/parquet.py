"""Finished calls in Parquet files: a folder of parts, each of which has its name only once it is whole.

    part-00000.parquet, part-00001.parquet, ...   rows in the order in which replicas reported them, a row group a batch
    _run.json                                     seed, settings, rows and parts of a run that ended; missing where it broke off

Every page has a checksum, which ``read_calls`` verifies.

Readers of Parquet folders pass over names that begin with ``_`` or ``.``: ``pyarrow.parquet.read_table(folder)`` reads such a folder as
it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from llmsched_env import checks
from llmsched_env.cluster.finished import FINISHED_DTYPE
from llmsched_env.cluster.metrics import Rows, check_calls, check_rows
from llmsched_env.cluster.sinks import Sink
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_folder, write_settings

RUN_FILE = "_run.json"
METADATA_KEY = b"llmsched"
PART_ROWS = 4_194_304
"""Rows after which a part is whole: what a killed process can lose."""


_FORM: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
Place = str | os.PathLike[str]


class ParquetSink(Sink):
    """Writes every row.

    An error or Ctrl-C inside the ``with`` block leaves whole parts with every batch that was written, and no ``_run.json``. A process
    that is killed, or a disk that is full, loses the part being written, at most ``part_rows`` rows and a batch; a file whose name begins
    with a dot remains of it.

    Args:
        folder: made here; its parents, too.
        seed, settings: of the run, kept in each part's metadata (key ``llmsched``, JSON) and in ``_run.json``.
        part_rows: a part ends with the batch that reaches so many.

    Raises:
        ConfigError: the folder, or a file of that name, exists; it cannot be made; or a value that is not allowed.
        MissingExtraError: pyarrow is not installed.
    """

    def __init__(self, folder: Place, *, seed: int, settings: Mapping[str, str] | None = None, part_rows: int = PART_ROWS) -> None:
        self._arrow, self._parquet = require("pyarrow", "cluster"), require("pyarrow.parquet", "cluster")
        self.folder = folder = checks.path("folder", folder)
        kept = {checks.text("settings", key): checks.text(f"settings.{key}", value) for key, value in (settings or {}).items()}
        self._described = {"seed": checks.integer("seed", seed, high=2**63 - 1), "settings": kept}
        self._part_rows = checks.integer("part_rows", part_rows, low=1)
        if folder.exists() or folder.is_symlink():
            broken = folder.is_dir() and any(folder.glob("part-*.parquet")) and not (folder / RUN_FILE).exists()
            what = "exists already and holds a run that broke off" if broken else "exists already"
            raise ConfigError(f"folder: {folder} {what}; remove it or name another place")
        check_folder("folder", folder)
        folder.mkdir(parents=True)
        arrow, types = self._arrow, [(name, FINISHED_DTYPE[name]) for name in FINISHED_DTYPE.names or ()]
        columns = [arrow.field(name, arrow.from_numpy_dtype(form), nullable=False) for name, form in types]
        self._schema = arrow.schema(columns, metadata={METADATA_KEY: json.dumps(self._described)})
        self._writer: Any = None
        self._closed = False
        self._rows_in_part = 0
        self.rows = 0
        self.parts = 0

    def write(self, rows: Rows) -> None:
        check_rows(rows)
        if self._closed:
            raise ConfigError(f"rows: {self.folder} is closed, nothing can be written")
        if not len(rows):
            return
        if self._writer is None:
            self._writer = self._parquet.ParquetWriter(self._unfinished, self._schema, **_FORM, **_encodings())
        columns = [self._arrow.array(np.ascontiguousarray(rows[name])) for name in self._schema.names]
        try:
            self._writer.write_table(self._arrow.table(columns, schema=self._schema), row_group_size=len(rows))
        except (OSError, self._arrow.ArrowException):  # a full disk: nobody knows what stands in this part, so it never gets its name
            self._closed, self._writer = True, None
            raise
        self.rows += len(rows)
        self._rows_in_part += len(rows)
        if self._rows_in_part >= self._part_rows:
            self._end_part()

    @property
    def _unfinished(self) -> Path:
        return self.folder / f".{_part(self.parts)}"

    def _end_part(self) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        writer.close()
        self._unfinished.replace(self.folder / self._unfinished.name[1:])
        self.parts += 1
        self._rows_in_part = 0

    def close(self) -> None:
        """End the last part, and say that the run is whole."""
        if not self._closed:
            self._closed = True
            self._end_part()
            write_settings(self.folder / RUN_FILE, {**self._described, "rows": self.rows, "parts": self.parts})

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        elif not self._closed:
            self._closed = True
            self._end_part()


def _encodings() -> dict[str, Any]:
    """How columns are encoded before they are compressed: no two times are equal, so a dictionary of them only takes time and room."""
    names = FINISHED_DTYPE.names or ()
    times = [name for name in names if FINISHED_DTYPE[name].kind == "f"]
    encoded = dict.fromkeys(times, "BYTE_STREAM_SPLIT") | dict.fromkeys(("number", "program"), "DELTA_BINARY_PACKED")
    return {"column_encoding": encoded, "use_dictionary": [name for name in names if name not in encoded]}


def read_calls(folder: Place, *, broken: bool = False) -> Rows:
    """All rows of such a folder in memory, by the number of the call.

    Args:
        broken: also of a run that broke off.

    Raises:
        ConfigError: no such folder; a part that is missing, cannot be read, is damaged or has other columns; other numbers of parts or
            rows than ``_run.json`` states; rows that no run can have given (``check_calls``); or a run that broke off.
        MissingExtraError: pyarrow is not installed.
    """
    require("pyarrow", "cluster")
    place = checks.path("folder", folder)
    if not place.is_dir():
        raise ConfigError(f"folder: {place}, must be a folder that ParquetSink wrote")
    ended = (place / RUN_FILE).exists()
    if not broken and not ended:
        raise ConfigError(f"folder: {place} has no {RUN_FILE}: the run broke off")
    stated = _stated(place / RUN_FILE) if ended else {}
    parts = sorted(place.glob("part-*.parquet"))
    for number in range(stated.get("parts", len(parts))):
        if not (place / _part(number)).is_file():
            raise ConfigError(f"folder: {place} lacks {_part(number)}")
    found = np.concatenate([np.empty(0, dtype=FINISHED_DTYPE), *map(_read_part, parts)])
    for name, count in (("parts", len(parts)), ("rows", len(found))):
        if stated.get(name, count) != count:
            raise ConfigError(f"folder: {place} has {count} {name}, {RUN_FILE} states {stated[name]}")
    with checks.told(f"folder: {place}"):
        check_calls(found)
    return found[np.argsort(found["number"], kind="stable")]


def _part(number: int) -> str:
    return f"part-{number:05d}.parquet"


def _stated(path: Path) -> dict[str, int]:
    """Rows and parts as the run file has them."""
    where = f"folder: {path}"
    kept = checks.json_object(where, checks.file_bytes(where, path))
    return {name: checks.integer(f"{where}: {name}", kept.get(name), high=2**62) for name in ("rows", "parts")}


def _read_part(path: Path) -> Rows:
    """The rows of one file; damage that a checksum shows is an ``OSError`` of the library."""
    arrow, parquet = require("pyarrow", "cluster"), require("pyarrow.parquet", "cluster")
    try:
        table = parquet.read_table(path, page_checksum_verification=True)
    except (OSError, arrow.ArrowException) as error:
        raise ConfigError(f"folder: {path} cannot be read ({error})") from error
    if table.column_names != list(FINISHED_DTYPE.names or ()):
        raise ConfigError(f"folder: {path} has the columns {table.column_names}, must have those of FINISHED_DTYPE")
    rows = np.empty(table.num_rows, dtype=FINISHED_DTYPE)
    for name in table.column_names:
        form = arrow.from_numpy_dtype(FINISHED_DTYPE[name])
        column = table.column(name)
        if column.type != form or column.null_count:
            raise ConfigError(f"folder: {path} has {name} as {column.type}, must be {form} without nulls")
        rows[name] = column.to_numpy()
    return rows
