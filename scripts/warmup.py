"""Compile for this machine what would else be compiled at the first use: `llmsched warmup`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["warmup", *sys.argv[1:]]))
