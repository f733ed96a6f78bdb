"""One step of asynchronous scheduling (rule 22; compiled): an iteration is scheduled while the one before it runs.

vLLM 0.28.0 ``v1/engine/core.py`` ``step_with_batch_queue`` (a queue of two batches) over ``v1/core/sched/async_scheduler.py``.
A step schedules batch k + 1 at the time at which batch k begins, then waits for the end of batch k. The tokens of a batch
count from its schedule on, as vLLM's placeholders do: what a scheduler and a policy see is what the synchronous engine has
after that batch. Only the clock stands one batch earlier, and nobody knows yet who has got its last token.
Such a request is scheduled once more, is seen as a resident, may cause or suffer a preemption, and leaves when the batch with
its last token has ended, wherever it stands by then.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import remove
from llmsched_env.engine.residents import computed, insert_peer, leave_group, note_completion, release
from llmsched_env.engine.schedule_vllm import blocks_to_take
from llmsched_env.engine.state import BOUNDARY, END_HORIZON, WAITING, Engine
from llmsched_env.engine.step import (
    advance_alone,
    advance_clock,
    advance_members,
    begin_step,
    close_step,
    drain_if_needed,
    idle_until,
    model_seconds,
    move_on,
    note_first_token,
    sort_by_admission,
    trace_batch,
)
from llmsched_env.pointers import call
from llmsched_env.types import Decision


@compiled
def tokens_of(engine: Engine, r: int) -> int:
    """Tokens of resident r in the batch just scheduled."""
    requests = engine.requests
    if requests.group[r] != engine.settings.num_queues:
        return 1 if engine.queues.runs[requests.queue[r]] != 0 else 0
    return 0 if requests.status[r] == BOUNDARY else requests.tokens[r]


@compiled
def retire(engine: Engine, r: int) -> None:
    """The last token of request r has come out. What the batch just scheduled would compute for it is thrown away."""
    requests, queues = engine.requests, engine.queues
    if requests.status[r] == WAITING:  # evicted since: the token was in flight
        remove(engine, r)
    else:
        q = requests.queue[r]
        need = blocks_to_take(engine, r, tokens_of(engine, r))  # taken for a token that ``release`` does not know of
        queues.resident_kv[q] -= need
        engine.kv_blocks -= need
        release(engine, r)
    note_completion(engine, r, engine.hidden.output[r])


@compiled
def fill_blocks(engine: Engine) -> None:
    """The tokens of the batch that has ended are known: blocks that they fill have contents (prefix caching)."""
    r = engine.oldest
    while r >= 0:
        if engine.pool.files.in_flight[r] != 0:
            call(engine.code.grow, engine.pool, r, 0, computed(engine, r) // engine.settings.block_size)
        r = engine.requests.next[r]


@compiled
def note_in_flight(engine: Engine) -> None:
    """Write down who gets an output token from the batch just scheduled (prefix caching)."""
    r = engine.oldest
    while r >= 0:
        tokens = tokens_of(engine, r)
        samples = tokens > 0 and computed(engine, r) + tokens >= engine.requests.target[r]
        engine.pool.files.in_flight[r] = 1 if samples else 0
        r = engine.requests.next[r]


@compiled
def land(engine: Engine) -> None:
    """The batch in flight has ended: its first and last tokens have their time."""
    events = engine.events
    engine.iterations += 1
    engine.out_of_range += engine.flight_out_of_range
    engine.last_iteration = engine.flight_seconds
    engine.busy_seconds += engine.flight_seconds
    engine.report.duration = engine.flight_seconds  # exact, where the difference of the clocks is rounded
    for i in range(engine.num_first_tokens):
        note_first_token(engine, events.first_tokens[i])
    if engine.settings.prefix_caching != 0:
        fill_blocks(engine)
    for i in range(engine.num_last_tokens):
        retire(engine, events.last_tokens[i])


@compiled
def settle_in_flight(engine: Engine, r: int) -> None:
    """Resident r gets, in number, the token at which something happens."""
    requests, settings, hidden = engine.requests, engine.settings, engine.hidden
    tokens = requests.base_generated[r] + engine.queues.steps[requests.group[r]]
    if tokens == 1 and not (hidden.first_token[r] >= 0.0):  # NaN: not yet
        engine.events.first_tokens[engine.num_first_tokens] = r
        engine.num_first_tokens += 1
    move_on(engine, r, tokens)
    if tokens == hidden.output[r]:
        engine.events.last_tokens[engine.num_last_tokens] = r
        engine.num_last_tokens += 1
        # One as long as any may be is given no further token, so it does not advance with its group.
        if requests.prompt[r] + tokens >= settings.longest_request and requests.group[r] != settings.num_queues:
            leave_group(engine, r)
            insert_peer(engine, settings.num_queues, r)


@compiled
def take_off(engine: Engine, seconds: float) -> None:
    """The batch just scheduled begins: everybody in it has its tokens in number."""
    engine.num_first_tokens = 0
    engine.num_last_tokens = 0
    count = 0
    if engine.settings.prefix_caching != 0:
        note_in_flight(engine)
    if engine.batch.batch_size > 0.0:
        count = advance_alone(engine, advance_members(engine))
    if count > 1:
        sort_by_admission(engine, count)
    for i in range(count):
        settle_in_flight(engine, engine.events.due[i])
    landed = engine.flight_tokens
    engine.flight_seconds = seconds
    engine.flight_tokens = engine.report.generated_tokens
    engine.flight_out_of_range = engine.report.out_of_range
    engine.report.generated_tokens = landed


@compiled
def finish_async_step(engine: Engine, seconds: float) -> None:
    """The batch in flight ends and the one just scheduled, of ``seconds``, begins (0: nothing is scheduled); or the idle jump."""
    settings, report = engine.settings, engine.report
    if report.kv_reserved > engine.kv_peak:
        engine.kv_peak = report.kv_reserved
    flying = engine.flight_seconds > 0.0
    following = report.start + engine.flight_seconds
    if not flying and engine.batch.batch_size == 0.0:
        following = idle_until(engine)
    elif engine.batch.batch_size == 0.0:
        report.idle = 1
        engine.idle_steps += 1
    if flying and following > settings.horizon:
        engine.end = END_HORIZON
        advance_clock(engine, settings.horizon)
    else:
        advance_clock(engine, following)
        if settings.trace != 0 and engine.batch.batch_size > 0.0:
            trace_batch(engine)
        if flying:
            land(engine)
        take_off(engine, seconds)
    close_step(engine)


@compiled
def async_step(engine: Engine, decision: Decision) -> None:
    """``llmsched_env.engine.step.step`` with asynchronous scheduling."""
    begin_step(engine, decision)
    if engine.flight_seconds == 0.0:
        drain_if_needed(engine, decision)
    finish_async_step(engine, model_seconds(engine))
