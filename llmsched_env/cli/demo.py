"""``llmsched demo``: the two regimes of scheduling for inference side by side, each with who wins and why."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from llmsched_env.bench.comparison import SUMMARY_FILE, Comparison, Row, extrapolation_reported
from llmsched_env.bench.demo import REGIMES, Regime, comparison_of, why
from llmsched_env.bench.plots import Figure
from llmsched_env.bench.report import engine_lines, inline, print_table, render, settings_lines, table_lines
from llmsched_env.bench.tables import footnotes, short_footnotes
from llmsched_env.cli.compare import REPORT_FILE, Presented, draw, finished, presented
from llmsched_env.cli.frame import Command, Options, Outcome, Progress, Screen, check_counts
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_folder
from llmsched_env.parallel import start_workers
from llmsched_env.row_file import write_rows


@dataclass(frozen=True, kw_only=True)
class Demo(Options):
    """Two comparisons in under a minute: the paper's model near its stability boundary, and a conversation service at its memory limit.

    Prints a table of each and one sentence that says who wins at the highest rate and why, made of what was measured. Writes
    summary.csv, plots and one report.html.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/demo")
    """Where summary.csv, report.html and a folder of plots for each regime go."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """Seeds 0 .. N-1."""
    num_requests: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: what each regime needs to show)")] = None
    """Requests of one run."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores)")] = None
    """Processes."""
    overwrite: bool = False
    """Replace what an earlier run left in the folder."""


@dataclass(frozen=True)
class Shown:
    """What was found of one regime; ``sentence`` is empty where there is nothing to compare."""

    regime: Regime
    comparison: Comparison
    presented: Presented
    sentence: str
    figures: list[Figure] = field(default_factory=list)


def rows_of(comparison: Comparison, bar: Progress, jobs: int) -> list[Row]:
    """Every run of a comparison."""
    rows = []
    with extrapolation_reported(), closing(finished(comparison, comparison.tasks(), jobs=jobs, backend="loky")) as results:
        for row in results:
            rows.append(row)
            bar.advance(description=f"{row.scenario}: {row.policy} at {row.rate:g}, seed {row.seed}")
    return rows


def run(options: Demo, screen: Screen) -> Outcome:
    """Both regimes, their tables and sentences, then plots and the page."""
    for module in ("joblib", "matplotlib", "jinja2", "scipy", "rich"):
        require(module, "cli")
    check_counts(seeds=options.seeds, num_requests=options.num_requests, jobs=options.jobs)
    check_folder("--out", options.out)
    if (options.out / SUMMARY_FILE).exists() and not options.overwrite:
        raise ConfigError(f"--out: {options.out} holds results already; use --overwrite or another place")
    comparisons = {regime: comparison_of(regime, options.seeds, options.num_requests) for regime in REGIMES}
    jobs = start_workers("loky", options.jobs)
    found: dict[Regime, list[Row]] = {}
    with screen.progress(sum(len(comparison.tasks()) for comparison in comparisons.values())) as bar:
        for regime, comparison in comparisons.items():
            found[regime] = rows_of(comparison, bar, jobs)
    shown = [shown_of(regime, comparison, found[regime]) for regime, comparison in comparisons.items()]
    if not options.quiet:
        for one in shown:
            print_table(screen.console(), one.presented.table, f"{one.regime.title}: {one.comparison.num_requests:,} requests a run")
            screen.print(f"\n{one.sentence}\n")
    options.out.mkdir(parents=True, exist_ok=True)
    write_rows(options.out / SUMMARY_FILE, Row, [row for one in shown for row in one.presented.rows])
    for one in shown:
        folder = options.out / one.regime.key
        folder.mkdir(exist_ok=True)
        one.figures.extend(draw(one.comparison, one.presented, folder, jobs=jobs, backend="loky", over_time=True))
    write_page(options.out / REPORT_FILE, shown, screen.command)
    screen.print(f"Report: {options.out / REPORT_FILE}")
    return Outcome([{"regime": one.regime.key, "sentence": one.sentence, "rows": one.presented.rows} for one in shown])


def shown_of(regime: Regime, comparison: Comparison, rows: Sequence[Row]) -> Shown:
    own = presented(comparison, rows, complete=True, total=len(rows))
    reason = why(regime, own.rows)
    return Shown(regime, comparison, own, reason.sentence if reason else "")


def write_page(path: Path, shown: Sequence[Shown], command: str) -> None:
    """One page with all regimes; pictures are inside it."""
    cells = [cell for one in shown for cell in one.presented.table]
    render(
        path,
        "demo.html.j2",
        title="Scheduling policies in two regimes",
        command=command,
        regimes=[_section(one, command) for one in shown],
        known=sorted({cell.policy for cell in cells if cell.known_lengths}),
        overload=any(cell.overload for cell in cells),
    )


def _section(one: Shown, command: str) -> dict[str, Any]:
    table = one.presented.table
    return {
        "title": one.regime.title,
        "about": one.regime.about,
        "sentence": one.sentence,
        "table": table_lines(table),
        "footnotes": footnotes(table),
        "short_footnotes": short_footnotes(table),
        "figures": inline(one.figures),
        "settings": settings_lines(one.comparison, one.presented.rows, command),
        "engines": engine_lines(one.comparison),
    }


COMMAND = Command("demo", Demo, run, "the paper's regime and a service at its memory limit, in under a minute")
main = COMMAND.main
