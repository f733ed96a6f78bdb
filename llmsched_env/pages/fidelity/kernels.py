"""Calibrations from kernel profiles: measured attention on an A100, H100 and H200 against recorded runs, and what the tables leave out.

The recorded runs and the all-reduce times are two files of aiconfigurator's repository that the folder of calibration data may hold:
``aiconfigurator_recorded/silicon_sample.csv`` and ``aiconfigurator_h100_vllm/custom_allreduce_perf.parquet``. What needs
one that is not there is left out, and the page says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.markdown import table
from llmsched_env.pages.fidelity.a100 import FAMILIES, PROFILED_DECODES, Grid, Parts, our_parts, read_grid
from llmsched_env.pages.fidelity.evidence import Paths
from llmsched_env.pages.fidelity.recorded import Recorded, fits, read_recorded, time_per_output_token
from llmsched_env.perf import Batch, TableTime, load_calibration
from llmsched_env.perf.base import FloatArray
from llmsched_hardware.calibration.importers.aiconfigurator import build, decode_rule, linear_seconds, prefill_rule
from llmsched_hardware.calibration.importers.aiconfigurator_profile import ALL_REDUCE, AttentionRows, Profile, read_profile
from llmsched_hardware.calibration.importers.aiconfigurator_rules import (
    RuleError,
    chunk_seconds,
    corner_errors,
    gemm_errors,
    heads_errors,
    prompts_errors,
    rule_error,
)
from llmsched_hardware.calibration.importers.dense_model import MODELS, DenseModel
from llmsched_hardware.calibration.importers.vidur_profile import CsvProfile, read_csv_profile

MEASURED = "a100-llama2-7b"
RECONSTRUCTED = "a100-llama2-7b-vidur"
VLLM = "a100-llama2-7b-vllm"
HOPPER = {"H100": ("aiconfigurator_h100_vllm", "h100-llama31-8b-vllm"), "H200": ("aiconfigurator_h200_vllm", "h200-llama31-8b-vllm")}
RECORDS = Path("aiconfigurator_recorded") / "silicon_sample.csv"
QWEN = DenseModel(title="Qwen3-32B", layers=64, hidden=5120, intermediate=25600, heads=64, kv_heads=8, vocab=151936, qk_norm=True)
TENSORRT = {"backend": "trtllm", "system": "h100_sxm", "model_path": "meta-llama/Llama-3.1-8B-Instruct", "tp_size": "1", "precision": ""}
VLLM_QWEN = {"backend": "vllm", "system": "h100_sxm", "model_path": "Qwen/Qwen3-32B", "precision": ""}
CAPTURED = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""Batch sizes of vLLM's CUDA graphs (``VllmConfig._set_cudagraph_sizes``, vLLM 0.28.0); a batch of decodes is padded to the next."""


def tables(name: str) -> TableTime:
    """A shipped calibration that is of tables."""
    model = load_calibration(name)
    if not isinstance(model, TableTime):
        raise ConfigError(f"calibration {name!r}: must be tables")
    return model


def _percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def _size(values: FloatArray) -> str:
    return f"{100 * float(np.abs(values).mean()):.1f} %"


# ---------------------------------------------------------------------------------------------------- measured attention, A100


def _pairs(grid: Grid) -> list[list[str]]:
    """Iteration times of the three calibrations against each other, by family, in the range all three share."""
    parts: dict[str, Parts] = {name: our_parts(tables(name), grid.batches)[0] for name in (MEASURED, VLLM)}
    parts[RECONSTRUCTED] = grid.theirs
    rows = []
    for title, kind in FAMILIES.items():
        chosen = (np.array(grid.family) == kind) & (grid.decodes <= PROFILED_DECODES)
        for one, other in ((MEASURED, RECONSTRUCTED), (MEASURED, VLLM), (VLLM, RECONSTRUCTED)):
            a, b = parts[one], parts[other]
            whole = b.total[chosen]
            relative = a.total[chosen] / whole - 1
            shares = [
                float(((x - y)[chosen] / whole).mean()) for x, y in ((a.linear, b.linear), (a.decode, b.decode), (a.prefill, b.prefill))
            ]
            rows.append(
                [
                    f"{title} ({chosen.sum()})",
                    f"`{one}` / `{other}`",
                    _size(relative),
                    _percent(float(relative.mean())),
                    *map(_percent, shares),
                ]
            )
    return rows


def chunk_rule_errors(profile: CsvProfile, model: TableTime, layers: int) -> list[RuleError]:
    """The rule that derives a chunk over a context where such chunks were measured: here, with FlashInfer on the A100's silicon.

    The walk over a context is that of the smallest chunk measured over every context.
    """
    least = min(chunk for chunk in {c for c, _ in profile.prefill} if sum(c == chunk for c, _ in profile.prefill) > 2)
    whole = sorted(chunk for chunk, kv in profile.prefill if kv == 0)
    walks = sorted(kv for chunk, kv in profile.prefill if chunk == least)
    one = np.ones(1)
    full = AttentionRows(one, np.array(whole, dtype=np.float64), np.array([[profile.prefill[c, 0] for c in whole]]))
    head = AttentionRows(
        one, np.array([kv + least for kv in walks], dtype=np.float64), np.array([[profile.prefill[least, kv] for kv in walks]])
    )
    errors = []
    for low, high in ((least + 1, 256), (257, 1024), (1025, 4096)):
        cells = [(c, kv, t) for (c, kv), t in profile.prefill.items() if low <= c <= high and kv > 0]
        chunk, measured = (np.array([cell[k] for cell in cells], dtype=np.float64) for k in (0, 2))
        derived = np.array([float(chunk_seconds(full, head, float(kv), np.array([float(c)]))[0]) for c, kv, _ in cells])
        iteration = np.interp(chunk, model.tokens, model.linear) + layers * measured
        where = f"chunks of {low} to {high}"
        errors.append(rule_error("a chunk over a context from full prefills", where, derived / measured - 1))
        errors.append(rule_error("the same, share of the iteration", where, layers * (derived - measured) / iteration))
    return [error for error in errors if error.cells]


def _measured_attention(paths: Paths) -> list[str]:
    grid = read_grid(paths.calibration / "vidur_a100_llama2_7b_iterations.csv")
    source = tables(MEASURED).provenance
    profile = read_csv_profile(paths.calibration / "frontier_a800_llama2_7b")
    found = chunk_rule_errors(profile, tables(MEASURED), MODELS["llama-2-7b"].layers)
    rule_rows = [row[1:] for row in _rule_rows("", found)]
    header = ("batch", "calibrations", "MAPE", "bias", "of GEMMs and elementwise", "of decode attention", "of prefill attention")
    return [
        "### Measured attention, Llama-2-7B",
        "",
        f"`{MEASURED}`: {source.gpu}, attention and GEMMs measured by NetX-lab/Frontier's authors with FlashInfer. "
        f"`{RECONSTRUCTED}` has Vidur's attention, most of whose grid is interpolated; `{VLLM}` the kernels of vLLM 0.14 "
        f"(FlashAttention 2). Three measurements by different people with different software over the same {len(grid.batches):,} batch "
        f"compositions, up to {PROFILED_DECODES} decodes, layers alone (no lm_head, sampler, engine). Nothing tells which is right.",
        "",
        *table(header, _pairs(grid), "llr"),
        "",
        "Decode attention agrees; the reconstruction does not bias it. Where the calibrations differ, GEMMs of many tokens do.",
        "",
        f"Its own error, by leaving out one point: {source.fit_error}.",
        "",
        f"{source.notes}",
        "",
        "Prefill chunks over a context were measured here, so that the rule by which the calibrations of vLLM's kernels derive theirs can "
        "be checked on the A100's silicon, though with another kernel. FlashInfer's is slower over a context than its full prefills "
        "imply; if FlashAttention's is, too, those calibrations are too fast by about as much:",
        "",
        *table(("rule", "where", "cells", "MAPE", "bias", "P95"), rule_rows, "llr"),
        "",
    ]


# ---------------------------------------------------------------------------------------------------- H100, H200


def _rule_rows(gpu: str, found: Iterable[RuleError]) -> list[list[str]]:
    return [[gpu, e.rule, e.where, str(e.cells), f"{e.mape:.1%}", _percent(e.bias), f"{e.p95:.1%}"] for e in found if e.cells]


def _rules(profiles: dict[str, Profile]) -> list[str]:
    rows = []
    for gpu, profile in profiles.items():
        shape = MODELS["llama-3.1-8b"]
        full = prefill_rule(profile, shape).rows
        found = [*gemm_errors(profile), *heads_errors(profile.decode, "decode"), *heads_errors(profile.prefill, "prefill")]
        corner = corner_errors(decode_rule(profile, shape).rows)
        found.append(dataclasses.replace(corner, where="decode attention, Llama-3.1-8B"))
        found += prompts_errors(full, shape.layers, profile.tokens, linear_seconds(profile, shape))
        rows += _rule_rows(gpu, found)
    return [*table(("GPU", "rule", "where", "cells", "MAPE", "bias", "P95"), rows, "llll"), ""]


def _runs(model: TableTime, runs: Iterable[Recorded]) -> tuple[FloatArray, FloatArray]:
    """(without, with) the engine's overhead: relative errors of TPOT over the runs whose requests fit the memory."""
    bare = dataclasses.replace(model, constant=0.0, per_request=0.0)
    held = [run for run in runs if fits(model, run)]
    theirs = np.array([run.seconds for run in held])
    without, whole = (np.array([time_per_output_token(m, run) for run in held]) / theirs - 1 for m in (bare, model))
    return without, whole


def _recorded(paths: Paths, profile: Profile) -> list[str]:
    """Recorded TPOT against ours, where the two files are there."""
    path = paths.calibration / RECORDS
    if not path.exists():
        return [f"Recorded runs were not compared by this run: {RECORDS} is not in the folder.", ""]
    found = []
    runs = read_recorded(path, TENSORRT)
    found.append(("Llama-3.1-8B", "TensorRT-LLM 1.0.0rc3", 1, *_runs(tables(HOPPER["H100"][1]), runs)))
    missing = ""
    if profile.all_reduce:
        for gpus in (2, 4, 8):
            model = build(profile, QWEN.divided(gpus), "qwen3-32b")
            found.append(("Qwen3-32B", "vLLM 0.12.0", gpus, *_runs(model, read_recorded(path, VLLM_QWEN | {"tp_size": str(gpus)}))))
    else:
        missing = f" Qwen3-32B on several GPUs was left out by this run: {ALL_REDUCE} is not in the profile's folder."
    rows = [
        [
            model,
            engine,
            str(gpus),
            str(without.size),
            *(cell for e in (without, whole) for cell in (_size(e), _percent(float(e.mean())), f"{float(np.abs(e).max()):.1%}")),
        ]
        for model, engine, gpus, without, whole in found
    ]
    header = ("model", "engine", "H100s", "runs", "GPU alone: MAPE", "bias", "largest", "with CPU overhead: MAPE", "bias", "largest")
    return [
        "**Against recorded runs.** aiconfigurator's repository holds TPOT that its authors recorded on real servers "
        "(`silicon_sample.csv`): closed loops of 8 to 128 requests, prompts of 1,024 to 4,096, outputs of 128 to 1,024 tokens. The rows "
        "used name no quantization, and their times are those of 16 bits. Ours is the steady state of such a loop from the calibration "
        "alone: iterations with one prompt's chunk in a budget of 8,192 tokens (assumed, the records do not state it) and iterations of "
        "decodes. **Nothing is fitted to them.** Runs whose requests do not all fit the KV memory are left out. The kernels are those of "
        f"vLLM 0.24; the recorded engines are others, TensorRT-LLM another project's.{missing}",
        "",
        *table(header, rows, "llr"),
        "",
        "On more GPUs the recorded runs are slower than our sum of kernels. A likely cause: what an engine adds to an iteration does not "
        "shrink with a GPU's share of the model, and the overhead here was measured for one.",
        "",
    ]


def _hopper(paths: Paths, profiles: dict[str, Profile]) -> list[str]:
    names = " and ".join(f"`{name}`" for _, name in HOPPER.values())
    return [
        "### H100 and H200, Llama-3.1-8B",
        "",
        f"{names}: kernels of vLLM 0.24.0 measured by NVIDIA's aiconfigurator. Attention of these head counts is measured; of the GEMMs "
        "gate_up, "
        "down and lm_head are derived. The H200's is checked by leaving out what was measured, and by nothing else.",
        "",
        *_recorded(paths, profiles["H100"]),
        "Each rule applied where the answer was measured:",
        "",
        *_rules(profiles),
    ]


# ---------------------------------------------------------------------------------------------------- what the tables leave out


def padding(model: TableTime, context: int) -> FloatArray:
    """(512,) share by which padding n = 1 .. 512 decodes to the next CUDA graph lengthens their iteration."""
    n = np.arange(1, CAPTURED[-1] + 1)
    padded = np.array(CAPTURED)[np.searchsorted(CAPTURED, n)]
    linear = np.interp(n, model.tokens, model.linear), np.interp(padded, model.tokens, model.linear)
    whole = np.array([model.seconds(Batch(decodes=b, decode_kv=b * context, sampled=b, batch_size=b)) for b in n])
    return np.asarray((linear[1] - linear[0]) / whole, dtype=np.float64)


def unequal(model: TableTime, requests: int, context: int) -> float:
    """Share of an iteration by which reading decode attention at the mean differs from the mean of readings.

    Half of the requests have half of the mean context, half of them one and a half times as much.
    """

    def seconds(mean: float) -> float:
        return model.seconds(Batch(decodes=requests, decode_kv=requests * mean, sampled=requests, batch_size=requests))

    return 0.5 * (seconds(0.5 * context) + seconds(1.5 * context)) / seconds(context) - 1.0


def _prompts(profiles: dict[str, Profile]) -> list[list[str]]:
    """Extra time of several prompts of 16 to 2,048 tokens as a share of their iteration, by number of prompts."""
    rows = []
    for gpu, profile in profiles.items():
        for shape in (MODELS["llama-2-7b"], MODELS["llama-3.1-8b"]):
            full = prefill_rule(profile, shape).rows
            for low, high in ((2, 4), (8, 16), (32, 128)):
                keep = (full.batch == 1) | ((full.batch >= low) & (full.batch <= high))
                some = dataclasses.replace(full, batch=full.batch[keep], seconds=full.seconds[keep])
                plain = prompts_errors(some, shape.layers, profile.tokens, linear_seconds(profile, shape))[0]
                rows.append([gpu, shape.title, f"{low} to {high}", str(plain.cells), _percent(plain.bias), f"{plain.p95:.1%}"])
    return rows


def _left_out(profiles: dict[str, Profile]) -> list[str]:
    pad, curve = [], []
    for name in (VLLM, "a100-llama3-8b-vllm", *(name for _, name in HOPPER.values())):
        model = tables(name)
        for context in (256, 1024):
            share = padding(model, context)
            pad.append(
                [name, f"{context:,}", _percent(float(share.mean())), f"{float(np.quantile(share, 0.95)):.1%}", f"{float(share.max()):.1%}"]
            )
        curve.append([name, *(_percent(unequal(model, n, k)) for n in (8, 64, 256) for k in (512, 2048))])
    return [
        "### What one reading of the tables leaves out",
        "",
        "**Several prompts in one batch** are read as one with the same attention work, c = sqrt(sum c_i^2), and that is too little: "
        "short prompts run "
        "with the efficiency of short ones. What it leaves out, as a share of the iteration (measured calls of 2 and more equal prompts):",
        "",
        *table(("GPU", "model", "prompts", "cells", "bias", "P95"), _prompts(profiles), "lll"),
        "",
        "The calibrations of the H100 and the H200 therefore hold the extra time that was measured (`several_prompts`); predicted from "
        "half and twice as many "
        "prompts it leaves the error in the table of rules above. Every new import has it. The two of the A100 with vLLM's kernels do "
        "not: published "
        "results rest on them. Prompts of unequal length are read as equal ones with the same sums, prompts over a context as without; "
        "neither is measured.",
        "",
        "**Padding to CUDA graphs.** vLLM pads a batch of decodes to the next captured size (1, 2, 4, then steps of 8 to 256, of 16 to "
        "512); the "
        "tables are read at the batch as it is. What padding would add, over 1 to 512 decodes:",
        "",
        *table(("calibration", "context", "mean", "P95", "most"), pad, "lr"),
        "",
        "Not modelled: an engine that runs eagerly does not pad.",
        "",
        "**Decodes of unequal contexts** are read at their mean. That is exact where attention is linear in the context; half of the "
        "requests at "
        "half the context and half at one and a half times as much would by the tables take longer by:",
        "",
        *table(("calibration", *(f"{n} x {k:,}" for n in (8, 64, 256) for k in (512, 2048))), curve, "lr"),
        "",
        "No kernel profile at hand holds one call of unequal contexts on these GPUs, in which the longest request may also outlast the "
        "others; the one "
        "measurement of that is on the RTX 4090, above. Not modelled here.",
        "",
    ]


def section(paths: Paths) -> list[str]:
    """Markdown lines: three calibrations of an A100, two of newer GPUs, and three simplifications in numbers."""
    profiles = {gpu: read_profile(paths.calibration / folder) for gpu, (folder, _) in HOPPER.items()}
    everything = {"A100": read_profile(paths.calibration / "aiconfigurator_a100_vllm"), **profiles}
    return [
        "## Kernel profiles: measured attention, H100 and H200, and what the tables leave out",
        "",
        *_measured_attention(paths),
        *_hopper(paths, profiles),
        *_left_out(everything),
    ]
