"""``llmsched predictions``: what predicted output lengths are worth, and how far to trust them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.predictions import Run, chosen_cells, run_seed
from llmsched_env.bench.suite import Bench
from llmsched_env.cli.frame import INTERRUPTED, Command, Outcome, Resumable, Screen, check_counts
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file, goes_on
from llmsched_env.markdown import write_page
from llmsched_env.pages.predictions.page import page
from llmsched_env.parallel import start_workers, unordered
from llmsched_env.row_file import RowFile


@dataclass(frozen=True, kw_only=True)
class PredictionOptions(Resumable):
    """What predicted output lengths are worth in cells of the suite, by the error of the predictor and how far it is trusted.

    Finished runs are kept beside --out, seed by seed of each cell; Ctrl-C keeps them.
    """

    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Seeds 0 .. N-1 of evaluation, at least 2."""
    num_requests: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the suite's)")] = None
    """Requests of one run."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores)")] = None
    """Processes."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.md")]
    """The page."""

    @property
    def runs(self) -> Path:
        """Finished runs, beside the page."""
        return self.out.with_suffix(".runs.csv")


def run(options: PredictionOptions, screen: Screen) -> Outcome:
    """Run what is missing, then write the page."""
    for module in ("joblib", "scipy"):
        require(module, "cli")
    check_counts(seeds=options.seeds, num_requests=options.num_requests, jobs=options.jobs)
    if options.seeds < 2:
        raise ConfigError(f"--seeds: {options.seeds}, must be at least 2: the table gives intervals")
    check_file("--out", options.out)
    there = options.runs.exists() or options.out.exists()
    resumed = goes_on(options.out, there, resume=options.resume, overwrite=options.overwrite, what="a measurement")
    bench = Bench(Boundaries.read(), options.num_requests)
    everything = [(cell, seed) for cell in chosen_cells() for seed in range(options.seeds)]
    file = RowFile(options.runs, Run, resume=resumed and options.runs.exists())
    done = {(one.cell, one.seed) for one in file.rows}
    missing = [(bench, cell, seed) for cell, seed in everything if (cell.key, seed) not in done]
    complete = True
    with file, screen.progress(len(missing)) as bar:
        results = unordered("loky", start_workers("loky", options.jobs), run_seed, missing)
        try:
            for runs in results:
                for one in runs:
                    file.append(one)
                bar.advance(description=f"{runs[0].cell}, seed {runs[0].seed}")
        except KeyboardInterrupt:
            complete = False
        finally:
            results.close()
    order = {cell.key: i for i, cell in enumerate(chosen_cells())}
    seeds = {(one.cell, one.seed) for one in file.rows}
    whole = [key for key in order if all((key, seed) in seeds for seed in range(options.seeds))]
    rows = [one for one in file.rows if one.cell in whole and one.seed < options.seeds]
    if not complete:
        screen.print("Go on with --resume; the page is of the cells that are whole.")
        if not whole:
            return Outcome(file.rows, INTERRUPTED)
    lines = page(sorted(rows, key=lambda one: order[one.cell]), screen.command)
    if not screen.quiet:
        screen.print("\n".join(lines))
    write_page(options.out, lines)
    return Outcome(rows, 0 if complete else INTERRUPTED)


COMMAND = Command("predictions", PredictionOptions, run, "what predicted output lengths are worth, and how far to trust them")
main = COMMAND.main
