"""Replay a trace under one policy: exactly its requests, a row for each: `llmsched replay`."""

import sys

from llmsched_env.cli.replay import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
