"""``llmsched evaluate``: baselines and agents on the suite, and the page of results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import tyro

from llmsched_agents.checkpoint import read_record
from llmsched_agents.lookup import NamedPolicy, named_policies
from llmsched_env.bench.ablation_table import SHIPPED, Ablation
from llmsched_env.bench.bars import bars
from llmsched_env.bench.evaluation import Row, missing_tasks, run_cell, settings_of, variants_of
from llmsched_env.bench.results import Results, lines_of
from llmsched_env.bench.suite import SUITE, Bench, Cell
from llmsched_env.bench.tuned import tuned_parameters
from llmsched_env.bench.tuning import Tuned
from llmsched_env.bench.variants import GREEDY, POLICIES, Variant
from llmsched_env.cli.frame import Command, Outcome, Screen, check_counts
from llmsched_env.cli.selection import NAMES, Selection
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file, check_folder, check_same_settings, goes_on, write_settings
from llmsched_env.markdown import write_page
from llmsched_env.pages.results.ablation import section
from llmsched_env.pages.results.page import Page
from llmsched_env.pages.results.table import write_table
from llmsched_env.parallel import start_workers, unordered
from llmsched_env.row_file import RowFile
from llmsched_env.runner import Policy

SEEDS = 20
QUICK_SEEDS, QUICK_REQUESTS = 3, 400
FOLDER = Path("results") / SUITE
"""Of rows and page, unless asked otherwise."""
AGENTS = tyro.conf.arg(metavar="AGENT [AGENT ...]", aliases=["--agent"], help_behavior_hint="(default: none)")
SLO_AGENTS = tyro.conf.arg(metavar="AGENT [AGENT ...]", aliases=["--slo-agent"], help_behavior_hint="(default: none)")


@dataclass(frozen=True, kw_only=True)
class Evaluate(Selection):
    """Evaluate baselines and agents on the suite bench-v2 and write the page of results.

    Rows go to --rows as they finish; --resume keeps those that are there and runs what is missing, be it more seeds, cells or
    agents. The page, its plots and its table are written whole from the rows.
    """

    suite: Annotated[str, tyro.conf.arg(metavar="NAME")] = SUITE
    """The suite; there is only this one."""
    policies: Annotated[tuple[str, ...], NAMES] = POLICIES
    """Baselines of the suite; greedy FIFO always runs beside them."""
    agents: Annotated[tuple[str, ...], AGENTS] = ()
    """Names of shipped agents, folders of checkpoints, or module:attribute; the first is held to the bars for mean latency."""
    slo_agents: Annotated[tuple[str, ...], SLO_AGENTS] = ()
    """The same for SLO goodput."""
    ablation: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json", help_behavior_hint="(default: the shipped one)")] = None
    """What `llmsched ablation` wrote, for its section of the page."""
    tuned: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json", help_behavior_hint="(default: none)")] = None
    """What `llmsched tune` wrote, or shipped for the parameters behind the published page: the baselines run with them too."""
    tuned_only: bool = False
    """Baselines that have tuned parameters run with these alone, not as they ship too; greedy FIFO always runs as it ships."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint=f"(default: {SEEDS}; with --quick {QUICK_SEEDS})")] = None
    """Paired evaluation seeds in a cell."""
    first_seed: Annotated[int, tyro.conf.arg(metavar="N")] = 0
    """The first of them; a new start draws other requests."""
    rows: Annotated[Path, tyro.conf.arg(metavar="FILE.csv")] = FOLDER / "rows.csv"
    """Finished runs, kept."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.md")] = FOLDER / "results.md"
    """The page; its plots and its table as CSV go beside it."""
    quick: bool = False
    """Few seeds and short runs."""
    report_only: bool = False
    """Run nothing, write the page from the rows there are."""

    @property
    def settings(self) -> Path:
        """What all rows have in common, beside them."""
        return self.rows.with_suffix(".settings.json")

    @property
    def table(self) -> Path:
        """The page's table, beside it."""
        return self.out.with_suffix(".csv")

    @property
    def figures(self) -> Path:
        """Folder of the page's plots, beside it."""
        return self.out.with_suffix("")


@dataclass(frozen=True, slots=True)
class Plan:
    """An evaluation, fully checked.

    Attributes:
        named: agents of both kinds by name, ``agents`` and ``slo_agents`` the names of each.
        told: names of those that are told output lengths.
        records: of their training, empty where there is none.
        variants: what runs in which cell.
        seeds: of the evaluation.
        resumed: the rows that are there count.
    """

    bench: Bench
    tuned: Mapping[tuple[str, str], Tuned]
    named: Mapping[str, NamedPolicy]
    agents: Sequence[str]
    slo_agents: Sequence[str]
    told: Sequence[str]
    records: Mapping[str, Mapping[str, Any]]
    variants: Mapping[Cell, Sequence[Variant]]
    seeds: range
    ablation: Ablation | None
    resumed: bool


def check(options: Evaluate) -> None:
    """Refuse what can be told from the words alone.

    Raises:
        ConfigError: naming the option.
    """
    if options.suite != SUITE:
        raise ConfigError(f"--suite: {options.suite!r}, must be {SUITE!r}")
    for name in options.policies:
        if name not in POLICIES:
            raise ConfigError(f"--policies: {name!r} is not in {SUITE} (known: {', '.join(POLICIES)})")
    check_counts(seeds=options.seeds, jobs=options.jobs)
    if options.first_seed < 0:
        raise ConfigError(f"--first-seed: {options.first_seed}, must be >= 0")
    for option, path in (("--out", options.out), ("--rows", options.rows)):
        check_file(option, path)
    check_places(options)


def check_places(options: Evaluate) -> None:
    """Refuse places of which one would overwrite another, or that cannot be written.

    Raises:
        ConfigError: naming the options and the file.
    """
    places = [
        ("--rows", options.rows, "the finished runs"),
        ("--rows", options.settings, "the settings of the finished runs"),
        ("--out", options.out, "the page"),
        ("--out", options.table, "the page's table"),
        ("--out", options.figures, "the folder of the page's plots"),
    ]
    if options.json is not None and str(options.json) != "-":
        places.append(("--json", options.json, "what was found"))
    for (option, path, what), (other, where, also) in combinations(places, 2):
        if path.resolve() == where.resolve():
            raise ConfigError(f"{' and '.join(dict.fromkeys((option, other)))}: {path} would be both {what} and {also}")
    check_file("--out", options.table)
    check_folder("--out", options.figures)


def plan(options: Evaluate, screen: Screen) -> Plan:
    """What the options ask for; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    check(options)
    chosen = options.cells()
    tuned = tuned_parameters("--tuned", options.tuned)
    agents = list(named_policies("--agents", options.agents))
    slo_agents = list(named_policies("--slo-agents", options.slo_agents))
    named = named_policies("--agents and --slo-agents", [*options.agents, *options.slo_agents])
    shown = options.ablation or (SHIPPED if SHIPPED.exists() else None)
    ablation = None if shown is None else Ablation.read(shown)
    there = options.rows.exists()
    kept = options.resume or options.report_only
    resumed = goes_on(options.rows, there, resume=kept, overwrite=options.overwrite, what="finished runs", option="--rows")
    bench = options.bench(chosen, screen, QUICK_REQUESTS if options.quick else None)
    if resumed:
        check_same_settings(options.settings, settings_of(bench))
    built = {name: first_built(agent, chosen, bench) for name, agent in named.items()}
    count = options.seeds or (QUICK_SEEDS if options.quick else SEEDS)
    ours = [Variant.of(agent) for agent in named.values()]
    # Greedy FIFO runs in any case: scores and plots are relative to it.
    policies = list(dict.fromkeys([*options.policies, *GREEDY]))
    return Plan(
        bench=bench,
        tuned=tuned,
        named=named,
        agents=agents,
        slo_agents=slo_agents,
        told=[name for name, policy in built.items() if policy.known_lengths],
        records={name: read_record(agent.text) if agent.kind == "checkpoint" else {} for name, agent in named.items()},
        variants={cell: chosen_variants(options, variants_of(cell, policies, tuned, ours, bench)) for cell in chosen},
        seeds=range(options.first_seed, options.first_seed + count),
        ablation=ablation,
        resumed=resumed,
    )


def chosen_variants(options: Evaluate, variants: Sequence[Variant]) -> list[Variant]:
    """Without the defaults that ``--tuned-only`` leaves out."""
    tuned = {variant.name for variant in variants if variant.kind in ("tuned", "together")} if options.tuned_only else set()
    return [v for v in variants if v.kind != "default" or v.name in GREEDY or v.name not in tuned]


def first_built(agent: NamedPolicy, chosen: Iterable[Cell], bench: Bench) -> Policy:
    """An agent in the first cell in which it runs; the rows of cells in which it does not will say why.

    Raises:
        ConfigError: it runs in none of them; why not in the first.
    """
    refusals = []
    for cell in chosen:
        try:
            return agent.build(bench.setting(cell))
        except ConfigError as error:
            refusals.append(error)
    raise refusals[0]


def run_missing(options: Evaluate, plan: Plan, file: RowFile[Row], screen: Screen) -> None:
    """Run what has no row yet, each row on disk as it is there."""
    tasks = missing_tasks(plan.bench, plan.variants, plan.seeds, file.rows)
    jobs = start_workers("loky", options.jobs)
    with file, screen.progress(sum(len(task[-1]) for task in tasks)) as bar:
        results = unordered("loky", jobs, run_cell, tasks)
        try:
            for rows in results:
                for row in rows:
                    file.append(row)
                bar.advance(len(rows), description=rows[0].cell)
        finally:
            results.close()


def page_of(options: Evaluate, plan: Plan, results: Results, screen: Screen) -> Page:
    own = {name: agent.text for name, agent in plan.named.items() if agent.kind != "checkpoint"}
    digests = {variant.digest for variants in plan.variants.values() for variant in variants}
    return Page(
        results=results,
        bench=plan.bench,
        tuned=plan.tuned,
        agents=plan.agents,
        slo_agents=plan.slo_agents,
        own=own,
        told=plan.told,
        records=plan.records,
        ablation=[] if plan.ablation is None else section(plan.ablation, plan.ablation.digest in digests),
        command=screen.command,
        figures=options.figures,
    )


def run(options: Evaluate, screen: Screen) -> Outcome:
    """Run what is missing, then the page of the rows there are."""
    for module in ("joblib", "matplotlib", "scipy", "rich"):
        require(module, "cli")
    planned = plan(options, screen)
    file = RowFile(options.rows, Row, resume=planned.resumed)
    if not options.report_only:
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        write_settings(options.settings, settings_of(planned.bench))
        run_missing(options, planned, file, screen)
    results = Results(planned.variants, (row for row in file.rows if row.seed in planned.seeds))
    if not results.cells:
        raise ConfigError("--rows: no row of this evaluation")
    lines = page_of(options, planned, results, screen).lines()
    table = lines_of(results)
    write_table(options.table, table)
    write_page(options.out, lines)
    screen.print(f"Page: {options.out}")
    return Outcome({"bars": bars(results, planned.agents, next(iter(planned.slo_agents), "")), "table": table})


COMMAND = Command("evaluate", Evaluate, run, "evaluate baselines and agents on the suite")
main = COMMAND.main
