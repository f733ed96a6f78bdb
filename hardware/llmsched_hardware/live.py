"""The engine's record (``llmsched_env.engine.state``) for the requests of a live server, which come and go.

`LiveMirror` keeps for a scheduler in production what a backend keeps for an episode, so that the same
`RecordView`, observations and policies work on it. Residents are written anew from the scheduler's own
list at every iteration; outside queues follow arrivals, admissions, preemptions and departures.
Indices are used again, so memory follows the number of requests present, not the number served.

Differences to an episode: the clock is the server's, output lengths are unknown (0 unless revealed), numbers of
admissions (``requests.sequence``) count the present residents, evictions "of the episode" are those of the current
period of ``episode_seconds``, and of the report of a step only admissions, evictions and preemptions are kept.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.engine import state as st
from llmsched_env.engine.queues import mark_late, push_back, push_front, refresh_heads, remove
from llmsched_env.engine.record_backend import RecordView, engine_tables, load_queues, load_settings
from llmsched_env.engine.residents import admit, blocks_for, insert_peer, preempt, release
from llmsched_env.engine.state import BOUNDARY, DECODE, PREFILL
from llmsched_env.engine.step import advance_clock, clear_queues, engine_at
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch
from llmsched_env.perf.base import memory_of
from llmsched_env.records import Floats, Ints, Rows, reader
from llmsched_env.types import QueueLayout

_INITIAL_REQUESTS = 256
_SUMS = tuple(field.name for field in fields(Batch))
_RENUMBER_ABOVE = st.LATE_KEY // 4  # keys are 32 bits and late ones lie above LATE_KEY / 2


class LiveRequest(Protocol):
    """What is read of a request; vLLM's ``Request`` has it."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_output_placeholders: int
    num_preemptions: int

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""


class Stays(Rows):
    """What a live server must know of each request besides, one row a request."""

    since: Floats  # seconds, since when it has waited: queued, or computed its last token; NaN: not present
    released: Ints  # 1: no longer under the policy: never held, no boundary queue
    entered: Ints  # generated tokens at which it last left a boundary queue; -1 never
    computed: Ints  # tokens at the last look


stays_at = reader(Stays)


# --- compiled: ``record`` is the record, ``engine`` its handle ----------------------------------------------
@compiled
def clear_residents(record: Any) -> None:
    """Nobody is resident; outside queues stay."""
    queues, settings = record.queues, record.settings
    for q in range(settings.num_queues + 1):
        queues.residents[q] = 0
        queues.resident_kv[q] = 0
        queues.boundary_kv[q] = 0
        queues.first_peer[q] = -1
        queues.last_peer[q] = -1
        if q % settings.num_segments != 0:
            queues.waiting[q] = 0
    record.oldest = -1
    record.newest = -1
    record.num_residents = 0
    record.num_boundary = 0
    record.num_prefilling = 0
    record.kv_tokens = 0
    record.kv_blocks = 0
    record.next_sequence = 0


@compiled
def write_resident(record: Any, r: int, held: int, tokens: int, inside: bool) -> None:
    """Request r, in no list, becomes the newest resident with so many tokens computed and present; ``inside``: no boundary stops it."""
    requests, queues, settings = record.requests, record.queues, record.settings
    generated = tokens - requests.prompt[r]
    kv = blocks_for(record, held)
    q = requests.outside[r]
    status = PREFILL
    if held >= requests.target[r]:
        first = q
        while queues.segment_end[q] <= generated:
            q += 1
        # At a segment's end and not yet let into the next one (rules 9 and 10).
        status = BOUNDARY if q > first and queues.segment_end[q - 1] == generated and not inside else DECODE
    if status == BOUNDARY:
        record.num_boundary += 1
        queues.waiting[q] += 1
        queues.boundary_kv[q] += kv
    else:
        record.num_prefilling += status == PREFILL
        queues.residents[q] += 1
        queues.resident_kv[q] += kv
    requests.status[r] = status
    requests.queue[r] = q
    requests.base_generated[r] = generated
    requests.base_computed[r] = held
    requests.tokens[r] = 0
    requests.sequence[r] = record.next_sequence
    newest = record.newest
    requests.previous[r] = newest
    requests.next[r] = -1
    if newest < 0:
        record.oldest = r
    else:
        requests.next[newest] = r
    record.newest = r
    insert_peer(record, q if status == BOUNDARY else settings.num_queues, r)
    record.next_sequence += 1
    record.num_residents += 1
    record.kv_tokens += held


@compiled
def follow(engine: Any, stays: Any, now: float, at: Any, held: Any, tokens: Any, kv_blocks: int) -> None:
    """Move the clock and write residents ``at`` (n,) by admission anew, with their computed and present tokens (n,)."""
    record, own = engine_at(engine), stays_at(stays)
    advance_clock(record, max(now, record.clock))
    clear_residents(record)
    for i in range(at.shape[0]):
        r = at[i]
        inside = own.released[r] != 0 or own.entered[r] == tokens[i] - record.requests.prompt[r]
        write_resident(record, r, held[i], tokens[i], inside)
        if held[i] != own.computed[r]:
            own.computed[r] = held[i]
            own.since[r] = now
    record.kv_blocks = kv_blocks
    record.report.kv_reserved = kv_blocks
    if record.settings.late_after > 0.0:
        mark_late(record)
    refresh_heads(record)


@compiled
def become_resident(engine: Any, r: int) -> None:
    """Request r, in no queue, is the newest resident; nothing is computed yet."""
    record = engine_at(engine)
    push_front(record, r)
    admit(record, record.requests.outside[r])


@compiled
def leave_queue(engine: Any, r: int) -> None:
    remove(engine_at(engine), r)


@compiled
def join_queue(engine: Any, r: int, at_head: bool) -> None:
    """Request r, in no queue, joins its outside queue as the head or after its last timely request."""
    record = engine_at(engine)
    if at_head:
        push_front(record, r)
    else:
        push_back(record, r, record.requests.outside[r])


@compiled
def leave_residents(engine: Any, r: int) -> None:
    release(engine_at(engine), r)


@compiled
def preempt_resident(engine: Any, r: int) -> None:
    preempt(engine_at(engine), r)


class LiveMirror:
    """State of a running scheduler in a backend's record.

    Attributes:
        view: what policies see; live.
        record: as a backend keeps it. The object is another one after a request for which memory had to grow; the view's is always
            the present one.
        stays: what the record does not hold of each request.
        residents: (n,) requests by admission, at the last ``refresh``.
        names: id of each request index.
        queued: (since, index) of requests that came to an outside queue, in order of time; entries outdate.
        overdue: released requests that stand outside, in order of release.
        resyncs: how often the state had to be rebuilt because the scheduler's was not the one expected.

    Args:
        reveal_output_length: requests arrive with their output length, which policies then see.
        episode_seconds: period after which the count of evictions starts anew.

    Raises:
        ConfigError: a layout that a server cannot classify by.
    """

    record: st.Engine
    stays: Stays

    def __init__(
        self,
        layout: QueueLayout,
        engine: EngineConfig,
        *,
        reveal_output_length: bool = False,
        episode_seconds: float = 3600.0,
    ) -> None:
        if engine.preset != "vllm":
            raise ConfigError(f"engine.preset: {engine.preset!r}, must be 'vllm' on a live server")
        if layout.by in ("type", "tenant") and layout.num_types > 1:
            raise ConfigError(f"layout.by: {layout.by!r}, but requests of a live server have no {layout.by}; must be single or prompt")
        if layout.by == "predicted":
            raise ConfigError("layout.by: 'predicted', but nothing predicts the lengths on a live server; must be single or prompt")
        if layout.reveals_output_length and not reveal_output_length:
            raise ConfigError(f"layout.by: {layout.by!r}, but a live server does not know output lengths; must be single or prompt")
        self.layout, self.engine, self.reveal_output_length = layout, engine, reveal_output_length
        self.queued: deque[tuple[float, int]] = deque()
        self.overdue: dict[int, None] = {}
        self.residents: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.resyncs = 0
        self._episode_seconds, self._episode_end = episode_seconds, episode_seconds
        self._index: dict[str, int] = {}
        self._completed: list[int] = []  # reported and not yet told
        self.names: list[str] = []
        self._free: list[int] = []
        self._next_key = 0
        self._memory = np.zeros((), dtype=st.Engine.DTYPE)
        self._model = {"model": np.ascontiguousarray(engine.time_model.pack()), "memory": memory_of(engine.time_model)}
        self._tables: dict[str, npt.NDArray[Any]] = {}
        self._allocate(_INITIAL_REQUESTS)
        record = self.record
        load_settings(record.settings, engine, layout, EpisodeLimits(drain=False), external=True)
        record.settings.reveal = reveal_output_length
        record.settings.prefix_caching = False  # which blocks requests share is the server's to know
        load_queues(record.queues, engine, layout)
        clear_queues(record)
        refresh_heads(record)
        self.view = RecordView(record, engine, layout, reveal_output_length)

    def __len__(self) -> int:
        """Requests present: outside and resident."""
        return len(self._index)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._index

    def index(self, request_id: str) -> int:
        """Where the record holds a request."""
        return self._index[request_id]

    def _allocate(self, size: int) -> None:
        """Room for so many requests; everything else stays where it is, so a view of the queues stays good."""
        old = len(self.names)
        made = engine_tables(size, self.layout.num_queues, self.engine.max_num_seqs, self.engine.block_size)
        made["stays"] = np.zeros(size, dtype=Stays.DTYPE)
        if not self._tables:
            self._tables = made
        for name in ("requests", "arrived", "hidden", "foretold", "stays"):
            made[name][:old] = self._tables[name][:old]
            self._tables[name] = made[name]
        self.stays = Stays(self._tables["stays"])
        parts: dict[str, Any] = {name: rows for name, rows in self._tables.items() if name != "stays"}
        self.record = st.Engine(self._memory, **parts, batch=self._model)
        if old:
            self.view.rebind(self.record)
        self.names.extend([""] * (size - old))
        self._free.extend(range(size - 1, old - 1, -1))

    # --- requests come and go -----------------------------------------------------------------------

    def arrive(self, request_id: str, prompt_tokens: int, arrival: float, now: float, output_tokens: int = 0) -> None:
        """A request joins its outside queue.

        Args:
            arrival, now: seconds on the server's clock: when the request reached the server, and the present.
            output_tokens: read only where output lengths are revealed.
        """
        r = self._take_index(request_id, prompt_tokens, arrival, output_tokens)
        requests, queues = self.record.requests, self.record.queues
        requests.key[r] = self._next_key
        self._next_key += 1
        self._queue_up(r, now)
        join_queue(self.record.handle, r, False)
        queues.arrivals[requests.outside[r]] += math.exp((arrival - self.record.clock) / st.RATE_WINDOW_SECONDS)
        if self._next_key > _RENUMBER_ABOVE:
            self._renumber()

    def _take_index(self, request_id: str, prompt_tokens: int, arrival: float, output_tokens: int) -> int:
        """A place in the record for a new request, which is in no queue."""
        if not self._free:
            self._allocate(2 * len(self.names))
        r = self._free.pop()
        self.names[r] = request_id
        self._index[request_id] = r
        layout, requests, hidden, stays = self.layout, self.record.requests, self.record.hidden, self.stays
        known = output_tokens if self.reveal_output_length else 0
        size = float(layout.work(prompt_tokens, known)) if layout.by == "work" else known if layout.by == "output" else prompt_tokens
        j = bisect_left(layout.edges, size) if layout.edges else 0
        for table in (requests, hidden, stays):
            table.rows[r] = 0
        self.record.arrived.time[r] = arrival
        requests.prompt[r] = hidden.prompt[r] = prompt_tokens
        requests.output[r] = hidden.output[r] = known
        requests.queue[r] = requests.outside[r] = hidden.outside[r] = layout.queue(j)
        requests.group[r] = layout.num_queues
        requests.status[r] = st.WAITING
        hidden.arrival[r] = arrival
        hidden.admitted[r] = hidden.first_token[r] = hidden.completed[r] = math.nan
        stays.entered[r] = -1
        return r

    def _queue_up(self, r: int, now: float) -> None:
        self.stays.since[r] = now
        if self.stays.released[r]:
            self.overdue[r] = None
        else:
            self.queued.append((now, r))

    def leave(self, request_id: str) -> None:
        """A request has finished or was aborted; unknown ones are ignored."""
        r = self._index.pop(request_id, None)
        if r is None:
            return
        if self.record.requests.status[r] == st.WAITING:
            leave_queue(self.record.handle, r)
        else:
            leave_residents(self.record.handle, r)
        self._forget(r)

    def complete(self, request_id: str, output_tokens: int) -> None:
        """A request has its last token: until the policy has been told, the record shows it among ``events.finished``."""
        r = self._index.get(request_id)
        record = self.record
        if r is None or record.requests.status[r] == st.WAITING or record.report.completed >= len(record.events.finished):
            return
        del self._index[request_id]
        leave_residents(record.handle, r)
        record.requests.status[r] = st.FINISHED
        record.requests.group[r] = self.layout.num_queues  # counts nothing: what was generated stands in the row itself
        record.requests.base_generated[r] = output_tokens
        record.events.finished[record.report.completed] = r
        record.report.completed += 1
        record.report.completed_tokens += output_tokens
        self._completed.append(r)

    def told(self) -> None:
        """The policy has been asked: what was reported to it is over."""
        report = self.record.report
        report.completed = report.completed_tokens = 0
        report.duration, report.idle = 0.0, True
        for r in self._completed:
            self._forget(r)
        self._completed.clear()

    def _forget(self, r: int) -> None:
        self.record.requests.status[r] = st.FUTURE
        self.record.arrived.time[r] = math.nan
        self.stays.released[r] = 0
        self.overdue.pop(r, None)
        self.stays.since[r] = math.nan  # outdates its entry in ``queued``
        self.names[r] = ""
        self._free.append(r)

    def _renumber(self) -> None:
        """Move queue keys back towards 0; policies only compare them."""
        waiting = np.flatnonzero(self.record.requests.status == st.WAITING)
        keys = self.record.requests.key
        plain = keys[waiting] - np.where(keys[waiting] >= st.LATE_KEY // 2, st.LATE_KEY, 0)
        arrived = plain[plain >= 0]
        shift = int(arrived.min()) if arrived.size else self._next_key
        keys[waiting] -= np.where(plain >= 0, shift, 0).astype(np.int32)
        self._next_key -= shift
        if not (plain < 0).any():
            self.record.lowest_key = -1

    # --- iterations -----------------------------------------------------------------------------------

    def refresh(self, now: float, running: Sequence[LiveRequest], waiting: Collection[LiveRequest], kv_blocks: int) -> None:
        """Bring everything to the state before an iteration.

        Args:
            running: residents in admission order.
            waiting: requests outside, read only to find out whether the mirror has lost track.
            kv_blocks: blocks in use.
        """
        record, index = self.record, self._index
        at = np.array([index.get(r.request_id, -1) for r in running], dtype=np.int64)
        known = len(waiting) == record.num_waiting and at.size == record.num_residents and not (at < 0).any()
        if not (known and self._is_resident(at).all()):
            self.resync(now, running, waiting)
            record = self.record
            at = np.array([index[r.request_id] for r in running], dtype=np.int64)
        self.residents = at
        held = np.array([r.num_computed_tokens for r in running], dtype=np.int64)
        # Under asynchronous scheduling tokens in flight are known in number: they count as generated.
        tokens = np.array([r.num_tokens + r.num_output_placeholders for r in running], dtype=np.int64)
        follow(record.handle, self.stays.handle, float(now), at, held, tokens, kv_blocks)
        if record.clock >= self._episode_end:
            self._episode_end = record.clock + self._episode_seconds
            record.evictions = record.forced_evictions = 0

    def _is_resident(self, at: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        status = self.record.requests.status[at]
        return (status >= st.PREFILL) & (status <= st.ENTERING)

    def note(self, now: float, evicted: Sequence[str], admitted: Iterable[str], preempted: Sequence[str]) -> None:
        """What the scheduler did in this iteration, before its tokens.

        Args:
            evicted: preempted because the policy asked for it, in order; the gate has made residents of the record waiting ones.
            admitted: requests that entered from outside.
            preempted: preempted by the scheduler, in order.
        """
        record = self.record
        record.report.preempted = 0
        for request_id in admitted:
            r = self._index[request_id]
            leave_queue(record.handle, r)
            self._become_resident(r, now)
            record.report.admitted += 1
        for request_id in preempted:
            preempt_resident(record.handle, self._index[request_id])
        for request_id in (*evicted, *preempted):
            r = self._index[request_id]
            self._queue_up(r, now)
            join_queue(record.handle, r, True)

    def _become_resident(self, r: int, now: float) -> None:
        """Request r is in no queue."""
        become_resident(self.record.handle, r)
        self.overdue.pop(r, None)
        self.stays.computed[r] = 0
        self.stays.entered[r] = -1
        self.stays.since[r] = now

    def note_batch(self, batch: Batch | None) -> None:
        """What was scheduled in this iteration; None: nothing."""
        sums = self.record.batch
        if batch is None:
            sums.batch_size = 0.0
            return
        for name in _SUMS:
            setattr(sums, name, getattr(batch, name))

    def finished_iteration(self, seconds: float) -> None:
        """An iteration that computed something took this long."""
        record = self.record
        record.last_iteration = record.report.duration = seconds
        record.report.idle = False
        record.iterations += 1

    # --- losing track -----------------------------------------------------------------------------------

    def take_over(self, old: LiveMirror) -> None:
        """Know the requests of another mirror, with their arrivals and how long they have waited; `resync` must follow.

        The other is only read: a policy that was given up may still be reading it, and writing what its record lets it write.
        """
        mine, theirs = self.record, old.record
        mine.clock, mine.last_iteration, mine.iterations = theirs.clock, theirs.last_iteration, theirs.iterations
        mine.evictions, mine.forced_evictions = theirs.evictions, theirs.forced_evictions
        self._episode_end = old._episode_end
        keys = theirs.requests.key
        for name, i in sorted(old._index.items(), key=lambda item: int(keys[item[1]])):
            hidden, stays = theirs.hidden, old.stays
            self.arrive(name, int(hidden.prompt[i]), float(hidden.arrival[i]), float(stays.since[i]), int(hidden.output[i]))
            self.stays.released[self._index[name]] = stays.released[i]
        if old.layout == self.layout:
            self.record.queues.arrivals[:] = theirs.queues.arrivals

    def resync(self, now: float, running: Sequence[LiveRequest], waiting: Iterable[LiveRequest]) -> None:
        """Rebuild the queues from the scheduler's own lists.

        Needed after iterations that went past the mirror (a paused server, a fallen-back policy, a
        reset of running requests). Requests never seen count as arrived now.
        """
        self.resyncs += 1
        outside = list(waiting)
        present = {r.request_id for r in outside} | {r.request_id for r in running}
        for request_id in [i for i in self._index if i not in present]:
            self._forget(self._index.pop(request_id))
        before = {name: int(self.record.requests.status[r]) for name, r in self._index.items()}
        rates = self.record.queues.arrivals.copy()
        clear_queues(self.record)
        self.record.queues.arrivals[:] = rates
        self._stand_outside(now, outside, before)
        for request in running:
            self._stand_inside(now, request, before.get(request.request_id, st.WAITING) != st.WAITING)
        stays, standing = self.stays, [self._index[w.request_id] for w in outside]
        self.overdue = {r: None for r in standing if stays.released[r]}
        self.queued = deque(sorted((float(stays.since[r]), r) for r in standing if not stays.released[r]))

    def _stand_outside(self, now: float, outside: Sequence[LiveRequest], before: Mapping[str, int]) -> None:
        """Requests outside, in order; ``before``: status of those known."""
        low = -1 - len(outside)
        self._next_key = 0
        for i, request in enumerate(outside):
            r = self._adopt(request, now)
            requests = self.record.requests
            if before.get(request.request_id) != st.WAITING:
                self.stays.since[r] = now
            requests.status[r] = st.WAITING
            requests.queue[r] = requests.outside[r]
            requests.base_generated[r] = request.num_tokens - request.num_prompt_tokens
            # Preempted requests stand first; their keys are below 0 and rising.
            requests.key[r] = low + 1 + i if request.num_preemptions else self._next_key
            self._next_key += not request.num_preemptions
            join_queue(self.record.handle, r, False)
        self.record.lowest_key = low

    def _stand_inside(self, now: float, request: LiveRequest, was_resident: bool) -> None:
        """The next resident by admission."""
        r = self._adopt(request, now)
        requests = self.record.requests
        target = int(requests.target[r])
        requests.queue[r] = requests.outside[r]
        tokens = request.num_tokens + request.num_output_placeholders
        requests.base_generated[r] = tokens - request.num_prompt_tokens
        if was_resident:
            become_resident(self.record.handle, r)
            requests.target[r] = target
            return
        self._become_resident(r, now)
        # Of a request that decodes, the target is known to lie below what is computed.
        if request.num_computed_tokens >= tokens - 1:
            requests.target[r] = request.num_computed_tokens

    def _adopt(self, request: LiveRequest, now: float) -> int:
        """Where the record holds a request, in no queue; one never seen arrives now."""
        r = self._index.get(request.request_id)
        if r is not None:
            return r
        output = int(getattr(request, "max_tokens", 0)) if self.reveal_output_length else 0
        self.arrive(request.request_id, request.num_prompt_tokens, now, now, output)
        r = self._index[request.request_id]
        leave_queue(self.record.handle, r)
        return r
