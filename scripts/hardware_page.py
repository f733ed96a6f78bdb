"""Write docs/hardware.md from what calibrate.py engine and validate.py have left on disk."""

import sys

from llmsched_env.cli.hardware_page import main

if __name__ == "__main__":
    sys.exit(main())
