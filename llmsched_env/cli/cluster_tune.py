"""``llmsched cluster-tune``: options of routers, searched on seeds of tuning."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

import llmsched_agents.lookup  # noqa: F401 - registers the router that ships
from llmsched_env import checks
from llmsched_env.bench.router_tuning import GRIDS, SEEDS, SHIPPED, TRIALS, read_tuned, tune_all
from llmsched_env.cli.cluster import checked_names
from llmsched_env.cli.frame import Command, Options, Outcome, Screen, check_counts
from llmsched_env.cluster.scenarios import cluster_scenario_names
from llmsched_env.errors import ConfigError
from llmsched_env.files import check_file
from llmsched_env.markdown import table


@dataclass(frozen=True, kw_only=True)
class TuneOptions(Options):
    """Search the options of routers in each scenario for the least mean latency, on seeds that no published table uses.

    The file is written after every search, and searches that it holds already are not made again.
    """

    routers: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="ROUTER [ROUTER ...]", help_behavior_hint="(default: all that have some)")
    ] = ()
    """Names of routers that have options to search."""
    scenarios: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]", help_behavior_hint="(default: all)")] = ()
    """Names of cluster scenarios."""
    trials: Annotated[int, tyro.conf.arg(metavar="N")] = TRIALS
    """Points of a search, the router as it ships among them."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = SEEDS
    """Seeds 0 .. N-1 of tuning."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json", help_behavior_hint="(default: the file that ships)")] = SHIPPED
    """What was found, one entry a search."""


def run(options: TuneOptions, screen: Screen) -> Outcome:
    """Make the searches that are missing."""
    check_counts(trials=options.trials, seeds=options.seeds)
    routers = checked_names("--routers", options.routers, list(GRIDS))
    for name in routers:
        if name not in GRIDS:
            raise ConfigError(f"--routers: {name!r} has no options to search (allowed: {', '.join(GRIDS)})")
    scenarios = checked_names("--scenarios", options.scenarios, cluster_scenario_names())
    check_file("--out", options.out)
    with checks.told("--out"):
        read_tuned(options.out)
    searches = [(router, (scenario,)) for scenario in scenarios for router in routers]
    found = tune_all(searches, options.out, seeds=options.seeds, trials=options.trials, report=screen.say)
    chosen = [found[scenario, router] for router, (scenario,) in searches]
    rows = [
        (
            entry.scenario,
            entry.router,
            f"{entry.default_value:.3f}",
            f"{entry.value:.3f}",
            ", ".join(f"{k} {v}" for k, v in entry.options.items()),
        )
        for entry in chosen
    ]
    if not screen.quiet:
        screen.print("\n".join(table(("scenario", "router", "as it ships (s)", "tuned (s)", "options"), rows, "llrrl")))
    return Outcome(chosen)


COMMAND = Command("cluster-tune", TuneOptions, run, "options of routers, searched on seeds of tuning")
main = COMMAND.main
