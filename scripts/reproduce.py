"""The results of arXiv 2504.11320, reproduced on this project's engine: docs/reproduction.md and its plots."""

import sys

from llmsched_env.cli.reproduce import main

if __name__ == "__main__":
    sys.exit(main())
