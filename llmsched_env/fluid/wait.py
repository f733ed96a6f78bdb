"""WAIT thresholds (arXiv 2504.11320 v4, Algorithm 1 and eq. wait_thresholds).

A threshold n_j per class, used at every stage, must satisfy ::

    DT(n) = tau(batch with n_j per stage) <= n_j / lam_j   for every class j
    M^pi  = sum_j n_j S_j <= C

Both hold for n_j = lam_j x iff DT* <= x and x is no longer than the limits of the engine allow (x <=
C / a for memory); x > DT* gives the strict slack under which the paper proves bounded delays.
Classes may be buckets of lengths: then S_j is the mean over the bucket.

The paper's thresholds are integers. At the rates of a real server n*_j is often below 1, and ceil
makes no feasible vector. Then thresholds stay fractional and are realised by rotation: the i-th
iteration of a class takes floor((i + 1) n) - floor(i n) new prompts (the authors' later code rotates
fractional limits in the same spirit).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid.equilibrium import TOLERANCE, CycleLoad, Fluid, charge_sum, check_rate, infeasible, stage_shift
from llmsched_env.types import FloatArray, IntArray, LengthStatistics, QueueLayout

Rounding = Literal["auto", "integer", "rotation"]

_MAX_CANDIDATES = 4096

LEAST_THRESHOLD = 1e-12

_ROTATION_SHIFT = 1e-6
"""Keeps i * n that is an integer but for rounding error on that integer."""


def rotation_quota(thresholds: npt.ArrayLike, iteration: npt.ArrayLike) -> IntArray:
    """floor((i + 1) n) - floor(i n): new requests of each threshold in its i-th iteration (from 0).

    Over any w iterations the sum is floor(w n) or ceil(w n); integer thresholds give n every time.
    """
    n, i = np.asarray(thresholds, dtype=np.float64), np.asarray(iteration, dtype=np.float64)
    quota: IntArray = (np.floor((i + 1) * n + _ROTATION_SHIFT) - np.floor(i * n + _ROTATION_SHIFT)).astype(np.int32)
    return quota


def ceil_tolerant(values: FloatArray) -> FloatArray:
    """ceil, except that a value above an integer by rounding error alone stays there; at least 1."""
    return np.maximum(np.ceil(values * (1 - TOLERANCE)), 1.0)


def floor_tolerant(values: FloatArray) -> FloatArray:
    """The same downwards; at least 1."""
    return np.maximum(np.floor(values * (1 + TOLERANCE)), 1.0)


def all_integers(values: FloatArray) -> bool:
    return bool(np.all(values == np.round(values)))


def show_thresholds(thresholds: FloatArray) -> str:
    return "n = (" + ", ".join(f"{n:.6g}" for n in thresholds) + ")"


@dataclass(frozen=True, slots=True)
class WaitThresholds:
    """Thresholds of WAIT and what they promise.

    Attributes:
        thresholds: (J,) float64 requests per stage; integers unless ``rounding`` is ``rotation``.
        rounding: how the policy realises them.
        cycle_seconds: x of n_j = lam_j x before rounding; for given thresholds min_j n_j / lam_j.
        iteration_seconds: DT(n).
        kv_tokens: M^pi, KV charged with n_j mean requests at each stage.
        kv_tokens_worst: the same when every resident is the largest of its bucket that can be at its
            stage, with exact blocks and, under rotation, the worst phase. No eviction can occur if this is <= C.
        overload: the conditions do not hold: made for an arrival rate that cannot be sustained.
        notes: what a reader of results should know.
    """

    thresholds: FloatArray
    rounding: Literal["integer", "rotation"]
    cycle_seconds: float
    iteration_seconds: float
    kv_tokens: float
    kv_tokens_worst: float
    overload: bool
    notes: tuple[str, ...] = ()

    def quota(self, iteration: npt.ArrayLike) -> IntArray:
        """(J,) int32 new prompts that each class takes in its ``iteration``-th launched iteration (from 0)."""
        return rotation_quota(self.thresholds, iteration)


@dataclass(frozen=True, slots=True)
class ClassProfiles:
    """Support points of a length distribution with the class each belongs to; arrays of shape (P,)."""

    prompt: FloatArray
    output: FloatArray
    weight: FloatArray
    class_id: IntArray
    num_classes: int


def class_profiles(statistics: LengthStatistics, layout: QueueLayout) -> ClassProfiles:
    """The classes of ``layout`` as sets of support points."""
    ids = layout.classify(statistics.prompt, statistics.output, statistics.type_id, statistics.tenant, statistics.predicted)
    return ClassProfiles(statistics.prompt, statistics.output, statistics.weight, ids, layout.num_classes)


def _worst_kv(fluid: Fluid, thresholds: FloatArray) -> float:
    """sum_j sum_s n_j max{charge(l + s)} over the points of class j that reach stage s."""
    engine, shift, total = fluid.engine, stage_shift(fluid.engine), 0.0
    for j in range(fluid.num_classes):
        points = np.flatnonzero(fluid.class_id == j)
        last_stage = np.ceil(fluid.output[points]).astype(np.int64) - shift
        prompts = np.ceil(fluid.prompt[points]).astype(np.int64)
        order = np.argsort(-last_stage, kind="stable")
        stages, longest = last_stage[order].tolist(), np.maximum.accumulate(prompts[order]).tolist()
        stage_sum, variation = 0, 0
        for i in range(points.size):
            below = stages[i + 1] if i + 1 < points.size else -1
            stage_sum += charge_sum(longest[i], below + 1, stages[i], engine)
            if i == 0:
                variation = charge_sum(longest[0], stages[0], stages[0], engine)
            if below >= 0:
                drop = charge_sum(longest[i + 1], below, below, engine) - charge_sum(longest[i], below + 1, below + 1, engine)
                variation += 2 * max(0, drop)
        total += float(thresholds[j]) * stage_sum
        if thresholds[j] != round(float(thresholds[j])):
            # Quotas of any w iterations in a row differ from w n by less than 1, so by Abel summation
            # the excess is at most the total variation of the charge over the stages.
            total += variation
    return total


class _Model:
    """The conditions of WAIT for one set of arrival streams."""

    def __init__(self, fluid: Fluid) -> None:
        self.fluid = fluid
        self.rate = fluid.class_rate
        self.active = self.rate > 0
        self.class_sums = fluid.class_sums
        self.x_min = fluid.load.equilibrium_seconds()
        self.x_max, self.binding = fluid.load.longest_cycle()

    def load(self, thresholds: FloatArray) -> CycleLoad:
        return CycleLoad(thresholds @ self.class_sums, self.fluid.engine)

    def cycles(self, thresholds: FloatArray) -> FloatArray:
        """(J,) n_j / lam_j, infinity for a class without arrivals."""
        cycles: FloatArray = np.divide(thresholds, self.rate, out=np.full(self.rate.shape, np.inf), where=self.active)
        return cycles

    def violations(self, thresholds: FloatArray) -> list[str]:
        load = self.load(thresholds)
        seconds, cycles = load.seconds, self.cycles(thresholds)
        found = [
            f"iteration time: DT(n) = {seconds:.6g} s > n_j / lam_j = {thresholds[j]:.6g} / {self.rate[j]:.6g} = {cycles[j]:.6g} s "
            f"(class {j})"
            for j in np.flatnonzero(seconds > cycles * (1 + TOLERANCE))
        ]
        return found + load.violations()

    def feasible(self, thresholds: FloatArray) -> bool:
        load = self.load(thresholds)
        return load.seconds <= float(self.cycles(thresholds).min()) * (1 + TOLERANCE) and not load.violations()

    def fractional(self, x: float) -> FloatArray:
        """n_j = lam_j x; a class without arrivals gets 1 and stays out of every sum."""
        return np.where(self.active, self.rate * x, 1.0)

    def integer(self, x: float, smallest: float) -> tuple[FloatArray, float] | None:
        """Feasible (ceil(lam y), y) with the y in [DT*, x_max] nearest to x, or None.

        If any integer vector n is feasible, so is ceil(lam y) with y = min_j n_j / lam_j; so the
        candidates y = k / lam_j are exhaustive (as far as their number is kept in bounds).
        ``smallest``: least lam_j y that may be rounded up.
        """
        wanted = np.where(self.active, ceil_tolerant(self.rate * x), 1.0)
        rates = self.rate[self.active]
        span = _MAX_CANDIDATES // rates.size + 1
        grid = np.floor(rates * x)[:, None] + np.arange(-span, span + 1)[None, :]
        cycles = np.unique((grid / rates[:, None])[grid >= 1])
        cycles = cycles[(cycles >= self.x_min * (1 - TOLERANCE)) & (cycles <= self.x_max * (1 + TOLERANCE))]
        cycles = cycles[cycles * rates.min() >= smallest * (1 - TOLERANCE)]
        nearest = [cycles[i] for i in np.argsort(np.abs(cycles - x), kind="stable")[:_MAX_CANDIDATES]]
        if x * float(rates.min()) >= smallest * (1 - TOLERANCE) and self.feasible(wanted):
            return wanted, x
        for y in nearest:
            candidate = np.where(self.active, ceil_tolerant(self.rate * y), 1.0)
            if self.feasible(candidate):
                return candidate, float(y)
        return None

    def result(self, thresholds: FloatArray, cycle: float, notes: list[str], overload: bool = False) -> WaitThresholds:
        load = self.load(thresholds)
        worst = _worst_kv(self.fluid, thresholds)
        for j in np.flatnonzero(~self.active):
            notes = [*notes, f"class {j} has no arrivals in the statistics: threshold 1, not counted in M^pi"]
        capacity = self.fluid.engine.kv_capacity_tokens
        if worst > capacity * (1 + TOLERANCE):
            notes = [*notes, f"with the longest residents at every stage {worst:.6g} KV tokens > C = {capacity}: evictions are possible"]
        rounding: Literal["integer", "rotation"] = "integer" if all_integers(thresholds) else "rotation"
        return WaitThresholds(thresholds, rounding, cycle, load.seconds, load.kv_tokens, worst, overload, tuple(notes))


def _choose(model: _Model, x: float, rounding: Rounding) -> tuple[FloatArray, float]:
    """Thresholds at a feasible cycle x, in the rounding asked for."""
    if rounding != "rotation":
        found = model.integer(x, smallest=1.0 if rounding == "auto" else 0.0)
        if found is not None:
            return found
        if rounding == "integer":
            tried = np.where(model.active, ceil_tolerant(model.rate * x), 1.0)
            broken = "; ".join(model.violations(tried))
            raise InfeasibleError(
                f"wait_thresholds: no integer thresholds satisfy the conditions; {show_thresholds(tried)} breaks {broken}; "
                f"nearest feasible: {show_thresholds(model.fractional(x))} with rounding='rotation'"
            )
    return model.fractional(x), x


def wait_thresholds(
    prompt: npt.ArrayLike,
    output: npt.ArrayLike,
    rate: npt.ArrayLike,
    engine: EngineConfig,
    *,
    class_id: npt.ArrayLike | None = None,
    num_classes: int | None = None,
    slack: float = 1.25,
    rounding: Rounding = "auto",
    overload: bool = False,
) -> WaitThresholds:
    """Thresholds n_j = lam_j x with x = min(slack * DT*, longest cycle the engine's limits allow).

    Args:
        prompt, output, rate: (P,) tokens, tokens, requests/s of the support points.
        engine: gives tau, C and, in the ``vllm`` preset, token budget and sequence cap.
        class_id: (P,) class of each point; by default every point is a class.
        num_classes: J where the last classes have no point.
        slack: x / DT*, >= 1; above 1 the iteration-time condition is strict.
        rounding: ``integer`` rounds up and re-checks both conditions (where that breaks one, the feasible
            integers whose cycle is nearest to x are taken); ``rotation`` keeps fractions; ``auto`` takes
            integers where some are feasible and every n_j >= 1 before rounding, else fractions.
        overload: instead of an error where no thresholds are feasible, use the longest cycle that the
            limits allow, rounded down (at least 1): memory is respected, queues grow.

    Raises:
        ConfigError: malformed input.
        InfeasibleError: rho >= 1, a limit below the fluid equilibrium, or no feasible integers; states the
            condition with its numbers and the nearest feasible value.
    """
    checks.one_of("wait_thresholds.rounding", rounding, ("auto", "integer", "rotation"))
    checks.number("wait_thresholds.slack", slack, low=1.0)
    fluid = Fluid.of(prompt, output, rate, engine, class_id, num_classes)
    model = _Model(fluid)
    if model.x_min <= model.x_max * (1 + TOLERANCE):
        thresholds, x = _choose(model, min(slack * model.x_min, model.x_max), rounding)
        return model.result(thresholds, x, [])
    error = infeasible("wait_thresholds", fluid.load, float(fluid.rate.sum()))
    if not overload:
        raise error
    x = model.x_max
    thresholds = model.fractional(x)
    notes = [f"overload: {error}", f"thresholds use the longest cycle within the limits, x = {x:.6g} s ({model.binding} binds)"]
    whole = float(thresholds[model.active].min()) >= 1 - TOLERANCE
    if rounding == "integer" or (rounding == "auto" and whole):
        thresholds = floor_tolerant(thresholds)
        notes += [f"rounded down to at least 1, which breaks {v}" for v in model.load(thresholds).violations()]
    return model.result(thresholds, x, notes, overload=True)


def wait_thresholds_of(
    statistics: LengthStatistics,
    layout: QueueLayout,
    rate: float,
    engine: EngineConfig,
    *,
    slack: float = 1.25,
    rounding: Rounding = "auto",
    overload: bool = False,
) -> WaitThresholds:
    """``wait_thresholds`` for the classes of a queue layout at a total of ``rate`` requests/s."""
    points = class_profiles(statistics, layout)
    return wait_thresholds(
        points.prompt,
        points.output,
        check_rate("wait_thresholds.rate", rate) * points.weight,
        engine,
        class_id=points.class_id,
        num_classes=points.num_classes,
        slack=slack,
        rounding=rounding,
        overload=overload,
    )


def checked_thresholds(name: str, thresholds: npt.ArrayLike, count: int, of_what: str) -> FloatArray:
    """(count,) float64 > 0, or ConfigError naming the lengths or the value."""
    n = np.atleast_1d(checks.numbers(name, thresholds))
    if n.shape != (count,):
        raise ConfigError(f"{name}: {n.size} thresholds for {count} {of_what}, must be one each")
    bad = np.flatnonzero(~((n >= LEAST_THRESHOLD) & (n <= checks.MOST_TOKENS)))
    if bad.size:
        raise ConfigError(f"{name}: threshold {bad[0]} is {n[bad[0]]}, must be finite and > 0 (from {LEAST_THRESHOLD:g} to 2**30)")
    return n


def check_wait(
    thresholds: npt.ArrayLike,
    prompt: npt.ArrayLike,
    output: npt.ArrayLike,
    rate: npt.ArrayLike,
    engine: EngineConfig,
    *,
    class_id: npt.ArrayLike | None = None,
    num_classes: int | None = None,
    overload: bool = False,
) -> WaitThresholds:
    """Verify given thresholds: DT(n) <= n_j / lam_j for every class and M^pi <= C, equality allowed.

    Args:
        thresholds: (J,) requests per stage, integer or fractional.
        overload: return the violated conditions as notes instead of raising.

    Raises:
        ConfigError: wrong number of thresholds (names both lengths), not finite or not > 0.
        InfeasibleError: a condition is violated; states which and the nearest feasible thresholds.
    """
    fluid = Fluid.of(prompt, output, rate, engine, class_id, num_classes)
    model = _Model(fluid)
    n = checked_thresholds("thresholds", thresholds, fluid.num_classes, "classes")
    x = float(model.cycles(n).min())
    broken = model.violations(n)
    if not broken:
        return model.result(n, x, [])
    if overload:
        return model.result(n, x, [f"overload: {show_thresholds(n)} breaks {v}" for v in broken], overload=True)
    if model.x_min > model.x_max * (1 + TOLERANCE):
        remedy = str(infeasible("no thresholds are feasible", fluid.load, float(fluid.rate.sum())))
    else:
        # The cycle the given numbers stand for: their sum over the sum of the rates.
        middle = float(n[model.active].sum() / model.rate.sum())
        x = min(max(middle, model.x_min), model.x_max)
        near = model.integer(x, smallest=0.0) if all_integers(n) else None
        best = f"{show_thresholds(model.fractional(x))} with rounding='rotation'" if near is None else show_thresholds(near[0])
        remedy = f"nearest feasible: {best}"
    raise InfeasibleError(f"thresholds: {show_thresholds(n)} breaks {'; '.join(broken)}; {remedy}")
