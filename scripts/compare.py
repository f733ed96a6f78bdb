"""Compare scheduling policies on one workload over arrival rates and seeds: `llmsched compare`."""

import sys

from llmsched_env.cli.compare import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
