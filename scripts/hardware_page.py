"""Write docs/hardware.md from what calibrations and validations have left on disk: `llmsched hardware-page`."""

import sys

from llmsched_env.cli.hardware_page import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
