"""How true the simulator is, as a page: every part measured against data that are not ours: `llmsched fidelity`."""

import sys

from llmsched_env.cli.fidelity import COMMAND

if __name__ == "__main__":
    sys.exit(COMMAND.main())
