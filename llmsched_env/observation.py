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
from llmsched_env.engine import state as st
from llmsched_env.fluid import equilibrium_of, stability_boundary
from llmsched_env.forecast import expected_output, expected_output_by_class, expected_remaining
from llmsched_env.types import EngineConfig, LengthStatistics, QueueLayout

FloatObservation = npt.NDArray[np.float32]

_COUNT_SCALE = 1.0 / math.log(1.0 + 10_000.0)
_TIME_UNIT = 0.01
_TIME_SCALE = 1.0 / math.log(1.0 + 1e6)

# rows of the static context the compiled encoder reads
X_CAPACITY = 0
X_RHO = 1
X_MEMORY = 2
X_LOAD = 3
X_BOUNDARY_RATE = 4
X_CAPACITY_TOKENS = 5
X_TABLE = 6  # length of the last table
X_ROWS = 7  # then J expected outputs of a class, Q expected remaining tokens of a segment, and E[output | output > g] for g = 0, 1, ...


@compiled
def _share(x):  # type: ignore[no-untyped-def]
    return min(max(x, 0.0), 1.0)


@compiled
def _count(n):  # type: ignore[no-untyped-def]
    if n == 0.0:  # most counts are, and a logarithm takes as long as the rest of an element
        return 0.0
    return min(math.log(1.0 + n) * _COUNT_SCALE, 1.0)


@compiled
def _time(seconds):  # type: ignore[no-untyped-def]
    return min(math.log(1.0 + seconds / _TIME_UNIT) * _TIME_SCALE, 1.0)


@compiled
def encode(settings, context, queues, queue_f, scalars, clocks, out):  # type: ignore[no-untyped-def]
    """Write the observation, flat and in table order, into ``out`` (size float32)."""
    num_segments = settings[st.C_SEGMENTS]
    num_queues = queues.shape[1]
    capacity = float(settings[st.C_CAPACITY])
    paper = settings[st.C_PRESET] == st.PRESET_PAPER
    used = float(scalars[st.I_KV_TOKENS] if paper else scalars[st.I_KV_BLOCKS])
    held = 0.0
    for q in range(num_queues):
        held += queues[st.Q_BOUNDARY_KV, q]
    out[0] = _share(used / capacity)
    out[1] = _share(held / capacity)
    out[2] = _share((capacity - used - float(settings[st.C_WATERMARK])) / capacity)
    cap = float(settings[st.C_MAX_SEQS])
    final = float(scalars[st.I_KV_TOKENS])
    remaining = context[X_ROWS + num_queues // num_segments :]
    for q in range(num_queues):
        inside = queues[st.Q_RESIDENTS, q]
        if q % num_segments != 0:
            inside += queues[st.Q_WAITING, q]
        final += float(inside) * remaining[q]
    out[3] = _share(final / (2.0 * context[X_CAPACITY_TOKENS]))
    out[4] = 1.0 if paper else _share((cap - float(scalars[st.I_RESIDENTS])) / cap)
    at = 5
    for q in range(num_queues):
        out[at + q] = _count(float(queues[st.Q_RESIDENTS, q]))
        out[at + num_queues + q] = _share(queues[st.Q_RESIDENT_KV, q] / capacity)
        out[at + 2 * num_queues + q] = _count(float(queues[st.Q_WAITING, q]))
    at += 3 * num_queues
    num_classes = num_queues // num_segments
    clock = clocks[st.F_CLOCK]
    window = clocks[st.F_RATE_SECONDS]
    for j in range(num_classes):
        q = j * num_segments
        empty = queues[st.Q_HEAD, q] < 0
        out[at + j] = 0.0 if empty else _time(clock - queue_f[st.QF_HEAD_ARRIVAL, q])
        out[at + num_classes + j] = _share(queues[st.Q_HEAD_TOKENS, q] / float(settings[st.C_MAX_LEN]))
        rate = queue_f[st.QF_ARRIVALS, q] / window if window > 0.0 else 0.0
        out[at + 2 * num_classes + j] = _share(rate / (2.0 * context[X_BOUNDARY_RATE]))
    at += 3 * num_classes
    out[at] = _time(clocks[st.F_LAST_ITERATION])
    out[at + 1] = _count(float(scalars[st.I_STEP_EVICTED] + scalars[st.I_STEP_PREEMPTED]))
    out[at + 2] = _count(float(scalars[st.I_EVICTIONS]))
    at += 3
    for j in range(num_classes):
        out[at + j] = _count(float(queues[st.Q_LATE, j * num_segments]))
    at += num_classes
    for i in range(4):
        out[at + i] = context[i]
    for j in range(num_classes):
        out[at + 4 + j] = _share(context[X_ROWS + j] / float(settings[st.C_MAX_LEN]))


def static_context(
    statistics: LengthStatistics, rate: float, engine: EngineConfig, layout: QueueLayout
) -> npt.NDArray[np.float64]:
    """(X_ROWS + J + Q + G,) float64: what an operator knows of load, capacity and lengths; the first four as the table scales them."""
    boundary = stability_boundary(statistics, engine)
    equilibrium = equilibrium_of(statistics, rate, engine)
    lengths = (
        expected_output_by_class(statistics, layout),
        expected_remaining(statistics, layout).ravel(),
        expected_output(statistics),
    )
    context = np.concatenate([np.empty(X_ROWS), *lengths])
    context[X_CAPACITY] = math.log2(engine.kv_capacity_tokens) / 24.0
    context[X_RHO] = equilibrium.rho / 2.0
    context[X_MEMORY] = equilibrium.kv_tokens / engine.kv_capacity_tokens / 2.0
    context[X_LOAD] = rate / (2.0 * boundary)
    context[:4] = np.clip(np.nan_to_num(context[:4], nan=1.0, posinf=1.0), 0.0, 1.0)
    context[X_BOUNDARY_RATE] = boundary
    context[X_CAPACITY_TOKENS] = engine.kv_capacity_tokens
    context[X_TABLE] = lengths[2].size
    return context


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
