"""Hyper-parameters of PPO for rl_zoo3, searched and measured: `llmsched zoo`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["zoo", *sys.argv[1:]]))
