"""KV and admissions of one iteration, ``paper`` preset (design rules 4 and 6).

Source: arXiv 2504.11320 v4, model section: a resident at stage s holds l + s tokens, eviction is
last in first out by admission, all progress is lost.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine.moves import admit, evict, next_outside
from llmsched_env.engine.state import (
    C_BOUNDARY_SLOT,
    C_CAPACITY,
    I_ADMITTED,
    I_BOUNDARY,
    I_FORCED_EVICTIONS,
    I_KV_RESERVED,
    I_KV_TOKENS,
    I_RESIDENTS,
    I_STEP_PREEMPTED,
    Q_HEAD,
    Q_LEFT,
    R_FORCED,
    R_PROMPT,
    S_COMPUTED,
    S_PROMPT,
    S_QUEUE,
    S_STATE,
    S_TOKENS,
    SLOT_BOUNDARY,
    SLOT_ENTERING,
    SLOT_GONE,
)
from llmsched_env.perf.batch import (
    BATCH_SIZE,
    DECODE_KV,
    DECODES,
    LOAD,
    PREFILL_SQUARES,
    PREFILL_TOKENS,
    PREFILL_WORK,
    PREFILLS,
    SAMPLED,
)


@compiled
def schedule_paper(n, entered, run_all, clock, decision, settings, ends, requests, times, slots, queues, scalars, batch, events):  # type: ignore[no-untyped-def]
    """Forced evictions, admissions and the batch. Returns the number of slots in use (gone ones included).

    Every resident outside a boundary queue is charged computed + 1, held or not; a boundary request
    computed, computed + 1 if it enters now (variant A: computed, its slot yields no token).
    """
    capacity = settings[C_CAPACITY]
    no_token = settings[C_BOUNDARY_SLOT] != 0
    charged = scalars[I_KV_TOKENS] + scalars[I_RESIDENTS] - scalars[I_BOUNDARY]
    if no_token:
        charged -= entered
    preempted = 0
    last = n - 1
    while charged > capacity:
        while slots[S_STATE, last] == SLOT_GONE:
            last -= 1
        state = slots[S_STATE, last]
        charged -= slots[S_COMPUTED, last]
        if not (state == SLOT_BOUNDARY or (no_token and state == SLOT_ENTERING)):
            charged -= 1
        r = evict(last, settings, requests, slots, queues, scalars)
        requests[R_FORCED, r] += 1
        scalars[I_FORCED_EVICTIONS] += 1
        events[1, scalars[I_STEP_PREEMPTED]] = r
        scalars[I_STEP_PREEMPTED] += 1
        preempted += 1
    if preempted == 0:
        while True:
            q = next_outside(settings, requests, queues)
            if q < 0:
                break
            prompt = requests[R_PROMPT, queues[Q_HEAD, q]]
            if charged + prompt > capacity:
                break
            queues[Q_LEFT, q] -= 1
            charged += prompt
            admit(q, n, clock, settings, ends, requests, times, slots, queues, scalars)
            slots[S_TOKENS, n] = prompt
            scalars[I_ADMITTED] += 1
            n += 1
    scalars[I_KV_RESERVED] = charged

    size = 0
    decodes = 0
    decode_kv = 0
    prefills = 0
    prefill_tokens = 0
    load = 0
    squares = 0.0
    for i in range(n):
        state = slots[S_STATE, i]
        if state in (SLOT_GONE, SLOT_BOUNDARY):
            slots[S_TOKENS, i] = 0
            continue
        computed = slots[S_COMPUTED, i]
        if computed == 0:  # residents are prefilled in the iteration that admits them
            prompt = slots[S_PROMPT, i]
            prefills += 1
            prefill_tokens += prompt
            squares += float(prompt) * float(prompt)
            load += prompt
        elif state == SLOT_ENTERING and no_token:
            slots[S_TOKENS, i] = 0
            load += computed
        elif state == SLOT_ENTERING or run_all or decision[0, slots[S_QUEUE, i]] != 0:
            slots[S_TOKENS, i] = 1
            decodes += 1
            decode_kv += computed + 1
            load += computed + 1
        else:
            slots[S_TOKENS, i] = 0
            continue
        size += 1
    batch[:] = 0.0
    batch[BATCH_SIZE] = size
    batch[DECODES] = decodes
    batch[DECODE_KV] = decode_kv
    batch[PREFILLS] = prefills
    batch[PREFILL_TOKENS] = prefill_tokens
    batch[PREFILL_SQUARES] = squares
    batch[PREFILL_WORK] = 0.5 * squares
    batch[SAMPLED] = decodes
    batch[LOAD] = load
    return n
