"""The operator profile that NVIDIA's aiconfigurator measured on one GPU with vLLM's kernels: read, checked, in seconds.

A folder holds three parquet files (milliseconds of one call of one layer's operator): ``gemm_perf``,
``generation_attention_perf``, ``context_attention_perf``; a system file with the GPU's memory, such as ``h100_sxm.yaml``;
and, for models divided among GPUs, ``custom_allreduce_perf``. In aiconfigurator's repository they lie in
``aic-core/src/aiconfigurator_core/systems``: ``data/SYSTEM/{gemm,attention,comm}/vllm/VERSION`` and ``SYSTEM.yaml``.
Read are the rows of bfloat16 without a sliding window; the H100's files hold others beside them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import ConfigError, require
from llmsched_env.perf.base import FloatArray

HEAD_DIM = 128
ALL_REDUCE = "custom_allreduce_perf.parquet"
CAPTURED = 512  # tokens of the largest CUDA graph that vLLM captures by default; more run eagerly


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
class AllReduce:
    """Measured all-reduce of one number of GPUs: seconds by elements of bfloat16, inside a CUDA graph and outside."""

    elements: FloatArray
    graph: FloatArray
    eager: FloatArray

    def seconds(self, tokens: FloatArray, hidden: int) -> FloatArray:
        """(T,) seconds for activations of ``tokens`` x ``hidden``: in a graph up to ``CAPTURED`` tokens, eager beyond."""
        sizes = np.asarray(tokens) * hidden
        graph, eager = np.interp(sizes, self.elements, self.graph), np.interp(sizes, self.elements, self.eager)
        return np.asarray(np.where(np.asarray(tokens) <= CAPTURED, graph, eager), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Profile:
    """The raw profile.

    Attributes:
        gemm: (n, k) -> seconds on the axis ``tokens`` (m).
        decode, prefill: (heads, kv heads) -> seconds of one layer's call.
        engine, gpu: as the files name them; ``system`` likewise, by the name of its file.
        all_reduce: GPUs -> seconds; empty where the folder has no such file.
        folder: where it was read, for messages.
    """

    tokens: FloatArray
    gemm: dict[tuple[int, int], FloatArray]
    decode: dict[tuple[int, int], AttentionRows]
    prefill: dict[tuple[int, int], AttentionRows]
    system: System
    engine: str
    gpu: str
    all_reduce: Mapping[int, AllReduce] = field(default_factory=dict)
    system_name: str = ""
    version: str = ""
    folder: str = ""


def _columns(path: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Columns of a parquet file (None for an optional one that it lacks), and its one framework, version and device."""
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
    rows = len(columns["latency"])
    return columns | {name: table[name].to_pylist() if name in table.column_names else [None] * rows for name in optional}


def _attention(path: Path, length: tuple[str, str], head_dim: int) -> dict[tuple[int, int], AttentionRows]:
    """Rows of an attention file by head counts; a length is the sum of two columns."""
    names = ("batch_size", "num_heads", "num_key_value_heads", "head_dim", *length)
    file = _columns(path, names, ("kv_cache_dtype", "window_size"))
    cells: dict[tuple[int, int], dict[tuple[int, int], float]] = {}
    chosen = zip(*(file[name] for name in (*names, "latency", "kv_cache_dtype", "window_size")), strict=True)
    for batch, heads, kv_heads, dim, a, b, latency, dtype, window in chosen:
        if dim == head_dim and dtype in (None, "bfloat16") and not window:
            cells.setdefault((heads, kv_heads), {})[batch, a + b] = latency * 1e-3
    if not cells:
        found = ", ".join(map(str, sorted(set(file["head_dim"]))))
        raise ConfigError(f"profile {str(path)!r}: no attention of bfloat16 with head_dim {head_dim} (has head_dim {found})")
    return {key: _rows(values) for key, values in cells.items()}


def _rows(values: Mapping[tuple[int, int], float]) -> AttentionRows:
    batches = sorted({b for b, _ in values})
    lengths = sorted({s for _, s in values})
    seconds = np.array([[values.get((b, s), np.nan) for s in lengths] for b in batches])
    return AttentionRows(np.array(batches, dtype=np.float64), np.array(lengths, dtype=np.float64), seconds)


def _all_reduce(path: Path) -> dict[int, AllReduce]:
    """GPUs -> all-reduce times; empty where there is no such file."""
    if not path.exists():
        return {}
    file = _columns(path, ("allreduce_dtype", "num_gpus", "message_size", "kernel_source"))
    cells: dict[int, dict[str, dict[int, float]]] = {}
    for dtype, gpus, size, kernel, latency in zip(
        *(file[name] for name in ("allreduce_dtype", "num_gpus", "message_size", "kernel_source", "latency")), strict=True
    ):
        if dtype == "bfloat16":
            mode = "graph" if kernel.endswith("graph") else "eager"
            cells.setdefault(gpus, {}).setdefault(mode, {})[size] = latency * 1e-3
    found = {}
    for gpus, modes in cells.items():
        graph, eager = (modes.get(mode) or next(iter(modes.values())) for mode in ("graph", "eager"))
        sizes = sorted(set(graph) & set(eager))
        found[gpus] = AllReduce(np.array(sizes, dtype=np.float64), np.array([graph[x] for x in sizes]), np.array([eager[x] for x in sizes]))
    return found


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


def _system_file(source: Path) -> Path:
    found = sorted(path for path in source.glob("*.yaml") if path.name not in ("collection_meta.yaml", "reuse.yaml"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise ConfigError(f"profile {str(source)!r}: {len(found)} system files ({names}), must be one, such as a100_sxm.yaml")
    return found[0]


def _gemms(file: Mapping[str, Iterable[Any]]) -> tuple[list[int], dict[tuple[int, int], FloatArray]]:
    """(tokens m, (n, k) -> seconds) of the bfloat16 GEMMs that were measured at every m."""
    cells: dict[tuple[int, int], dict[int, float]] = {}
    for m, n, k, dtype, latency in zip(*(file[name] for name in ("m", "n", "k", "gemm_dtype", "latency")), strict=True):
        if dtype == "bfloat16":
            cells.setdefault((n, k), {})[m] = latency * 1e-3
    tokens = sorted({m for values in cells.values() for m in values})
    return tokens, {pair: np.array([values[m] for m in tokens]) for pair, values in cells.items() if len(values) == len(tokens)}


def read_profile(source: Path, head_dim: int = HEAD_DIM) -> Profile:
    """The profile in a folder, with the attention of one head size.

    Raises:
        ConfigError: a file or column is missing, or is not what its name says, or no head of this size was measured.
        MissingExtraError: pyarrow is not installed.
    """
    if not source.is_dir():
        raise ConfigError(f"profile {str(source)!r}: must be a folder with gemm_perf.parquet and the attention files")
    file = _columns(source / "gemm_perf.parquet", ("m", "n", "k", "gemm_dtype"))
    tokens, whole = _gemms(file)
    if not whole:
        raise ConfigError(f"profile {str(source)!r}: gemm_perf.parquet has no (n, k) measured at every m")
    system = _system_file(source)
    version = str(file["version"][0])
    return Profile(
        tokens=np.array(tokens, dtype=np.float64),
        gemm=whole,
        decode=_attention(source / "generation_attention_perf.parquet", ("isl", "step"), head_dim),
        prefill=_attention(source / "context_attention_perf.parquet", ("isl", "step"), head_dim),
        system=_system(system),
        engine=f"vLLM {version}" if file["framework"][0] == "VLLM" else f"{file['framework'][0]} {version}",
        gpu=file["device"][0],
        all_reduce=_all_reduce(source / ALL_REDUCE),
        system_name=system.stem,
        version=version,
        folder=str(source),
    )
