"""What each part of an agent's recipe is worth: variants with one part changed, on development seeds."""

import sys

from llmsched_env.cli.ablation import main

if __name__ == "__main__":
    sys.exit(main())
