"""``llmsched zoo``: hyper-parameters of PPO for each named environment, for rl_zoo3, searched or trained again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_agents.zoo import ZOO_FILES, ZOO_FOLDER, ZooEntry, read_zoo, zoo_text
from llmsched_env.bench.zoo import (
    CANDIDATES,
    FINALISTS,
    SHORT_STEPS,
    STEPS,
    TASKS,
    ZooPlan,
    ZooResult,
    ZooRow,
    ZooTask,
    chosen_candidate,
    result,
    tasks_named,
)
from llmsched_env.cli.frame import INTERRUPTED, Command, Outcome, Resumable, Screen, check_counts
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file, check_folder, check_same_settings, goes_on, replacing, write_settings
from llmsched_env.markdown import write_page
from llmsched_env.pages.hyperparameters.page import page
from llmsched_env.row_file import RowFile

ROWS_FILE, SETTINGS_FILE = "trainings.csv", "settings.json"
HEADING = """Hyper-parameters of PPO for rl_zoo3, one entry an environment{of}, written by `llmsched zoo`.
What was tried, and what each entry reaches, stands in docs/hyperparameters.md.

  python -m rl_zoo3.train --algo ppo --env LLMSched-v1 --gym-packages llmsched_env --conf-file {name}{evaluated}"""


@dataclass(frozen=True, kw_only=True)
class Zoo(Resumable):
    """Search hyper-parameters of PPO in each named environment and say what the chosen ones reach on seeds that the search never saw.

    Every training is a row of OUT/trainings.csv as soon as it is finished; --resume makes those that are missing.
    """

    environments: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="ID [ID ...]",
            help=f"Of {', '.join(task.name for task in TASKS)}.",
            help_behavior_hint="(default: all)",
        ),
    ] = ()
    shipped: bool = False
    """Search nothing: train the entries that ship."""
    short_steps: Annotated[int, tyro.conf.arg(metavar="N")] = SHORT_STEPS
    """Decisions of a training in the first round of the search."""
    steps: Annotated[int, tyro.conf.arg(metavar="N")] = STEPS
    """Decisions of a training in the second round and at the end; with --shipped the entry says."""
    episodes: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Episodes of the table, at least 2."""
    trainings: Annotated[int, tyro.conf.arg(metavar="N")] = 2
    """Trainings of the chosen entry at the end, each with another seed."""
    candidates: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME [NAME ...]", help=f"Of {', '.join(CANDIDATES)}.", help_behavior_hint="(default: all)"),
    ] = ()
    finalists: Annotated[int, tyro.conf.arg(metavar="N")] = FINALISTS
    """Candidates that go on to the second round; with 1 there is none."""
    threads: Annotated[int, tyro.conf.arg(metavar="N")] = 1
    """Threads of PyTorch; the environments use as many as there are processors."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the rows are kept."""
    page: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the table on the screen alone)")] = None
    """The page; replaced."""
    machine: Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: nothing)")] = ""
    """A sentence of the page on where the times were measured, and what ran beside."""
    hyperparams: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: not written)")] = None
    """A folder for the zoo's files with what was chosen; entries of other environments stay as they are."""


def shipped_entry(task: ZooTask) -> ZooEntry:
    """The entry that ships for a task.

    Raises:
        ConfigError: there is none.
    """
    path = ZOO_FOLDER / ZOO_FILES[task.action_set]
    found = read_zoo(path)
    if task.environment.id not in found:
        raise ConfigError(f"--shipped: {path.name} has no entry {task.environment.id} (entries: {', '.join(found) or 'none'})")
    return found[task.environment.id]


def plan(options: Zoo) -> tuple[ZooPlan, list[ZooTask], dict[str, ZooEntry], bool]:
    """The amounts, the tasks, the entries that ship where they are asked for, and whether rows are there to go on with.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    check_counts(
        short_steps=options.short_steps,
        steps=options.steps,
        trainings=options.trainings,
        threads=options.threads,
        finalists=options.finalists,
    )
    for name in options.candidates:
        if name not in CANDIDATES:
            raise ConfigError(f"--candidates: {name!r}, must be among {', '.join(CANDIDATES)}")
    if options.episodes < 2:
        raise ConfigError(f"--episodes: {options.episodes}, must be at least 2: the table gives intervals")
    if options.shipped and options.hyperparams is not None:
        raise ConfigError("--hyperparams: nothing is chosen with --shipped, must not be given")
    tasks = tasks_named(options.environments)
    entries = {task.name: shipped_entry(task) for task in tasks} if options.shipped else {}
    check_folder("--out", options.out)
    if options.page is not None:
        check_file("--page", options.page)
    if options.hyperparams is not None:
        check_folder("--hyperparams", options.hyperparams)
    amounts = ZooPlan(options.short_steps, options.steps, options.episodes, options.trainings, options.candidates, options.finalists)
    there = (options.out / ROWS_FILE).exists()
    resumed = goes_on(options.out, there, resume=options.resume, overwrite=options.overwrite)
    if resumed:
        check_same_settings(options.out / SETTINGS_FILE, described(amounts, options))
    return amounts, tasks, entries, resumed


def described(amounts: ZooPlan, options: Zoo) -> dict[str, object]:
    """What rows must have in common."""
    settings: dict[str, object] = {key: value for key, value in asdict(amounts).items() if key in ("short_steps", "steps", "episodes")}
    return {**settings, "shipped": options.shipped, "threads": options.threads}


def write_files(folder: Path, tasks: Sequence[ZooTask], rows: Sequence[ZooRow], steps: int) -> None:
    """The zoo's files with the chosen entries."""
    for action_set, name in ZOO_FILES.items():
        chosen = {
            task.environment.id: task.entry(chosen_candidate(task, rows), steps)
            for task in tasks
            if task.action_set == action_set and result(task, rows) is not None
        }
        if not chosen:
            continue
        path = folder / name
        entries = (read_zoo(path) if path.exists() else {}) | chosen
        order = {task.environment.id: i for i, task in enumerate(TASKS)}
        ordered = dict(sorted(entries.items(), key=lambda pair: order.get(pair[0], len(order))))
        evaluated = f" \\\n      --eval-env-kwargs action_set:\"'{action_set}'\"" if action_set else ""
        of = f' with action_set="{action_set}"' if action_set else ""
        with replacing(path) as file:
            file.write(zoo_text(ordered, HEADING.format(of=of, name=name, evaluated=evaluated)))


def run(options: Zoo, screen: Screen) -> Outcome:
    """Make what rows are missing, then the table, the page and the files of what is complete."""
    require("scipy", "cli")
    require("rich", "cli")
    torch = require("torch", "agents")
    for module in ("stable_baselines3", "yaml"):
        require(module, "agents")
    amounts, tasks, entries, resumed = plan(options)
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    write_settings(options.out / SETTINGS_FILE, described(amounts, options))
    complete = True
    with RowFile(options.out / ROWS_FILE, ZooRow, resume=resumed) as file, screen.progress(len(tasks)) as bar:
        try:
            for task in tasks:
                for row in amounts.rows(task, list(file.rows), entries.get(task.name)):
                    file.append(row)
                    bar.show(f"{task.name} {row.round} {row.who}: {row.score:.4g}")
                bar.advance()
        except KeyboardInterrupt:
            complete = False
        rows = list(file.rows)
    found = [one for task in TASKS if task in tasks and (one := result(task, rows)) is not None]
    if found:
        report(options, amounts, found, rows, screen)
    if not complete:
        screen.print("Go on with --resume.")
    return Outcome(found, 0 if complete else INTERRUPTED)


def report(options: Zoo, amounts: ZooPlan, found: Sequence[ZooResult], rows: Sequence[ZooRow], screen: Screen) -> None:
    """Everything that is written of the rows."""
    lines = page(found, rows, amounts, screen.command, options.machine)
    if not options.quiet:
        screen.print("\n".join(lines))
    if options.page is not None:
        write_page(options.page, lines)
    if options.hyperparams is not None:
        write_files(options.hyperparams, [one.task for one in found], rows, amounts.steps)


COMMAND = Command("zoo", Zoo, run, "hyper-parameters of PPO for rl_zoo3, searched and measured")
main = COMMAND.main
