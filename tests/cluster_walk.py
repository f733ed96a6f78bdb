"""Clusters driven call by call in plain Python, and the single engines that their replicas must equal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from engine_walk import chain, check_engine

from llmsched_env.cluster import state as cs
from llmsched_env.cluster.calls import CallChunk, app_parent
from llmsched_env.cluster.finished import FINISHED_DTYPE
from llmsched_env.cluster.machine import Machine
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec, ReplicaSpec
from llmsched_env.engine import state as st
from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.engine.rules import run_constant
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EpisodeLimits
from llmsched_env.runner import rule_of
from llmsched_env.types import Decision, QueueLayout, Workload

ENGINE_FIELDS = (
    "clock",
    "last_iteration",
    "busy_seconds",
    "rate_seconds",
    "kv_seconds",
    "system_seconds",
    "end",
    "finished",
    "rejected",
    "iterations",
    "idle_steps",
    "drain_iterations",
    "evictions",
    "forced_evictions",
    "kv_peak",
    "total_tokens",
    "out_of_range",
    "kv_blocks",
    "kv_tokens",
    "num_waiting",
    "num_residents",
    "waiting_tokens",
)


class Kept:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.parts: list[npt.NDArray[Any]] = []

    def write(self, rows: npt.NDArray[Any]) -> None:
        self.parts.append(rows.copy())

    @property
    def rows(self) -> npt.NDArray[Any]:
        """(n,) of ``Finished``, by number."""
        rows = np.concatenate([np.zeros(0, FINISHED_DTYPE), *self.parts])
        return rows[np.argsort(rows["number"], kind="stable")]


@dataclass
class Routed:
    """What a replica was handed, in order."""

    time: list[float] = field(default_factory=list)
    number: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    output: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)


@dataclass
class Run:
    """A cluster's episode: ``early`` says of each replica whether it had to drain while calls were still to come."""

    sim: ClusterSim
    rows: npt.NDArray[Any]
    routed: list[Routed]
    early: list[bool]


def drive(
    sim: ClusterSim,
    chunks: Iterable[CallChunk],
    choose: Callable[[ClusterSim], int],
    app_tokens: npt.ArrayLike = (),
    watch: Callable[[ClusterSim], None] | None = None,
) -> Run:
    """Route every call by ``choose``; ``watch`` is called before each choice and at the end."""
    kept = Kept()
    sim.reset(chunks, app_tokens, kept)
    routed = [Routed() for _ in sim.machines]
    early = [False] * len(routed)
    while sim.advance():
        record = sim.record
        if watch is not None:
            watch(sim)
        for i, machine in enumerate(sim.machines):
            early[i] |= machine.record.drain_iterations > 0
        c, i = record.row, choose(sim)
        to = routed[i]
        to.time.append(record.clock)
        for name in ("number", "prompt", "output", "predicted"):
            getattr(to, name).append(int(getattr(record.calls, name)[c]))
        sim.give(i)
    if watch is not None:
        watch(sim)
    return Run(sim, kept.rows, routed, early)


def counters(record: st.Engine) -> dict[str, Any]:
    """An engine's totals, exact."""
    values: dict[str, Any] = {name: getattr(record, name) for name in ENGINE_FIELDS}
    if record.settings.prefix_caching:
        values |= {"hit_tokens": record.pool.hit_tokens, "asked_tokens": record.pool.asked_tokens, "free": record.pool.free}
    return values


# --- single engines -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Node:
    """A node as ``CallChunk`` has it, of all chunks together: ``parent`` an index, -1, or ``app_parent``."""

    parent: int
    shared: int


def nodes_of(chunks: Sequence[CallChunk]) -> tuple[list[Node], list[int]]:
    """All nodes, and the node of each call by number."""
    nodes: list[Node] = []
    of_call: list[int] = []
    for chunk in chunks:
        first = len(nodes)
        for parent, shared in zip(chunk.node_parent.tolist(), chunk.node_shared.tolist(), strict=True):
            nodes.append(Node(parent + first if parent >= 0 else parent, shared if parent != -1 else 0))
        of_call += (chunk.node + first).tolist()
    return nodes, of_call


def line(nodes: Sequence[Node], node: int) -> dict[int, float]:
    """The sequences that a node begins like, with the length of what they have in common."""
    found, common = {node: math.inf}, math.inf
    while node >= 0 and nodes[node].parent != -1:
        common = min(common, nodes[node].shared)
        node = nodes[node].parent
        found[node] = common
    return found


def shared_prompts(nodes: Sequence[Node], of_call: Sequence[int], routed: Routed) -> SharedPrompts:
    """The heads that the requests of one replica share, each with the first of the earlier ones of which it shares most."""
    lines = [line(nodes, of_call[number]) for number in routed.number]
    donor, tokens = [], []
    for k, (prompt, mine) in enumerate(zip(routed.prompt, lines, strict=True)):
        best, most = -1, 0
        for j in range(k):
            common = max((min(mine[n], other) for n, other in lines[j].items() if n in mine), default=0)
            head = int(min(common, prompt, routed.prompt[j] + routed.output[j]))
            if head > most:
                best, most = j, head
        donor.append(best)
        tokens.append(most)
    return SharedPrompts.of(donor, tokens)


def single_engine(replica: ReplicaSpec, routed: Routed, horizon: float, shared: SharedPrompts | None, more: bool) -> SimBackend:
    """The engine alone on what the replica was handed; ``more``: and on one request that arrives after the horizon."""
    late = [1] if more else []
    workload = Workload.of(
        routed.time + [horizon + 1.0 for _ in late],
        routed.prompt + late,
        routed.output + late,
        predicted_tokens=[*routed.predicted, *late] if any(routed.predicted) else None,
    )
    if shared is not None and more:
        shared = SharedPrompts.of([*shared.donor, -1], [*shared.tokens, 0])
    backend = SimBackend(shared=shared if replica.engine.enable_prefix_caching else None)
    layout = QueueLayout() if replica.policy is None else replica.policy.layout
    backend.reset(workload, layout, replica.engine, EpisodeLimits(horizon=horizon, max_iterations=2**62))
    rule = None if replica.policy is None else rule_of(replica.policy)
    if backend.done:
        return backend
    if rule is None:
        run_constant(backend, Decision.greedy(1))
    else:
        rule.reset()
        rule.play(backend)
    return backend


def check_equal(run: Run, chunks: Sequence[CallChunk], *, more: bool = False, closed: bool = False) -> int:
    """Every replica equals a single engine on what it was handed, to the last bit. Returns how many were compared.

    Args:
        more: a call was to come after the horizon.
        closed: calls follow from others.
    """
    spec = run.sim.spec
    nodes, of_call = nodes_of(chunks)
    rows = {int(row["number"]): row for row in run.rows}
    compared = 0
    for i, (replica, routed) in enumerate(zip(spec.replicas, run.routed, strict=True)):
        if run.early[i]:  # the engine that knows the arrivals to come would have waited for them
            continue
        shared = shared_prompts(nodes, of_call, routed) if replica.engine.enable_prefix_caching else None
        backend = single_engine(replica, routed, spec.horizon, shared, more)
        theirs, mine = counters(backend.record), counters(run.sim.machines[i].record)
        if closed and len(run.routed) > 1 and theirs["drain_iterations"] + mine["drain_iterations"] > 0:
            continue  # the single engine drains at its last arrival, a replica once nothing else goes on
        assert mine == theirs, (i, {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]})
        log = backend.log()
        for k, number in enumerate(routed.number):
            if math.isnan(log.completed[k]):
                assert number not in rows
                continue
            row = rows[number]
            assert (row["admitted"], row["first_token"], row["completed"]) == (log.admitted[k], log.first_token[k], log.completed[k])
            assert (row["evictions"], row["replica"], row["routed"], row["rejected"]) == (log.evictions[k], i, 1, 0)
            assert (row["prompt"], row["output"]) == (routed.prompt[k], routed.output[k])
        compared += 1
    return compared


# --- workloads ------------------------------------------------------------------------------------------
class Builder:
    """Programs put together call by call."""

    def __init__(self) -> None:
        self.start: list[float] = []
        self.calls: list[tuple[int, int, float, int, int, int, int]] = []
        self.nodes: list[tuple[int, int, int]] = []

    def program(self, start: float) -> int:
        self.start.append(start)
        return len(self.start) - 1

    def node(self, program: int, parent: int = -1, shared: int = 0) -> int:
        self.nodes.append((program, parent, shared))
        return len(self.nodes) - 1

    def call(self, program: int, node: int, prompt: int, output: int, parent: int = -1, think: float = 0.0, predicted: int = 0) -> int:
        self.calls.append((program, parent, think, prompt, output, predicted, node))
        return len(self.calls) - 1

    def chunk(self) -> CallChunk:
        program, parent, think, prompt, output, predicted, node = (list(x) for x in zip(*self.calls, strict=True))
        node_program, node_parent, node_shared = (np.array(x, dtype=np.int32) for x in zip(*self.nodes, strict=True))
        ints = [np.array(x, dtype=np.int32) for x in (program, parent, prompt, output, predicted, node)]
        made = CallChunk(
            start=np.array(self.start),
            app=np.zeros(len(self.start), np.int32),
            program=ints[0],
            parent=ints[1],
            think=np.array(think, dtype=np.float64),
            prompt_tokens=ints[2],
            output_tokens=ints[3],
            predicted_tokens=ints[4],
            node=ints[5],
            node_program=node_program,
            node_parent=node_parent,
            node_shared=node_shared,
        )
        made.check()
        return made


def open_stream(g: np.random.Generator, count: int, gap: float, longest: int) -> CallChunk:
    """Requests of which many arrive together, some at time 0, some with one output token."""
    start = np.cumsum(g.exponential(gap, count) * (g.random(count) < 0.6))
    if g.random() < 0.5:
        start = np.maximum(start - start[min(3, count - 1)], 0.0)
    if g.random() < 0.3:
        start = np.round(start, 2)
    prompt = g.integers(1, max(2, longest // 2), count)
    output = np.where(g.random(count) < 0.2, 1, g.integers(1, max(2, longest // 2), count))
    predicted = g.integers(1, longest, count) if g.random() < 0.5 else None
    return CallChunk.single(start, prompt, output, predicted)


def programs(g: np.random.Generator, count: int, gap: float, longest: int, app_tokens: int = 0) -> CallChunk:
    """Chat sessions and trees of calls; think times of 0 among them. Prompts stay within ``longest``, answer included."""
    made = Builder()
    start = np.cumsum(g.exponential(gap, count) * (g.random(count) < 0.7))
    for begin in start.tolist():
        p = made.program(begin)
        head = int(g.integers(1, app_tokens + 1)) if app_tokens and g.random() < 0.7 else 0
        node = made.node(p, app_parent(0), head) if head else made.node(p)
        prompt = head + int(g.integers(1, max(2, longest // 4)))
        output = 1 if g.random() < 0.2 else int(g.integers(1, max(2, longest // 6)))
        if prompt + output > longest:
            prompt, output = max(longest - 1, 1), 1
        whole = [(made.call(p, node, prompt, output, think=think(g)), node, prompt + output)]
        for _ in range(int(g.integers(0, 5))):
            above, node, length = whole[int(g.integers(len(whole)))]
            if g.random() < 0.5:  # a fork; else the next turn, if nobody else has gone on there
                node = made.node(p, node, int(g.integers(1, length + 1)))
            elif any(n == node and size > length for _, n, size in whole):
                node = made.node(p, node, length)
            prompt = length + int(g.integers(1, max(2, longest // 8)))
            output = 1 if g.random() < 0.2 else int(g.integers(1, max(2, longest // 8)))
            if prompt + output > longest:
                break
            whole.append((made.call(p, node, prompt, output, above, think(g)), node, prompt + output))
    made.nodes = made.nodes or [(0, -1, 0)]
    return made.chunk()


def think(g: np.random.Generator) -> float:
    return 0.0 if g.random() < 0.4 else float(np.round(g.exponential(0.05), 2))


# --- what must hold of a cluster --------------------------------------------------------------------------
def free_rows(machine: Machine, sim: ClusterSim, i: int) -> list[int]:
    """Rows of requests of replica i that are free, its list followed by hand."""
    hidden = machine.record.hidden
    return chain(sim.record.machines.free[i], hidden.next_due, len(hidden))


def inbox(record: st.Engine) -> list[int]:
    return chain(record.inbox, record.hidden.next_due, len(record.hidden))


def check_cluster(sim: ClusterSim) -> None:
    """Every replica's record is in order, and what routers are shown is a recount of it."""
    record = sim.record
    shown, machines = record.replicas, record.machines
    for i, machine in enumerate(sim.machines):
        e = machine.record
        free, handed_in = free_rows(machine, sim, i), inbox(e)
        taken = set(range(len(e.hidden))) - set(free)
        assert len(free) == len(set(free)) and not set(handed_in) & set(free)
        state = int(machines.state[i])
        inside = state == cs.BEGUN
        ended = set() if inside else set(e.events.finished[: e.report.completed].tolist()) & taken
        assert machines.handed[i] == len(taken) - len(ended)
        assert machines.inbox_tokens[i] == int(e.hidden.prompt[handed_in].sum())
        waiting = len(handed_in) + e.num_waiting
        assert (shown.waiting[i], shown.running[i]) == (waiting, e.num_residents)
        assert shown.waiting_tokens[i] == machines.inbox_tokens[i] + e.waiting_tokens
        assert 0 <= shown.kv_used[i] <= shown.kv_capacity[i] == machine.engine.num_blocks
        if e.settings.prefix_caching:
            assert shown.kv_used[i] == e.pool.num_blocks - e.pool.free
        elif not inside or e.report.kv_reserved == e.kv_blocks:
            assert shown.kv_used[i] == e.kv_blocks
        residents = chain(e.oldest, e.requests.next, len(e.hidden))
        prefills = [r for r in residents if e.requests.status[r] == st.PREFILL]
        assert shown.prefill_tokens[i] == int((e.requests.target[prefills] - e.requests.base_computed[prefills]).sum())
        assert (shown.accepts[i] == 0) if state in (cs.DOWN, cs.OVER) else True
        if state == cs.DOWN:
            assert not taken and e.kv_blocks == e.num_residents == e.num_waiting == 0
        if state != cs.DOWN and e.end != st.END_HORIZON:
            check_engine(SimpleNamespace(record=e), set(free) | ended | set(handed_in), within=inside)  # type: ignore[arg-type]


def check_end(sim: ClusterSim, rows: npt.NDArray[Any], calls: int) -> None:
    """Nothing is lost: every call has ended once, or never came because one before it was rejected; all rows are free again."""
    record = sim.record
    assert len(rows) + record.dropped == calls == record.next_number
    assert len(np.unique(rows["number"])) == len(rows) and record.in_system == record.unreleased == 0 and record.pending.count == 0
    assert (record.completed, record.rejected) == (int((rows["rejected"] == 0).sum()), int((rows["rejected"] == 1).sum()))
    done = rows[rows["rejected"] == 0]
    assert np.all(done["arrival"] <= done["admitted"]) and np.all(done["admitted"] <= done["first_token"])
    assert np.all(done["first_token"] <= done["completed"]) and np.all((done["replica"] >= 0) & (done["routed"] >= 1))
    for name in ("admitted", "first_token", "completed"):
        assert np.isnan(rows[name][rows["rejected"] == 1]).all()
    for table, free, following in (("calls", "call", "sibling"), ("programs", "program", "next"), ("owners", "node", "next")):
        rows_of = getattr(record, table)
        listed = chain(getattr(record, f"free_{free}"), getattr(rows_of, following), len(rows_of))
        assert len(set(listed)) == len(listed) == getattr(record, f"free_{free}s")
        assert len(listed) == len(rows_of) - (sim._app_tokens.size if table == "owners" else 0)
    for i, machine in enumerate(sim.machines):
        e = machine.record
        assert e.kv_blocks == e.kv_tokens == e.num_residents == e.num_waiting == e.waiting_tokens == 0 and e.inbox < 0
        assert record.machines.handed[i] == 0
        ended = set(e.events.finished[: e.report.completed].tolist()) if record.machines.state[i] != cs.OVER else set()
        assert len(set(free_rows(machine, sim, i)) | ended) == len(e.hidden)
        if e.settings.prefix_caching:
            assert e.pool.free == e.pool.num_blocks and not e.pool.blocks.users.any()
            assert e.pool.spare == len(e.pool.seats)


def system_integral(rows: npt.NDArray[Any]) -> float:
    """The latencies of all calls, none of them rejected, summed."""
    return math.fsum((rows["completed"] - rows["arrival"]).tolist())


def equal_replicas(count: int, replica: ReplicaSpec, **settings: Any) -> ClusterSim:
    return ClusterSim(ClusterSpec.equal(count, replica, **settings))
