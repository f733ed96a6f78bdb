"""Speed of the simulator, each figure beside its yardstick in the same run."""

import sys

from llmsched_env.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())
