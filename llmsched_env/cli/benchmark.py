"""``llmsched benchmark``: the speed of the simulator on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.cli.frame import Command, Options, Outcome, Screen, check_counts
from llmsched_env.errors import MissingExtraError, install_command
from llmsched_env.files import check_file
from llmsched_env.markdown import write_page
from llmsched_env.pages.performance.environments import cartpole_speed
from llmsched_env.pages.performance.figure import Figure, machine
from llmsched_env.pages.performance.page import PARTS, page


@dataclass(frozen=True, kw_only=True)
class Benchmark(Options):
    """Speed of the simulator, each figure beside its yardstick in the same run.

    A figure is the median of repeated measurements; batch sizes stand beside it. Minutes on two cores that nobody else uses. Needs the
    extra agents (torch, stable-baselines3), with which one of the figures trains.
    """

    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: standard output alone)")] = None
    """Write the page here too; replaced."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """Measurements of which the median counts."""


def check(options: Benchmark) -> None:
    """Refuse what would fail after minutes.

    Raises:
        ConfigError: a count or a file.
        MissingExtraError: what one of the figures trains with is not installed.
    """
    check_counts(repeats=options.repeats)
    for option, path in (("--out", options.out), ("--json", options.json)):
        if path is not None and str(path) != "-":
            check_file(option, path)
    for package in ("torch", "stable-baselines3"):  # not imported: PyTorch's threads would run beside what is measured
        try:
            version(package)
        except PackageNotFoundError as error:
            raise MissingExtraError(f"{package} is not installed; run: {install_command('agents')}") from error


def run(options: Benchmark, screen: Screen) -> Outcome:
    """Measure every part, then write the page."""
    check(options)
    figures: list[Figure] = []
    before = cartpole_speed(options.repeats)
    for name, measure in PARTS.items():
        screen.say(f"{name} ...")  # a bar would draw itself beside what is measured
        figures += measure(options.repeats)
    after = cartpole_speed(options.repeats)
    lines = page(figures, (before, after))
    if options.out is not None:
        write_page(options.out, lines)
    if not options.quiet:
        screen.print("\n".join(lines))
    return Outcome({"machine": machine(), "figures": [figure.describe() for figure in figures]})


COMMAND = Command("benchmark", Benchmark, run, "measure the simulator's speed on this machine")
main = COMMAND.main
