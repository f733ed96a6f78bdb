"""The search for a baseline's parameters in one cell, or in several together: coarse to fine along one parameter at a time.

Every parameter has a grid; a point is one index for each. The first trial is the policy as it ships.
Then, parameter after parameter, coarse points of its grid with the others kept at the best so far; then
neighbours of the best at half the distance, and so on down to the next grid point, until nothing near is
better. What is left of the trials starts over from random points, so that every policy with
parameters gets the same number of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_baselines import Setting, policy_options
from llmsched_env.bench.suite import Bench, Cell, engine_of, run_counted
from llmsched_env.bench.variants import make
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.errors import ConfigError
from llmsched_env.runner import Policy
from llmsched_env.types import FloatArray, Workload

TRIALS = 40
"""Of one search, unless asked otherwise."""

COARSE = 7
"""Points of a grid that the first pass looks at, about."""

THETAS = tuple(round(0.8 + 0.01 * i, 2) for i in range(81))
CLASSES = (1, 2, 4, 8, 16, 32, 64)
BUDGETS = (128, 256, 384, 512, 768, 1_024, 1_536, 2_048)
SEATS = (32, 48, 64, 96, 128, 160, 192, 256)
ENGINE: dict[str, Sequence[Any]] = {"engine.max_num_batched_tokens": BUDGETS, "engine.max_num_seqs": SEATS}
"""Token budget and most residents are the operator's to choose whatever the policy; the ``paper`` preset has none of them.

No more residents than the budget has tokens: a trial with fewer is one with as many (``tied``).
"""

Grid = Mapping[str, Sequence[Any]]
GRIDS: dict[str, Grid] = {
    "vllm": ENGINE,
    "vllm-v0": {"budget": (1_024, 2_048, 4_096, 8_192, 16_384), "max_num_seqs": SEATS},
    "sarathi": {"budget": BUDGETS, "max_num_seqs": SEATS},
    "prefill-cadence": {"interval": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64), **ENGINE},
    "prefill-decode-interval": {"rounds": (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32), **ENGINE},
    "active-cap": {"cap": (16, 24, *SEATS), "engine.max_num_batched_tokens": BUDGETS},
    # 0 stands last: no limit.
    "prefill-threshold": {"threshold": (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1_024, 1_536, 0), **ENGINE},
    "wait": {"slack": tuple(round(1.05 + 0.1 * i, 2) for i in range(20)), "num_classes": (1, 2, 4, 8, 16), **ENGINE},
    "nested-wait": {
        "slack": tuple(round(1.05 + 0.1 * i, 2) for i in range(20)),
        "num_segments": (1, 2, 3, 4, 6, None),
        **ENGINE,
    },
    "shortest-prompt": {"theta": (*THETAS, None), "num_classes": CLASSES, **ENGINE},
    "reserve": {"theta": THETAS, **ENGINE},
    "expected-work": {
        "theta": THETAS,
        "c": (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0),
        "num_classes": CLASSES,
        **ENGINE,
    },
    "late-last": {"theta": THETAS, "limit": (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0), **ENGINE},
    "mc-sf": {"margin": tuple(round(0.01 * i, 2) for i in range(31)), "num_classes": (4, 8, 16, 32, 64), **ENGINE},
    "pooled-work": {"level": tuple(round(0.8 + 0.01 * i, 2) for i in range(31)), "memory_share": (0.0, 0.5, 1.0, None), **ENGINE},
    "operate": {"token_budget": BUDGETS, "level": (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99), "tau0": (10.0, 100.0, math.inf)},
    "predicted-work": {"shrink": tuple(round(0.1 * i, 1) for i in range(11)), "level": (0.9, 0.95, 0.97, 0.99, 1.0, 1.05), **ENGINE},
    "oracle-sjf": {"by": ("output", "prompt"), "theta": THETAS, "num_classes": (4, 8, 16, 32, 64), **ENGINE},
}
"""Grids in the order of their values. ``limit`` is in units of the cell's TTFT limit. Policies without an entry have nothing to tune."""

TOGETHER = "non-stationary"
"""In place of a cell's key: one set of parameters for the non-stationary part."""

OBJECTIVES = {"late-last": "slo_goodput"}
"""What is tuned for where it is not ``latency_mean``."""


def objective_of(policy: str) -> str:
    return OBJECTIVES.get(policy, "latency_mean")


def tied(options: dict[str, Any]) -> dict[str, Any]:
    """``options`` with at most as many residents as the token budget has tokens: an engine refuses more."""
    for budget, seats in (("engine.max_num_batched_tokens", "engine.max_num_seqs"), ("budget", "max_num_seqs")):
        if budget in options and seats in options:
            options[seats] = min(options[seats], options[budget])
    return options


def grid_of(policy: str, cell: Cell) -> Grid:
    """The parameters that can be tuned in a cell."""
    grid = GRIDS.get(policy, {})
    if engine_of(cell.scenario, cell.kv).preset == "vllm":
        # The token budget first: what else is best depends on it most.
        return dict(sorted(grid.items(), key=lambda item: not item[0].startswith("engine.")))
    return {name: values for name, values in grid.items() if not name.startswith("engine.") and name != "token_budget"}


def default_options(policy: str, bench: Bench, cell: Cell) -> dict[str, Any]:
    """Options of the policy as it ships: its defaults, and the limit that requests in this cell have."""
    return {"limit": bench.limits(cell)[0]} if policy == "late-last" else {}


@dataclass(frozen=True, slots=True)
class Tuned:
    """The outcome of one search.

    Attributes:
        cell: ``Cell.key``, or ``TOGETHER`` for one set of parameters for several cells of the non-stationary part.
        objective: ``latency_mean`` or ``slo_goodput``; ``relative_latency_mean`` is divided by the default's in the same cell.
        options: of the constructor, engine fields with the prefix ``engine.``; what is not named is the default.
        value, default_value: the objective at these options and at the defaults, mean over the seeds and the cells.
        trials: points evaluated, the defaults among them.
        seeds, num_requests: of each trial in each cell.
        seconds: wall time of the search on one core.
        over: keys of the cells searched together; empty where ``cell`` is the only one.
    """

    cell: str
    policy: str
    objective: str
    options: dict[str, Any]
    value: float
    default_value: float
    trials: int
    seeds: int
    num_requests: int
    seconds: float
    over: tuple[str, ...] = ()

    @property
    def runs(self) -> int:
        """Episodes the search took."""
        return self.trials * self.seeds * max(len(self.over), 1)


Point = tuple[int, ...]


def search(sizes: Sequence[int], start: Sequence[int] | None, trials: int, cost: Callable[[Point], float]) -> Point | None:
    """The best point found of a grid, in at most ``trials`` calls of ``cost``; None if no point was tried or has a finite cost.

    Args:
        sizes: points of each parameter's grid.
        start: where to begin; None for the middle.
        cost: of a point, lower is better; never asked twice for the same one.
    """
    known: dict[Point, float] = {}
    rng = np.random.default_rng(0)

    def ask(point: Point) -> float:
        if point not in known:
            if len(known) == trials:
                raise StopIteration
            known[point] = cost(point)
        return known[point]

    def descend(best: Point, coarse: bool) -> None:
        value = ask(best)
        steps = [max(1, (size - 1) // (COARSE - 1)) for size in sizes]
        if coarse:
            for d, size in enumerate(sizes):
                for i in _spread(size, steps[d]):
                    point = (*best[:d], i, *best[d + 1 :])
                    if ask(point) < value:
                        best, value = point, known[point]
        while True:
            moved = False
            for d, size in enumerate(sizes):
                half = (steps[d] + 1) // 2
                for i in (best[d] - half, best[d] + half):
                    if 0 <= i < size:
                        point = (*best[:d], i, *best[d + 1 :])
                        if ask(point) < value:
                            best, value, moved = point, known[point], True
                            break
            if not moved:
                if all(step == 1 for step in steps):
                    return
                steps = [(step + 1) // 2 for step in steps]

    try:
        descend(tuple(start) if start is not None else tuple(size // 2 for size in sizes), True)
        while len(known) < min(trials, math.prod(sizes)):
            descend(tuple(int(i) for i in rng.integers(sizes)), False)
    except StopIteration:
        pass
    if not known:
        return None
    best = min(known, key=lambda point: known[point])
    return best if math.isfinite(known[best]) else None


def _spread(size: int, step: int) -> Iterator[int]:
    """Every ``step``-th index, the last one too."""
    yield from range(0, size, step)
    if (size - 1) % step:
        yield size - 1


def tune(bench: Bench, cell: Cell, policy: str, *, seeds: int, trials: int) -> Tuned:
    """Tune one policy in one cell on the seeds of ``tuning``.

    A trial that a policy's theory refuses, or that leaves requests unserved, counts as a trial and loses.

    Raises:
        ConfigError: unknown policy.
    """
    return _tuned(bench, [cell], policy, cell.key, (), seeds, trials)


def tune_together(bench: Bench, chosen: Sequence[Cell], policy: str, *, seeds: int, trials: int) -> Tuned:
    """Tune one set of parameters of a policy for several cells: the best on average over them.

    The objective is the mean over cells of the mean latency divided by that of the policy as it ships, or of the SLO goodput;
    so all cells count alike. A trial that loses in one cell, as in ``tune``, loses.

    Raises:
        ConfigError: unknown policy; no cell, or cells that differ in parameters or limits; one where the policy as it ships does not run.
    """
    grids = [grid_of(policy, cell) for cell in chosen]
    if not grids or any(grid != grids[0] for grid in grids) or len({bench.limits(cell) for cell in chosen}) > 1:
        named = ", ".join(cell.key for cell in chosen) or "none"
        raise ConfigError(f"cells: {named}, must be at least one and agree in parameters and limits")
    return _tuned(bench, chosen, policy, TOGETHER, tuple(cell.key for cell in chosen), seeds, trials)


def _tuned(bench: Bench, chosen: Sequence[Cell], policy: str, key: str, over: tuple[str, ...], seeds: int, trials: int) -> Tuned:
    started = time.perf_counter()
    places = [_Place(bench.setting(c), [bench.workload(c, "tuning", seed) for seed in range(seeds)], bench.limits(c)) for c in chosen]
    grid, (limit, _) = grid_of(policy, chosen[0]), places[0].limits
    names, objective = list(grid), objective_of(policy)
    relative = bool(over) and objective == "latency_mean"
    backend = SimBackend()
    costs: dict[Point | None, float] = {}

    def options_of(point: Point) -> dict[str, Any]:
        options = {name: grid[name][i] for name, i in zip(names, point, strict=True)}
        if "limit" in options:
            options["limit"] *= limit
        return tied(options)

    def by_cell(options: Mapping[str, Any]) -> FloatArray:
        return np.array([place.cost(policy, options, objective, backend) for place in places])

    shipped = default_options(policy, bench, chosen[0])
    shipped_costs = by_cell(shipped)
    if relative and not np.isfinite(shipped_costs).all():
        raise ConfigError(f"{policy}: does not run as it ships in {chosen[int(np.argmax(~np.isfinite(shipped_costs)))].key}")
    scale = shipped_costs if relative else np.ones(len(places))

    def cost(point: Point) -> float:
        costs[point] = float(np.mean(by_cell(options_of(point)) / scale))
        return costs[point]

    default = costs[None] = float(np.mean(shipped_costs / scale))
    best: dict[str, Any] = shipped
    if grid:
        # Where the engines' own values differ between cells, the defaults are no point of the grid, and the first cell's are the start.
        values = [[shipped.get(n, _shipped_value(policy, place.setting, n)) for n in names] for place in places]
        start = [nearest([v * limit for v in grid[n]] if n == "limit" else grid[n], v) for n, v in zip(names, values[0], strict=True)]
        at_start = options_of(tuple(start))
        if all(at_start == dict(zip(names, own, strict=True)) for own in values):
            # The defaults lie on the grid: their trial is the first point's.
            first, spent = tuple(start), 0
            found = search([len(grid[n]) for n in names], start, trials, lambda p: default if p == first else cost(p))
        else:
            spent = 1
            found = search([len(grid[n]) for n in names], start, trials - spent, cost)
        if found is not None and costs.get(found, math.inf) < default:
            best = options_of(found)
    value = min(costs.values())
    sign = -1.0 if objective == "slo_goodput" else 1.0
    return Tuned(
        cell=key,
        policy=policy,
        objective=f"relative_{objective}" if relative else objective,
        options=best,
        value=sign * value,
        default_value=sign * default,
        trials=len(costs),
        seeds=seeds,
        num_requests=bench.count(chosen[0]),
        seconds=round(time.perf_counter() - started, 3),
        over=over,
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """What the trials of one cell share."""

    setting: Setting
    workloads: Sequence[Workload]
    limits: tuple[float, float]

    def cost(self, policy: str, options: Mapping[str, Any], objective: str, backend: SimBackend) -> float:
        """Mean over the workloads; infinite where the policy refuses these options."""
        try:
            chosen = make(policy, self.setting, options)
            return float(np.mean([_cost(chosen, workload, backend, objective, self.limits) for workload in self.workloads]))
        except ConfigError:
            return math.inf


def _shipped_value(policy: str, setting: Setting, name: str) -> Any:
    """A constructor's default, or the engine's own value."""
    if name.startswith("engine."):
        return getattr(setting.engine, name.removeprefix("engine."))
    return policy_options(policy)[name].default


def _cost(policy: Policy, workload: Workload, backend: SimBackend, objective: str, limits: tuple[float, float]) -> float:
    figures, _ = run_counted(policy, workload, backend, limits)
    if figures.completed < figures.requests:
        return math.inf
    return -figures.slo_goodput if objective == "slo_goodput" else figures.latency_mean


def nearest(values: Sequence[Any], value: Any) -> int:
    """Index of a value in its grid, of the nearest number where it is not in it."""
    if value in values:
        return list(values).index(value)
    return int(np.argmin([abs(v - value) if v is not None and value is not None else math.inf for v in values]))
