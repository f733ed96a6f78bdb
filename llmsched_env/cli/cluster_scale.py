"""``llmsched cluster-scale``: how fast a fleet is simulated, and in how much memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.bench.cluster_routers import check_router
from llmsched_env.bench.cluster_scale import (
    LOAD,
    ROUTER,
    SIZES,
    ScaleRow,
    fleet,
    fleet_rate,
    measure_apart,
    read_scale,
    usual_calls,
    write_scale,
)
from llmsched_env.cli.frame import Command, Options, Outcome, Screen, check_counts
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file, check_folder
from llmsched_env.markdown import table


@dataclass(frozen=True, kw_only=True)
class ScaleOptions(Options):
    """Stream calls through fleets of equal engines, one process and one core each, and say how fast that goes.

    Calls are drawn as they are needed and folded into quantile sketches as they end; with --parquet they are written to files, too.
    """

    replicas: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = SIZES
    """Sizes of the fleets."""
    calls: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: about 20 million events each)")] = None
    """Calls of each measurement."""
    hours: Annotated[float | None, tyro.conf.arg(metavar="X", help_behavior_hint="(default: none)")] = None
    """Simulated hours instead of a number of calls."""
    load: Annotated[float, tyro.conf.arg(metavar="X")] = LOAD
    """Share of greedy FIFO's boundary."""
    router: Annotated[str, tyro.conf.arg(metavar="ROUTER")] = ROUTER
    """The router."""
    parquet: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None
    """A new folder for the calls, of one fleet."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json", help_behavior_hint="(default: the table on the screen alone)")] = None
    """The measurements; those that the file has are kept."""


def lines_of(rows: list[ScaleRow]) -> list[str]:
    """The table on the screen."""
    shown = [
        (
            f"{row.replicas:,}",
            f"{row.calls:,}",
            f"{row.wall_seconds:.1f}",
            f"{row.events_per_second:,.0f}",
            f"{row.calls / row.wall_seconds:,.0f}",
            f"{row.peak_mb:,.0f}",
            f"{row.parquet_mb:,.0f}",
        )
        for row in rows
    ]
    return table(("replicas", "calls", "wall s", "events/s", "calls/s", "peak MiB", "Parquet MiB"), shown, "r")


def run(options: ScaleOptions, screen: Screen) -> Outcome:
    """Measure every size."""
    require("datasketches", "cluster")
    check_counts(calls=options.calls)
    if not options.replicas or min(options.replicas) < 1:
        raise ConfigError(f"--replicas: {options.replicas}, must be numbers >= 1")
    if options.hours is not None and (options.calls is not None or not 0.0 < options.hours < 1e6):
        raise ConfigError(f"--hours: {options.hours:g}, must be above 0 and without --calls")
    if not 0.0 < options.load < 10.0:
        raise ConfigError(f"--load: {options.load:g}, must be above 0 and below 10")
    if options.parquet is not None:
        require("pyarrow", "cluster")
        if len(options.replicas) != 1 or options.parquet.exists():
            raise ConfigError(f"--parquet: {options.parquet}, must be a new folder, with one number in --replicas")
        check_folder("--parquet", options.parquet)
    kept: list[ScaleRow] = []
    if options.out is not None:
        check_file("--out", options.out)
        kept = read_scale(options.out, "--out") if options.out.exists() else []
    for size in options.replicas:
        check_router("--router", options.router, fleet(size, options.load)[2], {})
    rows: list[ScaleRow] = []
    with screen.progress(len(options.replicas)) as bar:
        for size in options.replicas:
            calls = usual_calls() if options.calls is None else options.calls
            if options.hours is not None:
                calls = max(1, round(fleet_rate(size, options.load) * 3600.0 * options.hours))
            rows.append(measure_apart(size, calls, load=options.load, router=options.router, folder=options.parquet))
            bar.advance(description=f"{size} replicas")
            if options.out is not None:
                write_scale(options.out, [*kept, *rows])
    if not screen.quiet:
        screen.print("\n".join(lines_of(rows)))
    return Outcome(rows)


COMMAND = Command("cluster-scale", ScaleOptions, run, "how fast fleets of engines are simulated, and in how much memory")
main = COMMAND.main
