"""Checks of values that users, files and their own classes give: the value as plain Python or numpy holds it, or ``ConfigError``.

Every message names the field, the value and what is allowed. ``bool`` is no number here, text is never
parsed as one, and numpy's scalars are numbers like Python's own.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.errors import ConfigError

MOST_TOKENS = 2**30
"""Largest count that the engine's int32 arrays hold with room for sums of two."""
MOST_SECONDS = 1e12
"""Some 30,000 years: float64 still tells a tenth of a millisecond."""
MOST_BYTES = 64 * 2**20
"""Of one file, unpacked."""


def shown(value: object) -> str:
    """``repr`` for a message: short, and there even where ``repr`` fails (integers of more than 4,300 digits)."""
    try:
        text = repr(value)
    except Exception:  # an object's own repr may raise anything; it must not hide the error that names the field
        return f"a {type(value).__name__}"
    return text if len(text) <= 120 else f"{text[:110]}... ({type(value).__name__})"


def integer(name: str, value: object, low: int = 0, high: int = MOST_TOKENS) -> int:
    """An integer from ``low`` to ``high``, Python's or numpy's."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= int(value) <= high:
        raise ConfigError(f"{name}: {shown(value)}, must be an integer from {_count(low)} to {_count(high)}")
    return int(value)


def number(name: str, value: object, low: float = 0.0, high: float = MOST_SECONDS, *, unit: str = "", open_low: bool = False) -> float:
    """A number from ``low`` (above it with ``open_low``) to ``high``; infinity only where ``high`` is infinite."""
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
        try:
            plain = float(value)
        except OverflowError:  # an integer beyond every float
            plain = math.nan
        if (plain > low if open_low else plain >= low) and plain <= high:
            return plain
    most = f" and <= {high:g}" if math.isfinite(high) else ""
    raise ConfigError(f"{name}: {shown(value)}, must be a number {'>' if open_low else '>='} {low:g}{most}{unit and ' ' + unit}")


def finite(name: str, value: object) -> float:
    """A finite number."""
    if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    raise ConfigError(f"{name}: {shown(value)}, must be a finite number")


def flag(name: str, value: object) -> bool:
    """True or False, Python's or numpy's."""
    if not isinstance(value, bool | np.bool_):
        raise ConfigError(f"{name}: {shown(value)}, must be true or false")
    return bool(value)


def text(name: str, value: object, *, empty: bool = True) -> str:
    """A text of at most 4,096 characters that can be written to a file: JSON can hold halves of surrogate pairs, UTF-8 cannot."""
    if not isinstance(value, str) or len(value) > 4096 or not (value or empty) or any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"{name}: {shown(value)}, must be a text of {'at most' if empty else '1 to'} 4096 characters")
    return value


def one_of(name: str, value: object, allowed: Iterable[str]) -> str:
    """One of a few words."""
    words = tuple(allowed)
    if not isinstance(value, str) or value not in words:
        raise ConfigError(f"{name}: {shown(value)}, must be {', '.join(map(repr, words[:-1]))} or {words[-1]!r}")
    return value


def mapping(name: str, value: object) -> dict[str, Any]:
    """A mapping with texts as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"{name}: {shown(value)}, must be an object of named fields")
    return dict(value)


def integers(name: str, values: object, low: int = 0, high: int = MOST_TOKENS, most: int = 65_536) -> tuple[int, ...]:
    """A sequence of at most ``most`` integers from ``low`` to ``high``."""
    if isinstance(values, np.ndarray):
        values = values.tolist() if values.ndim == 1 and values.size <= most else None
    if not isinstance(values, tuple | list | range) or len(values) > most:
        raise ConfigError(f"{name}: {shown(values)}, must be a sequence of at most {most} integers from {_count(low)} to {_count(high)}")
    return tuple(integer(f"{name}[{i}]", value, low, high) for i, value in enumerate(values))


def numbers(name: str, values: object) -> npt.NDArray[np.float64]:
    """float64 array of numbers; of another kind (text, booleans, objects, complex) or ragged is refused."""
    array = any_array(name, values)
    if array.dtype.kind not in "iuf" and array.size:
        raise ConfigError(f"{name}: {shown(values)}, must be numbers, found {array.dtype}")
    with np.errstate(over="ignore"):  # a long double may be too large: it becomes infinite, which the caller refuses
        return np.ascontiguousarray(array, dtype=np.float64).reshape(array.shape)


def counts(name: str, values: object, low: int, high: int = MOST_TOKENS, *, single: bool = False) -> npt.NDArray[np.int32]:
    """(n,) int32 array of whole numbers from ``low`` to ``high``, which may come as floats; with ``single`` also of one number."""
    array = any_array(name, values)
    array = np.atleast_1d(array) if single else array
    if array.ndim != 1:
        raise ConfigError(f"{name}: shape {array.shape}, must be one-dimensional")
    allowed = f"must be an integer from {_count(low)} to {_count(high)}"
    if array.size == 0:
        return np.zeros(0, np.int32)
    if array.dtype.kind in "iu" and array.min() >= low and array.max() <= high:  # an episode's reset comes here
        return np.ascontiguousarray(array, dtype=np.int32)
    if array.dtype.kind not in "iuf":
        # Integers beyond int64 come as objects: say which row, as for any other.
        row = next((i for i, v in enumerate(array.tolist()) if isinstance(v, bool) or not isinstance(v, int) or not low <= v <= high), 0)
        raise ConfigError(f"{name}: row {row} is {shown(array.tolist()[row])}, {allowed}")
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~((array >= low) & (array <= high) & (np.floor(array) == array)))
    if bad.size:
        raise ConfigError(f"{name}: row {bad[0]} is {array[bad[0]]}, {allowed}")
    return np.ascontiguousarray(array, dtype=np.int32)


def any_array(name: str, values: object) -> npt.NDArray[Any]:
    """``np.asarray``, of whatever kind."""
    try:
        return np.asarray(values)
    except Exception as error:  # ragged lists, and whatever an object's own conversion raises
        raise ConfigError(f"{name}: {shown(values)}, must be an array of numbers ({error})") from error


def _count(value: int) -> str:
    power = value.bit_length() - 1
    return f"2**{power}" if value > 2**20 and value == 2**power else str(value)


# --- files ------------------------------------------------------------------------------------------
def path(name: str, value: object) -> Path:
    """A path, as a text or as ``pathlib`` has it."""
    if isinstance(value, str | os.PathLike) and value != "":
        with contextlib.suppress(TypeError):  # one of bytes
            return Path(value)
    raise ConfigError(f"{name}: {shown(value)}, must be a path")


def file_bytes(name: str, path: str | os.PathLike[str]) -> bytes:
    """What an ordinary file of at most 64 MiB holds."""
    try:
        found = Path(path)
        if found.exists() and not (found.is_file() or found.is_dir()):  # a pipe would wait for ever
            raise ConfigError(f"{name}: not an ordinary file")
        with found.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{name}: more than {MOST_BYTES} bytes, must be at most that")
    return data


def json_object(name: str, data: bytes | str) -> dict[str, Any]:
    """A JSON object in which no field is given twice. NaN and Infinity are read, as 1e999 is: who refuses them can name the field."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            raise ValueError(f"field {shown(next(key for key in names if names.count(key) > 1))} is given twice")
        return found

    try:
        decoded = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(decoded, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: {shown(value)}, must be a JSON object")
    return value


@contextlib.contextmanager
def told(name: str) -> Iterator[None]:
    """What code that trusts its input raises on what a file says, as ``ConfigError`` with ``name`` in front."""
    try:
        yield
    except ConfigError as error:
        raise type(error)(f"{name}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {type(error).__name__}: {error}") from error
