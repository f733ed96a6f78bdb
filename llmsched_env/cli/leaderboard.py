"""``llmsched leaderboard``: submissions run again, claims held against what is measured, and the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.evaluation import Row, missing_tasks, run_cell
from llmsched_env.bench.leaderboard import REQUESTS, SEEDS, Entry, claims_text, page, plan_of, score
from llmsched_env.bench.submissions import Level, Submission, read_submission
from llmsched_env.bench.suite import Bench, Cell, cells
from llmsched_env.bench.variants import Variant, needed_boundaries
from llmsched_env.cli.frame import FAILED, Command, Options, Outcome, Screen, check_counts
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file
from llmsched_env.markdown import write_page
from llmsched_env.parallel import start_workers, unordered


@dataclass(frozen=True, kw_only=True)
class Leaderboard(Options):
    """Run submissions again on the suite bench-v2, compare what they claim with what is measured, and write the table.

    A claim that does not hold makes the exit code 1; a file that is no submission is refused before any run.
    """

    submissions: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE.toml [FILE.toml ...]", aliases=["--submission"])]
    """Files of submissions, as leaderboard/submissions/TEMPLATE.toml describes them."""
    full: bool = False
    """20 seeds and the suite's own numbers of requests, as the table has them; without it 3 seeds of 400 requests."""
    first_seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """The first evaluation seed; another one draws requests that nobody has tuned on."""
    cells: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CELL [CELL ...]", help_behavior_hint="(default: all)")] = ()
    """Only these cells, as stationary/azure-conv/40GB/1: for a look, not for the table."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores)")] = None
    """Processes."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.md", help_behavior_hint="(default: the screen alone)")] = None
    """The table in Markdown, replaced: leaderboard/TABLE.md."""

    @property
    def level(self) -> Level:
        return "full" if self.full else "quick"


@dataclass(frozen=True)
class Plan:
    """What runs, fully checked: by submission the variants of each cell."""

    bench: Bench
    submissions: Sequence[Submission]
    variants: Sequence[Mapping[Cell, Sequence[Variant]]]
    seeds: range


def chosen_cells(keys: Sequence[str]) -> list[Cell]:
    """The cells of the suite with these keys; all without any.

    Raises:
        ConfigError: a key that the suite does not have.
    """
    known = {cell.key: cell for cell in cells()}
    for key in keys:
        if key not in known:
            raise ConfigError(f"--cells: {key!r} is no cell of the suite (as {next(iter(known))}; there are {len(known)})")
    return [known[key] for key in dict.fromkeys(keys)] or list(known.values())


def plan(options: Leaderboard) -> Plan:
    """Read and check everything; nothing is run or written.

    Raises:
        ConfigError: an option, or a file that is refused.
    """
    check_counts(jobs=options.jobs)
    if options.first_seed < 0:
        raise ConfigError(f"--first-seed: {options.first_seed}, must be >= 0")
    if not options.submissions:
        raise ConfigError("--submissions: none given, must be at least one")
    if options.out is not None:
        check_file("--out", options.out)
        if options.cells:
            raise ConfigError(f"--out: {options.out}, must not be given with --cells: the table is of the whole suite")
    chosen = chosen_cells(options.cells)
    submissions = [read_submission(path) for path in dict.fromkeys(options.submissions)]
    names = [submission.name for submission in submissions]
    for path, name in zip(options.submissions, names, strict=False):
        if names.count(name) > 1:
            raise ConfigError(f"{path}: name: {name!r} is another submission's, too, must be its own")
    bench = Bench(Boundaries.read().completed(needed_boundaries(chosen)), REQUESTS[options.level])
    variants = []
    for path, submission in zip(dict.fromkeys(options.submissions), submissions, strict=True):
        try:
            variants.append(plan_of(submission, bench, chosen))
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
    return Plan(bench, submissions, variants, range(options.first_seed, options.first_seed + SEEDS[options.level]))


def run_all(made: Plan, jobs: int, screen: Screen) -> list[Row]:
    """Every run once, greedy FIFO too however many submissions stand beside it."""
    together: dict[Cell, list[Variant]] = {}
    for own in made.variants:
        for cell, variants in own.items():
            together.setdefault(cell, []).extend(v for v in variants if v not in together.get(cell, ()))
    tasks = missing_tasks(made.bench, together, made.seeds, ())
    rows: list[Row] = []
    with screen.progress(len(tasks)) as bar:
        results = unordered("loky", jobs, run_cell, tasks)
        try:
            for found in results:
                rows.extend(found)
                bar.advance(description=f"{found[0].cell}, seed {found[0].seed}")
        finally:
            results.close()
    return rows


def run(options: Leaderboard, screen: Screen) -> Outcome:
    """Run everything, say what holds, write the table."""
    for module in ("joblib", "rich", "scipy"):
        require(module, "cli")
    made = plan(options)
    rows = run_all(made, start_workers("loky", options.jobs), screen)
    entries = [Entry(s, options.level, score(own, rows)) for s, own in zip(made.submissions, made.variants, strict=True)]
    for entry in entries:
        screen.print(described(entry))
        for verdict in entry.verdicts:
            word = "holds" if verdict.holds else "does not hold"
            screen.print(f"  {verdict.figure}: {verdict.claimed:g} claimed, {verdict.measured:.4g} measured: {word}")
    if options.out is not None:
        write_page(options.out, page(entries, options.level, options.first_seed, screen.command))
        screen.print(f"Table: {options.out}")
    found = [{"name": e.submission.name, "score": e.score, "verdicts": e.verdicts, "holds": e.holds} for e in entries]
    return Outcome(found, 0 if all(entry.holds for entry in entries) else FAILED)


def described(entry: Entry) -> str:
    """A line of the screen."""
    own = entry.score
    interval = f" [{own.speedup.low:.3f}, {own.speedup.high:.3f}]" if own.speedup.low == own.speedup.low else ""
    return (
        f"{entry.submission.name}: speed-up {own.speedup.value:.3f}{interval}, P99 speed-up {own.p99_speedup.value:.3f}, worst cell "
        f"{own.worst_cell:.3f} ({own.worst}), SLO goodput {own.slo_goodput:.3f}; {own.cells} cells, {own.seeds} seeds, level "
        f"{entry.level}; claims: {claims_text(entry)}"
    )


COMMAND = Command("leaderboard", Leaderboard, run, "run submissions again and compare what they claim")
main = COMMAND.main
