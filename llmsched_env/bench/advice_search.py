"""The search of ``llmsched advise``: every policy's options and vLLM's limits, policies dropping out as it goes on.

A round gives each policy that is left the same number of settings to try, by the search of ``llmsched_env.bench.tuning``: first the
policy as it ships, then one parameter after the other from coarse to fine. After each round the better half of the policies goes on,
with the trials that it has. What was simulated once is never simulated again, so a search that was broken off goes on where it was.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from llmsched_baselines import policy_options
from llmsched_env.bench.advice import DEFAULT, FLAGS_ALONE, Case, Choice, Row, refused
from llmsched_env.bench.tuning import GRIDS, Point, nearest, search
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.fluid import stability_boundary
from llmsched_env.metrics import Summary
from llmsched_env.row_file import RowFile
from llmsched_env.runner import Policy
from llmsched_env.types import TILE_TOKENS
from llmsched_hardware.options import setting_names

TOKENS = (64, 96, *(base * 2**i for i in range(9) for base in (128, 192)))
"""Token budgets that are tried, around the default's own: 64 to 49,152."""
SEQS = (4, 6, *(base * 2**i for i in range(9) for base in (8, 12)))
"""Most residents that are tried: 4 to 3,072."""
REACH = 4, 16
"""Up to so many times the default's, and down to such a part of it."""
LIMITS = ("max_num_batched_tokens", "max_num_seqs")
ROUNDS = 3
HOPELESS = 0.05
"""Share by which a setting may be worse than the default on the parts that chose, to be judged on others all the same."""
OF_A_POLICY = 2
"""Settings of one policy that are judged: neighbours say little that is new."""
MOST_OUTSIDE = 0.05
"""Share of iterations beyond the calibration above which a setting is not advised, unless the default goes as far."""

OUTSIDE = f"go further beyond the calibration than the default, in more than {100 * MOST_OUTSIDE:.0f} % of their iterations"
UNSTABLE = "cannot carry the load, which the default can (stability boundary)"
TOO_DEAR = "break a limit of --at-most"

Grid = dict[str, tuple[Any, ...]]


def around(values: Sequence[int], default: int, least: int = 1) -> tuple[int, ...]:
    """Those within reach of the default, which is among them."""
    most, part = REACH
    return tuple(sorted({default, *(v for v in values if max(default / part, least) <= v <= default * most)}))


def grid_around(choice_policy: str, shipped: Policy, engine: EngineConfig, ttft_limit: float) -> Grid:
    """What can be tried of a policy: vLLM's limits first, as what else is best depends on them most; then its own options.

    Args:
        choice_policy: its name in the registry; one without an entry in ``GRIDS``, such as an agent, has the limits alone.
        shipped: the policy as it ships, whose own values are among those that are tried.
        engine: the default's.
        ttft_limit: seconds, the unit of ``limit``.
    """
    own: Grid = {name: tuple(values) for name, values in GRIDS.get(choice_policy, {}).items() if not name.startswith("engine.")}
    tokens = around(TOKENS, engine.max_num_batched_tokens, TILE_TOKENS // 2)
    seqs = around(SEQS, engine.max_num_seqs)
    limits: Grid = {"engine.max_num_batched_tokens": tokens, "engine.max_num_seqs": seqs}
    for name, values in (("budget", tokens), ("max_num_seqs", seqs)):
        if name in own:  # the policy's own name for the same limit
            own[name] = values
            limits.pop("engine.max_num_batched_tokens" if name == "budget" else "engine.max_num_seqs")
    if "cap" in own:  # at most the sequence cap, which it makes smaller
        limits.pop("engine.max_num_seqs")
        own["cap"] = tuple(v for v in seqs if v <= engine.max_num_seqs)
    if "limit" in own:
        own["limit"] = tuple(v * ttft_limit for v in own["limit"])
    found: Grid = {}
    for name, values in (*limits.items(), *own.items()):
        default = shipped_value(choice_policy, shipped, name)
        found[name] = tuple(values) if default in values or not isinstance(default, int) else tuple(sorted({*values, default}))
    return found


def shipped_value(policy: str, shipped: Policy, name: str) -> Any:
    """A constructor's default, or the engine's value under the policy as it ships."""
    if name.startswith("engine."):
        return getattr(shipped.engine, name.removeprefix("engine."))
    return policy_options(policy)[name].default


def check_budget(case: Case, budget: int, finalists: int) -> None:
    """Refuse a budget that leaves no search.

    Raises:
        ConfigError: less than two settings for each policy.
    """
    least = (finalists + 1) * case.evaluation + 2 * ROUNDS * len(case.policies) * case.selection
    if budget < least:
        raise ConfigError(
            f"--budget: {budget} simulations, must be >= {least}: {finalists + 1} settings on {case.evaluation} parts, and "
            f"{2 * ROUNDS} settings for each of {len(case.policies)} policies on {case.selection}"
        )


class Stopped(Exception):
    """Ctrl-C: no further simulation begins."""


@dataclass(frozen=True, slots=True)
class Tried:
    """One setting on the parts that the search sees.

    Attributes:
        cost: mean of ``Objective.cost``; infinite where it is refused or leaves requests unserved.
        outside: share of iterations outside the calibration's range.
        figures: of each part, in the order of ``Case.selection_seeds``; empty where it is refused.
        boundary: requests/s of the fluid model's stability boundary on its engine; 0 where it is refused.
    """

    choice: Choice
    cost: float
    outside: float
    figures: tuple[Summary, ...]
    boundary: float = 0.0

    def mean(self, metric: str) -> float:
        """Of one field of ``Summary`` over the parts."""
        return math.fsum(float(getattr(f, metric)) for f in self.figures) / max(len(self.figures), 1)


@dataclass
class Study:
    """A case, the rows that there are, and what becomes of them.

    Attributes:
        budget: simulations in all, those of the evaluation among them.
        finalists: settings beside the default that are simulated on parts that the search has not seen.
        rows: open; takes every simulation as it ends.
        at_most: field of ``Summary`` to the most it may be, as a multiple of the default's, for a setting to be advised.
        advance: called once for each simulation, with its description.
    """

    case: Case
    budget: int
    finalists: int
    rows: RowFile[Row]
    advance: Callable[[str], None] = lambda _: None
    at_most: Mapping[str, float] = field(default_factory=dict)
    tried: dict[Choice, Tried] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def __post_init__(self) -> None:
        self._known = {row.key: row for row in self.rows.rows}
        self._boundaries: dict[tuple[Any, ...], float] = {}
        self._counted: set[tuple[str, str, int]] = set()

    @property
    def settings(self) -> int:
        """How many settings the search may try."""
        return (self.budget - (self.finalists + 1) * self.case.evaluation) // self.case.selection

    # --- simulations ------------------------------------------------------------------------------
    def row(self, choice: Choice, seed: int, policy: Policy | None) -> Row:
        """The row of a simulation, which is made where there is none."""
        key = (choice.policy, choice.options_text, seed)
        with self._lock:
            known = self._known.get(key)
        if known is None:
            if self._stopped:
                raise Stopped
            known = self.case.run(choice, policy if policy is not None else self.case.build(choice), seed)
            self._keep(known)
        with self._lock:
            again = key in self._counted
            self._counted.add(key)
        if not again:
            self.advance(choice.text)
        return known

    def _keep(self, row: Row) -> None:
        with self._lock:
            self._known[row.key] = row
            self.rows.append(row)

    def on_selection(self, choice: Choice) -> Tried:
        """A setting on the parts that the search sees."""
        seeds = self.case.selection_seeds
        with self._lock:
            known = [self._known.get((choice.policy, choice.options_text, seed)) for seed in seeds]
        if known[0] is not None and not known[0].figures.end:
            return Tried(choice, math.inf, 0.0, ())
        try:
            policy = self.case.build(choice)
        except ConfigError as error:
            self._keep(refused(choice, seeds[0], str(error)))
            return Tried(choice, math.inf, 0.0, ())
        figures = tuple(self.row(choice, seed, policy).figures for seed in seeds)
        cost = math.fsum(map(self.case.objective.cost, figures)) / len(figures)
        return Tried(choice, cost, outside(figures), figures, self._boundary(policy.engine))

    def _boundary(self, engine: EngineConfig) -> float:
        """Of the engine, computed once for each."""
        key = tuple(getattr(engine, name) for name in setting_names())
        if key not in self._boundaries:
            self._boundaries[key] = stability_boundary(self.case.statistics, engine)
        return self._boundaries[key]

    # --- the search -------------------------------------------------------------------------------
    def search(self, jobs: int) -> None:
        """Fill ``tried``.

        Args:
            jobs: threads; compiled policies run side by side.
        """
        self._note(self.on_selection(DEFAULT))
        left = list(self.case.policies)
        trials = dict.fromkeys(left, 0)
        with self._workers(jobs) as pool:
            for i in range(ROUNDS):
                share = self.settings // (ROUNDS * len(left))
                for name in left:
                    trials[name] += max(share, 1)
                found = list(pool.map(lambda name: self._of_policy(name, trials[name]), left))
                for each in found:
                    for one in each:
                        self._note(one)
                if i + 1 < ROUNDS:
                    best = {name: min(map(self._wanted, each)) for name, each in zip(left, found, strict=True)}
                    left = sorted(left, key=lambda name: best[name])[: max(math.ceil(len(left) / 2), 1)]

    def _note(self, one: Tried) -> None:
        self.tried.setdefault(one.choice, one)

    def _of_policy(self, name: str, trials: int) -> list[Tried]:
        """The settings of one policy that a search of so many trials tries."""
        shipped = self.case.build(Choice(name))
        text = self.case.policies[name].text
        limit = self.case.objective.ttft_limit
        grid = grid_around(text, shipped, self.case.scenario.engine, limit if math.isfinite(limit) else self.case.scenario.ttft_slo)
        grid = {option: values for option, values in grid.items() if self._follows(name, option, values)}
        defaults = {option: shipped_value(text, shipped, option) for option in grid}
        found: list[Tried] = []

        def cost(point: Point) -> float:
            options = {option: grid[option][i] for option, i in zip(grid, point, strict=True)}
            choice = Choice(name, tuple((option, value) for option, value in options.items() if value != defaults[option]))
            found.append(self.on_selection(choice))
            return self._wanted(found[-1])

        start = [nearest(grid[option], defaults[option]) for option in grid]
        if grid:
            search([len(values) for values in grid.values()], start, trials, cost)
        else:
            found.append(self.on_selection(Choice(name)))
        return found

    def _wanted(self, one: Tried) -> float:
        """Its cost; infinite where it is not advised, so that the search stays where an advice can come from."""
        return math.inf if self.excluded(one) else one.cost

    def _follows(self, name: str, option: str, values: Sequence[Any]) -> bool:
        """Whether a policy runs on an engine with another value of this option; all that are not the engine's are its own."""
        if not option.startswith("engine."):
            return True
        field_of = option.removeprefix("engine.")
        shipped = getattr(self.case.build(Choice(name)).engine, field_of)
        for value in sorted(values, reverse=True):
            try:
                found = getattr(self.case.build(Choice(name, ((option, value),))).engine, field_of)
            except ConfigError:
                continue
            if value != shipped:
                return bool(found == value)
        return False

    # --- what it found ----------------------------------------------------------------------------
    def ranking(self) -> list[Tried]:
        """Settings by cost, one of each group that did the same on every part: the one with the fewest options.

        Those that are refused or leave requests unserved are left out, and those that ``excluded`` names.
        """
        groups: dict[tuple[float, ...], Tried] = {}
        order = list(self.case.policies)
        usable = (one for one in self.tried.values() if math.isfinite(one.cost) and not self.excluded(one))
        for one in sorted(usable, key=lambda one: (order.index(one.choice.policy), len(one.choice.options))):
            same = tuple(value for f in one.figures for value in (f.latency_mean, f.latency_p99, f.ttft_mean, f.tpot_mean, f.sim_seconds))
            groups.setdefault(same, one)
        return sorted(groups.values(), key=lambda one: one.cost)

    def chosen(self) -> list[Choice]:
        """The settings to be judged, the default aside: the best, at most ``OF_A_POLICY`` of each policy, one of flags alone among them.

        What is worse than the default by more than ``HOPELESS`` is not judged, but for the best.
        """
        found: list[Choice] = []
        default = self.tried[DEFAULT].cost
        worst = default + HOPELESS * abs(default)
        all_others = [one for one in self.ranking() if one.choice != DEFAULT]
        ranking = [one.choice for i, one in enumerate(all_others) if i == 0 or one.cost <= worst]
        for choice in ranking:
            if sum(other.policy == choice.policy for other in found) < OF_A_POLICY:
                found.append(choice)
        plain = next((choice for choice in found if choice.policy in FLAGS_ALONE), None)
        if plain is not None and self.finalists > 1 and plain not in found[: self.finalists]:
            return [*found[: self.finalists - 1], plain]
        return found[: self.finalists]

    def excluded(self, one: Tried) -> str:
        """Why a setting is not advised whatever it gains; empty where it may be.

        It goes beyond the calibration in more than ``MOST_OUTSIDE`` of the iterations and further than the default; or the load is
        within the stability boundary under the default and not under it; or it breaks a limit of ``at_most``.
        """
        default = self.tried[DEFAULT]
        if one.choice == DEFAULT:
            return ""
        if one.outside > max(MOST_OUTSIDE, default.outside):
            return OUTSIDE
        if one.boundary <= self.case.rate < default.boundary:
            return UNSTABLE
        if any(one.mean(metric) > factor * default.mean(metric) for metric, factor in self.at_most.items()):
            return TOO_DEAR
        return ""

    @property
    def left_out(self) -> dict[str, int]:
        """How many settings are not advised, by the reason."""
        reasons = [self.excluded(one) for one in self.tried.values() if math.isfinite(one.cost)]
        return {reason: reasons.count(reason) for reason in (OUTSIDE, UNSTABLE, TOO_DEAR) if reason in reasons}

    def evaluate(self, choices: Sequence[Choice], jobs: int) -> Mapping[Choice, tuple[Summary, ...]]:
        """Figures on the parts that the search has not seen, in the order of ``Case.evaluation_seeds``."""

        def figures(choice: Choice) -> tuple[Summary, ...]:
            policy = self.case.build(choice)
            return tuple(self.row(choice, seed, policy).figures for seed in self.case.evaluation_seeds)

        with self._workers(jobs) as pool:
            return dict(zip(choices, pool.map(figures, choices), strict=True))

    @contextmanager
    def _workers(self, jobs: int) -> Iterator[ThreadPoolExecutor]:
        """Threads that stop at their next row when the caller is broken off, by Ctrl-C as well; otherwise leaving would wait for them."""
        with ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="advise") as pool:
            try:
                yield pool
            except BaseException:
                self._stopped = True
                raise


def outside(figures: Sequence[Summary]) -> float:
    """Share of iterations outside the calibration's range."""
    return sum(f.out_of_range for f in figures) / max(sum(f.iterations for f in figures), 1)
