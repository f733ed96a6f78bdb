"""Routers on scenarios of a cluster: runs, paired intervals over seeds, boundaries.

An episode is a scenario's calls of one seed on its cluster of that seed, the same for every router. Seeds of tuning, evaluation and
boundaries never share a stream (``llmsched_env.bench.seeds``).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_baselines.routers import Door
from llmsched_env.bench.cluster_routers import build_router, router_digest, router_named
from llmsched_env.bench.cluster_rows import ClusterRow, Task, check_figures, check_origin, missing
from llmsched_env.bench.evaluation import sources_digest
from llmsched_env.bench.seeds import Purpose, seed_of
from llmsched_env.cluster.metrics import ClusterSummary, summarize_calls
from llmsched_env.cluster.routing import run_cluster
from llmsched_env.cluster.scenario import ClusterScenario
from llmsched_env.cluster.scenarios import REPLICAS, load_cluster_scenario
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.sinks import KeepAll
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import Interval, mean_interval
from llmsched_env.parallel import start_workers, unordered
from llmsched_env.row_file import RowFile

FIRST_EVALUATION_SEED, EVALUATION_SEEDS = 60, 20
"""Seeds 60 to 79 are those of published tables."""
WARMUP = 120.0
"""Seconds at the beginning of an episode in which nothing counts: sessions take about as long to become as many as they will be."""
ATTAINMENT = 0.9
"""Share of the calls that meet both limits at the boundary."""


def episode_seed(purpose: Purpose, number: int) -> int:
    """The seed of episode ``number`` of a purpose, as sources of calls and scenarios take it."""
    return int(seed_of(purpose, number).generate_state(1, np.uint64)[0] >> np.uint64(1))


def run_router(
    scenario: ClusterScenario,
    router: str,
    options: Mapping[str, Any],
    seed: int,
    *,
    replicas: int = REPLICAS,
    rate: float | None = None,
    num_calls: int | None = None,
) -> ClusterSummary:
    """The figures of one episode: of the calls that arrive after the warm-up and while sessions begin.

    Args:
        router, options: see ``make_router``.
        seed: ``episode_seed``.
        rate: calls per second; num_calls: of the episode. None: the scenario's, as many more as there are more replicas; at another rate
            sessions begin for as long as at the scenario's own.

    Raises:
        ConfigError: a router, an option or a number that is refused.
        PolicyError: the router's rule raises, or chooses a replica that the call cannot go to.
    """
    total, source = scenario.total_rate(replicas), scenario.source
    rate = total if rate is None else rate
    if num_calls is None:
        num_calls = max(1, round(scenario.num_calls * replicas / scenario.replicas * rate / total))
    seconds = num_calls / rate
    spec = scenario.cluster(seed, replicas=replicas, rate=rate, num_calls=num_calls)
    chosen = build_router(router, Door.of(spec, source, rate), options)
    sim, sink = ClusterSim(spec), KeepAll()
    with router_named(router):
        run_cluster(sim, chosen.rule, source.chunks(seed, rate=rate, num_calls=num_calls), source.app_tokens, sink, seed)
    rows = sink.rows()
    return summarize_calls(
        rows[rows["arrival"] < seconds],
        replicas=replicas,
        warmup=min(WARMUP, seconds / 4),
        ttft_limit=spec.ttft_limit,
        tpot_limit=spec.tpot_limit,
        separated=spec.separated,
    )


def run_task(task: Task) -> ClusterRow:
    """The row of a task; raises as ``run_router``."""
    started = time.perf_counter()
    figures = run_router(
        load_cluster_scenario(task.scenario),
        task.router,
        json.loads(task.options),
        episode_seed(task.purpose, task.seed),
        replicas=task.replicas,
        num_calls=task.num_calls or None,
    )
    same = {name: getattr(figures, name) for name in ClusterRow.__dataclass_fields__ if hasattr(figures, name)}
    return ClusterRow(
        scenario=task.scenario,
        router=task.router,
        options=task.options,
        purpose=task.purpose,
        seed=task.seed,
        replicas=task.replicas,
        num_calls=task.num_calls,
        slo_misses=1.0 - figures.slo_goodput,
        wall_seconds=round(time.perf_counter() - started, 6),
        digest=router_digest(task.router),
        sources=sources_digest(),
        **same,
    )


def run_all(tasks: Sequence[Task], file: RowFile[ClusterRow], *, backend: str = "loky", jobs: int | None = None) -> Generator[ClusterRow]:
    """Run what the file has no row of, each written down as it is ready.

    Args:
        backend, jobs: see ``llmsched_env.parallel``; one job runs in this process.

    Raises:
        ConfigError: as ``run_router``, or as ``start_workers``.
        PolicyError: as ``run_router``.
    """
    open_ = missing(tasks, file.rows)
    if backend == "loky" and jobs == 1:
        results: Generator[ClusterRow] = (run_task(task) for task in open_)
    else:
        results = unordered(backend, start_workers(backend, jobs), run_task, [(task,) for task in open_])
    try:
        for row in results:
            file.append(row)
            yield row
    finally:
        results.close()


def run_to_file(
    tasks: Sequence[Task], path: Path, *, resume: bool = True, backend: str = "loky", jobs: int | None = None
) -> list[ClusterRow]:
    """All rows of these tasks, in their order; those that ``path`` has are not run again.

    Raises:
        ConfigError: as ``run_all``; or the file's rows are no such rows, or of another state of the simulator or of a router.
    """
    opened = RowFile(path, ClusterRow, resume=resume)
    check_figures(path, opened.rows)
    check_origin(path, opened.rows, set(tasks))
    with opened as file:
        for _ in run_all(tasks, file, backend=backend, jobs=jobs):
            pass
        found = {row.task: row for row in file.rows}
    return [found[task] for task in tasks]


# --- figures of several seeds ----------------------------------------------------------------------------
def values(rows: Iterable[ClusterRow], scenario: str, router: str, metric: str) -> dict[int, float]:
    """A figure by seed.

    Raises:
        ConfigError: several rows of one seed, for example with different options.
    """
    found: dict[int, float] = {}
    for row in rows:
        if (row.scenario, row.router) == (scenario, router):
            if row.seed in found:
                raise ConfigError(f"rows: {router} in {scenario} has several of seed {row.seed}, must be one")
            found[row.seed] = float(getattr(row, metric))
    return found


def mean_of(rows: Iterable[ClusterRow], scenario: str, router: str, metric: str) -> Interval:
    """Mean over the seeds with its 95 % interval (Student's t).

    Raises:
        ConfigError: no such row.
    """
    return mean_interval(list(values(rows, scenario, router, metric).values()))


def change(rows: Sequence[ClusterRow], scenario: str, router: str, than: str, metric: str) -> Interval:
    """By how much a router's figure differs from another's, as a share of the mean of the other's, paired seed by seed: 95 %, Student's t.

    Raises:
        ConfigError: routers that did not run on the same seeds.
    """
    own, other = values(rows, scenario, router, metric), values(rows, scenario, than, metric)
    if not own or own.keys() != other.keys():
        raise ConfigError(f"{scenario}: {router} has seeds {sorted(own)}, {than} has {sorted(other)}, must be the same and at least one")
    level = float(np.mean(list(other.values())))
    if level == 0.0:  # no misses at all: nothing to be a share of
        return Interval(math.nan, math.nan, math.nan, len(own))
    return mean_interval([(own[seed] - other[seed]) / level for seed in sorted(own)])


# --- the boundary ------------------------------------------------------------------------------------------
def boundary(
    scenario: ClusterScenario, router: str, options: Mapping[str, Any], *, seeds: int = 10, low: float = 4.0, high: float = 64.0
) -> float:
    """Calls per second at which ``ATTAINMENT`` of the calls meet both limits, by bisection to a twentieth of a call per second.

    Args:
        seeds: of ``boundary``; the share is the mean over them.
        low, high: a rate at which it is met, and one at which it is not.

    Raises:
        ConfigError: a rate range that does not hold the boundary.
    """

    def met(rate: float) -> bool:
        shares = [run_router(scenario, router, options, episode_seed("boundary", k), rate=rate).slo_goodput for k in range(seeds)]
        return float(np.mean(shares)) >= ATTAINMENT

    if not met(low) or met(high):
        raise ConfigError(
            f"rates: {low} to {high}, must be one at which {ATTAINMENT:.0%} of the calls meet their limits, and one at which not"
        )
    while high - low > 0.05:
        middle = (low + high) / 2
        low, high = (middle, high) if met(middle) else (low, middle)
    return low
