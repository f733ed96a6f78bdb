"""What a router sees of a replica, and what happens to replicas: slow periods, drains and failures (compiled)."""

from __future__ import annotations

from llmsched_env.cluster import state as cs
from llmsched_env.cluster.hand_over import await_routing, open_row, open_rows, take_note
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.engine.prefix_cache import cached_blocks_of, forget
from llmsched_env.engine.queues import refresh_heads, remove
from llmsched_env.engine.residents import release
from llmsched_env.engine.state import PREFILL, Engine
from llmsched_env.engine.step import clear_predictions, clear_queues, clear_report


@compiled
def show(cluster: Cluster, i: int, engine: Engine) -> None:
    """Write down what replica i's metrics say now."""
    replicas, machines, requests = cluster.replicas, cluster.machines, engine.requests
    replicas.waiting[i] = machines.handed[i] - engine.num_residents
    replicas.running[i] = engine.num_residents
    replicas.waiting_tokens[i] = engine.waiting_tokens + machines.inbox_tokens[i]
    # Within a step what its batch has reserved: with prefix caching ``kv_blocks`` counts a shared block once a user until the step ends.
    replicas.kv_used[i] = engine.report.kv_reserved if machines.state[i] == cs.BEGUN else engine.kv_blocks
    tokens = 0
    if engine.num_prefilling > 0:
        r = engine.queues.first_peer[engine.settings.num_queues]
        while r >= 0:
            if requests.status[r] == PREFILL:
                tokens += requests.target[r] - requests.base_computed[r]
            r = requests.next_peer[r]
    replicas.prefill_tokens[i] = tokens


@compiled
def expected_seconds(cluster: Cluster, i: int) -> float:
    """Seconds of an iteration in which all residents of replica i decode on the KV that it uses, as its calibration has it. For routers."""
    replicas = cluster.replicas
    tokens = replicas.kv_used[i] * cluster.block_size
    return replicas.base_seconds[i] + replicas.running_seconds[i] * replicas.running[i] + replicas.kv_seconds[i] * tokens


@compiled
def may_take(cluster: Cluster, i: int) -> bool:
    """Whether replica i can be chosen for the call to be routed. For routers."""
    return (cluster.replicas.legal[i] >> cluster.call.part) & 1 != 0


@compiled
def find_legal(cluster: Cluster, tokens: int) -> None:
    """Which replicas can be chosen for a call of so many tokens, prompt and answer.

    It does not differ from call to call but for those that are longer than some replica can serve.
    """
    whole = tokens <= cluster.shortest_longest
    if whole and cluster.legal_known != 0:
        return
    replicas, machines = cluster.replicas, cluster.machines
    parts = 0
    for i in range(cluster.num_replicas):
        bit = 1 << replicas.role[i] if replicas.accepts[i] != 0 and (whole or tokens <= machines.longest[i]) else 0
        replicas.legal[i] = bit
        parts |= bit
    cluster.legal_parts = parts
    cluster.legal_known = whole


@compiled
def find_cached(cluster: Cluster, i: int, engine: Engine, c: int) -> None:
    """Tokens of call c in replica i's prefix cache, as many as it would take from there if it entered now."""
    tokens = 0
    if engine.settings.prefix_caching != 0:
        size = engine.settings.block_size
        tokens = cached_blocks_of(engine.pool, cluster.calls.node[c], (cluster.calls.prompt[c] - 1) // size) * size
    cluster.replicas.cached[i] = tokens


# --- what happens to replicas ---------------------------------------------------------------------------
@compiled
def route_again(cluster: Cluster, i: int, engine: Engine, r: int, time: float) -> None:
    """Request r leaves replica i without an end."""
    c = engine.handed.call[r]
    take_note(cluster, engine, r, c)
    cluster.machines.handed[i] -= 1
    if cluster.calls.part[c] == cs.DECODES:  # the KV that was handed to it is lost
        cluster.calls.part[c] = cs.PREFILLS
        cluster.unreleased += 1
    open_row(cluster, i, engine, r)
    await_routing(cluster, c, time)


@compiled
def empty_inbox(cluster: Cluster, i: int, engine: Engine, time: float) -> None:
    r = engine.inbox
    while r >= 0:
        following = engine.hidden.next_due[r]
        route_again(cluster, i, engine, r, time)
        r = following
    engine.inbox = -1
    engine.inbox_end = -1
    cluster.machines.inbox_tokens[i] = 0


@compiled
def stop_taking(cluster: Cluster, i: int, engine: Engine, time: float) -> None:
    """Replica i is drained: who has not been admitted yet is routed again."""
    cluster.replicas.accepts[i] = 0
    cluster.legal_known = False
    queues, settings = engine.queues, engine.settings
    for q in range(0, settings.num_queues, settings.num_segments):
        r = queues.head[q]
        while r >= 0:
            following = engine.requests.next[r]
            if not (engine.hidden.admitted[r] >= 0.0):  # NaN: never admitted
                remove(engine, r)
                route_again(cluster, i, engine, r, time)
            r = following
    refresh_heads(engine)
    empty_inbox(cluster, i, engine, time)
    show(cluster, i, engine)


@compiled
def fail(cluster: Cluster, i: int, engine: Engine, time: float) -> None:
    """Replica i is gone with its KV and its cache; all it has is routed again."""
    cluster.replicas.accepts[i] = 0
    cluster.legal_known = False
    queues, settings, requests = engine.queues, engine.settings, engine.requests
    open_rows(cluster, i, engine)
    engine.report.completed = 0
    r = engine.oldest
    while r >= 0:
        following = requests.next[r]
        release(engine, r)
        route_again(cluster, i, engine, r, time)
        r = following
    for q in range(0, settings.num_queues, settings.num_segments):
        r = queues.head[q]
        while r >= 0:
            following = requests.next[r]
            route_again(cluster, i, engine, r, time)
            r = following
    empty_inbox(cluster, i, engine, time)
    if settings.prefix_caching != 0:
        for b in range(engine.pool.num_blocks):
            forget(engine.pool, b)
    clear_queues(engine)
    clear_report(engine)
    refresh_heads(engine)
    engine.flight_seconds = 0.0
    engine.pending_seconds = 0.0
    engine.num_first_tokens = 0
    engine.num_last_tokens = 0
    engine.last_iteration = 0.0
    engine.rate_seconds = 0.0
    engine.cadence.since_prefill = settings.prefill_interval
    engine.cadence.capacity_bound = 0
    clear_predictions(engine)
    engine.batch.batch_size = 0.0
    engine.batch.finished = 0.0
    for k in range(engine.batch.memory.shape[0]):
        engine.batch.memory[k] = 0.0
    cluster.machines.state[i] = cs.DOWN
    cluster.replicas.iteration_seconds[i] = 0.0
    cluster.replicas.ttft_seconds[i] = 0.0
    show(cluster, i, engine)


@compiled
def open_again(cluster: Cluster, i: int, engine: Engine, time: float) -> None:
    """Replica i takes calls again; one that had failed begins anew, with nothing in its cache."""
    cluster.replicas.accepts[i] = 1
    cluster.legal_known = False
    if cluster.machines.state[i] == cs.DOWN:
        engine.clock = time
        engine.report.start = time
        engine.due = time
        cluster.machines.state[i] = cs.READY
