"""vLLM's own scheduler, showing it only what a decision admits and lets run.

Nothing of vLLM is copied or patched: `GatedScheduler` rearranges the queues that the inherited
``schedule`` reads and puts them back. Allocation, chunking, preemption and bookkeeping stay vLLM's.

Under asynchronous scheduling vLLM decides on an iteration while the one before it runs. The gate then stands above its `AsyncScheduler`:
tokens in flight are counted (``num_output_placeholders``), their values come one call later.

vLLM declares everything under ``vllm.v1.core`` not public, so versions this was not tested with are refused
(``llmsched_hardware.versions``).
"""

from __future__ import annotations

import functools
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from llmsched_hardware import versions
from llmsched_hardware.calibration.iteration_watch import IterationWatch

if "vllm" in sys.modules:  # a server has loaded this module: the environment is its own
    versions.check_version()
else:
    versions.prepare_environment()

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler

versions.shield_llvmlite()


@dataclass
class Admission:
    """What one call of ``schedule`` may do and has done; requests by vLLM's id.

    Attributes:
        admit: waiting requests that may enter, in this order; None leaves admission to vLLM.
        hold: running requests that may not be scheduled; they cannot be preempted either.
        evict: running requests to preempt first, in this order.
        token_budget: tokens that the iteration may compute at most; None for the engine's ``max_num_scheduled_tokens``.
        admitted, preempted: what vLLM then did, in order.
        tokens: tokens scheduled per request, where the scheduler ``describes``.
        blocks: KV blocks of each running request after scheduling, likewise.
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

    Where vLLM's configuration asks for asynchronous scheduling, making one gives the same over `AsyncScheduler`.

    Attributes:
        gate: what the next iteration may do; afterwards, what it did. Stays in force until replaced.
        describes: whether the gate is also told tokens and blocks of every request, which costs a look at each.
        schedule_seconds, execute_seconds, update_seconds: of the last iteration; ``execute`` is the
            time between ``schedule`` and ``update_from_output``: forward pass and sampling.
        watch: told of every iteration, where somebody keeps a log of them.
    """

    describes = True

    def __new__(cls, *args: Any, **kwargs: Any) -> GatedScheduler:
        config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        own: Any = cls
        made: GatedScheduler = super().__new__(asynchronous(own) if config.scheduler_config.async_scheduling else own)
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = Admission()
        self.watch: IterationWatch | None = None
        self._victims: list[str] = []
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
        watch = self.watch
        if watch is not None:
            watch.enter()
        output = self._schedule_gated(*args, **kwargs)
        if watch is not None:
            watch.scheduled(self, output, len(self.gate.evict) + len(self._victims))
        self._scheduled_at = time.perf_counter()
        self.schedule_seconds = self._scheduled_at - start
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        self.execute_seconds = start - self._scheduled_at
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)
        self.update_seconds = time.perf_counter() - start
        if self.watch is not None:
            self.watch.updated(scheduler_output, -1.0 if isinstance(self, AsyncScheduler) else self.execute_seconds)
        return outputs

    def _schedule_gated(self, *args: Any, **kwargs: Any) -> Any:
        gate = self.gate
        self._evict(gate.evict)
        self._victims.clear()
        if gate.admit is None and not (gate.hold or self.describes):
            return super().schedule(*args, **kwargs)
        queue = self.waiting
        if gate.admit is not None:
            queue = create_request_queue(self.policy)
            for request_id in gate.admit:
                queue.add_request(self.requests[request_id])
        before = self.running
        held = [r for r in before if r.request_id in gate.hold] if gate.hold else []
        if held:
            self.running = [r for r in before if r.request_id not in gate.hold]
        ran = len(self.running)
        entered: list[Any] = []
        most = self.max_num_scheduled_tokens
        if gate.token_budget is not None:
            self.max_num_scheduled_tokens = min(most, gate.token_budget)
        order = {r.request_id: i for i, r in enumerate(before)} if held else {}
        try:
            with versions.places_taken(self, len(held)):  # held requests keep their sequence slots while they are away
                if gate.admit is None:
                    output = super().schedule(*args, **kwargs)
                else:
                    with versions.only_waiting(self, queue):
                        output = super().schedule(*args, **kwargs)
            # At the end. Where vLLM preempts somebody, from whatever place, it admits nobody.
            entered = [] if self._victims else self.running[ran:]
        finally:
            self.max_num_scheduled_tokens = most
            if held:
                self.running = sorted(self.running + held, key=lambda r: order.get(r.request_id, len(order)))  # stable: new ones stay last
        gate.admitted = [r.request_id for r in entered]
        gate.preempted = list(self._victims)
        if gate.admit is not None:
            self._remove(self.waiting, entered)
            for request_id in gate.preempted:
                self.waiting.prepend_request(self.requests[request_id])
        if self.describes:
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

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        """By priority victims come from any place of ``running`` and go to any place of ``waiting``: each is noted as it goes."""
        super()._preempt_request(request, *args, **kwargs)
        self._victims.append(request.request_id)

    def _evict(self, ids: list[str]) -> None:
        """Preempt with the primitive vLLM uses when memory runs out."""
        for request_id in ids:
            request = self.requests[request_id]
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())


@functools.cache
def asynchronous(cls: type) -> type:
    """A gated scheduler's class over `AsyncScheduler` in place of `Scheduler`."""
    if issubclass(cls, AsyncScheduler):
        return cls
    return type(f"Async{cls.__name__}", (cls, AsyncScheduler), {"__module__": cls.__module__, "__doc__": cls.__doc__})
