"""What an agent observes: one table, one place.

Observations are a ``Dict`` of float32 arrays, every element in [0, 1]. Three scales are used:

* *share*: value / capacity, clipped;
* *count*: log(1 + n) / log(1 + 10,000), clipped;
* *time*: log(1 + t / 10 ms) / log(1 + 10^6), clipped (10 ms to 10,000 s).

J classes, K segments, Q = J * K queues, queue q = j * K + k.

====================  =====  ======  =================================================================
name                  shape  scale   holds
====================  =====  ======  =================================================================
arrival_rate          (J,)   share   recent arrival rate (30 s window) / twice the stability boundary
calibration           (4,)   share   only with classes by predicted length: of recent completed requests, how many
                                     (count); 1/2 + mean of log(actual / predicted) / 8; its standard
                                     deviation / 4; 1/2 + correlation of the two logarithms / 2
context               (4+J,) share   static: log2(KV capacity in tokens) / 24; rho / 2; M*/C / 2;
                                     rate / (2 * stability boundary); then for each class
                                     E[output | class] / longest request the engine serves
evictions             (2,)   count   evictions in the last step; evictions in the episode so far
head_age              (J,)   time    age of the request at the head of each outside queue, 0 if empty
head_tokens           (J,)   share   its tokens to prefill / longest request the engine serves
iteration             (1,)   time    length of the latest iteration
kv                    (4,)   share   KV used; KV held in boundary queues; KV free after the watermark;
                                     final KV to expect of all residents / 2: KV now plus the mean
                                     remaining tokens of each segment
late                  (J,)   count   late requests outside (``EngineConfig.late_after``)
queue_length          (Q,)   count   requests in each queue (outside for k = 0, boundary for k >= 1)
segment_kv            (Q,)   share   KV of the residents inside each segment
segment_residents     (Q,)   count   these residents
sequences             (1,)   share   free sequence slots (1 in the ``paper`` preset, which has no cap)
service_gap           (J,)   service virtual token counter of each tenant less the least of the tenants with a request
                                     outside or resident, 0 below it
service_share         (J,)   share   service of the last 30 s over weight, of the sum over all tenants
====================  =====  ======  =================================================================

The last two are there where classes are tenants (``QueueLayout(by="tenant")``): *service* is log(1 + c) / log(1 + 10^6), clipped,
of c = tokens over weight, where a prompt token counts 1 and an output token 2 (``llmsched_env.engine.state``, ``Queues``).

The order is that of the names, as ``gymnasium.spaces.Dict`` and every tool that rebuilds a space from a dictionary sort
them: a flat observation means the same everywhere.

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
_SERVICE_SCALE = 1.0 / math.log(1.0 + 1e6)
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


CALIBRATION = 4
"""Numbers of the field ``calibration``."""


@compiled
def encode_calibration(engine, out):  # type: ignore[no-untyped-def]
    """Write how predictions have fared into ``out``; as if they were perfect before any request has completed."""
    sums = engine.predictions
    n = max(sums.completed, 1.0)
    predicted, actual = sums.predicted / n, sums.actual / n
    spread = max(sums.predicted_squares / n - predicted * predicted, 0.0)
    actual_spread = max(sums.actual_squares / n - actual * actual, 0.0)
    common = sums.products / n - predicted * actual
    scale = math.sqrt(spread * actual_spread)
    out[0] = _count(int(sums.completed))
    out[1] = _share(0.5 + (actual - predicted) / 8.0)
    out[2] = _share(math.sqrt(max(spread + actual_spread - 2.0 * common, 0.0)) / 4.0)
    out[3] = _share(0.5 + 0.5 * common / scale) if scale > 1e-12 else 1.0


@compiled
def encode(engine, forecast, out):  # type: ignore[no-untyped-def]
    """Write the observation of ``engine`` (``Engine``, ``Forecast``), flat and in table order, into ``out`` (size,) float32."""
    queues, settings = engine.queues, engine.settings
    num_segments, num_queues, num_classes = settings.num_segments, settings.num_queues, settings.num_classes
    capacity = float(settings.capacity)
    longest = float(settings.longest_request)
    window = engine.rate_seconds
    context = num_classes
    if settings.by_prediction != 0:
        encode_calibration(engine, out[context:])
        context += CALIBRATION
    evictions = context + 4 + num_classes
    head_age = evictions + 2
    head_tokens = head_age + num_classes
    iteration = head_tokens + num_classes
    kv = iteration + 1
    late = kv + 4
    out[context] = forecast.capacity_share
    out[context + 1] = forecast.rho_share
    out[context + 2] = forecast.memory_share
    out[context + 3] = forecast.load_share
    for j in range(num_classes):
        q = j * num_segments
        rate = queues.arrivals[q] / window if window > 0.0 else 0.0
        out[j] = _share(rate / (2.0 * forecast.boundary_rate))
        out[context + 4 + j] = _share(forecast.by_class[j] / longest)
        out[head_age + j] = 0.0 if queues.head[q] < 0 else _time(engine.clock - queues.head_arrival[q])
        out[head_tokens + j] = _share(queues.head_tokens[q] / longest)
        out[late + j] = _count(queues.late[q])
    out[evictions] = _count(engine.report.evicted + engine.report.preempted)
    out[evictions + 1] = _count(engine.evictions)
    out[iteration] = _time(engine.last_iteration)
    at = late + num_classes
    held = 0.0
    final = float(engine.kv_tokens)
    for q in range(num_queues):
        held += queues.boundary_kv[q]
        inside = queues.residents[q]
        if q % num_segments != 0:
            inside += queues.waiting[q]
        final += float(inside) * forecast.remaining[q]
        out[at + q] = _count(queues.waiting[q])
        out[at + num_queues + q] = _share(queues.resident_kv[q] / capacity)
        out[at + 2 * num_queues + q] = _count(queues.residents[q])
    paper = settings.paper != 0
    used = float(engine.kv_tokens if paper else engine.kv_blocks)
    out[kv] = _share(used / capacity)
    out[kv + 1] = _share(held / capacity)
    out[kv + 2] = _share((capacity - used - float(settings.watermark_blocks)) / capacity)
    out[kv + 3] = _share(final / (2.0 * forecast.capacity_tokens))
    cap = float(settings.most_active)
    out[at + 3 * num_queues] = 1.0 if paper else _share((cap - float(engine.num_residents)) / cap)
    if settings.by_tenant != 0:
        _encode_service(engine, at + 3 * num_queues + 1, out)


@compiled
def _encode_service(engine, at, out):  # type: ignore[no-untyped-def]
    """Write what each tenant has received, ``service_gap`` and ``service_share``, from ``out[at]`` on."""
    queues, num_segments, num_classes = engine.queues, engine.settings.num_segments, engine.settings.num_classes
    least = math.inf
    total = 0.0
    for j in range(num_classes):
        q = j * num_segments
        present = queues.waiting[q] + queues.residents[q]
        for k in range(1, num_segments):
            present += queues.waiting[q + k] + queues.residents[q + k]
        if present > 0:
            least = min(least, queues.counter[q])
        total += queues.recent_service[q] / queues.weight[q]
    for j in range(num_classes):
        q = j * num_segments
        gap = max(queues.counter[q] - least, 0.0) if least < math.inf else 0.0
        out[at + j] = min(math.log(1.0 + gap) * _SERVICE_SCALE, 1.0)
        out[at + num_classes + j] = _share(queues.recent_service[q] / queues.weight[q] / total) if total > 0.0 else 0.0


@dataclass(frozen=True, slots=True)
class ObservationLayout:
    """Names, order and shapes of the observation for J classes and K segments."""

    fields: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, layout: QueueLayout) -> ObservationLayout:
        num_queues, num_classes = layout.num_queues, layout.num_classes
        return cls(
            (
                ("arrival_rate", num_classes),
                *((("calibration", CALIBRATION),) if layout.by == "predicted" else ()),
                ("context", 4 + num_classes),
                ("evictions", 2),
                ("head_age", num_classes),
                ("head_tokens", num_classes),
                ("iteration", 1),
                ("kv", 4),
                ("late", num_classes),
                ("queue_length", num_queues),
                ("segment_kv", num_queues),
                ("segment_residents", num_queues),
                ("sequences", 1),
                *((("service_gap", num_classes), ("service_share", num_classes)) if layout.by == "tenant" else ()),
            )
        )

    @property
    def size(self) -> int:
        return sum(width for _, width in self.fields)

    def space(self) -> gym.spaces.Dict:
        return gym.spaces.Dict({name: gym.spaces.Box(0.0, 1.0, (width,), np.float32) for name, width in self.fields})

    def slices(self) -> tuple[tuple[str, slice], ...]:
        """Where each array lies in the flat observation."""
        out, at = [], 0
        for name, width in self.fields:
            out.append((name, slice(at, at + width)))
            at += width
        return tuple(out)
