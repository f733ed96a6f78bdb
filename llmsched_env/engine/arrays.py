"""What every backend keeps: the engine's arrays, the live view, reports, counters and the per-request log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.backend import Counters, ResidentRequests, WaitingRequests
from llmsched_env.compiled import compiled
from llmsched_env.engine import kernel
from llmsched_env.engine import state as st
from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import warn_out_of_range
from llmsched_env.perf.batch import BATCH_FIELDS, BATCH_SIZE, DECODES, LOAD, PREFILL_TOKENS, PREFILLS
from llmsched_env.types import (
    Decision,
    EngineConfig,
    EpisodeLimits,
    FloatArray,
    IntArray,
    IterationReport,
    QueueLayout,
    RequestLog,
    Workload,
)

_END_NAMES = {
    st.END_NOT: "running",
    st.END_FINISHED: "finished",
    st.END_STRANDED: "stranded",
    st.END_HORIZON: "horizon",
    st.END_ITERATIONS: "max_iterations",
    st.END_STUCK: "stuck",
}


@compiled
def _first_waiting(head, limit, requests, out):  # type: ignore[no-untyped-def]
    count = 0
    r = head
    while r >= 0 and count < limit:
        out[count] = r
        count += 1
        r = requests[st.R_NEXT, r]
    return count


def _read_only(array: npt.NDArray) -> npt.NDArray:  # type: ignore[type-arg]
    view = array.view()
    view.flags.writeable = False
    return view


def engine_settings(engine: EngineConfig, layout: QueueLayout, limits: EpisodeLimits, trace: bool) -> npt.NDArray[np.int64]:
    """(C_ROWS + J,) int64: the settings as the kernel reads them.

    Raises:
        ConfigError: ``engine.class_rank`` does not have one rank a class.
    """
    if len(engine.class_rank) not in (0, layout.num_classes):
        raise ConfigError(f"engine.class_rank: {len(engine.class_rank)} ranks, must be one for each of {layout.num_classes} classes")
    settings = np.zeros(st.C_ROWS + layout.num_classes, dtype=np.int64)
    settings[st.C_ROWS :] = engine.class_rank or np.arange(layout.num_classes)
    settings[st.C_PRESET] = st.PRESET_PAPER if engine.preset == "paper" else st.PRESET_VLLM
    settings[st.C_CAPACITY] = engine.kv_capacity
    settings[st.C_BLOCK_SIZE] = engine.block_size
    settings[st.C_BUDGET] = engine.max_num_batched_tokens
    settings[st.C_MAX_SEQS] = engine.max_num_seqs
    settings[st.C_MAX_LEN] = engine.longest_request
    settings[st.C_CHUNKED] = engine.enable_chunked_prefill
    settings[st.C_RESERVE_FULL] = engine.scheduler_reserve_full_isl
    settings[st.C_WATERMARK] = engine.watermark_blocks
    settings[st.C_PADDED] = engine.padded_prefill
    settings[st.C_FREE_BLOCK] = engine.decode_needs_free_block
    settings[st.C_BY_CLASS] = engine.admission_order == "class"
    settings[st.C_BOUNDARY_SLOT] = engine.boundary_slot
    settings[st.C_DRAIN] = limits.drain
    settings[st.C_MAX_ITERATIONS] = limits.max_iterations
    settings[st.C_SEGMENTS] = layout.num_segments
    settings[st.C_TRACE] = trace
    settings[st.C_LOSE_PROGRESS] = engine.preset == "paper" or engine.eviction == "lose_progress"
    return settings


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


class ArrayView:
    """Live, read-only view of a backend's arrays (``llmsched_env.backend.View``)."""

    def __init__(self, backend: ArrayBackend) -> None:
        self._backend = backend
        self.engine = backend.engine
        self.layout = backend.layout
        self.reveals_output_length = backend.reveal_output_length
        shape = (self.layout.num_classes, self.layout.num_segments)
        queues = _read_only(backend.queues)
        self.waiting: IntArray = queues[st.Q_WAITING].reshape(shape)
        self.late: IntArray = queues[st.Q_LATE].reshape(shape)[:, 0]
        self.residents: IntArray = queues[st.Q_RESIDENTS].reshape(shape)
        self.resident_kv: IntArray = queues[st.Q_RESIDENT_KV].reshape(shape)
        self.boundary_kv: IntArray = queues[st.Q_BOUNDARY_KV].reshape(shape)
        self.head_tokens: IntArray = queues[st.Q_HEAD_TOKENS].reshape(shape)[:, 0]
        self.head_key: IntArray = queues[st.Q_HEAD_KEY].reshape(shape)[:, 0]
        self.head_arrival: FloatArray = _read_only(backend.queue_f)[st.QF_HEAD_ARRIVAL].reshape(shape)[:, 0]
        self._slots = _read_only(backend.slots)
        self._is_paper = self.engine.preset == "paper"

    @property
    def arrays(self) -> tuple[npt.NDArray[np.int64], IntArray, IntArray, IntArray, FloatArray, npt.NDArray[np.int64], FloatArray]:
        """What compiled rules read (``llmsched_env.engine.fleet``); not to be written to."""
        b = self._backend
        return b.settings, b.requests, b.slots, b.queues, b.queue_f, b.scalars, b.clocks

    @property
    def clock(self) -> float:
        return float(self._backend.clocks[st.F_CLOCK])

    @property
    def arrival_rate(self) -> FloatArray:
        backend = self._backend
        seconds = backend.clocks[st.F_RATE_SECONDS]
        arrivals: FloatArray = backend.queue_f[st.QF_ARRIVALS, :: self.layout.num_segments]
        return arrivals / seconds if seconds > 0 else np.zeros_like(arrivals)

    @property
    def num_residents(self) -> int:
        return int(self._backend.scalars[st.I_RESIDENTS])

    @property
    def num_waiting(self) -> int:
        return int(self._backend.scalars[st.I_WAITING])

    @property
    def kv_used(self) -> int:
        return int(self._backend.scalars[st.I_KV_TOKENS if self._is_paper else st.I_KV_BLOCKS])

    @property
    def kv_free(self) -> int:
        return self.engine.kv_capacity - self.kv_used

    @property
    def last_iteration_seconds(self) -> float:
        return float(self._backend.clocks[st.F_LAST_ITERATION])

    @property
    def evictions(self) -> int:
        return int(self._backend.scalars[st.I_EVICTIONS])

    def resident_requests(self) -> ResidentRequests:
        slots = self._slots[:, : self.num_residents]
        return ResidentRequests(
            id=slots[st.S_ID],
            queue=slots[st.S_QUEUE],
            at_boundary=slots[st.S_STATE] == st.SLOT_BOUNDARY,
            prompt_tokens=slots[st.S_PROMPT],
            generated=slots[st.S_GENERATED],
            computed=slots[st.S_COMPUTED],
            prefill_target=slots[st.S_TARGET],
            output_tokens=slots[st.S_OUTPUT] if self.reveals_output_length else None,
        )

    def waiting_requests(self, j: int, limit: int) -> WaitingRequests:
        backend = self._backend
        q = self.layout.queue(j)
        ids = np.empty(min(limit, int(backend.queues[st.Q_WAITING, q])), dtype=np.int32)
        _first_waiting(backend.queues[st.Q_HEAD, q], ids.shape[0], backend.requests, ids)
        rows = backend.requests[:, ids]
        return WaitingRequests(
            id=ids,
            prompt_tokens=rows[st.R_PROMPT],
            generated=rows[st.R_GENERATED],
            arrival=backend.times[st.T_ARRIVAL, ids],
            key=rows[st.R_KEY],
            output_tokens=rows[st.R_OUTPUT] if self.reveals_output_length else None,
        )


class ArrayBackend(ABC):
    """Base of the backends: everything but the iteration itself (``llmsched_env.backend.Backend``).

    Args:
        trace: keep (request, tokens) of the last iteration for ``scheduled()``.
    """

    engine: EngineConfig
    layout: QueueLayout
    reveal_output_length: bool

    def __init__(self, trace: bool = False) -> None:
        self._trace = trace
        self._sizes: tuple[int, int, int] = (-1, -1, -1)
        self._workload: Workload | None = None

    def reset(
        self,
        workload: Workload,
        layout: QueueLayout,
        engine: EngineConfig,
        limits: EpisodeLimits,
        *,
        reveal_output_length: bool = False,
    ) -> ArrayView:
        check_served(workload, engine)
        classes = layout.classify(workload.prompt_tokens, workload.output_tokens, workload.type_id)
        n = len(workload)
        if engine.preset == "paper":
            shortest = int(workload.prompt_tokens.min()) if n else 1
            num_slots = min(n, engine.capacity_tokens // shortest)
        else:
            num_slots = min(n, engine.max_num_seqs)
        self._allocate(n, layout.num_queues, max(num_slots, 1))
        self._workload, self.layout, self.engine = workload, layout, engine
        self.reveal_output_length = reveal_output_length
        self.settings = engine_settings(engine, layout, limits, self._trace)
        self.model = engine.time_model.pack()
        self.ends = np.asarray(layout.segment_ends or (st.NO_END,), dtype=np.int32)
        self.requests[:] = 0
        self.requests[st.R_PROMPT] = workload.prompt_tokens
        self.requests[st.R_OUTPUT] = workload.output_tokens
        self.requests[st.R_CLASS] = classes
        self.times[:] = np.nan
        self.times[st.T_ARRIVAL] = workload.arrival
        self.clocks[st.F_HORIZON] = limits.horizon
        self.clocks[st.F_LATE_AFTER] = engine.late_after
        kernel.reset(self.settings, self.requests, self.times, self.queues, self.queue_f, self.scalars, self.clocks)
        self._view = ArrayView(self)
        return self._view

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_view"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._workload is not None:
            self._view = ArrayView(self)  # views of arrays would come back as copies

    def _allocate(self, n: int, num_queues: int, num_slots: int) -> None:
        if self._sizes == (n, num_queues, num_slots):
            return
        self._sizes = (n, num_queues, num_slots)
        self.requests = np.zeros((st.R_ROWS, n), dtype=np.int32)
        self.times = np.empty((st.T_ROWS, n), dtype=np.float64)
        self.slots = np.zeros((st.S_ROWS, num_slots), dtype=np.int32)
        self.queues = np.zeros((st.Q_ROWS, num_queues), dtype=np.int32)
        self.queue_f = np.zeros((st.QF_ROWS, num_queues), dtype=np.float64)
        self.scalars = np.zeros(st.I_ROWS, dtype=np.int64)
        self.clocks = np.zeros(st.F_ROWS, dtype=np.float64)
        self.batch = np.zeros(BATCH_FIELDS, dtype=np.float64)
        self.events = np.zeros((3, num_slots), dtype=np.int32)
        self.trace = np.zeros((2, num_slots if self._trace else 1), dtype=np.int32)

    @abstractmethod
    def advance(self, decision: Decision) -> None:
        """One step without a report.

        Raises:
            RuntimeError: called after the episode has ended, or the engine can make no progress.
        """

    def check_running(self) -> None:
        if self.scalars[st.I_DONE] != st.END_NOT:
            raise RuntimeError("the episode has ended; call reset() first")

    def check_progress(self) -> None:
        if self.scalars[st.I_DONE] == st.END_STUCK:
            raise RuntimeError(
                f"the engine can schedule nothing at {self.clocks[st.F_CLOCK]:.6f} s with "
                f"{self.scalars[st.I_WAITING]} waiting and {self.scalars[st.I_RESIDENTS]} resident requests"
            )

    def step(self, decision: Decision) -> IterationReport:
        self.advance(decision)
        return self.report()

    def report(self) -> IterationReport:
        """What the last step did."""
        s, c, b = self.scalars, self.clocks, self.batch
        return IterationReport(
            start=float(c[st.F_START]),
            duration=float(c[st.F_DURATION]),
            idle=bool(s[st.I_IDLE]),
            forced_drain=bool(s[st.I_FORCED_DRAIN]),
            batch_size=int(b[BATCH_SIZE]),
            decode_requests=int(b[DECODES]),
            prefill_requests=int(b[PREFILLS]),
            prefill_tokens=int(b[PREFILL_TOKENS]),
            total_tokens=int(b[PREFILL_TOKENS] + b[DECODES]),
            load=int(b[LOAD]),
            kv_used=int(s[st.I_KV_RESERVED]),
            admitted=int(s[st.I_ADMITTED]),
            completed=int(s[st.I_COMPLETED]),
            arrived=int(s[st.I_ARRIVED]),
            rejected=int(s[st.I_STEP_REJECTED]),
            evicted=tuple(self.events[0, : s[st.I_STEP_EVICTED]].tolist()),
            preempted=tuple(self.events[1, : s[st.I_STEP_PREEMPTED]].tolist()),
            finished=tuple(self.events[2, : s[st.I_COMPLETED]].tolist()),
            waiting=int(s[st.I_WAITING]),
            system_seconds=float(c[st.F_STEP_SYSTEM_SECONDS]),
            completed_tokens=int(s[st.I_COMPLETED_TOKENS]),
            generated_tokens=int(s[st.I_GENERATED_TOKENS]),
        )

    def scheduled(self) -> tuple[IntArray, IntArray]:
        """(ids, tokens) of the last iteration in slot order; needs ``trace=True``."""
        if not self._trace:
            raise RuntimeError("scheduled() needs trace=True")
        n = int(self.scalars[st.I_TRACED])
        return self.trace[0, :n].copy(), self.trace[1, :n].copy()

    def snapshot(self) -> ArrayView:
        return self._view

    def counters(self) -> Counters:
        s, c = self.scalars, self.clocks
        if self.done:
            warn_out_of_range(self.engine.time_model, int(s[st.I_OUT_OF_RANGE]), int(s[st.I_ITERATIONS]))
        return Counters(
            clock=float(c[st.F_CLOCK]),
            iterations=int(s[st.I_ITERATIONS]),
            idle_steps=int(s[st.I_IDLE_STEPS]),
            drain_iterations=int(s[st.I_DRAIN_ITERATIONS]),
            evictions=int(s[st.I_EVICTIONS]),
            forced_evictions=int(s[st.I_FORCED_EVICTIONS]),
            kv_seconds=float(c[st.F_KV_SECONDS]),
            kv_peak=int(s[st.I_KV_PEAK]),
            busy_seconds=float(c[st.F_BUSY_SECONDS]),
            system_seconds=float(c[st.F_SYSTEM_SECONDS]),
            finished=int(s[st.I_FINISHED]),
            rejected=int(s[st.I_REJECTED]),
            out_of_range=int(s[st.I_OUT_OF_RANGE]),
            end=_END_NAMES[int(s[st.I_DONE])],
        )

    def log(self) -> RequestLog:
        assert self._workload is not None, "reset() first"
        r, t = self.requests, self.times
        return RequestLog(
            arrival=t[st.T_ARRIVAL].copy(),
            prompt_tokens=r[st.R_PROMPT].copy(),
            output_tokens=r[st.R_OUTPUT].copy(),
            class_id=r[st.R_CLASS].copy(),
            admitted=t[st.T_ADMITTED].copy(),
            first_token=t[st.T_FIRST_TOKEN].copy(),
            completed=t[st.T_COMPLETED].copy(),
            evictions=r[st.R_EVICTIONS].copy(),
            forced_evictions=r[st.R_FORCED].copy(),
            rejected=r[st.R_STATUS] == st.STATUS_REJECTED,
            request_id=self._workload.request_id,
        )

    @property
    def done(self) -> bool:
        return bool(self.scalars[st.I_DONE] != st.END_NOT)

    @property
    def end(self) -> str:
        """``running``, ``finished``, ``stranded``, ``horizon`` or ``max_iterations``."""
        return _END_NAMES[int(self.scalars[st.I_DONE])]

    def close(self) -> None:
        self._sizes = (-1, -1, -1)
