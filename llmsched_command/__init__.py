"""The console command ``llmsched`` before anything else is imported: Ctrl-C in the second that imports take ends it without a traceback.

``llmsched_env.cli.main`` cannot see to that itself, as Python imports ``llmsched_env``, and with it numba, before it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

INTERRUPTED = 130


def _leave(_signal: int, _frame: Any) -> NoReturn:
    """At once: nothing has begun that could be kept, and an exception in the middle of an import may be swallowed or changed there."""
    os.write(2, b"Interrupted.\n")
    os._exit(INTERRUPTED)


def main(words: Sequence[str] | None = None) -> int:
    """Carry out ``llmsched COMMAND ...`` (default: this process's command line); the exit code."""
    # A process that was told to ignore Ctrl-C, as with nohup, goes on doing so.
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
    from llmsched_env.cli import main as carry_out

    try:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return carry_out(words)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
