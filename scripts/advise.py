"""Search which flags of vLLM and which policy to run for a workload: `llmsched advise`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["advise", *sys.argv[1:]]))
