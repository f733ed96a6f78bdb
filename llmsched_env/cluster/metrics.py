"""From the finished calls of a cluster to the figures people compare: ``llmsched_env.metrics`` for many engines and for streams.

Latency, TTFT, TPOT and the index of fairness mean what they mean there. Two things differ, because a cluster hands out calls as they end
and never holds them all:

* Only calls that ended, completed or rejected, are there to be counted; those cut off by the end of a run are in no figure.
* Throughput, too, leaves out calls that arrived before the warm-up.

``Tally`` counts and sums batches of rows one after the other in memory that does not grow. Whoever adds the quantiles, exactly
(``summarize_calls``) or from sketches (``llmsched_env.cluster.sketches``), gets the same record from it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.cluster.finished import FINISHED_DTYPE
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import jain_index
from llmsched_env.types import BoolArray, FloatArray

Rows = npt.NDArray[np.void]
"""(n,) rows of ``FINISHED_DTYPE``."""

METRICS = ("latency", "ttft", "tpot", "program_latency")
"""What has a mean, quantiles and a maximum."""
SHARES = (0.5, 0.95, 0.99)
"""The quantiles of ``ClusterSummary``."""
MOST_REPLICAS = 1_000_000


@dataclass(frozen=True, slots=True)
class ClusterSummary:
    """The figures of one run of a cluster. Seconds, tokens, calls; NaN where no call has the metric.

    Attributes:
        requests, completed, rejected: calls that ended, and how, of those that arrived after the warm-up, as in all that follows.
        programs: programs that began after the warm-up and whose last call completed.
        throughput_tok_s, throughput_req_s: output tokens of completed calls, and completed calls, per simulated second after the warm-up.
        latency_*: arrival to last token (s) of completed calls.
        slowdown_jain: ``llmsched_env.metrics.jain_index`` of latency per output token.
        ttft_*: arrival to first token (s).
        tpot_*: seconds per output token after the first; single-token outputs have none.
        program_latency_*: start of a program to the completion of its last call (s), think times included, over ``programs``. A call
            that stands alone is a program, too.
        slo_goodput: share of all calls that completed within both limits; rejected calls miss them.
        evictions: of these calls, asked for by a policy or forced.
        rerouted: calls that were handed to a replica more often than their parts need: once, or twice where prompts and answers have
            replicas of their own (``Terms.separated``).
        cached_share: prompt tokens found in the prefix cache at the first admission, as a share of the prompt tokens of admitted calls.
        replica_requests: completed calls of each replica.
        replica_jain: ``jain_index`` of them: 1 where all replicas completed equally many.
        sim_seconds: simulated seconds to the end of the run, the warm-up included; of all runs where several are combined.
    """

    requests: int
    completed: int
    rejected: int
    programs: int
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
    ttft_max: float
    tpot_mean: float
    tpot_p50: float
    tpot_p95: float
    tpot_p99: float
    tpot_max: float
    program_latency_mean: float
    program_latency_p50: float
    program_latency_p95: float
    program_latency_p99: float
    program_latency_max: float
    slo_goodput: float
    evictions: int
    rerouted: int
    cached_share: float
    replica_requests: tuple[int, ...]
    replica_jain: float
    sim_seconds: float

    def as_dict(self) -> dict[str, float]:
        """The numbers by name, in the order above; ``replica_requests`` is left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "replica_requests"}


@dataclass(frozen=True, slots=True)
class Terms:
    """Which calls count, and against which limits.

    Attributes:
        replicas: engines of the cluster; rows name 0 .. ``replicas`` - 1.
        warmup: seconds; calls that arrived, and programs that began, earlier are in no figure.
        ttft_limit, tpot_limit: seconds, for ``slo_goodput``.
        separated: of the cluster (``ClusterSpec.separated``): every call is handed over twice, for its prompt and for its answer.

    Raises:
        ConfigError: no replica, a negative or non-finite warm-up, a limit that is not positive, or a ``separated`` that is no flag.
    """

    replicas: int
    warmup: float = 0.0
    ttft_limit: float = 1.0
    tpot_limit: float = 0.1
    separated: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "replicas", checks.integer("replicas", self.replicas, low=1, high=MOST_REPLICAS))
        object.__setattr__(self, "warmup", checks.number("warmup", self.warmup, unit="seconds"))
        for name in ("ttft_limit", "tpot_limit"):
            limit = checks.number(name, getattr(self, name), high=math.inf, unit="seconds", open_low=True)
            object.__setattr__(self, name, limit)
        object.__setattr__(self, "separated", checks.flag("separated", self.separated))

    @property
    def parts(self) -> int:
        """How often a call is handed over if nothing happens to its replicas."""
        return 2 if self.separated else 1


def check_rows(rows: Rows) -> None:
    """Refuse an array that is not one of finished calls.

    Raises:
        ConfigError: another type or shape.
    """
    if not isinstance(rows, np.ndarray) or rows.dtype != FINISHED_DTYPE or rows.ndim != 1:
        shown = f"{rows.dtype} of shape {rows.shape}" if isinstance(rows, np.ndarray) else checks.shown(rows)
        raise ConfigError(f"rows: {shown}, must be an (n,) array of FINISHED_DTYPE")


def check_calls(rows: Rows) -> None:
    """Refuse rows that no run can have given, all of one run at once.

    Args:
        rows: (n,) of ``FINISHED_DTYPE``, in any order.

    Raises:
        ConfigError: a call that completed before it arrived, or that has two rows.
    """
    for i in np.flatnonzero(rows["completed"] < rows["arrival"])[:1]:
        row = rows[i]
        raise ConfigError(f"rows.completed: {row['completed']} of call {row['number']}, must be >= {row['arrival']}, its arrival")
    numbers = np.sort(rows["number"])
    for number in numbers[1:][numbers[1:] == numbers[:-1]][:1]:
        raise ConfigError(f"rows.number: {number} twice, must be one row a call")


def call_metrics(rows: Rows) -> dict[str, FloatArray]:
    """(n,) seconds each: ``latency``, ``ttft``, ``tpot`` and ``program_latency`` of every row; NaN where it has none."""
    rest = rows["output"].astype(np.float64) - 1.0
    nothing = np.full(len(rows), np.nan)
    return {
        "latency": rows["completed"] - rows["arrival"],
        "ttft": rows["first_token"] - rows["arrival"],
        "tpot": np.divide(rows["completed"] - rows["first_token"], rest, out=nothing, where=rest > 0),
        "program_latency": np.where(rows["ends_program"] == 1, rows["completed"] - rows["program_start"], np.nan),
    }


@dataclass(slots=True)
class Sum:
    """A running sum that keeps what rounding takes away (Neumaier, "Rundungsfehleranalyse einiger Verfahren zur Summation", 1974)."""

    total: float = 0.0
    lost: float = 0.0

    def add(self, value: float) -> None:
        total = self.total + value
        larger, smaller = (self.total, value) if abs(self.total) >= abs(value) else (value, self.total)
        self.lost += (larger - total) + smaller
        self.total = total

    def __float__(self) -> float:
        return self.total + self.lost


COUNTS = ("requests", "completed", "rejected", "within", "evictions", "rerouted", "output_tokens", "prompt_tokens", "cached_tokens")


@dataclass(slots=True)
class Tally:
    """Counts, sums and maxima of calls, batch by batch. Whole numbers are exact; sums of seconds are within rounding of the exact ones.

    Attributes:
        counts: by name, ``COUNTS``; ``within``: calls that met both limits.
        present: how many calls have each of ``METRICS``.
        sums: of each of them; and of latency per output token, ``normalized``, and its squares, ``squares``.
        largest: of each of ``METRICS``, -inf for none.
        by_replica: (replicas,) completed calls.
        last: seconds, the last completion of this run, or where it ended; 0 for none.
        other_counted, other_seconds: seconds of runs that were merged into this one, without and with their warm-up.
    """

    terms: Terms
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    present: dict[str, int] = field(default_factory=lambda: dict.fromkeys(METRICS, 0))
    sums: dict[str, Sum] = field(default_factory=lambda: {name: Sum() for name in (*METRICS, "normalized", "squares")})
    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(METRICS, -math.inf))
    by_replica: npt.NDArray[np.int64] = field(init=False)
    last: float = 0.0
    other_counted: float = 0.0
    other_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.by_replica = np.zeros(self.terms.replicas, dtype=np.int64)

    def add(self, rows: Rows) -> dict[str, FloatArray]:
        """Count these rows; returns the values of each of ``METRICS`` that count, for whoever keeps quantiles.

        Raises:
            ConfigError: not an array of finished calls, or one that names a replica that there is not. Nothing was counted then.
        """
        check_rows(rows)
        terms = self.terms
        done = np.isfinite(rows["completed"])
        replica = rows["replica"][done]
        if replica.size and not (replica.min() >= 0 and replica.max() < terms.replicas):
            wrong = int(replica[(replica < 0) | (replica >= terms.replicas)][0])
            raise ConfigError(f"rows.replica: {wrong} of a completed call, must be from 0 to {terms.replicas - 1}")
        if done.any():
            self.last = max(self.last, float(rows["completed"][done].max()))
        counted = rows["arrival"] >= terms.warmup
        if not counted.all():
            rows, done = rows[counted], done[counted]
        values = call_metrics(rows)
        values["program_latency"][rows["program_start"] < terms.warmup] = np.nan
        self._count(rows, values, done)
        found = {name: array[np.isfinite(array)] for name, array in values.items()}
        for name, array in found.items():
            if array.size:
                self.present[name] += array.size
                self.sums[name].add(float(array.sum()))
                self.largest[name] = max(self.largest[name], float(array.max()))
        return found

    def _count(self, rows: Rows, values: dict[str, FloatArray], done: BoolArray) -> None:
        """The whole numbers, and what fairness needs."""
        terms, admitted = self.terms, np.isfinite(rows["admitted"])
        within = done & (values["ttft"] <= terms.ttft_limit) & ~(values["tpot"] > terms.tpot_limit)
        new = {
            "requests": len(rows),
            "completed": np.count_nonzero(done),
            "rejected": np.count_nonzero(rows["rejected"]),
            "within": np.count_nonzero(within),
            "evictions": rows["evictions"].sum(dtype=np.int64),
            "rerouted": np.count_nonzero(rows["routed"] > terms.parts),
            "output_tokens": rows["output"][done].sum(dtype=np.int64),
            "prompt_tokens": rows["prompt"][admitted].sum(dtype=np.int64),
            "cached_tokens": rows["cached"][admitted].sum(dtype=np.int64),
        }
        for name, number in new.items():
            self.counts[name] += int(number)
        normalized = (values["latency"] / rows["output"])[done]
        self.sums["normalized"].add(float(normalized.sum()))
        self.sums["squares"].add(float(normalized @ normalized))
        self.by_replica += np.bincount(rows["replica"][done], minlength=terms.replicas)

    def ended(self, clock: float) -> None:
        """The run ended at ``clock`` seconds, which may be later than the last completion.

        Raises:
            ConfigError: negative or not finite.
        """
        self.last = max(self.last, checks.number("clock", clock, unit="seconds"))

    @property
    def seconds(self) -> float:
        """Simulated, of all runs."""
        return self.other_seconds + self.last

    @property
    def counted_seconds(self) -> float:
        """Simulated seconds after the warm-up, of all runs."""
        return self.other_counted + max(self.last - self.terms.warmup, 0.0)

    def merge(self, other: Tally) -> None:
        """Add the calls of another run, whose seconds then count beside those of this one.

        Raises:
            ConfigError: the other one counts by other terms.
        """
        if other.terms != self.terms:
            raise ConfigError(f"merge: {other.terms}, must be counted by the same terms, {self.terms}")
        for name in COUNTS:
            self.counts[name] += other.counts[name]
        for name in METRICS:
            self.present[name] += other.present[name]
            self.largest[name] = max(self.largest[name], other.largest[name])
        for name, total in self.sums.items():
            total.add(other.sums[name].total)
            total.add(other.sums[name].lost)
        self.by_replica += other.by_replica
        self.other_counted += other.counted_seconds
        self.other_seconds += other.seconds

    def summary(self, quantiles: Callable[[str], Sequence[float]]) -> ClusterSummary:
        """The record, with the ``SHARES`` of a metric by its name; it is asked for those alone that some call has."""
        counts, sums, seconds = self.counts, self.sums, self.counted_seconds
        figures: dict[str, Any] = {}
        for name in METRICS:
            some = self.present[name]
            p50, p95, p99 = quantiles(name) if some else (math.nan,) * 3
            figures[f"{name}_mean"] = float(sums[name]) / some if some else math.nan
            figures |= {f"{name}_p50": p50, f"{name}_p95": p95, f"{name}_p99": p99}
            figures[f"{name}_max"] = self.largest[name] if some else math.nan
        return ClusterSummary(
            **{name: counts[name] for name in ("requests", "completed", "rejected", "evictions", "rerouted")},
            programs=self.present["program_latency"],
            throughput_tok_s=_ratio(counts["output_tokens"], seconds),
            throughput_req_s=_ratio(counts["completed"], seconds),
            slowdown_jain=_jain(counts["completed"], float(sums["normalized"]), float(sums["squares"])),
            slo_goodput=_ratio(counts["within"], counts["requests"]),
            cached_share=_ratio(counts["cached_tokens"], counts["prompt_tokens"]),
            replica_requests=tuple(self.by_replica.tolist()),
            replica_jain=jain_index(self.by_replica.astype(np.float64)) if counts["completed"] else math.nan,
            sim_seconds=self.seconds,
            **figures,
        )


def summarize_calls(
    rows: Rows,
    *,
    replicas: int,
    warmup: float = 0.0,
    ttft_limit: float = 1.0,
    tpot_limit: float = 0.1,
    separated: bool = False,
    clock: float | None = None,
) -> ClusterSummary:
    """Exact figures of the finished calls of one run.

    Args:
        rows: (n,) of ``FINISHED_DTYPE``, in any order.
        replicas, warmup, ttft_limit, tpot_limit, separated: see ``Terms``.
        clock: seconds at which the run ended; None: at its last completion.

    Raises:
        ConfigError: see ``Terms``, ``Tally.add`` and ``check_calls``.
    """
    tally = Tally(Terms(replicas, warmup, ttft_limit, tpot_limit, separated))
    check_rows(rows)
    check_calls(rows)
    values = tally.add(rows)
    if clock is not None:
        tally.ended(clock)
    return tally.summary(lambda name: [float(q) for q in np.quantile(values[name], SHARES)])


def _ratio(amount: float, of: float) -> float:
    return amount / of if of > 0 else math.nan


def _jain(n: int, total: float, squares: float) -> float:
    """``jain_index`` of n values from their sum and the sum of their squares."""
    if n == 0:
        return math.nan
    return min(total**2 / (n * squares), 1.0) if squares > 0 else 1.0
