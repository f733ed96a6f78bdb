"""A step in two parts, for engines to which requests are handed in one by one (compiled).

Who routes requests to many engines looks at them while their batches run. So a step begins (``begin``: the batch is scheduled and
``engine.due`` says when it ends), requests may be handed in meanwhile (``hand_in``), and it finishes (``finish``: tokens, completions
and those who have arrived by then). The parts are those of ``step`` and of ``async_step``, in the same order: an engine that is handed
every request at its arrival goes through the same states, to the last bit, as one that has had them all from the start.

An engine that has scheduled nothing waits for whoever is handed in next, however long that takes: ``due`` is infinite. It is only when
nobody is to come any more (``close_door``) that one whose policy schedules nothing runs its greedy iteration (rule 14), from the time
at which it had begun to wait, as the engine that knows the whole workload does. Whoever advances it may also have it look again at some
time (``wait_until``), or say that nobody comes before the horizon (``stop_at_horizon``).

A request may come with KV that was computed elsewhere (``handed.carried``): ``schedule_vllm.admit_outside`` counts these tokens as
there and takes blocks for them, as vLLM 0.32.0 ``v1/core/sched/scheduler.py`` does with the external computed tokens of a KV connector
(``llmsched_env.cluster.hand_over`` says which lines and what is simplified).
"""

from __future__ import annotations

import math

from llmsched_env.compiled import compiled
from llmsched_env.engine.async_step import finish_async_step
from llmsched_env.engine.queues import receive_inbox, refresh_heads
from llmsched_env.engine.state import END_FINISHED, END_HORIZON, RUNNING, Engine
from llmsched_env.engine.step import begin_step, drain_if_needed, finish_step, model_seconds
from llmsched_env.types import Decision


@compiled
def set_due(engine: Engine) -> None:
    """When the step that has begun ends."""
    report = engine.report
    engine.pending_seconds = model_seconds(engine)
    if engine.flight_seconds > 0.0:  # of the batch before, with asynchronous scheduling
        engine.due = report.start + engine.flight_seconds
    elif engine.batch.batch_size > 0.0:
        engine.due = report.start if engine.code.overlaps != 0 else report.start + engine.pending_seconds
    elif report.evicted + report.preempted > 0 or engine.end != RUNNING:  # stuck: whoever advances the engine sees it at once
        engine.due = report.start
    else:
        engine.due = math.inf
        if engine.inbox >= 0:
            engine.due = engine.hidden.arrival[engine.inbox]


@compiled
def begin(engine: Engine, decision: Decision) -> None:
    """The first part of a step."""
    begin_step(engine, decision)
    if engine.flight_seconds == 0.0:
        drain_if_needed(engine, decision)
    set_due(engine)


@compiled
def finish(engine: Engine) -> None:
    """The second part of a step, at ``engine.due``."""
    finish_step(engine, engine.pending_seconds)


@compiled
def finish_async(engine: Engine) -> None:
    """The same with asynchronous scheduling."""
    finish_async_step(engine, engine.pending_seconds)


@compiled
def hand_in(engine: Engine, r: int) -> None:
    """Request r, whose row says what it is, arrives at ``hidden.arrival[r]``: not before the clock, nor before those handed in earlier."""
    engine.hidden.next_due[r] = -1
    if engine.inbox < 0:
        engine.inbox = r
    else:
        engine.hidden.next_due[engine.inbox_end] = r
    engine.inbox_end = r
    if engine.due == math.inf:
        engine.due = engine.hidden.arrival[r]


@compiled
def open_door(engine: Engine) -> None:
    """Before the first step: those who arrive at time 0 are queued."""
    receive_inbox(engine, 0.0)
    refresh_heads(engine)


@compiled
def close_door(engine: Engine, decision: Decision, begun: bool) -> None:
    """Nobody is to come any more. An engine that waits with nobody in it has finished; one that holds somebody back is drained."""
    engine.more = False
    waits = engine.due == math.inf or not begun
    if waits and engine.num_waiting + engine.num_residents == 0 and engine.inbox < 0 and engine.flight_seconds == 0.0:
        engine.end = END_FINISHED
    elif engine.due == math.inf:
        drain_if_needed(engine, decision)
        set_due(engine)
        if engine.due == math.inf:  # drain is off: the step ends where it began, stranded
            engine.due = engine.report.start


@compiled
def wait_until(engine: Engine, time: float) -> None:
    """An engine that waits for the next request looks again at ``time``: its idle step ends there."""
    if engine.due == math.inf:
        engine.due = time


@compiled
def stop_at_horizon(engine: Engine) -> None:
    """An engine that waits has nobody to expect before the horizon: its idle step ends there, and its episode (rule 15)."""
    if engine.due == math.inf:
        engine.due = engine.settings.horizon
        engine.end = END_HORIZON


@compiled
def drain_now(engine: Engine, decision: Decision) -> bool:
    """An engine that waits for the next request runs one greedy iteration instead, if it drains and has anybody. Whether it does."""
    if engine.due < math.inf or engine.num_waiting + engine.num_residents == 0:
        return False
    engine.more = False
    drain_if_needed(engine, decision)
    engine.more = True
    set_due(engine)
    return engine.due < math.inf
