"""Threads for compiled loops over many environments.

The loops release Python's lock, so ordinary threads run them side by side. They wait without spinning, which on a
machine that others use too makes the difference between half the speed and a hundredth, they leave the thread counts of
other libraries (OpenMP's, PyTorch's, numba's) alone, and a forked process starts its own.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llmsched_env.errors import ConfigError

LEAST_PER_THREAD = 64
"""Environments: to hand fewer over takes longer than to step them."""


def available_threads() -> int:
    """Processors this process may use, at most what ``OMP_NUM_THREADS`` or ``NUMBA_NUM_THREADS`` allow."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        wanted = os.environ.get(name, "").split(",")[0].strip()
        if wanted.isdigit() and int(wanted) >= 1:
            count = min(count, int(wanted))
    return count


class Workers:
    """Splits ``range(size)`` among threads.

    Args:
        size: items.
        threads: at most so many; None for ``available_threads`` and at least ``LEAST_PER_THREAD`` items each.

    Raises:
        ConfigError: ``threads`` is not an integer from 1 to 1024.
    """

    def __init__(self, size: int, threads: int | None = None) -> None:
        if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024):
            raise ConfigError(f"threads: {threads!r}, must be an integer from 1 to 1024, or None")
        count = min(threads, size) if threads is not None else max(min(available_threads(), size // LEAST_PER_THREAD), 1)
        bounds = [size * i // count for i in range(count + 1)]
        self.parts = list(itertools.pairwise(bounds))
        self._pool: ThreadPoolExecutor | None = None
        self._process = -1

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(first, last, *args)`` for every part; the results in order."""
        if len(self.parts) == 1:
            return [function(*self.parts[0], *args)]
        if self._pool is None or self._process != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(len(self.parts) - 1, thread_name_prefix="llmsched")
            self._process = os.getpid()
        others = [self._pool.submit(function, first, last, *args) for first, last in self.parts[1:]]
        own = function(*self.parts[0], *args)
        return [own, *(future.result() for future in others)]

    def close(self) -> None:
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(wait=False)
        self._pool = None

    def __getstate__(self) -> dict[str, Any]:
        return {"parts": self.parts, "_pool": None, "_process": -1}
