"""Measure, fit and validate on one machine, into one archive: `llmsched gpu-measure`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["gpu-measure", *sys.argv[1:]]))
