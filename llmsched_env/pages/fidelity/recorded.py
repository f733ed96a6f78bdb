"""Time per output token of a server under a fixed number of requests, against figures that aiconfigurator's authors recorded.

``silicon_sample.csv`` of ai-dynamo/aiconfigurator holds TTFT and TPOT of real servers under closed loops: ``concurrency`` requests in
flight, every prompt of ``isl`` tokens, every output of ``osl``. TPOT in the steady state needs no arrivals: while one request decodes,
each of the others that share the engine reads one prompt.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch, TableTime

TOKEN_BUDGET = 8192
"""Tokens of one iteration, which the records do not state: the default of vLLM's server there (``EngineArgs.get_batch_defaults``)."""
_COLUMNS = (
    "backend",
    "backend_version",
    "model_path",
    "system",
    "precision",
    "mode",
    "tp_size",
    "batch_size",
    "isl",
    "osl",
    "silicon_tpot_ms",
)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One recorded closed loop."""

    gpus: int
    requests: int
    prompt: int
    output: int
    seconds: float


def read_recorded(path: Path, wanted: Mapping[str, str]) -> list[Recorded]:
    """The runs of one engine, model and GPU: rows whose columns hold what is wanted.

    Raises:
        ConfigError: the file cannot be read, or lacks a column.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"recorded runs {str(path)!r}: {error.strerror or error}") from error
    for name in _COLUMNS:
        if not rows or name not in rows[0]:
            raise ConfigError(f"recorded runs {str(path)!r}: column {name!r} is missing")
    return [
        Recorded(
            gpus=int(row["tp_size"]),
            requests=int(row["batch_size"]),
            prompt=int(row["isl"]),
            output=int(row["osl"]),
            seconds=1e-3 * float(row["silicon_tpot_ms"]),
        )
        for row in rows
        if row["mode"] == "agg" and all(row[name] == value for name, value in wanted.items())
    ]


def fits(model: TableTime, run: Recorded) -> bool:
    """Whether all requests fit the KV memory at their full length, so that none waits or is preempted."""
    source = model.provenance
    if source.num_blocks is None or source.block_size is None:
        return False
    return run.requests * -(-(run.prompt + run.output) // source.block_size) <= source.num_blocks


def time_per_output_token(model: TableTime, run: Recorded) -> float:
    """TPOT of the steady state, seconds.

    Contexts are half-way through their outputs. Prompts are read in chunks of the budget that the other requests' tokens
    leave, one prompt after the other; iterations that read none are of decodes alone.
    """
    others = run.requests - 1
    context = run.prompt + 0.5 * run.output
    reading, iterations, done = 0.0, 0, 0
    while done < run.prompt:
        chunk = min(TOKEN_BUDGET - others, run.prompt - done)
        last = done + chunk == run.prompt
        reading += model.seconds(
            Batch(
                decodes=others,
                decode_kv=others * context,
                prefills=1,
                prefill_tokens=chunk,
                prefill_squares=chunk**2,
                prefill_context=done,
                prefill_work=chunk * (0.5 * chunk + done),
                sampled=others + last,
                batch_size=run.requests,
            )
        )
        iterations, done = iterations + 1, done + chunk
    decoding = model.seconds(Batch(decodes=run.requests, decode_kv=run.requests * context, sampled=run.requests, batch_size=run.requests))
    steps = run.output - 1
    alone = max(steps - others * iterations, 0)
    return (others * reading + alone * decoding) / max(steps, others * iterations)


def tpot_errors(model: TableTime, runs: Iterable[Recorded]) -> np.ndarray:
    """(R,) relative errors of TPOT, with sign, of the runs whose requests fit the memory."""
    return np.array([time_per_output_token(model, run) / run.seconds - 1.0 for run in runs if fits(model, run)])
