"""Residents: admitted in order, grouped by segment, evicted, completed (compiled).

All residents stand in one list by admission (``engine.oldest`` .. ``engine.newest``). Each is besides in exactly one of:
the group of its segment (it decodes with the others), the boundary queue of a segment, or the list of those who
advance by themselves (row Q of ``queues``). See ``llmsched_env.engine.state``.
"""

from __future__ import annotations

import math

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import give_service, lift_counter, pop_front, push_front
from llmsched_env.engine.state import BOUNDARY, DECODE, ENTERING, FINISHED, NO_EVENT, PREDICTION_MEMORY, PREFILL, WAITING, Engine
from llmsched_env.pointers import call


@compiled
def generated(engine: Engine, r: int) -> int:
    """Tokens that request r, resident or outside, has generated and kept."""
    return engine.requests.base_generated[r] + engine.queues.steps[engine.requests.group[r]]


@compiled
def computed(engine: Engine, r: int) -> int:
    """Tokens of request r whose KV is on the GPU."""
    return engine.requests.base_computed[r] + engine.queues.steps[engine.requests.group[r]]


@compiled
def blocks_for(engine: Engine, tokens: int) -> int:
    """KV blocks that hold so many tokens."""
    size, shift = engine.settings.block_size, engine.settings.block_shift
    if shift >= 0:  # a division takes as long as the rest of an admission
        return (tokens + size - 1) >> shift
    return (tokens + size - 1) // size


@compiled
def reaches_length_limit(engine: Engine, r: int) -> bool:
    """Whether decode r, which advances by itself, has computed all that the longest request computes.

    No further token is then scheduled for it (vLLM 0.28 ``v1/core/sched/scheduler.py``: ``max_model_len - num_computed_tokens - 1``).
    Only a request that has its last token gets there: ``llmsched_env.engine.async_step``.
    """
    return engine.requests.base_computed[r] >= engine.settings.longest_request - 1


@compiled
def place_in_block(engine: Engine, tokens: int) -> int:
    """``tokens`` modulo the block size."""
    if engine.settings.block_shift >= 0:
        return tokens & (engine.settings.block_size - 1)
    return tokens % engine.settings.block_size


@compiled
def kv_of(engine: Engine, tokens: int) -> int:
    """KV units of a resident with so many tokens computed."""
    if engine.settings.paper != 0:
        return tokens
    return blocks_for(engine, tokens)


@compiled
def is_running(engine: Engine, r: int) -> bool:
    """Whether resident r is neither held nor at a boundary."""
    status = engine.requests.status[r]
    if status == BOUNDARY:
        return False
    return status == ENTERING or engine.queues.runs[engine.requests.queue[r]] != 0


@compiled
def num_running(engine: Engine) -> int:
    """Residents that are neither held nor at a boundary."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    running = 0
    for q in range(settings.num_queues):
        if queues.runs[q] != 0:
            running += queues.members[q]
    r = queues.first_peer[settings.num_queues]
    while r >= 0:
        running += is_running(engine, r)
        r = requests.next_peer[r]
    return running


# --- lists -------------------------------------------------------------------------------------------
@compiled
def insert_peer(engine: Engine, row: int, r: int) -> None:
    """Put r into a list of peers, which stays in the order of admission; r is mostly the last of them."""
    requests, queues = engine.requests, engine.queues
    before = queues.last_peer[row]
    after = -1
    while before >= 0 and requests.sequence[before] > requests.sequence[r]:
        after = before
        before = requests.previous_peer[before]
    requests.previous_peer[r] = before
    requests.next_peer[r] = after
    if before < 0:
        queues.first_peer[row] = r
    else:
        requests.next_peer[before] = r
    if after < 0:
        queues.last_peer[row] = r
    else:
        requests.previous_peer[after] = r


@compiled
def remove_peer(engine: Engine, row: int, r: int) -> None:
    requests, queues = engine.requests, engine.queues
    before, after = requests.previous_peer[r], requests.next_peer[r]
    if before < 0:
        queues.first_peer[row] = after
    else:
        requests.next_peer[before] = after
    if after < 0:
        queues.last_peer[row] = before
    else:
        requests.previous_peer[after] = before


@compiled
def file_event(engine: Engine, place: int, r: int) -> None:
    """Put r first in the list of a place of the wheel."""
    hidden = engine.hidden
    first = engine.wheel.first[place]
    hidden.next_due[r] = first
    hidden.previous_due[r] = -1
    if first >= 0:
        hidden.previous_due[first] = r
    engine.wheel.first[place] = r


@compiled
def await_event(engine: Engine, r: int) -> None:
    """Note at which step of its group something happens to member r: its last token, a segment end, or its first token."""
    requests, hidden, settings = engine.requests, engine.hidden, engine.settings
    q = requests.group[r]
    now = requests.base_generated[r] + engine.queues.steps[q]
    stop = min(hidden.output[r], engine.queues.segment_end[q])
    if now == 0:
        stop = 1  # in the paper preset the first token comes with a decode
    due = stop - requests.base_generated[r]
    hidden.due[r] = due
    file_event(engine, q * settings.wheel_size + (due & (settings.wheel_size - 1)), r)


@compiled
def forget_event(engine: Engine, r: int) -> None:
    """Member r has its own numbers soon, or its event has come already."""
    hidden, settings = engine.hidden, engine.settings
    if hidden.due[r] == NO_EVENT:
        return
    before, after = hidden.previous_due[r], hidden.next_due[r]
    if before < 0:
        place = engine.requests.group[r] * settings.wheel_size + (hidden.due[r] & (settings.wheel_size - 1))
        engine.wheel.first[place] = after
    else:
        hidden.next_due[before] = after
    if after >= 0:
        hidden.previous_due[after] = before


@compiled
def join_group(engine: Engine, r: int) -> None:
    """Request r, in no other list, decodes with its segment from the next iteration on (with another engine: by itself)."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    requests.status[r] = DECODE
    if settings.external != 0:
        insert_peer(engine, settings.num_queues, r)
        return
    q = requests.queue[r]
    steps = queues.steps[q]
    held = requests.base_computed[r]
    requests.base_generated[r] -= steps
    requests.base_computed[r] = held - steps
    requests.group[r] = q
    queues.members[q] += 1
    queues.member_kv[q] += held
    if settings.paper == 0:
        engine.phases.count[q * settings.block_size + place_in_block(engine, held - steps)] += 1
    await_event(engine, r)


@compiled
def leave_group(engine: Engine, r: int) -> None:
    """Member r has its own numbers again and is in no list."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    q = requests.group[r]
    forget_event(engine, r)
    if settings.paper == 0:
        engine.phases.count[q * settings.block_size + place_in_block(engine, requests.base_computed[r])] -= 1
    steps = queues.steps[q]
    requests.base_generated[r] += steps
    requests.base_computed[r] += steps
    requests.group[r] = settings.num_queues
    queues.members[q] -= 1
    queues.member_kv[q] -= requests.base_computed[r]


@compiled
def leave_peers(engine: Engine, r: int) -> None:
    """Take resident r out of the group or list it is in; its numbers are its own."""
    requests = engine.requests
    if requests.group[r] != engine.settings.num_queues:
        leave_group(engine, r)
    elif requests.status[r] == BOUNDARY:
        remove_peer(engine, requests.queue[r], r)
    else:
        remove_peer(engine, engine.settings.num_queues, r)


# --- in and out --------------------------------------------------------------------------------------
@compiled
def admit(engine: Engine, q: int) -> int:
    """The head of outside queue q becomes the newest resident; nothing is computed yet."""
    requests, queues = engine.requests, engine.queues
    r = pop_front(engine, q)
    if not (engine.hidden.admitted[r] >= 0.0):  # NaN: not admitted before
        engine.hidden.admitted[r] = engine.clock
        if engine.settings.by_tenant != 0:
            give_service(engine, q, requests.prompt[r], 0)
    requests.status[r] = PREFILL
    requests.sequence[r] = engine.next_sequence
    engine.next_sequence += 1
    requests.base_computed[r] = 0
    requests.target[r] = requests.prompt[r] + requests.base_generated[r]
    requests.tokens[r] = 0
    newest = engine.newest
    requests.previous[r] = newest
    requests.next[r] = -1
    if newest < 0:
        engine.oldest = r
    else:
        requests.next[newest] = r
    engine.newest = r
    insert_peer(engine, engine.settings.num_queues, r)
    queues.residents[q] += 1
    engine.num_residents += 1
    engine.num_prefilling += 1
    return r


@compiled
def release(engine: Engine, r: int) -> None:
    """Resident r gives its KV back and leaves every list and count."""
    requests, queues = engine.requests, engine.queues
    leave_peers(engine, r)
    held = requests.base_computed[r]
    kv = kv_of(engine, held)
    q = requests.queue[r]
    status = requests.status[r]
    if status == BOUNDARY:
        queues.waiting[q] -= 1
        queues.boundary_kv[q] -= kv
        engine.num_boundary -= 1
    else:
        queues.residents[q] -= 1
        queues.resident_kv[q] -= kv
    if status == PREFILL:
        engine.num_prefilling -= 1
    engine.kv_tokens -= held
    if engine.settings.paper == 0:
        engine.kv_blocks -= kv
    engine.num_residents -= 1
    before, after = requests.previous[r], requests.next[r]
    if before < 0:
        engine.oldest = after
    else:
        requests.next[before] = after
    if after < 0:
        engine.newest = before
    else:
        requests.previous[after] = before
    if engine.settings.prefix_caching != 0:
        call(engine.code.close_seat, engine.pool, r)


@compiled
def evict(engine: Engine, r: int) -> None:
    """Resident r gives up its KV; it gets the next queue key below all given so far, or keeps its own where requests have priorities.

    It joins its outside queue only after this step's admissions (``requeue``), so it can neither
    come back in the same step nor stand in the way of others (rule 3).
    """
    requests = engine.requests
    release(engine, r)
    requests.status[r] = WAITING
    requests.base_computed[r] = 0
    requests.queue[r] = requests.outside[r]
    if engine.settings.lose_progress != 0:
        requests.base_generated[r] = 0
    if engine.settings.by_priority == 0:
        requests.key[r] = engine.lowest_key
        engine.lowest_key -= 1
    engine.hidden.evictions[r] += 1
    engine.evictions += 1


@compiled
def preempt(engine: Engine, r: int) -> None:
    """The engine takes resident r's KV because memory runs short."""
    evict(engine, r)
    engine.hidden.forced[r] += 1
    engine.forced_evictions += 1
    engine.events.preempted[engine.report.preempted] = r
    engine.report.preempted += 1


@compiled
def requeue(engine: Engine, evicted: int, preempted: int) -> None:
    """Requests evicted from these places of ``events`` on go back outside: heads of their queues, newest first, or by priority."""
    for i in range(evicted, engine.report.evicted):
        put_back(engine, engine.events.evicted[i])
    for i in range(preempted, engine.report.preempted):
        put_back(engine, engine.events.preempted[i])


@compiled
def put_back(engine: Engine, r: int) -> None:
    if engine.settings.by_tenant != 0:
        lift_counter(engine, engine.requests.queue[r])
    if engine.settings.by_priority != 0:
        call(engine.code.queue_in_order, engine, r)
    else:
        push_front(engine, r)


@compiled
def complete(engine: Engine, r: int, tokens: int) -> None:
    """Resident r has its last token."""
    release(engine, r)
    note_completion(engine, r, tokens)


@compiled
def note_completion(engine: Engine, r: int, tokens: int) -> None:
    """Request r, in no list any more, has ended with so many output tokens."""
    report = engine.report
    engine.hidden.completed[r] = engine.clock
    engine.requests.status[r] = FINISHED
    engine.events.finished[report.completed] = r
    report.completed += 1
    report.completed_tokens += tokens
    if engine.arrived.predicted[r] > 0:
        judge_prediction(engine, engine.arrived.predicted[r], tokens)


@compiled
def judge_prediction(engine: Engine, predicted: int, tokens: int) -> None:
    """A request of which ``predicted`` output tokens were expected has ended with ``tokens``."""
    sums = engine.predictions
    keep = 1.0 - 1.0 / PREDICTION_MEMORY
    x, y = math.log(float(predicted)), math.log(float(tokens))
    sums.completed = keep * sums.completed + 1.0
    sums.predicted = keep * sums.predicted + x
    sums.actual = keep * sums.actual + y
    sums.predicted_squares = keep * sums.predicted_squares + x * x
    sums.actual_squares = keep * sums.actual_squares + y * y
    sums.products = keep * sums.products + x * y


@compiled
def running_members(engine: Engine):  # type: ignore[no-untyped-def]
    """(members of the queues that run, each of which decodes; tokens of KV that they attend to, the new ones included)."""
    queues = engine.queues
    decodes = 0
    decode_kv = 0
    for q in range(engine.settings.num_queues):
        if queues.runs[q] != 0:
            decodes += queues.members[q]
            decode_kv += queues.member_kv[q] + queues.members[q]
    return decodes, decode_kv
