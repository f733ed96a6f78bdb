"""``llmsched tenants``: what each tenant of a scenario gets under several policies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_agents.lookup import named_policies, option_owners
from llmsched_baselines.overrides import parse_overrides
from llmsched_env.bench.tenants import TenantComparison, TenantRow, tables
from llmsched_env.cli.frame import Assignments, Command, Options, Outcome, Screen, check_counts, words
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file
from llmsched_env.markdown import write_page
from llmsched_env.row_file import write_rows
from llmsched_env.workload import load_scenario

BEGIN, END = "<!-- llmsched tenants: begin -->", "<!-- llmsched tenants: end -->"


@dataclass(frozen=True, kw_only=True)
class TenantOptions(Options):
    """What each tenant gets: service, goodput against its own limits and latency, and Jain's index of the service by weight.

    Differences are to the first policy on the same requests, seed by seed, with 95 % intervals.
    """

    scenario: Annotated[str, tyro.conf.arg(metavar="NAME")] = "tenants"
    """A scenario with tenants that ships, is registered or offered by a package, or a .toml file."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY [POLICY ...]")] = ("fcfs", "vtc", "wfq", "tenant-priority")
    """Names of policies or shipped agents, folders of checkpoints, or module:attribute; the first is what the others are compared with."""
    rate: Annotated[float | None, tyro.conf.arg(metavar="R", help_behavior_hint="(default: the scenario's)")] = None
    """Arrival rate of all tenants together, requests/s."""
    seeds: Annotated[int, tyro.conf.arg(metavar="N")] = 20
    """Seeds 0 .. N-1, at least 2."""
    num_requests: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the scenario's)")] = None
    """Requests of one run."""
    set: Assignments = ()
    """engine.FIELD or policy.NAME.OPTION."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the tables on the screen alone)")] = None
    """A CSV file with a row for each tenant of each run; replaced."""
    page: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """A page in Markdown whose part between the two comments of this command is replaced."""


def plan(options: TenantOptions) -> TenantComparison:
    """The comparison that the options ask for, checked.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    policies = named_policies("--policies", options.policies)
    if not policies:
        raise ConfigError("--policies: none given, must be at least one")
    check_counts(num_requests=options.num_requests)
    if options.seeds < 2:
        raise ConfigError(f"--seeds: {options.seeds}, must be at least 2: the tables give intervals")
    if options.rate is not None and not (math.isfinite(options.rate) and options.rate > 0):
        raise ConfigError(f"--rate: {options.rate:g}, must be finite and > 0 requests/s")
    scenario = load_scenario(options.scenario)
    return TenantComparison(
        scenario=scenario,
        policies=policies,
        rate=scenario.rate if options.rate is None else options.rate,
        seeds=tuple(range(options.seeds)),
        num_requests=options.num_requests or scenario.num_requests,
        overrides=parse_overrides(words(options.set), option_owners(policies)),
    )


def page_parts(path: Path) -> tuple[str, str]:
    """What stands before and behind the generated part of a page.

    Raises:
        ConfigError: a page that cannot be read, or without the two comments.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--page: {path} cannot be read ({error})") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"--page: {path}, must have one line {BEGIN} and after it one line {END}")
    return text[: text.index(BEGIN)], text[text.index(END) + len(END) :]


def run(options: TenantOptions, screen: Screen) -> Outcome:
    """Run every policy on every seed, print the tables, write file and page."""
    require("scipy", "cli")
    comparison = plan(options)
    parts = None if options.page is None else page_parts(options.page)
    if options.out is not None:
        check_file("--out", options.out)
    rows: list[TenantRow] = []
    with screen.progress(len(comparison.seeds) * len(comparison.policies)) as bar:
        for found in comparison.rows():
            rows += found
            bar.advance(description=f"{found[0].policy}, seed {found[0].seed}")
    lines = tables(rows, list(comparison.policies))
    if not screen.quiet:
        screen.print("\n".join(lines))
    if options.out is not None:
        write_rows(options.out, TenantRow, rows)
    if options.page is not None and parts is not None:
        runs = f"{comparison.num_requests:,} requests a run, seeds 0 to {len(comparison.seeds) - 1}, 95 % intervals"
        said = (
            f"Scenario `{comparison.scenario.name}` at {comparison.rate:g} requests/s, {runs}. A figure that a run does not have "
            "(no request of the tenant, no contended time) is left out of its mean. Written by"
        )
        body = [BEGIN, "", said, "", f"    {screen.command}", "", *lines, "", END]
        write_page(options.page, [parts[0] + "\n".join(body) + parts[1]])
    return Outcome(rows)


COMMAND = Command("tenants", TenantOptions, run, "what each tenant of a scenario gets under several policies")
main = COMMAND.main
