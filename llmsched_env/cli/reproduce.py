"""``llmsched reproduce``: the page with the paper's results on this project's engine."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.cli.frame import Command, Outcome, Progress, Resumable, Screen, check_counts
from llmsched_env.errors import ConfigError, did_you_mean, require
from llmsched_env.files import check_file, check_folder, goes_on
from llmsched_env.markdown import write_page
from llmsched_env.pages.reproduction.lab import Lab, Section
from llmsched_env.pages.reproduction.page import SECTIONS, page
from llmsched_env.parallel import start_workers


@dataclass(frozen=True, kw_only=True)
class Reproduce(Resumable):
    """The results of arXiv 2504.11320, reproduced on this project's engine, as a page with plots.

    All of it, at least 10 seeds, takes under an hour on 2 cores; with --quick under five minutes. Every configuration keeps its result
    in --results, in a file named after a hash of the configuration.
    """

    quick: bool = False
    """Fewer seeds, rates and requests."""
    only: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="PART [PART ...]", help=f"Only these parts: {', '.join(SECTIONS)}.", help_behavior_hint="(default: all)"),
    ] = ()
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("docs/reproduction.md")
    """The page; plots go to figures/ beside it. Replaced."""
    results: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/reproduction")
    """Where finished configurations are kept."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores)")] = None
    """Processes."""


def check(options: Reproduce) -> None:
    """Refuse what cannot be carried out, before any work.

    Raises:
        ConfigError: an option, or finished configurations of which nothing says what is to become.
    """
    for part in options.only:
        if part not in SECTIONS:
            raise ConfigError(f"--only: {part!r} is no part{did_you_mean(part, SECTIONS)} (parts: {', '.join(SECTIONS)})")
    check_counts(jobs=options.jobs)
    check_file("--out", options.out)
    check_folder("--results", options.results)
    there = any(options.results.glob("*.json"))
    keeps = {"resume": options.resume, "overwrite": options.overwrite}
    goes_on(options.results, there, what="finished configurations", option="--results", **keeps)


def sections_of(options: Reproduce, lab: Lab, bar: Progress, parts: Sequence[str]) -> list[Section]:
    """Run what is missing of each part; the bar counts configurations of what is being run."""
    found = []
    for number, part in enumerate(parts, start=1):
        lab.progress = lambda label, done, total, number=number: bar.show(f"{number}/{len(parts)} {label}", done, total)
        found.append(SECTIONS[part](lab))
    return found


def run(options: Reproduce, screen: Screen) -> Outcome:
    """Run what is missing, then write the page."""
    for module in ("joblib", "matplotlib", "rich", "scipy"):
        require(module, "cli")
    check(options)
    if options.overwrite:
        for file in options.results.glob("*.json"):
            file.unlink()
    start = time.perf_counter()
    parts = [part for part in SECTIONS if not options.only or part in options.only]
    lab = Lab(options.results, options.out.parent / "figures", quick=options.quick, jobs=start_workers("loky", options.jobs))
    with screen.progress(1) as bar:
        sections = sections_of(options, lab, bar, parts)
    chosen = [*(["--quick"] if options.quick else []), *(["--only", *options.only] if options.only else [])]
    write_page(options.out, page(sections, lab, shlex.join(["python", "scripts/reproduce.py", *chosen])))
    seconds = time.perf_counter() - start
    read = len(lab.seconds) - lab.computed
    screen.print(f"{lab.computed} configurations run, {read} read from {options.results}, {seconds:.0f} s -> {options.out}")
    facts = {name: value for section in sections for name, value in section.facts.items()}
    return Outcome({"claims": [claim for section in sections for claim in section.claims], "facts": facts})


COMMAND = Command("reproduce", Reproduce, run, "reproduce the paper's results, as a page with plots")
main = COMMAND.main
