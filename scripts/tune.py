"""Tune every baseline's parameters in every cell of the suite, on seeds that evaluation never sees: `llmsched tune`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["tune", *sys.argv[1:]]))
