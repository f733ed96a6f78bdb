"""``python -m llmsched_command``: the same as ``llmsched``."""

import sys

from llmsched_command import main

if __name__ == "__main__":
    sys.exit(main())
