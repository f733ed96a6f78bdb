"""One engine iteration for one decision (compiled).

Order within a step (design rule 1): evictions the decision asks for, boundary admissions, KV for
residents with forced evictions, outside admissions, the clock, tokens and completions, arrivals.
Under ``NUMBA_DISABLE_JIT=1`` the same functions run as ordinary Python.
"""

from __future__ import annotations

import math

from llmsched_env.compiled import compiled, inlined
from llmsched_env.engine.moves import (
    compact,
    enter_boundaries,
    evict_boundaries,
    mark_late,
    next_equal,
    push_back,
    release_kv,
    requeue,
)
from llmsched_env.engine.paper import schedule_paper
from llmsched_env.engine.state import (
    C_DRAIN,
    C_MAX_ITERATIONS,
    C_MAX_LEN,
    C_PRESET,
    C_SEGMENTS,
    C_TRACE,
    END_FINISHED,
    END_HORIZON,
    END_ITERATIONS,
    END_STRANDED,
    END_STUCK,
    F_BUSY_SECONDS,
    F_CLOCK,
    F_DURATION,
    F_HORIZON,
    F_KV_SECONDS,
    F_LAST_ITERATION,
    F_LATE_AFTER,
    F_RATE_SECONDS,
    F_START,
    F_STEP_SYSTEM_SECONDS,
    F_SYSTEM_SECONDS,
    I_ARRIVED,
    I_BOUNDARY,
    I_COMPLETED,
    I_COMPLETED_TOKENS,
    I_DONE,
    I_DRAIN_ITERATIONS,
    I_FINISHED,
    I_FORCED_DRAIN,
    I_GENERATED_TOKENS,
    I_IDLE,
    I_IDLE_STEPS,
    I_ITERATIONS,
    I_KV_PEAK,
    I_KV_RESERVED,
    I_KV_TOKENS,
    I_LOW_KEY,
    I_NEXT_ARRIVAL,
    I_OUT_OF_RANGE,
    I_PREFILLING,
    I_REJECTED,
    I_RESIDENTS,
    I_STEP_EVICTED,
    I_STEP_OUT_OF_RANGE,
    I_STEP_PREEMPTED,
    I_STEP_REJECTED,
    I_TOTAL_TOKENS,
    I_TRACED,
    I_UNIFORM,
    I_WAITING,
    NO_END,
    PRESET_PAPER,
    Q_BOUNDARY_KV,
    Q_HEAD,
    Q_HEAD_KEY,
    Q_HEAD_TOKENS,
    Q_LEFT,
    Q_RESIDENT_KV,
    Q_RESIDENTS,
    Q_TAIL,
    Q_TIMELY,
    Q_WAITING,
    QF_ARRIVALS,
    QF_HEAD_ARRIVAL,
    R_CLASS,
    R_GENERATED,
    R_KEY,
    R_OUTPUT,
    R_PROMPT,
    R_STATUS,
    RATE_WINDOW_SECONDS,
    S_BLOCKS,
    S_COMPUTED,
    S_GENERATED,
    S_ID,
    S_OUTPUT,
    S_PROMPT,
    S_QUEUE,
    S_SEGMENT_END,
    S_STATE,
    S_STOP,
    S_TARGET,
    S_TOKENS,
    SLOT_BOUNDARY,
    SLOT_ENTERING,
    SLOT_GONE,
    SLOT_INTERIOR,
    STATUS_FINISHED,
    STATUS_REJECTED,
    STATUS_WAITING,
    T_ARRIVAL,
    T_COMPLETED,
    T_FIRST_TOKEN,
)
from llmsched_env.engine.vllm import schedule_vllm
from llmsched_env.perf.batch import BATCH_SIZE
from llmsched_env.perf.models import iteration_time, valid


@inlined
def arrivals(start, settings, requests, times, queues, queue_f, scalars, clocks):  # type: ignore[no-untyped-def]
    """Queue every request with arrival <= clock; returns their request-seconds since ``start``."""
    clock = clocks[F_CLOCK]
    i = scalars[I_NEXT_ARRIVAL]
    num_requests = requests.shape[1]
    seconds = 0.0
    while i < num_requests and times[T_ARRIVAL, i] <= clock:
        scalars[I_ARRIVED] += 1
        longest = settings[C_MAX_LEN]
        if requests[R_PROMPT, i] + requests[R_OUTPUT, i] > longest:
            requests[R_STATUS, i] = STATUS_REJECTED
            scalars[I_REJECTED] += 1
            scalars[I_STEP_REJECTED] += 1
        else:
            q = requests[R_CLASS, i] * settings[C_SEGMENTS]
            requests[R_STATUS, i] = STATUS_WAITING
            requests[R_KEY, i] = i
            push_back(i, q, requests, queues, scalars)
            queue_f[QF_ARRIVALS, q] += math.exp((times[T_ARRIVAL, i] - clock) / RATE_WINDOW_SECONDS)
            seconds += clock - max(start, times[T_ARRIVAL, i])
        i += 1
    scalars[I_NEXT_ARRIVAL] = i
    return seconds


@inlined
def refresh_heads(settings, requests, times, queues, queue_f):  # type: ignore[no-untyped-def]
    """What a policy sees of each outside queue's head."""
    for q in range(0, queues.shape[1], settings[C_SEGMENTS]):
        head = queues[Q_HEAD, q]
        if head < 0:
            queues[Q_HEAD_TOKENS, q] = 0
            queues[Q_HEAD_KEY, q] = 0
            queue_f[QF_HEAD_ARRIVAL, q] = math.nan
        else:
            queues[Q_HEAD_TOKENS, q] = requests[R_PROMPT, head] + requests[R_GENERATED, head]
            queues[Q_HEAD_KEY, q] = requests[R_KEY, head]
            queue_f[QF_HEAD_ARRIVAL, q] = times[T_ARRIVAL, head]


@inlined
def advance_clock(clock, settings, queues, queue_f, scalars, clocks):  # type: ignore[no-untyped-def]
    """Move the clock; integrate KV and the number in system, age the arrival-rate window."""
    seconds = clock - clocks[F_CLOCK]
    clocks[F_CLOCK] = clock
    clocks[F_DURATION] = seconds
    clocks[F_KV_SECONDS] += seconds * scalars[I_KV_RESERVED]
    clocks[F_STEP_SYSTEM_SECONDS] = seconds * (scalars[I_WAITING] + scalars[I_RESIDENTS])
    keep = math.exp(-seconds / RATE_WINDOW_SECONDS)
    clocks[F_RATE_SECONDS] = clocks[F_RATE_SECONDS] * keep + RATE_WINDOW_SECONDS * (1.0 - keep)
    for q in range(0, queues.shape[1], settings[C_SEGMENTS]):
        queue_f[QF_ARRIVALS, q] *= keep


@compiled
def place(i, generated, settings, ends, slots, queues, scalars):  # type: ignore[no-untyped-def]
    """Slot i holds ``generated`` tokens and is not complete: move it to its segment or boundary queue.

    It belongs to the segment of token generated + 1, and stands in the boundary queue before it
    where ``generated`` is a segment end (design rules 9 and 10).
    """
    last = settings[C_SEGMENTS] - 1
    k = 0
    while k < last and ends[k] <= generated:
        k += 1
    q = slots[S_QUEUE, i]
    target = q - q % settings[C_SEGMENTS] + k
    kv = slots[S_COMPUTED, i] if settings[C_PRESET] == PRESET_PAPER else slots[S_BLOCKS, i]
    queues[Q_RESIDENTS, q] -= 1
    queues[Q_RESIDENT_KV, q] -= kv
    slots[S_QUEUE, i] = target
    slots[S_SEGMENT_END, i] = ends[k] if k < last else NO_END
    slots[S_STOP, i] = min(slots[S_OUTPUT, i], slots[S_SEGMENT_END, i])
    if k > 0 and ends[k - 1] == generated:
        slots[S_STATE, i] = SLOT_BOUNDARY
        queues[Q_WAITING, target] += 1
        queues[Q_BOUNDARY_KV, target] += kv
        scalars[I_BOUNDARY] += 1
    else:
        slots[S_STATE, i] = SLOT_INTERIOR
        queues[Q_RESIDENTS, target] += 1
        queues[Q_RESIDENT_KV, target] += kv


@compiled
def complete(i, settings, requests, times, slots, queues, scalars, clocks, events):  # type: ignore[no-untyped-def]
    """Slot i has its last token."""
    r = slots[S_ID, i]
    times[T_COMPLETED, r] = clocks[F_CLOCK]
    requests[R_STATUS, r] = STATUS_FINISHED
    requests[R_GENERATED, r] = slots[S_GENERATED, i]
    events[2, scalars[I_COMPLETED]] = r
    scalars[I_COMPLETED] += 1
    scalars[I_COMPLETED_TOKENS] += slots[S_GENERATED, i]
    release_kv(i, settings, slots, queues, scalars)


@inlined
def uniform_tokens(m, settings, ends, requests, times, slots, queues, scalars, clocks, events):  # type: ignore[no-untyped-def]
    """One decoded token for each of the first m slots. Returns how many of them completed.

    Two short loops that the compiler vectorises, then a search for the few slots where something
    happens: the same as the general loop below, several times as fast.
    """
    computed, generated, stop = slots[S_COMPUTED], slots[S_GENERATED], slots[S_STOP]
    for i in range(m):
        computed[i] += 1
    reached = 0
    for i in range(m):
        generated[i] += 1
        reached += generated[i] == stop[i]
    scalars[I_KV_TOKENS] += m
    scalars[I_GENERATED_TOKENS] += m
    gone = 0
    i = next_equal(generated, stop, 0, m) if reached > 0 else m
    while i < m:
        if generated[i] == slots[S_OUTPUT, i]:
            complete(i, settings, requests, times, slots, queues, scalars, clocks, events)
            gone += 1
        else:
            place(i, generated[i], settings, ends, slots, queues, scalars)
        reached -= 1
        i = next_equal(generated, stop, i + 1, m) if reached > 0 else m
    return gone
    return gone


@inlined
def tokens_and_completions(n, settings, ends, requests, times, slots, queues, scalars, clocks, events):  # type: ignore[no-untyped-def]
    """Give every scheduled slot its tokens, complete requests, end segments. Returns slots left."""
    clock = clocks[F_CLOCK]
    paper = settings[C_PRESET] == PRESET_PAPER
    gone = 0
    uniform = scalars[I_UNIFORM]
    if uniform > 0:
        gone = uniform_tokens(uniform, settings, ends, requests, times, slots, queues, scalars, clocks, events)
    for i in range(uniform, n):
        tokens = slots[S_TOKENS, i]
        if tokens == 0:
            if slots[S_STATE, i] == SLOT_ENTERING:  # variant A: the boundary slot yields no token
                slots[S_STATE, i] = SLOT_INTERIOR
            elif slots[S_STATE, i] == SLOT_GONE:
                gone += 1
            continue
        prefill = slots[S_COMPUTED, i] < slots[S_TARGET, i]
        computed = slots[S_COMPUTED, i] + tokens
        slots[S_COMPUTED, i] = computed
        scalars[I_KV_TOKENS] += tokens
        if prefill and computed >= slots[S_TARGET, i]:
            scalars[I_PREFILLING] -= 1
        if paper:
            queues[Q_RESIDENT_KV, slots[S_QUEUE, i]] += tokens
            if prefill:  # the first output token comes with stage 1
                continue
        elif computed < slots[S_PROMPT, i] + slots[S_GENERATED, i]:
            continue
        generated = slots[S_GENERATED, i] + 1
        slots[S_GENERATED, i] = generated
        scalars[I_GENERATED_TOKENS] += 1
        r = slots[S_ID, i]
        if generated == 1 and times[T_FIRST_TOKEN, r] != times[T_FIRST_TOKEN, r]:
            times[T_FIRST_TOKEN, r] = clock
        if generated == slots[S_OUTPUT, i]:
            complete(i, settings, requests, times, slots, queues, scalars, clocks, events)
            gone += 1
        elif generated == slots[S_SEGMENT_END, i] or (prefill and generated > 1):
            place(i, generated, settings, ends, slots, queues, scalars)
        elif slots[S_STATE, i] == SLOT_ENTERING:
            slots[S_STATE, i] = SLOT_INTERIOR
    return compact(n, slots) if gone > 0 else n


@compiled
def reset(settings, requests, times, queues, queue_f, scalars, clocks):  # type: ignore[no-untyped-def]
    """Arrivals at time 0 are queued before the first decision."""
    queues[:] = 0
    for q in range(queues.shape[1]):
        queues[Q_HEAD, q] = -1
        queues[Q_TAIL, q] = -1
        queues[Q_TIMELY, q] = -1
    queue_f[:] = 0.0
    scalars[:] = 0
    scalars[I_LOW_KEY] = -1
    horizon, late_after = clocks[F_HORIZON], clocks[F_LATE_AFTER]
    clocks[:] = 0.0
    clocks[F_HORIZON] = horizon
    clocks[F_LATE_AFTER] = late_after
    arrivals(0.0, settings, requests, times, queues, queue_f, scalars, clocks)
    refresh_heads(settings, requests, times, queues, queue_f)
    if scalars[I_NEXT_ARRIVAL] == requests.shape[1] and scalars[I_WAITING] == 0:
        scalars[I_DONE] = END_FINISHED


@inlined
def schedule(n, run_all, decision, settings, ends, requests, times, slots, queues, scalars, clocks, batch, events):  # type: ignore[no-untyped-def]
    """Boundary admissions, KV, outside admissions. Returns the number of slots in use."""
    scalars[I_UNIFORM] = 0
    entered = 0
    if scalars[I_BOUNDARY] > 0:
        entered = enter_boundaries(n, run_all, decision, settings, slots, queues, scalars)
    for q in range(0, queues.shape[1], settings[C_SEGMENTS]):
        queues[Q_LEFT, q] = NO_END if run_all else decision[1, q]
    clock = clocks[F_CLOCK]
    if settings[C_PRESET] == PRESET_PAPER:
        return schedule_paper(
            n, entered, run_all, clock, decision, settings, ends, requests, times, slots, queues, scalars, batch, events
        )
    return schedule_vllm(n, entered, run_all, clock, decision, settings, ends, requests, times, slots, queues, scalars, batch, events)


@inlined
def begin_step(decision, settings, requests, slots, queues, scalars, clocks, events):  # type: ignore[no-untyped-def]
    """Clear the report, evict what the decision asks for. Returns the number of slots in use."""
    for row in range(I_IDLE, I_STEP_OUT_OF_RANGE + 1):
        scalars[row] = 0
    clocks[F_START] = clocks[F_CLOCK]
    n = scalars[I_RESIDENTS]
    if scalars[I_BOUNDARY] > 0:
        evict_boundaries(n, decision, settings, requests, slots, queues, scalars, events)
        if scalars[I_STEP_EVICTED] > 0:
            n = compact(n, slots)
    return n


@inlined
def needs_drain(settings, requests, scalars, batch):  # type: ignore[no-untyped-def]
    """The decision scheduled nothing after the last arrival: one greedy iteration replaces it (design rule 14)."""
    return batch[BATCH_SIZE] == 0.0 and settings[C_DRAIN] != 0 and scalars[I_NEXT_ARRIVAL] == requests.shape[1]


@inlined
def note_drain(scalars, batch):  # type: ignore[no-untyped-def]
    scalars[I_FORCED_DRAIN] = 1
    scalars[I_DRAIN_ITERATIONS] += 1
    if batch[BATCH_SIZE] == 0.0:
        scalars[I_DONE] = END_STUCK


@compiled
def model_seconds(model, scalars, batch):  # type: ignore[no-untyped-def]
    """Seconds of the batch by the time model, which notes whether they had to be extrapolated; 0 without a batch."""
    if batch[BATCH_SIZE] == 0.0:
        return 0.0
    seconds = iteration_time(model, batch)
    if not valid(model, batch):
        scalars[I_STEP_OUT_OF_RANGE] = 1
    return seconds


@inlined
def finish_step(n, seconds, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batch, events, trace):  # type: ignore[no-untyped-def]
    """Clock, tokens, completions and arrivals after a batch of ``seconds``, or the idle jump (design rule 13)."""
    start = clocks[F_START]
    horizon = clocks[F_HORIZON]
    num_requests = requests.shape[1]
    if scalars[I_KV_RESERVED] > scalars[I_KV_PEAK]:
        scalars[I_KV_PEAK] = scalars[I_KV_RESERVED]

    if batch[BATCH_SIZE] > 0.0:
        if start + seconds > horizon:
            scalars[I_DONE] = END_HORIZON
            advance_clock(horizon, settings, queues, queue_f, scalars, clocks)
            compact(n, slots)
        else:
            scalars[I_ITERATIONS] += 1
            scalars[I_OUT_OF_RANGE] += scalars[I_STEP_OUT_OF_RANGE]
            clocks[F_LAST_ITERATION] = seconds
            clocks[F_BUSY_SECONDS] += seconds
            advance_clock(start + seconds, settings, queues, queue_f, scalars, clocks)
            clocks[F_DURATION] = seconds  # exact, where the difference of the clocks is rounded
            if settings[C_TRACE] != 0:
                traced = 0
                for i in range(n):
                    if slots[S_TOKENS, i] > 0:
                        trace[0, traced] = slots[S_ID, i]
                        trace[1, traced] = slots[S_TOKENS, i]
                        traced += 1
                scalars[I_TRACED] = traced
            tokens_and_completions(n, settings, ends, requests, times, slots, queues, scalars, clocks, events)
    else:
        scalars[I_IDLE] = 1
        scalars[I_IDLE_STEPS] += 1
        compact(n, slots)
        if scalars[I_STEP_EVICTED] + scalars[I_STEP_PREEMPTED] > 0:
            advance_clock(start, settings, queues, queue_f, scalars, clocks)
        elif scalars[I_NEXT_ARRIVAL] < num_requests:
            following = times[T_ARRIVAL, scalars[I_NEXT_ARRIVAL]]
            if following > horizon:
                scalars[I_DONE] = END_HORIZON
                following = horizon
            advance_clock(following, settings, queues, queue_f, scalars, clocks)
        else:
            if scalars[I_DONE] == 0:
                scalars[I_DONE] = END_STRANDED
            advance_clock(start, settings, queues, queue_f, scalars, clocks)

    scalars[I_UNIFORM] = 0
    scalars[I_FINISHED] += scalars[I_COMPLETED]
    scalars[I_TOTAL_TOKENS] += scalars[I_COMPLETED_TOKENS]
    clocks[F_STEP_SYSTEM_SECONDS] += arrivals(start, settings, requests, times, queues, queue_f, scalars, clocks)
    clocks[F_SYSTEM_SECONDS] += clocks[F_STEP_SYSTEM_SECONDS]
    if clocks[F_LATE_AFTER] > 0.0:
        mark_late(settings, requests, times, queues, clocks)
    refresh_heads(settings, requests, times, queues, queue_f)
    if scalars[I_DONE] == 0:
        if scalars[I_NEXT_ARRIVAL] == num_requests and scalars[I_WAITING] + scalars[I_RESIDENTS] == 0:
            scalars[I_DONE] = END_FINISHED
        elif scalars[I_ITERATIONS] + scalars[I_IDLE_STEPS] >= settings[C_MAX_ITERATIONS]:
            scalars[I_DONE] = END_ITERATIONS


@compiled
def step(decision, model, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batch, events, trace):  # type: ignore[no-untyped-def]
    """One engine iteration, or an idle step when the decision schedules nothing."""
    n = begin_step(decision, settings, requests, slots, queues, scalars, clocks, events)
    run_all = False
    preempted = 0
    while True:  # a second time where a drain iteration replaces the decision; one call, as the compiler merges it in here
        n = schedule(n, run_all, decision, settings, ends, requests, times, slots, queues, scalars, clocks, batch, events)
        if not run_all:
            requeue(events[0], 0, scalars[I_STEP_EVICTED], settings, requests, queues, scalars)
        requeue(events[1], preempted, scalars[I_STEP_PREEMPTED], settings, requests, queues, scalars)
        if run_all or not needs_drain(settings, requests, scalars, batch):
            break
        n = compact(n, slots)
        preempted = scalars[I_STEP_PREEMPTED]
        run_all = True
    if run_all:
        note_drain(scalars, batch)
    seconds = model_seconds(model, scalars, batch)
    finish_step(n, seconds, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batch, events, trace)
