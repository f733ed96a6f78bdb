"""A100 kernels of vLLM 0.14 against Vidur's A100 tables, Llama-2-7B: where the two iteration times differ, and why.

Both describe the same model on an A100 of 80 GB, measured by different people with different software.
Nothing here passes or fails: the section reports the difference and traces it to its parts.
"""

from __future__ import annotations

import csv
import dataclasses
import gzip
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.markdown import table
from llmsched_env.pages.fidelity.evidence import Check, Paths, check_table
from llmsched_env.perf import Batch, TableTime, load_calibration
from llmsched_env.perf.base import FloatArray
from llmsched_hardware.calibration.importers.aiconfigurator import (
    NO_OVERHEAD,
    SYNCHRONOUS_STEP,
    decode_rows,
    layer_operators,
    linear_seconds,
)
from llmsched_hardware.calibration.importers.aiconfigurator_profile import AttentionRows, Profile, read_profile
from llmsched_hardware.calibration.importers.aiconfigurator_rules import (
    RuleError,
    chunk_seconds,
    corner_errors,
    decode_errors,
    gemm_errors,
    measured_reach,
    one_tile_walk,
    prompts_errors,
    rule_error,
)
from llmsched_hardware.calibration.importers.dense_model import MODELS, DenseModel

CALIBRATION = "a100-llama2-7b-vllm"
GROUPED = "a100-llama3-8b-vllm"
PROFILED_DECODES = 128  # Vidur holds decode attention at its value for 128 requests beyond
FAMILIES = {
    "decode only": "decode",
    "prefill only": "prefill",
    "one chunk with context": "prefill_chunk",
    "decodes and chunks": "mixed",
}
BATCHES = ((1, 8), (9, 32), (33, 64), (65, 128))


# Our operators against Vidur's names for them.
OPERATORS = {
    ("qkv",): ("attn_pre_proj",),
    ("o",): ("attn_post_proj",),
    ("gate_up",): ("mlp_up_proj",),
    ("down",): ("mlp_down_proj",),
    ("norms", "rope", "activation"): ("input_layernorm", "post_attention_layernorm", "attn_rope", "mlp_act", "add"),
}


@dataclass(frozen=True, slots=True)
class Parts:
    """(N,) seconds of N iterations by part, as Vidur divides them: no lm_head, no sampler, no engine."""

    linear: FloatArray
    decode: FloatArray
    prefill: FloatArray

    @property
    def total(self) -> FloatArray:
        return self.linear + self.decode + self.prefill


@dataclass(frozen=True, slots=True)
class Grid:
    """The composition grid: batches, their family, and Vidur's seconds.

    ``theirs_beyond`` are Vidur's iterations with decode attention in proportion to n above 128 decodes.
    """

    batches: list[Batch]
    family: list[str]
    decodes: FloatArray
    theirs: Parts
    theirs_beyond: FloatArray


def read_grid(path: Path) -> Grid:
    """Vidur's predictions over sampled batch compositions.

    Raises:
        ConfigError: the file is missing or lacks a column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"grid {str(path)!r}: {error.strerror or error}") from error

    def column(name: str) -> FloatArray:
        if not rows or name not in rows[0]:
            raise ConfigError(f"grid {str(path)!r}: column {name!r} is missing")
        return np.array([float(row[name]) for row in rows])

    names = ("n_decode", "decode_kv_total", "n_prefill", "prefill_tokens", "prefill_sq_sum", "prefill_ctx_total", "prefill_cross_sum")
    n, kv, prefills, tokens, squares, context, cross = (column(name) for name in names)
    batches = [
        Batch(
            decodes=float(n[i]),
            decode_kv=float(kv[i]),
            prefills=float(prefills[i]),
            prefill_tokens=float(tokens[i]),
            prefill_squares=float(squares[i]),
            prefill_context=float(context[i]),
            prefill_work=float(squares[i] / 2 + cross[i]),
            sampled=float(n[i] + prefills[i]),
            batch_size=float(n[i] + prefills[i]),
        )
        for i in range(len(rows))
    ]
    theirs = Parts(column("linear_s"), column("attn_decode_s"), column("attn_prefill_s"))
    return Grid(batches, [row["kind"] for row in rows], n, theirs, column("iteration_s_linear_extrapolated"))


def our_parts(model: TableTime, batches: Iterable[Batch]) -> tuple[Parts, FloatArray]:
    """Seconds by part, and with lm_head and sampler but without the engine's overhead, of each batch."""
    bare = dataclasses.replace(model, constant=0.0, per_request=0.0)
    layers = dataclasses.replace(bare, sequences=np.empty(0), per_sequence=np.empty(0))
    no_decode = dataclasses.replace(layers, decode=np.zeros_like(model.decode))
    linear_only = dataclasses.replace(no_decode, prefill=np.zeros_like(model.prefill))
    seconds = np.array([[m.seconds(batch) for m in (bare, layers, no_decode, linear_only)] for batch in batches])
    return Parts(seconds[:, 3], seconds[:, 1] - seconds[:, 2], seconds[:, 2] - seconds[:, 3]), seconds[:, 0]


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _mape(ours: FloatArray, theirs: FloatArray) -> str:
    return f"{100 * np.mean(np.abs(ours / theirs - 1)):.1f} %"


def _bias(ours: FloatArray, theirs: FloatArray) -> str:
    return _percent(float(np.mean(ours / theirs - 1)))


def _milliseconds(value: float) -> str:
    return f"{1e3 * value:.2f} ms"


def _headline(grid: Grid, ours: Parts) -> list[str]:
    """The figures, one a family, in Vidur's profiled range; ours and theirs are means over the family."""
    checks = []
    for title, kind in FAMILIES.items():
        chosen = (np.array(grid.family) == kind) & (grid.decodes <= PROFILED_DECODES)
        a, b = ours.total[chosen], grid.theirs.total[chosen]
        figure = f"iteration time, {title} ({chosen.sum()})"
        means = _milliseconds(float(a.mean())), _milliseconds(float(b.mean()))
        checks.append(Check("Vidur's A100 tables", figure, *means, f"MAPE {_mape(a, b)}, bias {_bias(a, b)}"))
    return [*check_table(checks), ""]


def _by_batch(grid: Grid, ours: Parts, with_head: FloatArray, with_engine: FloatArray) -> list[str]:
    """Error by family and number of decodes: layers alone, with lm_head and sampler, with the engine's overhead."""
    family = np.array(grid.family)

    def row(label: str, chosen: np.ndarray, theirs: FloatArray) -> list[str]:
        cells = [label, str(int(chosen.sum()))]
        for seconds in (ours.total, with_head, with_engine):
            cells += [_mape(seconds[chosen], theirs[chosen]), _bias(seconds[chosen], theirs[chosen])]
        return cells

    rows = []
    for title, kind in FAMILIES.items():
        if kind in ("decode", "mixed"):
            for low, high in BATCHES:
                chosen = (family == kind) & (grid.decodes >= low) & (grid.decodes <= high)
                rows.append(row(f"{title}, {low} to {high} decodes", chosen, grid.theirs.total))
            beyond = (family == kind) & (grid.decodes > PROFILED_DECODES)
            label = f"{title}, {PROFILED_DECODES + 1} to {grid.decodes[family == kind].max():.0f}"
            rows.append(row(f"{label}, Vidur as it is (clipped)", beyond, grid.theirs.total))
            rows.append(row(f"{label}, Vidur's decode attention in proportion to n", beyond, grid.theirs_beyond))
        else:
            rows.append(row(title, family == kind, grid.theirs.total))
    header = ("batch", "compositions", "layers MAPE", "bias", "+ lm_head, sampler MAPE", "bias", "+ engine MAPE", "bias")
    return [*table(header, rows, "lr"), ""]


def _by_part(grid: Grid, ours: Parts) -> list[str]:
    """The bias as a sum over parts, each relative to Vidur's whole iteration."""
    rows = []
    for title, kind in FAMILIES.items():
        chosen = (np.array(grid.family) == kind) & (grid.decodes <= PROFILED_DECODES)
        whole = grid.theirs.total[chosen]
        shares = [
            float(np.mean((a[chosen] - b[chosen]) / whole))
            for a, b in (
                (ours.linear, grid.theirs.linear),
                (ours.decode, grid.theirs.decode),
                (ours.prefill, grid.theirs.prefill),
            )
        ]
        rows.append([title, *(_percent(s) for s in shares), _percent(sum(shares))])
    return [*table(("bias of the iteration from", "GEMMs and elementwise", "decode attention", "prefill attention", "all"), rows, "lr"), ""]


MlpProfile = dict[int, dict[str, float]]


def read_vidur_operators(path: Path) -> MlpProfile:
    """Median seconds of one layer's operators on one GPU by tokens, from a Vidur ``mlp.csv.gz``.

    Raises:
        ConfigError: the file is missing or lacks a column.
    """
    operators = [*(o for names in OPERATORS.values() for o in names)]
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["num_tensor_parallel_workers"] == "1"]
        return {int(row["num_tokens"]): {o: 1e-3 * float(row[f"time_stats.{o}.median"]) for o in operators} for row in rows}
    except OSError as error:
        raise ConfigError(f"profile {str(path)!r}: {error.strerror or error}") from error
    except KeyError as error:
        raise ConfigError(f"profile {str(path)!r}: column {error} is missing") from error


def _linear_by_tokens(profile: Profile, shape: DenseModel, theirs: MlpProfile, counts: Iterable[int]) -> list[str]:
    """One layer's operators at equal T, microseconds, ours / Vidur's."""
    ours = layer_operators(profile, shape)
    rows = []
    for tokens in counts:
        cells, sums = [str(tokens)], [0.0, 0.0]
        for parts, operators in OPERATORS.items():
            a = sum(float(np.interp(tokens, profile.tokens, ours[part])) for part in parts)
            b = sum(theirs[tokens][operator] for operator in operators)
            sums = [sums[0] + a, sums[1] + b]
            cells.append(f"{1e6 * a:.0f} / {1e6 * b:.0f}")
        rows.append([*cells, _percent(sums[0] / sums[1] - 1)])
    return [*table(("T", *(", ".join(parts) for parts in OPERATORS), "layer"), rows, "lr"), ""]


def _attention_cells(model: TableTime, theirs: dict[str, FloatArray], layers: int) -> list[str]:
    """Attention of one layer at equal arguments, microseconds, ours / Vidur's: decode by (n, k), prefill by (chunk, context)."""
    micro = 1e6 / layers

    def cell(batch: Batch, part: str, b: float) -> str:
        parts, _ = our_parts(model, [batch])
        a = float(getattr(parts, part)[0])
        return f"{micro * a:.0f} / {micro * b:.0f} ({_percent(a / b - 1)})"

    contexts = (256, 1024, 2048, 4032)
    rows = []
    for n in (1, 8, 32, 64, 128):
        cells = [f"{n}"]
        for k in contexts:
            b = float(theirs["decode_attn_s"][n - 1, k // 64])
            cells.append(cell(Batch(decodes=n, decode_kv=n * k, sampled=n, batch_size=n), "decode", b))
        rows.append(cells)
    lines = [*table(("decodes", *(f"context {k}" for k in contexts)), rows, "lr"), ""]
    rows = []
    contexts = (0, 512, 1024, 2048)
    for chunk in (64, 256, 512, 1024, 2048):
        cells = [f"{chunk}"]
        for x in contexts:
            b = float(theirs["prefill_attn_s"][x // 64, chunk - 1])
            batch = Batch(
                prefills=1,
                prefill_tokens=chunk,
                prefill_squares=chunk**2,
                prefill_context=x,
                prefill_work=chunk * (chunk / 2 + x),
                sampled=1,
                batch_size=1,
            )
            cells.append(cell(batch, "prefill", b))
        rows.append(cells)
    return [*lines, *table(("chunk", *(f"over context {x}" for x in contexts)), rows, "lr"), ""]


# ---------------------------------------------------------------------------------------------------- derived rules


Attention = dict[tuple[int, int, int, int], float]


def read_mixed_attention(path: Path) -> Attention:
    """(chunk, context, decodes, decode context) -> microseconds of one layer, from LLMServingSim's RTX 4090 profile.

    Raises:
        ConfigError: the file is missing or lacks a column.
    """
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            return {
                (int(row[names[0]]), int(row[names[1]]), int(row[names[2]]), int(row[names[3]])): float(row["time_us"])
                for row in csv.DictReader(file)
            }
    except OSError as error:
        raise ConfigError(f"profile {str(path)!r}: {error.strerror or error}") from error
    except KeyError as error:
        raise ConfigError(f"profile {str(path)!r}: column {error} is missing") from error


def chunk_errors(attention: Attention) -> list[RuleError]:
    """The rule for a chunk over a context, and the difference of prefills alone, where both sides were measured.

    The profile has prompts without context up to 2048 tokens, and chunks of 16 tokens, one tile, over any context.
    """
    alone = {(c, x): t for (c, x, n, _), t in attention.items() if n == 0 and c > 0}
    prompts = sorted(c for c, x in alone if x == 0)
    walks = sorted(x for c, x in alone if c == 16)
    one = np.ones(1)
    full = AttentionRows(one, np.array(prompts, dtype=np.float64), np.array([[alone[c, 0] for c in prompts]]))
    head = AttentionRows(one, np.array([x + 16.0 for x in walks]), np.array([[alone[16, x] for x in walks]]))
    cells = [(c, x) for c, x in alone if c > 16 and x > 0 and c + x <= prompts[-1]]
    no_walk = dataclasses.replace(head, seconds=np.zeros_like(head.seconds))
    far = [(c, x) for c, x in alone if 32 <= c <= 256 and x >= prompts[-1]]
    end = np.array([c + x for c, x in far], dtype=np.float64)
    measured = np.array([alone[cell] for cell in far])
    walked = one_tile_walk(head, end) / measured - 1
    errors = [rule_error("one tile's walk alone", "chunks of 32 to 256 over contexts 2048 to 16384, RTX 4090", walked)]
    for where, low, high in (("chunks of 32 to 256", 32, 256), ("chunks of 512 to 2048", 512, 2048)):
        for rule, walk in (("difference of prefills, at least one tile's walk", head), ("difference of prefills alone", no_walk)):
            relative = [
                float(chunk_seconds(full, walk, float(x), np.array([float(c)]))[0]) / alone[c, x] - 1 for c, x in cells if low <= c <= high
            ]
            errors.append(rule_error(rule, f"{where}, RTX 4090", np.array(relative)))
    return errors


def mixed_ratios(attention: Attention) -> dict[int, FloatArray]:
    """By decodes: measured attention of a mixed call over the sum of its two parts measured alone; chunks >= 256."""
    ratios: dict[int, list[float]] = {}
    for (c, x, n, k), t in attention.items():
        if c >= 256 and x == 0 and n > 0 and k <= 4096:
            apart = attention.get((c, x, 0, 0)), attention.get((0, 0, n, k))
            if apart[0] is not None and apart[1] is not None:
                ratios.setdefault(n, []).append(t / (apart[0] + apart[1]))
    return {n: np.array(r) for n, r in sorted(ratios.items())}


# ---------------------------------------------------------------------------------------------------- the section


def read_vidur_overheads(path: Path) -> dict[int, float]:
    """Seconds of CPU work per iteration by batch size that Vidur's authors recorded for Llama-2-7B on one A100.

    Raises:
        ConfigError: the file is missing or lacks a column.
    """
    names = ("schedule_mean", "sampler_e2e_mean", "prepare_inputs_e2e_mean", "process_model_outputs_mean", "ray_comm_time_mean")
    found: dict[int, list[float]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if "Llama-2-7b" in row["model_name"] and row["tensor_parallel_degree"] == "1":
                    found.setdefault(int(row["batch_size"]), []).append(1e-3 * sum(float(row[name]) for name in names))
    except OSError as error:
        raise ConfigError(f"profile {str(path)!r}: {error.strerror or error}") from error
    except KeyError as error:
        raise ConfigError(f"profile {str(path)!r}: column {error} is missing") from error
    return {batch: float(np.mean(seconds)) for batch, seconds in found.items()}


def _decode_batch(n: int, context: int) -> Batch:
    return Batch(decodes=n, decode_kv=n * context, sampled=n, batch_size=n)


def _added(model: TableTime, grouped: TableTime, overheads: dict[int, float]) -> list[str]:
    """What lies outside Vidur's scope, by number of decodes, milliseconds."""
    rows = []
    for n in (8, 64, 128):
        cells = [str(n)]
        for calibration in (model, grouped):
            head = float(np.interp(n, calibration.sequences, calibration.per_sequence))
            cells.append(_milliseconds(head))
        cells.append(_milliseconds(model.constant + n * model.per_request))
        cells.append(_milliseconds(overheads[n]) if n in overheads else "not recorded")
        rows.append(cells)
    header = ("decodes", "lm_head + sampler, Llama-2-7B", "the same, Llama-3-8B", "engine, ours", "engine, Vidur's authors (early 2024)")
    return [*table(header, rows, "lr"), ""]


def _with_and_without(models: Iterable[TableTime]) -> list[str]:
    """Iterations of decodes at context 1024 with and without the engine's overhead."""
    rows = []
    for model in models:
        bare = dataclasses.replace(model, constant=0.0, per_request=0.0)
        for n in (1, 32, 128, 256):
            batch = _decode_batch(n, 1024)
            a, b = model.seconds(batch), bare.seconds(batch)
            rows.append([model.provenance.name, str(n), _milliseconds(b), _milliseconds(a), _percent(a / b - 1)])
    return [*table(("calibration", "decodes at context 1024", "GPU alone", "with the engine", "difference"), rows, "lr"), ""]


def _why(profile: Profile, model: TableTime, mlp: MlpProfile, tables: dict[str, FloatArray]) -> list[str]:
    """The differences in the units of the hardware."""
    shape = MODELS["llama-2-7b"]
    ours = layer_operators(profile, shape)
    n, k = shape.gemms["qkv"]

    def teraflops(tokens: int, seconds: float) -> float:
        return 2e-12 * tokens * n * k / seconds

    def weights_rate(tokens: int, seconds: float) -> float:
        return 2e-12 * n * k / seconds

    def gemm(tokens: int, rate: Callable[[int, float], float]) -> tuple[float, float]:
        return rate(tokens, float(np.interp(tokens, profile.tokens, ours["qkv"]))), rate(tokens, mlp[tokens]["attn_pre_proj"])

    fast, read = gemm(4096, teraflops), gemm(8, weights_rate)
    chunk = 2048
    work = 2e-12 * chunk**2 * shape.heads * shape.head_dim * shape.layers  # causal: half of 4 c^2 h d
    prompt = Batch(prefills=1, prefill_tokens=chunk, prefill_squares=chunk**2, prefill_work=chunk**2 / 2, sampled=1, batch_size=1)
    attention = work / float(our_parts(model, [prompt])[0].prefill[0]), work / float(tables["prefill_attn_s"][0, chunk - 1])

    def kv_rate(requests: int, context: int) -> tuple[float, float]:
        size = 1e-12 * requests * context * shape.kv_bytes
        a = float(our_parts(model, [_decode_batch(requests, context)])[0].decode[0])
        return size / a, size / float(tables["decode_attn_s"][requests - 1, context // 64])

    large, long = kv_rate(64, 2048), kv_rate(1, 2048)
    return [
        f"* **GEMMs of many tokens.** The fused qkv projection of 4096 tokens runs at {fast[0]:.0f} TFLOP/s here and at {fast[1]:.0f} "
        "in Vidur's profile (peak 312). This is most of the difference wherever there is prefill.",
        f"* **GEMMs of few tokens** read the weights: {read[0]:.2f} TB/s here, {read[1]:.2f} in Vidur's profile at 8 tokens, so "
        "decode iterations of small batches come out longer here.",
        f"* **Prefill attention.** A prompt of {chunk} tokens: {attention[0]:.0f} TFLOP/s here (FlashAttention 2), "
        f"{attention[1]:.0f} in Vidur's tables.",
        f"* **Decode attention** reads keys and values: 64 requests at context 2048 at {large[0]:.2f} TB/s here, {large[1]:.2f} in "
        f"Vidur's. One request at 2048: {long[0]:.2f} against {long[1]:.2f} TB/s, because FlashAttention 2 in vLLM divides a context "
        "among the GPU's processors only where heads are grouped, which Llama-2-7B's are not.",
        f"* **Above {PROFILED_DECODES} decodes** Vidur holds decode attention at its value for {PROFILED_DECODES}; the table gives "
        "both readings.",
        "* **The card** may differ too: Vidur keeps one profile for all A100 of 80 GB, those of Azure's NC96ads_A100_v4 (PCIe) and of DGX "
        "(its docs/profiling.md), and does not say which it measured; this profile is of the SXM4 card. The two cannot be told apart here.",
        "",
    ]


def _continued(profile: Profile, batches: Iterable[Batch]) -> int:
    """Batches whose decode attention lies, in part, on a row continued beyond its longest measured context."""
    rows = decode_rows(profile, MODELS["llama-2-7b"])
    reach = measured_reach(rows)
    count = 0
    for batch in batches:
        if batch.decodes > 0:
            row = min(int(np.searchsorted(rows.batch, batch.decodes)), rows.batch.size - 1)
            count += batch.decode_kv / batch.decodes > reach[row]
    return count


def _rules(profile: Profile, attention: Attention) -> list[str]:
    """Errors of the rules behind the calibrations where the answer was measured."""
    found = gemm_errors(profile) + decode_errors(profile) + chunk_errors(attention)
    for shape in (MODELS["llama-2-7b"], MODELS["llama-3-8b"]):
        corner = corner_errors(decode_rows(profile, shape))
        found.append(dataclasses.replace(corner, where=f"decode attention, {shape.title}"))
    shape = MODELS["llama-2-7b"]
    linear = linear_seconds(profile, shape)
    found += prompts_errors(profile.prefill[shape.heads, shape.kv_heads], shape.layers, profile.tokens, linear)
    rows = [[e.rule, e.where, str(e.cells), f"{e.mape:.1%}", _percent(e.bias), f"{e.p95:.1%}"] for e in found]
    return [*table(("rule", "where", "cells", "MAPE", "bias", "P95"), rows, "lr"), ""]


def _differences(
    grid: Grid, parts: Parts, profile: Profile, model: TableTime, mlp: Mapping[str, MlpProfile], tables: dict[str, FloatArray]
) -> list[str]:
    """Which parts of an iteration make the difference, and why."""
    counts = (8, 64, 128, 256, 512, 1024, 2048, 4096)
    return [
        "### Where they differ",
        "",
        *_by_part(grid, parts),
        *_why(profile, model, mlp["Llama-2-7b-hf"], tables),
        "One layer at equal T, microseconds, ours / Vidur's profile (`mlp.csv`, medians). Llama-2-7B:",
        "",
        *_linear_by_tokens(profile, MODELS["llama-2-7b"], mlp["Llama-2-7b-hf"], counts),
        "Llama-3-8B:",
        "",
        *_linear_by_tokens(profile, MODELS["llama-3-8b"], mlp["Meta-Llama-3-8B"], counts),
        "Attention of one layer of Llama-2-7B, microseconds, ours / Vidur's tables:",
        "",
        *_attention_cells(model, tables, MODELS["llama-2-7b"].layers),
    ]


def _derived(profile: Profile, attention: Attention) -> list[str]:
    """Errors of the rules behind the calibrations, and what no rule covers."""
    ratios = [[str(n), str(r.size), f"{r.mean():.2f}", f"{r.min():.2f}", f"{r.max():.2f}"] for n, r in mixed_ratios(attention).items()]
    return [
        "### Errors of what was derived",
        "",
        "Each rule applied where the answer was measured. Rules for chunks over a context are checked on an RTX 4090, where such chunks "
        "were measured (LLMServingSim's profile, vLLM 0.19).",
        "",
        *_rules(profile, attention),
        "**Not modelled: decodes beside a prefill chunk.** These calibrations add decode and prefill attention. With grouped heads vLLM's "
        "FlashAttention 2 takes another path as soon as one request of the batch has more than one query token, and reads each key once "
        "per query head. Measured attention of a mixed call over the sum of its parts, Llama-3.1-8B on the RTX 4090, chunks of 256 "
        f"tokens and more, contexts to 4096; attention of such iterations in `{GROUPED}` is likely too fast by about as much:",
        "",
        *table(("decodes", "cells", "mean", "least", "most"), ratios, "lr"),
        "",
    ]


def section(paths: Paths) -> list[str]:
    """Markdown lines: the comparison, its parts, and the errors of the derived cells."""
    folder = paths.calibration
    profile = read_profile(folder / "aiconfigurator_a100_vllm")
    grid = read_grid(folder / "vidur_a100_llama2_7b_iterations.csv")
    vidur = folder / "vidur_profiles" / "a100" / "meta-llama"
    mlp = {name: read_vidur_operators(vidur / name / "mlp.csv.gz") for name in ("Llama-2-7b-hf", "Meta-Llama-3-8B")}
    overheads = read_vidur_overheads(folder / "vidur_profiles" / "history" / "cpu_overheads_a100.csv")
    attention = read_mixed_attention(folder / "llmservingsim_rtx4090" / "attention.csv.gz")
    with np.load(folder / "vidur_a100_llama2_7b_tables.npz", allow_pickle=False) as file:
        tables = {key: np.asarray(file[key], dtype=np.float64) for key in ("decode_attn_s", "prefill_attn_s")}
    model, grouped = load_calibration(CALIBRATION), load_calibration(GROUPED)
    if not (isinstance(model, TableTime) and isinstance(grouped, TableTime)):
        raise ConfigError(f"calibrations {CALIBRATION!r} and {GROUPED!r}: must be tables")
    parts, with_head = our_parts(model, grid.batches)
    with_engine = np.array([model.seconds(batch) for batch in grid.batches])
    outside = sum(not model.in_range(batch) for batch in grid.batches)
    return [
        "## A100: kernels of vLLM 0.14 against Vidur's tables, Llama-2-7B",
        "",
        f"`{CALIBRATION}` ({profile.gpu}, {profile.engine}, measured by NVIDIA's aiconfigurator) against Vidur's predictions for the "
        f"same model on an A100 over {len(grid.batches):,} batch compositions. Both exclude lm_head, sampler and engine in this table; the "
        f"range is Vidur's, up to {PROFILED_DECODES} decodes. Nothing tells which is right: they are two measurements with different "
        f"software, so the difference is reported, not judged. {outside} compositions lie outside the tables, "
        f"{_continued(profile, grid.batches)} read decode attention where it was continued beyond the measured context.",
        "",
        *_headline(grid, parts),
        "### With and without what Vidur leaves out",
        "",
        *_by_batch(grid, parts, with_head, with_engine),
        f"The engine's overhead is {SYNCHRONOUS_STEP.source}. It applies where scheduling waits for the GPU, as it does when an agent "
        f"decides every iteration. {NO_OVERHEAD.source[0].upper()}{NO_OVERHEAD.source[1:]}; "
        "`import_profile(..., overhead=NO_OVERHEAD)` builds that calibration.",
        "",
        *_added(model, grouped, overheads),
        *_with_and_without((model, grouped)),
        *_differences(grid, parts, profile, model, mlp, tables),
        *_derived(profile, attention),
        f"KV capacity of both is computed, not read from an engine: {model.provenance.num_blocks:,} blocks of "
        f"{model.provenance.block_size} tokens (Llama-2-7B), {grouped.provenance.num_blocks:,} (Llama-3-8B).",
        "",
    ]
