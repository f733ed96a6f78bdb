"""From the per-request log of an episode to the figures people compare.

Definitions (TTFT, latency, TPOT: see ``RequestLog``):

* Percentiles are linearly interpolated between order statistics; a metric with no request is NaN.
* Latency, TPOT and normalised latency are over completed requests, TTFT over requests whose first token has come out.
* Fairness is Jain's index of normalised latency (``slowdown_jain``), whether some wait many times as long for each token as others.
* Throughput counts completed requests alone: tokens of a request that never finishes are worth
  nothing (the paper's effective throughput, arXiv 2504.11320, model section).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.backend import Counters
from llmsched_env.errors import ConfigError, require
from llmsched_env.types import BoolArray, FloatArray, RequestLog


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one episode. Seconds, tokens, requests; NaN where no request has the metric.

    Attributes:
        requests, completed, rejected: counts of requests (those that arrived after the warm-up).
        throughput_tok_s: output tokens of completed requests per simulated second.
        throughput_req_s: completed requests per simulated second.
        latency_*: arrival to last token (s); ``latency_max`` is the longest.
        slowdown_jain: ``jain_index`` of ``normalized_latency``: 1 where every output token was waited for equally long, 1 / n where
            one of n requests had all the wait. Any fixed number of seconds for each output token alone on an idle engine makes
            normalised latency a slowdown, and the index does not depend on that number.
        ttft_*: arrival to first token (s).
        tpot_*: seconds per output token after the first; single-token outputs have none.
        slo_goodput: share of all requests that completed within both limits (``ttft_limit`` and
            ``tpot_limit`` seconds); rejected and unfinished requests miss them.
        evictions: asked for by the policy or forced by the engine; forced_evictions: forced alone.
        kv_mean, kv_max: KV reserved as a fraction of the capacity, time average and peak.
        sim_seconds: simulated seconds from 0 to the end of the last step.
        iterations, idle_steps, drain_iterations: engine iterations; steps in which the clock only
            moved; iterations in which the engine overrode a policy that scheduled nothing.
        out_of_range: iterations outside the data behind the iteration-time model (extrapolated).
        truncated: the episode ended at ``EpisodeLimits.max_iterations``.
        end: how the episode ended, see ``Counters``.
    """

    requests: int
    completed: int
    rejected: int
    throughput_tok_s: float
    throughput_req_s: float
    latency_mean: float
    latency_p50: float
    latency_p95: float
    latency_p99: float
    latency_max: float
    slowdown_jain: float
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    tpot_mean: float
    tpot_p50: float
    tpot_p95: float
    tpot_p99: float
    slo_goodput: float
    evictions: int
    forced_evictions: int
    kv_mean: float
    kv_max: float
    sim_seconds: float
    iterations: int
    idle_steps: int
    drain_iterations: int
    out_of_range: int
    truncated: bool
    end: str

    @classmethod
    def absent(cls) -> Summary:
        """Of an episode that could not take place: no request and no iteration, NaN for every figure of requests, ``end`` empty."""
        nothing: dict[str, Any] = {"int": 0, "float": math.nan, "bool": False, "str": ""}
        return cls(**{field.name: nothing[str(field.type)] for field in dataclasses.fields(cls)})

    def as_dict(self) -> dict[str, float]:
        """The numbers by name, in the order above (``end`` is left out)."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "end"}


def ttft(log: RequestLog) -> FloatArray:
    """(N,) seconds from arrival to the first output token; NaN where none has come out."""
    seconds: FloatArray = log.first_token - log.arrival
    return seconds


def latency(log: RequestLog) -> FloatArray:
    """(N,) seconds from arrival to completion; NaN where not complete."""
    seconds: FloatArray = log.completed - log.arrival
    return seconds


def tpot(log: RequestLog) -> FloatArray:
    """(N,) seconds per output token after the first; NaN for single-token outputs and unfinished requests."""
    rest = log.output_tokens.astype(np.float64) - 1.0
    seconds: FloatArray = np.divide(log.completed - log.first_token, rest, out=np.full(len(log), np.nan), where=rest > 0)
    return seconds


def normalized_latency(log: RequestLog) -> FloatArray:
    """(N,) seconds from arrival to completion for each output token; NaN where not complete.

    What Orca and vLLM compare systems by (Kwon et al., SOSP 2023, section 6.1: "each request's end-to-end latency divided by its
    output length").
    """
    seconds: FloatArray = latency(log) / log.output_tokens
    return seconds


def jain_index(values: FloatArray) -> float:
    """(sum x)^2 / (n sum x^2) of n values >= 0: from 1 / n, one has everything, to 1, all are equal; NaN of none, NaN left out.

    Jain, Chiu and Hawe, "A quantitative measure of fairness and discrimination", DEC TR-301, 1984. It is the same for values in
    any unit. Where all are 0 they are equal: 1.
    """
    present = values[np.isfinite(values)]
    if present.size == 0:
        return math.nan
    top = float(present.max())
    if top <= 0.0:
        return 1.0
    shares = present / top  # squares stay finite
    return float(shares.sum() ** 2 / (shares.size * (shares @ shares)))


def summarize(
    log: RequestLog,
    counters: Counters,
    *,
    kv_capacity: int,
    warmup: float = 0.0,
    ttft_limit: float = 1.0,
    tpot_limit: float = 0.1,
) -> Summary:
    """Summary of an episode.

    Args:
        log, counters: of the same episode, from the backend.
        kv_capacity: KV units of the engine (``EngineConfig.kv_capacity``).
        warmup: seconds. Requests that arrived earlier are left out of every per-request figure, and
            throughput counts completions from then on, over the seconds from then on. Counters
            (evictions, KV, iterations) are of the whole episode.
        ttft_limit, tpot_limit: seconds, for ``slo_goodput``; the defaults are those of
            ``llmsched_env.reward.SloGoodputReward``.

    Raises:
        ConfigError: negative or non-finite warm-up, or a limit that is not positive.
    """
    checks.number("warmup", warmup, unit="seconds")
    for name, limit in (("ttft_limit", ttft_limit), ("tpot_limit", tpot_limit)):
        checks.number(name, limit, high=math.inf, unit="seconds", open_low=True)
    checks.integer("kv_capacity", kv_capacity, low=1, high=2**62)
    counted = log.arrival >= warmup
    done = np.isfinite(log.completed)
    in_window = done & (log.completed >= warmup)
    seconds = counters.clock - warmup
    first, whole, per_token = (metric(log)[counted] for metric in (ttft, latency, tpot))
    n = int(np.count_nonzero(counted))
    within = (first <= ttft_limit) & ~(per_token > tpot_limit) & done[counted]
    return Summary(
        requests=n,
        completed=int(np.count_nonzero(done[counted])),
        rejected=int(np.count_nonzero(log.rejected[counted])),
        throughput_tok_s=_rate(float(log.output_tokens[in_window].sum(dtype=np.int64)), seconds),
        throughput_req_s=_rate(float(np.count_nonzero(in_window)), seconds),
        **_spread("latency", whole),
        latency_max=_largest(whole),
        slowdown_jain=jain_index(normalized_latency(log)[counted]),
        **_spread("ttft", first),
        **_spread("tpot", per_token),
        slo_goodput=float(np.count_nonzero(within)) / n if n else math.nan,
        evictions=counters.evictions,
        forced_evictions=counters.forced_evictions,
        kv_mean=_rate(counters.kv_seconds, counters.clock * kv_capacity),
        kv_max=counters.kv_peak / kv_capacity,
        sim_seconds=counters.clock,
        iterations=counters.iterations,
        idle_steps=counters.idle_steps,
        drain_iterations=counters.drain_iterations,
        out_of_range=counters.out_of_range,
        truncated=counters.end == "max_iterations",
        end=counters.end,
    )


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else math.nan


def _largest(values: FloatArray) -> float:
    present = values[np.isfinite(values)]
    return float(present.max()) if present.size else math.nan


def _spread(name: str, values: FloatArray) -> dict[str, float]:
    present = values[np.isfinite(values)]
    if present.size == 0:
        return {f"{name}_{suffix}": math.nan for suffix in ("mean", "p50", "p95", "p99")}
    p50, p95, p99 = np.percentile(present, (50, 95, 99))
    return {f"{name}_mean": float(present.mean()), f"{name}_p50": float(p50), f"{name}_p95": float(p95), f"{name}_p99": float(p99)}


def lost(log: RequestLog) -> BoolArray:
    """(N,) requests that neither completed nor were rejected: stranded, or cut off by the horizon."""
    return ~(np.isfinite(log.completed) | log.rejected)


@dataclass(frozen=True, slots=True)
class Interval:
    """Mean of ``n`` independent values with a two-sided confidence interval; ``low`` and ``high`` are NaN for n = 1."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    def on_log_axis(self) -> Interval:
        """The interval of the same mean for a logarithmic axis: ``mean * exp(-h / mean)`` to ``mean * exp(h / mean)``, h the half width.

        A symmetric interval of a positive quantity can reach zero and below, which no logarithmic axis can show. This is the
        interval of the logarithm of the mean (delta method: the standard error of log(mean) is that of the mean over the mean),
        with the same quantile. It stays around the arithmetic mean, which is what plots and tables show; an interval of the mean
        of the logarithms would belong to the geometric mean. To first order in h / mean both are equal. A bootstrap
        of the mean was no choice: with the 2 to 10 seeds that are usual its coverage falls far below 95 %.

        A mean of zero has no logarithm: of values >= 0 it says that all are zero, and the interval is [0, 0]. Below zero, and where
        this interval is unknown, the bounds are NaN.
        """
        if self.mean == 0:
            return Interval(0.0, 0.0, 0.0, self.n) if self.half_width == 0 else Interval(0.0, math.nan, math.nan, self.n)
        if not self.mean > 0 or math.isnan(self.half_width):
            return Interval(self.mean, math.nan, math.nan, self.n)
        # Beyond e^700 float64 is infinite: so is an upper bound whose half width is hundreds of times the mean.
        factor = math.exp(min(self.half_width / self.mean, 700.0))
        return Interval(self.mean, self.mean / factor, self.mean * factor, self.n)


def mean_interval(values: Sequence[float] | npt.NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """Mean over seeds with Student's t interval (needs the extra ``cli``, for scipy).

    A NaN among the values makes the result NaN: a seed on which nothing completed must not vanish.

    Raises:
        ConfigError: no value, or ``confidence`` outside (0, 1).
        MissingExtraError: scipy is not installed.
    """
    array = checks.numbers("values", values)
    if array.ndim != 1 or array.size == 0:
        raise ConfigError(f"values: shape {array.shape}, must be (n,) with n >= 1")
    if np.any(np.abs(array) > 1e150):
        raise ConfigError(f"values: {checks.shown(values)}, must be within 1e150 of 0, or NaN")
    if checks.number("confidence", confidence, high=1.0, open_low=True) == 1.0:
        raise ConfigError(f"confidence: {confidence}, must be in (0, 1)")
    mean, n = float(array.mean()), int(array.size)
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    quantile = float(require("scipy.special", "cli").stdtrit(n - 1, (1 + confidence) / 2))
    half = quantile * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)
