"""Replay a trace under one policy: exactly its requests, a row for each."""

import sys

from llmsched_env.cli.replay import main

if __name__ == "__main__":
    sys.exit(main())
