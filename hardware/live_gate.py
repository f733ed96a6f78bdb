"""Decisions of a policy on a live server, as what the scheduler may do, and the guard against waiting too long."""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hardware.live import LiveMirror
from llmsched_env.engine import state as st
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision

RELEASE_KINDS = ("outside", "boundary", "held")


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the scheduler may do in one iteration; requests by id.

    Attributes:
        admit: requests outside that may enter, in this order.
        hold: residents that may not advance; their KV stays.
        evict: residents that give up their KV first, newest admission first.
    """

    admit: list[str]
    hold: frozenset[str]
    evict: list[str]


class Gatekeeper:
    """Turns decisions into ``Allowed``, with a bound on waiting.

    A request that has stood in one queue, outside or at a boundary, or has been held inside a
    segment for longer than ``max_wait_seconds`` is released: from then on the policy has no say over
    it. It may enter before all others, is never held and passes boundaries at once; what it needs
    is still the scheduler's to grant. This is the only forced release on a live server.

    Attributes:
        releases: how often the guard released a request, by where it stood (``RELEASE_KINDS``).

    Args:
        max_wait_seconds: > 0.
    """

    def __init__(self, mirror: LiveMirror, max_wait_seconds: float) -> None:
        self.mirror = mirror
        self.max_wait = max_wait_seconds
        self.releases = dict.fromkeys(RELEASE_KINDS, 0)
        self._nothing = Decision(mirror.layout.num_queues)

    def hold_all(self, now: float) -> Allowed:
        """Nothing may happen but what the guard forces."""
        return self.allow(self._nothing, now)

    def allow(self, decision: Decision, now: float) -> Allowed:
        """Carry a decision out on the mirror, which must be fresh.

        Raises:
            ConfigError: not a decision for this mirror's queues.
        """
        mirror = self.mirror
        run, admit, evict = check_decision(decision, mirror.layout.num_queues)
        n = mirror.num_slots
        slots = mirror.slots[:, :n]
        at, state, queue = slots[st.S_ID], slots[st.S_STATE], slots[st.S_QUEUE]
        boundary = state == st.SLOT_BOUNDARY
        hold = (run[queue] == 0) | boundary
        gone: list[int] = []
        if boundary.any():
            gone = self._evicted(boundary, queue, evict)
            boundary[gone] = False
            hold[gone] = False
            entering = self._entering(boundary, queue, admit)
            hold[entering] = False
        hold &= ~mirror.released[at]
        if hold.any():
            over = np.flatnonzero(hold & (now - mirror.since[at] > self.max_wait))
            for i in over:
                self.releases["boundary" if boundary[i] else "held"] += 1
            mirror.released[at[over]] = True
            hold[over] = False
        left = at[boundary & ~hold]
        mirror.entered[left] = mirror.requests[st.R_GENERATED, left]
        names = mirror.names
        return Allowed(
            admit=[names[r] for r in self._outside(admit, mirror.engine.max_num_seqs - n + len(gone), now)],
            hold=frozenset(names[r] for r in at[hold]),
            evict=[names[at[i]] for i in gone],
        )

    def next_deadline(self, now: float) -> float:
        """Seconds until the guard may have something to do; infinite if nobody waits."""
        mirror = self.mirror
        self._drop_outdated()
        deadline = mirror.queued[0][0] if mirror.queued else np.inf
        n = mirror.num_slots
        at = mirror.slots[st.S_ID, :n]
        waiting = at[~mirror.released[at]]
        if waiting.size:
            deadline = min(deadline, float(mirror.since[waiting].min()))
        return max(deadline + self.max_wait - now, 0.0)

    def _drop_outdated(self) -> None:
        mirror, queued = self.mirror, self.mirror.queued
        while queued and not (mirror.since[queued[0][1]] == queued[0][0] and self._is_outside(queued[0][1])):
            queued.popleft()

    def _is_outside(self, r: int) -> bool:
        return bool(self.mirror.requests[st.R_STATUS, r] == st.STATUS_WAITING)

    @staticmethod
    def _evicted(boundary: npt.NDArray[np.bool_], queue: npt.NDArray[np.int32], evict: npt.NDArray[np.int32]) -> list[int]:
        """Slots to evict: the most recently admitted of each boundary queue, newest first."""
        chosen: list[int] = []
        for q in np.flatnonzero(evict):
            standing = np.flatnonzero(boundary & (queue == q))
            chosen.extend(standing[max(standing.size - int(evict[q]), 0) :].tolist())
        return sorted(chosen, reverse=True)

    @staticmethod
    def _entering(boundary: npt.NDArray[np.bool_], queue: npt.NDArray[np.int32], admit: npt.NDArray[np.int32]) -> list[int]:
        """Slots that leave their boundary queue, oldest admission first."""
        chosen: list[int] = []
        for q in np.flatnonzero(admit):
            chosen.extend(np.flatnonzero(boundary & (queue == q))[: admit[q]].tolist())
        return chosen

    def _outside(self, admit: npt.NDArray[np.int32], places: int, now: float) -> list[int]:
        """Requests that may enter: those released, then the policy's in the engine's admission order."""
        if places <= 0:
            return []
        self._release_outside(now)
        mirror = self.mirror
        chosen = dict(mirror.overdue)
        view, segments = mirror.view, mirror.layout.num_segments
        by_class = mirror.engine.admission_order == "class"
        queues: list[list[tuple[bool, int, int, int]]] = []
        for j in range(mirror.layout.num_classes):
            count = min(int(admit[j * segments]), places)
            if count == 0 or view.waiting[j, 0] == 0:
                continue
            waiting = view.waiting_requests(j, count)
            timely = int(view.waiting[j, 0] - view.late[j])
            rank = int(mirror.settings[st.C_ROWS + j]) if by_class else 0
            pairs = zip(waiting.key.tolist(), waiting.id.tolist(), strict=True)
            queues.append([(i >= timely, rank, key, r) for i, (key, r) in enumerate(pairs)])
        for *_, r in heapq.merge(*queues):  # heads against heads, each queue in its own order
            if len(chosen) >= places:
                break
            chosen[r] = None
        return list(itertools.islice(chosen, places))

    def _release_outside(self, now: float) -> None:
        mirror = self.mirror
        while True:
            self._drop_outdated()
            if not mirror.queued or now - mirror.queued[0][0] <= self.max_wait:
                return
            _, r = mirror.queued.popleft()
            mirror.released[r] = True
            mirror.overdue[r] = None
            self.releases["outside"] += 1


def check_decision(decision: Decision, num_queues: int) -> npt.NDArray[np.int32]:
    """The three rows of a decision.

    Raises:
        ConfigError: not a decision, or one for other queues, or with a negative count.
    """
    array = getattr(decision, "array", None)
    if array is None or array.shape != (3, num_queues):
        shape = "no array" if array is None else f"shape {array.shape}"
        raise ConfigError(f"decision: {type(decision).__name__} of {shape}, must be a Decision of {num_queues} queues")
    if (array < 0).any():
        raise ConfigError(f"decision: {decision!r}, counts must be >= 0")
    rows: npt.NDArray[np.int32] = array
    return rows
