"""Make one agent of several that were trained alike: the mean of what their networks say."""

import sys

from llmsched_env.cli.ensemble import main

if __name__ == "__main__":
    sys.exit(main())
