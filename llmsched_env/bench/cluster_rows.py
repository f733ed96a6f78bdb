"""Rows of finished runs of a cluster: what one holds, and whether those of a file can be gone on with."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_env.bench.cluster_routers import router_digest
from llmsched_env.bench.evaluation import sources_digest
from llmsched_env.bench.seeds import Purpose
from llmsched_env.cluster.scenarios import REPLICAS
from llmsched_env.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Task:
    """One run of ``llmsched_env.bench.cluster.run_router``."""

    scenario: str
    router: str
    options: str  # as JSON
    purpose: Purpose
    seed: int
    replicas: int = REPLICAS
    num_calls: int = 0  # 0: the scenario's own

    @classmethod
    def of(
        cls,
        scenario: str,
        router: str,
        options: Mapping[str, Any],
        purpose: Purpose,
        seed: int,
        replicas: int = REPLICAS,
        num_calls: int = 0,
    ) -> Task:
        return cls(scenario, router, json.dumps(dict(options), sort_keys=True), purpose, seed, replicas, num_calls)


@dataclass(frozen=True, slots=True)
class ClusterRow:
    """One run: a line of the CSV file. Seconds and shares, as in ``ClusterSummary``; ``slo_misses`` is 1 - ``slo_goodput``.

    ``digest`` is the router's (``router_digest``), ``sources`` the simulator's.
    """

    scenario: str
    router: str
    options: str
    purpose: str
    seed: int
    replicas: int
    num_calls: int
    requests: int
    completed: int
    rejected: int
    latency_mean: float
    latency_p99: float
    program_latency_mean: float
    ttft_mean: float
    ttft_p99: float
    tpot_mean: float
    tpot_p99: float
    slo_misses: float
    cached_share: float
    rerouted: int
    evictions: int
    replica_jain: float
    wall_seconds: float
    digest: str
    sources: str

    @property
    def task(self) -> Task:
        return Task(self.scenario, self.router, self.options, self.purpose, self.seed, self.replicas, self.num_calls)  # type: ignore[arg-type]


def missing(tasks: Iterable[Task], rows: Iterable[ClusterRow]) -> list[Task]:
    """Tasks that have no row yet."""
    done = {row.task for row in rows}
    return [task for task in tasks if task not in done]


# --- rows of a file --------------------------------------------------------------------------------------------
_COUNTS = ("seed", "num_calls", "requests", "completed", "rejected", "rerouted", "evictions")
_OF_COMPLETED = ("latency_mean", "latency_p99", "ttft_mean", "ttft_p99")
"""Seconds that there are where a call completed."""
_OF_SOME = ("program_latency_mean", "tpot_mean", "tpot_p99")
"""Seconds that a short run may have none of: no program began and ended in it, or every answer had one token."""
_SHARES = ("slo_misses", "cached_share", "replica_jain")


def check_figures(path: Path, rows: Sequence[ClusterRow]) -> None:
    """Refuse rows that no run can have given, and two of one run.

    Raises:
        ConfigError: the file, the row (1 for the first after the heading), the column, the value and what is allowed.
    """
    seen: dict[Task, int] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        for name, value, right, allowed in _figures(row):
            if not right:
                raise ConfigError(f"{where}: {name} is {value}, must be {allowed}")
        first = seen.setdefault(row.task, number)
        if first != number:
            raise ConfigError(f"{where}: the same run as row {first}, {row.router} in {row.scenario} with seed {row.seed}; must be one")


def _figures(row: ClusterRow) -> list[tuple[str, float, bool, str]]:
    """(column, value, whether it can be, what can be)."""
    found: list[tuple[str, float, bool, str]] = []
    none = row.completed == 0
    for name in _COUNTS:
        found.append((name, getattr(row, name), getattr(row, name) >= 0, "a whole number >= 0"))
    found.append(("replicas", row.replicas, row.replicas >= 1, "a whole number >= 1"))
    ended = row.completed + row.rejected
    found.append(("requests", row.requests, row.requests == ended, f"{ended}, completed and rejected calls together"))
    found.append(("rerouted", row.rerouted, row.rerouted <= row.requests, f"at most {row.requests}, the calls"))
    for name in (*_OF_COMPLETED, *_OF_SOME, "wall_seconds"):
        value = getattr(row, name)
        unknown = name != "wall_seconds" and (none or name in _OF_SOME)
        found.append((name, value, 0.0 <= value < math.inf or (unknown and math.isnan(value)), "a finite number >= 0"))
    for name in _SHARES:
        value = getattr(row, name)
        unknown = row.requests == 0 if name == "slo_misses" else none
        found.append((name, value, 0.0 <= value <= 1.0 or (unknown and math.isnan(value)), "a number from 0 to 1"))
    return found


def check_origin(path: Path, rows: Iterable[ClusterRow], wanted: set[Task]) -> None:
    """Refuse rows of another state of the simulator, or of a router, beside new ones.

    Raises:
        ConfigError: the digest of their sources, or of their router, is not the present one.
    """
    digests = {router: router_digest(router) for router in {task.router for task in wanted}}
    for row in rows:
        if row.task not in wanted:
            continue
        for what, then, now in (
            ("the simulator's sources", row.sources, sources_digest()),
            (f"the router {row.router!r}", row.digest, digests[row.router]),
        ):
            if then != now:
                raise ConfigError(
                    f"--resume: {path} has rows of another state of {what} ({then or 'none'}, now {now or 'none'}); "
                    "use --overwrite, another place or --report-only"
                )
