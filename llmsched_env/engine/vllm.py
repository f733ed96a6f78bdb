"""KV and admissions of one iteration, ``vllm`` preset (design rules 5, 6, 12 and 17).

The rules are those of vLLM 0.28.0, ``v1/core/sched/scheduler.py`` (``schedule``) and
``v1/core/kv_cache_manager.py`` (``allocate_slots``), seen through run, admit and evict: held and
boundary requests stay in memory, take no new block, cannot be preempted and count towards
``max_num_seqs``.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled, inlined
from llmsched_env.engine.moves import admit, evict, next_outside
from llmsched_env.engine.state import (
    C_BLOCK_SIZE,
    C_BUDGET,
    C_CAPACITY,
    C_CHUNKED,
    C_FREE_BLOCK,
    C_MAX_SEQS,
    C_PADDED,
    C_RESERVE_FULL,
    C_WATERMARK,
    I_ADMITTED,
    I_BOUNDARY,
    I_FORCED_EVICTIONS,
    I_KV_BLOCKS,
    I_KV_RESERVED,
    I_KV_TOKENS,
    I_PREFILLING,
    I_RESIDENTS,
    I_STEP_PREEMPTED,
    I_UNIFORM,
    Q_HEAD,
    Q_LEFT,
    Q_RESIDENT_KV,
    Q_RESIDENTS,
    R_FORCED,
    R_GENERATED,
    R_PROMPT,
    S_BLOCKS,
    S_COMPUTED,
    S_GENERATED,
    S_PROMPT,
    S_QUEUE,
    S_STATE,
    S_TARGET,
    S_TOKENS,
    SLOT_BOUNDARY,
    SLOT_ENTERING,
    SLOT_GONE,
    SLOT_INTERIOR,
)
from llmsched_env.perf.batch import (
    BATCH_SIZE,
    DECODE_KV,
    DECODES,
    LOAD,
    PREFILL_CONTEXT,
    PREFILL_CONTEXT64,
    PREFILL_SQUARES,
    PREFILL_TOKENS,
    PREFILL_WORK,
    PREFILLS,
    SAMPLED,
)


@compiled
def batch_sums(n, slots, batch):  # type: ignore[no-untyped-def]
    """Describe the scheduled tokens to the iteration-time model; slots without tokens are set to 0."""
    batch_sums_from(0, 0, n, slots, batch)


@inlined
def batch_sums_from(m, held, n, slots, batch):  # type: ignore[no-untyped-def]
    """The same where the first m slots are known to decode one token each and hold ``held`` tokens in all."""
    decodes = m
    decode_kv = held + m
    prefills = 0
    prefill_tokens = 0
    context_sum = 0
    context64 = 0
    sampled = m
    load = held + m
    squares = 0.0
    work = 0.0
    for i in range(m, n):
        tokens = slots[S_TOKENS, i]
        if tokens <= 0:
            slots[S_TOKENS, i] = 0
            continue
        computed = slots[S_COMPUTED, i]
        load += computed + tokens
        if computed >= slots[S_TARGET, i]:
            decodes += 1
            decode_kv += computed + 1
            sampled += 1
            continue
        prefills += 1
        prefill_tokens += tokens
        context_sum += computed
        context64 += (computed + 63) // 64 * 64
        squares += float(tokens) * float(tokens)
        work += float(tokens) * (0.5 * float(tokens) + float(computed))
        if computed + tokens >= slots[S_TARGET, i]:
            sampled += 1
    batch[BATCH_SIZE] = decodes + prefills
    batch[DECODES] = decodes
    batch[DECODE_KV] = decode_kv
    batch[PREFILLS] = prefills
    batch[PREFILL_TOKENS] = prefill_tokens
    batch[PREFILL_SQUARES] = squares
    batch[PREFILL_CONTEXT] = context_sum
    batch[PREFILL_CONTEXT64] = context64
    batch[PREFILL_WORK] = work
    batch[SAMPLED] = sampled
    batch[LOAD] = load


@inlined
def decoding_prefix(n, entered, free, run_all, decision, settings, slots, queues, scalars):  # type: ignore[no-untyped-def]
    """Serve the leading slots at once where all of them decode and their new blocks are free.

    The common iteration: nobody held or at a boundary, unfinished prefills (if any) last. Returns
    (m, tokens held by the first m slots); m = 0 leaves everything to the general loop, with the same
    outcome. The token budget is no matter: it is at least the sequence cap.
    """
    if n == 0 or scalars[I_BOUNDARY] > 0 or scalars[I_RESIDENTS] != n:
        return 0, 0
    num_queues = queues.shape[1]
    if not run_all:
        for q in range(num_queues):
            if decision[0, q] == 0 and queues[Q_RESIDENTS, q] > 0:
                return 0, 0
    m = n - scalars[I_PREFILLING]
    held = scalars[I_KV_TOKENS]
    for i in range(m, n):
        if slots[S_COMPUTED, i] >= slots[S_TARGET, i]:
            return 0, 0  # an unfinished prefill stands before a decode
        held -= slots[S_COMPUTED, i]
    block = settings[C_BLOCK_SIZE]
    computed, blocks, tokens, queue = slots[S_COMPUTED], slots[S_BLOCKS], slots[S_TOKENS], slots[S_QUEUE]
    full = 0
    for i in range(m):
        full += computed[i] == blocks[i] * block
    spare = 1 if settings[C_FREE_BLOCK] != 0 else 0  # Vidur's rule: one free block more, for the last decode too
    if full + spare > free:
        return 0, 0
    for q in range(num_queues):
        grown = 0
        for i in range(m):
            grown += (computed[i] == blocks[i] * block) & (queue[i] == q)
        queues[Q_RESIDENT_KV, q] += grown
    for i in range(m):
        blocks[i] += computed[i] == blocks[i] * block
    for i in range(m):
        tokens[i] = 1
    if entered > 0:  # with nobody held, entering is all that set these apart
        state = slots[S_STATE]
        for i in range(n):
            state[i] = SLOT_INTERIOR
    scalars[I_KV_BLOCKS] += full
    return m, held


@inlined
def schedule_vllm(n, entered, run_all, clock, decision, settings, ends, requests, times, slots, queues, scalars, batch, events):  # type: ignore[no-untyped-def]
    """Blocks for residents with preemptions, admissions, and the batch.

    Returns the number of slots in use (gone ones included).
    """
    block = settings[C_BLOCK_SIZE]
    free = settings[C_CAPACITY] - scalars[I_KV_BLOCKS]
    budget = settings[C_BUDGET]
    free_block_rule = settings[C_FREE_BLOCK] != 0

    m, held = decoding_prefix(n, entered, free, run_all, decision, settings, slots, queues, scalars)
    scalars[I_UNIFORM] = m
    free = settings[C_CAPACITY] - scalars[I_KV_BLOCKS]
    budget -= m
    running = m  # residents that are neither held nor at a boundary
    for i in range(m, n):
        slots[S_TOKENS, i] = 0
        state = slots[S_STATE, i]
        if state == SLOT_ENTERING or (
            state != SLOT_GONE and state != SLOT_BOUNDARY and (run_all or decision[0, slots[S_QUEUE, i]] != 0)
        ):
            slots[S_TOKENS, i] = -1  # runs, tokens not yet granted
            running += 1

    preempted = 0
    victim = n - 1
    for i in range(m, n):
        if budget == 0:
            break
        if slots[S_TOKENS, i] != -1:
            continue
        computed = slots[S_COMPUTED, i]
        tokens = slots[S_PROMPT, i] + slots[S_GENERATED, i] - computed
        needs_free = 1 if free_block_rule and computed >= slots[S_TARGET, i] else 0
        if tokens > budget:
            tokens = budget
        need = (computed + tokens + block - 1) // block - slots[S_BLOCKS, i]
        while max(need, needs_free) > free:
            while slots[S_TOKENS, victim] != -1:
                victim -= 1  # never below i: slot i itself runs
            free += slots[S_BLOCKS, victim]
            r = evict(victim, settings, requests, slots, queues, scalars)
            requests[R_FORCED, r] += 1
            scalars[I_FORCED_EVICTIONS] += 1
            events[1, scalars[I_STEP_PREEMPTED]] = r
            scalars[I_STEP_PREEMPTED] += 1
            preempted += 1
            running -= 1
            if victim == i:
                break
        if slots[S_STATE, i] == SLOT_GONE:
            break
        slots[S_TOKENS, i] = tokens
        if need > 0:
            slots[S_BLOCKS, i] += need
            queues[Q_RESIDENT_KV, slots[S_QUEUE, i]] += need
            scalars[I_KV_BLOCKS] += need
            free -= need
        budget -= tokens

    if preempted == 0:
        padded = settings[C_PADDED] != 0
        longest = 0
        count = 0
        while budget > 0 and scalars[I_RESIDENTS] < settings[C_MAX_SEQS]:
            q = next_outside(settings, requests, queues)
            if q < 0:
                break
            head = queues[Q_HEAD, q]
            total = requests[R_PROMPT, head] + requests[R_GENERATED, head]
            tokens = total
            if padded:  # Vidur's accounting replaces the token budget
                if (count + 1) * max(longest, total) > settings[C_BUDGET]:
                    break
            elif tokens > budget:
                if settings[C_CHUNKED] == 0:
                    break
                tokens = budget
            reserve = settings[C_WATERMARK] if running > 0 else 0
            need = (tokens + block - 1) // block
            whole = (total + block - 1) // block if settings[C_RESERVE_FULL] != 0 else need
            if whole + reserve > free:
                break
            queues[Q_LEFT, q] -= 1
            admit(q, n, clock, settings, ends, requests, times, slots, queues, scalars)
            slots[S_TOKENS, n] = tokens
            slots[S_BLOCKS, n] = need
            queues[Q_RESIDENT_KV, q] += need
            scalars[I_KV_BLOCKS] += need
            scalars[I_ADMITTED] += 1
            free -= need
            if not padded:
                budget -= tokens
            longest = max(longest, total)
            count += 1
            running += 1
            n += 1
    scalars[I_KV_RESERVED] = scalars[I_KV_BLOCKS]

    batch_sums_from(m, held, n, slots, batch)
    return n
