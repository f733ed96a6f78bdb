"""Compare the simulator with a vLLM engine on the same requests, policy by policy and rate by rate."""

import sys

from llmsched_env.cli.validate import main

if __name__ == "__main__":
    sys.exit(main())
