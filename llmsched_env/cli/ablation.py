"""``llmsched ablation``: what each part of an agent's recipe is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_agents.checkpoint import load_checkpoint
from llmsched_agents.lookup import named_policy
from llmsched_env.bench.ablation import FIRST_SEED, LOADS, SEEDS, Plan, Run, candidates, fitting, run_cell
from llmsched_env.bench.suite import SUITE, Cell
from llmsched_env.cli.frame import Command, Outcome, Screen, check_counts
from llmsched_env.cli.selection import Selection
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file, check_same_settings, goes_on, write_settings
from llmsched_env.pages.results.ablation import section
from llmsched_env.parallel import start_workers, unordered
from llmsched_env.row_file import RowFile


@dataclass(frozen=True, kw_only=True)
class Ablate(Selection):
    """What each part of an agent's recipe is worth: variants with one part changed, on development seeds.

    Every variant runs in the same cells on the same requests. Figures are relative to the recipe with one constant level in place of
    its network; `llmsched evaluate` shows them on its page. Runs are kept beside --out cell by cell.
    """

    agent: Annotated[str, tyro.conf.arg(metavar="AGENT")]
    """Name of a shipped agent or folder of a checkpoint, with levels of the predicted peak."""
    loads: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X [X ...]")] = LOADS
    """Loads of the stationary part: shares of greedy FIFO's boundary."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = SEEDS
    """Seeds 100 .. 100 + N-1 of the tuning stream."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json")] = Path("results") / SUITE / "ablation.json"
    """The outcome; finished runs are kept beside it."""

    @property
    def runs(self) -> Path:
        """Finished runs, beside the outcome."""
        return self.out.with_suffix(".runs.csv")

    @property
    def settings(self) -> Path:
        """What these runs have in common."""
        return self.out.with_suffix(".settings.json")


def plan(options: Ablate, screen: Screen) -> tuple[Plan, RowFile[Run]]:
    """The ablation that the options ask for, and the file with the runs of its whole cells; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    check_counts(seeds=options.seeds, jobs=options.jobs)
    check_file("--out", options.out)
    named = named_policy(options.agent)
    if named.kind != "checkpoint":
        raise ConfigError(f"--agent: {options.agent!r} is no checkpoint, must be a shipped agent or a folder")
    agent = load_checkpoint(named.text, name=named.name)
    everyone = candidates(agent.recipe)
    cells = options.cells()
    there = options.runs.exists() or options.out.exists()
    resumed = goes_on(options.out, there, resume=options.resume, overwrite=options.overwrite, what="an ablation")
    bench = options.bench(cells, screen)
    chosen, left_out = fitting(everyone, agent, bench.setting(cells[0]))
    for name, reason in left_out.items():
        screen.say(f"left out: {name} with the network ({reason})")
    seeds = tuple(range(FIRST_SEED, FIRST_SEED + options.seeds))
    planned = Plan(bench, agent.name, named.digest(), agent.network, agent.deterministic, chosen, tuple(cells), seeds)
    if resumed and options.runs.exists():
        check_same_settings(options.settings, planned.settings())
    file = RowFile(options.runs, Run, resume=resumed)
    whole = planned.whole(file.rows)
    file.rows = [run for run in file.rows if run.cell in whole]
    return planned, file


def run_missing(plan: Plan, cells: Sequence[Cell], file: RowFile[Run], jobs: int, screen: Screen) -> None:
    """Run the cells, each on disk as it is there."""
    with file, screen.progress(len(cells)) as bar:
        results = unordered("loky", jobs, run_cell, [(plan, cell) for cell in cells])
        try:
            for runs in results:
                for run in runs:
                    file.append(run)
                bar.advance(description=runs[0].cell)
        finally:
            results.close()


def run(options: Ablate, screen: Screen) -> Outcome:
    """Run the cells that are missing, then the outcome of all."""
    for module in ("joblib", "scipy", "rich"):
        require(module, "cli")
    planned, file = plan(options, screen)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_settings(options.settings, planned.settings())
    done = {run.cell for run in file.rows}
    cells = [cell for cell in planned.in_order() if cell.key not in done]
    screen.say(f"{len(planned.chosen)} variants in {len(cells)} cells on {len(planned.seeds)} seeds")
    run_missing(planned, cells, file, start_workers("loky", options.jobs), screen)
    found = planned.ablation(file.rows)
    found.write(options.out)
    if not options.quiet:
        screen.print("\n".join(section(found, own=True)))
    screen.print(f"Ablation: {options.out}")
    return Outcome(found)


COMMAND = Command("ablation", Ablate, run, "what each part of an agent's recipe is worth")
main = COMMAND.main
