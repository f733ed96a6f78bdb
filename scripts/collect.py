"""Record an expert's decisions, and clone it."""

import sys

from llmsched_env.cli.collect import main

if __name__ == "__main__":
    sys.exit(main())
