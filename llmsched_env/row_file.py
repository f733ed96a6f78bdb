"""A CSV file whose lines are records of one type, each on disk before the next one is waited for."""

from __future__ import annotations

import csv
import dataclasses
import io
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Generic, TypeVar

from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing

T = TypeVar("T")
_FROM_TEXT: dict[Any, Callable[[str], Any]] = {str: str, int: int, float: float, bool: lambda text: text == "True"}


class RowFile(Generic[T]):
    """Open with ``with``; ``rows`` holds what was there and what was appended.

    Args:
        path: the file.
        kind: a dataclass with fields of type str, int, float, bool, or a dataclass of such, whose fields stand in its place; they are
            the columns, in this order.
        resume: keep the rows in the file; otherwise it begins anew.

    Raises:
        ConfigError: with ``resume``, a file that cannot be read, with other columns, or with a line that is not a row.
    """

    def __init__(self, path: Path, kind: type[T], *, resume: bool) -> None:
        self._path = path
        self._kind = kind
        self.rows: list[T] = read_rows(path, kind) if resume and path.exists() else []

    def __enter__(self) -> RowFile[T]:
        # Written anew: a line that a kill cut off is gone.
        write_rows(self._path, self._kind, self.rows)
        self._file = self._path.open("a", encoding="utf-8", newline="")
        self._writer = csv_writer(self._file)
        return self

    def append(self, row: T) -> None:
        self.rows.append(row)
        self._writer.writerow(_cells(row))
        self._file.flush()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()


def csv_writer(file: IO[str]) -> Any:
    """A writer of the one form that CSV files have here: commas, quotes where they are needed, lines that end in a line feed."""
    return csv.writer(file, lineterminator="\n")


def columns(kind: type[Any]) -> list[str]:
    """The heading of a file of such rows."""
    return [name for name, _ in _leaves(kind)]


def write_rows(path: Path, kind: type[T], rows: Iterable[T]) -> None:
    """Replace the file by these rows."""
    with replacing(path) as file:
        writer = csv_writer(file)
        writer.writerow(columns(kind))
        writer.writerows(_cells(row) for row in rows)


def read_rows(path: Path, kind: type[T]) -> list[T]:
    """The whole lines of a file as records; a last line cut off by a kill is left out.

    Raises:
        ConfigError: a file that cannot be read as text, other columns, or a line that is not a row.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1])))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as rows ({error}), use --overwrite or another place") from error
    if not lines:
        return []
    if lines[0] != columns(kind):
        raise ConfigError(f"{path}: the columns are not those of this version, use --overwrite or another place")
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        try:
            values = [_FROM_TEXT[form](text) for (_, form), text in zip(_leaves(kind), line, strict=True)]
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not a row ({error})") from error
        rows.append(_record(kind, iter(values)))
    return rows


def _leaves(kind: type[Any]) -> list[tuple[str, Any]]:
    """(column, type) of a record's fields, those of a record within it in its place."""
    hints = typing.get_type_hints(kind)
    found: list[tuple[str, Any]] = []
    for field in dataclasses.fields(kind):
        form = hints[field.name]
        found += _leaves(form) if isinstance(form, type) and dataclasses.is_dataclass(form) else [(field.name, form)]
    return found


def _cells(row: Any) -> list[Any]:
    found: list[Any] = []
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        found += _cells(value) if dataclasses.is_dataclass(value) else [value]
    return found


def _record(kind: Any, values: Iterator[Any]) -> Any:
    hints = typing.get_type_hints(kind)
    forms = {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return kind(**{name: _record(form, values) if dataclasses.is_dataclass(form) else next(values) for name, form in forms.items()})
