"""How true the simulator is, as a page: every part measured against data that are not ours.

    python scripts/fidelity.py --out docs/fidelity.md

Each module ``scripts/fidelity_<part>.py`` gives a part of the page by ``section(paths)``. The raw data
lie in the folders that LLMSCHED_CALIBRATION, LLMSCHED_PEERS and LLMSCHED_TRACES name.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llmsched_env.cli.parser import Parser
from llmsched_env.errors import ConfigError, MissingExtraError
from llmsched_env.files import check_file, replacing
from llmsched_env.pages.fidelity.evidence import MISSED, Paths
from llmsched_env.pages.fidelity.page import PARTS, page


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/fidelity.md"), metavar="FILE")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    options = parser.parse_args(words)
    try:
        check_file("--out", options.out)
        lines = page(Paths.find(), options.parts)
        with replacing(options.out) as file:
            file.write("\n".join(lines))
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    missed = [line for line in lines if MISSED in line]
    print(f"{options.out}: {len(lines)} lines, bars missed: {len(missed)}")
    for line in missed:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
