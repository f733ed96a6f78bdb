"""How a cluster moves from one call to the next (compiled).

Replicas are advanced in the order of the ends of their steps, which a heap keeps: an iteration costs what it costs in one engine and the
logarithm of the number of replicas. Where no call can follow from a completion, a replica runs on by itself until the next call
comes, and pays for the heap once.

At one instant, completions come first, then what happens to replicas, then calls, one by one, then the next steps begin: an engine
schedules with everybody in its queue who has arrived by then, as an engine does that has known the whole workload from the start.
"""

from __future__ import annotations

import math
from typing import Any

from llmsched_env.cluster import state as cs
from llmsched_env.cluster.hand_over import await_routing, hand_over, open_rows, refuse, release_call, settle_until, start_program
from llmsched_env.cluster.heap import change, pop
from llmsched_env.cluster.replicas import fail, find_cached, find_legal, may_take, open_again, show, stop_taking
from llmsched_env.cluster.state import BEGUN, OVER, READY, Cluster
from llmsched_env.compiled import compiled
from llmsched_env.engine.parts import close_door, drain_now, open_door, stop_at_horizon, wait_until
from llmsched_env.engine.state import END_STUCK, RUNNING, Engine
from llmsched_env.engine.step import decision_at, engine_at
from llmsched_env.pointers import call, call_int
from llmsched_env.records import Numbers, reader

cluster_at = reader(Cluster)
policy_at = reader(Numbers)  # the type does not matter: rules are called with an address

ENGINE, POLICY, DECISION, RULE = 0, 1, 2, 3  # columns of the handles of a replica
"""(R, 4): handles of engine, its policy's record and decision, and the address of its policy's rule (0: the decision never changes)."""


# --- the two parts of an iteration --------------------------------------------------------------------
@compiled
def begin_on(cluster: Cluster, handles: Any, i: int, engine: Engine) -> None:
    """Replica i decides and begins a step."""
    if engine.inbox >= 0:  # they came at this very instant
        open_door(engine)
        cluster.machines.inbox_tokens[i] = 0
    decision = decision_at(handles[i, DECISION])
    if handles[i, RULE] != 0:
        call(handles[i, RULE], engine, policy_at(handles[i, POLICY]), decision)
    open_rows(cluster, i, engine)  # of those who ended with the last step: until now the policy could read them
    call(engine.code.begin, engine, decision)
    cluster.machines.state[i] = BEGUN
    if cluster.replicas.accepts[i] == 0:  # nobody is to come to a replica that is drained
        drain_now(engine, decision)


@compiled
def finish_on(cluster: Cluster, i: int, engine: Engine) -> None:
    """The step of replica i ends: completions are written down, and calls that follow from them released."""
    executed = engine.iterations
    call(engine.code.finish, engine)
    cluster.events += 1
    report, replicas = engine.report, cluster.replicas
    if engine.inbox < 0:
        cluster.machines.inbox_tokens[i] = 0
    if engine.iterations > executed:  # with asynchronous scheduling not in every step that schedules
        before = replicas.iteration_seconds[i]
        weight = cs.ITERATION_MEMORY if before > 0.0 else 1.0
        replicas.iteration_seconds[i] = before + weight * (engine.last_iteration - before)
    if report.first_tokens > 0 and replicas.role[i] != cs.PREFILLS:
        before = replicas.ttft_seconds[i]
        weight = 1.0 - (1.0 - cs.TTFT_MEMORY) ** report.first_tokens if before > 0.0 else 1.0
        replicas.ttft_seconds[i] = before + weight * (report.ttft_seconds / report.first_tokens - before)
    for k in range(report.completed):
        release_call(cluster, i, engine, engine.events.finished[k])
    cluster.machines.state[i] = READY
    if engine.end != RUNNING:
        cluster.machines.state[i] = OVER
        open_rows(cluster, i, engine)  # no policy reads them any more


@compiled
def run_first(cluster: Cluster, handles: Any, bound: float) -> int:
    """Advance the replica that is first in the heap as long as it is the first and comes before ``bound``. Returns 0 or why to stop."""
    dues, pending, machines = cluster.dues, cluster.pending, cluster.machines
    i = dues.item[0]
    engine = engine_at(handles[i, ENGINE])
    limit = bound
    if cluster.unreleased > 0:  # a completion elsewhere may release a call for this replica
        for below in range(1, min(3, dues.count)):
            limit = min(limit, dues.key[below])
    reason = 0
    while True:
        if machines.state[i] == READY:
            begin_on(cluster, handles, i, engine)
        if engine.due > limit or engine.due == math.inf:
            break
        if cluster.num_finished > cluster.finished_room:
            reason = cs.FLUSH
            break
        finish_on(cluster, i, engine)
        if engine.end == END_STUCK:
            cluster.chosen = i
            reason = cs.STUCK
            break
        if pending.count > 0:
            limit = min(limit, pending.key[0])
        if machines.state[i] == OVER or not engine.clock < limit:  # who comes at this very instant comes before the next step
            break
    place(cluster, i, engine)
    show(cluster, i, engine)
    return reason


@compiled
def place(cluster: Cluster, i: int, engine: Engine) -> None:
    """When replica i is next; of several at one time those that finish a step come before those that begin one."""
    state = cluster.machines.state[i]
    if state == BEGUN:
        change(cluster.dues, i, engine.due, i)
    elif state == READY:
        change(cluster.dues, i, engine.clock, cluster.num_replicas + i)
    else:
        cluster.replicas.accepts[i] = 0
        cluster.legal_known = False
        change(cluster.dues, i, math.inf, i)


# --- what comes next ------------------------------------------------------------------------------------
@compiled
def next_call_time(cluster: Cluster) -> float:
    """When the next call is to be routed or the next program starts, as far as is known; infinite beyond the horizon."""
    time = math.inf
    if cluster.pending.count > 0:
        time = cluster.pending.key[0]
    if cluster.next_start < cluster.num_starts:
        time = min(time, cluster.programs.start[cluster.starts.program[cluster.next_start]])
    return time if time <= cluster.horizon else math.inf


@compiled
def happen(cluster: Cluster, handles: Any) -> None:
    """The next event of the timeline."""
    timeline = cluster.timeline
    k = cluster.next_event
    cluster.next_event = k + 1
    i, time, kind = timeline.replica[k], timeline.time[k], timeline.kind[k]
    engine = engine_at(handles[i, ENGINE])
    state = cluster.machines.state[i]
    if kind == cs.SLOW_DOWN:
        engine.slowdown = timeline.value[k]
    elif state != OVER:
        if kind == cs.DRAIN and state != cs.DOWN:
            stop_taking(cluster, i, engine, time)
            if state == BEGUN:  # one that holds somebody back need not wait for others any more
                wait_until(engine, time)
        elif kind == cs.FAIL and state != cs.DOWN:
            fail(cluster, i, engine, time)
        elif kind == cs.COME_BACK:
            open_again(cluster, i, engine, time)
        place(cluster, i, engine)


@compiled
def take_next(cluster: Cluster, time: float) -> bool:
    """The next program starts, or the next call is the one to be routed: then True."""
    pending, calls, seen = cluster.pending, cluster.calls, cluster.call
    if not (pending.count > 0 and pending.key[0] == time):
        start_program(cluster)
        return False
    c = pop(pending)
    cluster.row, cluster.clock, cluster.chosen = c, time, -1
    settle_until(cluster, time)
    if calls.arrived[c] == 0:
        calls.arrived[c] = 1
        calls.arrival[c] = time
        cluster.in_system += 1
        cluster.arrived += 1
    p = calls.program[c]
    seen.prompt = calls.prompt[c]
    seen.predicted = calls.predicted[c]
    seen.program = cluster.programs.number[p]
    seen.turn = calls.turn[c]
    seen.app = cluster.programs.app[p]
    seen.home = cluster.programs.home[p]
    seen.part = calls.part[c]
    seen.routed = calls.routed[c]
    seen.age = time - calls.arrival[c]
    return True


@compiled
def can_be_routed(cluster: Cluster, handles: Any) -> bool:
    """Whether a replica can be chosen for the call. If not it waits for something to happen to a replica, or is rejected."""
    calls, c = cluster.calls, cluster.row
    tokens = calls.prompt[c] + calls.output[c]
    find_legal(cluster, tokens)
    if (cluster.legal_parts >> cluster.call.part) & 1 != 0:
        if cluster.shows_cached != 0:
            for i in range(cluster.num_replicas):
                find_cached(cluster, i, engine_at(handles[i, ENGINE]), c)
        return True
    if tokens <= cluster.longest_longest and cluster.next_event < cluster.num_events:
        await_routing(cluster, c, cluster.timeline.time[cluster.next_event])
        cluster.row = -1
    else:
        refuse(cluster)
    return False


@compiled
def close_doors(cluster: Cluster, handles: Any) -> None:
    """No call is to come any more: engines whose policy holds somebody back are drained, and then end."""
    cluster.doors_closed = True
    for i in range(cluster.num_replicas):
        engine = engine_at(handles[i, ENGINE])
        if cluster.machines.state[i] == READY or cluster.machines.state[i] == BEGUN:
            close_door(engine, decision_at(handles[i, DECISION]), cluster.machines.state[i] == BEGUN)
            if engine.end != RUNNING:
                cluster.machines.state[i] = OVER
                open_rows(cluster, i, engine)
            place(cluster, i, engine)


@compiled
def latest_time(cluster: Cluster, handles: Any) -> float:
    """The time of the latest thing that has happened."""
    time = cluster.clock
    for i in range(cluster.num_replicas):
        time = max(time, engine_at(handles[i, ENGINE]).clock)
    if cluster.next_event > 0:
        time = max(time, cluster.timeline.time[cluster.next_event - 1])
    return time


@compiled
def drain_all(cluster: Cluster, handles: Any) -> bool:
    """The calls to come wait for others that engines hold back: each such engine runs one greedy iteration. Whether there is one.

    One that has waited for some time decides once more first, so that its iteration begins now.
    """
    any_drained = False
    now = latest_time(cluster, handles)
    for i in range(cluster.num_replicas):
        engine = engine_at(handles[i, ENGINE])
        if cluster.machines.state[i] != BEGUN or engine.due < math.inf or engine.num_waiting + engine.num_residents == 0:
            continue
        if engine.report.start < now:
            wait_until(engine, now)
            any_drained = True
        elif drain_now(engine, decision_at(handles[i, DECISION])):
            any_drained = True
        place(cluster, i, engine)
        show(cluster, i, engine)
    return any_drained


@compiled
def comes_too_late(cluster: Cluster) -> bool:
    """Whether calls are known that would have to be routed after the horizon."""
    return cluster.pending.count > 0 or cluster.next_start < cluster.num_starts


@compiled
def stop_all(cluster: Cluster, handles: Any) -> bool:
    """The calls to come will not come before the horizon: engines that wait wait until then. Whether there is one."""
    any_stopped = False
    if cluster.horizon < math.inf:
        for i in range(cluster.num_replicas):
            engine = engine_at(handles[i, ENGINE])
            if cluster.machines.state[i] == BEGUN and engine.due == math.inf:
                stop_at_horizon(engine)
                place(cluster, i, engine)
                any_stopped = True
    return any_stopped


@compiled
def advance(cluster: Cluster, handles: Any, events: int) -> int:
    """Go on to the next call that is to be routed, for at most so many events. Returns why it stops."""
    stop = cluster.events + events
    dues, machines = cluster.dues, cluster.machines
    while True:
        if cluster.next_start == cluster.num_starts and cluster.stream_ended == 0:
            return cs.REFILL
        coming = next_call_time(cluster)
        event = cluster.timeline.time[cluster.next_event] if cluster.next_event < cluster.num_events else math.inf
        if event > cluster.horizon:
            event = math.inf
        bound = min(coming, event)
        if bound == math.inf and cluster.doors_closed == 0 and cluster.unreleased == 0 and not comes_too_late(cluster):
            close_doors(cluster, handles)
        first = dues.key[0]
        if first < bound or (first == bound and first < math.inf and machines.state[dues.item[0]] == BEGUN):
            reason = run_first(cluster, handles, bound)
            if reason != 0:
                return reason
            if cluster.events >= stop:
                return cs.PAUSE
        elif event <= coming and event < math.inf:
            if coming == math.inf and cluster.in_system == 0 and cluster.unreleased == 0:
                cluster.next_event = cluster.num_events  # there is nobody left to whom it would matter
            elif coming < math.inf or (first < math.inf and cluster.unreleased > 0) or not drain_all(cluster, handles):
                happen(cluster, handles)
        elif coming < math.inf:
            if cluster.num_finished > cluster.finished_room:
                return cs.FLUSH
            if take_next(cluster, coming) and can_be_routed(cluster, handles):
                return cs.DECIDE
        elif cluster.doors_closed != 0 or comes_too_late(cluster) or not drain_all(cluster, handles):
            if cluster.doors_closed == 0 and stop_all(cluster, handles):
                continue
            end = max(cluster.last_end, cluster.settled)
            if cluster.in_system > 0 and cluster.horizon < math.inf:  # which has stopped them
                end = cluster.horizon
            settle_until(cluster, end)
            return cs.ENDED


@compiled
def give(cluster: Cluster, handles: Any, i: int) -> int:
    """The call to be routed goes to replica i. Returns 0 or ``GROW``."""
    engine = engine_at(handles[i, ENGINE])
    reason = hand_over(cluster, i, engine)
    if reason == 0 and cluster.machines.state[i] == BEGUN:
        place(cluster, i, engine)
    return reason


@compiled
def advance_at(cluster: Any, handles: Any, events: int) -> int:
    """``advance`` of a handle."""
    return advance(cluster_at(cluster), handles, events)


@compiled
def give_at(cluster: Any, handles: Any, i: int) -> int:
    """``give`` of a handle."""
    return give(cluster_at(cluster), handles, i)


@compiled
def play_at(cluster: Any, handles: Any, router: int, own: Any, events: int) -> int:
    """Route by a compiled rule until something has to be done in Python. Returns why; ``DECIDE``: the rule's choice is not allowed.

    Args:
        router: address of the rule, ``(cluster, own) -> replica``; own: handle of its record.
    """
    record = cluster_at(cluster)
    stop = record.events + events
    reason = cs.DECIDE if record.row >= 0 else 0
    while True:
        if reason == cs.DECIDE:
            if record.chosen < 0:  # else the engine's tables have just grown for it
                record.chosen = call_int(router, record, policy_at(own))
            if record.chosen < 0 or record.chosen >= record.num_replicas or not may_take(record, record.chosen):
                return cs.DECIDE
            reason = give(record, handles, record.chosen)
        if reason != 0:
            return reason
        reason = advance(record, handles, max(stop - record.events, 1))
        if reason != cs.DECIDE:
            return reason
