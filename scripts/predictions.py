"""What predicted output lengths are worth, and how far to trust them: `llmsched predictions`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["predictions", *sys.argv[1:]]))
