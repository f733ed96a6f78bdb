"""The arrays of ``llmsched_env.engine.state`` for the requests of a live server, which come and go.

`LiveMirror` keeps for a scheduler in production what a backend keeps for an episode, so that the same
`ArrayView`, observations and policies work on it. Residents are written anew from the scheduler's own
list at every iteration; outside queues follow arrivals, admissions, preemptions and departures.
Indices are used again, so memory follows the number of requests present, not the number served.

Differences to an episode: the clock is the server's, output lengths are unknown (``S_OUTPUT`` and
``R_OUTPUT`` are 0 unless revealed), and evictions "of the episode" are those of the current period of
``episode_seconds``.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from llmsched_env.engine.arrays import ArrayView, engine_settings

from llmsched_env.compiled import compiled
from llmsched_env.engine import kernel, moves
from llmsched_env.engine import state as st
from llmsched_env.errors import ConfigError
from llmsched_env.types import BoolArray, EngineConfig, EpisodeLimits, FloatArray, IntArray, QueueLayout

_INITIAL_REQUESTS = 256
_RENUMBER_ABOVE = st.LATE_KEY // 4  # keys are 32 bits and late ones lie above LATE_KEY / 2


class LiveRequest(Protocol):
    """What is read of a request; vLLM's ``Request`` has it."""

    request_id: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_preemptions: int

    @property
    def num_tokens(self) -> int:
        """Prompt and generated tokens."""


@compiled
def _unlink(r, q, requests, queues, scalars):  # type: ignore[no-untyped-def]
    """Take request r, wherever it stands, out of outside queue q."""
    previous = -1
    x = queues[st.Q_HEAD, q]
    late = queues[st.Q_TIMELY, q] < 0
    while x != r:
        late = late or x == queues[st.Q_TIMELY, q]
        previous = x
        x = requests[st.R_NEXT, x]
    following = requests[st.R_NEXT, r]
    if previous < 0:
        queues[st.Q_HEAD, q] = following
    else:
        requests[st.R_NEXT, previous] = following
    if following < 0:
        queues[st.Q_TAIL, q] = previous
    if queues[st.Q_TIMELY, q] == r:
        queues[st.Q_TIMELY, q] = previous
    elif late:
        queues[st.Q_LATE, q] -= 1
    queues[st.Q_WAITING, q] -= 1
    scalars[st.I_WAITING] -= 1


@compiled
def _write_slots(  # type: ignore[no-untyped-def]
    now, at, computed, tokens, settings, ends, requests, targets, last_computed, entered, released, since, slots, queues, scalars
):
    """Residents ``at`` (n,) with their computed and present tokens (n,) into slots, queues and scalars."""
    segments, block_size = settings[st.C_SEGMENTS], settings[st.C_BLOCK_SIZE]
    for q in range(queues.shape[1]):
        queues[st.Q_RESIDENTS, q] = queues[st.Q_RESIDENT_KV, q] = queues[st.Q_BOUNDARY_KV, q] = 0
        if q % segments != 0:
            queues[st.Q_WAITING, q] = 0
    kv_tokens = 0
    prefilling = 0
    boundary = 0
    for i in range(at.shape[0]):
        r = at[i]
        target = targets[r]
        generated = tokens[i] - requests[st.R_PROMPT, r]
        blocks = (computed[i] + block_size - 1) // block_size
        k = 0
        state = st.SLOT_INTERIOR
        if computed[i] < target:
            prefilling += 1
        else:
            while k < segments - 1 and ends[k] <= generated:
                k += 1
            # At a segment's end and not yet let into the next one (design rules 9 and 10).
            if k > 0 and ends[k - 1] == generated and entered[r] != generated and not released[r]:
                state = st.SLOT_BOUNDARY
        q = requests[st.R_CLASS, r] * segments + k
        if state == st.SLOT_BOUNDARY:
            boundary += 1
            queues[st.Q_WAITING, q] += 1
            queues[st.Q_BOUNDARY_KV, q] += blocks
        else:
            queues[st.Q_RESIDENTS, q] += 1
            queues[st.Q_RESIDENT_KV, q] += blocks
        if computed[i] != last_computed[r]:
            last_computed[r] = computed[i]
            since[r] = now
        requests[st.R_GENERATED, r] = generated
        kv_tokens += computed[i]
        slots[st.S_ID, i] = r
        slots[st.S_QUEUE, i] = q
        slots[st.S_STATE, i] = state
        slots[st.S_COMPUTED, i] = computed[i]
        slots[st.S_GENERATED, i] = generated
        slots[st.S_TARGET, i] = target
        slots[st.S_PROMPT, i] = requests[st.R_PROMPT, r]
        slots[st.S_OUTPUT, i] = requests[st.R_OUTPUT, r]
        slots[st.S_BLOCKS, i] = blocks
    scalars[st.I_RESIDENTS] = at.shape[0]
    scalars[st.I_BOUNDARY] = boundary
    scalars[st.I_KV_TOKENS] = kv_tokens
    scalars[st.I_PREFILLING] = prefilling


class LiveMirror:
    """State of a running scheduler in a backend's arrays.

    Attributes:
        view: what policies see; live.
        requests, times, slots, queues, queue_f, scalars, clocks, settings, events: as in ``engine.state``.
        names: id of each request index.
        since: (N,) seconds, since when a request has waited: queued, or computed its last token.
        released: (N,) bool, requests no longer under the policy: never held, no boundary queue.
        entered: (N,) int32, generated tokens at which a request last left a boundary queue; -1 never.
        queued: (since, index) of requests that came to an outside queue, in order of time; entries outdate.
        overdue: released requests that stand outside, in order of release.
        resyncs: how often the state had to be rebuilt because the scheduler's was not the one expected.

    Args:
        reveal_output_length: requests arrive with their output length, which policies then see.
        episode_seconds: period after which the count of evictions starts anew.

    Raises:
        ConfigError: a layout that a server cannot classify by.
    """

    requests: IntArray
    times: FloatArray

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
        if layout.by == "type" and layout.num_types > 1:
            raise ConfigError("layout.by: 'type', but requests of a live server have no type; must be single or prompt")
        if layout.by == "output" and not reveal_output_length:
            raise ConfigError("layout.by: 'output', but a live server does not know output lengths; must be single or prompt")
        self.layout, self.engine, self.reveal_output_length = layout, engine, reveal_output_length
        self.settings = engine_settings(engine, layout, EpisodeLimits(drain=False), trace=False)
        self.ends = np.asarray(layout.segment_ends, dtype=np.int32)
        num_slots, num_queues = engine.max_num_seqs, layout.num_queues
        self.slots: IntArray = np.zeros((st.S_ROWS, num_slots), dtype=np.int32)
        self.queues: IntArray = np.zeros((st.Q_ROWS, num_queues), dtype=np.int32)
        self.queue_f: FloatArray = np.zeros((st.QF_ROWS, num_queues))
        self.scalars = np.zeros(st.I_ROWS, dtype=np.int64)
        self.clocks: FloatArray = np.zeros(st.F_ROWS)
        self.events: IntArray = np.zeros((3, num_slots), dtype=np.int32)
        self.clocks[st.F_HORIZON] = math.inf
        self.clocks[st.F_LATE_AFTER] = engine.late_after
        self.queued: deque[tuple[float, int]] = deque()
        self.overdue: dict[int, None] = {}
        self.resyncs = 0
        self._episode_seconds, self._episode_end = episode_seconds, episode_seconds
        self._index: dict[str, int] = {}
        self.names: list[str] = []
        self._free: list[int] = []
        self._num_resident = 0
        self._next_key = 0
        self._segments = layout.num_segments
        self._clear_queues()
        self._allocate(_INITIAL_REQUESTS)
        kernel.refresh_heads(self.settings, self.requests, self.times, self.queues, self.queue_f)
        backend: Any = self
        self.view = ArrayView(backend)

    def __len__(self) -> int:
        """Requests present: outside and resident."""
        return len(self._index)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._index

    def index(self, request_id: str) -> int:
        """Where the arrays hold a request."""
        return self._index[request_id]

    @property
    def num_slots(self) -> int:
        """Residents at the last ``refresh``."""
        return int(self.scalars[st.I_RESIDENTS])

    def _clear_queues(self) -> None:
        self.queues[:] = 0
        for row in (st.Q_HEAD, st.Q_TAIL, st.Q_TIMELY):
            self.queues[row] = -1
        self.scalars[st.I_WAITING] = 0
        self.scalars[st.I_LOW_KEY] = -1

    def _allocate(self, size: int) -> None:
        old = len(self.names)

        def grown(rows: int, dtype: Any, fill: float, before: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
            array = np.full((rows, size), fill, dtype=dtype)
            if before is not None:
                array[:, :old] = before
            return array

        first = old == 0
        self.requests = grown(st.R_ROWS, np.int32, 0, None if first else self.requests)
        self.times = grown(st.T_ROWS, np.float64, np.nan, None if first else self.times)
        self.since: FloatArray = grown(1, np.float64, 0.0, None if first else self.since)[0]
        self.released: BoolArray = grown(1, np.bool_, 0, None if first else self.released)[0]
        self.entered: IntArray = grown(1, np.int32, -1, None if first else self.entered)[0]
        self._target: IntArray = grown(1, np.int32, 0, None if first else self._target)[0]
        self._computed: IntArray = grown(1, np.int32, 0, None if first else self._computed)[0]
        self.names.extend([""] * (size - old))
        self._free.extend(range(size - 1, old - 1, -1))

    # --- requests come and go -----------------------------------------------------------------------

    def arrive(self, request_id: str, prompt_tokens: int, arrival: float, now: float, output_tokens: int = 0) -> None:
        """A request joins its outside queue.

        Args:
            arrival, now: seconds on the server's clock: when the request reached the server, and the present.
            output_tokens: read only where output lengths are revealed.
        """
        if not self._free:
            self._allocate(2 * len(self.names))
        r = self._free.pop()
        self.names[r] = request_id
        self._index[request_id] = r
        layout, requests = self.layout, self.requests
        j = 0
        if layout.edges:
            j = bisect_left(layout.edges, prompt_tokens if layout.by == "prompt" else output_tokens)
        requests[:, r] = 0
        requests[st.R_PROMPT, r] = prompt_tokens
        requests[st.R_CLASS, r] = j
        requests[st.R_STATUS, r] = st.STATUS_WAITING
        requests[st.R_KEY, r] = self._next_key
        self._next_key += 1
        if self.reveal_output_length:
            requests[st.R_OUTPUT, r] = output_tokens
        self.times[:, r] = np.nan
        self.times[st.T_ARRIVAL, r] = arrival
        self.released[r] = False
        self.entered[r] = -1
        self._queue_up(r, now)
        q = j * self._segments
        moves.push_back(r, q, requests, self.queues, self.scalars)
        self.queue_f[st.QF_ARRIVALS, q] += math.exp((arrival - self.clocks[st.F_CLOCK]) / st.RATE_WINDOW_SECONDS)
        if self._next_key > _RENUMBER_ABOVE:
            self._renumber()

    def _queue_up(self, r: int, now: float) -> None:
        self.since[r] = now
        if self.released[r]:
            self.overdue[r] = None
        else:
            self.queued.append((now, r))

    def leave(self, request_id: str) -> None:
        """A request has finished or was aborted; unknown ones are ignored."""
        r = self._index.pop(request_id, None)
        if r is None:
            return
        if self.requests[st.R_STATUS, r] == st.STATUS_WAITING:
            _unlink(r, int(self.requests[st.R_CLASS, r]) * self._segments, self.requests, self.queues, self.scalars)
        else:
            self._num_resident -= 1
        self._forget(r)

    def _forget(self, r: int) -> None:
        self.requests[st.R_STATUS, r] = st.STATUS_FUTURE
        self.released[r] = False
        self.overdue.pop(r, None)
        self.since[r] = np.nan  # outdates its entry in ``queued``
        self.names[r] = ""
        self._free.append(r)

    def _renumber(self) -> None:
        """Move queue keys back towards 0; policies only compare them."""
        waiting = np.flatnonzero(self.requests[st.R_STATUS] == st.STATUS_WAITING)
        keys = self.requests[st.R_KEY]
        late = keys >= st.LATE_KEY // 2
        plain = keys - np.where(late, st.LATE_KEY, 0)
        arrived = plain[waiting][plain[waiting] >= 0]
        shift = int(arrived.min()) if arrived.size else self._next_key
        keys[waiting] -= np.where(plain[waiting] >= 0, shift, 0).astype(np.int32)
        self._next_key -= shift
        if not (plain[waiting] < 0).any():
            self.scalars[st.I_LOW_KEY] = -1

    # --- iterations -----------------------------------------------------------------------------------

    def refresh(self, now: float, running: Sequence[LiveRequest], waiting: Sequence[LiveRequest], kv_blocks: int) -> None:
        """Bring everything to the state before an iteration.

        Args:
            running: residents in admission order.
            waiting: requests outside, read only to find out whether the mirror has lost track.
            kv_blocks: blocks in use.
        """
        index = self._index
        ids = [index.get(r.request_id, -1) for r in running]
        at = np.array(ids, dtype=np.int64)
        known = len(waiting) == self.scalars[st.I_WAITING] and len(ids) == self._num_resident and -1 not in ids
        if not known or (self.requests[st.R_STATUS, at] != st.STATUS_RESIDENT).any():
            self.resync(now, running, waiting)
            at = np.array([index[r.request_id] for r in running], dtype=np.int64)
        self._advance(now)
        computed = np.array([r.num_computed_tokens for r in running], dtype=np.int32)
        tokens = np.array([r.num_tokens for r in running], dtype=np.int32)
        _write_slots(
            now, at, computed, tokens, self.settings, self.ends, self.requests, self._target, self._computed, self.entered,
            self.released, self.since, self.slots, self.queues, self.scalars,
        )  # fmt: skip
        self.scalars[st.I_KV_BLOCKS] = self.scalars[st.I_KV_RESERVED] = kv_blocks
        if self.clocks[st.F_LATE_AFTER] > 0.0:
            moves.mark_late(self.settings, self.requests, self.times, self.queues, self.clocks)
        kernel.refresh_heads(self.settings, self.requests, self.times, self.queues, self.queue_f)

    def _advance(self, now: float) -> None:
        clocks = self.clocks
        seconds = max(now - float(clocks[st.F_CLOCK]), 0.0)
        clocks[st.F_CLOCK] += seconds
        keep = math.exp(-seconds / st.RATE_WINDOW_SECONDS)
        clocks[st.F_RATE_SECONDS] = float(clocks[st.F_RATE_SECONDS]) * keep + st.RATE_WINDOW_SECONDS * (1.0 - keep)
        self.queue_f[st.QF_ARRIVALS] *= keep
        if clocks[st.F_CLOCK] >= self._episode_end:
            self._episode_end = float(clocks[st.F_CLOCK]) + self._episode_seconds
            self.scalars[st.I_EVICTIONS] = self.scalars[st.I_FORCED_EVICTIONS] = 0

    def note(self, now: float, evicted: Sequence[str], admitted: Iterable[str], preempted: Sequence[str]) -> None:
        """What the scheduler did in this iteration, before its tokens.

        Args:
            evicted: preempted because the policy asked for it, in order.
            admitted: requests that entered from outside.
            preempted: preempted by the scheduler, in order.
        """
        scalars = self.scalars
        scalars[st.I_STEP_EVICTED], scalars[st.I_STEP_PREEMPTED] = len(evicted), len(preempted)
        scalars[st.I_FORCED_EVICTIONS] += len(preempted)
        for request_id in admitted:
            r = self._index[request_id]
            _unlink(r, int(self.requests[st.R_CLASS, r]) * self._segments, self.requests, self.queues, self.scalars)
            self._become_resident(r, now)
        for request_id in (*evicted, *preempted):
            r = self._index[request_id]
            self.requests[st.R_STATUS, r] = st.STATUS_WAITING
            self.requests[st.R_EVICTIONS, r] += 1
            self.requests[st.R_KEY, r] = scalars[st.I_LOW_KEY]
            scalars[st.I_LOW_KEY] -= 1
            scalars[st.I_EVICTIONS] += 1
            self._num_resident -= 1
            self._queue_up(r, now)
            moves.push_front(r, int(self.requests[st.R_CLASS, r]) * self._segments, self.requests, self.queues, scalars)

    def _become_resident(self, r: int, now: float) -> None:
        requests = self.requests
        requests[st.R_STATUS, r] = st.STATUS_RESIDENT
        self.overdue.pop(r, None)
        if np.isnan(self.times[st.T_ADMITTED, r]):
            self.times[st.T_ADMITTED, r] = now
        self._target[r] = requests[st.R_PROMPT, r] + requests[st.R_GENERATED, r]
        self._computed[r] = 0
        self.entered[r] = -1
        self.since[r] = now
        self._num_resident += 1

    def finished_iteration(self, seconds: float) -> None:
        """An iteration that computed something took this long."""
        self.clocks[st.F_LAST_ITERATION] = seconds

    # --- losing track -----------------------------------------------------------------------------------

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
        was_waiting = {r.request_id for r in outside if r.request_id in self._index and self._status(r) == st.STATUS_WAITING}
        was_resident = {r.request_id for r in running if r.request_id in self._index and self._status(r) == st.STATUS_RESIDENT}
        self._clear_queues()
        low = -1 - len(outside)
        self._next_key = 0
        for i, request in enumerate(outside):
            self._adopt(request, now)
            r = self._index[request.request_id]
            if request.request_id not in was_waiting:
                self.since[r] = now
            self.requests[st.R_STATUS, r] = st.STATUS_WAITING
            self.requests[st.R_GENERATED, r] = request.num_tokens - request.num_prompt_tokens
            # Preempted requests stand first; their keys are below 0 and rising.
            self.requests[st.R_KEY, r] = low + 1 + i if request.num_preemptions else self._next_key
            self._next_key += not request.num_preemptions
            moves.push_back(r, int(self.requests[st.R_CLASS, r]) * self._segments, self.requests, self.queues, self.scalars)
        self.scalars[st.I_LOW_KEY] = low
        self._num_resident = 0
        for request in running:
            self._adopt(request, now)
            r = self._index[request.request_id]
            if request.request_id in was_resident:
                self._num_resident += 1
                continue
            generated = request.num_tokens - request.num_prompt_tokens
            self.requests[st.R_GENERATED, r] = generated
            self._become_resident(r, now)
            # Of a request that decodes, the target is known to lie below what is computed.
            if request.num_computed_tokens >= request.num_tokens - 1:
                self._target[r] = request.num_computed_tokens
        standing = [self._index[w.request_id] for w in outside]
        self.overdue = {r: None for r in standing if self.released[r]}
        self.queued = deque(sorted((float(self.since[r]), r) for r in standing if not self.released[r]))

    def _status(self, request: LiveRequest) -> int:
        return int(self.requests[st.R_STATUS, self._index[request.request_id]])

    def _adopt(self, request: LiveRequest, now: float) -> None:
        """Give a request never seen a place in the arrays, in no queue."""
        if request.request_id in self._index:
            return
        output = int(getattr(request, "max_tokens", 0)) if self.reveal_output_length else 0
        self.arrive(request.request_id, request.num_prompt_tokens, now, now, output)
        r = self._index[request.request_id]
        _unlink(r, int(self.requests[st.R_CLASS, r]) * self._segments, self.requests, self.queues, self.scalars)
