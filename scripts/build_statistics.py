"""Build the joint quantile table of a trace: the JSON files of ``llmsched_env/workload/statistics``: `llmsched build-statistics`."""

import sys

from llmsched_env.cli.build_statistics import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
