"""One policy object, three backends: the simulator, vLLM's scheduler, and a real vLLM engine."""

import sys

from llmsched_env.cli.swap_backends import main

if __name__ == "__main__":
    sys.exit(main())
