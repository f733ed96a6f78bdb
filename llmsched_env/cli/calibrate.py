"""``llmsched calibrate``: a calibration from a raw profile or from the vLLM engine on this machine; a raw profile measured here."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import tyro

from llmsched_env.cli.calibrate_bench import FromBench, run_from_bench
from llmsched_env.cli.calibrate_kernels import Kernels, run_kernels
from llmsched_env.cli.calibrate_log import FromLog, run_from_log
from llmsched_env.cli.frame import Assignments, Command, Options, Outcome, Resumable, Screen, check_counts, check_new_calibration, words
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file, goes_on
from llmsched_env.perf import IterationTimeModel
from llmsched_env.perf.store import calibration_bytes
from llmsched_hardware.calibration.engine import SWEEPS, TRAFFIC_SHARE, Calibrated, calibrate, report, write
from llmsched_hardware.calibration.from_log import fit_log
from llmsched_hardware.calibration.heldout import MOST, hold_out, record_traffic
from llmsched_hardware.calibration.importers import aiconfigurator, llmservingsim, vidur
from llmsched_hardware.calibration.settings import engine_options
from llmsched_hardware.calibration.traffic_fit import LEAST_ROWS
from llmsched_hardware.real_engine import EngineOptions


class Importer(Protocol):
    """A format's module gives the calibration of a model from the profile at a path, its provenance under a name.

    Raises ConfigError for a file that is missing or not of the format, a missing column, a model the profile does not hold, and
    for an option that the format does not know.
    """

    def __call__(
        self, source: Path, model: str, name: str, *, config: Path | None = None, tensor_parallel: int = 1
    ) -> IterationTimeModel: ...


Format = Literal["vidur", "llmservingsim", "aiconfigurator"]
IMPORTERS: Mapping[Format, Importer] = {
    "vidur": vidur.import_profile,
    "llmservingsim": llmservingsim.import_profile,
    "aiconfigurator": aiconfigurator.import_profile,
}


@dataclass(frozen=True, kw_only=True)
class Import(Options):
    """Build a calibration from a raw profile, as the shipped ones were built. It serves wherever a calibration's name does."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """The raw profile: a folder or file, as the format's module describes."""
    format: Format
    """Format of the profile."""
    model: Annotated[str, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: the one of --config)")] = ""
    """Which model, such as llama-2-7b; with --config, how to call that one."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """The config.json of a dense decoder, for formats whose profile holds kernels of any shape."""
    tensor_parallel: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """GPUs among which the model is divided."""
    name: Annotated[str, tyro.conf.arg(metavar="NAME")]
    """Name of the calibration."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The calibration: .npz (tables) or .json (coefficients); replaced."""


@dataclass(frozen=True, kw_only=True)
class Engine(Resumable):
    """Calibrate on a vLLM engine on this machine.

    Measures batches from coarse to fine, fits iteration-time models to whole engine steps and checks them on a workload they have not
    seen. Every point is on disk before the next.
    """

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """tiny or the name of another shape (no download), a Hugging Face id, or a folder."""
    set: Assignments = ()
    """engine.FIELD of llmsched_hardware.real_engine.EngineOptions."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json")]
    """The formula; tables go to FILE.npz, measured points to FILE.points.jsonl, the fit to traffic and its log to FILE.traffic.json and
    FILE.iterations.csv."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the file's)")] = None
    """Name of the calibration."""
    budget_seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 300.0
    """Finish within this many seconds."""
    max_batch: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: engine.max_num_seqs)")] = None
    """Most decodes in a batch."""
    sweeps: Annotated[int, tyro.conf.arg(metavar="N")] = SWEEPS
    """Passes through the plan."""
    held_out: Annotated[int, tyro.conf.arg(metavar="N")] = MOST
    """Requests of the check at the end; 0: the sweep alone, no traffic and no check."""

    @property
    def points(self) -> Path:
        """Where the measured points are."""
        return self.out.with_suffix(".points.jsonl")


def run_import(options: Import, screen: Screen) -> Outcome:
    """Read the profile, write the calibration."""
    check_file("--out", options.out)
    if not options.name.strip():
        raise ConfigError("--name: empty")
    if not options.source.exists():
        raise ConfigError(f"SOURCE: {options.source} does not exist")
    check_counts(tensor_parallel=options.tensor_parallel)
    read = IMPORTERS[options.format]
    model = read(options.source, options.model, options.name, config=options.config, tensor_parallel=options.tensor_parallel)
    suffix, data = calibration_bytes(model)
    if options.out.suffix != suffix:
        raise ConfigError(f"--out: {options.out}, must end in {suffix} for a {type(model).__name__}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(data)
    source = model.provenance
    screen.print(f"{options.out}: {len(data):,} bytes, {type(model).__name__}")
    for label, text in (("source", source.source), ("gpu", source.gpu), ("model", source.model), ("engine", source.engine)):
        screen.print(f"{label:<12} {text}")
    screen.print(f"{'valid range':<12} {source.valid_range}")
    screen.print(f"{'fit error':<12} {source.fit_error}")
    if source.num_blocks is not None:
        screen.print(f"{'KV capacity':<12} {source.num_blocks:,} blocks of {source.block_size} tokens")
    return Outcome({"calibration": options.out, "provenance": source})


def checked(options: Engine) -> EngineOptions:
    """The engine's settings, everything else checked.

    Raises:
        ConfigError: naming the option.
    """
    check_new_calibration(options.out, options.name, " (tables go to the same name with .npz)")
    if not (math.isfinite(options.budget_seconds) and options.budget_seconds > 0):
        raise ConfigError(f"--budget-seconds: {options.budget_seconds:g}, must be finite and > 0")
    check_counts(max_batch=options.max_batch, sweeps=options.sweeps)
    if options.held_out < 0:
        raise ConfigError(f"--held-out: {options.held_out}, must be >= 0")
    engine = engine_options(options.model, words(options.set))
    if options.max_batch is not None and options.max_batch > engine.max_num_seqs:
        raise ConfigError(f"--max-batch: {options.max_batch}, the engine holds {engine.max_num_seqs}; raise --set engine.max_num_seqs")
    return engine


def run_engine(options: Engine, screen: Screen) -> Outcome:
    """Sweep, fit, write, check on a workload that was held out, write again."""
    started = time.monotonic()
    engine = checked(options)
    resume = goes_on(options.points, options.points.exists(), resume=options.resume, overwrite=options.overwrite, what="points")
    for module in ("rich.progress", "scipy.optimize"):
        require(module, "cli")
    deadline = started + options.budget_seconds
    result = calibrate(
        engine,
        options.points,
        deadline=deadline,
        max_batch=options.max_batch,
        sweeps=options.sweeps,
        held_out=options.held_out > 0,
        resume=resume,
        progress=screen.progress,
    )
    name = options.name or options.out.stem
    write(result, name, options.out)  # whatever becomes of the engine that the workload needs
    until = deadline - 2 * result.build_seconds
    until = time.monotonic() + TRAFFIC_SHARE * (until - time.monotonic())
    if options.held_out and time.monotonic() < until:
        blocks = result.limits.num_blocks
        log = record_traffic(result.formula, result.options, blocks, until, screen.progress, options.out.with_suffix(".iterations.csv"))
        if log is not None and len(log) >= LEAST_ROWS:
            result = dataclasses.replace(result, traffic=fit_log(log, name))
            write(result, name, options.out)
    if options.held_out and time.monotonic() + result.build_seconds < deadline:
        held_out = hold_out(result.models, result.options, result.limits.num_blocks, deadline, screen.progress, options.held_out)
        result = dataclasses.replace(result, held_out=held_out)
        write(result, name, options.out)
    for line in report(result, options.out, options.points, time.monotonic() - started):
        screen.print(line)
    return Outcome(found(result, options))


def found(result: Calibrated, options: Engine) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "calibration": options.out,
        "tables": options.out.with_suffix(".npz"),
        "traffic": None if result.traffic is None else result.file_of("traffic", options.out),
        "best": result.best(),
        "points": len(result.sweep.points),
        "left_out": {str(probe): reason for probe, reason in result.sweep.left_out.items()},
        "machine": result.machine,
        "build_seconds": result.build_seconds,
        "held_out": result.held_out,
    }


Chosen = Import | Engine | FromLog | FromBench | Kernels


def chosen(
    subcommand: Annotated[
        Annotated[Import, tyro.conf.subcommand("import")]
        | Annotated[Engine, tyro.conf.subcommand("engine")]
        | Annotated[FromLog, tyro.conf.subcommand("from-log")]
        | Annotated[FromBench, tyro.conf.subcommand("from-bench")]
        | Annotated[Kernels, tyro.conf.subcommand("kernels")],
        tyro.conf.arg(name=""),
    ],
) -> Chosen:
    """Make a calibration: how long an iteration takes for a batch.

    From a raw profile, from the vLLM engine on this machine, from what an engine has logged of live traffic, or from a benchmark's results.

    The file that it writes is what --calibration of other commands names. kernels measures a raw profile, which import reads.
    """
    return subcommand


def run(options: Chosen, screen: Screen) -> Outcome:
    """Carry the chosen subcommand out."""
    if isinstance(options, Import):
        return run_import(options, screen)
    if isinstance(options, Engine):
        return run_engine(options, screen)
    if isinstance(options, FromLog):
        return run_from_log(options, screen)
    return run_from_bench(options, screen) if isinstance(options, FromBench) else run_kernels(options, screen)


COMMAND = Command[Any](
    "calibrate",
    chosen,
    run,
    "a calibration from a raw profile, a vLLM engine or its logs",
)
main = COMMAND.main
