"""Tune every baseline's parameters in every cell of the suite, on seeds that evaluation never sees."""

import sys

from llmsched_env.cli.tune import main

if __name__ == "__main__":
    sys.exit(main())
