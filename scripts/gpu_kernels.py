"""Measure kernels of a dense decoder on this machine, without an engine: `llmsched calibrate kernels`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["calibrate", "kernels", *sys.argv[1:]]))
