"""What stands behind the environment: the `Backend` protocol and the `View` that policies decide from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from llmsched_env.engine.state import Engine
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.types import Decision, FloatArray, IntArray, IterationReport, QueueLayout, RequestLog, Workload


@dataclass(frozen=True, slots=True)
class WaitingRequests:
    """The first requests of one class's outside queue, oldest key first; arrays of shape (n,).

    Attributes:
        id: request index.
        prompt_tokens, generated: tokens; ``generated`` > 0 after a recompute preemption.
        arrival: seconds.
        key: queue key, comparable across classes; where requests have priorities it tells them (``docs/engine-rules.md``, rules 7 and 23).
        output_tokens: the true output length where the scenario reveals it, else None.
        predicted_tokens: the output length that a predictor foretold; 0 where there is none.
    """

    id: IntArray
    prompt_tokens: IntArray
    generated: IntArray
    arrival: FloatArray
    key: IntArray
    output_tokens: IntArray | None
    predicted_tokens: IntArray


@dataclass(frozen=True, slots=True)
class ResidentRequests:
    """Residents in admission order (oldest admission first); arrays of shape (n,), read-only.

    Attributes:
        id, queue: request index; segment index q = j * K + k.
        at_boundary: bool, stands in the boundary queue of its segment.
        prompt_tokens, generated, computed, prefill_target: tokens. ``computed`` < ``prefill_target``
            while prefill is unfinished. Tokens of an iteration in flight count (``EngineConfig.async_scheduling``).
        output_tokens: the true output length where the scenario reveals it, else None.
        predicted_tokens: the output length that a predictor foretold; 0 where there is none.
    """

    id: IntArray
    queue: IntArray
    at_boundary: np.ndarray
    prompt_tokens: IntArray
    generated: IntArray
    computed: IntArray
    prefill_target: IntArray
    output_tokens: IntArray | None
    predicted_tokens: IntArray


class View(Protocol):
    """Everything a policy may see before a decision. No output length, no future arrival.

    (J, K) arrays are indexed by class and segment; KV is in KV units of the engine (tokens in the
    ``paper`` preset, blocks in ``vllm``).
    """

    engine: EngineConfig
    layout: QueueLayout
    reveals_output_length: bool

    @property
    def clock(self) -> float: ...
    @property
    def waiting(self) -> IntArray:
        """(J, K) requests per queue: column 0 outside, column k >= 1 boundary queue into segment k."""

    @property
    def residents(self) -> IntArray:
        """(J, K) residents inside each segment, boundary queues not included."""

    @property
    def resident_kv(self) -> IntArray:
        """(J, K) KV units of those residents."""

    @property
    def boundary_kv(self) -> IntArray:
        """(J, K) KV units of the boundary queues."""

    @property
    def late(self) -> IntArray:
        """(J,) late requests outside (``EngineConfig.late_after``), the last of their queue."""

    @property
    def head_tokens(self) -> IntArray:
        """(J,) tokens to prefill (prompt + kept) of each outside queue's head; 0 if empty."""

    @property
    def head_key(self) -> IntArray:
        """(J,) queue key of each head; meaningless where the queue is empty."""

    @property
    def head_arrival(self) -> FloatArray:
        """(J,) arrival time of each head in seconds; NaN if the queue is empty."""

    @property
    def arrival_rate(self) -> FloatArray:
        """(J,) recent arrival rate, requests/s."""

    @property
    def num_residents(self) -> int: ...
    @property
    def num_waiting(self) -> int:
        """Requests outside, all classes."""

    @property
    def kv_used(self) -> int:
        """KV units: tokens computed (``paper``) or blocks held (``vllm``)."""

    @property
    def kv_free(self) -> int: ...
    @property
    def last_iteration_seconds(self) -> float: ...
    @property
    def evictions(self) -> int:
        """Evictions so far in the episode, asked for or forced."""

    def resident_requests(self) -> ResidentRequests: ...
    def waiting_requests(self, j: int, limit: int) -> WaitingRequests: ...


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals of the episode so far.

    Attributes:
        clock, busy_seconds: seconds; busy = inside engine iterations.
        iterations: engine iterations that have ended.
        kv_seconds: integral of the KV reserved (KV units x seconds).
        kv_peak: highest KV reserved in a step (KV units).
        system_seconds: integral of the number of requests in system (request-seconds).
        evictions: asked for or forced; forced_evictions: forced alone.
        out_of_range: iterations whose batch lies outside the data behind the iteration-time model,
            so that their time was extrapolated.
        end: ``running``, ``finished``, ``stranded``, ``horizon`` or ``max_iterations``.
    """

    clock: float
    iterations: int
    idle_steps: int
    drain_iterations: int
    evictions: int
    forced_evictions: int
    kv_seconds: float
    kv_peak: int
    busy_seconds: float
    system_seconds: float
    finished: int
    rejected: int
    end: str
    out_of_range: int = 0


@runtime_checkable
class Backend(Protocol):
    """One serving engine under our decisions: simulator, vLLM's scheduler, or a real vLLM engine.

    Besides its methods a backend keeps the engine's record, from which observations, masks and rewards are computed.
    """

    record: Engine

    def reset(
        self,
        workload: Workload,
        layout: QueueLayout,
        engine: EngineConfig,
        limits: EpisodeLimits,
        *,
        reveal_output_length: bool = False,
    ) -> View:
        """Start an episode. Raises ConfigError for requests the engine could never serve."""

    def step(self, decision: Decision) -> IterationReport:
        """One engine iteration, or an idle step that moves the clock to the next arrival."""

    def advance(self, decision: Decision) -> None:
        """``step`` without building the report."""

    def snapshot(self) -> View: ...

    def counters(self) -> Counters: ...

    def log(self) -> RequestLog: ...

    @property
    def done(self) -> bool: ...

    def close(self) -> None: ...


__all__ = ["Backend", "Counters", "ResidentRequests", "View", "WaitingRequests"]
