"""``llmsched replay``: one trace under one policy, a row for each request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llmsched_agents.lookup import named_policy, option_owners
from llmsched_baselines.overrides import parse_overrides, with_calibration
from llmsched_env.bench.replay import IterationRows, Preset, Replay, prepared, summary_lines, write
from llmsched_env.cli.frame import DONE, FAILED, Assignments, Command, Options, Outcome, Screen, words
from llmsched_env.cli.trace_options import TraceOptions
from llmsched_env.engine_config import EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.files import check_file
from llmsched_env.metrics import Summary, lost
from llmsched_env.runner import EpisodeResult

MOST_ITERATIONS = 2**62


@dataclass(frozen=True, kw_only=True)
class ReplayTrace(TraceOptions, Options):
    """Replay a trace under one policy: exactly its requests, a row for each.

    Policies that use rates and length statistics (thresholds, reservations) take them from the trace itself. A `type` column, where
    there is one, gives the class. Times count from the first arrival. Nothing is written unless the replay ends. What --out holds can
    be replayed in turn, with the same result.

    Exit code: 0; 1 where requests were left that no option excludes (the limit of --max-iterations, files written); 2 where the
    replay was refused.
    """

    trace: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """CSV or JSON lines, may be gzipped."""
    policy: Annotated[str, tyro.conf.arg(metavar="POLICY")]
    """Name of a policy or shipped agent, folder of a checkpoint, or module:attribute."""
    engine: Literal["vllm", "paper"] = "vllm"
    """Engine preset."""
    set: Assignments = ()
    """engine.FIELD (also engine.d0, engine.d1: a linear time model; engine.time_model: a calibration) or policy.OPTION."""
    calibration: Annotated[str | None, tyro.conf.arg(metavar="FILE_OR_NAME", help_behavior_hint="(default: the engine's own)")] = None
    """Time model and, where it states it, KV capacity; NAME:clip holds tables at their edge values."""
    rate: Annotated[float | None, tyro.conf.arg(metavar="R", help_behavior_hint="(default: the trace's own)")] = None
    """Rescale time to R requests/s."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """CSV, one row a request; replaced."""
    iterations: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """CSV, one row an iteration (kv_used: tokens or blocks); replaced."""
    no_drain: bool = False
    """End where the policy schedules nothing after the last arrival."""
    horizon: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = math.inf
    """End this long after the first arrival."""
    max_iterations: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: more than the trace's tokens need)")] = (
        None
    )
    """Most steps before the replay is cut off."""


@dataclass(frozen=True)
class Found:
    """What a replay found, for ``--json``."""

    policy: str
    known_lengths: bool
    notes: str
    trace: Path
    dropped: int
    reordered: int
    summary: Summary
    wall_seconds: float


def plan(options: ReplayTrace) -> Replay:
    """The replay that the options ask for, fully checked; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out, a trace that cannot be read or served.
    """
    policy = named_policy(options.policy)
    if options.rate is not None and not (math.isfinite(options.rate) and options.rate > 0):
        raise ConfigError(f"--rate: {options.rate:g}, must be finite and > 0 requests/s")
    if options.max_iterations is not None and not 1 <= options.max_iterations <= MOST_ITERATIONS:
        raise ConfigError(f"--max-iterations: {options.max_iterations}, must be an integer from 1 to 2**62")
    set_here = parse_overrides(words(options.set), option_owners({policy.name: policy}), exclude_engine=("preset",))
    overrides = with_calibration(set_here, options.calibration)
    limits = EpisodeLimits(drain=not options.no_drain, horizon=options.horizon)
    check_files(options)
    scenario = options.read(options.trace, options.rate)
    preset: Preset = options.engine
    return prepared(scenario, policy, preset=preset, overrides=overrides, limits=limits, max_iterations=options.max_iterations)


def check_files(options: ReplayTrace) -> None:
    """Refuse files that cannot be written, or that would replace the trace or each other.

    Raises:
        ConfigError: naming the option.
    """
    for option, path in (("--out", options.out), ("--iterations", options.iterations)):
        if path is None:
            continue
        check_file(option, path)
        if path.suffix == ".gz":
            raise ConfigError(f"{option}: {path} would hold plain CSV, must not be named .gz")
        if path.resolve() == options.trace.resolve():
            raise ConfigError(f"{option}: {path} is the trace itself")
    if options.iterations is not None and options.iterations.resolve() == options.out.resolve():
        raise ConfigError(f"--iterations: {options.iterations} is also --out")


def unserved(options: ReplayTrace, replay: Replay, result: EpisodeResult, screen: Screen) -> int:
    """Say what was not served and why; the exit code."""
    log, end = result.log, result.counters.end
    rejected, left = int(log.rejected.sum()), int(lost(log).sum())
    if rejected:
        longest = replay.policy.engine.longest_request
        screen.note(f"note: {rejected} of {len(log)} requests were rejected, longer than {longest} tokens")
    if not left:
        return DONE
    text = f"{left} of {len(log)} requests were never served"
    if end == "horizon" or (end == "stranded" and options.no_drain):
        screen.note(f"note: {text} ({'--horizon' if end == 'horizon' else '--no-drain'})")
        return DONE
    if end == "max_iterations":
        text += f": the replay was cut off after {replay.limits.max_iterations} iterations; --max-iterations raises the limit"
    else:
        text += f": the replay ended as {end}"
    screen.note(f"error: {text}")
    return FAILED


def run(options: ReplayTrace, screen: Screen) -> Outcome:
    """Serve the trace, write the rows, say what came of it."""
    replay = plan(options)
    if replay.note:
        screen.note(replay.note)
    collected = IterationRows() if options.iterations is not None else None
    result = replay.run(collected)
    steps = (options.iterations, collected) if options.iterations is not None and collected is not None else None
    write(options.out, result, replay.types, steps)
    if not options.quiet:
        for name, text in summary_lines(replay, result):
            screen.print(f"{name:<12} {text}")
    policy, trace = replay.policy, replay.trace
    found = Found(
        policy=policy.name,
        known_lengths=policy.known_lengths,
        notes=policy.notes,
        trace=options.trace,
        dropped=trace.dropped,
        reordered=trace.reordered,
        summary=result.summary,
        wall_seconds=result.wall_seconds,
    )
    return Outcome(found, unserved(options, replay, result, screen))


COMMAND = Command("replay", ReplayTrace, run, "serve a trace under one policy, a row a request")
main = COMMAND.main
