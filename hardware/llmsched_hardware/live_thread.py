"""Calls with a limit on their time, in a thread that can be left behind.

Python cannot end a call from outside. It can stop waiting for one: the call runs in a daemon thread, and where it does not return in
time the caller goes on without the answer and never uses the thread again. Handing a call over and its answer back costs
two switches between threads, so this is used only where a limit is set (``docs/deploy.md``).

What this cannot help against is code that keeps Python's lock while it runs, such as a C extension that never releases it: the caller
waits without the lock, but needs it to go on.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable
from typing import Any

_left: list[threading.Thread] = []
_lock = threading.Lock()


class Overdue(Exception):
    """A call did not return within its limit."""


class _LeftBehind(SystemExit):
    """Ends a thread that nobody waits for any more, at its next step in Python."""


class _Desk:
    """What caller and thread share; the thread knows nothing else, so that it ends when the caller is gone."""

    __slots__ = ("answer", "closed", "done", "error", "go", "job")

    def __init__(self) -> None:
        self.go, self.done = threading.Lock(), threading.Lock()
        self.go.acquire()
        self.done.acquire()
        self.job: tuple[Callable[..., Any], tuple[Any, ...]] | None = None
        self.answer: Any = None
        self.error: BaseException | None = None
        self.closed = False

    def close(self) -> None:
        self.closed = True
        if self.go.locked():
            self.go.release()

    def serve(self) -> None:
        """Do one job after another until closed."""
        while True:
            self.go.acquire()
            if self.closed or self.job is None:
                return
            function, args = self.job
            answer, error = None, None
            try:
                answer = function(*args)
            except BaseException as raised:  # SystemExit, too: a policy that calls sys.exit() fails, the server does not end
                error = raised
            if self.closed:
                return
            self.answer, self.error, self.job = answer, error, None
            del answer, error, function, args  # an idle thread keeps nothing alive
            self.done.release()


class CallThread:
    """A thread that makes calls one at a time for one caller.

    Attributes:
        lost: a call was overdue; the thread is left behind and takes no more calls.

    Raises:
        RuntimeError: no more threads can be started.
    """

    def __init__(self, name: str) -> None:
        self._desk = _Desk()
        self._thread = threading.Thread(target=self._desk.serve, name=name, daemon=True)
        self._thread.start()
        self.lost = False
        weakref.finalize(self, self._desk.close).atexit = False

    def call(self, function: Callable[..., Any], *args: Any, seconds: float | None = None) -> Any:
        """``function(*args)`` in the thread; whatever it raises is raised here.

        Args:
            seconds: limit; None waits as long as it takes.

        Raises:
            Overdue: it did not return in time. It may run on, and whatever it reads must be left to it.
        """
        self.begin(function, *args)
        if not self.wait(seconds):
            self.leave()
            raise Overdue(f"no answer within {seconds:g} s")
        return self.result()

    def begin(self, function: Callable[..., Any], *args: Any) -> None:
        """Hand a call over without waiting for it."""
        if self.lost:
            raise RuntimeError("the thread was left behind")
        self._desk.job = (function, args)
        self._desk.go.release()

    def wait(self, seconds: float | None) -> bool:
        """Whether the call that was begun has ended within so many seconds; after True, take its `result`."""
        try:
            return self._desk.done.acquire(timeout=-1 if seconds is None else seconds)
        except BaseException:  # Ctrl-C in a program that holds the engine itself
            self.leave()
            raise

    def result(self) -> Any:
        """What the call returned; whatever it raised is raised."""
        desk = self._desk
        answer, error = desk.answer, desk.error
        desk.answer = desk.error = None
        if error is not None:
            raise error
        return answer

    def leave(self) -> None:
        """Never wait for this thread again, and end it as soon as it steps through Python code."""
        self.lost = True
        self._desk.close()
        with _lock:
            _left.append(self._thread)
        if self._thread.is_alive() and self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident), ctypes.py_object(_LeftBehind))


def left_behind() -> int:
    """Threads of this process that were left behind and still run."""
    if not _left:
        return 0
    with _lock:
        _left[:] = [thread for thread in _left if thread.is_alive()]
        return len(_left)
