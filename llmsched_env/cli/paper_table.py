"""``llmsched paper-table``: the page of the paper's linear model."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env import __version__
from llmsched_env.cli.frame import Command, Outcome, Resumable, Screen, check_counts
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file, check_folder, check_same_settings, goes_on, write_settings
from llmsched_env.markdown import write_page
from llmsched_env.pages.paper_model.page import by_line, claims, page
from llmsched_env.pages.paper_model.runs import Line, Run, lines, run_line
from llmsched_env.parallel import start_workers, unordered
from llmsched_env.row_file import RowFile

RUNS_FILE = "runs.csv"
SETTINGS_FILE = "settings.json"


@dataclass(frozen=True, kw_only=True)
class PaperTable(Resumable):
    """The linear-model experiments of arXiv 2504.11320 on our engine, over many seeds, as a table.

    Every run is kept in --results as it ends; the page is written when all of them are there.
    """

    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Seeds 0 .. N-1, at least 2: the table gives intervals."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores)")] = None
    """Processes."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("docs/paper-linear-model.md")
    """The page; replaced."""
    results: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/paper-linear-model")
    """Where finished runs are kept."""


def kept(options: PaperTable) -> bool:
    """Whether to go on from finished runs.

    Raises:
        ConfigError: they are there and nothing says what is to become of them, or they are of other experiments.
    """
    there = (options.results / RUNS_FILE).exists()
    keeps = {"resume": options.resume, "overwrite": options.overwrite}
    if not goes_on(options.results, there, what="finished runs", option="--results", **keeps):
        return False
    check_same_settings(options.results / SETTINGS_FILE, describe())
    return True


def describe() -> dict[str, object]:
    """What must agree between runs of one table; more seeds can be added to it."""
    found = {f"{line.label}, d0 = {line.d0:g}, C = {line.capacity}": line.describe() for line in lines()}
    return {"version": __version__, **found}


def finished(tasks: Sequence[tuple[Line, int]], jobs: int) -> Generator[Run]:
    """Runs as they end, in this process or from workers."""
    if jobs == 1:
        yield from (run_line(*task) for task in tasks)
        return
    results = unordered("loky", jobs, run_line, tasks)
    try:
        yield from results
    finally:
        results.close()


def run(options: PaperTable, screen: Screen) -> Outcome:
    """Run what is missing, then write the page."""
    for module in ("joblib", "rich", "scipy"):
        require(module, "cli")
    if options.seeds < 2:
        raise ConfigError(f"--seeds: {options.seeds}, must be >= 2, the table gives intervals")
    check_counts(jobs=options.jobs)
    check_file("--out", options.out)
    check_folder("--results", options.results)
    file = RowFile(options.results / RUNS_FILE, Run, resume=kept(options))
    start = time.perf_counter()
    wanted = [(line, seed) for line in lines() for seed in range(options.seeds)]
    done = {(row.line, row.seed) for row in file.rows}
    missing = [(line, seed) for line, seed in wanted if (line.key, seed) not in done]
    options.results.mkdir(parents=True, exist_ok=True)
    write_settings(options.results / SETTINGS_FILE, describe())
    with file, screen.progress(len(missing)) as bar:
        results = finished(missing, start_workers("loky", options.jobs))
        try:
            for row in results:
                file.append(row)
                bar.advance(description=f"{row.label}, d0 = {row.d0:g}, seed {row.seed}")
        finally:
            results.close()
    runs = by_line([row for row in file.rows if row.seed < options.seeds])
    text = page(runs, options.seeds)
    write_page(options.out, text)
    if not options.quiet:
        screen.print("\n".join(text))
    screen.print(f"{len(missing)} runs in {time.perf_counter() - start:.1f} s, {len(wanted) - len(missing)} kept -> {options.out}")
    return Outcome({"claims": claims(runs), "runs": [row for rows in runs.values() for row in rows]})


COMMAND = Command("paper-table", PaperTable, run, "write the page of the paper's linear model")
main = COMMAND.main
