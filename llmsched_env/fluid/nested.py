"""Nested WAIT thresholds (arXiv 2504.11320 v4, Algorithm 2), notation of ``llmsched_env.fluid.buffer``.

Conditions on n_1 .. n_K, all strict::

    DT = tau(batch with n_k at every stage of every segment) < n_1 / Lam_1
    p_k < n_k / n_{k-1} < 1,  k >= 2
    M_req <= C

They are met by n_1 = Lam_1 x and n_k = q_k n_{k-1} with q_k = p_k + eta (1 - p_k). As in the paper n_k
requests are counted at every stage of segment k, though lengths inside the segment complete early.
Prompts of different length: l_k is the mean prompt of the requests that survive into segment k (fluid
mean form), with ``worst_case=True`` the largest of them, as the paper takes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid.buffer import (
    SafetyBuffer,
    check_segment_ends,
    continuation,
    merge_segments,
    nested_load,
    safety_buffer,
    segment_stages,
    theta_root,
)
from llmsched_env.fluid.equilibrium import (
    TOLERANCE,
    CycleLoad,
    Fluid,
    charge_sum,
    check_rate,
    infeasible,
    round_down,
    smallest_capacity,
)
from llmsched_env.fluid.wait import Rounding, all_integers, ceil_tolerant, checked_thresholds, rotation_quota, show_thresholds
from llmsched_env.types import FloatArray, IntArray, LengthStatistics

_MAX_CANDIDATES = 4096


@dataclass(frozen=True, slots=True)
class NestedThresholds:
    """Thresholds of Nested WAIT and what they promise.

    Attributes:
        thresholds: (K,) float64 requests per stage.
        segment_ends: (K,) int32 r_k, the last included (``QueueLayout.segment_ends`` leaves it out).
        continuation: (K-1,) p_k.
        theta: (K-1,) theta_k; infinite where n_k >= n_{k-1}, NaN where n_k / n_{k-1} <= p_k.
        rounding: integers, or fractions realised by rotation (``rotation_quota``).
        kv_base: M^pi.
        kv_base_worst: M^pi with the longest surviving prompt, exact blocks and the worst phase of a rotation.
        kv_required: M_req; infinite where a ratio n_k / n_{k-1} is not above p_k.
        cycle_seconds: n_1 / Lam_1.
        iteration_seconds: DT_[1..K], all segments running with n_k at every stage.
        overload: some condition does not hold; ``notes`` say which.
        notes: what a reader of results should know.
    """

    thresholds: FloatArray
    segment_ends: IntArray
    continuation: FloatArray
    theta: FloatArray
    rounding: Literal["integer", "rotation"]
    kv_base: float
    kv_base_worst: float
    kv_required: float
    cycle_seconds: float
    iteration_seconds: float
    overload: bool
    notes: tuple[str, ...] = ()

    def quota(self, iteration: npt.ArrayLike) -> IntArray:
        """(K,) int32 requests that enter each segment in its ``iteration``-th run (from 0)."""
        return rotation_quota(self.thresholds, iteration)


@dataclass(frozen=True, slots=True)
class _Goal:
    """What the safety buffer has to guarantee: no overflow on [0, horizon] with probability >= 1 - delta."""

    horizon_seconds: float
    delta: float
    num_types: int | None


class _Model:
    """The conditions of Nested WAIT for one length distribution, rate and set of segments."""

    def __init__(
        self, statistics: LengthStatistics, rate: float, engine: EngineConfig, segment_ends: Sequence[int], goal: _Goal, worst_case: bool
    ) -> None:
        rate = check_rate("rate", rate)
        self.fluid = Fluid.of(statistics.prompt, statistics.output, rate * statistics.weight, engine)
        self.rate, self.engine, self.goal = rate, engine, goal
        self.ends = check_segment_ends(segment_ends)
        if self.ends[-1] < statistics.max_output:
            raise ConfigError(f"segment_ends: the last is {self.ends[-1]}, must be >= the longest output, {statistics.max_output} tokens")
        self.p = continuation(statistics, self.ends.tolist())
        bad = np.flatnonzero((self.p <= 0) | (self.p >= 1))
        if bad.size:
            k = int(bad[0])
            why = "no request survives it" if self.p[k] <= 0 else "no request stops in its segment"
            raise InfeasibleError(
                f"segment_ends: r_{k + 1} = {self.ends[k]}: {why}, so p_{k + 2} = {self.p[k]:.6g} and p < n_k / n_(k-1) < 1 "
                f"is void or impossible; nearest feasible: {merge_segments(statistics, self.ends.tolist())}"
            )
        if goal.num_types is not None:
            checks.integer("num_types", goal.num_types, low=1)
        self.num_types = goal.num_types or int(np.unique(statistics.output).size)
        reaches = [statistics.output > r for r in (0, *self.ends[:-1].tolist())]
        self.longest = np.array([float(statistics.prompt[r].max()) for r in reaches])
        mean = np.array([float(np.average(statistics.prompt[r], weights=statistics.weight[r])) for r in reaches])
        self.prompt = self.longest if worst_case else mean
        self.square = float(self.longest[0] ** 2) if worst_case else float(statistics.prompt**2 @ statistics.weight)

    def load(self, n: FloatArray) -> CycleLoad:
        return nested_load(n, self.ends, self.prompt, self.engine, prompt_square=self.square)

    def buffer(self, n: FloatArray) -> SafetyBuffer:
        return safety_buffer(
            n,
            self.ends,
            self.p,
            self.prompt,
            self.engine,
            horizon_seconds=self.goal.horizon_seconds,
            delta=self.goal.delta,
            num_types=self.num_types,
        )

    def required(self, n: FloatArray) -> float:
        return self.load(n).kv_tokens + self.buffer(n).total

    def fits(self, n: FloatArray) -> bool:
        return self.required(n) <= self.engine.kv_capacity_tokens * (1 + TOLERANCE)

    def fits_loosely(self, n: FloatArray) -> bool:
        return self.load(n).kv_tokens + self.buffer(n).thresholds <= self.engine.kv_capacity_tokens * (1 + TOLERANCE)

    def stable(self, n: FloatArray) -> bool:
        return self.load(n).seconds < float(n[0]) / self.rate

    def worst(self, n: FloatArray) -> float:
        first, last = (a.tolist() for a in segment_stages(self.ends, self.engine))
        total = 0.0
        for k in range(n.size):
            longest = math.ceil(self.longest[k])
            total += float(n[k]) * charge_sum(longest, first[k], last[k], self.engine)
            if n[k] != round(float(n[k])):  # quotas of w runs in a row sum to less than w n + 1
                total += charge_sum(longest, last[k], last[k], self.engine)
        return total

    def ratio_violations(self, n: FloatArray) -> list[str]:
        return [
            f"ratio: p_{k + 1} = {self.p[k - 1]:.6g} < n_{k + 1} / n_{k} = {n[k] / n[k - 1]:.6g} < 1 does not hold"
            for k in range(1, n.size)
            if not self.p[k - 1] < n[k] / n[k - 1] < 1
        ]

    def describe_required(self, n: FloatArray) -> str:
        base, buffer = self.load(n).kv_tokens, self.buffer(n)
        return (
            f"M_req = {base + buffer.total:.6g} KV tokens > C = {self.engine.kv_capacity_tokens} (M^pi {base:.6g}, boundary thresholds "
            f"{buffer.thresholds:.6g}, fluctuations {buffer.fluctuation:.6g} for delta = {self.goal.delta:g} "
            f"over {self.goal.horizon_seconds:g} s)"
        )

    def violations(self, n: FloatArray) -> list[str]:
        """Broken conditions, each with its numbers."""
        load = self.load(n)
        seconds, cycle = load.seconds, float(n[0]) / self.rate
        found = self.ratio_violations(n)
        if not seconds < cycle:
            found.append(f"iteration time: DT = {seconds:.6g} s must be < n_1 / Lam_1 = {n[0]:.6g} / {self.rate:.6g} = {cycle:.6g} s")
        found += load.violations()
        growing = bool(np.any(n[1:] <= self.p * n[:-1]))
        if not growing and not self.fits(n):
            found.append(f"safety buffer: {self.describe_required(n)}")
        return found

    def result(self, n: FloatArray, notes: list[str], overload: bool) -> NestedThresholds:
        load = self.load(n)
        theta = [theta_root(n[k - 1], n[k], self.p[k - 1]) if n[k] > n[k - 1] * self.p[k - 1] else math.nan for k in range(1, n.size)]
        return NestedThresholds(
            thresholds=n,
            segment_ends=self.ends,
            continuation=self.p,
            theta=np.array(theta),
            rounding="integer" if all_integers(n) else "rotation",
            kv_base=load.kv_tokens,
            kv_base_worst=self.worst(n),
            kv_required=math.inf if any(map(math.isnan, theta)) else self.required(n),
            cycle_seconds=float(n[0]) / self.rate,
            iteration_seconds=load.seconds,
            overload=overload,
            notes=tuple(notes),
        )


@dataclass(frozen=True, slots=True)
class _Overload:
    """A cycle that breaks some condition, what integers in its place must still meet, and what is given up."""

    cycle: float
    accept: Callable[[FloatArray], bool]
    what: str


class _Design:
    """The family n_1 = Lam_1 x, n_k = q_k n_{k-1}, and the cycles x that the conditions allow."""

    def __init__(self, model: _Model, slack: float, eta: float) -> None:
        for name, value in (("slack", slack), ("eta", eta)):
            checks.number(f"nested_thresholds.{name}", value)
        if not 1 < slack < math.inf:
            raise ConfigError(f"nested_thresholds.slack: {slack}, must be > 1 (DT < n_1 / Lam_1 is strict)")
        if not 0 < eta < 1:
            raise ConfigError(f"nested_thresholds.eta: {eta}, must be in (0, 1)")
        self.model = model
        self.capacity = model.engine.kv_capacity_tokens
        self.ratio = model.p + eta * (1 - model.p)
        self.unit = model.rate * np.cumprod([1.0, *self.ratio])
        self.per_second = model.load(self.unit)
        self.x_min = self.per_second.equilibrium_seconds()
        self.x_goal = slack * self.x_min
        self.x_limit, self.binding = self.per_second.longest_cycle()

    @property
    def x_strict(self) -> float:
        """Just above the shortest stable cycle, where DT < n_1 / Lam_1 holds strictly."""
        return self.x_min * (1 + 1e-6)

    @property
    def x_tiny(self) -> float:
        return self.x_limit * 1e-9

    def at(self, x: float) -> FloatArray:
        return self.unit * x

    def within_limits(self, x: float) -> bool:
        return x <= self.x_limit * (1 + TOLERANCE)

    def fits(self, x: float) -> bool:
        """Engine limits and M_req <= C at cycle x."""
        return self.within_limits(x) and self.model.fits(self.at(x))

    def fits_loosely(self, x: float) -> bool:
        """Engine limits, M^pi and boundary thresholds <= C at cycle x; no room for fluctuations."""
        return self.within_limits(x) and self.model.fits_loosely(self.at(x))

    def chains(self, first: float) -> Iterator[FloatArray]:
        """Integers n_1, n_k = ceil(q_k n_{k-1}); then the smallest with n_k > p_k n_{k-1}."""
        for smallest in (False, True):
            n = [first]
            for p, q in zip(self.model.p, self.ratio, strict=True):
                step = math.floor(p * n[-1] * (1 + TOLERANCE)) + 1 if smallest else math.ceil(q * n[-1] * (1 - TOLERANCE))
                n.append(float(step))
            yield np.array(n)

    def integer(self, x: float, accept: Callable[[FloatArray], bool]) -> FloatArray | None:
        """The acceptable integers with n_1 nearest to ceil(Lam_1 x), or None."""
        wanted = float(ceil_tolerant(self.at(x)[:1])[0])
        high = min(math.ceil(self.model.rate * self.x_limit), wanted + _MAX_CANDIDATES)
        firsts = np.arange(max(1.0, wanted - _MAX_CANDIDATES), high + 1)
        for first in firsts[np.argsort(np.abs(firsts - wanted), kind="stable")]:
            for n in self.chains(float(first)):
                if accept(n):
                    return n
        return None

    def infeasible(self) -> InfeasibleError:
        """Which condition fails at the shortest stable cycle, and the nearest feasible values."""
        model = self.model
        fluid = model.fluid.load
        if fluid.equilibrium_seconds() > fluid.longest_cycle()[0] * (1 + TOLERANCE):
            return infeasible("nested_thresholds", fluid, model.rate)
        if self.fits(self.x_tiny):
            # Thresholds up to unit * x fit and take tau, whatever the rate: see ``boundary_of``.
            x = _largest(self.fits, self.x_tiny, self.x_limit)
            limit = round_down(model.rate * x / self.per_second.times(x).seconds)
            remedy = f"with these segments and this margin the total rate must be below {limit:.6g} requests/s"
        else:
            remedy = "no rate is feasible with these segments: fewer segments or a larger margin eta need less buffer"
        if math.isinf(self.x_min):
            reasons = [f"rho = {self.per_second.rho:.6g} with n_k at every stage, must be < 1"]
            remedy += "; more segments or a smaller margin eta waste less"
        else:
            n = self.at(self.x_strict)
            reasons = self.per_second.times(self.x_min).violations()
            if not model.fits(n):
                reasons.append(model.describe_required(n))
                remedy += f"; the smallest capacity at this rate is {smallest_capacity(model.required(n), model.engine)}"
        where = f"at {model.rate:.6g} requests/s, shortest stable cycle {self.x_min:.6g} s"
        return InfeasibleError(f"nested_thresholds: {where}: {'; '.join(reasons)}; {remedy}")

    def overload(self) -> _Overload:
        """What to use where the conditions cannot all hold."""
        model = self.model
        if self.within_limits(self.x_min):
            if not self.fits_loosely(self.x_strict):
                what = "stable, but only M^pi fits, not the boundary thresholds: evictions are likely"
                return _Overload(self.x_strict, model.stable, what)
            x = _largest(self.fits_loosely, self.x_strict, self.x_goal)
            what = "stable; M^pi and boundary thresholds fit, M_req does not: overflow probability not bounded by delta"
            return _Overload(x, lambda n: model.stable(n) and model.fits_loosely(n), what)
        # The rate is not sustainable. Keep the no-overflow guarantee if it leaves at least half of C to the base.
        if self.fits(self.x_tiny) and model.required(self.at(self.x_tiny)) <= self.capacity / 2:
            x = _largest(self.fits, self.x_tiny, self.x_limit)
            return _Overload(x, model.fits, "scaled down until M_req fits: requests pile up outside, no overflow at the boundaries")
        if self.fits_loosely(self.x_tiny):
            x = _largest(self.fits_loosely, self.x_tiny, self.x_limit)
            return _Overload(x, model.fits_loosely, "scaled down until M^pi and boundary thresholds fit; M_req does not")
        return _Overload(self.x_limit, lambda n: True, "scaled down until M^pi fits; boundary thresholds and M_req do not")


def _largest(fits: Callable[[float], bool], low: float, high: float) -> float:
    """The largest x in [low, high] with ``fits``, which holds at low and turns at most once."""
    if fits(high):
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def nested_thresholds(
    statistics: LengthStatistics,
    rate: float,
    engine: EngineConfig,
    segment_ends: Sequence[int],
    *,
    horizon_seconds: float,
    slack: float = 1.25,
    eta: float = 0.1,
    delta: float = 0.1,
    rounding: Rounding = "auto",
    overload: bool = False,
    num_types: int | None = None,
    worst_case: bool = False,
) -> NestedThresholds:
    """Thresholds of the cycle x = slack * (shortest stable cycle), where DT(x) = x; shorter, but stable, where M_req would exceed C.

    Args:
        segment_ends: all K ends r_k, the last >= the longest output. Segments with p_k = 0 or 1 are refused
            (``merge_segments`` drops them).
        horizon_seconds: T of the safety buffer.
        slack: > 1.
        eta: margin of the ratio condition, in (0, 1): larger needs more base memory and less buffer.
        delta: allowed probability of any overflow on [0, T].
        rounding: ``integer`` rounds every n_k up and re-checks (nearest feasible n_1), ``rotation`` keeps
            fractions, ``auto`` takes integers where they are feasible and every n_k >= 1 before rounding.
        overload: instead of an error where the conditions cannot hold: at a sustainable rate give up the
            bound on the overflow probability and keep stability; else scale x down so that M_req, or
            failing that M^pi, fits. ``notes`` say which.
        num_types: m in the logarithm; by default the number of distinct output lengths in ``statistics``.
        worst_case: largest instead of mean prompt of the survivors of each segment.

    Raises:
        ConfigError: malformed input.
        InfeasibleError: states the violated condition with its numbers and the nearest feasible value.
    """
    checks.one_of("nested_thresholds.rounding", rounding, ("auto", "integer", "rotation"))
    model = _Model(statistics, rate, engine, segment_ends, _Goal(horizon_seconds, delta, num_types), worst_case)
    design = _Design(model, slack, eta)
    if math.isfinite(design.x_min) and design.fits(design.x_strict):
        n = design.at(_largest(design.fits, design.x_strict, design.x_goal))
        if rounding == "rotation" or (rounding == "auto" and n.min() < 1 - TOLERANCE):
            return model.result(n, [], overload=False)
        whole = design.integer(float(n[0]) / rate, lambda n: not model.violations(n))
        if whole is not None:
            return model.result(whole, [], overload=False)
        if rounding == "auto":
            return model.result(n, [], overload=False)
        tried = next(design.chains(float(ceil_tolerant(n[:1])[0])))
        raise InfeasibleError(
            f"nested_thresholds: no integers satisfy the conditions; {show_thresholds(tried)} breaks {'; '.join(model.violations(tried))}; "
            f"nearest feasible: {show_thresholds(n)} with rounding='rotation'"
        )
    error = design.infeasible()
    if not overload:
        raise error
    plan = design.overload()
    n = design.at(plan.cycle)
    notes = [f"overload: {error}", plan.what]
    if rounding == "integer" or (rounding == "auto" and n.min() >= 1 - TOLERANCE):
        whole = design.integer(plan.cycle, lambda n: plan.accept(n) and not model.ratio_violations(n) and not model.load(n).violations())
        if whole is None and rounding == "integer":
            whole = next(design.chains(max(1.0, math.floor(float(n[0]) * (1 + TOLERANCE)))))
            notes += [f"rounded to integers, which breaks {v}" for v in model.violations(whole)]
        n = n if whole is None else whole
    return model.result(n, notes, overload=True)


def check_nested(
    thresholds: npt.ArrayLike,
    statistics: LengthStatistics,
    rate: float,
    engine: EngineConfig,
    segment_ends: Sequence[int],
    *,
    horizon_seconds: float,
    delta: float = 0.1,
    num_types: int | None = None,
    worst_case: bool = False,
    overload: bool = False,
) -> NestedThresholds:
    """Verify given thresholds against the three conditions; arguments as in ``nested_thresholds``.

    With ``overload=True`` broken conditions become notes.

    Raises:
        ConfigError: not one threshold per segment (names both lengths), not finite or not > 0.
        InfeasibleError: a condition is violated; states which and the nearest feasible thresholds.
    """
    model = _Model(statistics, rate, engine, segment_ends, _Goal(horizon_seconds, delta, num_types), worst_case)
    n = checked_thresholds("thresholds", thresholds, model.ends.size, "segments")
    broken = model.violations(n)
    if not broken or overload:
        return model.result(n, [f"overload: {show_thresholds(n)} breaks {v}" for v in broken], overload=bool(broken))
    try:
        near = nested_thresholds(
            statistics,
            rate,
            engine,
            segment_ends,
            horizon_seconds=horizon_seconds,
            delta=delta,
            rounding="auto" if all_integers(n) else "rotation",
            num_types=num_types,
            worst_case=worst_case,
        )
        remedy = f"nearest feasible: {show_thresholds(near.thresholds)}"
    except InfeasibleError as error:
        remedy = str(error)
    raise InfeasibleError(f"thresholds: {show_thresholds(n)} breaks {'; '.join(broken)}; {remedy}")


def design_memory(
    statistics: LengthStatistics,
    rate: float,
    engine: EngineConfig,
    segment_ends: Sequence[int],
    *,
    horizon_seconds: float,
    slack: float = 1.25,
    eta: float = 0.1,
    delta: float = 0.1,
    num_types: int | None = None,
) -> tuple[float, float, float]:
    """(M^pi, M^pi + boundary thresholds, M_req) of fractional thresholds at slack * (shortest stable cycle), whatever C is."""
    design = _Design(_Model(statistics, rate, engine, segment_ends, _Goal(horizon_seconds, delta, num_types), False), slack, eta)
    if math.isinf(design.x_min):
        return math.inf, math.inf, math.inf
    n = design.at(design.x_goal)
    base, buffer = design.model.load(n).kv_tokens, design.model.buffer(n)
    return base, base + buffer.thresholds, base + buffer.total
