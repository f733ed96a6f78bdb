"""Boundaries between segments of decode length (compiled; only where there are several).

A boundary queue is a list of peers by admission: those who entered the engine first are first, whenever they reached it
(rule 10).
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine.residents import evict, insert_peer, join_group, kv_of, reaches_length_limit, remove_peer
from llmsched_env.engine.state import BOUNDARY, ENTERING, Engine
from llmsched_env.types import Decision


@compiled
def place(engine: Engine, r: int, tokens: int) -> None:
    """Resident r, in no list, has generated ``tokens`` and is not complete: move it to its segment or boundary queue.

    It belongs to the segment of token ``tokens`` + 1, and stands in the boundary queue before it
    where ``tokens`` is a segment end (rules 9 and 10).
    """
    requests, queues = engine.requests, engine.queues
    q = requests.queue[r]
    first = requests.outside[r]
    target = first
    while queues.segment_end[target] <= tokens:
        target += 1
    kv = kv_of(engine, requests.base_computed[r])
    queues.residents[q] -= 1
    queues.resident_kv[q] -= kv
    requests.queue[r] = target
    if target > first and queues.segment_end[target - 1] == tokens:
        requests.status[r] = BOUNDARY
        queues.waiting[target] += 1
        queues.boundary_kv[target] += kv
        engine.num_boundary += 1
        insert_peer(engine, target, r)
    else:
        queues.residents[target] += 1
        queues.resident_kv[target] += kv
        join_group(engine, r)


@compiled
def enter_boundaries(engine: Engine, decision: Decision) -> None:
    """Boundary admissions, oldest admission first."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    for q in range(settings.num_queues):
        if q % settings.num_segments == 0:
            continue
        count = queues.waiting[q]
        if engine.run_all == 0:
            count = min(count, decision.admit[q])
        for _ in range(count):
            r = queues.first_peer[q]
            remove_peer(engine, q, r)
            kv = kv_of(engine, requests.base_computed[r])
            queues.waiting[q] -= 1
            queues.boundary_kv[q] -= kv
            queues.residents[q] += 1
            queues.resident_kv[q] += kv
            engine.num_boundary -= 1
            engine.report.entered += 1
            together = queues.runs[q] != 0 and settings.boundary_slot == 0
            if together and (settings.paper != 0 or not reaches_length_limit(engine, r)):
                join_group(engine, r)
            else:  # it advances in this iteration although its segment is held, or takes the slot without a token
                requests.status[r] = ENTERING
                requests.tokens[r] = 0
                insert_peer(engine, settings.num_queues, r)


@compiled
def evict_boundaries(engine: Engine, decision: Decision) -> None:
    """Evictions the decision asks for: the most recently admitted of each boundary queue, newest first."""
    queues, settings = engine.queues, engine.settings
    wanted = 0
    for q in range(settings.num_queues):
        queues.left[q] = 0
        if q % settings.num_segments != 0 and decision.evict[q] > 0:
            queues.left[q] = min(decision.evict[q], queues.waiting[q])
            wanted += queues.left[q]
    while wanted > 0:
        newest = -1
        for q in range(settings.num_queues):
            last = queues.last_peer[q] if queues.left[q] > 0 else -1
            if last >= 0 and (newest < 0 or engine.requests.sequence[last] > engine.requests.sequence[newest]):
                newest = last
        queues.left[engine.requests.queue[newest]] -= 1
        wanted -= 1
        evict(engine, int(newest))  # a variable that begins as a constant is a type of its own to numba
        engine.events.evicted[engine.report.evicted] = newest
        engine.report.evicted += 1
