"""One engine iteration for one decision (compiled).

Order within a step (rule 1): evictions the decision asks for, boundary admissions, KV for
residents with forced evictions, outside admissions, the clock, tokens and completions, arrivals.
Under ``NUMBA_DISABLE_JIT=1`` the same functions run as ordinary Python.
"""

from __future__ import annotations

import math
from typing import Any

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import give_service, mark_late, receive_arrivals, receive_inbox, refresh_heads
from llmsched_env.engine.residents import (
    await_event,
    complete,
    file_event,
    forget_event,
    join_group,
    leave_peers,
    requeue,
)
from llmsched_env.engine.state import (
    BOUNDARY,
    DECODE,
    END_FINISHED,
    END_HORIZON,
    END_ITERATIONS,
    END_STRANDED,
    END_STUCK,
    ENTERING,
    FUTURE,
    NO_END,
    NO_EVENT,
    PREFILL,
    PREFILLED,
    RATE_WINDOW_SECONDS,
    RUNNING,
    Engine,
)
from llmsched_env.pointers import call, call_back, call_float
from llmsched_env.records import reader
from llmsched_env.types import Decision

engine_at = reader(Engine)
decision_at = reader(Decision)


@compiled
def clear_queues(engine: Engine) -> None:
    """Nobody waits and nobody is resident."""
    queues, settings = engine.queues, engine.settings
    for q in range(settings.num_queues + 1):
        queues.head_arrival[q] = math.nan
        queues.arrivals[q] = 0.0
        queues.service[q] = 0.0
        queues.recent_service[q] = 0.0
        queues.counter[q] = 0.0
        queues.waiting[q] = 0
        queues.residents[q] = 0
        queues.resident_kv[q] = 0
        queues.boundary_kv[q] = 0
        queues.head_tokens[q] = 0
        queues.head_key[q] = 0
        queues.head[q] = -1
        queues.tail[q] = -1
        queues.timely[q] = -1
        queues.late[q] = 0
        queues.left[q] = 0
        queues.runs[q] = 0
        queues.steps[q] = 0
        queues.members[q] = 0
        queues.member_kv[q] = 0
        queues.phase[q] = 0
        queues.first_peer[q] = -1
        queues.last_peer[q] = -1
    if settings.paper == 0:
        for i in range(settings.num_queues * settings.block_size):
            engine.phases.count[i] = 0
    for i in range(settings.num_queues * settings.wheel_size):
        engine.wheel.first[i] = -1
    engine.num_residents = 0
    engine.num_waiting = 0
    engine.waiting_tokens = 0
    engine.num_boundary = 0
    engine.num_prefilling = 0
    engine.kv_tokens = 0
    engine.kv_blocks = 0
    engine.oldest = -1
    engine.newest = -1
    engine.next_sequence = 0
    engine.lowest_key = -1
    engine.last_left = -1


@compiled
def clear_report(engine: Engine) -> None:
    report, batch = engine.report, engine.batch
    batch.finished = (batch.finished if batch.batch_size == 0.0 else 0.0) + report.completed
    report.start = engine.clock
    report.duration = 0.0
    report.system_seconds = 0.0
    report.idle = 0
    report.forced_drain = 0
    report.admitted = 0
    report.entered = 0
    report.completed = 0
    report.arrived = 0
    report.rejected = 0
    report.evicted = 0
    report.preempted = 0
    report.kv_reserved = 0
    report.completed_tokens = 0
    report.generated_tokens = 0
    report.first_tokens = 0
    report.ttft_seconds = 0.0
    report.traced = 0
    report.out_of_range = 0


@compiled
def clear_predictions(engine: Engine) -> None:
    """Nothing has arrived, nothing has come of a prediction."""
    sums = engine.predictions
    sums.arrived = 0
    sums.completed = 0.0
    sums.predicted = 0.0
    sums.actual = 0.0
    sums.predicted_squares = 0.0
    sums.actual_squares = 0.0
    sums.products = 0.0


@compiled
def clear_request(engine: Engine, r: int) -> None:
    """Row r holds a request to come, of which only what ``hidden`` says beforehand is known."""
    requests, hidden = engine.requests, engine.hidden
    requests.prompt[r] = 0
    engine.arrived.time[r] = math.nan
    requests.status[r] = FUTURE
    requests.queue[r] = 0
    requests.outside[r] = 0
    requests.base_generated[r] = 0
    requests.base_computed[r] = 0
    requests.group[r] = engine.settings.num_queues
    requests.target[r] = 0
    requests.tokens[r] = 0
    requests.key[r] = 0
    requests.next[r] = -1
    requests.previous[r] = -1
    requests.sequence[r] = 0
    requests.next_peer[r] = -1
    requests.previous_peer[r] = -1
    hidden.evictions[r] = 0
    hidden.forced[r] = 0
    requests.output[r] = 0
    engine.arrived.predicted[r] = 0
    hidden.admitted[r] = math.nan
    hidden.first_token[r] = math.nan
    hidden.completed[r] = math.nan


@compiled
def reset(engine: Engine) -> None:
    """Start the episode whose requests are in ``hidden``: arrivals at time 0 are queued before the first decision."""
    for r in range(engine.num_requests):
        clear_request(engine, r)
    clear_queues(engine)
    engine.clock = 0.0
    engine.last_iteration = 0.0
    engine.busy_seconds = 0.0
    engine.rate_seconds = 0.0
    engine.kv_seconds = 0.0
    engine.system_seconds = 0.0
    engine.end = RUNNING
    engine.finished = 0
    engine.rejected = 0
    engine.iterations = 0
    engine.idle_steps = 0
    engine.drain_iterations = 0
    engine.evictions = 0
    engine.forced_evictions = 0
    engine.kv_peak = 0
    engine.total_tokens = 0
    engine.out_of_range = 0
    engine.flight_seconds = 0.0
    engine.flight_tokens = 0
    engine.flight_out_of_range = 0
    engine.num_first_tokens = 0
    engine.num_last_tokens = 0
    engine.cadence.since_prefill = engine.settings.prefill_interval  # the first iteration is never held back
    engine.cadence.capacity_bound = 0
    clear_predictions(engine)
    engine.pending_seconds = 0.0
    engine.due = 0.0
    engine.slowdown = 1.0
    engine.inbox = -1
    engine.inbox_end = -1
    engine.received = 0
    engine.next_arrival = 0
    engine.batch.batch_size = 0.0
    for i in range(engine.batch.memory.shape[0]):
        engine.batch.memory[i] = 0.0
    clear_report(engine)
    engine.batch.finished = 0.0
    receive_arrivals(engine, 0.0)
    refresh_heads(engine)
    if all_have_arrived(engine) and engine.num_waiting == 0:
        engine.end = END_FINISHED


# --- the parts of a step -------------------------------------------------------------------------------
@compiled
def all_have_arrived(engine: Engine) -> bool:
    """Whether no request is to come any more."""
    return engine.next_arrival == engine.num_requests and engine.more == 0


@compiled
def budget_of(engine: Engine, decision: Decision) -> int:
    """Tokens that the iteration may compute (``Decision.token_budget``)."""
    settings, asked = engine.settings, decision.token_budget
    return settings.max_num_batched_tokens if asked <= 0 else min(max(asked, settings.least_token_budget), settings.max_num_batched_tokens)


@compiled
def schedule(engine: Engine, decision: Decision, run_all: bool) -> None:
    """Boundary admissions, KV, outside admissions and the batch, by the rules of whoever schedules.

    The decision (or ``run_all``: everything) is told in ``queues.runs`` and ``queues.left``, which every scheduler reads.
    """
    queues, settings = engine.queues, engine.settings
    engine.run_all = run_all
    engine.measured_seconds = -1.0
    engine.token_budget = settings.max_num_batched_tokens if run_all else budget_of(engine, decision)
    for q in range(settings.num_queues):
        queues.runs[q] = 1 if run_all else decision.run[q]
        queues.left[q] = NO_END if run_all else decision.admit[q]
    engine.report.entered = 0
    if engine.num_boundary > 0:
        call(engine.code.enter_boundaries, engine, decision)
    call(engine.code.schedule, engine)


@compiled
def schedule_elsewhere(engine: Engine) -> None:
    """Another engine schedules (``llmsched_hardware/external.py``)."""
    call_back(engine.code.callback)


@compiled
def needs_drain(engine: Engine) -> bool:
    """The decision scheduled nothing after the last arrival: one greedy iteration replaces it (rule 14)."""
    return engine.batch.batch_size == 0.0 and engine.settings.drain != 0 and all_have_arrived(engine)


@compiled
def note_drain(engine: Engine) -> None:
    engine.report.forced_drain = 1
    engine.drain_iterations += 1
    # Where prefill waits for its interval the only decode may preempt itself: the next iteration then computes prefill.
    if engine.batch.batch_size == 0.0 and engine.report.preempted == 0:
        engine.end = END_STUCK


@compiled
def model_seconds(engine: Engine) -> float:
    """Seconds of the batch, measured or by the time model (noting whether they had to be extrapolated); 0 without a batch."""
    if engine.batch.batch_size == 0.0:
        return 0.0
    engine.batch.started = float(engine.report.admitted)
    if engine.measured_seconds >= 0.0:
        return engine.measured_seconds
    engine.batch.out_of_range = 0
    seconds = call_float(engine.code.seconds, engine.batch)
    engine.report.out_of_range = engine.batch.out_of_range
    if not 0.0 < seconds < 1e12:
        raise ValueError("engine.time_model: the seconds of an iteration must be above 0 and finite")
    return seconds * engine.slowdown


@compiled
def advance_clock(engine: Engine, clock: float) -> None:
    """Move the clock; integrate KV and the number in system, age the arrival-rate window."""
    queues, settings, report = engine.queues, engine.settings, engine.report
    seconds = clock - engine.clock
    engine.clock = clock
    report.duration = seconds
    engine.kv_seconds += seconds * report.kv_reserved
    report.system_seconds = seconds * (engine.num_waiting + engine.num_residents)
    keep = math.exp(-seconds / RATE_WINDOW_SECONDS)
    engine.rate_seconds = engine.rate_seconds * keep + RATE_WINDOW_SECONDS * (1.0 - keep)
    for q in range(0, settings.num_queues, settings.num_segments):
        queues.arrivals[q] *= keep
        queues.recent_service[q] *= keep


@compiled
def trace_batch(engine: Engine) -> None:
    """Write down who is scheduled, in order of admission."""
    requests, events = engine.requests, engine.events
    count = 0
    r = engine.oldest
    while r >= 0:
        tokens = requests.tokens[r]
        if requests.group[r] != engine.settings.num_queues:
            tokens = engine.queues.runs[requests.queue[r]]
        elif requests.status[r] == BOUNDARY:
            tokens = 0
        if tokens > 0:
            events.traced[count] = r
            events.traced_tokens[count] = tokens
            count += 1
        r = requests.next[r]
    engine.report.traced = count


@compiled
def advance_members(engine: Engine) -> int:
    """One token for every member of a group that runs. Returns how many of them something happens to (``events.due``)."""
    queues, settings, hidden = engine.queues, engine.settings, engine.hidden
    count = 0
    for q in range(settings.num_queues):
        members = queues.members[q]
        if members == 0 or queues.runs[q] == 0:
            continue
        steps = queues.steps[q] + 1
        queues.steps[q] = steps
        queues.member_kv[q] += members
        engine.kv_tokens += members
        engine.report.generated_tokens += members
        if settings.by_tenant != 0:
            give_service(engine, q - q % settings.num_segments, 0, members)
        if settings.paper != 0:
            queues.resident_kv[q] += members
        else:
            phase = queues.phase[q]
            queues.phase[q] = (settings.block_size if phase == 0 else phase) - 1
        place = q * settings.wheel_size + (steps & (settings.wheel_size - 1))
        r = engine.wheel.first[place]
        if r >= 0:
            engine.wheel.first[place] = -1
        while r >= 0:  # those of a later lap of the wheel go back
            following = hidden.next_due[r]
            if hidden.due[r] == steps:
                hidden.due[r] = NO_EVENT
                engine.events.due[count] = r
                count += 1
            else:
                file_event(engine, place, r)
            r = following
    return count


@compiled
def advance_alone(engine: Engine, count: int) -> int:
    """The tokens of those who advance by themselves. Returns the number in ``events.due`` with those who got an output token."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    alone = settings.num_queues
    r = queues.first_peer[alone]
    while r >= 0:
        following = requests.next_peer[r]
        tokens = requests.tokens[r]
        status = requests.status[r]
        if tokens > 0:
            held = requests.base_computed[r] + tokens
            requests.base_computed[r] = held
            engine.kv_tokens += tokens
            if status == PREFILL and held >= requests.target[r]:
                engine.num_prefilling -= 1
                requests.status[r] = PREFILLED
            if settings.paper != 0:
                queues.resident_kv[requests.queue[r]] += tokens
            if requests.status[r] == PREFILLED and settings.paper != 0:  # the first output token comes with stage 1
                leave_peers(engine, r)
                join_group(engine, r)
            elif requests.status[r] != PREFILL:
                requests.base_generated[r] += 1
                engine.report.generated_tokens += 1
                if settings.by_tenant != 0:
                    give_service(engine, requests.outside[r], 0, 1)
                engine.events.due[count] = r
                count += 1
        elif status == ENTERING or (status == DECODE and settings.external == 0):
            # A boundary slot without a token, or no budget was left.
            leave_peers(engine, r)
            join_group(engine, r)
        r = following
    return count


@compiled
def sort_by_admission(engine: Engine, count: int) -> None:
    """Sort the first ``count`` of ``events.due``; lists of the wheel come newest first, so the order is turned first."""
    due, sequence = engine.events.due, engine.requests.sequence
    i = 0
    j = count - 1
    while i < j:
        r = due[i]
        due[i] = due[j]
        due[j] = r
        i += 1
        j -= 1
    for i in range(1, count):
        r = due[i]
        j = i - 1
        while j >= 0 and sequence[due[j]] > sequence[r]:
            due[j + 1] = due[j]
            j -= 1
        due[j + 1] = r


@compiled
def note_first_token(engine: Engine, r: int) -> None:
    """The first output token of request r is out."""
    engine.hidden.first_token[r] = engine.clock
    engine.report.first_tokens += 1
    engine.report.ttft_seconds += engine.clock - engine.hidden.arrival[r]


@compiled
def settle(engine: Engine, r: int) -> None:
    """Resident r has just got the token at which something happens: it completes, ends its segment, or decodes on."""
    requests, hidden = engine.requests, engine.hidden
    tokens = requests.base_generated[r] + engine.queues.steps[requests.group[r]]
    if tokens == 1 and not (hidden.first_token[r] >= 0.0):  # NaN: not yet
        note_first_token(engine, r)
    if tokens == hidden.output[r]:
        complete(engine, r, tokens)
    else:
        move_on(engine, r, tokens)


@compiled
def move_on(engine: Engine, r: int, tokens: int) -> None:
    """Resident r has generated ``tokens``: it stands at the end of its segment now, or decodes on."""
    requests, settings = engine.requests, engine.settings
    member = requests.group[r] != settings.num_queues
    q = requests.queue[r]
    back = requests.status[r] == PREFILLED and tokens > 1  # computed again after an eviction: to where it was
    if back or tokens == engine.queues.segment_end[q]:
        leave_peers(engine, r)
        if settings.num_segments > 1:
            call(engine.code.place, engine, r, tokens)
        else:
            join_group(engine, r)
    elif member:  # its first token, in the paper preset, was an event
        forget_event(engine, r)
        await_event(engine, r)
    elif settings.external == 0:
        leave_peers(engine, r)
        join_group(engine, r)
    else:
        requests.status[r] = DECODE


@compiled
def give_tokens(engine: Engine) -> None:
    """Give everybody scheduled their tokens, complete requests, end segments."""
    count = advance_alone(engine, advance_members(engine))
    if count > 1:
        sort_by_admission(engine, count)
    for i in range(count):
        settle(engine, engine.events.due[i])


@compiled
def finish_step(engine: Engine, seconds: float) -> None:
    """Clock, tokens, completions and arrivals after a batch of ``seconds``, or the idle jump (rule 13)."""
    settings, report = engine.settings, engine.report
    start = report.start
    if report.kv_reserved > engine.kv_peak:
        engine.kv_peak = report.kv_reserved
    if engine.batch.batch_size > 0.0:
        if start + seconds > settings.horizon:
            engine.end = END_HORIZON
            advance_clock(engine, settings.horizon)
        else:
            engine.iterations += 1
            engine.out_of_range += report.out_of_range
            engine.last_iteration = seconds
            engine.busy_seconds += seconds
            advance_clock(engine, start + seconds)
            report.duration = seconds  # exact, where the difference of the clocks is rounded
            if settings.trace != 0:
                trace_batch(engine)
            give_tokens(engine)
    else:
        advance_clock(engine, idle_until(engine))
    close_step(engine)


@compiled
def idle_until(engine: Engine) -> float:
    """Nothing is scheduled and nothing runs: the clock's next value (rule 13)."""
    report = engine.report
    report.idle = 1
    engine.idle_steps += 1
    if report.evicted + report.preempted > 0:
        return report.start
    if engine.next_arrival < engine.num_requests:
        following = engine.hidden.arrival[engine.next_arrival]
        if following <= engine.settings.horizon:
            return following
        engine.end = END_HORIZON
        return engine.settings.horizon
    if engine.inbox >= 0:
        return engine.hidden.arrival[engine.inbox]
    if engine.more != 0:  # somebody else says until when it waits
        return engine.due
    if engine.end == RUNNING:
        engine.end = END_STRANDED
    return report.start


@compiled
def close_step(engine: Engine) -> None:
    """After clock, tokens and completions: totals, arrivals, and whether the episode goes on."""
    settings, report = engine.settings, engine.report
    engine.finished += report.completed
    engine.total_tokens += report.completed_tokens
    if engine.next_arrival < engine.num_requests:
        report.system_seconds += receive_arrivals(engine, report.start)
    if engine.inbox >= 0:
        report.system_seconds += receive_inbox(engine, report.start)
    engine.system_seconds += report.system_seconds
    if settings.late_after > 0.0:
        mark_late(engine)
    refresh_heads(engine)
    if settings.prefix_caching != 0:
        engine.kv_blocks = settings.capacity - engine.pool.free  # a shared block counts once
    if engine.end == RUNNING:
        if all_have_arrived(engine) and engine.num_waiting + engine.num_residents == 0:
            engine.end = END_FINISHED
        elif engine.iterations + engine.idle_steps >= settings.max_iterations:
            engine.end = END_ITERATIONS


# --- a step ----------------------------------------------------------------------------------------------
@compiled
def drain_if_needed(engine: Engine, decision: Decision) -> None:
    """One greedy schedule in place of a decision that schedules nothing when nobody is to come any more (rule 14)."""
    if needs_drain(engine):
        preempted = engine.report.preempted
        schedule(engine, decision, True)
        requeue(engine, engine.report.evicted, preempted)
        note_drain(engine)


@compiled
def begin_step(engine: Engine, decision: Decision) -> None:
    """The first part of a step, all that happens at its start: evictions, admissions, KV and the batch."""
    clear_report(engine)
    if engine.num_boundary > 0:
        call(engine.code.evict_boundaries, engine, decision)
    schedule(engine, decision, False)
    requeue(engine, 0, 0)


@compiled
def step(engine: Engine, decision: Decision) -> None:
    """One engine iteration, or an idle step when the decision schedules nothing."""
    begin_step(engine, decision)
    drain_if_needed(engine, decision)
    finish_step(engine, model_seconds(engine))


@compiled
def step_at(engine: Any, decision: Any) -> int:
    """A step of handles. Returns how the episode has ended, 0 while it runs."""
    record = engine_at(engine)
    call(record.code.step, record, decision_at(decision))
    return record.end


@compiled
def reset_at(engine: Any) -> None:
    """``reset`` of a handle."""
    reset(engine_at(engine))
