"""The linear-model experiments of arXiv 2504.11320 on our engine, over many seeds, as a table: `llmsched paper-table`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["paper-table", *sys.argv[1:]]))
