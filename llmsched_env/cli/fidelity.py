"""``llmsched fidelity``: the page that measures the simulator against data that are not ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.cli.frame import Command, Options, Outcome, Screen
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.files import check_file
from llmsched_env.markdown import write_page
from llmsched_env.pages.fidelity.evidence import MISSED, Paths, folder_of
from llmsched_env.pages.fidelity.page import PARTS, page
from llmsched_env.pages.fidelity.recorded_prompts import PROMPTS, PROMPTS_SOURCE, write_prompts
from llmsched_env.pages.fidelity.recorded_run import RTX4090, read_run

WHAT = tyro.conf.create_mutex_group(required=False, title="what to make")


@dataclass(frozen=True, kw_only=True)
class Fidelity(Options):
    """How true the simulator is, as a page: every part measured against data that are not ours.

    The raw data lie in the folders that LLMSCHED_CALIBRATION, LLMSCHED_PEERS and LLMSCHED_TRACES name.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("docs/fidelity.md")
    """The page; replaced."""
    parts: Annotated[
        tuple[str, ...],
        WHAT,
        tyro.conf.arg(metavar="PART [PART ...]", help=f"Only these parts: {', '.join(PARTS)}.", help_behavior_hint="(default: all)"),
    ] = ()
    make_prompts: Annotated[
        Path | None,
        WHAT,
        tyro.conf.arg(
            metavar="WORKLOAD",
            help=f"Make {PROMPTS.name} again and no page; WORKLOAD is {PROMPTS_SOURCE}.",
            help_behavior_hint="(default: the page)",
        ),
    ] = None


def run(options: Fidelity, screen: Screen) -> Outcome:
    """Measure the parts asked for and write the page, or make the table of prompts."""
    if options.make_prompts is not None:
        recorded = read_run(RTX4090, folder_of("traces"))
        made = write_prompts(options.make_prompts, recorded.workload_sha256, recorded.engine.block_size)
        screen.print(f"{made}: made from {options.make_prompts}")
        return Outcome({"made": made})
    for name in options.parts:
        if name not in PARTS:
            raise ConfigError(f"--parts: {name!r} is no part{did_you_mean(name, PARTS)} (parts: {', '.join(PARTS)})")
    check_file("--out", options.out)
    lines = page(Paths.find(), options.parts or list(PARTS), lambda name: screen.say(f"{name} ..."))
    write_page(options.out, lines)
    missed = [line for line in lines if MISSED in line]
    screen.print(f"{options.out}: {len(lines)} lines, bars missed: {len(missed)}")
    for line in missed:
        screen.print(line)
    return Outcome({"out": options.out, "missed": missed})


COMMAND = Command("fidelity", Fidelity, run, "measure the simulator against data that are not ours")
main = COMMAND.main
