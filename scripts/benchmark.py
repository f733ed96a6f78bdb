"""Speed of the simulator, each figure beside its yardstick in the same run: `llmsched benchmark`."""

import sys

from llmsched_env.cli.benchmark import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
