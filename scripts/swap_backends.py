"""One policy object, three backends, the simulator, vLLM's scheduler and a real vLLM engine: `llmsched swap-backends`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["swap-backends", *sys.argv[1:]]))
