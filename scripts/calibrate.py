"""Build a calibration, from a raw profile or from the vLLM engine on this machine: `llmsched calibrate`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["calibrate", *sys.argv[1:]]))
