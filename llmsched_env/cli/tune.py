"""``llmsched tune``: every baseline's parameters in every cell of the suite, on seeds that evaluation never sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_baselines import policy_class
from llmsched_env.bench.suite import MOVING, PAIRS, Cell, cells
from llmsched_env.bench.tuned import Search, TunedFile, searches
from llmsched_env.bench.tuning import GRIDS, TRIALS, Tuned
from llmsched_env.cli.frame import Command, Outcome, Screen, check_counts
from llmsched_env.cli.selection import NAMES, Selection
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file, goes_on
from llmsched_env.parallel import start_workers, unordered

SEEDS = 4


@dataclass(frozen=True, kw_only=True)
class Tune(Selection):
    """Tune every baseline's parameters in every cell of the suite, on seeds that evaluation never sees.

    Each policy with parameters gets the same number of trials. The file holds one entry a search and is written anew after each.
    With --resume the searches that it lacks are made; those that it holds must have had the same --trials, --seeds and --num-requests.
    """

    policies: Annotated[tuple[str, ...], NAMES] = tuple(GRIDS)
    """Policies to tune; all is every policy that has parameters."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = SEEDS
    """Tuning seeds 0 .. N-1."""
    trials: Annotated[int, tyro.conf.arg(metavar="N")] = TRIALS
    """Parameters tried for each policy and cell."""
    together: bool = False
    """One set of parameters for all the selected cells of the non-stationary part."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json")]
    """The file of tuned parameters."""


def chosen_cells(options: Tune) -> list[Cell]:
    """The cells to tune in.

    Raises:
        ConfigError: none, or with ``--together`` none of the non-stationary part.
    """
    if not options.together:
        return options.cells()
    chosen = cells([part for part in options.parts if part != "stationary"], options.scenarios, options.kv, options.loads)
    if not chosen:
        kinds = f"parts {', '.join(MOVING)} of {', '.join(PAIRS)}"
        raise ConfigError(f"--together: no cell of the non-stationary part is selected ({kinds})")
    return chosen


def plan(options: Tune, screen: Screen) -> tuple[TunedFile, list[Search]]:
    """The file to go on with, and the searches that it lacks; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out, or a search that the file holds with other settings.
    """
    check_counts(seeds=options.seeds, trials=options.trials, jobs=options.jobs)
    for name in options.policies:
        policy_class(name)
        if name not in GRIDS:
            raise ConfigError(f"--policies: {name!r} has nothing to tune (known: {', '.join(GRIDS)})")
    check_file("--out", options.out)
    chosen = chosen_cells(options)
    there = options.out.exists()
    resumed = goes_on(options.out, there, resume=options.resume, overwrite=options.overwrite, what="tuned parameters")
    kept = TunedFile.read(options.out) if resumed else TunedFile({})
    bench = options.bench(chosen, screen)
    asked = searches(bench, chosen, options.policies, seeds=options.seeds, trials=options.trials, together=options.together)
    kept.check_same(options.out, asked)
    return kept, [search for search in asked if not kept.holds(search)]


def run_searches(options: Tune, kept: TunedFile, tasks: Sequence[Search], jobs: int, screen: Screen) -> list[Tuned]:
    """Make the searches, the file written anew after each; Ctrl-C leaves it with those that are finished."""
    made = []
    with screen.progress(len(tasks)) as bar:
        results = unordered("loky", jobs, Search.run, [(task,) for task in tasks])
        try:
            for found in results:
                kept.entries[found.cell, found.policy] = found
                kept.write(options.out)
                made.append(found)
                bar.advance(description=f"{found.cell} {found.policy}: {found.value:.4g}")
        finally:
            results.close()
    return made


def described(found: Tuned) -> str:
    """A line about a search."""
    change = "" if found.default_value == found.value else f" (default {found.default_value:.4g})"
    return f"{found.cell} {found.policy}: {found.objective} {found.value:.4g}{change} at {found.options}"


def run(options: Tune, screen: Screen) -> Outcome:
    """Make what searches are missing."""
    for module in ("joblib", "rich"):
        require(module, "cli")
    kept, tasks = plan(options, screen)
    if options.overwrite:
        options.out.unlink(missing_ok=True)
    over = f", each over {len(tasks[0].cells)} cells" if options.together and tasks else ""
    screen.say(f"{len(tasks)} searches of {options.trials} trials on {options.seeds} seeds each{over}")
    made = run_searches(options, kept, tasks, start_workers("loky", options.jobs), screen)
    if not options.quiet:
        for found in made:
            screen.print(described(found))
    screen.print(f"Tuned parameters: {options.out}")
    return Outcome(made)


COMMAND = Command("tune", Tune, run, "tune the baselines in the suite's cells")
main = COMMAND.main
