"""Calls on their way: released, handed to a replica, ended (compiled).

A call whose prompt and answer are computed apart is handed over twice. The replica that decodes follows vLLM 0.32.0
``v1/core/sched/scheduler.py`` ``schedule``, waiting loop, where a KV connector has the prompt and loads it in the step that admits the
request (``get_num_new_matched_tokens`` returns its tokens but the last, ``load_kv_async`` is False): blocks for all of it at admission
(``allocate_slots`` with ``num_external_computed_tokens``), one token left to compute, nothing external after a preemption. That one token
is left is vLLM's rule as well where KV is loaded beforehand (``_update_waiting_for_remote_kv``).

Simplified: the replica that prefills frees its blocks at the end of the prompt, where vLLM's keeps them until they have been read
(``_connector_finished``); a replica that decodes takes blocks when it admits the call, not for the time of the transfer as vLLM does with
``load_kv_async``; transfers do not slow each other down.
"""

from __future__ import annotations

import math

from llmsched_env.cluster import state as cs
from llmsched_env.cluster.heap import push
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.engine.parts import hand_in
from llmsched_env.engine.state import Engine
from llmsched_env.engine.step import clear_request


@compiled
def await_routing(cluster: Cluster, c: int, time: float) -> None:
    """Call c is to be routed at ``time``; of several at one time those first that were put in first."""
    push(cluster.pending, c, time, cluster.pushes)
    cluster.pushes += 1


@compiled
def settle_until(cluster: Cluster, time: float) -> None:
    """Integrate the number in system up to ``time``; nobody has arrived since it was done last."""
    seconds = time - cluster.settled
    cluster.system_seconds += cluster.in_system * seconds + cluster.left_seconds
    cluster.settled = time
    cluster.left_count = 0
    cluster.left_seconds = 0.0


@compiled
def start_program(cluster: Cluster) -> None:
    """The next program starts: its first calls are on their way."""
    p = cluster.starts.program[cluster.next_start]
    cluster.next_start += 1
    release_children(cluster, cluster.programs.child[p], cluster.programs.start[p])


@compiled
def release_children(cluster: Cluster, first: int, time: float) -> None:
    c = first
    while c >= 0:
        following = cluster.calls.sibling[c]
        await_routing(cluster, c, time + cluster.calls.arrival[c])
        c = following


# --- in -----------------------------------------------------------------------------------------------
@compiled
def class_of(cluster: Cluster, i: int, prompt: int) -> int:
    """Class of a prompt among those that replica i's policy asked for."""
    first = cluster.machines.first_edge[i]
    j = 0
    while j < cluster.machines.num_edges[i] and prompt > cluster.edges[first + j]:
        j += 1
    return j


@compiled
def hand_over(cluster: Cluster, i: int, engine: Engine) -> int:
    """The call to be routed goes to replica i. Returns 0, or ``GROW`` where it has no row for it."""
    calls, machines, hidden = cluster.calls, cluster.machines, engine.hidden
    c = cluster.row
    r = machines.free[i]
    cluster.chosen = i
    if r < 0:
        return cs.GROW
    machines.free[i] = hidden.next_due[r]
    clear_request(engine, r)
    prompt = calls.prompt[c]
    hidden.arrival[r] = cluster.clock
    hidden.prompt[r] = prompt
    hidden.output[r] = 1 if calls.part[c] == cs.PREFILLS else calls.output[c]
    hidden.outside[r] = class_of(cluster, i, prompt) * engine.settings.num_segments
    engine.foretold.predicted[r] = calls.predicted[c]
    engine.handed.call[r] = c
    engine.handed.carried[r] = prompt - 1 if calls.part[c] == cs.DECODES else 0  # the last token is computed where the answer begins
    engine.handed.cached[r] = -1
    if engine.settings.prefix_caching != 0:
        engine.pool.files.node[r] = calls.node[c]
        engine.pool.files.seat[r] = -1
        engine.pool.files.in_flight[r] = 0
    hand_in(engine, r)
    calls.replica[c] = i
    calls.routed[c] += 1
    cluster.programs.home[calls.program[c]] = i
    machines.handed[i] += 1
    machines.inbox_tokens[i] += prompt
    cluster.replicas.waiting[i] += 1
    cluster.replicas.waiting_tokens[i] += prompt
    cluster.row = -1
    cluster.events += 1
    return 0


# --- out ----------------------------------------------------------------------------------------------
@compiled
def open_rows(cluster: Cluster, i: int, engine: Engine) -> None:
    """The rows of those who ended with the last step of replica i can be used again."""
    for k in range(engine.report.completed):
        open_row(cluster, i, engine, engine.events.finished[k])


@compiled
def open_row(cluster: Cluster, i: int, engine: Engine, r: int) -> None:
    engine.hidden.next_due[r] = cluster.machines.free[i]
    cluster.machines.free[i] = r


@compiled
def take_note(cluster: Cluster, engine: Engine, r: int, c: int) -> None:
    """What request r says of call c, which leaves its replica. What was first stays: admission and first token."""
    calls, hidden = cluster.calls, engine.hidden
    if not (calls.admitted[c] >= 0.0):  # NaN: not yet
        calls.admitted[c] = hidden.admitted[r]
    if not (calls.first_token[c] >= 0.0) and calls.part[c] != cs.PREFILLS:
        calls.first_token[c] = hidden.first_token[r]
    if calls.cached[c] < 0 and calls.part[c] != cs.DECODES:
        calls.cached[c] = engine.handed.cached[r]
    calls.evictions[c] += hidden.evictions[r]


@compiled
def release_call(cluster: Cluster, i: int, engine: Engine, r: int) -> None:
    """Request r of replica i has its last token: its call ends, or goes on where it is decoded."""
    calls = cluster.calls
    c = engine.handed.call[r]
    cluster.machines.handed[i] -= 1
    take_note(cluster, engine, r, c)
    if calls.part[c] == cs.PREFILLS:
        calls.part[c] = cs.DECODES
        cluster.unreleased -= 1
        await_routing(cluster, c, engine.clock + cluster.transfer_latency + cluster.transfer_seconds * calls.prompt[c])
        return
    leave(cluster, engine.clock)
    count_completion(cluster, c, engine.clock)
    release_descendants(cluster, c, engine.clock)
    end_call(cluster, c, engine.clock, False)


@compiled
def leave(cluster: Cluster, time: float) -> None:
    """A call that had arrived leaves the system."""
    cluster.in_system -= 1
    cluster.left_count += 1
    cluster.left_seconds += time - cluster.settled
    cluster.last_end = max(cluster.last_end, time)


@compiled
def count_completion(cluster: Cluster, c: int, time: float) -> None:
    calls = cluster.calls
    cluster.completed += 1
    cluster.completed_tokens += calls.output[c]
    first = calls.first_token[c] - calls.arrival[c]
    rest = calls.output[c] - 1
    each = (time - calls.arrival[c] - first) / rest if rest > 0 else 0.0
    if first <= cluster.ttft_limit and each <= cluster.tpot_limit:
        cluster.met += 1


@compiled
def release_descendants(cluster: Cluster, c: int, time: float) -> None:
    """The calls that wait for the end of call c are on their way."""
    child = cluster.calls.child[c]
    while child >= 0:
        following = cluster.calls.sibling[child]
        cluster.unreleased -= 1
        await_routing(cluster, child, time + cluster.calls.arrival[child])
        child = following


@compiled
def refuse(cluster: Cluster) -> None:
    """No replica can ever serve the call to be routed: it is rejected, and what would have followed from it never comes."""
    calls = cluster.calls
    c = cluster.row
    leave(cluster, cluster.clock)
    cluster.rejected += 1
    if calls.part[c] == cs.PREFILLS:
        cluster.unreleased -= 1
    first = calls.child[c]
    while first >= 0:  # a stack through ``sibling``
        x = first
        first = calls.sibling[x]
        below = calls.child[x]
        while below >= 0:
            following = calls.sibling[below]
            calls.sibling[below] = first
            first = below
            below = following
        cluster.unreleased -= 2 if cluster.separated != 0 else 1
        cluster.dropped += 1
        cluster.programs.left[calls.program[x]] -= 1
        free_call(cluster, x)
    end_call(cluster, c, math.nan, True)
    cluster.row = -1


@compiled
def free_call(cluster: Cluster, c: int) -> None:
    cluster.calls.sibling[c] = cluster.free_call
    cluster.free_call = c
    cluster.free_calls += 1


@compiled
def end_call(cluster: Cluster, c: int, time: float, rejected: bool) -> None:
    """Write call c down and give its row back; with the last call of a program those of the program and its nodes."""
    calls, programs, out = cluster.calls, cluster.programs, cluster.finished
    p = calls.program[c]
    programs.left[p] -= 1
    k = cluster.num_finished
    cluster.num_finished = k + 1
    out.number[k] = calls.number[c]
    out.program[k] = programs.number[p]
    out.arrival[k] = calls.arrival[c]
    out.admitted[k] = math.nan if rejected else calls.admitted[c]  # it may have been with a replica that failed
    out.first_token[k] = math.nan if rejected else calls.first_token[c]
    out.completed[k] = time
    out.program_start[k] = programs.start[p]
    out.prompt[k] = calls.prompt[c]
    out.output[k] = calls.output[c]
    out.cached[k] = max(calls.cached[c], 0)
    out.turn[k] = calls.turn[c]
    out.app[k] = programs.app[p]
    out.replica[k] = -1 if rejected else calls.replica[c]
    out.evictions[k] = calls.evictions[c]
    out.routed[k] = calls.routed[c]
    out.ends_program[k] = 1 if programs.left[p] == 0 else 0
    out.rejected[k] = 1 if rejected else 0
    free_call(cluster, c)
    if programs.left[p] == 0:
        node = programs.node[p]
        while node >= 0:
            following = cluster.owners.next[node]
            cluster.owners.next[node] = cluster.free_node
            cluster.free_node = node
            cluster.free_nodes += 1
            node = following
        programs.next[p] = cluster.free_program
        cluster.free_program = p
        cluster.free_programs += 1
