"""Submissions to the leaderboard run again, and its table: `llmsched leaderboard`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["leaderboard", *sys.argv[1:]]))
