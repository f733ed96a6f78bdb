"""``llmsched film``: a run as a GIF, an MP4 or one picture."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_agents.lookup import named_policies, option_owners
from llmsched_baselines.overrides import parse_overrides, with_calibration
from llmsched_env.bench.comparison import Comparison, Task, extrapolation_reported
from llmsched_env.bench.film import frames
from llmsched_env.cli.frame import Assignments, Command, Options, Outcome, Progress, Screen, check_counts, words
from llmsched_env.cli.trace_options import TraceOptions
from llmsched_env.errors import ConfigError
from llmsched_env.files import check_file
from llmsched_env.render.film import Frame, check_film, write_film
from llmsched_env.render.viewer import SIZE, checked_size
from llmsched_env.workload import load_scenario

WORKLOAD = tyro.conf.create_mutex_group(required=True, title="workload")


@dataclass(frozen=True, kw_only=True)
class Film(TraceOptions, Options):
    """Draw one run of a policy: KV memory, queues, decisions, latency and their course, as a film or one picture.

    Frames come at even times of the engine. Needs the extra `render`.
    """

    scenario: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(this or --trace)"), WORKLOAD] = None
    """A scenario that ships, is registered or offered by a package, or a .toml file."""
    trace: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(this or --scenario)"), WORKLOAD] = None
    """A trace instead of a scenario; --rate rescales its time."""
    policy: Annotated[str, tyro.conf.arg(metavar="POLICY")]
    """Name of a policy or shipped agent, folder of a checkpoint, or module:attribute."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """.gif (repeats), .mp4, or .png: the last frame alone; replaced."""
    rate: Annotated[float | None, tyro.conf.arg(metavar="R", help_behavior_hint="(default: the workload's own)")] = None
    """Arrival rate, requests/s."""
    num_requests: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the workload's own)")] = None
    """Requests of the run."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """Seed of the requests."""
    until: Annotated[float, tyro.conf.arg(metavar="SECONDS", help_behavior_hint="(default: the end of the run)")] = math.inf
    """Time of the engine after which the film ends."""
    every: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 0.5
    """Time of the engine from a frame to the next."""
    fps: Annotated[float, tyro.conf.arg(metavar="F")] = 20.0
    """Frames per second of the film."""
    size: Annotated[tuple[int, int], tyro.conf.arg(metavar="WIDTH HEIGHT")] = SIZE
    """Of a frame, pixels; the picture is made for 800 480 and its multiples."""
    set: Assignments = ()
    """engine.FIELD or policy.NAME.OPTION."""
    calibration: Annotated[str | None, tyro.conf.arg(metavar="FILE_OR_NAME", help_behavior_hint="(default: the engine's own)")] = None
    """Time model and, where it states it, KV capacity; NAME:clip holds tables at their edge values."""


@dataclass(frozen=True)
class Found:
    """What a film is of, for ``--json``."""

    policy: str
    scenario: str
    rate: float
    seed: int
    frames: int
    out: Path


def plan(options: Film) -> tuple[Comparison, Task]:
    """The run that the options ask for, fully checked; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out.
        MissingExtraError: the extra ``render`` is not installed.
    """
    if options.rate is not None:
        check_above("--rate", options.rate, math.inf)
    check_above("--every", options.every, math.inf)
    check_above("--until", options.until, math.inf, closed=True)
    check_above("--fps", options.fps, 50.0, closed=True)
    check_counts(num_requests=options.num_requests)
    if options.seed < 0:
        raise ConfigError(f"--seed: {options.seed}, must be >= 0")
    width, height = checked_size("--size", options.size)
    if options.out.suffix.lower() == ".mp4" and (width % 2 or height % 2):
        raise ConfigError(f"--size: {width} {height}, must be even numbers for an .mp4")
    check_film("--out", options.out)
    check_file("--out", options.out)
    policies = named_policies("--policy", [options.policy])
    overrides = with_calibration(parse_overrides(words(options.set), option_owners(policies)), options.calibration)
    workload = options.read(options.trace, options.rate) if options.trace is not None else load_scenario(options.scenario or "")
    rate = options.rate or workload.rate
    comparison = Comparison(
        scenario=workload,
        policies=policies,
        rates=(rate,),
        seeds=(options.seed,),
        num_requests=options.num_requests or workload.num_requests,
        overrides=overrides,
        source="" if options.trace is None else str(options.trace),
    )
    comparison.check()
    return comparison, Task(next(iter(policies)), rate, options.seed)


def check_above(option: str, value: float, most: float, *, closed: bool = False) -> None:
    """Refuse what is not above 0, or above ``most`` (or equal to it, where it is not ``closed``).

    Raises:
        ConfigError: naming the option.
    """
    if not (0 < value < most or (closed and value == most)):
        raise ConfigError(f"{option}: {value:g}, must be > 0" + ("" if most == math.inf else f" and <= {most:g}"))


def counted(drawn: Iterator[Frame], bar: Progress) -> Iterator[Frame]:
    for frame in drawn:
        bar.advance(description="drawing")
        yield frame


def run(options: Film, screen: Screen) -> Outcome:
    """Draw the run into the file."""
    comparison, task = plan(options)
    total = comparison.workload(task.rate, task.seed).arrival[-1]
    expected = math.ceil(min(float(total), options.until) / options.every) + 1
    options.out.absolute().parent.mkdir(parents=True, exist_ok=True)
    beside = options.out.with_name(f".{os.getpid()}.{options.out.name}")  # takes the place of the file when it is whole
    every = math.inf if options.out.suffix.lower() == ".png" else options.every
    drawn = frames(comparison, task, every=every, until=options.until, size=options.size)
    try:
        with extrapolation_reported(), screen.progress(expected) as bar:
            count = write_film(beside, counted(drawn, bar), options.fps)
        beside.replace(options.out)
    finally:
        beside.unlink(missing_ok=True)
    screen.print(f"{options.out}: {count} frames" if count > 2 else f"{options.out}")
    return Outcome(Found(task.policy, comparison.scenario.name, task.rate, task.seed, count, options.out))


COMMAND = Command("film", Film, run, "one run as a GIF, an MP4 or a picture")
main = COMMAND.main
