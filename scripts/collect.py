"""Record an expert's decisions, and clone it: `llmsched collect`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["collect", *sys.argv[1:]]))
