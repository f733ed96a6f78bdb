"""What each part of an agent's recipe is worth: variants with one part changed, on development seeds: `llmsched ablation`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["ablation", *sys.argv[1:]]))
