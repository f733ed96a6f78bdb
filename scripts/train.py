"""Train an agent with stable-baselines3 on the native vector environment: `llmsched train`."""

import sys

from llmsched_env.cli.train import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
