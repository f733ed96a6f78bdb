"""Evaluate baselines and agents on the suite bench-v1 and write the page of results."""

import sys

from llmsched_env.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
