"""The walk of policies that admit by tenant: what is decided is what enters, whatever the engine's own order.

A decision says how many of each tenant's requests enter; the engine takes them in its own order (arrival, as a rule) until one
does not fit. So that nobody else's request takes the place of one that was chosen before it, a request is granted only if the
engine then admits *all* that were granted: ``all_enter`` goes through the engine's order with the token budget, the sequence
slots and the KV that its residents leave. The first choice is tried alone. It therefore enters whenever it fits, and a policy
that always has a choice is work-conserving. What of its choices does not fit beside the others in the engine's order enters in the next
iteration.

Where the engine's settings make the room uncertain (prefix caching, asynchronous scheduling, settings that keep prefill back,
Vidur's accounting, priorities of requests) one request an iteration is granted: then there is no order to go wrong.
"""

from __future__ import annotations

import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import precedes
from llmsched_env.engine.residents import blocks_for, computed
from llmsched_env.engine.state import PREFILL, Engine
from llmsched_env.engine_config import EngineConfig
from llmsched_env.records import Counts, Record
from llmsched_env.types import Decision, LengthStatistics, QueueLayout


class Room(Record):
    """What the residents leave in this iteration, and the requests granted so far. J tenants."""

    exact: int  # 1: the engine's admissions can be foreseen
    open: int  # 0: nobody enters, a resident will be preempted
    budget: int  # tokens
    free: int  # KV units
    granted: Counts  # (J,)
    following: Counts  # (J,) the request that is chosen next, -1: none


def tenant_layout(statistics: LengthStatistics) -> QueueLayout:
    """A class for each tenant, with its weight; one class where no tenants are declared."""
    if not statistics.tenants:
        return QueueLayout(by="tenant")
    weights = tuple(terms.weight for terms in statistics.tenants)
    return QueueLayout(by="tenant", num_types=len(weights), tenant_weights=weights)


def foreseeable(engine: EngineConfig) -> bool:
    """Whether ``find_room`` and ``all_enter`` know exactly what an engine of these settings admits."""
    uncertain = (
        engine.enable_prefix_caching,
        engine.async_scheduling,
        engine.padded_prefill,
        engine.decode_needs_free_block,
        engine.prefill_schedule_interval > 1,
        engine.long_prefill_token_threshold > 0,
        engine.scheduling_policy == "priority",
    )
    return not any(uncertain)


def room_of(layout: QueueLayout, engine: EngineConfig) -> Room:
    """The record of a policy's walk."""
    room = Room(**{name: np.zeros(layout.num_classes, dtype=np.int64) for name in ("granted", "following")})
    room.exact = int(foreseeable(engine))
    return room


@compiled
def find_room(engine: Engine, room: Room) -> None:
    """What the residents leave if all of them run (rules 4, 5 and 12 of ``docs/engine-rules.md``), and the head of each queue."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    for j in range(settings.num_classes):
        room.granted[j] = 0
        room.following[j] = queues.head[j * settings.num_segments]
    room.open = 1
    if settings.paper != 0:
        room.free = settings.capacity - engine.kv_tokens - (engine.num_residents - engine.num_boundary)
        room.open = 1 if room.free >= 0 else 0
        return
    budget = settings.max_num_batched_tokens
    need = 0
    r = engine.oldest
    while r >= 0:
        held = computed(engine, r)
        tokens = 1 if requests.status[r] != PREFILL else requests.target[r] - held
        tokens = min(tokens, budget)
        need += blocks_for(engine, held + tokens) - blocks_for(engine, held)
        budget -= tokens
        r = requests.next[r]
    room.budget = budget
    room.free = settings.capacity - engine.kv_blocks - need
    if room.exact != 0 and room.free < 0:
        room.open = 0


@compiled
def all_enter(engine: Engine, room: Room, decision: Decision) -> bool:
    """Whether the engine, in its own order, admits all that are granted."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    left = 0
    for j in range(settings.num_classes):
        queues.left[j * settings.num_segments] = queues.head[j * settings.num_segments]
        left += room.granted[j]
        decision.admit[j * settings.num_segments] = room.granted[j]  # used up below, written again by the caller
    budget, free, residents = room.budget, room.free, engine.num_residents
    while left > 0:
        best = -1
        for q in range(0, settings.num_queues, settings.num_segments):
            if decision.admit[q] > 0 and precedes(engine, q, queues.left[q], best, queues.left[max(best, 0)]):
                best = q
        r = queues.left[best]
        total = requests.prompt[r] + requests.base_generated[r]
        if settings.paper != 0:
            if total > free:
                return False
            free -= total
        else:
            if budget <= 0 or residents >= settings.most_active:
                return False
            tokens = total
            if tokens > budget:
                if settings.chunked_prefill == 0:
                    return False
                tokens = budget
            need = blocks_for(engine, tokens)
            whole = blocks_for(engine, total) if settings.reserve_full != 0 else need
            reserve = settings.watermark_blocks if residents > 0 else 0
            if whole + reserve > free:
                return False
            budget -= tokens
            free -= need
        residents += 1
        decision.admit[best] -= 1
        queues.left[best] = requests.next[r]
        left -= 1
    return True


@compiled
def grant(engine: Engine, room: Room, j: int, decision: Decision) -> bool:
    """Tenant j's next request enters if the engine then admits all that are granted; whether the walk may go on."""
    settings = engine.settings
    room.granted[j] += 1
    fits = room.exact == 0 or all_enter(engine, room, decision)
    if not fits:
        room.granted[j] -= 1
    else:
        room.following[j] = engine.requests.next[room.following[j]]
    for i in range(settings.num_classes):
        decision.admit[i * settings.num_segments] = room.granted[i]
    return fits and room.exact != 0
