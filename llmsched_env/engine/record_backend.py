"""What every backend keeps: the engine's record, the live view, reports, counters and the per-request log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.backend import Counters, ResidentRequests, WaitingRequests
from llmsched_env.compiled import compiled
from llmsched_env.engine import state as st
from llmsched_env.engine.link import link
from llmsched_env.engine.prefix_cache import SharedPrompts, pool_tables, reset_pool
from llmsched_env.engine.step import engine_at, reset_at
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import memory_of, packed_of, warn_out_of_range
from llmsched_env.records import Level
from llmsched_env.types import TILE_TOKENS, Decision, FloatArray, IntArray, IterationReport, QueueLayout, RequestLog, Workload

CACHE_LINE = 64


# --- building the record -------------------------------------------------------------------------------
def load_settings(
    settings: st.Settings, engine: EngineConfig, layout: QueueLayout, limits: EpisodeLimits, *, trace: bool = False, external: bool = False
) -> None:
    """Write engine, queues and limits as the kernel reads them."""
    settings.paper = engine.preset == "paper"
    settings.capacity = engine.kv_capacity
    settings.block_size = engine.block_size
    whole = engine.block_size & (engine.block_size - 1) == 0
    settings.block_shift = engine.block_size.bit_length() - 1 if whole else -1
    settings.max_num_batched_tokens = engine.max_num_batched_tokens
    settings.least_token_budget = TILE_TOKENS
    settings.max_num_seqs = engine.max_num_seqs
    settings.most_active = engine.most_active
    settings.long_prefill = engine.long_prefill_token_threshold
    settings.prefill_interval = engine.prefill_schedule_interval
    settings.interval_release = engine.prefill_interval_release
    settings.longest_request = engine.longest_request
    settings.chunked_prefill = engine.enable_chunked_prefill
    settings.reserve_full = engine.scheduler_reserve_full_isl
    settings.watermark_blocks = engine.watermark_blocks
    settings.padded_prefill = engine.padded_prefill
    settings.decode_needs_free_block = engine.decode_needs_free_block
    settings.by_class = engine.admission_order == "class"
    settings.by_tenant = layout.by == "tenant"
    settings.by_priority = engine.scheduling_policy == "priority"
    settings.boundary_slot = engine.boundary_slot
    settings.drain = limits.drain
    settings.max_iterations = limits.max_iterations
    settings.num_classes, settings.num_segments, settings.num_queues = layout.num_classes, layout.num_segments, layout.num_queues
    settings.wheel_size = st.wheel_size(layout.num_queues)
    settings.trace = trace
    settings.lose_progress = engine.preset == "paper" or engine.eviction == "lose_progress"
    settings.prefix_caching = engine.enable_prefix_caching
    settings.external = external
    settings.by_prediction = layout.by == "predicted"
    settings.horizon = limits.horizon
    settings.late_after = engine.late_after


def load_queues(queues: st.Queues, engine: EngineConfig, layout: QueueLayout) -> None:
    """Write what never changes about the queues.

    Raises:
        ConfigError: ``engine.class_rank`` does not have one rank a class.
    """
    if len(engine.class_rank) not in (0, layout.num_classes):
        raise ConfigError(f"engine.class_rank: {len(engine.class_rank)} ranks, must be one for each of {layout.num_classes} classes")
    ranks = np.asarray(engine.class_rank or np.arange(layout.num_classes))
    queues.rank[: layout.num_queues] = np.repeat(ranks, layout.num_segments)
    queues.segment_end[: layout.num_queues] = np.tile([*layout.segment_ends, st.NO_END], layout.num_classes)
    queues.segment_end[layout.num_queues] = st.NO_END
    queues.weight[: layout.num_queues] = np.repeat(layout.class_weights, layout.num_segments)


def most_residents(engine: EngineConfig, num_requests: int, shortest_prompt: int) -> int:
    """Residents that there can be at once, at least 1."""
    most = engine.capacity_tokens // max(shortest_prompt, 1) if engine.preset == "paper" else engine.max_num_seqs
    return max(min(num_requests, most), 1)


def engine_tables(
    num_requests: int, num_queues: int, num_residents: int, block_size: int, engines: tuple[int, ...] = (), *, by_priority: bool = False
) -> dict[str, npt.NDArray[Any]]:
    """Memory of an engine by field of ``Engine``, with leading axes ``engines``; with a table of priorities where it schedules by them."""
    sizes = {
        "requests": (num_requests, st.Requests),
        "arrived": (num_requests, st.Arrived),
        "hidden": (num_requests, st.Hidden),
        "foretold": (num_requests, st.Foretold),
        "queues": (num_queues + 1, st.Queues),
        "events": (num_residents, st.Events),
        "phases": (num_queues * block_size, st.Phases),
        "wheel": (num_queues * st.wheel_size(num_queues), st.Wheel),
        **({"order": (num_requests, st.Order)} if by_priority else {}),
    }
    return {name: _aligned_zeros((*engines, rows), table.DTYPE) for name, (rows, table) in sizes.items()}


def _aligned_zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros that begin with a cache line: rows of ``Requests`` and ``Hidden`` are one line each."""
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.zeros(size + CACHE_LINE, dtype=np.uint8)
    start = -memory.ctypes.data % CACHE_LINE
    array: npt.NDArray[Any] = memory[start : start + size].view(dtype).reshape(shape)
    return array


def load_requests(hidden: npt.NDArray[Any], workload: Workload, layout: QueueLayout) -> None:
    """Write an episode's requests into (N,) ``Hidden`` rows."""
    hidden["arrival"], hidden["prompt"], hidden["output"] = workload.arrival, workload.prompt_tokens, workload.output_tokens
    known = (workload.tenant, workload.predicted_tokens)
    classes = layout.classify(workload.prompt_tokens, workload.output_tokens, workload.type_id, *known)
    hidden["outside"] = classes * layout.num_segments


def load_predictions(foretold: npt.NDArray[Any], workload: Workload) -> None:
    """Write what is predicted of an episode's requests into (N,) ``Foretold`` rows."""
    foretold["predicted"] = 0 if workload.predicted_tokens is None else workload.predicted_tokens


def load_order(order: npt.NDArray[Any], workload: Workload) -> None:
    """Write an episode's queue keys by priority into (N,) ``Order`` rows.

    Raises:
        ConfigError: more requests than keys of one priority.
    """
    n = len(workload)
    if n > st.PRIORITY_STEP:
        raise ConfigError(f"workload: {n} requests, must be at most {st.PRIORITY_STEP} with engine.scheduling_policy='priority'")
    order["key"] = np.arange(n)
    if workload.priority is not None:
        order["key"] += st.PRIORITY_STEP * workload.priority


def check_served(workload: Workload, engine: EngineConfig) -> None:
    """Refuse requests the engine could never serve.

    Raises:
        ConfigError: a request longer than ``engine.longest_request`` with ``oversize="error"``.
    """
    if engine.oversize == "reject":
        return
    total = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
    too_long = np.flatnonzero(total > engine.longest_request)
    if too_long.size:
        i = int(too_long[0])
        field = "capacity_tokens" if engine.preset == "paper" else "max_model_len"
        raise ConfigError(
            f"workload: request {i} needs {workload.prompt_tokens[i]} prompt + {workload.output_tokens[i]} output tokens, "
            f"more than engine.{field} = {engine.longest_request} ({too_long.size} such requests); "
            f"raise it, or set engine.oversize='reject' to refuse them on arrival"
        )


# --- the view ----------------------------------------------------------------------------------------
@compiled
def list_residents(engine, out):  # type: ignore[no-untyped-def]
    """Residents by admission into ``out``."""
    record = engine_at(engine)
    r = record.oldest
    count = 0
    while r >= 0:
        out[count] = r
        count += 1
        r = record.requests.next[r]


@compiled
def list_waiting(engine, q, out):  # type: ignore[no-untyped-def]
    """The first requests of outside queue q into ``out``; returns how many."""
    record = engine_at(engine)
    r = record.queues.head[q]
    count = 0
    while r >= 0 and count < out.shape[0]:
        out[count] = r
        count += 1
        r = record.requests.next[r]
    return count


def _read_only(array: npt.NDArray) -> npt.NDArray:  # type: ignore[type-arg]
    view = array.view()
    view.flags.writeable = False
    return view


class RecordView:
    """Live, read-only view of an engine's record (``llmsched_env.backend.View``)."""

    def __init__(self, record: st.Engine, engine: EngineConfig, layout: QueueLayout, reveals_output_length: bool) -> None:
        self.engine, self.layout, self.reveals_output_length = engine, layout, reveals_output_length
        self.rebind(record)
        shape = (layout.num_classes, layout.num_segments)

        def column(name: str) -> npt.NDArray[Any]:
            return _read_only(record.queues.rows[name][: layout.num_queues].reshape(shape))

        self.waiting: IntArray = column("waiting")
        self.late: IntArray = column("late")[:, 0]
        self.residents: IntArray = column("residents")
        self.resident_kv: IntArray = column("resident_kv")
        self.boundary_kv: IntArray = column("boundary_kv")
        self.head_tokens: IntArray = column("head_tokens")[:, 0]
        self.head_key: IntArray = column("head_key")[:, 0]
        self.head_arrival: FloatArray = column("head_arrival")[:, 0]
        self._arrivals: FloatArray = column("arrivals")[:, 0]
        self._is_paper = engine.preset == "paper"

    def rebind(self, record: st.Engine) -> None:
        """Look at another record whose queues lie in the same memory (its tables of requests have grown)."""
        self._whole = record
        self._shown: st.Engine | None = None

    @property
    def record(self) -> st.Engine:
        """The engine's record as far as a policy is shown it."""
        if self._shown is None:
            self._shown = self._whole.at_level(Level.KNOWN if self.reveals_output_length else Level.VISIBLE)
        return self._shown

    @property
    def handle(self) -> Any:
        """Where compiled rules find the engine; they are given their own level of it."""
        return self._whole.handle

    @property
    def clock(self) -> float:
        return self._whole.clock

    @property
    def arrival_rate(self) -> FloatArray:
        seconds = self._whole.rate_seconds
        return self._arrivals / seconds if seconds > 0 else np.zeros_like(self._arrivals)

    @property
    def num_residents(self) -> int:
        return self._whole.num_residents

    @property
    def num_waiting(self) -> int:
        return self._whole.num_waiting

    @property
    def kv_used(self) -> int:
        return self._whole.kv_tokens if self._is_paper else self._whole.kv_blocks

    @property
    def kv_free(self) -> int:
        return self.engine.kv_capacity - self.kv_used

    @property
    def last_iteration_seconds(self) -> float:
        return self._whole.last_iteration

    @property
    def evictions(self) -> int:
        return self._whole.evictions

    def resident_requests(self) -> ResidentRequests:
        ids = np.empty(self.num_residents, dtype=np.int32)
        list_residents(self._whole.handle, ids)
        rows = self._whole.requests.rows[ids]
        steps = self._whole.queues.rows["steps"][rows["group"]]
        return ResidentRequests(
            id=ids,
            queue=rows["queue"],
            at_boundary=rows["status"] == st.BOUNDARY,
            prompt_tokens=rows["prompt"],
            generated=rows["base_generated"] + steps,
            computed=rows["base_computed"] + steps,
            prefill_target=rows["target"],
            output_tokens=rows["output"] if self.reveals_output_length else None,
            predicted_tokens=self._whole.arrived.rows["predicted"][ids],
        )

    def waiting_requests(self, j: int, limit: int) -> WaitingRequests:
        q = self.layout.queue(j)
        ids = np.empty(min(max(limit, 0), int(self.waiting[j, 0])), dtype=np.int32)
        list_waiting(self._whole.handle, q, ids)
        rows = self._whole.requests.rows[ids]
        return WaitingRequests(
            id=ids,
            prompt_tokens=rows["prompt"],
            generated=rows["base_generated"],
            arrival=self._whole.hidden.rows["arrival"][ids],
            key=rows["key"],
            output_tokens=rows["output"] if self.reveals_output_length else None,
            predicted_tokens=self._whole.arrived.rows["predicted"][ids],
        )


# --- the backend ---------------------------------------------------------------------------------------
class RecordBackend(ABC):
    """Base of the backends: everything but the iteration itself (``llmsched_env.backend.Backend``).

    Attributes:
        record: the engine, from ``reset`` on.

    Args:
        trace: keep (request, tokens) of the last iteration for ``scheduled()``.
        shared: common heads of the prompts, where the engine has prefix caching; default none.
        uncached_first: with prefix caching, blocks freed without contents are taken again first, as vLLM 0.28 does and 0.19 did not.
    """

    engine: EngineConfig
    layout: QueueLayout
    reveal_output_length: bool
    record: st.Engine
    external = False

    def __init__(self, trace: bool = False, *, shared: SharedPrompts | None = None, uncached_first: bool = True) -> None:
        self._trace, self._shared, self._uncached_first = trace, shared, uncached_first
        self._sizes: tuple[Any, ...] = ()
        self._workload: Workload | None = None

    def reset(
        self,
        workload: Workload,
        layout: QueueLayout,
        engine: EngineConfig,
        limits: EpisodeLimits,
        *,
        reveal_output_length: bool = False,
    ) -> RecordView:
        check_served(workload, engine)
        n = len(workload)
        residents = most_residents(engine, n, int(workload.prompt_tokens.min()) if n else 1)
        by_priority = engine.scheduling_policy == "priority"
        sizes = (n, layout.num_queues, residents, engine.block_size)
        if (*sizes, by_priority) != self._sizes:
            self._sizes, self._tables = (*sizes, by_priority), engine_tables(*sizes, by_priority=by_priority)
        parts: dict[str, Any] = {**self._tables, "batch": {"model": packed_of(engine.time_model), "memory": memory_of(engine.time_model)}}
        if engine.enable_prefix_caching:
            parts["pool"] = pool_tables(workload, engine.num_blocks, engine.block_size, residents, self._shared)
        self._workload, self.layout, self.engine, self.reveal_output_length = workload, layout, engine, reveal_output_length
        record = self.record = st.Engine(**parts)
        load_settings(record.settings, engine, layout, limits, trace=self._trace, external=self.external)
        record.settings.reveal = reveal_output_length
        record.num_requests = n
        self._link()
        load_queues(record.queues, engine, layout)
        load_requests(self._tables["hidden"], workload, layout)
        load_predictions(self._tables["foretold"], workload)
        if by_priority:
            load_order(self._tables["order"], workload)
        if engine.enable_prefix_caching:
            reset_pool(record.pool, engine.num_blocks, self._uncached_first)
        reset_at(record.handle)
        self._view = RecordView(record, engine, layout, reveal_output_length)
        return self._view

    def _link(self) -> None:
        link(self.record.code, self.engine, self.layout)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_view", "_tables", "_sizes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._sizes = ()
        if self._workload is not None:
            self._link()
            self._view = RecordView(self.record, self.engine, self.layout, self.reveal_output_length)

    @abstractmethod
    def advance(self, decision: Decision) -> None:
        """One step without a report.

        Raises:
            ConfigError: a decision for another number of queues.
            RuntimeError: called after the episode has ended, or the engine can make no progress.
        """

    def check_decision(self, decision: Decision) -> None:
        """Refuse a decision of another width than the queues: compiled code would read beyond its end.

        Raises:
            ConfigError: another number of queues.
        """
        if not isinstance(decision, Decision):
            raise ConfigError(f"decision: {type(decision).__name__}, must be a Decision")
        if len(decision) != self.layout.num_queues:
            raise ConfigError(f"decision: {len(decision)} queues, must be {self.layout.num_queues} as the engine's layout has")

    def check_running(self) -> None:
        if self.done:
            raise RuntimeError("the episode has ended; call reset() first")

    def check_progress(self) -> None:
        record = self.record
        if record.end == st.END_STUCK:
            raise RuntimeError(
                f"the engine can schedule nothing at {record.clock:.6f} s with "
                f"{record.num_waiting} waiting and {record.num_residents} resident requests"
            )

    def step(self, decision: Decision) -> IterationReport:
        self.advance(decision)
        return self.report()

    def report(self) -> IterationReport:
        """What the last step did."""
        record, report, batch, events = self.record, self.record.report, self.record.batch, self.record.events
        return IterationReport(
            start=report.start,
            duration=report.duration,
            idle=bool(report.idle),
            forced_drain=bool(report.forced_drain),
            batch_size=int(batch.batch_size),
            decode_requests=int(batch.decodes),
            prefill_requests=int(batch.prefills),
            prefill_tokens=int(batch.prefill_tokens),
            total_tokens=int(batch.prefill_tokens + batch.decodes),
            load=int(batch.load),
            kv_used=report.kv_reserved,
            admitted=report.admitted,
            completed=report.completed,
            arrived=report.arrived,
            rejected=report.rejected,
            evicted=tuple(events.evicted[: report.evicted].tolist()),
            preempted=tuple(events.preempted[: report.preempted].tolist()),
            finished=tuple(events.finished[: report.completed].tolist()),
            waiting=record.num_waiting,
            system_seconds=report.system_seconds,
            completed_tokens=report.completed_tokens,
            generated_tokens=report.generated_tokens,
        )

    def scheduled(self) -> tuple[IntArray, IntArray]:
        """(ids, tokens) of the last iteration in order of admission; needs ``trace=True``."""
        if not self._trace:
            raise RuntimeError("scheduled() needs trace=True")
        n = self.record.report.traced
        return self.record.events.traced[:n].copy(), self.record.events.traced_tokens[:n].copy()

    def snapshot(self) -> RecordView:
        return self._view

    def counters(self) -> Counters:
        r = self.record
        if self.done:
            warn_out_of_range(self.engine.time_model, r.out_of_range, r.iterations)
        return Counters(
            clock=r.clock,
            iterations=r.iterations,
            idle_steps=r.idle_steps,
            drain_iterations=r.drain_iterations,
            evictions=r.evictions,
            forced_evictions=r.forced_evictions,
            kv_seconds=r.kv_seconds,
            kv_peak=r.kv_peak,
            busy_seconds=r.busy_seconds,
            system_seconds=r.system_seconds,
            finished=r.finished,
            rejected=r.rejected,
            out_of_range=r.out_of_range,
            end=self.end,
        )

    def log(self) -> RequestLog:
        assert self._workload is not None, "reset() first"
        requests, hidden = self.record.requests.rows, self.record.hidden.rows
        return RequestLog(
            arrival=hidden["arrival"].copy(),
            prompt_tokens=hidden["prompt"].copy(),
            output_tokens=hidden["output"].copy(),
            class_id=hidden["outside"] // self.layout.num_segments,
            admitted=hidden["admitted"].copy(),
            first_token=hidden["first_token"].copy(),
            completed=hidden["completed"].copy(),
            evictions=hidden["evictions"].copy(),
            forced_evictions=hidden["forced"].copy(),
            rejected=requests["status"] == st.REJECTED,
            request_id=self._workload.request_id,
            tenant=self._workload.tenant,
        )

    @property
    def done(self) -> bool:
        return self.record.end != st.RUNNING

    @property
    def end(self) -> str:
        """``running``, ``finished``, ``stranded``, ``horizon`` or ``max_iterations``."""
        return st.END_NAMES[self.record.end]

    @property
    def hit_tokens(self) -> int:
        """Tokens found in the prefix cache so far."""
        return self.record.pool.hit_tokens

    @property
    def asked_tokens(self) -> int:
        """Tokens of all admissions so far, re-admissions included (prefix caching)."""
        return self.record.pool.asked_tokens

    def close(self) -> None:
        self._sizes = ()
