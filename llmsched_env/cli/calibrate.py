"""Build a calibration: from a raw profile, as the shipped ones were built, or from the vLLM engine on this machine.

    python scripts/calibrate.py import --format vidur SOURCE --model llama-2-7b --name NAME --out FILE
    python scripts/calibrate.py engine --model MODEL --out FILE.json --budget-seconds 300

SOURCE is the raw profile: a folder or file, as the format's module describes. FILE ends in .npz
(tables) or .json (coefficients), and serves wherever a calibration's name does. ``engine`` writes
both, and goes on with ``--resume`` where it was interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from llmsched_env.cli.parser import Parser
from llmsched_env.errors import ConfigError, EngineError, MissingExtraError
from llmsched_env.files import check_file
from llmsched_env.perf import IterationTimeModel
from llmsched_env.perf.store import calibration_bytes
from llmsched_hardware.calibration import engine as calibration_engine

FORMATS = {
    "vidur": "llmsched_hardware.calibration.importers.vidur",
    "llmservingsim": "llmsched_hardware.calibration.importers.llmservingsim",
    "aiconfigurator": "llmsched_hardware.calibration.importers.aiconfigurator",
}

INTERRUPTED = 130


class Importer(Protocol):
    """A module that reads one format."""

    def import_profile(self, source: Path, model: str, name: str) -> IterationTimeModel:
        """The calibration of ``model`` in the profile at ``source``, its provenance under ``name``.

        Raises:
            ConfigError: a file that is missing or not of the format, a missing column, a model the profile does not hold.
        """


def arguments() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser("import", help="build a calibration from a raw profile")
    build.add_argument("source", type=Path, metavar="SOURCE", help="the raw profile, a folder or file")
    build.add_argument("--format", choices=tuple(FORMATS), required=True)
    build.add_argument("--model", required=True, metavar="MODEL", help="which model of the profile, such as llama-2-7b")
    build.add_argument("--name", required=True, metavar="NAME", help="name of the calibration")
    build.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npz or .json")
    calibration_engine.add_engine_command(commands)
    return parser


def import_profile(format_name: str, source: Path, model: str, name: str) -> IterationTimeModel:
    """The calibration in a raw profile (``Importer.import_profile``)."""
    if not source.exists():
        raise ConfigError(f"SOURCE: {source} does not exist")
    importer: Importer = importlib.import_module(FORMATS[format_name])
    return importer.import_profile(source, model, name)


def main(words: Sequence[str] | None = None) -> int:
    options = arguments().parse_args(words)
    try:
        return calibration_engine.run(options) if options.command == "engine" else run_import(options)
    except (ConfigError, MissingExtraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (EngineError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the points measured so far are kept, go on with --resume", file=sys.stderr)
        return INTERRUPTED


def run_import(options: argparse.Namespace) -> int:
    """Carry the subcommand ``import`` out; the exit code."""
    check_file("--out", options.out)
    if not options.name.strip():
        raise ConfigError("--name: empty")
    model = import_profile(options.format, options.source, options.model, options.name)
    suffix, data = calibration_bytes(model)
    if options.out.suffix != suffix:
        raise ConfigError(f"--out: {options.out}, must end in {suffix} for a {type(model).__name__}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_bytes(data)
    source = model.provenance
    print(f"{options.out}: {len(data):,} bytes, {type(model).__name__}")
    for label, text in (("source", source.source), ("gpu", source.gpu), ("model", source.model), ("engine", source.engine)):
        print(f"{label:<12} {text}")
    print(f"{'valid range':<12} {source.valid_range}")
    print(f"{'fit error':<12} {source.fit_error}")
    if source.num_blocks is not None:
        print(f"{'KV capacity':<12} {source.num_blocks:,} blocks of {source.block_size} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
