"""Build a calibration: from a raw profile, as the shipped ones were built, or from the vLLM engine on this machine."""

import sys

from llmsched_env.cli.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
