"""Record an expert's decisions, and clone it: `llmsched collect`."""

import sys

from llmsched_env.cli.collect import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
