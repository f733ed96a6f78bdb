"""Moves of requests between outside queues, slots and boundary queues (compiled).

Outside queues are linked lists through ``R_NEXT``: arrivals join at the tail, evicted requests at
the head, so each list is sorted by queue key (design rule 7). Where the engine serves late requests
last, a list is its timely requests up to ``Q_TIMELY``, then its late ones. Slots are dense and in admission
order; a slot that leaves is marked ``SLOT_GONE`` and squeezed out by ``compact``.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled, inlined
from llmsched_env.engine.state import (
    C_BY_CLASS,
    C_LOSE_PROGRESS,
    C_PRESET,
    C_ROWS,
    C_SEGMENTS,
    F_CLOCK,
    F_LATE_AFTER,
    I_BOUNDARY,
    I_EVICTIONS,
    I_KV_BLOCKS,
    I_KV_TOKENS,
    I_LOW_KEY,
    I_PREFILLING,
    I_RESIDENTS,
    I_STEP_EVICTED,
    I_WAITING,
    LATE_KEY,
    NO_END,
    PRESET_PAPER,
    Q_BOUNDARY_KV,
    Q_HEAD,
    Q_LATE,
    Q_LEFT,
    Q_RESIDENT_KV,
    Q_RESIDENTS,
    Q_TAIL,
    Q_TIMELY,
    Q_WAITING,
    R_CLASS,
    R_EVICTIONS,
    R_GENERATED,
    R_KEY,
    R_NEXT,
    R_OUTPUT,
    R_PROMPT,
    R_STATUS,
    S_BLOCKS,
    S_COMPUTED,
    S_GENERATED,
    S_ID,
    S_OUTPUT,
    S_PROMPT,
    S_QUEUE,
    S_ROWS,
    S_SEGMENT_END,
    S_STATE,
    S_STOP,
    S_TARGET,
    S_TOKENS,
    SLOT_BOUNDARY,
    SLOT_ENTERING,
    SLOT_GONE,
    SLOT_INTERIOR,
    STATUS_RESIDENT,
    STATUS_WAITING,
    T_ADMITTED,
    T_ARRIVAL,
)

SEARCH_BLOCK = 64
"""Slots that a search looks at together."""


@inlined
def push_back(r, q, requests, queues, scalars):  # type: ignore[no-untyped-def]
    """An arrival joins outside queue q after its last timely request."""
    before = queues[Q_TIMELY, q]
    if before < 0:
        requests[R_NEXT, r] = queues[Q_HEAD, q]
        queues[Q_HEAD, q] = r
    else:
        requests[R_NEXT, r] = requests[R_NEXT, before]
        requests[R_NEXT, before] = r
    queues[Q_TIMELY, q] = r
    if requests[R_NEXT, r] < 0:
        queues[Q_TAIL, q] = r
    queues[Q_WAITING, q] += 1
    scalars[I_WAITING] += 1


@compiled
def push_front(r, q, requests, queues, scalars):  # type: ignore[no-untyped-def]
    """An evicted request becomes the head of outside queue q."""
    requests[R_NEXT, r] = queues[Q_HEAD, q]
    queues[Q_HEAD, q] = r
    if queues[Q_TIMELY, q] < 0:
        queues[Q_TIMELY, q] = r
    if queues[Q_TAIL, q] < 0:
        queues[Q_TAIL, q] = r
    queues[Q_WAITING, q] += 1
    scalars[I_WAITING] += 1


@inlined
def pop_front(q, requests, queues, scalars):  # type: ignore[no-untyped-def]
    r = queues[Q_HEAD, q]
    queues[Q_HEAD, q] = requests[R_NEXT, r]
    if queues[Q_HEAD, q] < 0:
        queues[Q_TAIL, q] = -1
    if queues[Q_TIMELY, q] == r:
        queues[Q_TIMELY, q] = -1
    elif queues[Q_TIMELY, q] < 0:
        queues[Q_LATE, q] -= 1
    queues[Q_WAITING, q] -= 1
    scalars[I_WAITING] -= 1
    return r


@inlined
def next_outside(settings, requests, queues):  # type: ignore[no-untyped-def]
    """Outside queue whose head is next in the global admission order among those with count left; -1 if none.

    Timely requests before late ones; then, in the order by class, the rank of the class; then the queue key.
    """
    num_segments = settings[C_SEGMENTS]
    by_class = settings[C_BY_CLASS] != 0
    best = -1
    best_rank = 0
    best_key = 0
    for q in range(0, queues.shape[1], num_segments):
        head = queues[Q_HEAD, q]
        if head < 0 or queues[Q_LEFT, q] <= 0:
            continue
        key = requests[R_KEY, head]
        rank = settings[C_ROWS + q // num_segments] if by_class else 0
        if queues[Q_TIMELY, q] < 0:
            rank += LATE_KEY
        if best < 0 or rank < best_rank or (rank == best_rank and key < best_key):
            best = q
            best_rank = rank
            best_key = key
    return best


@compiled
def mark_late(settings, requests, times, queues, clocks):  # type: ignore[no-untyped-def]
    """Requests that have waited too long for their first admission move behind the timely ones of their queue.

    Those evicted since (key below 0) are not late. The others stand in arrival order, so the search ends
    at the first that is in time.
    """
    limit = clocks[F_LATE_AFTER]
    clock = clocks[F_CLOCK]
    for q in range(0, queues.shape[1], settings[C_SEGMENTS]):
        last = queues[Q_TIMELY, q]
        previous = -1
        r = queues[Q_HEAD, q] if last >= 0 else -1
        while r >= 0:
            following = requests[R_NEXT, r]
            if requests[R_KEY, r] < 0:
                previous = r
            elif clock - times[T_ARRIVAL, r] > limit:
                requests[R_KEY, r] += LATE_KEY
                queues[Q_LATE, q] += 1
                if following >= 0:
                    if previous < 0:
                        queues[Q_HEAD, q] = following
                    else:
                        requests[R_NEXT, previous] = following
                    requests[R_NEXT, queues[Q_TAIL, q]] = r
                    requests[R_NEXT, r] = -1
                    queues[Q_TAIL, q] = r
                if r == last:
                    queues[Q_TIMELY, q] = previous
            else:
                break
            if r == last:
                break
            r = following


@inlined
def admit(q, n, clock, settings, ends, requests, times, slots, queues, scalars):  # type: ignore[no-untyped-def]
    """The head of outside queue q takes slot n; nothing is computed yet."""
    r = pop_front(q, requests, queues, scalars)
    generated = requests[R_GENERATED, r]
    requests[R_STATUS, r] = STATUS_RESIDENT
    if times[T_ADMITTED, r] != times[T_ADMITTED, r]:  # NaN: not admitted before
        times[T_ADMITTED, r] = clock
    slots[S_ID, n] = r
    slots[S_QUEUE, n] = q
    slots[S_STATE, n] = SLOT_INTERIOR
    slots[S_COMPUTED, n] = 0
    slots[S_GENERATED, n] = generated
    slots[S_TARGET, n] = requests[R_PROMPT, r] + generated
    slots[S_OUTPUT, n] = requests[R_OUTPUT, r]
    slots[S_SEGMENT_END, n] = ends[0] if settings[C_SEGMENTS] > 1 else NO_END
    slots[S_BLOCKS, n] = 0
    slots[S_TOKENS, n] = 0
    slots[S_PROMPT, n] = requests[R_PROMPT, r]
    slots[S_STOP, n] = min(slots[S_OUTPUT, n], slots[S_SEGMENT_END, n])
    queues[Q_RESIDENTS, q] += 1
    scalars[I_RESIDENTS] += 1
    scalars[I_PREFILLING] += 1
    return r


@compiled
def release_kv(i, settings, slots, queues, scalars):  # type: ignore[no-untyped-def]
    """Free the KV of slot i and take it out of the counts of its queue."""
    q = slots[S_QUEUE, i]
    kv = slots[S_COMPUTED, i] if settings[C_PRESET] == PRESET_PAPER else slots[S_BLOCKS, i]
    if slots[S_STATE, i] == SLOT_BOUNDARY:
        queues[Q_WAITING, q] -= 1
        queues[Q_BOUNDARY_KV, q] -= kv
        scalars[I_BOUNDARY] -= 1
    else:
        queues[Q_RESIDENTS, q] -= 1
        queues[Q_RESIDENT_KV, q] -= kv
    scalars[I_KV_TOKENS] -= slots[S_COMPUTED, i]
    scalars[I_KV_BLOCKS] -= slots[S_BLOCKS, i]
    scalars[I_RESIDENTS] -= 1
    if slots[S_COMPUTED, i] < slots[S_TARGET, i]:
        scalars[I_PREFILLING] -= 1
    slots[S_STATE, i] = SLOT_GONE
    slots[S_TOKENS, i] = 0


@compiled
def evict(i, settings, requests, slots, queues, scalars):  # type: ignore[no-untyped-def]
    """Slot i gives up its KV; the request gets the next queue key below all given so far.

    It joins its outside queue only after this step's admissions (``requeue``), so it can neither
    come back in the same step nor stand in the way of others (design rule 3).
    """
    r = slots[S_ID, i]
    requests[R_STATUS, r] = STATUS_WAITING
    requests[R_GENERATED, r] = 0 if settings[C_LOSE_PROGRESS] != 0 else slots[S_GENERATED, i]
    requests[R_KEY, r] = scalars[I_LOW_KEY]
    requests[R_EVICTIONS, r] += 1
    scalars[I_LOW_KEY] -= 1
    scalars[I_EVICTIONS] += 1
    release_kv(i, settings, slots, queues, scalars)
    return r


@inlined
def requeue(ids, first, last, settings, requests, queues, scalars):  # type: ignore[no-untyped-def]
    """Evicted requests ids[first:last], newest first, become heads of their outside queues."""
    for e in range(first, last):
        r = ids[e]
        push_front(r, requests[R_CLASS, r] * settings[C_SEGMENTS], requests, queues, scalars)


@compiled
def evict_boundaries(n, decision, settings, requests, slots, queues, scalars, events):  # type: ignore[no-untyped-def]
    """Evictions the decision asks for: the most recently admitted of each boundary queue, newest first."""
    wanted = 0
    for q in range(queues.shape[1]):
        queues[Q_LEFT, q] = 0
        if q % settings[C_SEGMENTS] != 0 and decision[2, q] > 0:
            queues[Q_LEFT, q] = min(decision[2, q], queues[Q_WAITING, q])
            wanted += queues[Q_LEFT, q]
    i = n - 1
    while wanted > 0:
        q = slots[S_QUEUE, i]
        if slots[S_STATE, i] == SLOT_BOUNDARY and queues[Q_LEFT, q] > 0:
            queues[Q_LEFT, q] -= 1
            wanted -= 1
            events[0, scalars[I_STEP_EVICTED]] = evict(i, settings, requests, slots, queues, scalars)
            scalars[I_STEP_EVICTED] += 1
        i -= 1


@compiled
def enter_boundaries(n, admit_all, decision, settings, slots, queues, scalars):  # type: ignore[no-untyped-def]
    """Boundary admissions, oldest admission first. Returns how many entered."""
    wanted = 0
    for q in range(queues.shape[1]):
        queues[Q_LEFT, q] = 0
        if q % settings[C_SEGMENTS] != 0 and (admit_all or decision[1, q] > 0):
            waiting = queues[Q_WAITING, q]
            queues[Q_LEFT, q] = waiting if admit_all else min(decision[1, q], waiting)
            wanted += queues[Q_LEFT, q]
    entered = wanted
    i = 0
    while wanted > 0:
        q = slots[S_QUEUE, i]
        if slots[S_STATE, i] == SLOT_BOUNDARY and queues[Q_LEFT, q] > 0:
            queues[Q_LEFT, q] -= 1
            wanted -= 1
            kv = slots[S_COMPUTED, i] if settings[C_PRESET] == PRESET_PAPER else slots[S_BLOCKS, i]
            slots[S_STATE, i] = SLOT_ENTERING
            queues[Q_WAITING, q] -= 1
            queues[Q_BOUNDARY_KV, q] -= kv
            queues[Q_RESIDENTS, q] += 1
            queues[Q_RESIDENT_KV, q] += kv
            scalars[I_BOUNDARY] -= 1
        i += 1
    return entered


@inlined
def start_of_queues(settings, queues):  # type: ignore[no-untyped-def]
    """Begin a walk over the outside requests: row ``Q_LEFT`` holds the next one of each queue, -1 at its end."""
    for q in range(0, queues.shape[1], settings[C_SEGMENTS]):
        queues[Q_LEFT, q] = queues[Q_HEAD, q]


@compiled
def next_in_order(settings, requests, queues):  # type: ignore[no-untyped-def]
    """The outside queue whose next request of the walk is admitted before all others; -1 if none is left.

    The order is that of ``next_outside``, which looks at heads alone.
    """
    by_class = settings[C_BY_CLASS] != 0
    best, best_rank, best_key = -1, 0, 0
    for q in range(0, queues.shape[1], settings[C_SEGMENTS]):
        r = queues[Q_LEFT, q]
        if r < 0:
            continue
        key = requests[R_KEY, r]
        rank = settings[C_ROWS + q // settings[C_SEGMENTS]] if by_class else 0
        if key >= LATE_KEY // 2:
            rank += LATE_KEY
        if best < 0 or rank < best_rank or (rank == best_rank and key < best_key):
            best, best_rank, best_key = q, rank, key
    return best


@inlined
def next_equal(a, b, i, n):  # type: ignore[no-untyped-def]
    """Smallest k >= i with a[k] == b[k]; n if there is none."""
    while i + SEARCH_BLOCK <= n:
        # Slices, and no way out of the loop: so the compiler vectorises it.
        left, right = a[i : i + SEARCH_BLOCK], b[i : i + SEARCH_BLOCK]
        found = 0
        for k in range(left.shape[0]):
            found += left[k] == right[k]
        if found > 0:
            break
        i += SEARCH_BLOCK
    while i < n and a[i] != b[i]:
        i += 1
    return i


@inlined
def next_gone(state, i, n):  # type: ignore[no-untyped-def]
    """Smallest k >= i whose slot is marked gone; n if there is none."""
    while i + SEARCH_BLOCK <= n:
        block = state[i : i + SEARCH_BLOCK]
        found = 0
        for k in range(block.shape[0]):
            found += block[k] == SLOT_GONE
        if found > 0:
            break
        i += SEARCH_BLOCK
    while i < n and state[i] != SLOT_GONE:
        i += 1
    return i


@inlined
def compact(n, slots):  # type: ignore[no-untyped-def]
    """Squeeze out slots marked gone, keeping the order. Returns the number left."""
    state = slots[S_STATE]
    w = next_gone(state, 0, n)
    i = w
    while i < n:
        i += 1
        end = next_gone(state, i, n)  # slots i..end-1 stay together: one move a row for the whole run
        if end > i:
            # Slices: an index that may be negative would keep numba from making this a block move.
            for row in range(S_ROWS):
                source = slots[row, i:end]
                target = slots[row, w : w + source.shape[0]]
                for k in range(source.shape[0]):
                    target[k] = source[k]
            w += end - i
        i = end
    return w
