"""The exact traces T1-T3 and the cascade of the paper's linear model, as plain data.

The numbers were computed by hand-checkable deterministic runs (arrivals without ties); a batch is
(start, size, load, resident memory, tau), seconds and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

Row = tuple[float, int, int, int, float]


@dataclass(frozen=True, slots=True)
class Trace:
    """One trace: ``requests`` are (arrival, kind, prompt, output)."""

    name: str
    policy: str
    thresholds: tuple[int, ...]
    ends: tuple[int, ...]
    d0: float
    d1: float
    capacity: int
    requests: tuple[tuple[float, int, int, int], ...]
    batches: tuple[Row, ...]
    done: int
    resident: int
    waiting: int
    latency: float
    ttft: float


def _wait_one_type() -> Trace:
    starts = (0.875, 1.875, 2.875, 3.875)
    sizes = ((4, 4, 4), (8, 12, 12), (8, 12, 12), (8, 12, 12))
    return Trace(
        name="T1",
        policy="wait",
        thresholds=(4,),
        ends=(),
        d0=0.9,
        d1=0.0,
        capacity=12,
        requests=tuple((0.125 + 0.25 * k, 0, 1, 1) for k in range(16)),
        batches=tuple((t, *row, 0.9) for t, row in zip(starts, sizes, strict=True)),
        done=12,
        resident=4,
        waiting=0,
        latency=2.275,
        ttft=2.275,
    )


def _wait_two_types() -> Trace:
    return Trace(
        name="T2",
        policy="wait",
        thresholds=(2, 1),
        ends=(),
        d0=0.5,
        d1=0.01,
        capacity=100,
        requests=tuple((0.3 * k + 0.1, int(k % 3 == 0), 2, 3 if k % 3 == 0 else 1) for k in range(12)),
        batches=(
            (0.1, 1, 2, 2, 0.52),
            (0.7, 2, 4, 7, 0.54),
            (1.24, 2, 5, 11, 0.55),
            (1.79, 4, 10, 17, 0.60),
            (2.39, 3, 9, 15, 0.59),
            (2.98, 8, 24, 24, 0.74),
            (3.72, 4, 10, 22, 0.60),
        ),
        done=7,
        resident=5,
        waiting=0,
        latency=2.254286,
        ttft=1.978571,
    )


def _nested(variant: str) -> Trace:
    starts = (0.875, 1.875, 2.875, 3.875, 4.875, 5.875)
    if variant == "B":
        rows = ((4, 4, 4), (8, 12, 12), (8, 12, 14), (10, 18, 18), (8, 12, 14), (10, 18, 18))
    else:
        rows = ((4, 4, 4), (8, 12, 12), (8, 12, 14), (10, 16, 16), (8, 12, 20), (12, 22, 22))
    return Trace(
        name=f"T3{variant}",
        policy=variant,
        thresholds=(4, 2),
        ends=(1, 2),
        d0=0.9,
        d1=0.0,
        capacity=100,
        requests=tuple((0.125 + 0.25 * k, int(k % 4 == 3), 1, 2 if k % 4 == 3 else 1) for k in range(24)),
        batches=tuple((t, *row, 0.9) for t, row in zip(starts, rows, strict=True)),
        done=19 if variant == "B" else 17,
        resident=5 if variant == "B" else 7,
        waiting=0,
        latency=2.611 if variant == "B" else 2.753,
        ttft=2.295 if variant == "B" else 2.341,
    )


TRACES = (_wait_one_type(), _wait_two_types(), _nested("B"), _nested("A"))

# The FCFS cascade, l = l' = 1, C = 12. State = (requests in prefill, requests in decode) of an iteration.
CASCADE_CAPACITY = 12
CASCADE_BACKLOG: dict[tuple[int, int], list[tuple[int, int]]] = {
    (4, 4): [(4, 4)] * 12,
    (6, 3): [(6, 3), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6)],
    (5, 3): [(5, 3), (2, 5), (8, 2), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6)],
    (3, 4): [(3, 4), (6, 3), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6), (12, 0), (0, 6), (12, 0)],
}
"""Infinite backlog: the states of the first 12 iterations from each start."""
CASCADE_ARRIVALS = [(6, 3), (0, 6), (8, 0), (0, 6), (10, 0), (0, 6), (12, 0), (0, 6), (12, 0)]
"""Four arrivals at the end of each iteration: the states of the first iterations from (6, 3)."""
CASCADE_ARRIVALS_EVICTIONS = [0, 0, 0, 2, 0, 4, 0, 6, 0, 6]
"""Requests evicted before each of those iterations (they overflow after the iterations with no decode)."""
