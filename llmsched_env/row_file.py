"""A CSV file whose lines are records of one type, each on disk before the next one is waited for."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from llmsched_env.errors import ConfigError

T = TypeVar("T")
_FROM_TEXT: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "bool": lambda text: text == "True"}


class RowFile(Generic[T]):
    """Open with ``with``; ``rows`` holds what was there and what was appended.

    Args:
        path: the file.
        kind: a dataclass with fields of type str, int, float and bool; they are the columns, in this order.
        resume: keep the rows in the file; otherwise it begins anew.

    Raises:
        ConfigError: with ``resume``, a file with other columns or a line that is not a row.
    """

    def __init__(self, path: Path, kind: type[T], *, resume: bool) -> None:
        self._path = path
        self._columns = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        self.rows: list[T] = read_rows(path, kind) if resume and path.exists() else []

    def __enter__(self) -> RowFile[T]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # Written anew: a line that a kill cut off is gone.
        self._file = self._path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(self._columns)
        self._writer.writerows(dataclasses.astuple(row) for row in self.rows)  # type: ignore[call-overload]
        self._file.flush()
        return self

    def append(self, row: T) -> None:
        self.rows.append(row)
        self._writer.writerow(dataclasses.astuple(row))  # type: ignore[call-overload]
        self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def read_rows(path: Path, kind: type[T]) -> list[T]:
    """The whole lines of a file as records.

    Raises:
        ConfigError: other columns, or a line that is not a row.
    """
    text = path.read_text(encoding="utf-8")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    if not lines:
        return []
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if lines[0] != [f.name for f in fields]:
        raise ConfigError(f"{path}: the columns are not those of this version, use --overwrite or another --out")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            rows.append(kind(**{f.name: _FROM_TEXT[str(f.type)](text) for f, text in zip(fields, line, strict=True)}))
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not a row ({error})") from error
    return rows
