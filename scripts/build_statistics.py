"""Build the joint quantile table of a trace: the JSON files of ``llmsched_env/workload/statistics``: `llmsched build-statistics`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["build-statistics", *sys.argv[1:]]))
