"""Calibrations from a folder of raw CSV profiles in Vidur's form (``vidur_profile``): measured attention, GEMMs and the rest.

::

    linear[T]         layers x (sum of the operators of mlp.csv + write of T keys and values) + embedding + last norm
    decode[n, k]      layers x decode attention of n requests at k tokens, the new one included
    prefill[x, c]     layers x prefill attention of a chunk c over x tokens in the cache
    per_sequence[s]   lm_head and sampler, where the folder has them

Operators count per layer as in Vidur (``execution_time.py`` of microsoft/vidur @ 7d47513): each once, ``add`` too. The write of keys
and values of T tokens is the line through the measured writes of 1 to n decodes. (Frontier's file also holds FlashInfer's
write of one whole chunk, at a fraction of the memory's bandwidth; vLLM has a kernel of its own for that. Its cost is stated and
not used.) A chunk over more of the cache than was measured goes on along its last two points; a chunk that was measured
without context alone, with the seconds per token and token of the largest chunk that has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import FloatArray, Provenance
from llmsched_env.perf.tables import TableTime
from llmsched_hardware.calibration.importers.aiconfigurator_profile import AttentionRows
from llmsched_hardware.calibration.importers.aiconfigurator_rules import RuleError, continued, rule_error
from llmsched_hardware.calibration.importers.dense_model import BYTES, DenseModel
from llmsched_hardware.calibration.importers.vidur_profile import PER_LAYER, PER_SEQUENCE, CsvProfile, read_csv_profile

BLOCK_SIZE = 16
GPU_MEMORY_UTILIZATION = 0.9  # vLLM's default
RESERVE = 3.5 * 2**30  # bytes beside weights and KV, as aiconfigurator's system files of these GPUs have it (other_mem)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who measured a profile, and on what.

    Attributes:
        memory: bytes of the GPU; 0 where nobody says.
    """

    source: str
    licence: str
    gpu: str
    engine: str
    memory: float
    notes: str = ""
    numbers: str = "16 bits"


FRONTIER_A800 = Origin(
    source="NetX-lab/Frontier @ a4b22df, data/profiling/compute/a800/meta-llama/Llama-2-7b-hf/{attention,mlp}.csv",
    licence="MIT",
    gpu="NVIDIA A800-SXM4-80GB (the silicon of an A100 of 80 GB; its slower NVLink plays no part on one card)",
    engine="none: kernels alone, FlashInfer attention, block size 16; lm_head, sampler and CPU overhead were not measured",
    memory=80 * 2.0**30,
)
KNOWN: Mapping[str, Origin] = {"f6cc8fbf4e5d473d790d8ee7e60b9ad187576f7df41c04fd3382a8aa61c17fbe": FRONTIER_A800}
"""sha256 of attention.csv -> its origin, for files that do not say it themselves."""


# ---------------------------------------------------------------------------------------------------- tables


def _sorted(cells: Mapping[int, float]) -> tuple[FloatArray, FloatArray]:
    axis = sorted(cells)
    return np.array(axis, dtype=np.float64), np.array([cells[x] for x in axis], dtype=np.float64)


def write_seconds(profile: CsvProfile, tokens: FloatArray) -> FloatArray:
    """Seconds to write the keys and values of ``tokens`` in one layer: the line through the writes of decodes, never below the first."""
    if len(profile.write) < 2:
        return np.zeros(tokens.shape)
    axis, seconds = _sorted(profile.write)
    slope, start = np.polyfit(axis, seconds, 1)
    return np.asarray(np.maximum(start + max(float(slope), 0.0) * tokens, seconds.min()), dtype=np.float64)


def linear_table(profile: CsvProfile, model: DenseModel) -> tuple[FloatArray, FloatArray]:
    """(tokens, seconds) of everything that depends on the tokens of the batch alone."""
    tokens, _ = _sorted(profile.operators["add"])

    def of(name: str) -> FloatArray:
        axis, seconds = _sorted(profile.operators[name])
        if not np.array_equal(axis, tokens):
            raise ConfigError(f"mlp.csv: operator {name!r} was measured at other numbers of tokens than 'add'")
        return seconds

    layer = sum(of(name) for name in PER_LAYER) + write_seconds(profile, tokens)
    ends = of("input_layernorm") + (of("emb") if "emb" in profile.operators else 0.0)
    seconds = np.asarray(model.layers * layer + ends, dtype=np.float64)
    seconds[-1] = seconds.max()  # where repeats scatter, the line beyond the last point must not fall
    return tokens, seconds


def decode_table(profile: CsvProfile) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(requests, tokens of context with the new one, seconds) of one layer.

    A number of requests that was not measured at every context goes on along its last two points.

    Raises:
        ConfigError: fewer than two numbers of requests were measured over two contexts.
    """
    by_requests: dict[int, set[int]] = {}
    for n, k in profile.decode:
        by_requests.setdefault(n, set()).add(k)
    requests = sorted(n for n, contexts in by_requests.items() if len(contexts) > 1)
    if len(requests) < 2:
        raise ConfigError(f"attention.csv: {len(requests)} numbers of decodes were measured over two contexts, must be two")
    contexts = sorted({k for n, k in profile.decode if n in requests})
    axis = np.array(contexts, dtype=np.float64) + 1.0
    measured = np.array([[profile.decode.get((n, k), np.nan) for k in contexts] for n in requests], dtype=np.float64)
    seconds = np.maximum(continued(AttentionRows(np.array(requests, dtype=np.float64), axis, measured)), np.nanmin(measured))
    if axis[0] > 1.0:  # a shorter context takes as long as the shortest that was measured
        axis, seconds = np.concatenate([[1.0], axis]), np.concatenate([seconds[:, :1], seconds], axis=1)
    return np.array(requests, dtype=np.float64), axis, np.asarray(seconds, dtype=np.float64)


def prefill_table(profile: CsvProfile) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(tokens in the cache, chunk, seconds) of one layer, on a full grid."""
    by_chunk: dict[int, dict[int, float]] = {}
    for (chunk, kv), seconds in profile.prefill.items():
        by_chunk.setdefault(chunk, {})[kv] = seconds
    several = [chunk for chunk, cells in by_chunk.items() if len(cells) > 1]
    if not several:
        raise ConfigError("attention.csv: no chunk was measured over two contexts")
    contexts = np.array(sorted({kv for cells in by_chunk.values() for kv in cells}), dtype=np.float64)
    largest = max(several)
    x, y = _sorted(by_chunk[largest])
    per_work = max(float(np.polyfit(x, y, 1)[0]), 0.0) / largest  # seconds per token of the chunk and token of the cache
    rows = []
    chunks = sorted(by_chunk)
    for chunk in chunks:
        x, y = _sorted(by_chunk[chunk])
        slope = per_work * chunk if x.size < 2 else max(float((y[-1] - y[-2]) / (x[-1] - x[-2])), 0.0)
        rows.append(np.where(contexts <= x[-1], np.interp(contexts, x, y), y[-1] + slope * (contexts - x[-1])))
    table = np.array(rows).T
    if chunks[0] > 1:  # a shorter chunk takes as long as the shortest that was measured
        chunks, table = [1, *chunks], np.concatenate([table[:, :1], table], axis=1)
    return contexts, np.array(chunks, dtype=np.float64), np.asarray(table, dtype=np.float64)


# ---------------------------------------------------------------------------------------------------- errors


def _neighbours(lines: Iterable[Mapping[int, float]], rule: str) -> RuleError:
    """Every interior point of lines {coordinate: seconds} predicted from its two neighbours."""
    relative: list[float] = []
    for line in lines:
        x, y = _sorted(line)
        if x.size > 2:
            weight = (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
            relative += list((y[:-2] + weight * (y[2:] - y[:-2])) / y[1:-1] - 1)
    return rule_error(rule, "neighbours twice as far apart as in use", np.array(relative))


def _lines(cells: Mapping[tuple[int, int], float], axis: int) -> list[dict[int, float]]:
    """Measured cells as lines along one of their two coordinates."""
    lines: dict[int, dict[int, float]] = {}
    for cell, seconds in cells.items():
        lines.setdefault(cell[1 - axis], {})[cell[axis]] = seconds
    return list(lines.values())


def csv_errors(profile: CsvProfile) -> list[RuleError]:
    """Leave-one-out errors of linear interpolation in each axis of the measured tables."""
    gemms = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
    found = [
        _neighbours([profile.operators[name] for name in gemms], "GEMMs by tokens"),
        _neighbours(_lines(profile.decode, 0), "decode attention by requests"),
        _neighbours(_lines(profile.decode, 1), "decode attention by context"),
        _neighbours(_lines(profile.prefill, 1), "prefill attention by context"),
        _neighbours(_lines(profile.prefill, 0), "prefill attention by chunk"),
    ]
    return [error for error in found if error.cells]


# ---------------------------------------------------------------------------------------------------- the calibration


def origin_of(profile: CsvProfile, source: Path) -> Origin:
    """Who measured the profile: a known file, what its ``meta.json`` says, or nobody knows."""
    if profile.digest in KNOWN:
        return KNOWN[profile.digest]
    meta = profile.meta

    def text(name: str, default: str) -> str:
        return checks.text(f"meta.json: {name}", meta.get(name, default))

    return Origin(
        source=text("source", f"CSV profiles of the folder {source.name}"),
        licence=text("licence", "not stated"),
        gpu=text("device", "not stated"),
        engine=text("engine", "none: kernels alone"),
        memory=checks.number("meta.json: memory_bytes", meta.get("memory_bytes", 0), high=1e15),
        notes=text("notes", ""),
        numbers=text("dtype", "16 bits"),
    )


def check_model(profile: CsvProfile, model: DenseModel) -> None:
    """Refuse a model whose sizes are not those that were profiled.

    Raises:
        ConfigError: naming the size.
    """
    sizes = profile.sizes
    head_dim = profile.meta.get("head_dim", model.head_dim)
    if head_dim != model.head_dim:
        raise ConfigError(
            f"model {model.title!r}: its head_dim is {model.head_dim}, the profile's {head_dim}; must be the model that was profiled"
        )
    wanted = {"n_embd": model.hidden, "n_head": model.heads, "n_kv_head": model.kv_heads, "n_expanded_embd": model.intermediate}
    for name, value in wanted.items():
        if sizes[name] != value:
            raise ConfigError(
                f"model {model.title!r}: its {name} is {value}, the profile's {sizes[name]}; must be the model that was profiled"
            )


def import_folder(source: Path, model: DenseModel, name: str) -> TableTime:
    """The calibration of the model that was profiled.

    Raises:
        ConfigError: a missing file or column, too few points, or a model of other sizes.
    """
    profile = read_csv_profile(source)
    check_model(profile, model)
    tokens, linear = linear_table(profile, model)
    requests, contexts, decode = decode_table(profile)
    cached, chunks, prefill = prefill_table(profile)
    sequences, per_sequence = np.empty(0), np.empty(0)
    if profile.per_sequence:
        sequences, per_sequence = _sorted(profile.per_sequence[PER_SEQUENCE[0]])
        per_sequence = per_sequence + _sorted(profile.per_sequence[PER_SEQUENCE[1]])[1]
    origin = origin_of(profile, source)
    blocks = _kv_blocks(origin, model)
    most = max(chunk + kv for chunk, kv in profile.prefill)
    return TableTime(
        tokens=tokens,
        linear=linear,
        decode_batch=requests,
        decode_kv=contexts,
        decode=model.layers * decode,
        prefill_context=cached,
        prefill_chunk=chunks,
        prefill=model.layers * prefill,
        sequences=sequences,
        per_sequence=per_sequence,
        provenance=Provenance(
            name=name,
            source=origin.source,
            licence=origin.licence,
            gpu=origin.gpu,
            model=f"{model.title}, {origin.numbers}, one device",
            engine=origin.engine,
            valid_range=f"{tokens[0]:.0f}-{tokens[-1]:.0f} tokens a batch; {requests[0]:.0f}-{requests[-1]:.0f} decodes of mean context "
            f"{contexts[0]:.0f}-{contexts[-1]:.0f}; chunks of 1-{chunks[-1]:.0f} tokens over {cached[0]:.0f}-{cached[-1]:.0f} "
            f"(measured up to {most} tokens in all, linear beyond)",
            fit_error="measured tables, nothing fitted; leave-one-out MAPE (bias) of linear interpolation, neighbours twice as far apart: "
            + "; ".join(f"{e.rule} {e.mape:.1%} ({e.bias:+.1%})" for e in csv_errors(profile)),
            num_blocks=blocks,
            block_size=None if blocks is None else BLOCK_SIZE,
            notes=" ".join(_notes(profile, model, origin, blocks)),
        ),
    )


def _kv_blocks(origin: Origin, model: DenseModel) -> int | None:
    """KV blocks by arithmetic, as of other profiles; None where the GPU's memory is not known or too small."""
    free = origin.memory * GPU_MEMORY_UTILIZATION - model.parameters * BYTES - RESERVE
    blocks = int(free // (model.kv_bytes * BLOCK_SIZE))
    return blocks if blocks > 0 else None


def _notes(profile: CsvProfile, model: DenseModel, origin: Origin, blocks: int | None) -> list[str]:
    notes = [origin.notes] if origin.notes else []
    notes.append(f"Sizes: {model.shape}. Attention: {profile.attention}.")
    missing = [] if profile.per_sequence else ["lm_head", "sampler"]
    notes.append(f"Not included: {', '.join([*missing, 'CPU overhead of an engine'])}.")
    if profile.prefill_write:
        chunk = max(profile.prefill_write)
        measured = 1e6 * profile.prefill_write[chunk]
        notes.append(
            "Writes of keys and values: the line through those of decodes, "
            f"{1e6 * float(write_seconds(profile, np.array([chunk]))[0]):.0f} us a "
            f"layer at {chunk} tokens; the profile's own write of one chunk of {chunk} takes {measured:.0f} us and is not used."
        )
    elif not profile.write:
        notes.append("Writes of keys and values are part of the attention calls.")
    notes.append("Several chunks are read as one with the same attention work; decode and prefill attention of a mixed batch are added.")
    if blocks is not None:
        notes.append(
            f"num_blocks is computed, not read from an engine: {origin.memory / 2**30:.0f} GiB x {GPU_MEMORY_UTILIZATION} - "
            f"{model.parameters * BYTES / 1e9:.2f} GB of weights - {RESERVE / 2**30:.1f} GiB."
        )
    return notes
