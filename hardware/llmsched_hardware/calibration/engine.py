"""Measure the engine at hand, fit iteration-time models, check them on a workload they have not seen.

The sweep takes batches from coarse to fine (``llmsched_hardware.calibration.plan``) and goes through the plan several
times, because a machine's speed drifts; every point is on disk before the next. What is fitted are
the seconds of whole engine steps, since that is what an engine stepped synchronously costs; seconds
of execution alone stand beside them in the points file.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import ConfigError, require
from llmsched_env.perf import FormulaTime, IterationTimeModel, LinearTime, Provenance, TableTime, save_calibration
from llmsched_hardware.calibration.fit import batches_of, fit_error, fit_formula, fit_linear, fit_tables
from llmsched_hardware.calibration.from_log import LogFit
from llmsched_hardware.calibration.heldout import HeldOut, compile_simulator
from llmsched_hardware.calibration.plan import CHUNK_STEPS, EngineLimits, Group, plan
from llmsched_hardware.calibration.points import Point, PointsFile, Probe, combined, drift, seconds_of
from llmsched_hardware.progress import Progress
from llmsched_hardware.real_engine import (
    EngineOptions,
    Machine,
    build_engine,
    describe_machine,
    free_engine,
    load_vllm,
    num_usable_blocks,
    with_block_size,
)
from llmsched_hardware.shapes import is_shape

SWEEPS = 3
LEAST_POINTS = 8
SWEEP_SHARE, TRAFFIC_SHARE = 0.5, 0.5
"""Of the time left after the engine is built; of what is left then, less two more buildings. The rest is for the held-out workload."""
SWEEP_ALONE_SHARE = 0.9
"""The same where there is neither traffic nor a held-out workload; the rest is for the fits."""
SUFFIXES = {"formula": ".json", "tables": ".npz", "traffic": ".traffic.json"}
"""Files of the forms that are kept."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """What a sweep measured.

    Attributes:
        points: in the order measured, earlier runs of the program first.
        left_out: probes of the plan that have no point, and why.
        planned: probes in the plan; sweeps: how often it was gone through, the last time maybe in part.
    """

    points: list[Point]
    left_out: dict[Probe, str]
    planned: int
    sweeps: int


@dataclass(frozen=True, slots=True)
class Calibrated:
    """Everything that a run of the program has found out; ``build_seconds`` is what the engine took to start."""

    machine: Machine
    options: EngineOptions
    limits: EngineLimits
    build_seconds: float
    sweep: Sweep
    linear: LinearTime
    formula: FormulaTime
    tables: TableTime
    traffic: LogFit | None = None
    held_out: HeldOut | None = None

    @property
    def models(self) -> dict[str, IterationTimeModel]:
        found: dict[str, IterationTimeModel] = {"linear": self.linear, "formula": self.formula, "tables": self.tables}
        return found if self.traffic is None else found | {"traffic": self.traffic.model}

    def file_of(self, form: str, out: Path) -> Path:
        """Where a form is kept, beside ``out``."""
        return out.with_suffix(SUFFIXES[form])

    def best(self) -> str | None:
        """The form whose simulated mean latency is closest to the engine's on the held-out workload; None where that was not run."""
        held = self.held_out
        return None if held is None else min((form for form in SUFFIXES if form in held.checks), key=lambda f: abs(held.checks[f].latency))


def write(result: Calibrated, name: str, out: Path) -> None:
    """The formula to ``out``, the tables and the fit to traffic beside it."""
    for form in SUFFIXES:
        if form in result.models:
            model = result.models[form]
            filed: Any = dataclasses.replace(model, provenance=provenance(result, form, name, out))  # type: ignore[type-var]
            save_calibration(filed, result.file_of(form, out))


def calibrate(
    options: EngineOptions,
    points_path: Path,
    *,
    deadline: float,
    max_batch: int | None,
    sweeps: int,
    resume: bool,
    progress: Progress,
    held_out: bool = True,
) -> Calibrated:
    """Build the engine, sweep, fit; the check on a held-out workload is still to come (``hold_out``).

    Args:
        deadline: ``time.monotonic()`` by which to be done.
        max_batch: most decodes of a probe; None for the engine's sequence cap.
        sweeps: passes through the plan, if there is time.
        resume: go on with the points in the file.
        held_out: keep time for that check.

    Raises:
        ConfigError: settings vLLM refuses, points of another engine, or too few points for a fit.
        EngineError: the engine cannot start or has died; measured points stay on disk.
    """
    if held_out:
        compile_simulator()  # at most once a version; the time it takes is then known before the sweep
    load_vllm()  # once: building again takes no import
    options = with_block_size(options)
    begin = time.monotonic()
    engine = build_engine(options)
    build_seconds = time.monotonic() - begin
    try:
        machine = describe_machine(engine)
        limits = EngineLimits(
            max_batch=max_batch or options.max_num_seqs,
            max_num_seqs=options.max_num_seqs,
            budget=options.max_num_batched_tokens,
            max_model_len=options.max_model_len,
            num_blocks=num_usable_blocks(engine),
            block_size=machine.block_size,
        )
        now = time.monotonic()
        # The workload runs on an engine that the backend builds itself.
        left = deadline - now
        until = now + max(SWEEP_SHARE * (left - build_seconds) if held_out else SWEEP_ALONE_SHARE * left, 0.0)
        with PointsFile(points_path, fingerprint(options, machine), resume=resume) as file:
            sweep = run_sweep(engine, limits, file, until, sweeps, progress)
    finally:
        free_engine(engine)
    if len(sweep.points) < LEAST_POINTS:
        raise ConfigError(
            f"--budget-seconds: only {len(sweep.points)} batches were measured in the time, a fit needs {LEAST_POINTS}; "
            "the points are kept, go on with --resume"
        )
    points = combined(sweep.points)
    formula = fit_formula(points)
    return Calibrated(machine, options, limits, build_seconds, sweep, fit_linear(points), formula, fit_tables(points, formula))


def fingerprint(options: EngineOptions, machine: Machine) -> dict[str, Any]:
    """What must agree for points to belong together. Not the number of blocks: what memory is free differs from run to run."""
    names = ("model", "load_format", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "enforce_eager")
    torch = require("torch", "vllm")
    return {
        "device": machine.device,
        "vllm": machine.vllm,
        "dtype": machine.dtype,
        "block_size": machine.block_size,
        "threads": torch.get_num_threads() if machine.driver is None else None,
        **{name: getattr(options, name) for name in names},
        "extra": dict(options.extra),
    }


# --- the sweep ------------------------------------------------------------------------------------


def run_sweep(engine: Any, limits: EngineLimits, file: PointsFile, until: float, sweeps: int, progress: Progress) -> Sweep:
    """Measure what the plan holds and the file lacks, until the time is up."""
    from llmsched_hardware.calibration.sweep import Stepper, measure, warm_up  # they import vLLM, whose environment the engine has set

    groups = plan(limits)
    planned = sum(len(group.probes) for group in groups)
    done = {(point.sweep, point.probe) for point in file.points}
    failed: dict[Probe, str] = {}
    stepper = Stepper(engine)
    warm_up(stepper, limits)
    with progress(planned * sweeps) as bar:
        bar.advance(len(done))
        for number in range(sweeps):
            for group in groups:
                rest = group.without({probe for probe in group.probes if (number, probe) in done or probe in failed})
                if not rest.probes or _seconds_needed(rest, file.points, limits) > until - time.monotonic():
                    continue  # too long for the time left; a later one may be shorter

                def record(point: Point, number: int = number) -> bool:
                    file.append(dataclasses.replace(point, sweep=number))
                    bar.advance(description=str(point.probe))
                    return time.monotonic() < until

                failed.update(measure(stepper, rest, limits.max_model_len, record))
    have = {point.probe for point in file.points}
    left_out = {p: failed.get(p, "no time") for group in groups for p in group.probes if p not in have}
    return Sweep(list(file.points), left_out, planned, 1 + max((point.sweep for point in file.points), default=0))


def _seconds_needed(group: Group, points: Sequence[Point], limits: EngineLimits) -> float:
    """Estimated from the points so far; 0 while there are too few to tell."""
    if len(points) < LEAST_POINTS:
        return 0.0
    longest = max(points, key=lambda p: p.batch.prefill_tokens)
    each_token = longest.seconds / longest.batch.prefill_tokens if longest.batch.prefill_tokens else 0.0
    typical = float(np.median([p.seconds for p in points]))
    tokens = sum(1 + CHUNK_STEPS for probe in group.probes if probe.chunk) * limits.budget / 4  # the steps in between
    if group.is_prefill:
        tokens += (1 + CHUNK_STEPS) * max(probe.chunk_context + probe.chunk for probe in group.probes)
    else:
        tokens += max(probe.decodes for probe in group.probes) * group.context
        tokens += (1 + CHUNK_STEPS) * sum(probe.chunk for probe in group.probes)
    return tokens * each_token + group.growth * typical


# --- what is written ------------------------------------------------------------------------------


def provenance(result: Calibrated, form: str, name: str, out: Path) -> Provenance:
    """Everything a reader needs to judge the file of one form."""
    machine, options, points = result.machine, result.options, combined(result.sweep.points)
    if form == "traffic":
        return _traffic_provenance(result, name)
    error = fit_error(result.models[form], batches_of(points), seconds_of(points))
    held = "" if result.held_out is None else f" Held out: {result.held_out.description}: {result.held_out.checks[form]}."
    share = float(np.median([p.execute_seconds / p.seconds for p in points]))
    linear = result.linear
    resolved = "" if machine.model.startswith("/") else f" ({machine.model})"
    driver = f", driver {machine.driver}" if machine.driver else ""
    chunked = "chunked prefill" if options.enable_chunked_prefill else "no chunked prefill"
    eager = "no CUDA graphs" if options.enforce_eager or machine.driver is None else "CUDA graphs"
    weights = "random weights" if is_shape(options.model) else f"load format {options.load_format}"
    other = f"the tables are in {out.stem}.npz" if form == "formula" else f"the formula is in {out.stem}.json"
    return Provenance(
        name=name,
        source=f"scripts/calibrate.py engine, {machine.date}, {len(points)} batches measured in {result.sweep.sweeps} sweeps",
        gpu=f"{machine.device}{driver}",
        model=f"{options.model}{resolved}, {machine.dtype}, {weights}",
        engine=f"vLLM {machine.vllm}, torch {machine.torch}, stepped synchronously; max_num_seqs {options.max_num_seqs}, "
        f"max_num_batched_tokens {options.max_num_batched_tokens}, max_model_len {options.max_model_len}, {chunked}, {eager}",
        valid_range=_range(points),
        fit_error=f"on the measured batches: {error}.{held or ' Held out: not run.'}",
        num_blocks=machine.num_blocks,
        block_size=machine.block_size,
        notes=f"Seconds of whole engine steps (scheduling, execution, sampling, bookkeeping); execution and sampling alone are "
        f"{100 * share:.0f} % of them in the median. {_drift(result)}"
        f"The paper's two terms: d0 = {linear.d0:.4g} s, d1 = {linear.d1:.4g} s per KV token, on the measured batches "
        f"{fit_error(linear, batches_of(points), seconds_of(points))}. {_left_out(result)}{other[0].upper()}{other[1:]}.",
    )


def _traffic_provenance(result: Calibrated, name: str) -> Provenance:
    """Of the fit to traffic: what its log says, and the held-out workload."""
    assert result.traffic is not None
    own = result.traffic.model.provenance
    held = "Held out: not run, no time."
    if result.held_out is not None:
        held = f"Held out: {result.held_out.description}: {result.held_out.checks['traffic']}."
    machine = result.machine
    source = f"llmsched calibrate engine, {machine.date}, {result.traffic.held_out.count:,} iterations of traffic"
    fit = f"{own.fit_error}. {held}"
    return dataclasses.replace(own, name=name, source=source, fit_error=fit, num_blocks=machine.num_blocks, block_size=machine.block_size)


def _range(points: Sequence[Point]) -> str:
    tokens = max(p.batch.decodes + p.batch.prefill_tokens for p in points)
    decodes = max((p.batch.decodes for p in points), default=0.0)
    contexts = max((p.batch.decode_kv / p.batch.decodes for p in points if p.batch.decodes), default=0.0)
    load = max(p.batch.decode_kv for p in points)
    behind = max(p.probe.chunk_context for p in points)
    return (
        f"up to {tokens:,.0f} tokens a batch, {decodes:,.0f} decodes of at most {contexts:,.0f} tokens on average and {load:,.0f} in all, "
        f"prefill chunks at up to {behind:,} tokens of context"
    )


def _drift(result: Calibrated) -> str:
    value = drift(result.sweep.points)
    return "" if math.isnan(value) else f"The same batch differs by {100 * value:.0f} % between sweeps (mean of range over median). "


def _left_out(result: Calibrated) -> str:
    left = result.sweep.left_out
    if not left:
        return "Nothing of the plan was left out. "
    no_time = sum(reason == "no time" for reason in left.values())
    return f"{len(left)} of {result.sweep.planned} batches of the plan were left out, {no_time} of them for lack of time. "


def report(result: Calibrated, out: Path, points_path: Path, seconds: float) -> list[str]:
    """What the program prints at its end."""
    machine, points = result.machine, combined(result.sweep.points)
    batches, measured = batches_of(points), seconds_of(points)
    traffic = "" if result.traffic is None else f"; {result.file_of('traffic', out)}: fit to traffic"
    lines = [
        f"{out}: formula; {out.with_suffix('.npz')}: tables{traffic}; {points_path}: {len(result.sweep.points)} points",
        f"{'machine':<12} {machine.device}" + (f", driver {machine.driver}" if machine.driver else ""),
        f"{'engine':<12} vLLM {machine.vllm}, {result.options.model}, {machine.dtype}",
        f"{'KV capacity':<12} {machine.num_blocks:,} blocks of {machine.block_size} tokens",
        f"{'valid range':<12} {_range(points)}",
        f"{'sweeps':<12} {result.sweep.sweeps} over {len(points)} of {result.sweep.planned} batches. {_drift(result)}".rstrip(),
    ]
    for form, model in result.models.items():
        if form != "traffic":  # what it is a fit to has a memory, these batches have none
            lines.append(f"{form:<12} measured batches: {fit_error(model, batches, measured)}")
        elif result.traffic is not None:
            lines.append(f"{form:<12} {result.traffic.held_out} (each run by a fit to the others)")
        if result.held_out is not None:
            lines.append(f"{'':<12} held out: {result.held_out.checks[form]}")
    if result.held_out is None:
        lines.append(f"{'held out':<12} not run")
    else:
        held = result.held_out
        apart = "" if math.isnan(held.spread) else f"; mean latency differs by {100 * held.spread:.1f} % over the engine's warm passes"
        lines.append(f"{'held out':<12} {held.description}, {held.passes} passes{apart}")
        best = result.best() or "formula"
        lines.append(f"{'use':<12} --calibration {result.file_of(best, out)}, the smallest error in simulated latency")
    if result.sweep.left_out:
        lines.append(f"{'left out':<12} {len(result.sweep.left_out)} batches:")
        reasons: dict[str, list[Probe]] = {}
        for probe, reason in result.sweep.left_out.items():
            reasons.setdefault(reason, []).append(probe)
        for reason, probes in reasons.items():
            shown = "; ".join(map(str, probes[:6])) + (f"; and {len(probes) - 6} more" if len(probes) > 6 else "")
            lines.append(f"{'':<12} {reason}: {shown}")
    lines.append(f"{'time':<12} {seconds:.0f} s")
    return lines
