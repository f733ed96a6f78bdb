"""What there is to learn in the environments, as a table and a page: `llmsched headroom`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["headroom", *sys.argv[1:]]))
