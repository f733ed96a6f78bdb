"""From the bytes of a trace file to rows of cells: text or gzip, CSV or JSON lines.

Cells are what the file holds: strings in CSV; strings, numbers, lists and so on in JSON. A number that Python cannot
hold (``1e400``, an integer of thousands of digits) stays the text it was, so that an error can show it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_env.errors import ConfigError

DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}
"""What may stand between the cells of a CSV file; found by the header."""

_OTHER_FILES = {
    b"PK\x03\x04": "a zip archive (or a spreadsheet)",
    b"\x28\xb5\x2f\xfd": "zstd data",
    b"\xfd7zXZ\x00": "xz data",
    b"BZh": "bzip2 data",
    b"PAR1": "a Parquet file",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}


class Absent:
    """Stands for a cell that the row does not have."""

    def __init__(self, why: str) -> None:
        self.why = why


MISSING = Absent("is missing")
REPEATED = Absent("is given more than once")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row without cells, and why."""

    reason: str


Row = tuple[int, list[Any] | BadRow]
"""Line number in the file (of the row's first line) and its cells, one for each column of the header."""


def read_text(where: str) -> str:
    """The text of a file, unpacked if its first bytes are those of gzip.

    Raises:
        ConfigError: a file that cannot be read, damaged gzip, or bytes that are not UTF-8 text.
    """
    try:
        raw = Path(where).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        name = where if where and where.isprintable() else repr(where)
        raise ConfigError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(f"{where}: damaged gzip file ({error})") from error
    elif where.endswith(".gz") and raw:
        raise ConfigError(f"{where}: is named .gz but holds no gzip data")
    for magic, kind in _OTHER_FILES.items():
        if raw.startswith(magic):
            raise ConfigError(f"{where}: is not a text file but {kind}, must be CSV or JSON lines in UTF-8, plain or gzip")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{where}:{line}: is not a text file in UTF-8 (byte {error.start}: {error.reason})") from error
    if "\0" in text:
        raise ConfigError(f"{where}: is not a text file in UTF-8 (it holds NUL bytes)")
    return text


def read_rows(where: str, text: str, known: frozenset[str]) -> tuple[list[str], Iterator[Row]]:
    """The header and an iterator over the rows; JSON lines where the text begins with a brace or bracket, else CSV.

    Args:
        where: the file, for errors.
        text: its content.
        known: every column name that a reader looks for; tells a CSV file's delimiter.

    Raises:
        ConfigError: an empty file, a header that cannot be read, or (while iterating) text that is no CSV.
    """
    start = text.lstrip()
    if not start:
        raise ConfigError(f"{where}: is empty, must hold a header and at least one request")
    return _json_lines(where, text) if start[0] in "{[" else _csv_rows(where, text, known)


# --- CSV ------------------------------------------------------------------------------------------


def _delimiter(text: str, known: frozenset[str]) -> str:
    """The delimiter under which the header has the most known columns; a comma where none has any."""

    def found(delimiter: str) -> int:
        try:
            header = next((cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if _filled(cells)), [])
        except csv.Error:
            return 0
        return len(known.intersection(name.strip() for name in header))

    return max(DELIMITERS, key=found)  # the first of equals


def _filled(cells: list[str]) -> bool:
    return bool(cells) and (bool(cells[0].strip()) or any(cell.strip() for cell in cells))


def _csv_rows(where: str, text: str, known: frozenset[str]) -> tuple[list[str], Iterator[Row]]:
    # Cells may be of any length (a column of prompts). The limit is the process's: it is raised, never lowered, so that
    # two threads that read at once cannot cut each other off.
    csv.field_size_limit(max(csv.field_size_limit(), min(len(text) + 1, 2**31 - 1, sys.maxsize)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=_delimiter(text, known), strict=True)

    def lines() -> Iterator[tuple[int, list[str]]]:
        begin = 1  # of the row: a quoted cell may hold line ends
        try:
            for cells in reader:
                if _filled(cells):
                    yield begin, cells
                begin = reader.line_num + 1
        except csv.Error as error:
            raise ConfigError(f"{where}:{begin}: is not CSV, in the row that begins here ({error})") from error

    rows = lines()
    first = next(rows, None)
    if first is None:
        raise ConfigError(f"{where}: is empty, must hold a header and at least one request")
    header = [name.strip() for name in first[1]]

    def checked() -> Iterator[Row]:
        for line, cells in rows:
            if len(cells) > len(header):
                yield line, BadRow(f"{len(cells)} fields, the header has {len(header)} columns")
            else:
                yield line, cells + [MISSING] * (len(header) - len(cells))

    return header, checked()


# --- JSON lines -----------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                record[name] = REPEATED
            seen.add(name)
    return record


def _finite(text: str) -> float | str:
    value = float(text)
    return value if math.isfinite(value) else text


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite)
# Integers of more than 4,300 digits, which int() refuses to read, as text.
_LONG_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_finite, parse_int=str)


def _record(line: str) -> dict[str, Any] | BadRow:
    try:
        try:
            record = _DECODER.decode(line)
        except json.JSONDecodeError:
            raise
        except ValueError:
            record = _LONG_DECODER.decode(line)
    except ValueError as error:
        return BadRow(f"is not a JSON object on one line ({error})")
    except RecursionError:
        return BadRow("is not a JSON object on one line (nested too deeply)")
    if not isinstance(record, dict):
        hint = ", write one object on each line" if isinstance(record, list) else ""
        return BadRow(f"is not a JSON object, but {type(record).__name__}{hint}")
    return record


def _json_lines(where: str, text: str) -> tuple[list[str], Iterator[Row]]:
    records = ((number, _record(line)) for number, line in enumerate(text.split("\n"), start=1) if line.strip())
    first_line, first = next(records)
    if isinstance(first, BadRow):
        raise ConfigError(f"{where}:{first_line}: {first.reason}")
    header = list(first)

    def rows() -> Iterator[Row]:
        yield first_line, list(first.values())
        for number, record in records:
            yield number, record if isinstance(record, BadRow) else [record.get(name, MISSING) for name in header]

    return header, rows()
