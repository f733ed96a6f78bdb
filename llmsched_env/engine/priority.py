"""Requests in the order of their priority: who waits before whom, who is served and who is preempted (rule 23; compiled).

vLLM 0.33.0 with ``--scheduling-policy priority``: ``v1/core/sched/request_queue.py`` (``PriorityRequestQueue``), ``v1/request.py``
(``Request.__lt__``) and the running loop of ``v1/core/sched/scheduler.py`` (``schedule``).

A request's queue key is PRIORITY_STEP x priority + its number, and numbers follow arrival: sorted by key, a queue is sorted by (priority,
arrival, number). The key never changes, so a preempted request goes back to where it stood. It says nothing of the requests to come.
Nothing here is compiled for an engine without priorities (``llmsched_env.engine.link``).
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import count_in
from llmsched_env.engine.residents import computed, insert_peer, is_running, leave_group, preempt, reaches_length_limit
from llmsched_env.engine.schedule_vllm import blocks_to_take, take_blocks
from llmsched_env.engine.state import PREFILL, PRIORITY_STEP, Engine


@compiled
def queue_in_order(engine: Engine, r: int) -> None:
    """Request r, arrived or evicted, joins its outside queue where its key belongs; nobody is late here."""
    requests, queues = engine.requests, engine.queues
    q = requests.queue[r]
    key = engine.order.key[r]
    requests.key[r] = key
    last = queues.tail[q]
    before = -1
    if last >= 0 and requests.key[last] < key:  # often the last of its queue
        before = last
    else:
        x = queues.head[q]
        while x >= 0 and requests.key[x] < key:
            before = x
            x = requests.next[x]
    if before < 0:
        requests.next[r] = queues.head[q]
        queues.head[q] = r
    else:
        requests.next[r] = requests.next[before]
        requests.next[before] = r
    if requests.next[r] < 0:
        queues.tail[q] = r
        queues.timely[q] = r
    count_in(engine, r, q)


@compiled
def last_by_priority(engine: Engine) -> int:
    """The running resident with the highest (priority, arrival), which is preempted first; of equal ones the one admitted first."""
    requests, hidden = engine.requests, engine.hidden
    worst = -1
    priority = 0
    arrival = 0.0
    r = engine.oldest
    while r >= 0:
        if is_running(engine, r):
            own = requests.key[r] // PRIORITY_STEP
            if worst < 0 or own > priority or (own == priority and hidden.arrival[r] > arrival):
                worst = r
                priority = own
                arrival = hidden.arrival[r]
        r = requests.next[r]
    return worst


@compiled
def take_back(engine: Engine, r: int, reached: int) -> int:
    """Undo what resident r was given in this iteration, if anything. Returns the tokens.

    Args:
        reached: number of the admission of the resident now being served: members of a group before it have got their token.
    """
    requests, queues = engine.requests, engine.queues
    if requests.group[r] != engine.settings.num_queues:
        tokens = 1 if requests.sequence[r] < reached else 0
    else:
        tokens = requests.tokens[r]
    if tokens > 0:
        need = blocks_to_take(engine, r, tokens)  # ``release`` knows of computed tokens alone
        queues.resident_kv[requests.queue[r]] -= need
        engine.kv_blocks -= need
    return tokens


@compiled
def serve_by_priority(engine: Engine, deferred: int, most: int) -> int:
    """Tokens and blocks for the residents one by one, in the order of admission. Returns the token budget left.

    Where blocks lack ``last_by_priority`` is preempted. If that one was served already in this iteration its tokens are free for others.
    If it is the one being served the next in order goes on, as in vLLM 0.33; up to 0.32 this ended the loop.

    Args:
        deferred: not 0: prefills are passed over.
        most: tokens that one prefill may take.
    """
    requests, settings, pool, cadence = engine.requests, engine.settings, engine.pool, engine.cadence
    alone = settings.num_queues
    caching = settings.prefix_caching != 0
    budget = engine.token_budget
    undone = 0  # prefills that were served and then preempted
    r = engine.queues.first_peer[alone]
    while r >= 0:
        requests.tokens[r] = 0
        r = requests.next_peer[r]
    r = engine.oldest
    while r >= 0:
        following = requests.next[r]
        member = requests.group[r] != alone
        if not is_running(engine, r):
            r = following
            continue
        if budget == 0:
            if member:  # its group goes on without it in this iteration
                leave_group(engine, r)
                requests.tokens[r] = 0
                insert_peer(engine, alone, r)
            r = following
            continue
        decodes = requests.status[r] != PREFILL
        if decodes and not member and reaches_length_limit(engine, r):
            r = following
            continue
        if deferred != 0 and not decodes:  # it may be preempted all the same
            r = following
            continue
        held = computed(engine, r)
        tokens = 1 if decodes else min(requests.target[r] - held, budget, most)
        need = blocks_to_take(engine, r, tokens)
        sequence = requests.sequence[r]
        evicted = False
        while need > (pool.free if caching else settings.capacity - engine.kv_blocks):
            gone = last_by_priority(engine)
            freed = take_back(engine, gone, sequence)
            budget += freed
            if freed > 0 and requests.status[gone] == PREFILL:
                undone += 1
            preempt(engine, gone)
            if gone == r:
                evicted = True
                break
        following = requests.next[r]  # good for one just evicted, too
        if not evicted:
            if not member:
                requests.tokens[r] = tokens
            take_blocks(engine, r, tokens, need)
            budget -= tokens
        r = following
    if undone > 0 and settings.prefill_interval > 1:
        # To vLLM the iteration carries prefill all the same; if it computes anything it is counted once more (``note_prefill``).
        cadence.since_prefill = -1 if budget < engine.token_budget else 0
    return budget
