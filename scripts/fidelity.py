"""How true the simulator is, as a page: every part measured against data that are not ours."""

import sys

from llmsched_env.cli.fidelity import main

if __name__ == "__main__":
    sys.exit(main())
