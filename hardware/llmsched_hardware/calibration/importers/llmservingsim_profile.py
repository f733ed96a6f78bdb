"""The files of LLMServingSim's profiler: ``dense.csv``, ``per_sequence.csv``, ``attention.csv``, ``skew_fit.csv``, ``meta.yaml``.

A profile is a folder of casys-kaist/LLMServingSim, ``profiler/perf/GPU/MODEL/VARIANT`` with ``meta.yaml`` and a folder for each
number of GPUs that share a model (``tp1``, ``tp2``). CSV files may be gzipped, and the files of one number may lie beside
``meta.yaml``.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import FloatArray
from llmsched_hardware.calibration.importers.grid import Cell, LeaveOneOut, errors_along, neighbour_errors

ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
_LABELS = ("n_label", "skew_rate_label", "kv_big_label", "kp_label")
_BINS = ("n", "skew_rate", "kv_big", "kp")


@dataclass(frozen=True, slots=True)
class Skew:
    """The profile's correction for decodes of unequal contexts.

    Attributes:
        edges: upper edges of the cells: prefill chunk, decodes, share of long decodes, longest context, context of the prefills.
        alpha: one cell more on each axis than it has edges; NaN where nothing was fitted.
        pooled: alpha of all measured batches together.
    """

    edges: tuple[FloatArray, ...]
    alpha: FloatArray
    pooled: float


@dataclass(frozen=True, slots=True)
class Profile:
    """The raw files, microseconds of one operator of one layer. ``skew`` is None where the record says that it is not enabled."""

    meta: Mapping[str, str]
    dense: Mapping[str, Mapping[int, float]]
    per_sequence: Mapping[str, Mapping[int, float]]
    attention: Mapping[Cell, float]
    skew: Skew | None = None


def find(source: Path, name: str, tensor_parallel: int, parents: bool = False) -> Path:
    """A file of the profile.

    Raises:
        ConfigError: there is none of that name.
    """
    folder = f"tp{tensor_parallel}"
    own = [source] if tensor_parallel == 1 or source.name == folder or parents else []
    for place in (*own, source / folder, *([source.parent] if parents else [])):
        for path in (place / name, place / f"{name}.gz"):
            if path.is_file():
                return path
    there = ", ".join(sorted(path.name for path in source.glob("tp*") if path.is_dir()))
    hint = f"; profiled are {there}" if there and not (source / folder).is_dir() else ""
    where = "there" if tensor_parallel == 1 else f"in {folder}"
    raise ConfigError(f"profile {str(source)!r}: no {name} (nor {name}.gz) {where}, so it is no LLMServingSim profile{hint}")


def _rows(path: Path, columns: tuple[str, ...]) -> list[list[str]]:
    """The columns asked for, row by row.

    Raises:
        ConfigError: not a CSV file, or a column is missing.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        rows = list(csv.DictReader(io.StringIO(text), strict=True))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path.name}: not a CSV file ({error})") from error
    if not rows:
        raise ConfigError(f"{path.name}: no rows")
    for column in columns:
        if column not in rows[0]:
            raise ConfigError(f"{path.name}: column {column!r} is missing (found: {', '.join(map(str, rows[0]))})")
    return [[row[column] for column in columns] for row in rows]


def _time(path: Path, line: int, at: Iterable[str], time: str) -> tuple[tuple[int, ...], float]:
    """Coordinates and microseconds of one row."""
    try:
        place, value = tuple(int(x) for x in at), float(time)
    except (TypeError, ValueError):
        place, value = (-1,), math.nan
    if min(place) < 0 or not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{path.name}: line {line}: {', '.join(map(str, at))} takes {time!r}, must be whole numbers and a time > 0")
    return place, value


def _by_layer(path: Path, axis: str) -> dict[str, dict[int, float]]:
    tables: dict[str, dict[int, float]] = {}
    for line, (layer, at, text) in enumerate(_rows(path, ("layer", axis, "time_us")), start=2):
        (x,), time = _time(path, line, (at,), text)
        tables.setdefault(layer, {})[x] = time
    return tables


# ------------------------------------------------------------------------------------------------- meta.yaml


def parse_meta(text: str) -> dict[str, Any]:
    """Nested ``key: value`` lines and lists in brackets, which is all of YAML that the profiler writes; every value is text."""
    root: dict[str, Any] = {}
    stack: list[tuple[int, dict[str, Any]]] = [(-1, root)]
    pending = ""
    for raw in text.splitlines():
        line = f"{pending} {raw.strip()}" if pending else raw
        pending = line if line.count("[") > line.count("]") else ""
        if pending or not line.strip() or line.lstrip().startswith("#"):
            continue
        key, colon, value = line.strip().partition(":")
        if not colon:
            continue
        indent = len(line) - len(line.lstrip())
        while stack[-1][0] >= indent:
            stack.pop()
        key, value = key.strip("'\""), value.strip()
        if not value:
            child: dict[str, Any] = {}
            stack[-1][1][key] = child
            stack.append((indent, child))
        elif value.startswith("["):
            stack[-1][1][key] = [item.strip().strip("'\"") for item in value.strip("[]").split(",")]
        else:
            stack[-1][1][key] = value.strip("'\"")
    return root


def _flat(meta: Mapping[str, Any]) -> dict[str, str]:
    """Values by key without regard to nesting, the first of each key; enough for the few used."""
    found: dict[str, str] = {}
    for key, value in meta.items():
        if isinstance(value, dict):
            for inner, text in _flat(value).items():
                found.setdefault(inner, text)
        elif isinstance(value, str):
            found.setdefault(key, value)
    return found


# ------------------------------------------------------------------------------------------------------ skew


def _skew(source: Path, meta: Mapping[str, Any], tensor_parallel: int) -> Skew | None:
    """The correction, if the record says that it is enabled.

    Raises:
        ConfigError: it is enabled, and a part of it is missing or no number.
    """
    record = meta.get("skew_fit")
    if not isinstance(record, dict) or record.get("enabled") != "true":
        return None
    fitted = record.get("per_tp", {}).get(str(tensor_parallel)) if isinstance(record.get("per_tp"), dict) else None
    axes = record.get("bucket_axes")
    if not isinstance(fitted, dict) or not isinstance(axes, dict):
        raise ConfigError(f"meta.yaml: skew_fit is enabled without bucket_axes and per_tp: {tensor_parallel}")
    try:
        pooled = float(fitted["alpha_default"])
        bins = [[float(x) for x in axes[f"{name}_bins"]] for name in _BINS]
        labels = [{label: i for i, label in enumerate(axes[f"{name}_labels"])} for name in _BINS]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"meta.yaml: skew_fit: {error} is missing or no number") from error
    for name, bounds, known in zip(_BINS, bins, labels, strict=True):
        if len(bounds) != len(known) + 1 or len(known) < 2 or sorted(set(bounds)) != bounds:
            raise ConfigError(f"meta.yaml: skew_fit: {name}_bins, must increase and be one more than {name}_labels, of which 2 or more")
    path = find(source, "skew_fit.csv", tensor_parallel)
    cells: dict[tuple[int, ...], float] = {}
    for line, (chunk, *at, text) in enumerate(_rows(path, ("pc", *_LABELS, "alpha")), start=2):
        try:
            place = (int(chunk), *(known[label] for known, label in zip(labels, at, strict=True)))
            cells[place] = float(text)
        except (KeyError, TypeError, ValueError) as error:
            cell = ", ".join(map(str, (chunk, *at)))
            raise ConfigError(f"{path.name}: line {line}: {cell}: {error!r}, must be a cell of meta.yaml and an alpha") from error
        if place[0] < 0 or not math.isfinite(cells[place]):
            raise ConfigError(f"{path.name}: line {line}: alpha {text}, must be finite, at a chunk >= 0")
    chunks = sorted({0, *(place[0] for place in cells)})
    edges = (np.array(chunks, dtype=np.float64), *(np.array(b[1:-1]) for b in bins))
    alpha = np.full([e.size + 1 for e in edges], np.nan)
    for (chunk_at, *rest), value in cells.items():
        alpha[(chunks.index(chunk_at), *rest)] = value
    return Skew(edges, alpha, pooled)


# --------------------------------------------------------------------------------------------------- profile


def read_profile(source: Path, tensor_parallel: int = 1) -> Profile:
    """Read the folder of one profile.

    Raises:
        ConfigError: a file or a column is missing, a row that is not numbers.
    """
    if not source.is_dir():
        raise ConfigError(f"profile {str(source)!r}: must be a folder with dense.csv, attention.csv, per_sequence.csv and meta.yaml")
    nested = parse_meta(find(source, "meta.yaml", tensor_parallel, parents=True).read_text(encoding="utf-8"))
    meta = _flat(nested)
    for key in ("gpu", "hardware", "model", "vllm_version", "variant"):
        if not isinstance(nested.get(key), str):
            raise ConfigError(f"profile {str(source)!r}: meta.yaml has no {key!r}")
        meta[key] = nested[key]
    attention: dict[Cell, float] = {}
    path = find(source, "attention.csv", tensor_parallel)
    for line, (*at, text) in enumerate(_rows(path, (*ATTENTION, "time_us")), start=2):
        cell, time = _time(path, line, at, text)
        attention[cell] = time
    dense = _by_layer(find(source, "dense.csv", tensor_parallel), "tokens")
    per_sequence = _by_layer(find(source, "per_sequence.csv", tensor_parallel), "sequences")
    return Profile(meta, dense, per_sequence, attention, _skew(source, nested, tensor_parallel))


def leave_one_out(profile: Profile) -> list[LeaveOneOut]:
    """Error of predicting every interior point from its two neighbours, which lie twice as far apart as in use."""
    found = []
    for name, tables in (("operators by tokens", profile.dense), ("lm_head and sampler", profile.per_sequence)):
        found.append(LeaveOneOut.of(name, [e for line in tables.values() for e in neighbour_errors(line)]))
    for axis, column in enumerate(ATTENTION):
        found.append(LeaveOneOut.of(f"attention by {column}", errors_along(profile.attention, axis)))
    return found
