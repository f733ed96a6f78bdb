"""The console command ``llmsched``: every program of this project as a subcommand.

Importing this package needs nothing beyond the environment; the commands need the extra ``cli``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence


def main(words: Sequence[str] | None = None) -> int:
    """Carry out ``llmsched COMMAND ...`` (default: this process's command line); the exit code."""
    from llmsched_env.errors import MissingExtraError, require

    given = list(sys.argv[1:] if words is None else words)
    # Unlike other console commands: module:attribute finds the modules of the folder one works in, after all that is installed.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        require("tyro", "cli")
        from llmsched_env.cli.commands import dispatch

        code = dispatch(given)
        sys.stdout.flush()
        return code
    except MissingExtraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while the commands are imported
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has gone, as `head` does: nothing more can be said to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
