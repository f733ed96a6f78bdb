"""``llmsched cluster``: routers on scenarios of a cluster, and the page of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

import llmsched_agents.lookup  # noqa: F401 - registers the router that ships
from llmsched_baselines.routers import Door, router_names
from llmsched_env import checks
from llmsched_env.bench.cluster import (
    EVALUATION_SEEDS,
    FIRST_EVALUATION_SEED,
    change,
    episode_seed,
    mean_of,
    run_all,
)
from llmsched_env.bench.cluster_course import record_course
from llmsched_env.bench.cluster_routers import check_router
from llmsched_env.bench.cluster_rows import ClusterRow, Task, check_figures, check_origin, missing
from llmsched_env.bench.cluster_scale import read_scale
from llmsched_env.bench.router_tuning import tuned_options
from llmsched_env.cli.frame import Command, Outcome, Resumable, Screen, check_counts
from llmsched_env.cluster.scenarios import REPLICAS, cluster_scenario_names, load_cluster_scenario
from llmsched_env.errors import ConfigError, did_you_mean, require
from llmsched_env.files import check_file, goes_on
from llmsched_env.markdown import table, write_page
from llmsched_env.pages.cluster.page import ClusterPage, percent, with_half
from llmsched_env.pages.cluster.picture import draw
from llmsched_env.row_file import RowFile

REFERENCE, SHIPPED = "prefix-affinity", "learned-router"
ROWS = Path("results") / "cluster" / "rows.csv"
PICTURE = ("drifting", 66)
"""Scenario and seed of evaluation of the picture."""


@dataclass(frozen=True, kw_only=True)
class ClusterOptions(Resumable):
    """Routers on clusters of vLLM engines: latency, SLO misses and use of the caches, router by router.

    Every run is a line of --rows as soon as it is done; --resume keeps those that are there and runs what is missing. Baselines run
    with the options that a search found for each scenario, unless --as-shipped.
    """

    scenarios: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME [NAME ...]", help=f"Of {', '.join(cluster_scenario_names())}.", help_behavior_hint="(default: all)"),
    ] = ()
    routers: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ROUTER [ROUTER ...]", help_behavior_hint="(default: all)")] = ()
    """Names of routers, shipped, registered or offered by a package, or module:attribute."""
    reference: Annotated[str, tyro.conf.arg(metavar="ROUTER")] = REFERENCE
    """The router that the others are compared with."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = EVALUATION_SEEDS
    """Paired seeds, at least 2."""
    first_seed: Annotated[int, tyro.conf.arg(metavar="N")] = FIRST_EVALUATION_SEED
    """The first of them."""
    replicas: Annotated[int, tyro.conf.arg(metavar="N")] = REPLICAS
    """Replicas of every cluster; the load is that many times a replica's."""
    num_calls: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the scenario's)")] = None
    """Calls of one run."""
    as_shipped: bool = False
    """Routers run with the options that they have by default."""
    rows: Annotated[Path, tyro.conf.arg(metavar="FILE.csv")] = ROWS
    """Finished runs, kept."""
    report_only: bool = False
    """Run nothing, write tables and page from the rows there are."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores, of the cluster with ray)")] = None
    """Runs side by side."""
    backend: Literal["loky", "ray"] = "loky"
    """loky: processes of this machine; ray: the cluster that RAY_ADDRESS names, else one on this machine."""
    scale: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json", help_behavior_hint="(default: none)")] = None
    """What `llmsched cluster-scale` wrote, for its section of the page."""
    page: Annotated[Path | None, tyro.conf.arg(metavar="FILE.md", help_behavior_hint="(default: the tables on the screen alone)")] = None
    """The page in Markdown, with a picture beside it; replaced."""


def checked_names(option: str, given: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names without repetition; none given stand for all.

    Raises:
        ConfigError: an unknown name, with the nearest.
    """
    for name in given:
        if name not in known and ":" not in name:
            raise ConfigError(f"{option}: {name!r} is unknown{did_you_mean(name, known)} (known: {', '.join(known)})")
    return list(dict.fromkeys(given or known))


def tasks_of(options: ClusterOptions, scenarios: Sequence[str], routers: Sequence[str]) -> list[Task]:
    """The runs that the options ask for."""
    return [
        Task.of(
            scenario,
            router,
            {} if options.as_shipped else tuned_options(router, scenario),
            "evaluation",
            seed,
            options.replicas,
            options.num_calls or 0,
        )
        for scenario in scenarios
        for router in routers
        for seed in range(options.first_seed, options.first_seed + options.seeds)
    ]


def check_routers(tasks: Sequence[Task]) -> None:
    """Build every router of these runs once for every scenario, with its options.

    Raises:
        ConfigError: one that cannot be found, built or compiled, with its name.
        MissingExtraError: a package that it needs is not installed.
    """
    first = {(task.scenario, task.router): task for task in tasks}
    for task in first.values():
        scenario = load_cluster_scenario(task.scenario)
        spec = scenario.cluster(episode_seed(task.purpose, task.seed), replicas=task.replicas, num_calls=task.num_calls or None)
        door = Door.of(spec, scenario.source, scenario.total_rate(task.replicas))
        check_router("--routers", task.router, door, json.loads(task.options))


def kept_rows(options: ClusterOptions, tasks: Sequence[Task]) -> RowFile[ClusterRow]:
    """The file of finished runs with those it holds, checked; nothing is written.

    Raises:
        ConfigError: it holds some and nothing says what is to become of them, they cannot be gone on with, or, with ``--report-only``,
            some are missing.
    """
    path, reported = options.rows, options.report_only
    check_file("--rows", path)
    resumed = goes_on(
        path, path.exists(), resume=options.resume or reported, overwrite=options.overwrite, what="finished runs", option="--rows"
    )
    with checks.told("--rows"):
        file = RowFile(path, ClusterRow, resume=resumed)
        check_figures(path, file.rows)
    if reported:
        for task in missing(tasks, file.rows)[:1]:
            raise ConfigError(f"--report-only: {path} has no run of {task.router} in {task.scenario} with seed {task.seed}")
    return file


def run_missing(options: ClusterOptions, tasks: Sequence[Task], file: RowFile[ClusterRow], screen: Screen) -> None:
    """Run what has no row yet, each row on disk as it is there."""
    left = missing(tasks, file.rows)
    found = run_all(left, file, backend=options.backend, jobs=options.jobs)
    with file, screen.progress(len(left)) as bar, contextlib.closing(found):
        for row in found:
            bar.advance(description=f"{row.scenario}, {row.router}, seed {row.seed}")


def shown(rows: Sequence[ClusterRow], scenario: str, routers: Sequence[str], reference: str) -> list[str]:
    """A scenario's table on the screen."""

    def line(router: str) -> tuple[str, ...]:
        other = [
            percent(change(rows, scenario, router, reference, m)) if router != reference else "-" for m in ("latency_mean", "slo_misses")
        ]
        misses = mean_of(rows, scenario, router, "slo_misses")
        return router, with_half(mean_of(rows, scenario, router, "latency_mean"), 2), other[0], f"{100 * misses.mean:.2f} %", other[1]

    return [scenario, *table(("router", "mean latency (s)", "against", "SLO misses", "against"), map(line, routers), "lr"), ""]


def run(options: ClusterOptions, screen: Screen) -> Outcome:
    """Run what is missing, print the tables, write the page."""
    require("scipy", "cli")
    check_counts(seeds=options.seeds, replicas=options.replicas, jobs=options.jobs, num_calls=options.num_calls)
    if options.seeds < 2:
        raise ConfigError(f"--seeds: {options.seeds}, must be at least 2: the tables give intervals")
    if options.first_seed < 0:
        raise ConfigError(f"--first-seed: {options.first_seed}, must be >= 0")
    scenarios = checked_names("--scenarios", options.scenarios, cluster_scenario_names())
    routers = checked_names("--routers", options.routers, router_names())
    if options.reference not in routers:
        raise ConfigError(f"--reference: {options.reference!r}, must be one of --routers: {', '.join(routers)}")
    scale = [] if options.scale is None else read_scale(options.scale, "--scale")
    if options.page is not None:
        check_file("--page", options.page)
        require("matplotlib", "cli")
    tasks = tasks_of(options, scenarios, routers)
    file, wanted = kept_rows(options, tasks), set(tasks)
    if not options.report_only:
        check_routers(tasks)
        check_origin(options.rows, file.rows, wanted)
        run_missing(options, tasks, file, screen)
    rows = [row for row in file.rows if row.task in wanted]
    if not screen.quiet:
        screen.print("\n".join(line for scenario in scenarios for line in shown(rows, scenario, routers, options.reference)))
    if options.page is not None:
        shipped = SHIPPED if SHIPPED in routers else None
        picture = None
        if shipped is not None and PICTURE[0] in scenarios:
            picture = write_picture(options, options.page.with_name(f"{options.page.stem}-course.png"))
        page = ClusterPage(rows, scenarios, routers, options.reference, shipped, scale, screen.command, picture)
        write_page(options.page, page.lines())
    return Outcome(rows)


def write_picture(options: ClusterOptions, path: Path) -> tuple[str, str]:
    """The course of one episode under the reference and under the shipped router; the file's name and what it shows."""
    scenario, number = PICTURE
    seed = episode_seed("evaluation", number)
    courses = [
        record_course(scenario, router, {} if options.as_shipped else tuned_options(router, scenario), seed)
        for router in (options.reference, SHIPPED)
    ]
    draw(courses, path)
    said = (
        f"Scenario {scenario}, seed {number}, under {options.reference} and under {SHIPPED}: KV in use and calls of every replica, and "
        "below, a lane a replica, how many calls are routed to it. Shaded: a replica is slow."
    )
    return path.name, said


COMMAND = Command("cluster", ClusterOptions, run, "routers on clusters of engines, and the page of them")
main = COMMAND.main
