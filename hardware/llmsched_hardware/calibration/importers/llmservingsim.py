"""Import a profile of LLMServingSim's profiler as a calibration: operators by tokens, attention of mixed batches.

The profile is a folder of casys-kaist/LLMServingSim, ``profiler/perf/GPU/MODEL/VARIANT/tp1`` and its
``meta.yaml`` (in the folder or the one above; CSV files may be gzipped). Each file gives microseconds
of one operator of one layer; an iteration is composed as the repository's ``profiler/models/llama.yaml``
lists a Llama's operators: embedding, then per layer norm, qkv, rotary embedding, attention, output
projection, norm, gate and up, activation, down, and at last norm, lm_head and sampler.
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

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf import IterationTimeModel, Provenance
from llmsched_env.perf.base import FloatArray
from llmsched_env.perf.mixed_attention import MixedAttentionTime

REPOSITORY = "casys-kaist/LLMServingSim @ 5daddb21a545658d5150b535712d0494584b5278"
_MICROSECOND = 1e-6
_ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
Cell = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Model:
    """A model's name in the profile, its layers, and how often each operator runs in a layer and once."""

    profile_name: str
    layers: int
    per_layer: Mapping[str, int]
    once: tuple[str, ...]
    per_sequence: tuple[str, ...]


MODELS = {
    "llama-3.1-8b": Model(
        profile_name="meta-llama/Llama-3.1-8B",
        layers=32,  # the model's config.json; the profile itself is of a one-layer copy
        per_layer={"layernorm": 2, "qkv_proj": 1, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1, "down_proj": 1},
        once=("embedding", "final_layernorm"),
        per_sequence=("lm_head", "sampler"),
    )
}

# num_gpu_blocks (the null block included) of vLLM where the same repository recorded a run with the profile's GPU and
# model: bench/examples/RTX4090/Llama-3.1-8B/vllm/meta.json.
NUM_GPU_BLOCKS = {("NVIDIA GeForce RTX 4090", "meta-llama/Llama-3.1-8B"): 2588}


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """Error of predicting each interior point of a profile from its two neighbours along one axis, relative to the measurement."""

    name: str
    points: int
    bias: float
    mean: float
    p95: float


@dataclass(frozen=True, slots=True)
class Profile:
    """The raw files, microseconds of one operator of one layer."""

    meta: Mapping[str, str]
    dense: Mapping[str, Mapping[int, float]]
    per_sequence: Mapping[str, Mapping[int, float]]
    attention: Mapping[Cell, float]


def _file(source: Path, name: str, parents: bool = False) -> Path:
    folders = [source, source / "tp1", *([source.parent] if parents else [])]
    for folder in folders:
        for path in (folder / name, folder / f"{name}.gz"):
            if path.is_file():
                return path
    raise ConfigError(f"profile {str(source)!r}: no {name} (nor {name}.gz) there, so it is no LLMServingSim profile")


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


def _meta(path: Path) -> dict[str, str]:
    """``key: value`` lines of the file without regard to nesting; enough for the few keys used."""
    meta: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, colon, value = line.strip().partition(":")
        if colon and value.strip():
            meta.setdefault(key, value.strip().strip("'\""))
    return meta


def read_profile(source: Path) -> Profile:
    """Read the folder of one profile.

    Raises:
        ConfigError: a file or a column is missing, a row that is not numbers.
    """
    if not source.is_dir():
        raise ConfigError(f"profile {str(source)!r}: must be a folder with dense.csv, attention.csv, per_sequence.csv and meta.yaml")
    meta = _meta(_file(source, "meta.yaml", parents=True))
    for key in ("gpu", "hardware", "model", "vllm_version", "variant"):
        if key not in meta:
            raise ConfigError(f"profile {str(source)!r}: meta.yaml has no {key!r}")
    attention: dict[Cell, float] = {}
    path = _file(source, "attention.csv")
    for line, (*at, text) in enumerate(_rows(path, (*_ATTENTION, "time_us")), start=2):
        (chunk, context, decodes, kv), time = _time(path, line, at, text)
        attention[chunk, context, decodes, kv] = time
    dense = _by_layer(_file(source, "dense.csv"), "tokens")
    return Profile(meta, dense, _by_layer(_file(source, "per_sequence.csv"), "sequences"), attention)


def _column(name: str, tables: Mapping[str, Mapping[int, float]], weights: Mapping[str, int]) -> tuple[FloatArray, FloatArray]:
    """(axis, seconds): the weighted sum of operators that were measured at the same points."""
    for layer in weights:
        if layer not in tables:
            raise ConfigError(f"{name}: operator {layer!r} is missing (found: {', '.join(sorted(tables))})")
    axis = sorted(tables[next(iter(weights))])
    for layer in weights:
        if sorted(tables[layer]) != axis:
            raise ConfigError(f"{name}: operator {layer!r} was measured at other points than {next(iter(weights))!r}")
    seconds = sum(times * np.array([tables[layer][x] for x in axis]) for layer, times in weights.items())
    return np.array(axis, dtype=np.float64), np.asarray(seconds) * _MICROSECOND


def _grid(attention: Mapping[Cell, float], axes: tuple[list[int], list[int], list[int], list[int]]) -> FloatArray:
    """Measured values on a full grid.

    Raises:
        ConfigError: a point of the grid was not measured.
    """
    table = np.empty([len(axis) for axis in axes])
    for i, chunk in enumerate(axes[0]):
        for j, context in enumerate(axes[1]):
            for k, decodes in enumerate(axes[2]):
                for m, kv in enumerate(axes[3]):
                    cell = (chunk, context, decodes, kv)
                    if cell not in attention:
                        raise ConfigError(f"attention.csv: no row for {dict(zip(_ATTENTION, cell, strict=True))}")
                    table[i, j, k, m] = attention[cell]
    return table


def import_profile(source: Path, model: str, name: str, *, config: Path | None = None, tensor_parallel: int = 1) -> IterationTimeModel:
    """The calibration of a profile.

    Args:
        source: folder with ``dense.csv``, ``per_sequence.csv``, ``attention.csv`` and ``meta.yaml``.
        model: a key of ``MODELS``.
        name: what the calibration is called.
        config, tensor_parallel: refused, the profile is of one model on one GPU.

    Raises:
        ConfigError: unknown model, or not the one that was profiled; a missing file, column, operator or grid point.
    """
    if config is not None:
        raise ConfigError("--config: not for --format llmservingsim, whose profile is of one model (--model)")
    if tensor_parallel != 1:
        raise ConfigError(f"--tensor-parallel: {tensor_parallel}, must be 1 for --format llmservingsim")
    if model not in MODELS:
        raise ConfigError(f"--model: {model!r}, must be one of {', '.join(MODELS)} for the format llmservingsim")
    profile = read_profile(source)
    graph = MODELS[model]
    if profile.meta["model"] != graph.profile_name:
        raise ConfigError(f"--model: {model!r} is {graph.profile_name}, the profile is of {profile.meta['model']}")
    tokens, linear = _column(
        "dense.csv", profile.dense, {op: times * graph.layers for op, times in graph.per_layer.items()} | dict.fromkeys(graph.once, 1)
    )
    sequences, per_sequence = _column("per_sequence.csv", profile.per_sequence, dict.fromkeys(graph.per_sequence, 1))

    cells = profile.attention
    chunks = sorted({c for c, _, _, _ in cells if c > 0})
    contexts = sorted({x for c, x, _, _ in cells if c > 0})
    batches = sorted({n for c, _, n, _ in cells if c == 0})
    kvs = sorted({k for c, _, n, k in cells if c == 0 and n > 0})
    together = sorted({n for c, _, n, _ in cells if c > 0 and n > 0})
    layers = graph.layers * _MICROSECOND
    blocks = NUM_GPU_BLOCKS.get((profile.meta["gpu"], profile.meta["model"]))
    errors = leave_one_out(profile)
    return MixedAttentionTime(
        tokens=tokens,
        linear=linear,
        sequences=sequences,
        per_sequence=per_sequence,
        prefill_chunk=np.array(chunks, dtype=np.float64),
        prefill_context=np.array(contexts, dtype=np.float64),
        decode_batch=np.array(batches, dtype=np.float64),
        decode_context=np.array(kvs, dtype=np.float64),
        prefill=_grid(cells, (chunks, contexts, [0], [0]))[:, :, 0, 0] * layers,
        decode=_grid(cells, ([0], [0], batches, kvs))[0, 0] * layers,
        mixed=_grid(cells, (chunks, contexts, together, kvs)) * layers,
        provenance=Provenance(
            name=name,
            source=f"{REPOSITORY}, profiler/perf/{profile.meta['hardware']}/{graph.profile_name}/{profile.meta['variant']}/tp1",
            licence="MIT",
            gpu=profile.meta["gpu"],
            model=f"{graph.profile_name}, {profile.meta['variant']}, 1 GPU",
            engine=f"vLLM {profile.meta['vllm_version']} kernels, profiled eagerly; no engine overhead: "
            "vLLM prepares the next batch while one runs (async scheduling)",
            valid_range=f"{tokens[0]:.0f}-{tokens[-1]:.0f} tokens, up to {sequences[-1]:.0f} requests of {kvs[0]}-{kvs[-1]} tokens, "
            f"up to {together[-1]} decodes beside a prefill, prefill contexts up to {contexts[-1]} tokens",
            fit_error="measured tables, nothing fitted; leave-one-out error of linear interpolation (mean, bias): "
            + "; ".join(f"{e.name} {e.mean:.1%}, {e.bias:+.1%}" for e in errors),
            num_blocks=None if blocks is None else blocks - 1,
            block_size=None if blocks is None else int(profile.meta.get("block_size", "16")),
            notes="" if blocks is None else f"num_blocks: vLLM reported {blocks} GPU blocks, one of which is its null block",
        ),
    )


def leave_one_out(profile: Profile) -> list[LeaveOneOut]:
    """Error of predicting every interior point from its two neighbours, which lie twice as far apart as in use."""
    found = []
    for name, tables in (("operators by tokens", profile.dense), ("lm_head and sampler", profile.per_sequence)):
        found.append(_neighbour_error(name, tables.values()))
    for axis, column in enumerate(_ATTENTION):
        lines: dict[tuple[int, ...], dict[int, float]] = {}
        for cell, time in profile.attention.items():
            lines.setdefault((*cell[:axis], *cell[axis + 1 :]), {})[cell[axis]] = time
        found.append(_neighbour_error(f"attention by {column}", lines.values()))
    return found


def _neighbour_error(name: str, lines: Iterable[Mapping[int, float]]) -> LeaveOneOut:
    """Relative errors over every interior point of every line {coordinate: time}."""
    errors: list[float] = []
    for line in lines:
        points = sorted(line)
        for low, x, high in zip(points, points[1:], points[2:], strict=False):
            weight = (x - low) / (high - low)
            errors.append((line[low] + weight * (line[high] - line[low])) / line[x] - 1.0)
    values = np.array(errors)
    size = np.abs(values)
    return LeaveOneOut(name, values.size, float(values.mean()), float(size.mean()), float(np.quantile(size, 0.95)))
