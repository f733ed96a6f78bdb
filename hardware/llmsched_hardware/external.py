"""A backend whose iterations another engine schedules: our queues and clock, its batches and blocks.

There is one orchestration, the compiled step (``llmsched_env.engine.step``). It asks whoever stands behind
``engine.code.schedule`` for an iteration; here that is ``ExternalBackend._schedule``.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.engine import state as st
from llmsched_env.engine.link import link
from llmsched_env.engine.record_backend import RecordBackend, RecordView, check_served, list_residents
from llmsched_env.engine.residents import admit, blocks_for, computed, preempt
from llmsched_env.engine.schedule_vllm import blocks_to_take, describe_batch, take_blocks
from llmsched_env.engine.step import engine_at, step_at
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.pointers import Callback
from llmsched_env.types import Decision, QueueLayout, Workload
from llmsched_hardware.gate import Gate, allowed


@dataclass(frozen=True, slots=True)
class Executed:
    """What the engine did in one iteration.

    Attributes:
        tokens: scheduled tokens per request.
        admitted: requests that left the waiting queue, in order.
        preempted: requests preempted by the engine, in order.
        blocks: KV blocks held by each resident after scheduling.
        finished: requests completed by the engine in this iteration.
        seconds: measured time, or None for the virtual clock.
    """

    tokens: dict[int, int]
    admitted: list[int]
    preempted: list[int]
    blocks: dict[int, int]
    finished: set[int] = field(default_factory=set)
    seconds: float | None = None


@compiled
def move_requests(engine: Any, preempted: Any, admitted: Any) -> int:
    """Preemptions (n,) and admissions (m,) of an iteration. Returns the first admitted request that is not the head of its queue, or -1."""
    record = engine_at(engine)
    for i in range(preempted.shape[0]):
        preempt(record, preempted[i])
    for i in range(admitted.shape[0]):
        r = admitted[i]
        q = record.requests.outside[r]
        if record.queues.head[q] != r:
            return int(r)
        admit(record, q)
        record.report.admitted += 1
    return -1


@compiled
def take_over(engine: Any, residents: Any, tokens: Any, blocks: Any) -> int:
    """Tokens scheduled for all residents (n,) and the blocks they then hold. Returns the row whose blocks are not ours, or -1."""
    record = engine_at(engine)
    requests = record.requests
    for i in range(residents.shape[0]):
        r = residents[i]
        requests.tokens[r] = tokens[i]
        if blocks_for(record, computed(record, r) + tokens[i]) != blocks[i]:
            return i
        need = blocks_to_take(record, r, tokens[i])
        if need > 0:
            take_blocks(record, r, tokens[i], need)
        if requests.status[r] == st.ENTERING and tokens[i] == 0:  # it has entered, though no budget was left for it
            requests.status[r] = st.DECODE
    record.report.kv_reserved = record.kv_blocks
    describe_batch(record)
    return -1


class ExternalBackend(RecordBackend):
    """Everything of a backend but the scheduling of one iteration, which ``iterate`` asks of an engine.

    Attributes:
        overlaps: the engine can schedule an iteration while one runs (``EngineConfig.async_scheduling``): ``iterate`` then schedules one
            and says who ended by the tokens of the one before.
        prioritizes: the engine can schedule by priority (``EngineConfig.scheduling_policy``).
        discovers_lengths: the engine may finish a request before the workload's output length, which
            is then only an upper limit; the log holds the lengths found.
    """

    external = True
    overlaps = False
    prioritizes = False
    discovers_lengths = False

    def __init__(self, trace: bool = False) -> None:
        super().__init__(trace)
        this = weakref.ref(self)  # or the callback would keep an engine in memory that nobody else knows of

        def schedule() -> None:
            backend = this()
            assert backend is not None
            backend._schedule()

        self._callback = Callback(schedule)

    @abstractmethod
    def start(self, engine: EngineConfig) -> None:
        """Make the engine ready for an episode: empty, with these settings."""

    @abstractmethod
    def submit(self, request: int, prompt_tokens: int, output_tokens: int, arrival: float) -> None:
        """A request has arrived."""

    @abstractmethod
    def iterate(self, gate: Gate) -> Executed:
        """Run one engine iteration."""

    def reset(
        self,
        workload: Workload,
        layout: QueueLayout,
        engine: EngineConfig,
        limits: EpisodeLimits,
        *,
        reveal_output_length: bool = False,
    ) -> RecordView:
        name = type(self).__name__
        if engine.preset != "vllm":
            raise ConfigError(f"engine.preset: {engine.preset!r}, must be 'vllm' on backend {name}")
        if not engine.prefill_interval_release:
            raise ConfigError(f"engine.prefill_interval_release: False, must be True on backend {name} (not a rule of vLLM)")
        for option, why in _REFUSED.items():
            if getattr(engine, option):
                raise ConfigError(f"engine.{option}: True, must be False on backend {name} ({why})")
        if engine.async_scheduling and not self.overlaps:
            raise ConfigError(f"engine.async_scheduling: True, must be False on backend {name} (one step is one whole iteration)")
        if engine.scheduling_policy != "fcfs" and not self.prioritizes:
            raise ConfigError(f"engine.scheduling_policy: {engine.scheduling_policy!r}, must be 'fcfs' on backend {name}")
        if engine.eviction != "recompute":
            raise ConfigError(f"engine.eviction: {engine.eviction!r}, must be 'recompute' on backend {name} (vLLM's rule)")
        check_served(workload, engine)  # before an engine is built for it
        self.start(engine)
        view = super().reset(workload, layout, engine, limits, reveal_output_length=reveal_output_length)
        self._submitted = 0
        self._submit_arrivals()
        return view

    def priority_of(self, request: int) -> int:
        """Priority of a request of this episode, 0 where none is given."""
        given = None if self._workload is None else self._workload.priority
        return 0 if given is None else int(given[request])

    def _link(self) -> None:
        link(self.record.code, self.engine, self.layout, schedule=self._callback.address)

    def advance(self, decision: Decision) -> None:
        self.check_running()
        self.check_decision(decision)
        record = self.record
        self._finished: set[int] = set()
        self._seconds: float | None = None
        self._broken = False
        step_at(record.handle, decision.handle)
        self._callback.check()
        completed = set(record.events.finished[: record.report.completed].tolist())
        if completed != self._finished and record.end != st.END_HORIZON:
            raise RuntimeError(f"the engine finished requests {sorted(self._finished)}, its output lengths say {sorted(completed)}")
        self._submit_arrivals()
        self.check_progress()

    def _submit_arrivals(self) -> None:
        record = self.record
        for r in range(self._submitted, record.next_arrival):
            if record.requests.status[r] == st.WAITING:
                prompt, output = int(record.requests.prompt[r]), int(record.hidden.output[r])
                self.submit(r, prompt, output, float(record.hidden.arrival[r]))
        self._submitted = record.next_arrival

    def _schedule(self) -> None:
        """One iteration of the engine, written into the record in which the step has opened the decision."""
        record = self.record
        record.batch.batch_size = 0.0  # if the engine fails, the rest of the step gives nobody a token
        if self._broken:  # and asks for a drain iteration
            return
        self._broken = True
        done = self.iterate(allowed(record))
        self._finished |= done.finished
        wrong = move_requests(record.handle, _indices(done.preempted), _indices(done.admitted))
        if wrong >= 0:
            raise RuntimeError(f"the engine admitted request {wrong}, which is not the oldest of its queue")
        self._take_over(done)
        if self.discovers_lengths:
            self._discover(done.finished)
        # Of an empty attempt and the drain iteration after it the last time counts.
        self._seconds = self._seconds if done.seconds is None else done.seconds
        if self._seconds is not None:
            record.measured_seconds = self._seconds
        self._broken = False

    def _take_over(self, done: Executed) -> None:
        record = self.record
        residents = np.empty(record.num_residents, dtype=np.int32)
        list_residents(record.handle, residents)
        ids = residents.tolist()
        tokens, blocks = _indices([done.tokens.get(r, 0) for r in ids]), _indices([done.blocks[r] for r in ids])
        row = take_over(record.handle, residents, tokens, blocks)
        if row >= 0:
            ours = blocks_for(record, computed(record, ids[row]) + int(tokens[row]))
            raise RuntimeError(f"request {ids[row]}: the engine holds {blocks[row]} KV blocks for it, its tokens take {ours}")

    def _discover(self, finished: set[int]) -> None:
        """The iteration's token is the last of these requests."""
        requests, hidden = self.record.requests, self.record.hidden
        for r in finished:
            hidden.output[r] = requests.base_generated[r] + 1
            if self.reveal_output_length:
                requests.output[r] = hidden.output[r]

    def __getstate__(self) -> NoReturn:
        raise TypeError(f"backend {type(self).__name__} cannot be pickled or copied: another engine stands behind it")


_REFUSED = {
    "padded_prefill": "not a rule of vLLM",
    "decode_needs_free_block": "not a rule of vLLM",
    "enable_prefix_caching": "blocks that several requests share are not accounted for; backend 'sim' has it",
}


def _indices(numbers: list[int]) -> Any:
    return np.array(numbers, dtype=np.int64)
