"""``python -m llmsched_env.cli``: the same as ``llmsched``."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main())
