"""Calibrations from Vidur: the tables of its execution-time predictor, evaluated on its own grid; or its raw CSV profiles.

SOURCE is a folder with ``attention.csv`` and ``mlp.csv`` (``vidur_csv``), of any dense decoder; or an NPZ file with the
arrays of ``ARRAYS`` (or a folder with one ``*_tables.npz``): the random forests of
``sklearn_execution_time_predictor.py`` and ``random_forrest_execution_time_predictor.py``
(microsoft/vidur @ 7d47513) evaluated at every point they round to. Where ``*_iterations.csv`` lies
beside it, the fit error is measured on those iteration times; otherwise it says that it was not.
"""

from __future__ import annotations

import csv
import dataclasses
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch, IterationTimeModel, Provenance, TableTime
from llmsched_env.perf.base import FloatArray
from llmsched_hardware.calibration.importers.dense_model import chosen_model
from llmsched_hardware.calibration.importers.vidur_csv import import_folder
from llmsched_hardware.calibration.importers.vidur_profile import has_csv_profile

# Array in the file -> field of TableTime.
ARRAYS = {
    "linear_tokens": "tokens",
    "linear_s": "linear",
    "decode_batch": "decode_batch",
    "decode_kv": "decode_kv",
    "decode_attn_s": "decode",
    "prefill_kv": "prefill_context",
    "prefill_chunk": "prefill_chunk",
    "prefill_attn_s": "prefill",
}

_LLAMA2_7B = Provenance(
    source="microsoft/vidur @ 7d47513363ec447a741ac5e47241580b47724fbf, random-forest predictor over its A100 profile "
    "(data/profiling/compute/a100/meta-llama/Llama-2-7b-hf), evaluated on its prediction grid",
    licence="MIT (Vidur)",
    gpu="A100-80GB, TP1 PP1",
    model="meta-llama/Llama-2-7b-hf, fp16, 32 layers",
    engine="none: kernels only; embedding, lm_head, sampler and CPU overhead are not included, as in Vidur's defaults",
    num_blocks=7424,
    block_size=16,
    notes="num_blocks is Vidur's for 80 GB with max_tokens 4096 (base_replica_scheduler.py:40, memory_planner.py:31); the same "
    "rule gives 2,816 on an A100-40GB. The attention profile behind the forests is a reconstruction: 1,462 points of Vidur's "
    "attention.csv, the rest of its grid interpolated; on 149 rows of the original that were not used, decode attention is off "
    "by 0.5 to 1.6 % (MAPE), prefill by 2.5 %. Read with Vidur's own rounding (lookup 'vidur').",
)
MODELS: Mapping[str, Provenance] = {"llama-2-7b": _LLAMA2_7B}


def import_profile(source: Path, model: str, name: str, *, config: Path | None = None, tensor_parallel: int = 1) -> TableTime:
    """The tables of Vidur's predictor with its look-up rule, or the calibration of its raw CSV profiles.

    Args:
        source: a folder of CSV profiles, or the tables.
        model: a name in ``dense_model.MODELS``, for tables one in ``MODELS``; with ``config`` how to call that model.
        name: name of the calibration.
        config: the ``config.json`` of the dense decoder that was profiled; for CSV profiles alone.
        tensor_parallel: must be 1, neither holds an all-reduce.

    Raises:
        ConfigError: an unknown model, one that was not profiled, a file that is missing or not of the format, a missing array or column.
    """
    if tensor_parallel != 1:
        raise ConfigError(
            f"--tensor-parallel: {tensor_parallel}, must be 1 for --format vidur, which reads kernels of one GPU (no all-reduce)"
        )
    if source.is_dir() and has_csv_profile(source):
        return import_folder(source, chosen_model(model, config), name)
    if config is not None:
        raise ConfigError(
            "--config: not for Vidur's tables, which are of one model (--model); a folder with attention.csv and mlp.csv takes it"
        )
    if model not in MODELS:
        raise ConfigError(f"--model: {model!r}, must be one of {', '.join(MODELS)} for --format vidur")
    path = _tables_file(source)
    arrays: dict[str, Any] = dict(_read(path))
    tables = TableTime(**arrays, lookup="vidur")
    reference = path.with_name(path.name.removesuffix("_tables.npz") + "_iterations.csv")
    provenance = dataclasses.replace(
        MODELS[model],
        name=name,
        valid_range=f"up to {tables.tokens[-1]:,.0f} tokens a batch, {tables.decode_batch[-1]:,.0f} decode requests of at most "
        f"{tables.decode_kv[-1]:,.0f} tokens on average, prefill chunks of {tables.prefill_chunk[-1]:,.0f} tokens in all over "
        f"{tables.prefill_context[-1]:,.0f} tokens of context",
        fit_error=_fit_error(tables, reference) if reference.exists() else "not measured against iteration times",
    )
    return dataclasses.replace(tables, provenance=provenance)


def _tables_file(source: Path) -> Path:
    if source.is_file():
        return source
    found = sorted(source.glob("*_tables.npz"))
    if len(found) != 1:
        raise ConfigError(f"SOURCE: {source} holds {len(found)} files *_tables.npz, must hold one (or give the file)")
    return found[0]


def _read(path: Path) -> dict[str, FloatArray]:
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ConfigError(f"SOURCE: {path} is one array, must be an NPZ file with {', '.join(ARRAYS)}")
        with file:
            missing = [array for array in ARRAYS if array not in file.files]
            if missing:
                raise ConfigError(f"SOURCE: {path} lacks the array {missing[0]!r} (needed: {', '.join(ARRAYS)})")
            return {field: np.asarray(file[array], dtype=np.float64) for array, field in ARRAYS.items()}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"SOURCE: {path} is not an NPZ file ({type(error).__name__}: {error})") from error


@dataclass(frozen=True, slots=True)
class Iterations:
    """Batch compositions and the seconds Vidur's predictor gives them; arrays of shape (n,).

    Attributes:
        batches: the compositions.
        decodes: decode requests of each.
        seconds: as Vidur predicts them, decode attention above 128 requests clipped.
        extrapolated: the same with decode attention in proportion to the requests above 128; equal
            to ``seconds`` where the file does not have it.
    """

    batches: tuple[Batch, ...]
    decodes: FloatArray
    seconds: FloatArray
    extrapolated: FloatArray

    def errors(self, model: IterationTimeModel, theirs: FloatArray) -> FloatArray:
        """(n,) relative errors of the model's seconds, with sign."""
        ours = np.array([model.seconds(batch) for batch in self.batches])
        return ours / theirs - 1.0


def read_iterations(path: Path) -> Iterations:
    """Iteration times of Vidur's predictor from CSV.

    The file of sampled compositions lists every chunk; the one of compositions met in runs has their
    sums alone. There the whole context belongs to one chunk: Vidur's Sarathi spends the budget on an
    unfinished prompt before it takes a new one, so no two prompts are ever partly read.

    Raises:
        ConfigError: the file cannot be read or lacks a column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    for column in ("n_decode", "decode_kv_total", "n_prefill", "prefill_tokens", "prefill_sq_sum", "prefill_ctx_total", "iteration_s"):
        if column not in columns:
            raise ConfigError(f"{path}: column {column!r} is missing")
    batches, seconds, extrapolated = [], [], []
    for row in rows:
        batches.append(_batch(row))
        seconds.append(float(row["iteration_s"]))
        extrapolated.append(float(row.get("iteration_s_linear_extrapolated") or row["iteration_s"]))
    return Iterations(tuple(batches), np.array([b.decodes for b in batches]), np.array(seconds), np.array(extrapolated))


def _batch(row: Mapping[str, str]) -> Batch:
    decodes, prefills = int(row["n_decode"]), int(row["n_prefill"])
    squares, context = float(row["prefill_sq_sum"]), float(row["prefill_ctx_total"])
    if "prefill_list" in row:
        contexts = [int(chunk.split("@")[1]) for chunk in row["prefill_list"].split()]
    else:
        contexts = [int(context)]
    return Batch(
        decodes=decodes,
        decode_kv=float(row["decode_kv_total"]),
        prefills=prefills,
        prefill_tokens=float(row["prefill_tokens"]),
        prefill_squares=squares,
        prefill_context=context,
        prefill_context64=float(sum(-(-c // 64) * 64 for c in contexts)),
        prefill_work=squares / 2 + float(row["prefill_cross_sum"]),
        sampled=decodes,
        batch_size=decodes + prefills,
    )


def _fit_error(tables: TableTime, reference: Path) -> str:
    iterations = read_iterations(reference)
    error = np.abs(iterations.errors(tables.clipped(), iterations.seconds))
    return (
        f"MAPE {100 * error.mean():.1g} %, at most {100 * error.max():.1g} %, on {error.size:,} iteration times of the predictor itself "
        "(clipped above 128 decode requests, as it does)"
    )
