"""``ClusterSim``: replicas built from their settings, and the loop between compiled code and Python."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numba
import numpy as np
import numpy.typing as npt

from llmsched_env.cluster import state as cs
from llmsched_env.cluster.calls import NO_PARENT, CallChunk
from llmsched_env.cluster.finished import Finished
from llmsched_env.cluster.heap import Heap
from llmsched_env.cluster.kernel import advance_at, give_at, play_at
from llmsched_env.cluster.loading import ChunkRecord, load_at
from llmsched_env.cluster.machine import Machine
from llmsched_env.cluster.spec import ClusterSpec
from llmsched_env.engine.state import Nodes
from llmsched_env.errors import ConfigError
from llmsched_env.records import Record

EVENTS_PER_CALL = 20_000
"""Compiled code cannot be interrupted: after so many events, some tens of milliseconds, Python looks for Ctrl-C."""
FINISHED_ROWS = 65_536
"""Calls that have ended are written out in so many at a time."""
FIRST_ROWS = 1_024
"""Rows of calls, programs and nodes to begin with; they double when they do not suffice."""


class Sink(Protocol):
    """Where calls go that have ended; ``llmsched_env.cluster.sinks`` has what there is."""

    def write(self, rows: npt.NDArray[Any]) -> None:
        """(n,) rows of ``Finished``, which are used again afterwards."""


class ClusterSim:
    """A cluster in memory.

    Attributes:
        record: the cluster; good until the next ``reset``, and read anew after every call that may have moved its tables.
        machines: its replicas, one each.
    """

    def __init__(self, spec: ClusterSpec) -> None:
        self.spec = spec
        self.machines = [Machine(replica) for replica in spec.replicas]
        self._chunks: Iterator[CallChunk] = iter(())
        self._failed = False
        self._sink: Sink | None = None
        self.record = cs.Cluster()
        self.handles = np.empty((0, 4))

    # --- an episode -------------------------------------------------------------------------------
    def reset(self, chunks: Iterable[CallChunk], app_tokens: npt.ArrayLike = (), sink: Sink | None = None) -> None:
        """Begin an episode.

        Args:
            chunks: its programs (``CallSource.chunks``), read as they are needed.
            app_tokens: (A,) tokens of the prompt heads that the programs of an application share.
            sink: gets the calls that have ended; None: they are forgotten.
        """
        apps = np.asarray(app_tokens, dtype=np.int64)
        self._app_tokens = apps
        spec, count = self.spec, len(self.machines)
        self._chunks, self._sink, self._latest_start, self._failed = iter(chunks), sink, 0.0, False
        most = max(machine.most_residents for machine in self.machines) + 2  # calls that may end in one step
        self.handles = self.handles[:0]
        self._tables: dict[str, npt.NDArray[Any]] = {
            "replicas": np.zeros(count, cs.Replicas.DTYPE),
            "machines": np.zeros(count, cs.Machines.DTYPE),
            "timeline": np.zeros(len(spec.events), cs.Timeline.DTYPE),
            "dues": Heap.empty(count),
            "edges": np.array([edge for m in self.machines for edge in m.layout.edges], dtype=np.int64),
            "finished": np.zeros(max(FINISHED_ROWS, 2 * most), Finished.DTYPE),
            "calls": np.zeros(0, cs.Calls.DTYPE),
            "programs": np.zeros(0, cs.Programs.DTYPE),
            "nodes": np.zeros(0, Nodes.DTYPE),
            "owners": np.zeros(0, cs.NodeOwners.DTYPE),
            "starts": np.zeros(0, cs.Starts.DTYPE),
            "pending": Heap.empty(0),
        }
        self._memory = np.zeros((), dtype=cs.Cluster.DTYPE)
        self.record = cs.Cluster(self._memory, **self._tables)
        record = self.record
        record.num_replicas = count
        record.row = record.free_call = record.free_program = record.free_node = record.chosen = -1
        record.block_size = spec.block_size
        record.separated = spec.separated
        record.transfer_latency, record.transfer_seconds = spec.transfer.latency, spec.transfer.seconds_per_token
        record.horizon, record.ttft_limit, record.tpot_limit = spec.horizon, spec.ttft_limit, spec.tpot_limit
        record.finished_room = len(record.finished) - most
        self._make_room(calls=FIRST_ROWS, programs=FIRST_ROWS, nodes=FIRST_ROWS + apps.size)
        self._reserve_apps(apps)
        self._start_machines()
        self._load_timeline()

    def _start_machines(self) -> None:
        record, spec = self.record, self.spec
        first_edge = 0
        for i, machine in enumerate(self.machines):
            machine.reset(spec.horizon, self._tables["nodes"])
            row = record.machines.rows[i]
            row["free"], row["longest"] = 0, machine.engine.longest_request
            row["first_edge"], row["num_edges"] = first_edge, len(machine.layout.edges)
            first_edge += len(machine.layout.edges)
            shown = record.replicas.rows[i]
            shown["kv_capacity"], shown["accepts"], shown["role"] = machine.engine.num_blocks, 1, spec.replicas[i].part
            for name, seconds in dataclasses.asdict(machine.speed).items():
                shown[f"{name}_seconds"] = seconds
            machine.record.slowdown = spec.replicas[i].slowdown
        longest = record.machines.rows["longest"]
        record.shortest_longest, record.longest_longest = int(longest.min()), int(longest.max())
        heap = record.dues
        order = np.arange(len(self.machines))
        heap.count = order.size
        heap.key[:], heap.tie[:], heap.item[:], heap.place[:] = 0.0, order.size + order, order, order
        self._bind()

    def _bind(self) -> None:
        """(R, 4) handles, see ``llmsched_env.cluster.kernel``; good in this process only."""
        self.handles = np.empty((len(self.machines), 4), dtype=object if numba.config.DISABLE_JIT else np.int64)
        for i, machine in enumerate(self.machines):
            self.handles[i] = machine.handles()

    def _load_timeline(self) -> None:
        rows = self.record.timeline.rows
        for k, event in enumerate(self.spec.events):
            rows[k]["time"], rows[k]["replica"], rows[k]["value"] = event.time, event.replica, event.value
            rows[k]["kind"] = event.code
            if event.kind == "slow_down":
                rows[k]["value"] *= self.spec.replicas[event.replica].slowdown
        self.record.num_events = len(rows)

    def _reserve_apps(self, tokens: npt.NDArray[np.int64]) -> None:
        """The first nodes are the prompt heads of applications, for ever."""
        record = self.record
        blocks = -(-tokens // record.block_size)
        for a in range(tokens.size):
            assert record.free_node == a
            record.free_node = int(record.owners.next[a])
            record.nodes.base[a], record.nodes.parent[a], record.nodes.shared[a] = record.next_base, -1, 0
            record.next_base += int(blocks[a])
            record.free_nodes -= 1

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in vars(self).items() if name not in ("record", "handles")}
        if hasattr(self, "_tables"):  # the numbers of a heap stand before its rows
            state["_counts"] = {name: Heap(self._tables[name]).count for name in ("dues", "pending")}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy goes on where the original stands, but for its chunks: those not yet read must be in a sequence."""
        counts = state.pop("_counts", None)
        vars(self).update(state)
        if counts is None:
            self.record = cs.Cluster()
            return
        for name, count in counts.items():
            rows = Heap.empty(self._tables[name].shape[0])
            rows[:] = self._tables[name]
            Heap(rows).count = count
            self._tables[name] = rows
        self.record = cs.Cluster(self._memory, **self._tables)
        for machine in self.machines:
            machine.move_nodes(self._tables["nodes"])
        self._bind()

    # --- room -------------------------------------------------------------------------------------
    def _make_room(self, *, calls: int = 0, programs: int = 0, nodes: int = 0, starts: int = 0) -> None:
        """Have at least so many rows free."""
        record, tables = self.record, self._tables
        grown = False
        for names, free, need in (
            (("calls", "pending"), "call", calls),
            (("programs",), "program", programs),
            (("nodes", "owners"), "node", nodes),
        ):
            missing = need - getattr(record, f"free_{free}s")
            if missing <= 0:
                continue
            before = tables[names[0]].shape[0]
            after = max(before + missing, 2 * before)
            for name in names:
                tables[name] = _longer(tables[name], after, with_heads=name == "pending")
            link = {"call": ("calls", "sibling"), "program": ("programs", "next"), "node": ("owners", "next")}[free]
            chain = tables[link[0]][link[1]]
            chain[before:after] = np.arange(before + 1, after + 1)
            chain[after - 1] = getattr(record, f"free_{free}")
            setattr(record, f"free_{free}", before)
            setattr(record, f"free_{free}s", getattr(record, f"free_{free}s") + after - before)
            grown = True
        if starts > tables["starts"].shape[0]:
            tables["starts"] = np.zeros(starts, cs.Starts.DTYPE)
            grown = True
        if grown:
            self.record = cs.Cluster(self._memory, **tables)
            for machine in self.machines:
                machine.move_nodes(tables["nodes"])
            if len(self.handles):
                self._bind()

    def _load(self) -> None:
        """The next chunk, or the end of the stream."""
        self._failed = True  # until the chunk is in
        chunk = next(self._chunks, None)
        self._failed = chunk is not None
        if chunk is None:
            self.record.stream_ended = True
            return
        chunk.check()
        self._check_order(chunk)
        self.spec.check_served(chunk)
        self._make_room(calls=len(chunk), programs=chunk.start.size, nodes=chunk.node_program.size, starts=chunk.start.size)
        loaded = ChunkRecord.of(chunk)  # a handle keeps nothing alive
        load_at(self.record.handle, loaded.handle)
        self._failed = False

    def _check_running(self) -> None:
        if self._failed:
            raise RuntimeError("a chunk of the workload could not be read, the episode cannot go on; call reset()")

    def _check_order(self, chunk: CallChunk) -> None:
        """Refuse what ``CallChunk.check`` cannot know: programs before those of the last chunk, heads that no application has.

        Raises:
            ConfigError: the field, the row and what is allowed.
        """
        if chunk.start.size:
            if chunk.start[0] < self._latest_start:
                raise ConfigError(
                    f"calls.start: {chunk.start[0]} in row 0, must be >= {self._latest_start}, the last start of the chunk before"
                )
            self._latest_start = float(chunk.start[-1])
        rows = np.flatnonzero(chunk.node_parent < NO_PARENT)
        apps = -2 - chunk.node_parent[rows]
        for k in np.flatnonzero(apps >= self._app_tokens.size)[:1]:
            raise ConfigError(f"calls.node_parent: application {apps[k]} in row {rows[k]}, must be one of {self._app_tokens.size}")
        heads = self._app_tokens[apps]
        for k in np.flatnonzero(chunk.node_shared[rows] > heads)[:1]:
            raise ConfigError(f"calls.node_shared: {chunk.node_shared[rows[k]]} in row {rows[k]}, must be <= {heads[k]}, its application's")

    def flush(self) -> None:
        """Hand the sink what has ended since the last time."""
        record = self.record
        if self._sink is not None and record.num_finished:
            self._sink.write(record.finished.rows[: record.num_finished])
        record.num_finished = 0

    # --- going on -----------------------------------------------------------------------------------
    def _attend(self, reason: int) -> None:
        """Do what compiled code returned for."""
        if reason == cs.REFILL:
            self._load()
        elif reason == cs.FLUSH:
            self.flush()
        elif reason == cs.GROW:
            i = self.record.chosen
            self.record.machines.free[i] = self.machines[i].grow()
            self.handles[i] = self.machines[i].handles()
        elif reason == cs.STUCK:
            engine = self.machines[self.record.chosen].record
            raise RuntimeError(
                f"replica {self.record.chosen}: the engine can schedule nothing at {engine.clock:.6f} s with "
                f"{engine.num_waiting} waiting and {engine.num_residents} resident requests"
            )

    def advance(self) -> bool:
        """Go on to the next call. Whether there is one: ``record.call``, to be handed over by ``give``."""
        self._check_running()
        return self.go_on(advance_at(self.record.handle, self.handles, EVENTS_PER_CALL))

    def go_on(self, reason: int) -> bool:
        """``advance`` from where compiled code has stopped for ``reason``."""
        while reason not in (cs.DECIDE, cs.ENDED):
            self._attend(reason)
            reason = give_at(self.record.handle, self.handles, self.record.chosen) if reason == cs.GROW else 0
            if reason == 0:
                reason = advance_at(self.record.handle, self.handles, EVENTS_PER_CALL)
        if reason == cs.ENDED:
            self.flush()
        return reason == cs.DECIDE

    @property
    def cut(self) -> bool:
        """Whether the horizon has left calls without an end."""
        record = self.record
        return record.in_system + record.unreleased + record.pending.count + record.num_starts - record.next_start > 0

    def give(self, replica: int) -> None:
        """Hand the call to a replica.

        Raises:
            RuntimeError: no call is to be handed over.
            ConfigError: a replica that it cannot go to.
        """
        self._check_running()
        if self.record.row < 0:
            raise RuntimeError("no call is to be routed; go on with advance()")
        self.check_choice(replica)
        while (reason := give_at(self.record.handle, self.handles, int(replica))) != 0:
            self._attend(reason)

    def check_choice(self, replica: Any) -> None:
        """Refuse a replica that the call cannot go to.

        Raises:
            ConfigError: not a replica, or one that refuses the call.
        """
        legal = np.flatnonzero(self.legal())
        if isinstance(replica, bool) or not isinstance(replica, int | np.integer) or replica not in legal:
            raise ConfigError(f"replica: {replica!r}, must be one of {legal.tolist()} for this call")

    def legal(self) -> npt.NDArray[np.bool_]:
        """(R,) which replicas the call can be handed to."""
        return (self.record.replicas.legal >> self.record.call.part) & 1 != 0

    def play(self, router: int, own: Record) -> None:
        """Route every call by a compiled rule, to the end.

        Args:
            router: its address; own: its record.

        Raises:
            ConfigError: the rule chooses a replica that the call cannot go to.
        """
        self._check_running()
        events = EVENTS_PER_CALL
        while True:
            start = time.perf_counter()
            reason = play_at(self.record.handle, self.handles, router, own.handle, events)
            if reason == cs.ENDED:
                self.flush()
                return
            if reason == cs.DECIDE:
                self.check_choice(int(self.record.chosen))
            if reason == cs.PAUSE:
                share = 0.1 / max(time.perf_counter() - start, 1e-6)
                events = int(min(max(events * min(share, 10.0), 1), 10_000_000))
            self._attend(reason)


def _longer(rows: npt.NDArray[Any], count: int, *, with_heads: bool) -> npt.NDArray[Any]:
    """The same rows with zeros behind them, and the numbers of the table where it has some."""
    if not with_heads:
        out: npt.NDArray[Any] = np.zeros(count, rows.dtype)
        out[: rows.shape[0]] = rows
        return out
    longer = Heap.empty(count)
    longer[: rows.shape[0]] = rows
    Heap(longer).count = Heap(rows).count
    return longer
