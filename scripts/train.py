"""Train an agent with stable-baselines3 on the native vector environment."""

import sys

from llmsched_env.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
