"""Replay a trace under one policy: exactly its requests, a row for each: `llmsched replay`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["replay", *sys.argv[1:]]))
