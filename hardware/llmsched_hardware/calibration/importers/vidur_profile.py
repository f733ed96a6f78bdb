"""A folder of raw CSV profiles in Vidur's form: medians of measured kernels of one model on one GPU, in seconds.

Read are ``attention.csv``, ``mlp.csv`` and, where they are there, ``per_sequence.csv`` and ``meta.json`` (CSV files may be
gzipped). The first two are the files of microsoft/vidur @ 7d47513 and NetX-lab/Frontier @ a4b22df
(``data/profiling/compute/DEVICE/MODEL``), columns ``time_stats.OPERATOR.median`` in milliseconds of one call of one layer:

* attention.csv: ``attn_prefill`` by ``prefill_chunk_size`` and ``kv_cache_size`` (tokens already in the cache),
  ``attn_decode`` and ``attn_kv_cache_save`` by ``batch_size`` and ``kv_cache_size``, each for requests of equal length;
* mlp.csv: the other operators by ``num_tokens``;
* per_sequence.csv, which ``llmsched calibrate kernels`` writes beside them: ``lm_head`` and ``sampler`` by ``num_sequences``;
* meta.json, likewise: device, its memory, versions, date.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import math
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env import checks
from llmsched_env.errors import ConfigError

PER_LAYER = (
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
)
PER_SEQUENCE = ("lm_head", "sampler")
WRITE = "attn_kv_cache_save"
Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class CsvProfile:
    """The raw files, seconds of one call of one layer.

    Attributes:
        operators: name -> tokens -> seconds.
        prefill: (chunk, tokens in the cache) -> seconds of one request.
        decode: (requests, tokens in the cache of each) -> seconds.
        write: requests -> seconds to write one key and value of each; empty where the attention call holds it.
        prefill_write: chunk -> seconds to write its keys and values, as measured.
        per_sequence: name -> requests -> seconds; empty where there is no such file.
        sizes: columns that say which model it is -> value.
        meta: of ``meta.json``.
        attention: names of the attention kernels, as the file has them.
        digest: sha256 of attention.csv.
    """

    operators: Mapping[str, Mapping[int, float]]
    prefill: Mapping[Cell, float]
    decode: Mapping[Cell, float]
    write: Mapping[int, float]
    prefill_write: Mapping[int, float]
    per_sequence: Mapping[str, Mapping[int, float]]
    sizes: Mapping[str, int]
    attention: str
    digest: str
    meta: Mapping[str, Any] = field(default_factory=dict)


def has_csv_profile(source: Path) -> bool:
    """Whether the folder holds raw CSV profiles."""
    return _find(source, "attention.csv") is not None


def _find(source: Path, name: str) -> Path | None:
    return next((path for path in (source / name, source / f"{name}.gz") if path.is_file()), None)


def _bytes(source: Path, name: str) -> bytes:
    path = _find(source, name)
    if path is None:
        raise ConfigError(f"profile {str(source)!r}: no {name} (nor {name}.gz)")
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"profile {str(path)!r}: {error}") from error


class _Table:
    """The rows of a CSV file of one number of GPUs, with errors that name file, line and column."""

    def __init__(self, source: Path, name: str, data: bytes) -> None:
        self.name = f"profile {str(source)!r}: {name}"
        try:
            rows = list(csv.DictReader(io.StringIO(data.decode("utf-8")), strict=True))
        except (UnicodeDecodeError, csv.Error) as error:
            raise ConfigError(f"{self.name}: not a CSV file ({error})") from error
        if not rows:
            raise ConfigError(f"{self.name}: no rows")
        self.columns = tuple(rows[0])
        self.rows = [(line, row) for line, row in enumerate(rows, start=2)]
        if "num_tensor_parallel_workers" in self.columns:
            self.rows = [(line, row) for line, row in self.rows if row["num_tensor_parallel_workers"] == "1"]
            if not self.rows:
                raise ConfigError(f"{self.name}: no row with num_tensor_parallel_workers 1")

    def need(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self.columns:
                shown = ", ".join(c for c in self.columns if not c.startswith("time_stats.") or c.endswith(".median"))
                raise ConfigError(f"{self.name}: column {name!r} is missing (has {shown})")

    def whole(self, line: int, row: Mapping[str, str], name: str) -> int:
        text = row[name]
        if not (text and text.isascii() and text.isdigit()):
            raise ConfigError(f"{self.name}: line {line}: {name} {text!r}, must be a whole number >= 0")
        return int(text)

    def seconds(self, line: int, row: Mapping[str, str], operator: str) -> float:
        """The median of an operator, which must take time."""
        text = row[f"time_stats.{operator}.median"]
        try:
            value = float(text)
        except (TypeError, ValueError):
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{self.name}: line {line}: time_stats.{operator}.median {text!r}, must be milliseconds >= 0")
        return value * 1e-3

    def one(self, name: str) -> str:
        """The one value of a column that says what was measured."""
        found = sorted({row[name] for _, row in self.rows})
        if len(found) != 1:
            raise ConfigError(f"{self.name}: column {name!r} must hold one value, has {', '.join(found)}")
        return found[0]


def _medians(cells: Mapping[Any, list[float]]) -> dict[Any, float]:
    """A point that was measured more than once: the median of its medians."""
    return {key: float(np.median(values)) for key, values in cells.items()}


def _operators(table: _Table, axis: str, names: Iterable[str]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, list[float]]] = {name: {} for name in names}
    for line, row in table.rows:
        at = table.whole(line, row, axis)
        for name, cells in found.items():
            cells.setdefault(at, []).append(table.seconds(line, row, name))
    return {name: _medians(cells) for name, cells in found.items()}


def read_csv_profile(source: Path) -> CsvProfile:
    """Read a folder of CSV profiles.

    Raises:
        ConfigError: a file or a column is missing, or a value is not what its column says.
    """
    data = _bytes(source, "attention.csv")
    attention = _Table(source, "attention.csv", data)
    axes = ("batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill")
    attention.need((*axes, "n_embd", "n_q_head", "n_kv_head", "time_stats.attn_prefill.median", "time_stats.attn_decode.median"))
    prefill, decode, write, prefill_write = _attention(attention)
    if len({c for c, _ in prefill}) < 2 or not decode:
        raise ConfigError(f"{attention.name}: must hold decodes, and prefill of two chunks")

    mlp = _Table(source, "mlp.csv", _bytes(source, "mlp.csv"))
    once = tuple(name for name in ("emb",) if f"time_stats.{name}.median" in mlp.columns)
    mlp.need(("num_tokens", "n_head", "n_kv_head", "n_embd", "n_expanded_embd", *(f"time_stats.{name}.median" for name in PER_LAYER)))
    sizes = {name: int(mlp.one(name)) for name in ("n_embd", "n_head", "n_kv_head", "n_expanded_embd")}
    for ours, theirs in (("n_embd", "n_embd"), ("n_head", "n_q_head"), ("n_kv_head", "n_kv_head")):
        if attention.one(theirs) != str(sizes[ours]):
            raise ConfigError(f"{attention.name}: {theirs} {attention.one(theirs)}, but mlp.csv has {ours} {sizes[ours]}: not one model")
    operators = _operators(mlp, "num_tokens", (*PER_LAYER, *once))
    if len(operators["add"]) < 2:
        raise ConfigError(f"{mlp.name}: must hold two numbers of tokens")

    per_sequence: dict[str, dict[int, float]] = {}
    if _find(source, "per_sequence.csv") is not None:
        table = _Table(source, "per_sequence.csv", _bytes(source, "per_sequence.csv"))
        table.need(("num_sequences", *(f"time_stats.{name}.median" for name in PER_SEQUENCE)))
        per_sequence = _operators(table, "num_sequences", PER_SEQUENCE)
    meta = source / "meta.json"
    return CsvProfile(
        operators=operators,
        prefill=prefill,
        decode=decode,
        write=write,
        prefill_write=prefill_write,
        per_sequence=per_sequence,
        sizes=sizes,
        attention=attention.one("attention_backend") if "attention_backend" in attention.columns else "not stated",
        digest=hashlib.sha256(data).hexdigest(),
        meta=checks.json_object("meta.json", checks.file_bytes("meta.json", meta)) if meta.is_file() else {},
    )


def _attention(table: _Table) -> tuple[dict[Cell, float], dict[Cell, float], dict[int, float], dict[int, float]]:
    """(prefill, decode, writes of decodes, writes of chunks)."""
    prefill: dict[Cell, list[float]] = {}
    decode: dict[Cell, list[float]] = {}
    write: dict[int, list[float]] = {}
    prefill_write: dict[int, list[float]] = {}
    has_write = f"time_stats.{WRITE}.median" in table.columns
    for line, row in table.rows:
        requests, chunk, kv = (table.whole(line, row, name) for name in ("batch_size", "prefill_chunk_size", "kv_cache_size"))
        is_prefill = row["is_prefill"].lower() == "true"
        if is_prefill and requests == 1:
            prefill.setdefault((chunk, kv), []).append(table.seconds(line, row, "attn_prefill"))
        elif not is_prefill:
            decode.setdefault((requests, kv), []).append(table.seconds(line, row, "attn_decode"))
        if has_write and (not is_prefill or requests == 1):
            seconds = table.seconds(line, row, WRITE)
            (prefill_write if is_prefill else write).setdefault(chunk if is_prefill else requests, []).append(seconds)
    return _medians(prefill), _medians(decode), _medians(write), _medians(prefill_write)
