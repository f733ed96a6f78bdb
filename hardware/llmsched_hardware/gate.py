"""A decision in an engine's terms: which requests may enter, which may not advance, which give up their KV.

It is read off the record in which the decision stands opened: evictions are carried out, ``queues.runs`` and ``queues.left``
hold run and admit, and those let into a segment have left its boundary queue. The compiled step opens it for a backend
(``llmsched_env.engine.step``), ``open_decision`` for a live server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import next_in_order, start_of_queues
from llmsched_env.engine.residents import is_running
from llmsched_env.engine.segments import enter_boundaries, evict_boundaries
from llmsched_env.engine.state import Engine
from llmsched_env.engine.step import budget_of, clear_report, decision_at, engine_at
from llmsched_env.types import IntArray


@dataclass(frozen=True, slots=True)
class Gate:
    """What an engine may do in one iteration; requests by index, (n,) int32.

    Attributes:
        admit: waiting requests that may enter, in this order, at most ``shown_places``.
        hold: residents that may not advance; their KV stays and they cannot be preempted.
        evict: residents that give up their KV first, newest admission first.
        token_budget: tokens that the iteration may compute.
    """

    admit: IntArray
    hold: IntArray
    evict: IntArray
    token_budget: int


@compiled
def open_decision(engine: Any, decision: Any) -> None:
    """Begin an iteration under a decision, up to the point where an engine schedules. Takes handles."""
    record, decided = engine_at(engine), decision_at(decision)
    queues = record.queues
    clear_report(record)
    record.report.kv_reserved = record.kv_blocks
    record.run_all = 0
    record.token_budget = budget_of(record, decided)
    if record.num_boundary > 0:
        evict_boundaries(record, decided)
    for q in range(record.settings.num_queues):
        queues.runs[q] = decided.run[q]
        queues.left[q] = decided.admit[q]
    if record.num_boundary > 0:
        enter_boundaries(record, decided)


@compiled
def list_admissible(engine: Any, out: Any) -> int:
    """The first outside requests, ``queues.left`` of each queue at most, in the global admission order into ``out``; returns how many."""
    record = engine_at(engine)
    queues, num_queues, step = record.queues, record.settings.num_queues, record.settings.num_segments
    counts = np.empty(num_queues, np.int64)  # the walk needs ``left`` for itself
    for q in range(0, num_queues, step):
        counts[q] = queues.left[q]
    start_of_queues(record)
    for q in range(0, num_queues, step):
        if counts[q] <= 0:
            queues.left[q] = -1
    n = 0
    while n < out.shape[0]:
        q = next_in_order(record)
        if q < 0:
            break
        r = queues.left[q]
        out[n] = r
        n += 1
        counts[q] -= 1
        queues.left[q] = record.requests.next[r] if counts[q] > 0 else -1
    return n


@compiled
def list_held(engine: Any, out: Any) -> int:
    """Residents that may not advance, by admission, into ``out``; returns how many."""
    record = engine_at(engine)
    n = 0
    r = record.oldest
    while r >= 0:
        if not is_running(record, r):
            out[n] = r
            n += 1
        r = record.requests.next[r]
    return n


def shown_places(record: Engine) -> int:
    """How many requests an engine has to be shown: those that there are places for.

    Where prefill is kept back the engine asks, too, whether anybody else might enter: one more, for whom there is no place, says so.
    """
    settings = record.settings
    asks = settings.prefill_interval > 1 or settings.long_prefill > 0
    return max(settings.most_active - record.num_residents, 0) + int(asks)


def allowed(record: Engine) -> Gate:
    """What the decision that stands opened in a record allows."""
    admit = np.empty(min(shown_places(record), record.num_waiting), dtype=np.int32)
    hold = np.empty(record.num_residents, dtype=np.int32)
    admit = admit[: list_admissible(record.handle, admit)]
    hold = hold[: list_held(record.handle, hold)]
    # A drain iteration replaces a decision whose evictions have been made.
    evicted = 0 if record.run_all else record.report.evicted
    return Gate(admit, hold, record.events.evicted[:evicted].copy(), record.token_budget)
