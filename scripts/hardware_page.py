"""Write docs/hardware.md from what calibrations and validations have left on disk: `llmsched hardware-page`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["hardware-page", *sys.argv[1:]]))
