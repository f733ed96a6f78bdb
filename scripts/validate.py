"""Compare the simulator with a vLLM engine on the same requests: `llmsched validate`."""

import sys

from llmsched_env.cli.validate import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
