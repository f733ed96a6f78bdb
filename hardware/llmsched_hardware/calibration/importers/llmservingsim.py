"""Import a profile of LLMServingSim's profiler as a calibration: operators by tokens, attention of mixed batches.

Each file of the profile (``llmservingsim_profile.py``) gives microseconds of one operator of one layer; an iteration is composed
as the repository's ``profiler/models/*.yaml`` list a dense decoder's operators: embedding, then per layer norm, qkv, (norm of q and k),
rotary embedding, attention, output projection, norm, gate and up, activation, down, and at last norm, lm_head and sampler. Where a
model is shared by several GPUs their sums are added after the output projection and after down (``serving/core/trace_generator.py``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf import IterationTimeModel, Provenance
from llmsched_env.perf.base import FloatArray
from llmsched_env.perf.mixed_attention import MixedAttentionTime
from llmsched_hardware.calibration.importers.grid import Filled, LeaveOneOut, fill
from llmsched_hardware.calibration.importers.llmservingsim_profile import Profile, Skew, leave_one_out, read_profile

REPOSITORY = "casys-kaist/LLMServingSim @ 5daddb21a545658d5150b535712d0494584b5278"
_MICROSECOND = 1e-6
_LAYER = {"layernorm": 2, "qkv_proj": 1, "rotary_emb": 1, "o_proj": 1, "gate_up_proj": 1, "act_fn": 1, "down_proj": 1}


@dataclass(frozen=True, slots=True)
class Model:
    """A model's name in the profile, its layers, and how often each operator runs in a layer and once."""

    profile_name: str
    layers: int
    hidden: int
    per_layer: Mapping[str, int]
    once: tuple[str, ...] = ("embedding", "final_layernorm")
    per_sequence: tuple[str, ...] = ("lm_head", "sampler")


# Layers by the model's config.json; the profile itself is of a one-layer copy.
MODELS = {"llama-3.1-8b": Model("meta-llama/Llama-3.1-8B", layers=32, hidden=4096, per_layer=_LAYER)}

# Operators of a layer by the model_type of config.json: all dense decoders that the repository describes, and those that have the
# same operators (a bias of qkv is part of qkv_proj).
FAMILIES = {"llama": _LAYER, "mistral": _LAYER, "qwen2": _LAYER, "qwen3": _LAYER | {"qk_norm": 1}}

# num_gpu_blocks (the null block included) of vLLM where the same repository recorded a run with the profile's GPU and
# model: bench/examples/RTX4090/Llama-3.1-8B/vllm/meta.json.
NUM_GPU_BLOCKS = {("NVIDIA GeForce RTX 4090", "meta-llama/Llama-3.1-8B"): 2588}


def model_of(name: str, config: Path | None, profiled: str) -> Model:
    """The model to compose.

    Args:
        name: a key of ``MODELS``, or with ``config`` the profile's name for it, whole or its last part, or empty.
        config: the model's config.json of Hugging Face.
        profiled: the model of the profile.

    Raises:
        ConfigError: unknown name or architecture, a config that is none, or another model than the profile's.
    """
    if config is None:
        if name not in MODELS:
            raise ConfigError(f"--model: {name!r}, must be one of {', '.join(MODELS)} for the format llmservingsim, or give --config")
        if MODELS[name].profile_name != profiled:
            raise ConfigError(f"--model: {name!r} is {MODELS[name].profile_name}, the profile is of {profiled}")
        return MODELS[name]
    if name.lower() not in ("", profiled.lower(), profiled.rpartition("/")[2].lower()):
        raise ConfigError(f"--model: {name!r}, the profile is of {profiled}")
    try:
        record = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--config: {config.name}: not a config.json ({error})") from error
    if not isinstance(record, dict) or record.get("model_type") not in FAMILIES:
        kind = record.get("model_type") if isinstance(record, dict) else None
        raise ConfigError(f"--config: model_type {kind!r}, must be one of {', '.join(FAMILIES)} for the format llmservingsim")
    sizes = {}
    for key in ("num_hidden_layers", "hidden_size"):
        value = record.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 10**6:
            raise ConfigError(f"--config: {key} {value!r}, must be a whole number from 1")
        sizes[key] = value
    return Model(profiled, sizes["num_hidden_layers"], sizes["hidden_size"], FAMILIES[record["model_type"]])


@dataclass(frozen=True, slots=True)
class Link:
    """What joins the GPUs that share a model: how many they are, bandwidth in GB/s of 2**30 bytes, latency."""

    gpus: int
    gigabytes: float
    nanoseconds: float

    def all_reduce_seconds(self, size: FloatArray) -> FloatArray:
        """(n,) seconds to add up so many bytes of every GPU: a ring of 2 (p - 1) steps, each the latency and 1/p of the bytes."""
        step = self.nanoseconds * 1e-9 + size / self.gpus / (self.gigabytes * 2**30)
        return np.asarray(2 * (self.gpus - 1) * step)


def link_beside(source: Path, gpus: int) -> Link:
    """The link of the simulator's cluster file ``bench_config.json``, in the folder of the profile or the one above.

    The profile holds no collective operation; the repository's simulator computes it from this file's ``link_bw`` (GB/s) and
    ``link_latency`` (nanoseconds).

    Raises:
        ConfigError: no such file, or no link in it.
    """
    path = next((p for p in (source / "bench_config.json", source.parent / "bench_config.json") if p.is_file()), None)
    if path is None:
        raise ConfigError(
            f"--tensor-parallel: {gpus}, the profile holds no time of the all-reduce between GPUs, and there is no "
            "bench_config.json (the simulator's cluster file with link_bw and link_latency) beside it"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        link = Link(gpus, float(record["link_bw"]), float(record["link_latency"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"bench_config.json: no link_bw and link_latency ({error!r})") from error
    if not (0 < link.gigabytes < np.inf and 0 <= link.nanoseconds < np.inf):
        raise ConfigError(f"bench_config.json: link_bw {link.gigabytes}, link_latency {link.nanoseconds}, must be above 0 and finite")
    return link


def _column(name: str, tables: Mapping[str, Mapping[int, float]], weights: Mapping[str, int]) -> tuple[FloatArray, FloatArray]:
    """(axis, seconds): the weighted sum of operators, each read between its points where others have one.

    Raises:
        ConfigError: an operator is missing, or was measured over another range than the first.
    """
    for layer in weights:
        if layer not in tables:
            raise ConfigError(f"{name}: operator {layer!r} is missing (found: {', '.join(sorted(tables))})")
    first = next(iter(weights))
    axis = np.array(sorted(set().union(*(tables[layer] for layer in weights))), dtype=np.float64)
    if axis.size < 2:
        raise ConfigError(f"{name}: measured at {axis.size} point, must be 2 or more")
    seconds = np.zeros(axis.size)
    for layer, times in weights.items():
        points = sorted(tables[layer])
        if (points[0], points[-1]) != (axis[0], axis[-1]):
            raise ConfigError(
                f"{name}: operator {layer!r} was measured from {points[0]} to {points[-1]}, others (as {first!r}) from "
                f"{axis[0]:.0f} to {axis[-1]:.0f}"
            )
        seconds = seconds + times * np.interp(axis, points, [tables[layer][x] for x in points])
    return axis, seconds * _MICROSECOND


@dataclass(frozen=True, slots=True)
class _Attention:
    """The three attention tables of a profile, microseconds of one layer, on full grids."""

    chunks: list[int]
    contexts: list[int]
    batches: list[int]
    kvs: list[int]
    together: list[int]
    prefill: Filled
    decode: Filled
    mixed: Filled

    @classmethod
    def of(cls, cells: Mapping[tuple[int, ...], float]) -> _Attention:
        axes: dict[str, list[int]] = {
            "chunks": sorted({c for c, _, _, _ in cells if c > 0}),
            "contexts": sorted({x for c, x, _, _ in cells if c > 0}),
            "batches": sorted({n for c, _, n, _ in cells if c == 0 and n > 0}),
            "kvs": sorted({k for _, _, n, k in cells if n > 0}),
            "together": sorted({n for c, _, n, _ in cells if c > 0 and n > 0}),
        }
        for name, axis in axes.items():
            if len(axis) < 2:
                raise ConfigError(f"attention.csv: {name}: measured at {len(axis)} points, must be 2 or more")
        batches, together = axes["batches"], axes["together"]
        if together != batches[: len(together)]:
            batches = axes["batches"] = sorted({*batches, *together})
            axes["together"] = together = [n for n in batches if n <= together[-1]]
        name = "attention.csv"
        return cls(
            **axes,
            prefill=fill(name, cells, (axes["chunks"], axes["contexts"], [0], [0])),
            decode=fill(name, cells, ([0], [0], batches, axes["kvs"])),
            mixed=fill(name, cells, (axes["chunks"], axes["contexts"], together, axes["kvs"])),
        )

    @property
    def filled(self) -> str:
        """What was not measured, for the provenance; empty if nothing."""
        parts = (self.prefill, self.decode, self.mixed)
        between, beyond = sum(p.interpolated for p in parts), sum(p.extrapolated for p in parts)
        if between + beyond == 0:
            return ""
        total = sum(p.values.size for p in parts)
        told = f"{total - between - beyond:,} of {total:,} cells of the attention grid measured, {between:,} interpolated between them"
        return told + (f", {beyond:,} extrapolated beyond them" if beyond else "")


def _skew_fields(skew: Skew | None) -> dict[str, Any]:
    """The fields of ``MixedAttentionTime`` for the profile's correction.

    Cells in which nothing was fitted because so few decodes have no share that small take the next larger share; others the pooled
    alpha, as in the repository's simulator.
    """
    if skew is None:
        return {}
    alpha = skew.alpha.copy()
    for share in reversed(range(alpha.shape[2] - 1)):
        lacking = np.isnan(alpha[:, :, share])
        alpha[:, :, share][lacking] = alpha[:, :, share + 1][lacking]
    names = ("skew_chunk", "skew_decodes", "skew_rate", "skew_longest", "skew_context")
    filled = np.where(np.isnan(alpha), skew.pooled, alpha)
    return dict(zip(names, skew.edges, strict=True)) | {"skew": filled, "skew_reading": "moments"}


def _errors(errors: Iterable[LeaveOneOut]) -> str:
    return "; ".join(f"{e.name} {e.mean:.1%}, {e.bias:+.1%}" for e in errors)


def import_profile(source: Path, model: str, name: str, *, config: Path | None = None, tensor_parallel: int = 1) -> IterationTimeModel:
    """The calibration of a profile.

    Args:
        source: folder with ``dense.csv``, ``per_sequence.csv``, ``attention.csv`` and ``meta.yaml``, or the one above ``tp1``.
        model: a key of ``MODELS``, or with ``config`` the name of the profiled model, or empty.
        name: what the calibration is called.
        config: the model's config.json of Hugging Face, where ``MODELS`` does not hold it.
        tensor_parallel: GPUs that share the model: the folder ``tpN`` of the profile.

    Raises:
        ConfigError: unknown model, or not the one that was profiled; a missing file, column or operator; cells of the attention grid
            that do not follow from measured ones.
    """
    if config is None and model not in MODELS:
        model_of(model, None, "")  # refused before files are read
    if tensor_parallel < 1:
        raise ConfigError(f"--tensor-parallel: {tensor_parallel}, must be >= 1")
    profile = read_profile(source, tensor_parallel)
    graph = model_of(model, config, profile.meta["model"])
    link = None if tensor_parallel == 1 else link_beside(source, tensor_parallel)
    return compose(profile, graph, name, link)


def compose(profile: Profile, graph: Model, name: str, link: Link | None = None) -> MixedAttentionTime:
    """The calibration of a profile that has been read; ``link`` joins the GPUs that share the model.

    Raises:
        ConfigError: a missing operator; cells of the attention grid that do not follow from measured ones.
    """
    meta = profile.meta
    gpus = 1 if link is None else link.gpus
    tokens, linear = _column(
        "dense.csv", profile.dense, {op: times * graph.layers for op, times in graph.per_layer.items()} | dict.fromkeys(graph.once, 1)
    )
    if link is not None:
        linear = linear + 2 * graph.layers * link.all_reduce_seconds(tokens * graph.hidden * 2.0)  # bfloat16
    sequences, per_sequence = _column("per_sequence.csv", profile.per_sequence, dict.fromkeys(graph.per_sequence, 1))
    attention = _Attention.of(profile.attention)
    layers = graph.layers * _MICROSECOND
    blocks = NUM_GPU_BLOCKS.get((meta["gpu"], meta["model"])) if gpus == 1 else None
    notes = [] if blocks is None else [f"num_blocks: vLLM reported {blocks} GPU blocks, one of which is its null block"]
    if attention.filled:
        notes.append(attention.filled)
    if profile.skew is not None:
        notes.append(
            "decodes of unequal contexts: the profile's own correction (skew_fit.csv, enabled in its record), by longest, mean and variance"
        )
    if link is not None:
        notes.append(f"all-reduce: not measured, a ring over {link.gigabytes:g} GB/s and {link.nanoseconds:g} ns of the cluster file")
    return MixedAttentionTime(
        tokens=tokens,
        linear=linear,
        sequences=sequences,
        per_sequence=per_sequence,
        prefill_chunk=np.array(attention.chunks, dtype=np.float64),
        prefill_context=np.array(attention.contexts, dtype=np.float64),
        decode_batch=np.array(attention.batches, dtype=np.float64),
        decode_context=np.array(attention.kvs, dtype=np.float64),
        prefill=attention.prefill.values[:, :, 0, 0] * layers,
        decode=attention.decode.values[0, 0] * layers,
        mixed=attention.mixed.values * layers,
        **_skew_fields(profile.skew),
        provenance=Provenance(
            name=name,
            source=f"{REPOSITORY}, profiler/perf/{meta['hardware']}/{graph.profile_name}/{meta['variant']}/tp{gpus}",
            licence="MIT",
            gpu=meta["gpu"],
            model=f"{graph.profile_name}, {meta['variant']}, {gpus} GPU{'s' if gpus > 1 else ''}",
            engine=f"vLLM {meta['vllm_version']} kernels, profiled eagerly; no engine overhead: "
            "vLLM prepares the next batch while one runs (async scheduling)",
            valid_range=f"{tokens[0]:.0f}-{tokens[-1]:.0f} tokens, up to {sequences[-1]:.0f} requests of "
            f"{attention.kvs[0]}-{attention.kvs[-1]} tokens, up to {attention.together[-1]} decodes beside a prefill, prefill contexts "
            f"up to {attention.contexts[-1]} tokens",
            fit_error="measured tables, nothing fitted; leave-one-out error of linear interpolation (mean, bias): "
            + _errors(leave_one_out(profile)),
            num_blocks=None if blocks is None else blocks - 1,
            block_size=None if blocks is None else int(meta.get("block_size", "16")),
            notes="; ".join(notes),
        ),
    )


__all__ = ["FAMILIES", "MODELS", "Link", "Model", "Profile", "compose", "import_profile", "leave_one_out", "read_profile"]
