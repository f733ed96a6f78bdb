"""Compare scheduling policies on one workload over arrival rates and seeds: `llmsched compare`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
