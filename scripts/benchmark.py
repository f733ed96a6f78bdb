"""Speed of the simulator, each figure beside its yardstick in the same run: `llmsched benchmark`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
