"""A backend whose iterations another engine schedules: our queues and clock, its batches and blocks."""

from __future__ import annotations

import heapq
import itertools
from abc import abstractmethod
from dataclasses import dataclass, field

from llmsched_env.engine import kernel, moves
from llmsched_env.engine import state as st
from llmsched_env.engine.arrays import ArrayBackend, ArrayView, check_served
from llmsched_env.engine.vllm import batch_sums
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision, EngineConfig, EpisodeLimits, QueueLayout, Workload


@dataclass(frozen=True, slots=True)
class Gate:
    """A decision in the engine's terms for one iteration; requests by index.

    Attributes:
        admit: waiting requests that may enter, in this order.
        hold: residents that may not advance; their KV stays and they cannot be preempted.
        evict: residents that give up their KV first, newest admission first.
    """

    admit: list[int]
    hold: list[int]
    evict: list[int]


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


class ExternalBackend(ArrayBackend):
    """Everything of a backend but the scheduling of one iteration, which ``iterate`` asks of an engine.

    Attributes:
        discovers_lengths: the engine may finish a request before the workload's output length, which
            is then only an upper limit; the log holds the lengths found.
    """

    discovers_lengths = False

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
    ) -> ArrayView:
        if engine.preset != "vllm":
            raise ConfigError(f"engine.preset: {engine.preset!r}, must be 'vllm' on backend {type(self).__name__}")
        for name in ("padded_prefill", "decode_needs_free_block"):
            if getattr(engine, name):
                raise ConfigError(f"engine.{name}: True, must be False on backend {type(self).__name__} (not a rule of vLLM)")
        if engine.eviction != "recompute":
            raise ConfigError(f"engine.eviction: {engine.eviction!r}, must be 'recompute' on backend {type(self).__name__} (vLLM's rule)")
        check_served(workload, engine)  # before an engine is built for it
        self.start(engine)
        view = super().reset(workload, layout, engine, limits, reveal_output_length=reveal_output_length)
        self._submitted = 0
        self._submit_arrivals()
        return view

    def advance(self, decision: Decision) -> None:
        self.check_running()
        settings, requests, slots, queues = self.settings, self.requests, self.slots, self.queues
        scalars, clocks, events = self.scalars, self.clocks, self.events
        n = kernel.begin_step(decision.array, settings, requests, slots, queues, scalars, clocks, events)
        self._finished: set[int] = set()
        self._seconds: float | None = None
        n = self._schedule(n, False, decision, events[0, : scalars[st.I_STEP_EVICTED]].tolist())
        moves.requeue(events[0], 0, scalars[st.I_STEP_EVICTED], settings, requests, queues, scalars)
        moves.requeue(events[1], 0, scalars[st.I_STEP_PREEMPTED], settings, requests, queues, scalars)
        if kernel.needs_drain(settings, requests, scalars, self.batch):
            n = moves.compact(n, slots)
            preempted = int(scalars[st.I_STEP_PREEMPTED])
            n = self._schedule(n, True, decision, [])
            moves.requeue(events[1], preempted, scalars[st.I_STEP_PREEMPTED], settings, requests, queues, scalars)
            kernel.note_drain(scalars, self.batch)
        seconds = self._seconds
        if seconds is None:
            seconds = float(kernel.model_seconds(self.model, scalars, self.batch))
        kernel.finish_step(
            n,
            seconds,
            settings,
            self.ends,
            requests,
            self.times,
            slots,
            queues,
            self.queue_f,
            scalars,
            clocks,
            self.batch,
            events,
            self.trace,
        )
        completed = set(events[2, : scalars[st.I_COMPLETED]].tolist())
        if completed != self._finished and scalars[st.I_DONE] != st.END_HORIZON:
            raise RuntimeError(f"the engine finished requests {sorted(self._finished)}, its output lengths say {sorted(completed)}")
        self._submit_arrivals()
        self.check_progress()

    def _submit_arrivals(self) -> None:
        arrived = int(self.scalars[st.I_NEXT_ARRIVAL])
        for r in range(self._submitted, arrived):
            if self.requests[st.R_STATUS, r] == st.STATUS_WAITING:
                prompt, output = int(self.requests[st.R_PROMPT, r]), int(self.requests[st.R_OUTPUT, r])
                self.submit(r, prompt, output, float(self.times[st.T_ARRIVAL, r]))
        self._submitted = arrived

    def _outside(self, run_all: bool, decision: Decision, places: int) -> list[int]:
        """Outside requests the decision admits, in the global admission order, at most ``places``."""
        segments, by_class = self.layout.num_segments, self.engine.admission_order == "class"
        queues: list[list[tuple[bool, int, int, int]]] = []
        for j in range(self.layout.num_classes):
            count = places if run_all else min(int(decision.admit[j * segments]), places)
            waiting = self._view.waiting_requests(j, max(count, 0))
            timely = int(self._view.waiting[j, 0] - self._view.late[j])
            rank = int(self.settings[st.C_ROWS + j]) if by_class else 0
            pairs = zip(waiting.key.tolist(), waiting.id.tolist(), strict=True)
            queues.append([(i >= timely, rank, key, r) for i, (key, r) in enumerate(pairs)])
        # Heads against heads, each queue in its own order: what ``moves.next_outside`` does.
        return [r for *_, r in itertools.islice(heapq.merge(*queues), places)]

    def _schedule(self, n: int, run_all: bool, decision: Decision, evicted: list[int]) -> int:
        """One iteration of the engine, written into the arrays. Returns the number of slots in use."""
        settings, requests, slots, queues, scalars = self.settings, self.requests, self.slots, self.queues, self.scalars
        if scalars[st.I_BOUNDARY] > 0:
            moves.enter_boundaries(n, run_all, decision.array, settings, slots, queues, scalars)
        ids, state = slots[st.S_ID, :n], slots[st.S_STATE, :n]
        interior = state == st.SLOT_INTERIOR
        runs = (state == st.SLOT_ENTERING) | (interior if run_all else interior & (decision.run[slots[st.S_QUEUE, :n]] != 0))
        gate = Gate(
            admit=self._outside(run_all, decision, max(self.engine.max_num_seqs - n, 0)), hold=ids[~runs].tolist(), evict=evicted
        )
        done = self.iterate(gate)
        self._finished |= done.finished
        if done.seconds is not None:
            self._seconds = done.seconds
        place = {r: i for i, r in enumerate(ids.tolist())}
        for r in done.preempted:
            moves.evict(place[r], settings, requests, slots, queues, scalars)
            requests[st.R_FORCED, r] += 1
            scalars[st.I_FORCED_EVICTIONS] += 1
            self.events[1, scalars[st.I_STEP_PREEMPTED]] = r
            scalars[st.I_STEP_PREEMPTED] += 1
        clock = float(self.clocks[st.F_CLOCK])
        for r in done.admitted:
            q = int(requests[st.R_CLASS, r]) * self.layout.num_segments
            if moves.admit(q, n, clock, settings, self.ends, requests, self.times, slots, queues, scalars) != r:
                raise RuntimeError(f"the engine admitted request {r}, which is not the oldest of its queue")
            scalars[st.I_ADMITTED] += 1
            n += 1
        for i in range(n):
            if slots[st.S_STATE, i] == st.SLOT_GONE:
                continue
            r = int(slots[st.S_ID, i])
            slots[st.S_TOKENS, i] = done.tokens.get(r, 0)
            more = done.blocks[r] - int(slots[st.S_BLOCKS, i])
            if more:
                slots[st.S_BLOCKS, i] += more
                queues[st.Q_RESIDENT_KV, slots[st.S_QUEUE, i]] += more
                scalars[st.I_KV_BLOCKS] += more
            if self.discovers_lengths and r in done.finished:
                length = int(slots[st.S_GENERATED, i]) + 1
                requests[st.R_OUTPUT, r] = slots[st.S_OUTPUT, i] = length
        scalars[st.I_KV_RESERVED] = scalars[st.I_KV_BLOCKS]
        batch_sums(n, slots, self.batch)
        return n
