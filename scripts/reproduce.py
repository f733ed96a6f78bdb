"""The results of arXiv 2504.11320, reproduced on this project's engine, as a page with plots: `llmsched reproduce`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["reproduce", *sys.argv[1:]]))
