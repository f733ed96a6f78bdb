"""KV, admissions and the batch of one iteration, ``vllm`` preset (rules 5, 6, 12, 17 and 19 to 21; compiled).

The rules are those of vLLM 0.28.0, ``v1/core/sched/scheduler.py`` (``schedule``) and
``v1/core/kv_cache_manager.py`` (``allocate_slots``), seen through run, admit and evict: held and
boundary requests stay in memory, take no new block, cannot be preempted and count towards
``max_num_seqs``.

vLLM serves residents one by one in the order of admission and preempts the last running one where blocks lack. Where all
decodes come before the unfinished prefills nobody's token depends on that order, and the outcome follows from
sums (``serve_together``): decodes fit the token budget, unless a decision asks for a smaller one, and the
victims are the fewest newest ones without whom everybody's blocks are free. The walk one by one
(``serve_in_order``) is for what is left: a held prefill that goes on before others, Vidur's accounting when memory
runs short, and prefix caching, where it matters who takes which block. Where requests have priorities
another walk takes its place (``engine/priority.py``).

Two settings of later versions keep prefill back (``engine/prefill_gates.py``): whether it waits in this iteration altogether, and
how many tokens one request may prefill.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine.prefill_gates import defers_prefill, most_prefill, note_prefill, note_release
from llmsched_env.engine.queues import next_outside
from llmsched_env.engine.residents import (
    admit,
    blocks_for,
    computed,
    insert_peer,
    is_running,
    leave_group,
    num_running,
    preempt,
    reaches_length_limit,
    running_members,
)
from llmsched_env.engine.state import PREFILL, Engine
from llmsched_env.pointers import call, call_int

NOT_TOGETHER = -1


@compiled
def schedule_vllm(engine: Engine) -> None:
    """Blocks for residents with preemptions, admissions, and the batch."""
    settings, report = engine.settings, engine.report
    before = report.preempted
    first_new = engine.next_sequence
    deferred = settings.prefill_interval > 1 and defers_prefill(engine)
    most = most_prefill(engine)
    budget = NOT_TOGETHER
    if settings.by_priority != 0:
        budget = call_int(engine.code.serve_by_priority, engine, deferred, most)
    elif settings.prefix_caching == 0:
        budget = serve_together(engine, deferred, most)
    if budget == NOT_TOGETHER:
        budget = serve_in_order(engine, deferred, most)
    if report.preempted == before:
        admit_outside(engine, budget, deferred, most)
        if settings.prefill_interval > 1 and not deferred:
            note_release(engine)
    report.kv_reserved = engine.kv_blocks if settings.prefix_caching == 0 else settings.capacity - engine.pool.free
    describe_batch(engine)
    if settings.prefill_interval > 1 and engine.batch.batch_size > 0.0:
        note_prefill(engine, first_new)


@compiled
def blocks_to_take(engine: Engine, r: int, tokens: int) -> int:
    """Blocks that resident r lacks to compute so many tokens more."""
    held = computed(engine, r)
    return blocks_for(engine, held + tokens) - blocks_for(engine, held)


@compiled
def take_blocks(engine: Engine, r: int, tokens: int, need: int) -> None:
    q = engine.requests.queue[r]
    engine.queues.resident_kv[q] += need
    engine.kv_blocks += need
    if engine.settings.prefix_caching != 0:
        known = computed(engine, r) + tokens - engine.pool.files.in_flight[r]
        call(engine.code.grow, engine.pool, r, need, known // engine.settings.block_size)


@compiled
def newest_decode(engine: Engine) -> int:
    """Number of the latest admission among the decodes that run; -1 if there is none."""
    requests = engine.requests
    r = engine.newest
    while r >= 0 and (requests.status[r] == PREFILL or not is_running(engine, r)):
        r = requests.previous[r]
    return requests.sequence[r] if r >= 0 else -1


@compiled
def serve_together(engine: Engine, deferred: bool, most: int) -> int:
    """Tokens and blocks for all residents by sums. Returns the token budget left, or ``NOT_TOGETHER`` with nothing done.

    Prefills are passed over where ``deferred``, and take at most ``most`` tokens each.
    """
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    alone = settings.num_queues
    decodes = 0
    need = 0
    for q in range(settings.num_queues):
        if queues.members[q] > 0 and queues.runs[q] != 0:
            decodes += queues.members[q]
            need += engine.phases.count[q * settings.block_size + queues.phase[q]]
    first_prefill = -1
    r = queues.first_peer[alone]
    while r >= 0:
        requests.tokens[r] = 0
        if requests.status[r] != PREFILL:
            if first_prefill >= 0:
                return NOT_TOGETHER
            if not reaches_length_limit(engine, r):
                requests.tokens[r] = 1
                decodes += 1
                need += blocks_to_take(engine, r, 1)
        elif first_prefill < 0 and not deferred and is_running(engine, r):
            first_prefill = r
        r = requests.next_peer[r]
    free = settings.capacity - engine.kv_blocks
    if settings.decode_needs_free_block != 0 and decodes > 0 and need + 1 > free:
        return NOT_TOGETHER
    if first_prefill >= 0 and newest_decode(engine) > requests.sequence[first_prefill]:
        return NOT_TOGETHER
    budget = engine.token_budget - decodes
    if budget < 0:
        return NOT_TOGETHER
    r = first_prefill
    while r >= 0:
        if is_running(engine, r):
            tokens = min(requests.target[r] - requests.base_computed[r], budget, most)
            requests.tokens[r] = tokens
            budget -= tokens
            need += blocks_to_take(engine, r, tokens)
        r = requests.next_peer[r]
    victim = engine.newest
    while need > free:
        while not is_running(engine, victim):
            victim = requests.previous[victim]
        gone = victim
        victim = requests.previous[victim]
        need -= blocks_to_take(engine, gone, 1 if requests.group[gone] != alone else requests.tokens[gone])
        free += blocks_for(engine, computed(engine, gone))
        preempt(engine, gone)
    for q in range(settings.num_queues):
        if queues.members[q] > 0 and queues.runs[q] != 0:
            full = engine.phases.count[q * settings.block_size + queues.phase[q]]
            queues.resident_kv[q] += full
            engine.kv_blocks += full
    r = queues.first_peer[alone]
    while r >= 0:
        if requests.tokens[r] > 0:
            take_blocks(engine, r, requests.tokens[r], blocks_to_take(engine, r, requests.tokens[r]))
        r = requests.next_peer[r]
    return budget


@compiled
def serve_in_order(engine: Engine, deferred: bool, most: int) -> int:
    """Tokens and blocks for the residents one by one, as vLLM's loop does; prefills as in ``serve_together``. Returns the budget left."""
    requests, settings, pool = engine.requests, engine.settings, engine.pool
    alone = settings.num_queues
    caching = settings.prefix_caching != 0
    budget = engine.token_budget
    r = engine.queues.first_peer[alone]
    while r >= 0:
        requests.tokens[r] = 0
        r = requests.next_peer[r]
    victim = engine.newest
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
        if deferred and not decodes:  # it may be preempted all the same
            r = following
            continue
        held = computed(engine, r)
        tokens = 1 if decodes else min(requests.target[r] - held, budget, most)
        need = blocks_to_take(engine, r, tokens)
        must_be_free = need
        if decodes and settings.decode_needs_free_block != 0:
            must_be_free = max(need, 1)
        evicted = False
        while must_be_free > (pool.free if caching else settings.capacity - engine.kv_blocks):
            while not is_running(engine, victim):
                victim = requests.previous[victim]  # never before r: r itself runs
            gone = victim
            victim = requests.previous[victim]
            preempt(engine, gone)
            if gone == r:
                evicted = True
                break
        if evicted:  # it was the last that runs
            break
        following = requests.next[r]
        if not member:
            requests.tokens[r] = tokens
        take_blocks(engine, r, tokens, need)
        budget -= tokens
        r = following
    return budget


@compiled
def admit_outside(engine: Engine, budget: int, deferred: bool, most: int) -> None:
    """Requests from outside while token budget, sequence slots and blocks last (rule 12); prefills as in ``serve_together``."""
    requests, queues, settings, report = engine.requests, engine.queues, engine.settings, engine.report
    if engine.num_waiting == 0:
        return
    caching = settings.prefix_caching != 0
    padded = settings.padded_prefill != 0
    reserve = settings.watermark_blocks
    if reserve > 0 and num_running(engine) == 0:
        reserve = 0
    longest = 0
    count = 0
    while (budget > 0 or padded) and engine.num_residents < settings.most_active:
        q = next_outside(engine)
        if q < 0:
            break
        r = queues.head[q]
        total = requests.prompt[r] + requests.base_generated[r]
        hits = 0
        taken = 0
        if caching:
            hits = call_int(engine.code.cached_blocks, engine.pool, r, (total - 1) // settings.block_size)
            taken = call_int(engine.code.free_among, engine.pool, r, hits)
        there = hits * settings.block_size
        if settings.handed_in != 0:
            there = max(there, engine.handed.carried[r])  # KV that came with it
        tokens = total - there
        if deferred and tokens > 1:  # one token left is no prefill: it enters
            break
        tokens = min(tokens, most)
        if padded:  # Vidur's accounting replaces the token budget
            if (count + 1) * max(longest, total) > engine.token_budget:
                break
        elif tokens > budget:
            if settings.chunked_prefill == 0:
                break
            tokens = budget
        need = blocks_for(engine, there + tokens) - hits
        whole = blocks_for(engine, total) - hits if settings.reserve_full != 0 else need
        free = engine.pool.free if caching else settings.capacity - engine.kv_blocks
        if whole + taken + reserve > free:
            break
        queues.left[q] -= 1
        admit(engine, q)
        if caching:
            call(engine.code.open_seat, engine.pool, r, hits)
            engine.kv_blocks += hits
            queues.resident_kv[q] += hits
            engine.pool.asked_tokens += total
            engine.pool.hit_tokens += hits * settings.block_size
        if settings.handed_in != 0:
            engine.handed.carried[r] = 0
            if engine.handed.cached[r] < 0:
                engine.handed.cached[r] = hits * settings.block_size
        requests.base_computed[r] = there
        engine.kv_tokens += there
        requests.tokens[r] = tokens
        take_blocks(engine, r, tokens, need)
        report.admitted += 1
        if not padded:
            budget -= tokens
        longest = max(longest, total)
        count += 1
        reserve = settings.watermark_blocks  # somebody runs now


@compiled
def describe_batch(engine: Engine) -> None:
    """Describe the scheduled tokens to the iteration-time model."""
    requests, queues, settings, batch = engine.requests, engine.queues, engine.settings, engine.batch
    decodes, decode_kv = running_members(engine)
    prefills = 0
    prefill_tokens = 0
    context_sum = 0
    context64 = 0
    finishing = 0
    prefill_load = 0
    squares = 0.0
    work = 0.0
    r = queues.first_peer[settings.num_queues]
    while r >= 0:
        tokens = requests.tokens[r]
        held = requests.base_computed[r]
        if tokens > 0 and held >= requests.target[r]:
            decodes += 1
            decode_kv += held + 1
        elif tokens > 0:
            prefills += 1
            prefill_tokens += tokens
            prefill_load += held + tokens
            context_sum += held
            context64 += (held + 63) // 64 * 64
            squares += float(tokens) * float(tokens)
            work += float(tokens) * (0.5 * float(tokens) + float(held))
            if held + tokens >= requests.target[r]:
                finishing += 1
        r = requests.next_peer[r]
    batch.batch_size = float(decodes + prefills)
    batch.decodes = float(decodes)
    batch.decode_kv = float(decode_kv)
    batch.prefills = float(prefills)
    batch.prefill_tokens = float(prefill_tokens)
    batch.prefill_squares = squares
    batch.prefill_context = float(context_sum)
    batch.prefill_context64 = float(context64)
    batch.prefill_work = work
    batch.sampled = float(decodes + finishing)
    batch.load = float(decode_kv + prefill_load)
    if engine.code.describe_contexts != 0:
        call(engine.code.describe_contexts, engine)
