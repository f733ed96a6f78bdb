"""One policy object, three backends, the simulator, vLLM's scheduler and a real vLLM engine: `llmsched swap-backends`."""

import sys

from llmsched_env.cli.swap_backends import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
