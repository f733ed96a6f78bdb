"""``llmsched compare``: policies on one workload over arrival rates and seeds."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from llmsched_agents.lookup import named_policies, option_owners
from llmsched_baselines.overrides import parse_overrides, with_calibration
from llmsched_env.bench.comparison import (
    SETTINGS_FILE,
    SUMMARY_FILE,
    Comparison,
    Recording,
    Row,
    Task,
    chunks,
    extrapolation_reported,
    finished_rows,
    largest_stable,
    record,
    run_tasks,
)
from llmsched_env.bench.plots import Figure, plot_against_rate, plot_kv, plot_ttft_cdf
from llmsched_env.bench.report import print_table, write_html
from llmsched_env.bench.tables import Cell, cells, policy_labels
from llmsched_env.cli.frame import INTERRUPTED, Assignments, Command, Outcome, Resumable, Screen, check_counts, words
from llmsched_env.cli.trace_options import TraceOptions
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_folder, check_same_settings, goes_on, read_settings, write_settings
from llmsched_env.parallel import start_workers, unordered
from llmsched_env.row_file import RowFile, read_rows, write_rows
from llmsched_env.workload import Scenario, TraceArrivals, load_scenario

REPORT_FILE = "report.html"
FIGURES = ("latency.png", "ttft.png", "kv.png", "ttft_cdf.png")
CHUNK_REQUESTS = 100_000
"""Requests that a worker simulates before it hands back rows: about a second's work."""

WORKLOAD = tyro.conf.create_mutex_group(required=True, title="workload")


@dataclass(frozen=True, kw_only=True)
class Compare(TraceOptions, Resumable):
    """Compare scheduling policies on one workload over arrival rates and seeds.

    Writes summary.csv (a row a run, as each finishes), plots and a self-contained report.html.
    Everything is checked before the first run. Ctrl-C keeps the finished rows and reports on them.
    """

    scenario: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(this or --trace)"), WORKLOAD] = None
    """A scenario that ships, is registered or offered by a package, or a .toml file."""
    trace: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(this or --scenario)"), WORKLOAD] = None
    """A trace instead of a scenario; --rates rescales its time."""
    rates: Annotated[tuple[float, ...], tyro.conf.arg(metavar="R [R ...]", help_behavior_hint="(default: the workload's own)")] = ()
    """Arrival rates, requests/s."""
    policies: Annotated[tuple[str, ...], tyro.conf.arg(metavar="POLICY [POLICY ...]", aliases=["--policy"])]
    """Names of policies or shipped agents, folders of checkpoints, or module:attribute."""
    seeds: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: 5; 1 for a trace with recorded times)")] = None
    """Seeds 0 .. N-1."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where summary.csv, plots and report.html go."""
    num_requests: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the workload's own)")] = None
    """Requests of one run."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all cores, of the cluster with ray)")] = None
    """Processes."""
    backend: Literal["loky", "ray"] = "loky"
    """loky: processes of this machine; ray: the cluster that RAY_ADDRESS names, else one on this machine."""
    set: Assignments = ()
    """engine.FIELD or policy.NAME.OPTION."""
    calibration: Annotated[str | None, tyro.conf.arg(metavar="FILE_OR_NAME", help_behavior_hint="(default: the engine's own)")] = None
    """Time model and, where it states it, KV capacity; NAME:clip holds tables at their edge values."""


def plan(options: Compare) -> Comparison:
    """The comparison that the options ask for, fully checked; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    policies = named_policies("--policies", options.policies)
    if not policies:
        raise ConfigError("--policies: none given, must be at least one")
    rates = tuple(dict.fromkeys(options.rates))
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"--rates: {rate:g}, must be finite and > 0 requests/s")
    check_counts(seeds=options.seeds, num_requests=options.num_requests, jobs=options.jobs)
    overrides = with_calibration(parse_overrides(words(options.set), option_owners(policies)), options.calibration)
    check_folder("--out", options.out)
    if options.trace is not None:
        workload = options.read(options.trace, rates[0] if rates else None)
    else:
        workload = load_scenario(options.scenario or "")
    seeds = options.seeds or (1 if same_on_every_seed(workload) else 5)
    comparison = Comparison(
        scenario=workload,
        policies=policies,
        rates=rates or (workload.rate,),
        seeds=tuple(range(seeds)),
        num_requests=options.num_requests or workload.num_requests,
        overrides=overrides,
        source="" if options.trace is None else str(options.trace),
    )
    comparison.check()
    return comparison


def same_on_every_seed(scenario: Scenario) -> bool:
    """A trace with recorded times: nothing in it is drawn."""
    return scenario.rows is not None and isinstance(scenario.arrivals, TraceArrivals)


def kept_rows(options: Compare, comparison: Comparison) -> list[Row]:
    """Finished rows to go on from; refuses to overwrite what was not meant to be."""
    path = options.out / SUMMARY_FILE
    if not goes_on(options.out, path.exists(), resume=options.resume, overwrite=options.overwrite, what="a comparison"):
        return []
    settings = options.out / SETTINGS_FILE
    description = comparison.describe()
    kept = read_settings(settings).get("policies", {})
    for name, state in description.pop("policies").items():  # more may be added; one of the same name must be the same
        if kept.get(name, state) != state:
            raise ConfigError(f"--resume: policy {name!r} is {state}, but the rows in {options.out} were made with {kept[name]}")
    check_same_settings(settings, description)
    return read_rows(path, Row)


def run_rows(options: Compare, comparison: Comparison, tasks: Sequence[Task], file: RowFile[Row], jobs: int, screen: Screen) -> bool:
    """Run the tasks, each row on disk as it is there; False if Ctrl-C ended it early."""
    with file, screen.progress(len(tasks)) as bar, extrapolation_reported():
        results = finished(comparison, tasks, jobs=jobs, backend=options.backend)
        try:
            for row in results:
                file.append(row)
                bar.advance(description=f"{row.policy} at {row.rate:g}, seed {row.seed}")
        except KeyboardInterrupt:
            return False
        finally:
            results.close()
    return True


def finished(comparison: Comparison, tasks: Sequence[Task], *, jobs: int, backend: str) -> Generator[Row]:
    """Rows as their runs end, in this process or in chunks from workers."""
    # A chunk is a second or so of work, and every job gets several.
    parts = chunks(tasks, max(min(CHUNK_REQUESTS // comparison.num_requests, len(tasks) // (4 * jobs)), 1))
    if jobs == 1 and backend == "loky":
        yield from run_tasks(comparison, [task for part in parts for task in part])
        return
    results = unordered(backend, jobs, finished_rows, [(comparison, part) for part in parts])
    try:
        for part in results:
            yield from part
    finally:
        results.close()


def recordings(comparison: Comparison, rate: float, policies: Sequence[str], jobs: int, backend: str) -> list[Recording]:
    seed = comparison.seeds[0]
    found: list[Recording] = list(unordered(backend, jobs, record, [(comparison, Task(policy, rate, seed)) for policy in policies]))
    return sorted(found, key=lambda one: policies.index(one.task.policy))


def draw(comparison: Comparison, shown: Presented, out: Path, *, jobs: int, backend: str, over_time: bool) -> list[Figure]:
    """The plots; those over time run one seed again, with ``over_time``."""
    rows, table = shown.rows, shown.table
    boundary = comparison.boundary
    done = [policy for policy in comparison.policies if any(row.policy == policy for row in rows)]
    labels = policy_labels(rows, done)
    seeds = max(cell.seeds for cell in table)
    what = f"{comparison.num_requests:,} requests a run, {seeds} seed{'s' if seeds > 1 else ''}"
    over_rate, ttft_over_rate, kv, cdf = (out / name for name in FIGURES)
    dotted = f"{what}. Dotted line: fluid stability boundary of the scenario's engine."
    plot_against_rate(over_rate, table, (("latency_mean", "mean latency (s)"), ("latency_p99", "latency P99 (s)")), labels, boundary, seeds)
    plot_against_rate(ttft_over_rate, table, (("ttft_mean", "mean TTFT (s)"), ("ttft_p99", "TTFT P99 (s)")), labels, boundary, seeds)
    figures = [Figure(over_rate, "Latency over arrival rate", dotted), Figure(ttft_over_rate, "TTFT over arrival rate", dotted)]
    if over_time:
        highest, stable = max(comparison.rates), largest_stable(comparison.rates, boundary)
        seed = comparison.seeds[0]
        at_highest = recordings(comparison, highest, done, jobs, backend)
        at_stable = at_highest if stable == highest else recordings(comparison, stable, done, jobs, backend)
        plot_kv(kv, at_highest, labels)
        figures.append(Figure(kv, f"KV occupancy at {highest:g} requests/s", f"Seed {seed}, the highest rate."))
        inside = "the highest rate inside the stability region" if stable < boundary else "the lowest; none is inside the stability region"
        plot_ttft_cdf(cdf, at_stable, labels)
        figures.append(Figure(cdf, f"TTFT distribution at {stable:g} requests/s", f"Seed {seed}, {inside}."))
    return figures


@dataclass(frozen=True)
class Presented:
    """The rows of a comparison, in order, and what is said of them."""

    rows: list[Row]
    table: list[Cell]
    warnings: list[str]


def presented(comparison: Comparison, rows: Sequence[Row], *, complete: bool, total: int) -> Presented:
    order = {policy: i for i, policy in enumerate(comparison.policies)}
    ordered = sorted(rows, key=lambda row: (row.rate, order.get(row.policy, len(order)), row.policy, row.seed))
    policies = list(dict.fromkeys([*comparison.policies, *(row.policy for row in ordered)]))
    warnings = [] if complete else [f"Interrupted: {len(rows)} of {total} runs are finished, the table is of those alone."]
    if len(comparison.seeds) > 1 and same_on_every_seed(comparison.scenario):
        warnings.append("The trace has recorded arrival times: every seed is the same run and intervals have no width.")
    trace = comparison.scenario.trace
    if trace is not None and trace.dropped:
        warnings.append(f"{trace.dropped:,} rows of the trace are left out: {trace.dropped_reason}.")
    return Presented(ordered, cells(ordered, policies), warnings)


def run(options: Compare, screen: Screen) -> Outcome:
    """Run what is missing, then table, plots and report of the rows there are."""
    for module in ("joblib", "matplotlib", "jinja2", "scipy", "rich"):
        require(module, "cli")
    if options.backend == "ray":
        require("ray", "ray")
    comparison = plan(options)
    rows = kept_rows(options, comparison)
    jobs = start_workers(options.backend, options.jobs)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in (REPORT_FILE, *FIGURES):
        (options.out / name).unlink(missing_ok=True)
    settings = options.out / SETTINGS_FILE
    description = comparison.describe()
    if rows:
        description["policies"] = read_settings(settings).get("policies", {}) | description["policies"]
    write_settings(settings, description)
    file = RowFile(options.out / SUMMARY_FILE, Row, resume=bool(rows))
    done = {row.task for row in file.rows}
    tasks = [task for task in comparison.tasks() if task not in done]
    complete = run_rows(options, comparison, tasks, file, jobs, screen)
    if not file.rows:
        return Outcome(code=INTERRUPTED)
    shown = presented(comparison, file.rows, complete=complete, total=len(done) + len(tasks))
    write_rows(options.out / SUMMARY_FILE, Row, shown.rows)
    console = screen.console()
    if not options.quiet:
        print_table(console, shown.table, f"{comparison.scenario.name}: {comparison.num_requests:,} requests a run")
    figures = draw(comparison, shown, options.out, jobs=jobs, backend=options.backend, over_time=complete)
    write_html(options.out / REPORT_FILE, comparison, shown.rows, shown.table, figures, command=screen.command, warnings=shown.warnings)
    for line in shown.warnings:
        screen.print(line)
    if not complete:
        screen.print("Go on with --resume.")
    screen.print(f"Report: {options.out / REPORT_FILE}")
    return Outcome(shown.rows, 0 if complete else INTERRUPTED)


COMMAND = Command("compare", Compare, run, "compare policies on a workload over rates and seeds")
main = COMMAND.main
