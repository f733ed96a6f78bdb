"""The search for a router's options in one scenario, or in all of them together, and the file of what it found.

The search is that of ``llmsched_env.bench.tuning``: coarse to fine along one option at a time, from the router as it ships. The objective
is mean latency, relative to that of the router as it ships where several scenarios are searched together.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_baselines.routers import router_options
from llmsched_env import __version__
from llmsched_env.bench.cluster import episode_seed, run_router
from llmsched_env.bench.evaluation import sources_digest
from llmsched_env.bench.tuning import Grid, Point, nearest, search
from llmsched_env.cluster.scenarios import load_cluster_scenario
from llmsched_env.errors import ConfigError
from llmsched_env.files import replacing
from llmsched_env.types import FloatArray

SHIPPED = Path(__file__).parent / "suites" / "tuned_routers.json"
TOGETHER = "all"
"""In place of a scenario's name: one set of options for all of them."""
TRIALS, SEEDS = 40, 5

GRIDS: dict[str, Grid] = {
    "prefix-affinity": {
        "excess": (0.0, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, math.inf),
        "factor": (1.0, 1.1, 1.25, 1.5, 2.0, 3.0),
        "share": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7),
    },
    "sglang": {
        "balance_abs_threshold": (0, 2, 4, 6, 8, 12, 16, 24, 32, 64),
        "balance_rel_threshold": (1.0, 1.1, 1.25, 1.5, 2.0, 3.0),
        "cache_threshold": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
    },
    "llm-d": {
        "queue": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
        "kv": (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
        "prefix": (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 16.0),
    },
    "dynamo": {
        "overlap_weight": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0),
        "temperature": (0.0, 0.02, 0.05, 0.1, 0.2, 0.5),
    },
    "cost": {
        "hinder": (0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0),
        "uncached": (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        "pending": (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0),
        "trust": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
        "waiting": (0.0, 2.0, 4.0, 8.0, 16.0, 32.0),
        "memory_seconds": (3.0, 5.0, 10.0, 20.0, 30.0, 60.0),
    },
}
"""Grids in the order of their values. Routers without an entry have nothing to tune."""


@dataclass(frozen=True, slots=True)
class TunedRouter:
    """The outcome of one search.

    Attributes:
        scenario: its name, or ``TOGETHER``.
        options: of the router's constructor; empty: as it ships.
        value, default_value: mean latency (s) over the seeds at these options and as the router ships; with ``TOGETHER`` the mean over the
            scenarios of that, divided by that of the router as it ships.
        trials: points evaluated, the router as it ships among them.
        seeds: 0 .. seeds - 1 of tuning, in each scenario.
        seconds: wall time of the search on one core.
        sources: digest of the simulator's sources.
        rates: calls per second of each scenario.
    """

    scenario: str
    router: str
    options: dict[str, Any]
    value: float
    default_value: float
    trials: int
    seeds: int
    seconds: float
    sources: str
    rates: dict[str, float]


def tune_router(
    router: str, scenarios: Sequence[str], *, seeds: int = SEEDS, trials: int = TRIALS, grid: Grid | None = None
) -> TunedRouter:
    """Search a router's options in one scenario, or one set of them for several.

    Args:
        grid: None: ``GRIDS``.

    Raises:
        ConfigError: an unknown name, or no scenario.
    """
    if not scenarios:
        raise ConfigError("scenarios: none, must be at least one")
    started = time.perf_counter()
    chosen = [load_cluster_scenario(name) for name in scenarios]
    options_of, points = router_options(router), GRIDS.get(router, {}) if grid is None else grid
    names = list(points)
    numbers = [episode_seed("tuning", seed) for seed in range(seeds)]

    def latencies(options: Mapping[str, Any]) -> FloatArray:
        found = [[run_router(s, router, options, n).latency_mean for n in numbers] for s in chosen]
        return np.asarray(np.mean(found, axis=1), dtype=np.float64)

    shipped = latencies({})
    scale = shipped if len(chosen) > 1 else np.ones(1)
    default = float(np.mean(shipped / scale))
    start = tuple(nearest(points[name], options_of[name].default) for name in names)
    costs: dict[Point, float] = {}

    def options_at(point: Point) -> dict[str, Any]:
        return {name: points[name][i] for name, i in zip(names, point, strict=True)}

    def cost(point: Point) -> float:
        costs[point] = float(np.mean(latencies(options_at(point)) / scale))
        return costs[point]

    found = search([len(points[name]) for name in names], start, trials - 1, cost) if names and trials > 1 else None
    better = found is not None and costs[found] < default
    return TunedRouter(
        scenario=TOGETHER if len(chosen) > 1 else scenarios[0],
        router=router,
        options=options_at(found) if better and found is not None else {},
        value=costs[found] if better and found is not None else default,
        default_value=default,
        trials=1 + len(costs),
        seeds=seeds,
        seconds=round(time.perf_counter() - started, 3),
        sources=sources_digest(),
        rates={s.name: round(s.total_rate(), 6) for s in chosen},
    )


def read_tuned(path: Path = SHIPPED) -> dict[tuple[str, str], TunedRouter]:
    """What a file holds, by (scenario, router); nothing where there is none.

    Raises:
        ConfigError: not a file of tuned routers.
    """
    if not path.exists():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        entries = [TunedRouter(**entry) for entry in record["entries"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: not a file of tuned routers ({type(error).__name__}: {error})") from error
    return {(entry.scenario, entry.router): entry for entry in entries}


def write_tuned(entries: Mapping[tuple[str, str], TunedRouter], path: Path = SHIPPED) -> None:
    """Write a file anew."""
    record = {
        "what": "options of routers, tuned on seeds of tuning; objective: mean latency",
        "version": __version__,
        "entries": [asdict(entries[key]) for key in sorted(entries)],
    }
    with replacing(path) as file:
        json.dump(record, file, indent=1)
        file.write("\n")


def tuned_options(router: str, scenario: str, path: Path = SHIPPED) -> dict[str, Any]:
    """What was found for a router in a scenario, else in all of them together, else nothing: as it ships."""
    known = read_tuned(path)
    for name in (scenario, TOGETHER):
        if (name, router) in known:
            return known[name, router].options
    return {}


def tune_all(
    searches: Sequence[tuple[str, tuple[str, ...]]],
    path: Path = SHIPPED,
    *,
    seeds: int = SEEDS,
    trials: int = TRIALS,
    report: Callable[[str], None] = print,
) -> dict[tuple[str, str], TunedRouter]:
    """Make searches, (router, scenarios) each, and write the file after every one; those that the file has are not made again."""
    known = read_tuned(path)
    for router, scenarios in searches:
        key = (TOGETHER if len(scenarios) > 1 else scenarios[0], router)
        rates = {name: round(load_cluster_scenario(name).total_rate(), 6) for name in scenarios}
        entry = known.get(key)
        if entry is not None and (entry.seeds, entry.rates) == (seeds, rates) and entry.trials >= trials:
            continue
        known[key] = entry = tune_router(router, scenarios, seeds=seeds, trials=trials)
        write_tuned(known, path)
        report(f"{router} in {key[0]}: {entry.default_value:.4g} -> {entry.value:.4g} with {entry.options} ({entry.seconds:.0f} s)")
    return known
