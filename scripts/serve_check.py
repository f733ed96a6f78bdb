"""Check that a policy will start in a vLLM server, without starting one: `llmsched serve-check`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve-check", *sys.argv[1:]]))
