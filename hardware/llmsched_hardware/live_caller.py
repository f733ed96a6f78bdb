"""Asking the policy of a live server, with or without a limit on the time it may take."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmsched_env.backend import View
from llmsched_env.types import Decision
from llmsched_hardware.live import LiveMirror
from llmsched_hardware.live_config import LivePolicy
from llmsched_hardware.live_thread import CallThread, Overdue, left_behind

MOST_LEFT_BEHIND = 3
"""Threads that may run on after they were given up before a policy that hangs is not started again."""

MOST_SECONDS_TO_BUILD = 60.0
"""For a new policy in place of one that was given up: rehearsal included, which may compile."""

Started = tuple[LivePolicy, LiveMirror]
Start = Callable[[], Started]


class PolicyCaller:
    """The policy of one server and what it is asked in.

    Without a limit the policy is called directly. With one it is built, rehearsed and called in a thread of its own, and a call that
    is overdue is given up: the thread, the policy and the mirror it was shown are left to it, for it may still read them, and none of
    them is used again. `renew` makes a new policy with a mirror of its own.

    Attributes:
        live: the policy.
        mirror: what it is shown.
        lost: the policy was given up.

    Args:
        start: builds a policy, rehearses it and makes its empty mirror.
        seconds: limit of one call; None for none.

    Raises:
        ConfigError: what ``start`` raises; it has no limit while a server starts.
    """

    def __init__(self, start: Start, seconds: float | None = None) -> None:
        self._start, self._seconds = start, seconds
        self._thread = None if seconds is None else _thread()
        self._building: CallThread | None = None
        self._began = 0.0
        started: Started = start() if self._thread is None else self._thread.call(start)
        self.live, self.mirror = started

    @property
    def lost(self) -> bool:
        return self._thread is not None and self._thread.lost

    def decide(self, view: View) -> Decision:
        """The policy's decision.

        Raises:
            Overdue: it took longer than the limit.
            Exception: whatever the policy raises.
        """
        if self._thread is None:
            return self.live.policy.decide(view)
        decision: Decision = self._thread.call(self.live.policy.decide, view, seconds=self._seconds)
        return decision

    def reset(self) -> None:
        """Begin anew after a failure.

        Raises:
            Overdue, Exception: as `decide`.
        """
        if self._thread is None:
            self.live.policy.reset()
        else:
            self._thread.call(self.live.policy.reset, seconds=self._seconds)

    def renew(self) -> bool:
        """Build a new policy in place of one that was given up, beside the loop that calls this; returns whether it is there.

        Its mirror is empty. Call again until True.

        Raises:
            Overdue: it was not there after ``MOST_SECONDS_TO_BUILD``.
            RuntimeError: too many threads that were given up still run.
            Exception: whatever building the policy raises.
        """
        if self._building is None:
            if (running := left_behind()) >= MOST_LEFT_BEHIND:
                raise RuntimeError(f"{running} threads that were given up still run, no further one is started")
            self._building, self._began = _thread(), time.monotonic()
            self._building.begin(self._start)
        thread = self._building
        if not thread.wait(0.0):
            if time.monotonic() - self._began > MOST_SECONDS_TO_BUILD:
                self._building = None
                thread.leave()
                raise Overdue(f"no new policy within {MOST_SECONDS_TO_BUILD:g} s")
            return False
        self._building = None
        self.live, self.mirror = thread.result()
        self._thread = thread
        return True


def _thread() -> CallThread:
    return CallThread("llmsched policy")
