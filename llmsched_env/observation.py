"""What an agent observes: one table, one place.

Observations are a ``Dict`` of float32 arrays, every element in [0, 1]. Three scales are used:

* *share*: value / capacity, clipped;
* *count*: log(1 + n) / log(1 + 10,000), clipped;
* *time*: log(1 + t / 10 ms) / log(1 + 10^6), clipped (10 ms to 10,000 s).

J classes, K segments, Q = J * K queues, queue q = j * K + k.

====================  =====  ======  =================================================================
name                  shape  scale   holds
====================  =====  ======  =================================================================
kv                    (4,)   share   KV used; KV held in boundary queues; KV free after the watermark;
                                     final KV to expect of all residents / 2: KV now plus the mean
                                     remaining tokens of each segment
sequences             (1,)   share   free sequence slots (1 in the ``paper`` preset, which has no cap)
segment_residents     (Q,)   count   residents inside each segment
segment_kv            (Q,)   share   their KV
queue_length          (Q,)   count   requests in each queue (outside for k = 0, boundary for k >= 1)
head_age              (J,)   time    age of the request at the head of each outside queue, 0 if empty
head_tokens           (J,)   share   its tokens to prefill / longest request the engine serves
arrival_rate          (J,)   share   recent arrival rate (30 s window) / twice the stability boundary
iteration             (1,)   time    length of the latest iteration
evictions             (2,)   count   evictions in the last step; evictions in the episode so far
late                  (J,)   count   late requests outside (``EngineConfig.late_after``)
context               (4+J,) share   static: log2(KV capacity in tokens) / 24; rho / 2; M*/C / 2;
                                     rate / (2 * stability boundary); then for each class
                                     E[output | class] / longest request the engine serves
====================  =====  ======  =================================================================

``context`` and the mean remaining tokens come from the scenario's length statistics, its rate and
the engine: what an operator knows beforehand, never from the requests of the episode. No output
length enters any element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.types import QueueLayout

FloatObservation = npt.NDArray[np.float32]

_COUNT_SCALE = 1.0 / math.log(1.0 + 10_000.0)
_TIME_UNIT = 0.01
_TIME_SCALE = 1.0 / math.log(1.0 + 1e6)

@compiled
def _share(x):  # type: ignore[no-untyped-def]
    return min(max(x, 0.0), 1.0)


_COUNTS = np.array([math.log(1.0 + n) * _COUNT_SCALE for n in range(1024)])
"""A logarithm takes as long as the rest of an element."""


@compiled
def _count(n: int) -> float:
    if n < _COUNTS.shape[0]:
        return float(_COUNTS[n])
    return min(math.log(1.0 + n) * _COUNT_SCALE, 1.0)


@compiled
def _time(seconds):  # type: ignore[no-untyped-def]
    return min(math.log(1.0 + seconds / _TIME_UNIT) * _TIME_SCALE, 1.0)


@compiled
def encode(engine, forecast, out):  # type: ignore[no-untyped-def]
    """Write the observation of ``engine`` (``Engine``, ``Forecast``), flat and in table order, into ``out`` (size,) float32."""
    queues, settings = engine.queues, engine.settings
    num_segments, num_queues, num_classes = settings.num_segments, settings.num_queues, settings.num_classes
    capacity = float(settings.capacity)
    paper = settings.paper != 0
    used = float(engine.kv_tokens if paper else engine.kv_blocks)
    held = 0.0
    final = float(engine.kv_tokens)
    remaining = forecast.remaining
    at = 5
    for q in range(num_queues):
        held += queues.boundary_kv[q]
        inside = queues.residents[q]
        if q % num_segments != 0:
            inside += queues.waiting[q]
        final += float(inside) * remaining[q]
        out[at + q] = _count(queues.residents[q])
        out[at + num_queues + q] = _share(queues.resident_kv[q] / capacity)
        out[at + 2 * num_queues + q] = _count(queues.waiting[q])
    out[0] = _share(used / capacity)
    out[1] = _share(held / capacity)
    out[2] = _share((capacity - used - float(settings.watermark_blocks)) / capacity)
    out[3] = _share(final / (2.0 * forecast.capacity_tokens))
    cap = float(settings.max_num_seqs)
    out[4] = 1.0 if paper else _share((cap - float(engine.num_residents)) / cap)
    at += 3 * num_queues
    window = engine.rate_seconds
    longest = float(settings.longest_request)
    for j in range(num_classes):
        q = j * num_segments
        out[at + j] = 0.0 if queues.head[q] < 0 else _time(engine.clock - queues.head_arrival[q])
        out[at + num_classes + j] = _share(queues.head_tokens[q] / longest)
        rate = queues.arrivals[q] / window if window > 0.0 else 0.0
        out[at + 2 * num_classes + j] = _share(rate / (2.0 * forecast.boundary_rate))
    at += 3 * num_classes
    out[at] = _time(engine.last_iteration)
    out[at + 1] = _count(engine.report.evicted + engine.report.preempted)
    out[at + 2] = _count(engine.evictions)
    at += 3
    for j in range(num_classes):
        out[at + j] = _count(queues.late[j * num_segments])
    at += num_classes
    out[at] = forecast.capacity_share
    out[at + 1] = forecast.rho_share
    out[at + 2] = forecast.memory_share
    out[at + 3] = forecast.load_share
    for j in range(num_classes):
        out[at + 4 + j] = _share(forecast.by_class[j] / longest)


@dataclass(frozen=True, slots=True)
class ObservationLayout:
    """Names, order and shapes of the observation for J classes and K segments."""

    fields: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, layout: QueueLayout) -> ObservationLayout:
        num_queues, num_classes = layout.num_queues, layout.num_classes
        return cls(
            (
                ("kv", 4),
                ("sequences", 1),
                ("segment_residents", num_queues),
                ("segment_kv", num_queues),
                ("queue_length", num_queues),
                ("head_age", num_classes),
                ("head_tokens", num_classes),
                ("arrival_rate", num_classes),
                ("iteration", 1),
                ("evictions", 2),
                ("late", num_classes),
                ("context", 4 + num_classes),
            )
        )

    @property
    def size(self) -> int:
        return sum(width for _, width in self.fields)

    def space(self) -> gym.spaces.Dict:
        # A list keeps the table's order; a plain dict would be sorted by name.
        boxes = [(name, gym.spaces.Box(0.0, 1.0, (width,), np.float32)) for name, width in self.fields]
        return gym.spaces.Dict(boxes)

    def slices(self) -> tuple[tuple[str, slice], ...]:
        """Where each array lies in the flat observation."""
        out, at = [], 0
        for name, width in self.fields:
            out.append((name, slice(at, at + width)))
            at += width
        return tuple(out)
