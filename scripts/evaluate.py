"""Evaluate baselines and agents on the suite bench-v2 and write the page of results: `llmsched evaluate`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
