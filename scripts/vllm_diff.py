"""Compare two versions of vLLM in what this project depends on: `llmsched vllm-diff`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["vllm-diff", *sys.argv[1:]]))
