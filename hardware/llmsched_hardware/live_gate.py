"""Decisions of a policy on a live server, as what the scheduler may do, and the guard against waiting too long."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from llmsched_env.engine.state import BOUNDARY, WAITING
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision, IntArray
from llmsched_hardware.gate import allowed, open_decision, shown_places
from llmsched_hardware.live import LiveMirror

RELEASE_KINDS = ("outside", "boundary", "held")


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the scheduler may do in one iteration; requests by id.

    Attributes:
        admit: requests outside that may enter, in this order.
        hold: residents that may not advance; their KV stays.
        evict: residents that give up their KV first, newest admission first.
        token_budget: tokens that the iteration may compute.
    """

    admit: list[str]
    hold: frozenset[str]
    evict: list[str]
    token_budget: int


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
        """Carry a decision out on the mirror, which must be fresh: evictions and boundary admissions are made in its record.

        Raises:
            ConfigError: not a decision for this mirror's queues.
        """
        mirror = self.mirror
        check_decision(decision, mirror.layout.num_queues)
        record, stays = mirror.record, mirror.stays
        residents = mirror.residents
        standing = residents[record.requests.status[residents] == BOUNDARY]
        open_decision(record.handle, decision.handle)
        gate = allowed(record)
        hold = self._release_held(gate.hold, now)
        if standing.size:
            left = standing[~np.isin(standing, hold)]
            stays.entered[left] = record.requests.base_generated[left]
        names = mirror.names
        return Allowed(
            admit=[names[r] for r in self._outside(gate.admit, now)],
            hold=frozenset(names[r] for r in hold.tolist()),
            evict=[names[r] for r in gate.evict.tolist()],
            token_budget=gate.token_budget,
        )

    def _release_held(self, hold: IntArray, now: float) -> IntArray:
        """Those of the held that the guard does not let go."""
        record, stays = self.mirror.record, self.mirror.stays
        hold = hold[stays.released[hold] == 0]
        waited = now - stays.since[hold] > self.max_wait
        if waited.any():
            over = hold[waited]
            at_boundary = int((record.requests.status[over] == BOUNDARY).sum())
            self.releases["boundary"] += at_boundary
            self.releases["held"] += over.size - at_boundary
            stays.released[over] = 1
            hold = hold[~waited]
        return hold

    def next_deadline(self, now: float) -> float:
        """Seconds until the guard may have something to do; infinite if nobody waits."""
        mirror, stays = self.mirror, self.mirror.stays
        self._drop_outdated()
        deadline = mirror.queued[0][0] if mirror.queued else np.inf
        held = stays.since[mirror.residents[stays.released[mirror.residents] == 0]]
        if held.size:
            deadline = min(deadline, float(held.min()))
        return max(deadline + self.max_wait - now, 0.0)

    def _drop_outdated(self) -> None:
        """Entries of requests that have left the queue since."""
        mirror, queued = self.mirror, self.mirror.queued
        since, status = mirror.stays.since, mirror.record.requests.status
        while queued and not (since[queued[0][1]] == queued[0][0] and status[queued[0][1]] == WAITING):
            queued.popleft()

    def _outside(self, admit: IntArray, now: float) -> list[int]:
        """Requests that may enter: those released, then the policy's in the engine's admission order."""
        mirror = self.mirror
        places = shown_places(mirror.record)
        if places <= 0:
            return []
        self._release_outside(now)
        return list(itertools.islice(dict.fromkeys((*mirror.overdue, *admit.tolist())), places))

    def _release_outside(self, now: float) -> None:
        mirror = self.mirror
        while True:
            self._drop_outdated()
            if not mirror.queued or now - mirror.queued[0][0] <= self.max_wait:
                return
            _, r = mirror.queued.popleft()
            mirror.stays.released[r] = 1
            mirror.overdue[r] = None
            self.releases["outside"] += 1


def check_decision(decision: object, num_queues: int) -> None:
    """Refuse what compiled code could not read.

    Raises:
        ConfigError: not a decision, or one for other queues, or with a negative count.
    """
    if not isinstance(decision, Decision) or len(decision) != num_queues:
        given = f" of {len(decision)} queues" if isinstance(decision, Decision) else ""
        raise ConfigError(f"decision: {type(decision).__name__}{given}, must be a Decision of {num_queues} queues")
    if decision.token_budget < 0 or (decision.rows.view(np.int32) < 0).any():  # all columns at once: every decision of a server passes here
        raise ConfigError(f"decision: {decision!r}, counts must be >= 0")
