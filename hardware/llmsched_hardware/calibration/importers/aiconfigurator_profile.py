"""The operator profile that NVIDIA's aiconfigurator measured on an A100 with vLLM's kernels: read, checked, in seconds.

A folder holds three parquet files (milliseconds of one call of one layer's operator) and a system file
with the GPU's memory: ``gemm_perf``, ``generation_attention_perf``, ``context_attention_perf``, ``a100_sxm.yaml``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import ConfigError, require
from llmsched_env.perf.base import FloatArray

HEAD_DIM = 128


@dataclass(frozen=True, slots=True)
class System:
    """What the profile's system file says of the GPU: bytes/s and seconds of a memory-bound kernel, bytes."""

    bandwidth: float
    efficiency: float
    launch: float
    memory: float
    reserve: float

    def moved(self, size: float | FloatArray) -> float | FloatArray:
        """Seconds of a kernel that moves ``size`` bytes."""
        return self.launch + size / (self.bandwidth * self.efficiency)


@dataclass(frozen=True, slots=True)
class AttentionRows:
    """Measured attention of one pair of head counts: seconds[i, j] at batch[i], length[j]; NaN where not measured."""

    batch: FloatArray
    length: FloatArray
    seconds: FloatArray


@dataclass(frozen=True, slots=True)
class Profile:
    """The raw profile.

    Attributes:
        gemm: (n, k) -> seconds on the axis ``tokens`` (m).
        decode, prefill: (heads, kv heads) -> seconds of one layer's call.
        engine, gpu: as the files name them.
    """

    tokens: FloatArray
    gemm: dict[tuple[int, int], FloatArray]
    decode: dict[tuple[int, int], AttentionRows]
    prefill: dict[tuple[int, int], AttentionRows]
    system: System
    engine: str
    gpu: str


def _columns(path: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Columns of a parquet file, and its one framework, version and device."""
    parquet = require("pyarrow.parquet", "calibrate")
    arrow = require("pyarrow", "calibrate")
    try:
        table = parquet.read_table(path)
    except OSError as error:
        raise ConfigError(f"profile {str(path)!r}: {error.strerror or error}") from error
    except arrow.ArrowInvalid as error:
        raise ConfigError(f"profile {str(path)!r}: not a parquet file ({error})") from error
    wanted = (*names, "latency", "framework", "version", "device")
    for name in wanted:
        if name not in table.column_names:
            raise ConfigError(f"profile {str(path)!r}: column {name!r} is missing (has {', '.join(table.column_names)})")
    columns: dict[str, Any] = {name: table[name].to_pylist() for name in wanted}
    for name in ("framework", "version", "device"):
        if len(set(columns[name])) != 1:
            raise ConfigError(f"profile {str(path)!r}: column {name!r} must hold one value, has {sorted(set(columns[name]))}")
    if not all(value > 0 for value in columns["latency"]):
        raise ConfigError(f"profile {str(path)!r}: column 'latency' must be > 0 milliseconds")
    return columns


def _attention(path: Path, length: tuple[str, str]) -> dict[tuple[int, int], AttentionRows]:
    """Rows of an attention file by head counts; a length is the sum of two columns."""
    file = _columns(path, ("batch_size", "num_heads", "num_key_value_heads", "head_dim", *length))
    cells: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    for batch, heads, kv_heads, dim, a, b, latency in zip(
        file["batch_size"],
        file["num_heads"],
        file["num_key_value_heads"],
        file["head_dim"],
        file[length[0]],
        file[length[1]],
        file["latency"],
        strict=True,
    ):
        if dim == HEAD_DIM:
            cells.setdefault((heads, kv_heads), {})[batch, a + b] = latency * 1e-3
    rows: dict[tuple[int, int], AttentionRows] = {}
    for key, values in cells.items():
        batches = sorted({b for b, _ in values})
        lengths = sorted({s for _, s in values})
        seconds = np.array([[values.get((b, s), np.nan) for s in lengths] for b in batches])
        rows[key] = AttentionRows(np.array(batches, dtype=np.float64), np.array(lengths, dtype=np.float64), seconds)
    return rows


def _system(path: Path) -> System:
    """The system file: the few ``name: number`` lines needed, so that no YAML reader is."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"profile {str(path)!r}: {error.strerror or error}") from error

    def number(name: str) -> float:
        found = re.search(rf"^\s+{name}:\s*([0-9.eE+-]+)", text, re.MULTILINE)
        if found is None:
            raise ConfigError(f"profile {str(path)!r}: field {name!r} is missing")
        return float(found.group(1))

    return System(
        number("mem_bw"),
        number("mem_bw_empirical_scaling_factor"),
        number("mem_empirical_constant_latency"),
        number("mem_capacity"),
        number("other_mem"),
    )


def read_profile(source: Path) -> Profile:
    """The profile in a folder of ``gemm_perf``, ``generation_attention_perf``, ``context_attention_perf`` and ``a100_sxm.yaml``.

    Raises:
        ConfigError: a file or column is missing, or is not what its name says.
        MissingExtraError: pyarrow is not installed.
    """
    if not source.is_dir():
        raise ConfigError(f"profile {str(source)!r}: must be a folder with gemm_perf.parquet and the attention files")
    file = _columns(source / "gemm_perf.parquet", ("m", "n", "k", "gemm_dtype"))
    cells: dict[tuple[int, int], dict[int, float]] = {}
    for m, n, k, dtype, latency in zip(file["m"], file["n"], file["k"], file["gemm_dtype"], file["latency"], strict=True):
        if dtype == "bfloat16":
            cells.setdefault((n, k), {})[m] = latency * 1e-3
    tokens = sorted({m for values in cells.values() for m in values})
    whole = {pair: np.array([values[m] for m in tokens]) for pair, values in cells.items() if len(values) == len(tokens)}
    if not whole:
        raise ConfigError(f"profile {str(source)!r}: gemm_perf.parquet has no (n, k) measured at every m")
    return Profile(
        tokens=np.array(tokens, dtype=np.float64),
        gemm=whole,
        decode=_attention(source / "generation_attention_perf.parquet", ("isl", "step")),
        prefill=_attention(source / "context_attention_perf.parquet", ("isl", "step")),
        system=_system(source / "a100_sxm.yaml"),
        engine=f"vLLM {file['version'][0]}" if file["framework"][0] == "VLLM" else f"{file['framework'][0]} {file['version'][0]}",
        gpu=file["device"][0],
    )
