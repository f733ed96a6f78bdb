"""The JSON report of a policy on a live server, kept up to date by a thread of its own."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmsched_hardware.live_background import Background

QUIET_SECONDS = 1.0
"""A report says what happened until at most so long before the server fell idle."""


class ReportWriter:
    """Replaces a file with what a function returns, every so many seconds and once the server has fallen idle.

    vLLM kills the engine's process at SIGTERM unless ``--shutdown-timeout`` is set, so nothing can be relied on at the end: the file is
    good at any time. Where vLLM does end its engine in order, `close` writes it a last time.

    Args:
        path: file; its folder exists.
        seconds: between two reports of a busy server.
        summary: plain values for JSON, called from the thread.
        progress: a number that changes when ``summary`` has something new.
    """

    def __init__(self, path: Path, seconds: float, summary: Callable[[], dict[str, Any]], progress: Callable[[], object]) -> None:
        self.path, self._seconds = path, seconds
        self._summary, self._progress = summary, progress
        self._seen: object = None
        self._written: object = None
        self._due = 0.0
        self._closing = False
        self._background = Background(f"report {path}", self._tick, min(seconds, QUIET_SECONDS))

    def _tick(self) -> None:
        """Write when it is time, or when something was new at the last look and nothing is since."""
        now, state = time.monotonic(), self._progress()
        quiet = state == self._seen and state != self._written
        self._seen = state
        if now >= self._due or quiet or self._closing:
            self._due, self._written = now + self._seconds, state  # also after a failure: a full disk is not asked more often
            self.write()

    def write(self) -> None:
        """Replace the file in one go; a reader never sees half of it.

        Raises:
            OSError: it cannot be written. The old file stays, and no part of the new one.
        """
        text = json.dumps(self._summary(), indent=1) + "\n"
        part = self.path.with_name(self.path.name + ".part")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, self.path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise

    def close(self, seconds: float = 2.0) -> bool:
        """The last report, waited for at most so long; returns whether the thread has ended."""
        self._closing = True
        return self._background.close(seconds)
