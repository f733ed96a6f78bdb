"""Build a calibration, from a raw profile or from the vLLM engine on this machine: `llmsched calibrate`."""

import sys

from llmsched_env.cli.calibrate import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
