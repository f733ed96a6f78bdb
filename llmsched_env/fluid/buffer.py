"""Memory of Nested WAIT: segments, base memory M^pi, decay rates theta_k and the safety buffer.

arXiv 2504.11320 v4, Algorithm 2 and its conditions. Decode lengths are cut at r_1 < ... < r_K. All
requests pass segment 1; those that survive r_{k-1} wait in the boundary queue of segment k with their
KV kept. Rates and continuation probabilities::

    Lam_k = lam P(l' > r_{k-1}),  r_0 = 0;   p_k = Lam_k / Lam_{k-1},  k >= 2

With D_k = r_k (``paper``) or r_k - 1 (``vllm``: prefill yields token 1, so r_1 tokens take r_1
iterations), segment 1 has the stages 0 .. D_1 and segment k >= 2 the stages D_{k-1}+1 .. D_k. A
request at stage s is charged l + s; in a boundary queue its computed tokens are l + D_{k-1}, that is
l + r_{k-1} (``paper``) or l + r_{k-1} - 1 (``vllm``, whose last sampled token is not computed yet). The
``vllm`` preset adds (block_size - 1) / 2 for the last block. With n_k requests at every stage::

    M^pi  = sum_k n_k delta_k (l_k + sbar_k),  delta_k stages of mean number sbar_k
    M_req = M^pi + sum_{k>=2} (l_k + D_{k-1}) [ n_k + ln( m (1 + T / d0) / delta ) / theta_k ]
    theta_k > 0:  exp(-theta n_k) (1 - p_k + p_k exp(theta))^{n_{k-1}} = 1

Where M_req <= C no boundary queue overflows on [0, T] with probability >= 1 - delta. d0 is the time of an
empty batch: 1 + T / d0 bounds the number of iterations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.fluid.equilibrium import KV_CHARGED, LOAD_FIELDS, TOLERANCE, CycleLoad, mean_rounding, stage_shift
from llmsched_env.perf import Batch
from llmsched_env.perf import batch as bt
from llmsched_env.types import MOST_QUEUES, FloatArray, IntArray, LengthStatistics


def theta_root(n_prev: float, n_k: float, p: float) -> float:
    """The unique positive root theta of exp(-theta n_k) (1 - p + p exp(theta))^n_prev = 1.

    It is the decay rate of the boundary queue: each full batch of segment k-1 sends Binomial(n_prev, p)
    survivors, each service takes n_k. It depends on n_k / n_prev and p only. Infinite where n_k >= n_prev
    or p = 0: the queue is then bounded with certainty.

    Raises:
        ConfigError: p outside [0, 1], a threshold not > 0, or n_k <= n_prev p (no positive root: the queue grows).
    """
    n_prev, n_k, p = (
        checks.number(f"theta_root.{name}", value, low=-math.inf, high=math.inf)
        for name, value in (("n_prev", n_prev), ("n_k", n_k), ("p", p))
    )
    if not (0 <= p <= 1 and 0 < n_prev < math.inf and 0 < n_k < math.inf):
        raise ConfigError(f"theta_root: n_prev = {n_prev}, n_k = {n_k}, p = {p}; thresholds must be finite and > 0, p in [0, 1]")
    q = n_k / n_prev
    if q >= 1 or p == 0:
        return math.inf
    if q <= p:
        raise ConfigError(f"theta_root: n_k / n_prev = {q:.6g} must be above p = {p:.6g}, or the boundary queue grows without bound")

    def drift(theta: float) -> float:  # increasing where positive; two forms against cancellation and overflow
        log_mgf = math.log1p(p * math.expm1(theta)) if theta < 1 else theta + math.log(p + (1 - p) * math.exp(-theta))
        return log_mgf - theta * q

    # Hoeffding's inequality below; log(mgf) > theta + log p above.
    low, high = theta_lower_bound(n_prev, n_k, p), -math.log(p) / (1 - q)
    while high - low > 4 * math.ulp(high):
        middle = (low + high) / 2
        low, high = (low, middle) if drift(middle) > 0 else (middle, high)
    return (low + high) / 2


def theta_lower_bound(n_prev: float, n_k: float, p: float) -> float:
    """8 (n_k - n_prev p) / n_prev <= theta (arXiv 2504.11320 v4, unknown lengths)."""
    return 8 * (n_k - n_prev * p) / n_prev


def check_segment_ends(segment_ends: Sequence[int] | npt.NDArray[np.integer], count: int | None = None) -> IntArray:
    """(K,) int32 of all K segment ends, the last included."""
    ends = checks.counts("segment_ends", segment_ends, 1, single=True)
    if not ends.size or ends.size > MOST_QUEUES or np.any(np.diff(ends) <= 0):
        raise ConfigError(f"segment_ends: {checks.shown(ends.tolist())}, must be increasing integers >= 1, at most {MOST_QUEUES}")
    if count is not None and ends.size != count:
        raise ConfigError(f"segment_ends: {ends.size} ends for {count} thresholds, must be one each (the last end included)")
    return ends


def check_prompts(prompt: npt.ArrayLike, count: int) -> FloatArray:
    """(count,) float64 prompt lengths of segments, tokens >= 0; one number stands for all."""
    lengths = checks.numbers("prompt", prompt)
    if lengths.shape not in ((), (1,), (count,)) or not np.all((lengths >= 0) & (lengths <= checks.MOST_TOKENS)):
        raise ConfigError(f"prompt: {checks.shown(prompt)}, must be one length or {count}, from 0 to 2**30 tokens")
    return np.broadcast_to(lengths, (count,))


def survival(statistics: LengthStatistics, ends: IntArray) -> FloatArray:
    """(K,) P(l' > r_{k-1}), 1 for k = 1."""
    total = statistics.survival(0.0)  # 1 but for rounding: where nobody stops, p is exactly 1
    return np.array([1.0, *(statistics.survival(float(r)) / total for r in ends[:-1])])


def continuation(statistics: LengthStatistics, segment_ends: Sequence[int]) -> FloatArray:
    """(K-1,) p_k = P(l' > r_{k-1} | l' > r_{k-2}) for k = 2 .. K."""
    alive = survival(statistics, check_segment_ends(segment_ends))
    return np.divide(alive[1:], alive[:-1], out=np.zeros(alive.size - 1), where=alive[:-1] > 0)


def merge_segments(statistics: LengthStatistics, segment_ends: Sequence[int]) -> tuple[int, ...]:
    """Segment ends without those that nobody survives (p_k = 0) and those where nobody stops (p_k = 1)."""
    kept: list[int] = []
    alive = statistics.survival(0.0)
    ends = check_segment_ends(segment_ends).tolist()
    for r in ends:
        after = statistics.survival(float(r))
        if after == 0:
            return (*kept, r)
        if after < alive:
            kept.append(r)
            alive = after
    return (*kept, max(statistics.max_output, ends[-1]))


def segment_stages(ends: IntArray, engine: EngineConfig) -> tuple[IntArray, IntArray]:
    """First and last stage of each segment, (K,) each."""
    last = ends - np.int32(stage_shift(engine))
    first = np.concatenate([[0], last[:-1] + 1]).astype(np.int32)
    return first, last


def nested_load(
    thresholds: npt.ArrayLike,
    segment_ends: Sequence[int] | IntArray,
    prompt: npt.ArrayLike,
    engine: EngineConfig,
    *,
    prompt_square: float | None = None,
) -> CycleLoad:
    """The batch of an iteration in which all segments run with n_k requests at every stage.

    Args:
        thresholds: (K,) n_k.
        segment_ends: (K,) all ends r_k.
        prompt: tokens, one number or (K,) per segment.
        prompt_square: mean square of the prompts of segment 1; by default the square of ``prompt``.
    """
    n = np.atleast_1d(checks.numbers("thresholds", thresholds))
    first, last = segment_stages(check_segment_ends(segment_ends, n.size), engine)
    if not np.all((n >= 0) & (n <= checks.MOST_TOKENS)):
        raise ConfigError(f"thresholds: {checks.shown(thresholds)}, must be from 0 to 2**30 requests")
    length = check_prompts(prompt, n.size)
    square = float(length[0]) ** 2 if prompt_square is None else prompt_square
    width = (last - first + 1).astype(np.float64)
    residents = float(n @ width)
    load = float((n * width) @ (length + (first + last) / 2))
    prefill = float(n[0] * length[0])
    decodes = residents - float(n[0])
    sums = np.zeros(LOAD_FIELDS)
    sums[bt.DECODES], sums[bt.DECODE_KV] = decodes, load - prefill
    sums[bt.PREFILLS], sums[bt.PREFILL_TOKENS] = n[0], prefill
    sums[bt.PREFILL_SQUARES], sums[bt.PREFILL_WORK] = n[0] * square, n[0] * square / 2
    sums[bt.SAMPLED] = decodes if engine.preset == "paper" else residents
    sums[bt.LOAD], sums[bt.BATCH_SIZE] = load, residents
    sums[KV_CHARGED] = load + mean_rounding(engine) * residents
    return CycleLoad(sums, engine)


def nested_memory(thresholds: npt.ArrayLike, segment_ends: Sequence[int] | IntArray, prompt: npt.ArrayLike, engine: EngineConfig) -> float:
    """M^pi = sum_k n_k delta_k (l_k + sbar_k), KV tokens charged; arguments as in ``nested_load``."""
    return nested_load(thresholds, segment_ends, prompt, engine).kv_tokens


@dataclass(frozen=True, slots=True)
class SafetyBuffer:
    """KV (tokens) to keep for the boundary queues, over M^pi.

    Attributes:
        thresholds: sum_{k>=2} (l_k + D_{k-1}) n_k, what accumulates before a segment may run.
        fluctuation: sum_{k>=2} (l_k + D_{k-1}) ln(m (1 + T / d0) / delta) / theta_k.
        theta: (K-1,) theta_k.
    """

    thresholds: float
    fluctuation: float
    theta: FloatArray

    @property
    def total(self) -> float:
        return self.thresholds + self.fluctuation


def safety_buffer(
    thresholds: npt.ArrayLike,
    segment_ends: Sequence[int] | IntArray,
    continuation: npt.ArrayLike,
    prompt: npt.ArrayLike,
    engine: EngineConfig,
    *,
    horizon_seconds: float,
    delta: float,
    num_types: int | None = None,
) -> SafetyBuffer:
    """The two parts of M_req - M^pi. Fractional n_k count as ceil(n_k) in the first: a queue holds whole requests.

    Args:
        thresholds, segment_ends, prompt: as in ``nested_load``.
        continuation: (K-1,) p_k, k = 2 .. K.
        horizon_seconds: T.
        delta: allowed probability of any overflow on [0, T].
        num_types: m of the union bound; by default K.
    """
    n = np.atleast_1d(checks.numbers("thresholds", thresholds))
    ends = check_segment_ends(segment_ends, n.size)
    p = np.atleast_1d(checks.numbers("continuation", continuation))
    if p.shape != (n.size - 1,):
        raise ConfigError(f"continuation: {p.size} probabilities for {n.size} segments, must be {n.size - 1}")
    if not np.all((n > 0) & (n <= checks.MOST_TOKENS)):
        raise ConfigError(f"thresholds: {checks.shown(thresholds)}, must be > 0 and <= 2**30 requests")
    if checks.number("delta", delta, low=1e-300, high=1.0) == 1.0:
        raise ConfigError(f"delta: {delta}, must be in (0, 1)")
    checks.number("horizon_seconds", horizon_seconds, unit="seconds", open_low=True)
    if num_types is not None:
        checks.integer("num_types", num_types, low=1)
    d0 = engine.time_model.seconds(Batch())
    if n.size > 1 and d0 <= 0:
        raise ConfigError("engine.time_model: an empty batch takes 0 seconds, so the number of iterations in the horizon has no bound")
    length = check_prompts(prompt, n.size)
    charge = length[1:] + segment_stages(ends, engine)[1][:-1] + mean_rounding(engine)
    theta = np.array([theta_root(n[k - 1], n[k], p[k - 1]) for k in range(1, n.size)])
    log = math.log((num_types or n.size) * (1 + horizon_seconds / d0) / delta) if n.size > 1 else 0.0
    return SafetyBuffer(float(charge @ np.ceil(n[1:] * (1 - TOLERANCE))), float((charge / theta).sum() * log), theta)


def required_memory(
    thresholds: npt.ArrayLike,
    segment_ends: Sequence[int] | IntArray,
    continuation: npt.ArrayLike,
    prompt: npt.ArrayLike,
    engine: EngineConfig,
    *,
    horizon_seconds: float,
    delta: float,
    num_types: int | None = None,
) -> float:
    """M_req, KV tokens: M^pi + the safety buffer; arguments as in ``safety_buffer``."""
    buffer = safety_buffer(
        thresholds, segment_ends, continuation, prompt, engine, horizon_seconds=horizon_seconds, delta=delta, num_types=num_types
    )
    return nested_memory(thresholds, segment_ends, prompt, engine) + buffer.total
