"""How true the simulator is, as a page: every part measured against data that are not ours: `llmsched fidelity`."""

import sys

from llmsched_env.cli import main

if __name__ == "__main__":
    sys.exit(main(["fidelity", *sys.argv[1:]]))
