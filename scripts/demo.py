"""The paper's regime and a conversation service at its memory limit, with who wins and why: `llmsched demo`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
