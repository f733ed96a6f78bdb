"""Make one agent of several that were trained alike: the mean of what their networks say: `llmsched ensemble`."""

import sys

from llmsched_env.cli.ensemble import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
