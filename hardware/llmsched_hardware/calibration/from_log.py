"""A calibration from logged iterations of live traffic, and what it can and cannot say.

``fit_logs`` fits one form to iteration logs (``llmsched_hardware.calibration.iteration_log``); ``check_model`` compares any model with
a log, by policy and rate. What the log does not cover is said in words: a simulator that goes there extrapolates.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmsched_env.errors import ConfigError
from llmsched_env.perf import IterationTimeModel, Provenance, TrafficTime
from llmsched_env.perf.base import FloatArray
from llmsched_env.perf.batch import DECODE_KV, DECODES, FINISHED, PREFILL_CONTEXT, PREFILL_TOKENS, PREFILLS
from llmsched_hardware.calibration.fit import FitError, fit_error, formula_of, linear_of
from llmsched_hardware.calibration.iteration_log import IterationLog, read_iteration_logs
from llmsched_hardware.calibration.traffic_fit import (
    GROUPS,
    STALL,
    Fitted,
    Iterations,
    cross_validated_with,
    fit_traffic,
    folds_of,
)

Form = Literal["traffic", "formula", "linear"]
FORMS: tuple[Form, ...] = ("traffic", "formula", "linear")
Repeats = Literal["apart", "median", "fastest"]
WINDOW = 100
"""Iterations over which the machine's speed is taken."""
DRIFT_WARNING = 0.10
SPARSE = 20
"""A cell of the map of batches with fewer iterations is said to be thin."""
_MEANING = {
    "prefill": "several prompts at once",
    "started": "each request that starts",
    "finished": "each request that ends",
    "changed": "a batch that has changed",
    "new_shape": "a number of tokens not seen lately",
}


@dataclass(frozen=True, slots=True)
class Group:
    """Iterations of one policy at one rate, measured and modelled.

    Attributes:
        name: which.
        measured, modelled: seconds in total.
        count: iterations.
    """

    name: str
    measured: float
    modelled: float
    count: int

    @property
    def error(self) -> float:
        """Modelled over measured - 1."""
        return self.modelled / self.measured - 1.0


@dataclass(frozen=True, slots=True, eq=False)
class LogFit:
    """A calibration from logs.

    Attributes:
        model: with provenance.
        form: which.
        engine: what was measured, from the heading of the logs.
        held_out: each run predicted by a fit to the others.
        groups: the same by policy and rate, where the logs say them.
        drift: standard deviation of the machine's speed over stretches of ``WINDOW`` iterations, relative.
        stalls, stalled_seconds: iterations set aside, and their time.
        between: seconds from one iteration to the next that were added to each, 0 where a log holds whole steps.
        coverage: what the logs do not cover, a line each.
        worth: by term, how much the held-out error rises without it, relative (form ``traffic``).
        shapes: how many numbers of tokens the model remembers.
    """

    model: IterationTimeModel
    form: Form
    engine: Mapping[str, Any]
    held_out: FitError
    groups: tuple[Group, ...]
    drift: float
    stalls: int
    stalled_seconds: float
    between: float
    coverage: tuple[str, ...]
    worth: Mapping[str, float]
    shapes: int

    def lines(self) -> list[str]:
        """What a program prints of it."""
        lines = [
            f"{'engine':<12} {self.engine.get('device')}, vLLM {self.engine.get('vllm')}, {self.engine.get('model')}",
            f"{'held out':<12} {self.held_out} (each run by a fit to the others)",
            f"{'drift':<12} {100 * self.drift:.1f} % (standard deviation of the speed over stretches of {WINDOW} iterations)",
        ]
        if self.drift > DRIFT_WARNING:
            lines.append(f"{'':<12} the machine's speed drifts: log longer, or where nothing else runs; no figure is better than this")
        lines += [f"{'':<12} {g.name}: total {100 * g.error:+.1f} %, {g.count:,} iterations" for g in self.groups]
        for name, gain in self.worth.items():
            kept = any(getattr(self.model, field) > 0 for field in next(g for g in GROUPS if g[0] == name))
            lines.append(f"{'term':<12} {_MEANING[name]}: {'kept' if kept else 'left out'}, error without it {100 * gain:+.1f} %")
        if self.shapes:
            lines.append(f"{'':<12} the last {self.shapes} different numbers of tokens are remembered")
        if self.between:
            lines.append(f"{'between':<12} {1e6 * self.between:.0f} us from one iteration to the next, in every iteration's time")
        if self.stalls:
            lines.append(f"{'set aside':<12} {self.stalls} iterations of over {STALL:g} times their time, {self.stalled_seconds:.2f} s")
        return lines + [f"{'not covered':<12} {line}" for line in self.coverage]


def iterations_of(log: IterationLog) -> tuple[Iterations, float]:
    """What is fitted, and the seconds between iterations that are part of each.

    The measured clock of the backend counts whole steps, and its logs hold them. A server's log leaves out what it does between two
    iterations; the median of that, over iterations that follow one another while requests run, is added. Where iterations overlap
    (asynchronous scheduling) nothing is.
    """
    between = 0.0
    if log.engine.get("steps") != "whole" and not log.engine.get("asynchronous"):
        gaps = log.between()
        known = gaps[np.isfinite(gaps)]
        between = max(float(np.median(known)), 0.0) if known.size else 0.0
    run = log.column("segment").astype(np.int64)
    files = {number: str(about.get("file", "")) for number, about in log.segments.items()}
    names = sorted(set(files.values()))
    engine = np.array([names.index(files.get(k, names[0] if names else "")) if names else 0 for k in run.tolist()], dtype=np.int64)
    batches = log.batches().copy()
    batches[np.flatnonzero(np.diff(run, prepend=-1)), FINISHED] = 0.0  # who ended before a run's first batch was of another run
    return Iterations(batches, log.seconds() + between, run, engine), between


def combined(data: Iterations, log: IterationLog, how: Repeats) -> tuple[Iterations, IterationLog]:
    """Runs of the same batches, as repeats under the virtual clock are, made one: of each iteration the median or the shortest time.

    A machine whose speed drifts is slow in some repeats and not in others; the shortest of several is what it does when nothing is in its
    way. Runs without a repeat stay as they are.
    """
    if how == "apart":
        return data, log
    segment = log.column("segment").astype(np.int64)
    alike: dict[tuple[Any, ...], list[npt.NDArray[np.int64]]] = {}
    for number in dict.fromkeys(segment.tolist()):
        own = np.flatnonzero(segment == number)
        about = log.segments.get(number, {})
        key = tuple(about.get(name) for name in ("policy", "rate", "seed"))
        alike.setdefault((*key, data.batches[own].tobytes()), []).append(own)
    first = np.sort(np.concatenate([runs[0] for runs in alike.values()]))
    seconds = data.seconds.copy()
    for runs in alike.values():
        seconds[runs[0]] = (np.median if how == "median" else np.min)([data.seconds[own] for own in runs], axis=0)
    kept = Iterations(data.batches[first], seconds[first], data.run[first], data.engine[first])
    return kept, dataclasses.replace(log, table=log.table[first])


def fit_logs(paths: Iterable[str | Path], name: str, form: Form = "traffic", repeats: Repeats = "apart") -> LogFit:
    """Fit a form to the iterations in the files.

    Args:
        name: of the calibration.
        form: ``traffic`` (``TrafficTime``), ``formula`` or ``linear``.
        repeats: what becomes of runs of the same batches (``combined``).

    Raises:
        ConfigError: unknown form; files that cannot be read or are of different engines; too few iterations.
    """
    if form not in FORMS:
        raise ConfigError(f"form: {form!r}, must be one of {', '.join(FORMS)}")
    log = read_iteration_logs(paths)
    return fit_log(log, name, form, repeats)


def fit_log(log: IterationLog, name: str, form: Form = "traffic", repeats: Repeats = "apart") -> LogFit:
    """``fit_logs`` of a log in memory."""
    data, between = iterations_of(log)
    data, log = combined(data, log, repeats)
    fitted = fit_traffic(data)  # whatever the form: it says what is a stall
    keep = ~fitted.stalls
    model: IterationTimeModel
    if form == "traffic":
        model, predicted = fitted.model, fitted.predicted
    else:
        fit = formula_of if form == "formula" else linear_of
        model = fit(data.batches[keep], data.seconds[keep])
        predicted = cross_validated_with(lambda b, s: fit(b, s), data, folds_of(data.run), fitted.stalls)
    held_out = _error_of(predicted[keep], data.seconds[keep])
    speed = drift_of(fitted.predicted, data)
    coverage = tuple(not_covered(data, log.engine))
    worth = {group: error / fitted.error - 1.0 for group, error in fitted.without.items()} if form == "traffic" else {}
    found = LogFit(
        model=model,
        form=form,
        engine=log.engine,
        held_out=held_out,
        groups=tuple(_groups(log, data.seconds, predicted, keep)),
        drift=speed,
        stalls=int(fitted.stalls.sum()),
        stalled_seconds=float(data.seconds[fitted.stalls].sum()),
        between=between,
        coverage=coverage,
        worth=worth,
        shapes=model.shapes if isinstance(model, TrafficTime) else 0,
    )
    filed: Any = dataclasses.replace(model, provenance=_provenance(found, fitted, data, name))
    return dataclasses.replace(found, model=filed)


def check_model(model: IterationTimeModel, log: IterationLog, repeats: Repeats = "apart") -> tuple[FitError, list[Group]]:
    """A model on the iterations of a log that it was not fitted to: over all, and by policy and rate."""
    data, log = combined(iterations_of(log)[0], log, repeats)
    modelled = model.seconds_of(data.batches)
    return fit_error(model, data.batches, data.seconds), list(_groups(log, data.seconds, modelled, np.ones(len(data), dtype=bool)))


def drift_of(predicted: FloatArray, data: Iterations) -> float:
    """Standard deviation over stretches of ``WINDOW`` iterations of measured over predicted seconds in total, relative."""
    ratios = []
    for k in range(0, len(data) - WINDOW + 1, WINDOW):
        part = slice(k, k + WINDOW)
        ratios.append(float(np.median(data.seconds[part] / predicted[part])))
    return float(np.std(ratios) / np.mean(ratios)) if len(ratios) > 1 else math.nan


def not_covered(data: Iterations, engine: Mapping[str, Any]) -> list[str]:
    """Batches that the engine could run and the iterations hold none or few of, in words."""
    b, tokens = data.batches, data.tokens
    decodes = b[:, DECODES]
    lines = []
    for field, seen, what in (
        ("max_num_batched_tokens", tokens, "tokens in a batch"),
        ("max_num_seqs", decodes, "decodes in a batch"),
    ):
        limit = engine.get(field)
        if isinstance(limit, int) and seen.max() < 0.95 * limit:
            lines.append(f"more than {seen.max():,.0f} {what} (the engine takes {limit:,})")
    some = decodes > 0
    contexts = b[some, DECODE_KV] / decodes[some]
    limit = engine.get("max_model_len")
    if contexts.size and isinstance(limit, int) and contexts.max() < 0.95 * limit:
        lines.append(f"decodes of more than {contexts.max():,.0f} tokens on average (the engine takes {limit:,})")
    blocks, size = engine.get("num_blocks"), engine.get("block_size")
    if isinstance(blocks, int) and isinstance(size, int) and b[:, DECODE_KV].max() < 0.9 * blocks * size:
        lines.append(f"more than {b[:, DECODE_KV].max():,.0f} KV tokens of decodes (there is room for {blocks * size:,})")
    for what, found in (
        ("prefill without a decode beside it", (b[:, PREFILLS] > 0) & (decodes == 0)),
        ("prefill beside decodes", (b[:, PREFILLS] > 0) & (decodes > 0)),
        ("several prompts at once", b[:, PREFILLS] > 1),
        ("chunks behind the first of a prompt", b[:, PREFILL_CONTEXT] > 0),
        ("decodes alone", (b[:, PREFILLS] == 0) & (decodes > 0)),
    ):
        count = int(np.count_nonzero(found))
        if count < SPARSE:
            lines.append(f"{what}: {count} iterations" if count else f"{what}: none")
    edges = np.concatenate([[0.0], 2.0 ** np.arange(0, 15)])
    thin = [
        f"{low + 1:,.0f} to {high:,.0f}"
        for low, high in itertools.pairwise(edges)
        if high <= b[:, PREFILL_TOKENS].max() and 0 < np.count_nonzero((tokens > low) & (tokens <= high)) < SPARSE
    ]
    if thin:
        lines.append(f"fewer than {SPARSE} iterations each of {', '.join(thin)} tokens")
    return lines


def _error_of(modelled: FloatArray, seconds: FloatArray) -> FitError:
    error = np.abs(modelled / seconds - 1.0)
    median, p90 = np.percentile(error, (50, 90))
    return FitError(float(error.mean()), float(median), float(p90), float(modelled.sum() / seconds.sum() - 1.0), int(seconds.size))


def _groups(log: IterationLog, seconds: FloatArray, modelled: FloatArray, keep: Any) -> Iterable[Group]:
    """By policy and rate where segments say them; nothing where none does."""
    segment = log.column("segment").astype(np.int64)
    names: dict[str, list[int]] = {}
    for number, about in log.segments.items():
        words = [str(about[key]) if key == "policy" else f"{float(about[key]):.4g} req/s" for key in ("policy", "rate") if key in about]
        if words:
            names.setdefault(", ".join(words), []).append(number)
    for name, numbers in sorted(names.items()):
        chosen = np.isin(segment, numbers) & keep
        if chosen.any():
            yield Group(name, float(seconds[chosen].sum()), float(modelled[chosen].sum()), int(chosen.sum()))


def _provenance(found: LogFit, fitted: Fitted, data: Iterations, name: str) -> Provenance:
    engine = found.engine
    b = data.batches
    some = b[:, DECODES] > 0
    contexts = b[some, DECODE_KV] / b[some, DECODES]
    policies = sorted({group.name.split(",")[0] for group in found.groups})
    scheduled = "asynchronous scheduling" if engine.get("asynchronous") else "stepped synchronously"
    notes = [f"The machine's speed drifted by {100 * found.drift:.1f} % over stretches of {WINDOW} iterations."]
    if found.shapes:
        notes.append(f"Remembers the last {found.shapes} numbers of tokens.")
    if found.between:
        notes.append(f"{1e6 * found.between:.0f} us between iterations are in every iteration's time.")
    if found.stalls:
        notes.append(f"{found.stalls} iterations ({found.stalled_seconds:.2f} s) were set aside as stalls of the machine.")
    notes += [f"Not covered: {'; '.join(found.coverage)}."] if found.coverage else []
    num_blocks, block_size = engine.get("num_blocks"), engine.get("block_size")
    return Provenance(
        name=name,
        source=f"llmsched calibrate from-log, {len(data):,} iterations of live traffic"
        + (f" under {', '.join(policies)}" if policies else ""),
        gpu=str(engine.get("device", "")),
        model=f"{engine.get('model', '')}, {engine.get('dtype', '')}",
        engine=f"vLLM {engine.get('vllm', '')}, torch {engine.get('torch', '')}, {scheduled}; "
        + ", ".join(f"{key} {engine[key]}" for key in ("max_num_seqs", "max_num_batched_tokens", "max_model_len") if key in engine),
        valid_range=f"up to {data.tokens.max():,.0f} tokens a batch, {b[:, DECODES].max():,.0f} decodes of at most "
        f"{contexts.max(initial=0.0):,.0f} tokens on average",
        fit_error=f"held out (each run by a fit to the others): {found.held_out}",
        num_blocks=num_blocks if isinstance(num_blocks, int) and num_blocks > 0 else None,
        block_size=block_size if isinstance(block_size, int) and block_size > 0 else None,
        notes=" ".join(notes),
    )


__all__ = ["FORMS", "Form", "Group", "LogFit", "Repeats", "check_model", "combined", "drift_of", "fit_log", "fit_logs", "iterations_of"]
