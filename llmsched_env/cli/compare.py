"""Compare scheduling policies on one workload over arrival rates and seeds.

Writes summary.csv (a row a run, as each finishes), plots and a self-contained report.html:

    python scripts/compare.py --scenario azure-conv --rates 4 5 6 7 \
        --policies vllm sarathi wait nested-wait --seeds 5 --out results/azure

Everything is checked before the first run. Ctrl-C keeps the finished rows and reports on them;
``--resume`` goes on where a comparison was left.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from llmsched_baselines import policy_names
from llmsched_baselines.overrides import parse_overrides, with_calibration
from llmsched_env.bench.comparison import (
    SUMMARY_FILE,
    Comparison,
    Recording,
    Row,
    SummaryFile,
    Task,
    check_same_settings,
    chunks,
    extrapolation_reported,
    finished_rows,
    largest_stable,
    read_rows,
    record,
    run_tasks,
    write_rows,
    write_settings,
)
from llmsched_env.bench.plots import Figure, plot_against_rate, plot_kv, plot_ttft_cdf
from llmsched_env.bench.report import print_table, write_html
from llmsched_env.bench.tables import Cell, cells, policy_labels
from llmsched_env.bench.variants import named_policies
from llmsched_env.cli.parser import Parser
from llmsched_env.errors import ConfigError, MissingExtraError, require
from llmsched_env.files import check_folder
from llmsched_env.parallel import BACKENDS, start_workers, unordered
from llmsched_env.perf import calibration_names
from llmsched_env.workload import Scenario, TraceArrivals, load_scenario, scenario_from_trace, scenario_names

REPORT_FILE = "report.html"
FIGURES = ("latency.png", "ttft.png", "kv.png", "ttft_cdf.png")
INTERRUPTED = 130
CHUNK_REQUESTS = 100_000
"""Requests that a worker simulates before it hands back rows: about a second's work."""


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload = parser.add_mutually_exclusive_group(required=True)
    workload.add_argument("--scenario", help=f"one of {', '.join(scenario_names())}")
    workload.add_argument("--trace", type=Path, metavar="FILE", help="a trace instead of a scenario; --rates rescales its time")
    parser.add_argument("--rates", type=float, nargs="+", metavar="R", help="arrival rates, requests/s (default: the workload's own)")
    known = f"of {', '.join(policy_names())}, or folders of checkpoints"
    parser.add_argument("--policies", nargs="+", required=True, metavar="NAME", help=known)
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds 0 .. N-1 (default 5; 1 for a trace, whose requests are given)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where summary.csv, plots and report.html go")
    parser.add_argument("--num-requests", type=int, metavar="N", help="requests of one run (default: the workload's own)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (default: all cores, of the cluster with --backend ray)")
    parser.add_argument(
        "--backend",
        default="loky",
        choices=BACKENDS,
        help="loky: processes of this machine (default); ray: the cluster RAY_ADDRESS names, else one on this machine",
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="engine.FIELD or policy.NAME.OPTION")
    parser.add_argument(
        "--calibration",
        metavar="FILE_OR_NAME",
        help=f"time model and, where it states it, KV capacity: a .json or .npz file, or one of {', '.join(calibration_names())}"
        " (NAME:clip holds tables at their edge values)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar and no table")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--resume", action="store_true", help="keep the rows in --out and run what is missing")
    kept.add_argument("--overwrite", action="store_true", help="discard the comparison in --out")
    return parser


def plan(options: argparse.Namespace) -> Comparison:
    """The comparison that the options ask for, fully checked; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    policies, agents = named_policies(options.policies)
    rates = tuple(dict.fromkeys(options.rates or ()))
    for rate in rates:
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"--rates: {rate:g}, must be finite and > 0 requests/s")
    for name, count in (("--seeds", options.seeds), ("--num-requests", options.num_requests), ("--jobs", options.jobs)):
        if count is not None and count < 1:
            raise ConfigError(f"{name}: {count}, must be >= 1")
    overrides = with_calibration(parse_overrides(options.set, [name for name in policies if name not in agents]), options.calibration)
    check_folder("--out", options.out)
    if options.trace is not None:
        scenario = scenario_from_trace(options.trace, rate=rates[0] if rates else None)
    else:
        scenario = load_scenario(options.scenario)
    seeds = options.seeds or (1 if same_on_every_seed(scenario) else 5)
    comparison = Comparison(
        scenario=scenario,
        policies=policies,
        rates=rates or (scenario.rate,),
        seeds=tuple(range(seeds)),
        num_requests=options.num_requests or scenario.num_requests,
        overrides=overrides,
        source="" if options.trace is None else str(options.trace),
        agents=agents,
    )
    comparison.check()
    return comparison


def same_on_every_seed(scenario: Scenario) -> bool:
    """A trace with recorded times: nothing in it is drawn."""
    return scenario.rows is not None and isinstance(scenario.arrivals, TraceArrivals)


def kept_rows(options: argparse.Namespace, comparison: Comparison) -> list[Row]:
    """Finished rows to go on from; refuses to overwrite what was not meant to be."""
    path = options.out / SUMMARY_FILE
    if not path.exists() or options.overwrite:
        return []
    if not options.resume:
        raise ConfigError(f"--out: {options.out} holds a comparison already; use --resume, --overwrite or another folder")
    check_same_settings(options.out, comparison.describe())
    return read_rows(path)


def run(comparison: Comparison, tasks: Sequence[Task], out: Path, rows: list[Row], *, jobs: int, backend: str, quiet: bool) -> bool:
    """Run the tasks, appending to ``rows`` and to summary.csv; False if Ctrl-C ended it early."""
    progress = require("rich.progress", "plots")
    console = require("rich.console", "plots").Console(stderr=True)
    bar = progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        disable=quiet,
    )
    with SummaryFile(out / SUMMARY_FILE) as file, bar, extrapolation_reported():
        line = bar.add_task("runs", total=len(tasks))
        results = finished(comparison, tasks, jobs=jobs, backend=backend)
        try:
            for row in results:
                rows.append(row)
                file.append(row)
                bar.update(line, advance=1, description=f"{row.policy} at {row.rate:g}, seed {row.seed}")
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


def draw(
    comparison: Comparison, rows: Sequence[Row], table: Sequence[Cell], out: Path, *, jobs: int, backend: str, over_time: bool
) -> list[Figure]:
    """The plots; those over time run one seed again, with ``over_time``."""
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


def present(comparison: Comparison, rows: list[Row], options: argparse.Namespace, console: Any, *, complete: bool, total: int) -> None:
    """Table, plots and report of the rows there are."""
    order = {policy: i for i, policy in enumerate(comparison.policies)}
    rows.sort(key=lambda row: (row.rate, order.get(row.policy, len(order)), row.policy, row.seed))
    write_rows(options.out / SUMMARY_FILE, rows)
    policies = list(dict.fromkeys([*comparison.policies, *(row.policy for row in rows)]))
    table = cells(rows, policies)
    warnings = [] if complete else [f"Interrupted: {len(rows)} of {total} runs are finished, the table is of those alone."]
    if len(comparison.seeds) > 1 and same_on_every_seed(comparison.scenario):
        warnings.append("The trace has recorded arrival times: every seed is the same run and intervals have no width.")
    if not options.quiet:
        print_table(console, table, f"{comparison.scenario.name}: {comparison.num_requests:,} requests a run")
    figures = draw(comparison, rows, table, options.out, jobs=options.jobs, backend=options.backend, over_time=complete)
    write_html(options.out / REPORT_FILE, comparison, rows, table, figures, command=options.command, warnings=warnings)
    for line in warnings:
        console.print(line, highlight=False)
    if not complete:
        console.print("Go on with --resume.", highlight=False)
    console.print(f"Report: {options.out / 'report.html'}", highlight=False, soft_wrap=True)


def terminal() -> Any:
    """Standard output; into a file or pipe wide enough for the table."""
    return require("rich.console", "plots").Console(width=None if sys.stdout.isatty() else 120)


def main(words: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if words is None else words)
    options = arguments().parse_args(given)
    options.command = shlex.join(["python", "scripts/compare.py", *given])
    try:
        console = terminal()
        for module in ("joblib", "matplotlib", "jinja2", "scipy"):
            require(module, "plots")
        if options.backend == "ray":
            require("ray", "ray")
        comparison = plan(options)
        rows = kept_rows(options, comparison)
        options.jobs = start_workers(options.backend, options.jobs)
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    try:
        return carry_out(options, comparison, rows, console)
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        print(f"error: --out: {error}", file=sys.stderr)
        return 1


def carry_out(options: argparse.Namespace, comparison: Comparison, rows: list[Row], console: Any) -> int:
    """Run what is missing and report; the exit code."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name in (REPORT_FILE, *FIGURES):
        (options.out / name).unlink(missing_ok=True)
    write_settings(options.out, comparison.describe())
    write_rows(options.out / SUMMARY_FILE, rows)
    finished = {row.task for row in rows}
    tasks = [task for task in comparison.tasks() if task not in finished]
    complete = run(comparison, tasks, options.out, rows, jobs=options.jobs, backend=options.backend, quiet=options.quiet)
    if rows:
        present(comparison, rows, options, console, complete=complete, total=len(finished) + len(tasks))
    return 0 if complete else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
