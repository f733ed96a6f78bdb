"""Compare the simulator with a vLLM engine on the same requests: `llmsched validate`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["validate", *sys.argv[1:]]))
