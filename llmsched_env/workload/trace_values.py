"""From a cell of a trace file to a number of tokens, a time or a name. What cannot be right raises ``ValueError`` with the reason."""

from __future__ import annotations

import math
import re
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

MAX_TOKENS = 2**30


def shown(cell: Any) -> str:
    """A cell in an error message, at most 60 characters of it."""
    try:
        return repr(str(cell)[:60])
    except (RecursionError, ValueError):  # nested deeply, or an integer of thousands of digits
        return f"({type(cell).__name__})"


def number(cell: Any) -> float | int:
    """A finite number of at most 1e19 in size; text such as ``"5"`` and ``"5.0"`` counts."""
    value: float | int
    if isinstance(cell, str):
        text = cell.strip()
        if text.isdigit() and text.isascii() and len(text) < 20:
            return int(text)
        if not text:
            raise ValueError("is empty, must be a number")
        try:
            if "_" in text or not text.isascii():
                raise ValueError
            value = float(text)
        except ValueError:
            hint = " (a decimal comma, or commas between thousands? write 1234.5)" if "," in text else ""
            raise ValueError(f"is not a number{hint}") from None
    elif isinstance(cell, bool) or not isinstance(cell, int | float):
        raise ValueError("is not a number")
    else:
        value = cell
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("is not finite")
    if abs(value) > 1e19:
        raise ValueError("is too large")
    return value


def tokens(cell: Any) -> int:
    """A whole number of tokens from 0 to 2**30."""
    value = number(cell)
    if value > MAX_TOKENS:
        raise ValueError("is too large, must be at most 2**30 tokens")
    if value < 0:
        raise ValueError("is negative, must be a number of tokens >= 1")
    if value != int(value):
        raise ValueError("is not a whole number of tokens")
    return int(value)


def time(cell: Any) -> float | int:
    """A time >= 0 in the unit of the file."""
    value = number(cell)
    if value < 0:
        raise ValueError("is negative, times must be >= 0")
    return value


_DATETIME = re.compile(
    r"(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?: ?(?:Z|UTC|([+-])(\d\d)(?::?(\d\d))?))?",
    re.ASCII | re.IGNORECASE,
)
_EPOCH = datetime(1970, 1, 1)


@lru_cache(maxsize=1024)
def _epoch_seconds(date: str, clock: str) -> int:
    return (datetime.fromisoformat(f"{date} {clock}") - _EPOCH) // timedelta(seconds=1)


def is_datetime(cell: Any) -> bool:
    """Whether a cell is written as a date and time."""
    return isinstance(cell, str) and _DATETIME.fullmatch(cell.strip()) is not None


def datetime_nanoseconds(cell: Any) -> int:
    """Nanoseconds since 1970 (UTC), exact: Azure writes 7 decimals, more than ``datetime`` keeps. UTC where no offset is given."""
    match = _DATETIME.fullmatch(cell.strip()) if isinstance(cell, str) else None
    if match is None:
        raise ValueError(
            "is not a time such as '2023-11-16 18:17:03.9799600', with or without an offset such as +02:00 or Z "
            "(time_unit, --time-unit, reads numbers)"
        )
    date, clock, fraction, sign, hours, minutes = match.groups()
    try:
        seconds = _epoch_seconds(date, clock)
    except ValueError as error:
        raise ValueError(f"is not a time ({error})") from None
    if sign is not None:
        if int(hours) > 23 or int(minutes or 0) > 59:
            raise ValueError("is not a time (the offset must be at most 23:59)")
        offset = 3600 * int(hours) + 60 * int(minutes or 0)
        seconds += offset if sign == "-" else -offset
    return seconds * 10**9 + int((fraction or "").ljust(9, "0"))


def label(cell: Any) -> str:
    """A name or a whole number, as text."""
    if isinstance(cell, bool) or not isinstance(cell, str | int):
        raise ValueError("is not a name or number")
    text = str(cell).strip()
    if not text:
        raise ValueError("is empty, must be a name or number")
    # It is written to files later on.
    if not text.isprintable():
        raise ValueError("is not printable, must be a name or number")
    return text
