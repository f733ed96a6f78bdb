"""Compare scheduling policies on one workload over arrival rates and seeds."""

import sys

from llmsched_env.cli.compare import main

if __name__ == "__main__":
    sys.exit(main())
