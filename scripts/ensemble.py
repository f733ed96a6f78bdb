"""Make one agent of several that were trained alike: the mean of what their networks say: `llmsched ensemble`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["ensemble", *sys.argv[1:]]))
