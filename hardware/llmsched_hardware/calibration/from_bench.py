"""A calibration from what serving benchmarks have written: fit, provenance, and how well it predicts a run it has not seen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.perf import FormulaTime, Provenance
from llmsched_hardware.calibration.bench_fit import LEAST_IDLE, Fit, Interval, fit, off_formula
from llmsched_hardware.calibration.bench_metrics import ServerCounters
from llmsched_hardware.calibration.bench_replay import Replay
from llmsched_hardware.calibration.bench_results import BenchResult
from llmsched_hardware.calibration.token_times import DECODES, FRONTEND, ITERATIONS, KV, TOKENS, equations

UNITS = {
    "a": (1e3, "ms an iteration"),
    "b": (1e6, "us a token"),
    "s": (1e3, "ms an iteration above the knee"),
    "c": (1e6, "us a token above the knee"),
    "d1": (1e9, "ns a KV token of decodes"),
    "d3": (1e9, "ns a unit of prefill work"),
    "d4": (1e6, "us a decode"),
    "frontend": (1e3, "ms of the front end"),
}
"""What a coefficient is multiplied by to be shown, and in which unit it then is."""
DRIFT = 0.05
"""Difference of a run from the others above which it is said."""
ITERATIONS_OFF = 0.1
FIGURES = ("latency_mean", "latency_p99", "ttft_mean", "tpot_mean")


@dataclass(frozen=True, slots=True)
class Compared:
    """A run, measured and simulated; the front end's seconds are in the simulated ones.

    Attributes:
        label, rate, requests: of the run.
        measured, simulated: seconds by name (``FIGURES``).
        preemptions: simulated.
        drift: measured over modelled seconds of the run's own iterations - 1: where it is far from 0 in a run held out, the machine or
            the batches were others.
    """

    label: str
    rate: float
    requests: int
    measured: dict[str, float]
    simulated: dict[str, float]
    preemptions: int
    drift: float

    def error(self, name: str) -> float:
        """Simulated over measured - 1."""
        return self.simulated[name] / self.measured[name] - 1.0 if self.measured[name] else math.nan


@dataclass(frozen=True, slots=True)
class BenchCalibration:
    """What ``calibrate`` found.

    Attributes:
        model: the formula with its provenance.
        fit: both stages, intervals.
        runs, held_out: the runs fitted and those held out, measured and simulated.
        notes: what a reader must know.
    """

    model: FormulaTime
    fit: Fit
    runs: tuple[Compared, ...]
    held_out: tuple[Compared, ...]
    notes: tuple[str, ...]

    @property
    def frontend(self) -> float:
        """Seconds that the front end adds to the time to the first token and to latency; the calibration file has no place for them."""
        return self.fit.parameters.frontend


def check_lengths(results: Sequence[BenchResult], engine: EngineConfig) -> None:
    """Refuse requests that the engine could not have served.

    Raises:
        ConfigError: naming the run and the setting.
    """
    for result in results:
        longest = int((result.prompt_tokens + result.output_tokens).max())
        if longest > engine.max_model_len:
            raise ConfigError(
                f"{result.label}: a request has {longest} tokens, the engine takes {engine.max_model_len}; set engine.max_model_len"
            )
        if not engine.enable_chunked_prefill and int(result.prompt_tokens.max()) > engine.max_num_batched_tokens:
            raise ConfigError(f"{result.label}: a prompt is longer than engine.max_num_batched_tokens = {engine.max_num_batched_tokens}")


def calibrate(
    results: Sequence[BenchResult],
    engine: EngineConfig,
    name: str,
    counters: ServerCounters | None = None,
    held_out: Sequence[BenchResult] = (),
    notes: Sequence[str] = (),
    known_blocks: bool = False,
) -> BenchCalibration:
    """Fit the runs, replay those that are held out.

    Args:
        results: to fit.
        engine: the server's settings.
        name: of the calibration.
        counters: of the server over ``results``.
        held_out: not fitted.
        notes: said already, to be kept.
        known_blocks: ``engine.num_blocks`` is the server's, not a default.
    """
    check_lengths([*results, *held_out], engine)
    found = fit(results, engine)
    runs = _compared(results, engine, found)
    said = [*notes, *(f"{r.label}: {note}" for r in (*results, *held_out) for note in r.notes), *_remarks(results, found, runs, counters)]
    limits = _range(found)
    unseen = _compared(held_out, engine, found) if held_out else ()
    model = dataclasses.replace(
        found.parameters.formula(),
        max_tokens=limits["max_tokens"],
        max_decodes=limits["max_decodes"],
        max_context=limits["max_context"],
        provenance=Provenance(
            name=name,
            source=_cut(f"llmsched calibrate from-bench: {'; '.join(map(_described, results))}"),
            engine=f"vLLM, stated by the user: max_num_seqs {engine.max_num_seqs}, max_num_batched_tokens {engine.max_num_batched_tokens}, "
            f"max_model_len {engine.max_model_len}, {'chunked prefill' if engine.enable_chunked_prefill else 'no chunked prefill'}, "
            f"{'asynchronous' if engine.async_scheduling else 'synchronous'} scheduling",
            valid_range=seen_range(found),
            fit_error=_cut(" ".join([*(f"Fitted: {line(run)}." for run in runs), *(f"Held out: {line(run)}." for run in unseen)])),
            num_blocks=engine.num_blocks if known_blocks else None,
            block_size=engine.block_size if known_blocks else None,
            notes=_cut(
                f"The front end adds {1e3 * found.parameters.frontend:.1f} ms to the time to the first token and to latency; it is no "
                f"part of the formula. Inferred from clients' times: {'; '.join(map(interval_text, found.intervals))}. "
                f"{'' if math.isnan(found.spread) else f'Single iterations spread by {100 * found.spread:.0f} % about the formula. '}"
                + " ".join(f"{note[0].upper()}{note[1:]}." for note in said)
            ),
        ),
    )
    return BenchCalibration(model, found, runs, unseen, tuple(said))


def _compared(results: Sequence[BenchResult], engine: EngineConfig, found: Fit) -> tuple[Compared, ...]:
    compared = []
    for result, replayed in zip(results, Replay(results, engine)(found.parameters), strict=True):
        c = result.counted
        values = []
        for first, last in ((result.first, result.last), (replayed.first, replayed.last)):
            rest = result.output_tokens - 1.0
            each = np.divide(last - first, rest, out=np.full(len(rest), np.nan), where=rest > 0)[c]
            tpot = float(each[~np.isnan(each)].mean()) if not np.isnan(each).all() else math.nan
            values.append((float(last[c].mean()), float(np.percentile(last[c], 99)), float(first[c].mean()), tpot))
        measured, simulated = (dict(zip(FIGURES, v, strict=True)) for v in values)
        drift = off_formula(found.parameters, equations(result, engine))
        compared.append(Compared(result.label, result.rate, int(c.sum()), measured, simulated, replayed.preemptions, drift))
    return tuple(compared)


def _range(found: Fit) -> dict[str, float]:
    """Limits of ``FormulaTime``: the largest batch, number of decodes and mean context of an iteration in the data."""
    rows = np.concatenate([e.rows for e in found.equations])
    each = np.maximum(rows[:, ITERATIONS], 1.0)
    decodes = rows[:, DECODES]
    contexts = rows[decodes > 0, KV] / decodes[decodes > 0]
    return {
        "max_tokens": float((rows[:, TOKENS] / each).max()),
        "max_decodes": float((decodes / each).max()) or math.inf,
        "max_context": float(contexts.max(initial=0.0)) or math.inf,
    }


def seen_range(found: Fit) -> str:
    """What batches the runs hold, in words."""
    rows = np.concatenate([e.rows for e in found.equations])
    single = np.concatenate([e.single for e in found.equations])
    tokens, most = (_range(found)[name] for name in ("max_tokens", "max_decodes"))
    decodes = rows[:, DECODES]
    contexts = rows[decodes > 0, KV] / decodes[decodes > 0]
    low, high = (0.0, 0.0) if not contexts.size else np.percentile(contexts, (1, 99))
    longest = max(e.longest_chunk for e in found.equations)
    how = f"{np.count_nonzero(single):,} iterations" if single.any() else "no single iterations, sums of requests alone"
    return (
        f"{how}; up to {tokens:,.0f} tokens a batch, {most:,.0f} decodes of {low:,.0f} to {high:,.0f} tokens on average "
        f"(1st to 99th percentile), no prefill chunk above {longest:,} tokens"
    )


def _remarks(results: Sequence[BenchResult], found: Fit, runs: Sequence[Compared], counters: ServerCounters | None) -> list[str]:
    said = []
    if found.stalls:
        said.append(f"{found.stalls} rows that took more than eight times their modelled seconds left out as pauses of the machine")
    if len(results) > 1 and max(found.drift) - min(found.drift) > DRIFT:
        apart = ", ".join(f"{r.label} {100 * d:+.1f} %" for r, d in zip(results, found.drift, strict=True))
        said.append(f"iterations differ from the common formula by run ({apart}): the machine has drifted, or the formula is too simple")
    stalled, all_of = sum(e.stalled for e in found.equations), sum(e.iterations for e in found.equations)
    if stalled:
        said.append(
            f"{stalled:,} of {all_of:,} iterations left out: a preempted request computed its tokens again, "
            "or prompts do not fit the token budget"
        )
    if not all_of:
        said.append("the files hold no times of single tokens; iterations are seen in sums alone")
    if sum(np.count_nonzero(e.rows[:, FRONTEND]) for e in found.equations) < LEAST_IDLE:
        said.append("hardly a request found the engine idle: the front end's seconds are known by the iterations that requests entered")
    if counters is not None and counters.preemptions is not None:
        simulated = sum(run.preemptions for run in runs)
        if counters.preemptions or simulated:
            said.append(f"preemptions: {counters.preemptions} on the server, {simulated} simulated")
    if counters is not None and counters.iterations and all_of and abs(all_of / counters.iterations - 1.0) > ITERATIONS_OFF:
        said.append(f"{all_of:,} iterations seen through tokens, the server counted {counters.iterations:,}")
    return said


def interval_text(interval: Interval) -> str:
    """A coefficient with its interval, in words."""
    scale, unit = UNITS[interval.name]
    value, low, high = (f"{scale * x:.3g}" for x in (interval.value, interval.low, interval.high))
    verdict = "" if interval.determined else f", not determined{f' (trades with {interval.partner})' if interval.partner else ''}"
    return f"{interval.name} = {value} {unit} ({low} to {high}{verdict})"


def line(run: Compared) -> str:
    """Errors of a run, in words."""
    errors = ", ".join(f"{name.replace('_', ' ')} {100 * run.error(name):+.1f} %" for name in FIGURES)
    return f"{run.label} ({run.requests} requests, {run.rate:.3g}/s): {errors}; iterations {100 * run.drift:+.1f} % from the formula"


def _described(result: BenchResult) -> str:
    lengths = f"{result.prompt_tokens.mean():.0f} + {result.output_tokens.mean():.0f}"
    return f"{result.label} ({result.tool}, {len(result)} requests, {result.rate:.3g}/s, mean lengths {lengths})"


def _cut(text: str) -> str:
    """What fits a field of ``Provenance``."""
    return text if len(text) <= 4000 else f"{text[:3990]} ..."
