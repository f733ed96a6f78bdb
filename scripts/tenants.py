"""What each tenant of a scenario gets under several policies: `llmsched tenants`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["tenants", *sys.argv[1:]]))
