"""Fluid equilibrium of an engine, and the largest arrival rate it can sustain.

The model (arXiv 2504.11320 v4, model and fluid sections). A request with prompt l and output l' is
prefilled in one iteration (stage 0) and then decodes in D iterations (stages 1 .. D), where

* ``paper`` preset: D = l', the first token comes at the end of stage 1;
* ``vllm`` preset: D = l' - 1, prefill yields the first token, so a request takes l' iterations.

At stage s it holds l + s tokens, so its KV x iterations are ::

    S = sum_{s=0..D} (l + s) = (D + 1) (l + D / 2)

The ``vllm`` preset charges whole blocks, on average (block_size - 1) / 2 tokens more per resident and
iteration; iteration time depends on tokens, not on blocks.

If every iteration takes x seconds, lam_j x requests of class j stand at each stage. The fluid
equilibrium DT* is the smallest x with tau(batch(x)) <= x. For tau = d0 + d1 * load it is closed::

    a = sum_j lam_j S_j,  rho = d1 a,  DT* = d0 / (1 - rho),  n*_j = lam_j DT*,  M* = a DT*

A prompt that chunked prefill spreads over iterations is counted in one of them: its tokens and its
attention work (chunk-invariant) are exact, the few extra iterations of residence are left out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.perf import Batch, LinearTime
from llmsched_env.perf import batch as bt
from llmsched_env.types import MOST_QUEUES, FloatArray, IntArray, LengthStatistics

Constraint = Literal["kv_capacity", "max_num_batched_tokens", "max_num_seqs"]
"""What limits the batch besides time; the last two hold in the ``vllm`` preset only."""

CONSTRAINTS: tuple[Constraint, ...] = get_args(Constraint)

KV_CHARGED = bt.BATCH_FIELDS
"""Column of the KV charged (tokens, block rounding included), behind the ``Batch`` columns."""

LOAD_FIELDS = bt.BATCH_FIELDS + 1

TOLERANCE = 1e-9
"""Relative tolerance of every comparison: conditions hold with equality allowed."""

_LONGEST_CYCLE = 1e15
"""Seconds; stands for infinity in lim tau(batch(x)) / x."""


LEAST_RATE, MOST_RATE = 1e-9, 1e9
"""Total arrival rates (requests/s) between which every quotient of rates, lengths and times is finite."""

_LEAST_SHARE = 1e-100
_LEAST_SPAN = 1e-9  # seconds


def stage_shift(engine: EngineConfig) -> int:
    """0 where decoding starts with token 1 (``paper``), 1 where prefill yields token 1 (``vllm``)."""
    return 0 if engine.preset == "paper" else 1


def charge_unit(engine: EngineConfig) -> int:
    """Tokens per KV unit: 1 (``paper``) or the block size (``vllm``)."""
    return 1 if engine.preset == "paper" else engine.block_size


def mean_rounding(engine: EngineConfig) -> float:
    """Mean tokens lost in a resident's last block: (block_size - 1) / 2, 0 in the ``paper`` preset."""
    return (charge_unit(engine) - 1) / 2


def charge_sum(prompt: int, first: int, last: int, engine: EngineConfig) -> int:
    """sum_{s=first..last} of the KV charged to prompt + s tokens, whole blocks, in tokens (exact)."""
    unit = charge_unit(engine)

    def blocks_up_to(tokens: int) -> int:  # sum_{t=1..tokens} ceil(t / unit)
        full, rest = divmod(tokens, unit)
        return unit * full * (full + 1) // 2 + rest * (full + 1)

    return 0 if last < first else unit * (blocks_up_to(prompt + last) - blocks_up_to(prompt + first - 1))


def request_sums(prompt: FloatArray, output: FloatArray, engine: EngineConfig) -> FloatArray:
    """(P, LOAD_FIELDS): what one request adds to the sums of the batches it passes through, all stages together."""
    decodes = output - stage_shift(engine)
    iterations = decodes + 1
    load = iterations * (prompt + decodes / 2)
    sums = np.zeros((prompt.shape[0], LOAD_FIELDS))
    sums[:, bt.DECODES] = decodes
    sums[:, bt.DECODE_KV] = load - prompt  # context + 1 = l + s at stage s >= 1
    sums[:, bt.PREFILLS] = 1
    sums[:, bt.PREFILL_TOKENS] = prompt
    sums[:, bt.PREFILL_SQUARES] = prompt**2
    sums[:, bt.PREFILL_WORK] = prompt**2 / 2
    sums[:, bt.SAMPLED] = output
    sums[:, bt.LOAD] = load
    sums[:, bt.BATCH_SIZE] = iterations
    sums[:, KV_CHARGED] = load + mean_rounding(engine) * iterations
    return sums


@dataclass(frozen=True, slots=True)
class CycleLoad:
    """Sums of one iteration in balance, or the same per second of iteration; linear in the requests.

    Attributes:
        sums: (LOAD_FIELDS,) float64, the columns of ``Batch`` and ``KV_CHARGED``.
        engine: gives the iteration-time model and the limits.
    """

    sums: FloatArray
    engine: EngineConfig

    def times(self, factor: float) -> CycleLoad:
        return CycleLoad(self.sums * factor, self.engine)

    @property
    def batch(self) -> Batch:
        return Batch(*(float(v) for v in self.sums[: bt.BATCH_FIELDS]))

    @property
    def seconds(self) -> float:
        """tau of the batch."""
        return self.engine.time_model.seconds(self.batch)

    @property
    def kv_tokens(self) -> float:
        """KV charged (tokens, block rounding included)."""
        return float(self.sums[KV_CHARGED])

    def amount(self, constraint: Constraint) -> float:
        """What counts against the limit: KV tokens, tokens computed, or residents."""
        if constraint == "kv_capacity":
            return self.kv_tokens
        if constraint == "max_num_batched_tokens":
            return float(self.sums[bt.DECODES] + self.sums[bt.PREFILL_TOKENS])
        return float(self.sums[bt.BATCH_SIZE])

    def limit(self, constraint: Constraint) -> float:
        if constraint == "kv_capacity":
            return float(self.engine.kv_capacity_tokens)
        if self.engine.preset == "paper":
            return math.inf
        return float(self.engine.most_active if constraint == "max_num_seqs" else getattr(self.engine, constraint))

    def usage(self, constraint: Constraint) -> float:
        """Amount / limit."""
        return self.amount(constraint) / self.limit(constraint)

    def violations(self) -> list[str]:
        """The engine limits this iteration breaks, each as a sentence with its numbers."""
        active = "max_num_seqs" if self.engine.max_num_active_seqs is None else "max_num_active_seqs"
        names = {
            "kv_capacity": ("KV memory", "KV tokens", f"C = {self.engine.kv_capacity_tokens}"),
            "max_num_batched_tokens": ("token budget", "tokens", f"engine.max_num_batched_tokens = {self.engine.max_num_batched_tokens}"),
            "max_num_seqs": ("residents", "requests", f"engine.{active} = {self.engine.most_active}"),
        }
        found = []
        for constraint in CONSTRAINTS:
            if self.usage(constraint) > 1 + TOLERANCE:
                what, unit, limit = names[constraint]
                found.append(f"{what}: {self.amount(constraint):.6g} {unit} per iteration > {limit}")
        return found

    # --- for loads per second -------------------------------------------------------------------

    @property
    def rho(self) -> float:
        """lim_{x -> inf} tau(batch(x)) / x: the share of time that batches without fixed cost would take."""
        model = self.engine.time_model
        if isinstance(model, LinearTime):
            return float(model.d1 * self.sums[bt.LOAD])
        return self.times(_LONGEST_CYCLE).seconds / _LONGEST_CYCLE

    def equilibrium_seconds(self) -> float:
        """DT*, the smallest x with tau(batch(x)) <= x; infinity if rho >= 1. Closed form for ``LinearTime``."""
        model = self.engine.time_model
        rho = self.rho
        if rho >= 1:
            return math.inf
        if isinstance(model, LinearTime):
            return model.d0 / (1 - rho)
        return self.solve_equilibrium()

    def solve_equilibrium(self) -> float:
        """DT* by bisection, for any model whose tau(batch(x)) / x does not increase.

        That of a measured table climbs in stairs, so that several x may balance. Then it is one within the engine's limits, if there is one
        at their edge.
        """

        def balanced(x: float) -> bool:
            return self.times(x).seconds <= x

        def between(low: float, high: float) -> float:
            while high - low > 4 * math.ulp(high):
                middle = (low + high) / 2
                low, high = (low, middle) if balanced(middle) else (middle, high)
            return high

        least = max(self.times(0.0).seconds, 1e-12)
        low = high = least
        while not balanced(high):
            low, high = high, 2 * high
            if high > _LONGEST_CYCLE:
                return math.inf
        found, edge = between(low, high), self.longest_cycle()[0]
        if found > edge * (1 + TOLERANCE) and self.times(edge).seconds <= edge * (1 + TOLERANCE):
            return between(min(least, edge), edge)
        return found

    def longest_cycle(self) -> tuple[float, Constraint]:
        """The longest iteration (seconds) whose batch respects every limit of the engine, and the limit that binds."""
        binding = max(CONSTRAINTS, key=self.usage)
        return 1 / self.usage(binding), binding


@dataclass(frozen=True, slots=True)
class Fluid:
    """Arrival streams at one engine: P support points of (prompt, output), grouped in J classes.

    Attributes:
        prompt, output: (P,) float64 tokens.
        rate: (P,) float64 requests/s.
        class_id: (P,) int32 in 0 .. J-1.
        num_classes: J.
        engine: the engine.
        sums: (P, LOAD_FIELDS), see ``request_sums``.
    """

    prompt: FloatArray
    output: FloatArray
    rate: FloatArray
    class_id: IntArray
    num_classes: int
    engine: EngineConfig
    sums: FloatArray

    @classmethod
    def of(
        cls,
        prompt: npt.ArrayLike,
        output: npt.ArrayLike,
        rate: npt.ArrayLike,
        engine: EngineConfig,
        class_id: npt.ArrayLike | None = None,
        num_classes: int | None = None,
    ) -> Fluid:
        """Check and convert; without ``class_id`` every point is a class of its own.

        Raises:
            ConfigError: shapes differ, a length below 1, a rate negative or not finite, no arrivals.
        """
        l, o, lam = (
            np.atleast_1d(checks.numbers(f"fluid.{name}", values))
            for name, values in (("prompt", prompt), ("output", output), ("rate", rate))
        )
        if not (l.ndim == 1 and l.size and l.shape == o.shape == lam.shape):
            raise ConfigError(f"fluid: shapes of prompt {l.shape}, output {o.shape} and rate {lam.shape} must be equal and (P,)")
        for name, values in (("prompt", l), ("output", o)):
            bad = np.flatnonzero(~((values >= 1) & (values <= checks.MOST_TOKENS)))
            if bad.size:
                raise ConfigError(f"fluid.{name}: value {bad[0]} is {values[bad[0]]}, must be >= 1 and <= 2**30 tokens")
        bad = np.flatnonzero(~((lam == 0) | ((lam >= _LEAST_SHARE) & (lam <= MOST_RATE))))
        if bad.size:
            raise ConfigError(
                f"fluid.rate: value {bad[0]} is {lam[bad[0]]}, must be finite and >= 0 requests/s (0, or {_LEAST_SHARE:g} to {MOST_RATE:g})"
            )
        if lam.sum() <= 0:
            raise ConfigError("fluid.rate: all zero, the total must be > 0 requests/s")
        if not LEAST_RATE <= lam.sum() <= MOST_RATE:
            raise ConfigError(f"fluid.rate: {lam.sum():g} in all, must be from {LEAST_RATE:g} to {MOST_RATE:g} requests/s")
        ids = np.arange(l.size, dtype=np.int32)
        if class_id is not None:
            ids = checks.counts("fluid.class_id", class_id, 0, MOST_QUEUES - 1, single=True)
        if ids.shape != l.shape:
            raise ConfigError(f"fluid.class_id: shape {ids.shape}, must be {l.shape} with values >= 0")
        classes = int(ids.max()) + 1 if num_classes is None else checks.integer("fluid.num_classes", num_classes, 1, MOST_QUEUES)
        if classes <= int(ids.max()):
            raise ConfigError(f"fluid.class_id: {int(ids.max())}, must be below num_classes = {classes}")
        return cls(l, o, lam, ids, classes, engine, request_sums(l, o, engine))

    @property
    def load(self) -> CycleLoad:
        """The load per second of iteration."""
        return CycleLoad(self.rate @ self.sums, self.engine)

    @property
    def class_rate(self) -> FloatArray:
        """(J,) requests/s."""
        rates: FloatArray = np.bincount(self.class_id, weights=self.rate, minlength=self.num_classes).astype(np.float64)
        return rates

    @property
    def class_sums(self) -> FloatArray:
        """(J, LOAD_FIELDS): ``sums`` of the mean request of each class; zeros for a class without arrivals."""
        totals = np.zeros((self.num_classes, LOAD_FIELDS))
        np.add.at(totals, self.class_id, self.rate[:, None] * self.sums)
        rates = self.class_rate
        return np.divide(totals, rates[:, None], out=np.zeros_like(totals), where=rates[:, None] > 0)


@dataclass(frozen=True, slots=True)
class FluidEquilibrium:
    """The fluid optimum; times, counts and memory are infinite where rho >= 1.

    Attributes:
        iteration_seconds: DT*.
        per_stage: (J,) n*_j = lam_j DT*, requests of class j at each stage.
        kv_tokens: M*, KV charged (tokens, block rounding included).
        throughput_tokens: sum_j lam_j l'_j, output tokens/s.
        rho: lim tau(batch(x)) / x; d1 * a for ``LinearTime``.
        kv_rate: a = sum_j lam_j S_j, KV tokens charged per second of iteration.
        load: KV tokens in the batch (no block rounding).
        batch: the balanced batch.
        kv_usage, token_usage, seq_usage: share of C, of ``max_num_batched_tokens`` and of ``max_num_seqs``
            (the last two are 0 in the ``paper`` preset, which has no such limit).
        binding: the limit with the largest share.
    """

    iteration_seconds: float
    per_stage: FloatArray
    kv_tokens: float
    throughput_tokens: float
    rho: float
    kv_rate: float
    load: float
    batch: Batch
    kv_usage: float
    token_usage: float
    seq_usage: float
    binding: Constraint

    @property
    def stable(self) -> bool:
        """rho < 1."""
        return self.rho < 1

    @property
    def fits(self) -> bool:
        """M* <= C."""
        return self.kv_usage <= 1 + TOLERANCE

    @property
    def feasible(self) -> bool:
        """Stable, and every limit of the engine holds."""
        return self.stable and max(self.kv_usage, self.token_usage, self.seq_usage) <= 1 + TOLERANCE


def fluid_equilibrium(prompt: npt.ArrayLike, output: npt.ArrayLike, rate: npt.ArrayLike, engine: EngineConfig) -> FluidEquilibrium:
    """Equilibrium of J classes given as arrays: prompt l_j, output l'_j (tokens), rate lam_j (requests/s).

    Raises:
        ConfigError: see ``Fluid.of``.
    """
    fluid = Fluid.of(prompt, output, rate, engine)
    per_second = fluid.load
    x = per_second.equilibrium_seconds()
    # 0 * inf: a class without arrivals holds nothing, whatever the cycle.
    at = CycleLoad(np.multiply(per_second.sums, x, out=np.zeros(LOAD_FIELDS), where=per_second.sums > 0), engine)
    per_stage = np.multiply(fluid.rate, x, out=np.zeros_like(fluid.rate), where=fluid.rate > 0)
    kv, tokens, seqs = (at.usage(c) if math.isfinite(at.limit(c)) else 0.0 for c in CONSTRAINTS)
    return FluidEquilibrium(
        iteration_seconds=x,
        per_stage=per_stage,
        kv_tokens=at.kv_tokens,
        throughput_tokens=float(fluid.rate @ fluid.output),
        rho=per_second.rho,
        kv_rate=per_second.kv_tokens,
        load=float(at.sums[bt.LOAD]),
        batch=at.batch,
        kv_usage=kv,
        token_usage=tokens,
        seq_usage=seqs,
        binding=per_second.longest_cycle()[1],
    )


def equilibrium_of(statistics: LengthStatistics, rate: float, engine: EngineConfig) -> FluidEquilibrium:
    """Equilibrium at ``rate`` requests/s; the classes are the support points, lam_i = rate * weight_i."""
    total = check_rate("equilibrium_of.rate", rate)
    return fluid_equilibrium(statistics.prompt, statistics.output, total * statistics.weight, engine)


def check_rate(name: str, rate: object) -> float:
    """A total arrival rate, requests/s, so far from 0 and infinity that cycles and loads are finite."""
    return checks.number(name, rate, low=LEAST_RATE, high=MOST_RATE, unit="requests/s")


@dataclass(frozen=True, slots=True)
class StabilityBoundary:
    """The edge of the stability region { lam : rho < 1, M* <= C, token budget, sequence cap }.

    Attributes:
        rate: largest sustainable total rate, requests/s.
        iteration_seconds: DT* there.
        kv_tokens: M* there.
        binding: the limit that is met with equality there.
    """

    rate: float
    iteration_seconds: float
    kv_tokens: float
    binding: Constraint


def boundary_of(load: CycleLoad, rate: float) -> StabilityBoundary:
    """The boundary along the ray through ``load`` (the load per second at a total of ``rate`` requests/s).

    Let y be the largest number of requests per iteration whose batch respects all limits. That batch
    takes tau(y) whatever the rate is, and a rate is sustainable iff DT* <= y / rate, that is iff
    tau(y) <= y / rate (tau(y) / y does not increase). So the boundary is y / tau(y): for the paper's
    linear time y = C / S, hence a = C / (d0 + d1 C).
    """
    x, binding = load.longest_cycle()
    full = load.times(x)
    seconds = full.seconds
    return StabilityBoundary(rate * x / seconds, seconds, full.kv_tokens, binding)


def find_boundary(statistics: LengthStatistics, engine: EngineConfig) -> StabilityBoundary:
    """The largest sustainable rate for these lengths, with the limit that binds there."""
    return boundary_of(Fluid.of(statistics.prompt, statistics.output, statistics.weight, engine).load, 1.0)


def stability_boundary(statistics: LengthStatistics, engine: EngineConfig) -> float:
    """The largest total rate (requests/s) that is stable and fits; ``find_boundary`` also says what binds."""
    return find_boundary(statistics, engine).rate


def round_down(value: float, digits: int = 6) -> float:
    """Down to some significant digits, so that a printed bound is still feasible."""
    if value <= 0 or not math.isfinite(value):
        return value
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return math.floor(value * scale * (1 + 1e-12)) / scale


def smallest_capacity(kv_tokens: float, engine: EngineConfig) -> str:
    """The smallest capacity that holds ``kv_tokens``, as the setting to change (none where no engine is that large)."""
    units = math.ceil(kv_tokens / charge_unit(engine) * (1 - 1e-12))
    if units > 2**30:
        return "beyond any engine"
    return f"engine.{'capacity_tokens' if engine.preset == 'paper' else 'num_blocks'} >= {units}"


def infeasible(what: str, load: CycleLoad, rate: float) -> InfeasibleError:
    """The error for a rate outside the stability region: which condition, and the nearest feasible values."""
    boundary = boundary_of(load, rate)
    x = load.equilibrium_seconds()
    remedy = f"the largest total rate at this mix is {round_down(boundary.rate):.6g} requests/s ({boundary.binding} binds)"
    if math.isinf(x):
        return InfeasibleError(f"{what}: rho = {load.rho:.6g} at {rate:.6g} requests/s, must be < 1; {remedy}")
    at = load.times(x)
    if at.usage("kv_capacity") > 1 and all(at.usage(c) <= 1 for c in CONSTRAINTS[1:]):
        remedy += f", the smallest capacity at this rate {smallest_capacity(at.kv_tokens, load.engine)}"
    reasons = "; ".join(at.violations())
    return InfeasibleError(f"{what}: at {rate:.6g} requests/s the fluid equilibrium (DT* = {x:.6g} s) breaks {reasons}; {remedy}")


def window_rates(durations: npt.ArrayLike, rates: npt.ArrayLike, window_seconds: float, *, periodic: bool = False) -> FloatArray:
    """The highest mean rate over any window of ``window_seconds``: sup_t A_j(t, h) / h.

    For time-varying arrivals the conditions of WAIT hold with A_j(t, h), the arrivals expected in
    (t, t + h], in place of lam_j h (arXiv 2504.11320 v4, time-varying extension): use the result with
    h = one iteration as ``rate``.

    Args:
        durations: (P,) seconds of each piece of constant rate.
        rates: (P,) or (P, J) requests/s.
        window_seconds: h; a window longer than a non-periodic pattern counts its arrivals over h.
        periodic: the pattern repeats.

    Returns:
        () or (J,) float64, requests/s.
    """
    spans, lam = checks.numbers("window_rates.durations", durations), checks.numbers("window_rates.rates", rates)
    if spans.ndim != 1 or not spans.size or not np.all((spans >= _LEAST_SPAN) & (spans <= checks.MOST_SECONDS)):
        raise ConfigError(f"window_rates.durations: must be (P,) finite and > 0 seconds ({_LEAST_SPAN:g} to {checks.MOST_SECONDS:g})")
    if lam.ndim not in (1, 2) or lam.shape[0] != spans.size or not np.all((lam >= 0) & (lam <= MOST_RATE)):
        raise ConfigError(
            f"window_rates.rates: shape {lam.shape}, must be ({spans.size},) or ({spans.size}, J) with finite values >= 0, <= {MOST_RATE:g}"
        )
    window_seconds = checks.number("window_rates.window_seconds", window_seconds, low=_LEAST_SPAN, unit="seconds")
    periodic = checks.flag("window_rates.periodic", periodic)
    columns = lam.reshape(spans.size, -1)
    edges = np.concatenate([[0.0], np.cumsum(spans)])
    arrivals = np.vstack([np.zeros(columns.shape[1]), np.cumsum(columns * spans[:, None], axis=0)])
    period, total = float(edges[-1]), arrivals[-1]
    # The integral over a window is piecewise linear in its start: extremes lie where an end meets an edge.
    starts = np.concatenate([edges, edges - window_seconds])
    starts = np.mod(starts, period) if periodic else np.clip(starts, 0.0, max(0.0, period - window_seconds))

    def cumulative(t: FloatArray) -> FloatArray:
        laps = np.floor(t / period) if periodic else np.zeros_like(t)
        inside = np.clip(t - laps * period, 0.0, period)
        return np.stack([np.interp(inside, edges, arrivals[:, j]) + laps * total[j] for j in range(columns.shape[1])], axis=1)

    best: FloatArray = (cumulative(starts + window_seconds) - cumulative(starts)).max(axis=0) / window_seconds
    return best.reshape(lam.shape[1:])
