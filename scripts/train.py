"""Train an agent with stable-baselines3 on the native vector environment: `llmsched train`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
