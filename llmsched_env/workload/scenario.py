"""``Scenario``: lengths, arrivals, engine and queue layout that belong together; and one that replays a trace."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.fluid.segments import equal_probability_ends
from llmsched_env.types import LengthStatistics, QueueLayout, Workload
from llmsched_env.workload.arrivals import ArrivalProcess, Poisson, TraceArrivals, check_count, check_positive
from llmsched_env.workload.lengths import LengthModel, TraceLengths
from llmsched_env.workload.predictions import PredictionModel
from llmsched_env.workload.readers import REORDER_SECONDS, InvalidRows, TimeUnit, Trace, read_trace
from llmsched_env.workload.tenants import Tenant, TenantMix

QUARTERS = 4
DEFAULT_MODEL_LEN = 4096


@dataclass(frozen=True, eq=False)
class Scenario:
    """A workload and the engine it is meant for.

    Attributes:
        name, description: for people.
        source: where lengths and arrivals come from.
        lengths: distribution of prompt, output and type.
        arrivals: process with its default rate.
        engine: default engine.
        layout: queues of LLMSched-v1; never by output length.
        known_layout: queues of LLMSchedKnown-v1: by type, or by output length.
        num_requests: default length of an episode.
        ttft_slo, tpot_slo: default latency limits, seconds.
        rows: exact requests to replay, in order, or None to sample ``lengths``. Their times come
            from ``arrivals``.
        trace: the file that ``rows`` were read from, with what was left out of it or put in order.
        tenants: whose requests they are (``llmsched_env.workload.tenants``); None: everybody's. Where nothing is replayed they
            say of whom ``lengths`` and ``arrivals`` are, ``TenantMix.scenario_parts``.
        predictions: how a predictor of output lengths errs; None where there is none, or where ``rows`` have predictions of their own.
    """

    name: str
    description: str
    source: str
    lengths: LengthModel
    arrivals: ArrivalProcess
    engine: EngineConfig
    layout: QueueLayout
    known_layout: QueueLayout
    num_requests: int = 2000
    ttft_slo: float = 1.0
    tpot_slo: float = 0.1
    rows: Workload | None = None
    trace: Trace | None = None
    tenants: TenantMix | None = None
    predictions: PredictionModel | None = None

    def __post_init__(self) -> None:
        if self.layout.reveals_output_length:
            raise ConfigError("scenario.layout: by='output' reveals hidden lengths, must be single, type, prompt or predicted")
        object.__setattr__(self, "predictions", PredictionModel.of(self.predictions))
        check_count("scenario.num_requests", self.num_requests, low=1)
        for name in ("ttft_slo", "tpot_slo"):
            check_positive(f"scenario.{name}", getattr(self, name), "seconds")
        if self.tenants is not None and self.rows is None:
            self.tenants.check_parts(self.arrivals, self.lengths)

    @property
    def rate(self) -> float:
        """Default mean arrival rate, requests per second."""
        return float(self.arrivals.rate)

    @property
    def dropped(self) -> int:
        """Rows of the trace file that were left out (``Trace.dropped_reason`` says why); 0 without a file."""
        return 0 if self.trace is None else self.trace.dropped

    @functools.cached_property
    def statistics(self) -> LengthStatistics:
        """What an operator knows of the lengths. For a trace: of the trace itself, a perfect forecast."""
        known = self.lengths.statistics()
        predictor = self.predictions
        if predictor is None and self.rows is not None and self.rows.predicted_tokens is not None:
            predictor = PredictionModel.fitted(self.rows.output_tokens, self.rows.predicted_tokens)
        return known if predictor is None else predictor.statistics(known)

    @property
    def num_tenants(self) -> int:
        """Tenants; 1 where none are declared."""
        return 1 if self.tenants is None else len(self.tenants.tenants)

    def generate(
        self,
        seed: int | np.random.SeedSequence | np.random.Generator,
        *,
        rate: float | None = None,
        num_requests: int | None = None,
        horizon: float | None = None,
    ) -> Workload:
        """Draw the requests of one episode.

        Arrivals, lengths and predictions have a random stream each: the same seed at two rates gives the same
        requests in the same order, and the same requests with predictions as without; with tenants, to
        each of them. A seed s and a fresh
        ``np.random.default_rng(s)`` give the same workload; a generator gives a new one at each call.

        Args:
            seed: int >= 0, seed sequence, or generator (of which two children are spawned).
            rate: mean rate in requests/s; None for the scenario's.
            num_requests: how many; None for the scenario's, or all until ``horizon``.
            horizon: only arrivals in [0, ``horizon``] seconds; there may be none.

        Raises:
            ConfigError: a value out of range, or more requests than an exact trace has.
        """
        arrivals = self.arrivals if rate is None else self.arrivals.with_rate(rate)
        if num_requests is not None:
            check_count("num_requests", num_requests, low=1)
        if horizon is not None:
            check_positive("horizon", horizon, "seconds")
        for_times, for_lengths = _two_streams(seed)
        if self.tenants is not None and self.rows is None:
            count = num_requests or (self.num_requests if horizon is None else None)
            return self.tenants.draw((arrivals, self.lengths), for_times, for_lengths, count, horizon)
        limit = len(self.rows) if self.rows is not None else None
        if limit is not None and num_requests is not None and num_requests > limit:
            raise ConfigError(f"num_requests: {num_requests}, but {self.name} has {limit} requests")
        if limit is not None:
            # An exact replay does not repeat, however long the horizon.
            times = arrivals.sample(for_times, num_requests or limit)
            times = times if horizon is None else times[times <= horizon]
        elif horizon is None:
            times = arrivals.sample(for_times, num_requests or self.num_requests)
        else:
            times = arrivals.sample_until(for_times, horizon)[:num_requests]
        n = times.shape[0]
        if self.rows is not None:
            rows = self.rows
            known = None if rows.predicted_tokens is None else rows.predicted_tokens[:n]
            owner = None if rows.tenant is None else rows.tenant[:n]
            lengths = (rows.prompt_tokens[:n], rows.output_tokens[:n], rows.type_id[:n], rows.request_id[:n])
            workload = Workload.of(times, *lengths, tenant=owner, predicted_tokens=known)
        else:
            # Valid by construction: the checks of Workload.of would take as long as the draws.
            workload = Workload(times, *self.lengths.sample(for_lengths, n))
        return workload if self.predictions is None else self.predictions.predict(workload, _root_of(for_lengths))


def _two_streams(seed: int | np.random.SeedSequence | np.random.Generator) -> tuple[np.random.Generator, np.random.Generator]:
    if isinstance(seed, np.random.Generator):
        first, second = seed.spawn(2)
        return first, second
    if isinstance(seed, np.random.SeedSequence):
        # A copy: spawning would change the caller's sequence.
        root = np.random.SeedSequence(seed.entropy, spawn_key=seed.spawn_key, pool_size=seed.pool_size)
    elif isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ConfigError(f"seed: {seed!r}, must be an integer >= 0, a SeedSequence or a Generator")
    else:
        root = np.random.SeedSequence(int(seed))
    first, second = (np.random.default_rng(child) for child in root.spawn(2))
    return first, second


def _root_of(rng: np.random.Generator) -> np.random.SeedSequence:
    """What a generator of ``_two_streams`` was seeded with."""
    root = rng.bit_generator.seed_seq
    assert isinstance(root, np.random.SeedSequence)
    return root


def _quartiles(statistics: LengthStatistics) -> tuple[int, ...]:
    """Output quartiles (tokens), equal ones merged; the longest output is not among them."""
    return equal_probability_ends(statistics, QUARTERS)[:-1]


def bucket_edges(values: np.ndarray, weight: np.ndarray, num_classes: int) -> tuple[int, ...]:
    """Upper edges of ``num_classes`` buckets of equal probability; fewer where lengths coincide."""
    order = np.argsort(values, kind="stable")
    mass = np.cumsum(weight[order])
    edges: list[int] = []
    for share in np.arange(1, num_classes) / num_classes:
        edge = int(np.floor(values[order][min(np.searchsorted(mass, share), values.size - 1)]))
        if edge >= 1 and edge < values.max() and (not edges or edge > edges[-1]):
            edges.append(edge)
    return tuple(edges)


def interpolated_edges(statistics: LengthStatistics, num_classes: int) -> tuple[int, ...]:
    """Upper edges of at most ``num_classes`` buckets of about equal probability by prompt length.

    The statistics know some twenty prompt lengths, each the middle of a range; between them the
    distribution function is taken to be linear.
    """
    lengths, index = np.unique(statistics.prompt, return_inverse=True)
    mass = np.bincount(index, statistics.weight)
    shares = np.arange(1, num_classes) / num_classes
    edges = np.unique(np.floor(np.interp(shares, np.cumsum(mass) - mass / 2, lengths)).astype(np.int64))
    return tuple(int(edge) for edge in edges if 1 <= edge < lengths[-1])


def predicted_layout(statistics: LengthStatistics, num_classes: int, base: QueueLayout | None = None) -> QueueLayout:
    """Classes by predicted output: ``num_classes`` buckets of equal probability for each bucket by prompt length of ``base``.

    Raises:
        ConfigError: statistics without predictions.
    """
    if statistics.predicted is None:
        raise ConfigError("layout.by: 'predicted', but the scenario has no predictions (predictions=SIGMA gives it some)")
    edges = bucket_edges(statistics.predicted, statistics.weight, num_classes)
    base = QueueLayout() if base is None else base
    return QueueLayout("predicted", edges, segment_ends=base.segment_ends, prompt_edges=base.edges if base.by == "prompt" else ())


def hidden_layout(statistics: LengthStatistics) -> QueueLayout:
    """One class; segments end at the quartiles of the output length."""
    return QueueLayout(segment_ends=_quartiles(statistics))


def bucket_layout(statistics: LengthStatistics) -> QueueLayout:
    """Known lengths: a class for each quarter of the output lengths."""
    return QueueLayout(by="output", edges=_quartiles(statistics))


def scenario_from_trace(
    path: str | Path,
    *,
    rate: float | None = None,
    name: str | None = None,
    engine: EngineConfig | None = None,
    layout: QueueLayout | None = None,
    known_layout: QueueLayout | None = None,
    ttft_slo: float = 1.0,
    tpot_slo: float = 0.1,
    jitter_seconds: float = 0.0,
    time_unit: TimeUnit | None = None,
    invalid_rows: InvalidRows = "error",
    reorder_seconds: float = REORDER_SECONDS,
) -> Scenario:
    """A scenario that replays exactly the requests of a file, in order.

    Times are as recorded, from the first arrival at 0, or stretched by one factor to the mean ``rate``. A file with lengths only
    gets Poisson arrivals at ``rate``, drawn anew for each seed. ``statistics`` are those of the
    file's own lengths: policies work with a perfect forecast of the distribution.

    Args:
        path: any format of ``read_trace``.
        rate: mean arrival rate, requests/s; None keeps the recorded times.
        name: default the file's name without suffixes.
        engine: default ``EngineConfig.vllm()`` whose ``max_model_len`` is raised to the longest
            request where that is above 4,096, at most to the KV cache. What is longer still is
            refused or rejected by the engine (``EngineConfig.oversize``).
        layout, known_layout: default one class with segments at the output quartiles, a class for each tenant where
            the file has a ``tenant`` column; classes by the file's ``type`` column, or by output quartiles where it has none.
        ttft_slo, tpot_slo: seconds.
        jitter_seconds, time_unit, invalid_rows, reorder_seconds: see ``read_trace``.

    Raises:
        ConfigError: a file ``read_trace`` refuses, a bad rate, or lengths without times and no rate.
    """
    trace = read_trace(path, jitter_seconds=jitter_seconds, time_unit=time_unit, invalid_rows=invalid_rows, reorder_seconds=reorder_seconds)
    if trace.arrival is None:
        if rate is None:
            raise ConfigError(f"rate: None, but {trace.path} has lengths only: give a rate for Poisson arrivals")
        arrivals: ArrivalProcess = Poisson(rate)
    else:
        arrivals = TraceArrivals(trace.arrival)
        if rate is not None:
            arrivals = arrivals.with_rate(rate)
    rows = Workload.of(
        np.zeros(len(trace)) if trace.arrival is None else trace.arrival,
        trace.prompt_tokens,
        trace.output_tokens,
        trace.type_id,
        trace.request_id,
        tenant=trace.tenant,
        predicted_tokens=trace.predicted_tokens,
    )
    changed = f", {trace.dropped} rows dropped: {trace.dropped_reason}" if trace.dropped else ""
    changed += f", {trace.reordered} rows put in order" if trace.reordered else ""
    source = f"{trace.path} ({trace.format})"
    lengths: LengthModel = TraceLengths(trace.prompt_tokens, trace.output_tokens, trace.type_id, source)
    tenants = None
    if trace.tenant is not None:
        tenants = TenantMix(tuple(Tenant(one, ttft_slo=ttft_slo, tpot_slo=tpot_slo) for one in trace.tenant_names))
        lengths = tenants.recorded_lengths(trace.prompt_tokens, trace.output_tokens, trace.type_id, trace.tenant, source)
    statistics = lengths.statistics()
    if engine is None:
        longest = int((trace.prompt_tokens.astype(np.int64) + trace.output_tokens).max())
        engine = EngineConfig.vllm()
        engine = engine.replace(max_model_len=min(max(DEFAULT_MODEL_LEN, longest), engine.kv_capacity_tokens))
    if known_layout is None:
        types = len(trace.type_names)
        known_layout = QueueLayout(by="type", num_types=types) if types else bucket_layout(statistics)
    return Scenario(
        name=name or Path(path).name.split(".")[0] or "trace",
        description=f"replay of {len(trace)} requests of {Path(path).name} ({trace.format} format{changed})",
        source=trace.path,
        lengths=lengths,
        arrivals=arrivals,
        engine=engine,
        layout=layout or (hidden_layout(statistics) if tenants is None else tenants.layout),
        known_layout=known_layout,
        num_requests=len(trace),
        ttft_slo=ttft_slo,
        tpot_slo=tpot_slo,
        rows=rows,
        trace=trace,
        tenants=tenants,
    )
