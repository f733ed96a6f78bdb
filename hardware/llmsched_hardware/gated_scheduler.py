"""vLLM's own scheduler, showing it only what a decision admits and lets run.

Nothing of vLLM is copied or patched: `GatedScheduler` rearranges the queues that the inherited
``schedule`` reads and puts them back. Allocation, chunking, preemption and bookkeeping stay vLLM's.

vLLM declares everything under ``vllm.v1.core`` not public, so versions this was not tested with are refused.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import Any

from llmsched_hardware.versions import check_version, prepare_environment

if "vllm" in sys.modules:  # a server has loaded this module: the environment is its own
    check_version()
else:
    prepare_environment()

from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler


@dataclass
class Admission:
    """What one call of ``schedule`` may do and has done; requests by vLLM's id.

    Attributes:
        admit: waiting requests that may enter, in this order; None leaves admission to vLLM.
        hold: running requests that may not be scheduled; they cannot be preempted either.
        evict: running requests to preempt first, in this order.
        token_budget: tokens that the iteration may compute at most; None for the engine's ``max_num_scheduled_tokens``.
        admitted, preempted: what vLLM then did, in order.
        tokens: tokens scheduled per request.
        blocks: KV blocks of each running request after scheduling.
    """

    admit: list[str] | None = None
    hold: frozenset[str] = frozenset()
    evict: list[str] = field(default_factory=list)
    token_budget: int | None = None
    admitted: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)
    tokens: dict[str, int] = field(default_factory=dict)
    blocks: dict[str, int] = field(default_factory=dict)


class GatedScheduler(Scheduler):  # type: ignore[misc]
    """`Scheduler` under a gate; set ``gate`` before ``schedule``.

    Attributes:
        gate: what the next iteration may do; afterwards, what it did. Stays in force until replaced.
        schedule_seconds, execute_seconds, update_seconds: of the last iteration; ``execute`` is the
            time between ``schedule`` and ``update_from_output``: forward pass and sampling.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = Admission()
        self.waiting: Any = self.waiting
        self.running: list[Any] = self.running
        self.max_num_scheduled_tokens: int = self.max_num_scheduled_tokens
        self.forget_times()

    def forget_times(self) -> None:
        """Before a step: one that schedules nothing at all has no times of its own."""
        self.schedule_seconds = self.execute_seconds = self.update_seconds = 0.0
        self._scheduled_at = time.perf_counter()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        output = self._schedule_gated(*args, **kwargs)
        self._scheduled_at = time.perf_counter()
        self.schedule_seconds = self._scheduled_at - start
        return output

    def update_from_output(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        self.execute_seconds = start - self._scheduled_at
        outputs = super().update_from_output(*args, **kwargs)
        self.update_seconds = time.perf_counter() - start
        return outputs

    def _schedule_gated(self, *args: Any, **kwargs: Any) -> Any:
        gate = self.gate
        self._evict(gate.evict)
        waiting = self.waiting
        if gate.admit is not None:
            self.waiting = create_request_queue(self.policy)
            for request_id in gate.admit:
                self.waiting.add_request(self.requests[request_id])
        shown = {r.request_id for r in self.waiting}
        held = [(i, r) for i, r in enumerate(self.running) if r.request_id in gate.hold]
        order = [r.request_id for r in self.running]
        # Held requests keep their sequence slots: the cap falls by their number while they are away.
        self.running = [r for r in self.running if r.request_id not in gate.hold]
        self.max_num_running_reqs -= len(held)
        most = self.max_num_scheduled_tokens
        if gate.token_budget is not None:
            self.max_num_scheduled_tokens = min(most, gate.token_budget)
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = most
            self.max_num_running_reqs += len(held)
            place = {request_id: i for i, request_id in enumerate(order)}
            back = self.running + [r for _, r in held]
            self.running = sorted(back, key=lambda r: place.get(r.request_id, len(place)))  # stable: new ones stay last
        left = {r.request_id for r in self.waiting}
        gate.admitted = [r.request_id for r in self.running if r.request_id in shown]
        # vLLM puts each victim at the head of the queue, so the last one stands first.
        gate.preempted = [r.request_id for r in self.waiting if r.request_id not in shown][::-1]
        if gate.admit is not None:
            self._remove(waiting, [self.requests[i] for i in gate.admit if i not in left])
            for request_id in gate.preempted:
                waiting.prepend_request(self.requests[request_id])
            self.waiting = waiting
        gate.tokens = dict(output.num_scheduled_tokens)
        manager = self.kv_cache_manager
        gate.blocks = {r.request_id: len(manager.get_blocks(r.request_id).blocks[0]) for r in self.running}
        return output

    @staticmethod
    def _remove(waiting: Any, entered: list[Any]) -> None:
        """Those at the head one by one: a search through a long queue would count as the engine's time."""
        at = 0
        while at < len(entered) and waiting.peek_request() is entered[at]:
            waiting.pop_request()
            at += 1
        if at < len(entered):
            waiting.remove_requests(entered[at:])

    def _evict(self, ids: list[str]) -> None:
        """Preempt with the primitive vLLM uses when memory runs out."""
        for request_id in ids:
            request = self.requests[request_id]
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
