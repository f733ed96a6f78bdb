"""Work beside a scheduler's loop: an action that a daemon thread repeats, and that can neither end nor hold up the engine."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import weakref
from collections.abc import Callable

logger = logging.getLogger("vllm.llmsched")  # below vLLM's logger: its format, its level


class Background:
    """Calls a method every so many seconds in a thread of its own until it is closed or the method's object is gone.

    Whatever the method raises is logged, once for every kind of error, and the method is called again when it is due. The thread is
    a daemon: a process may end while the method hangs on a disk that does not answer.

    Attributes:
        failures: how often the method raised.

    Args:
        what: what the method does, for log and thread name.
        method: a bound method; its object is referred to weakly.
        seconds: between two calls, > 0.
    """

    def __init__(self, what: str, method: Callable[[], None], seconds: float) -> None:
        self.failures = 0
        self._what, self._seconds = what, seconds
        self._method = weakref.WeakMethod(method)
        self._logged: set[tuple[type[BaseException], int | None]] = set()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = threading.Thread(target=self._run, name=f"llmsched {what}", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads allowed
            self._thread = None
            self._failed(error)
            return
        # vLLM calls ``shutdown`` in an engine process; a program that holds the engine itself may just end.
        atexit.register(self.close)

    def _run(self) -> None:
        while not self._closing.wait(self._seconds):
            if not self._call():
                break
        else:
            self._call()
        with contextlib.suppress(Exception):  # an interpreter that ends takes no more registrations
            atexit.unregister(self.close)

    def _call(self) -> bool:
        """Whether there is anything left to call."""
        method = self._method()
        if method is None:
            return False
        try:
            method()
        except Exception as error:
            self._failed(error)
        return True

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        kind = (type(error), getattr(error, "errno", None))
        if kind in self._logged:
            return
        self._logged.add(kind)
        with contextlib.suppress(Exception):
            logger.warning("%s failed and is tried again (the same error is not logged twice): %s: %s", self._what, kind[0].__name__, error)

    def close(self, seconds: float = 2.0) -> bool:
        """A last call, waited for at most so long; returns whether it has ended. Closing twice is no error."""
        self._closing.set()
        if self._thread is None or self._thread is threading.current_thread():
            return True
        self._thread.join(seconds)
        return not self._thread.is_alive()
