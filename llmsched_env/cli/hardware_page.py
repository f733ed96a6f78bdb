"""``llmsched hardware-page``: docs/hardware.md from what calibrations and validations have left on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.cli.frame import Command, Options, Outcome, Screen
from llmsched_env.files import check_file
from llmsched_env.markdown import write_page
from llmsched_env.pages.hardware.page import page


@dataclass(frozen=True, kw_only=True)
class HardwarePage(Options):
    """Write the page that says how to measure on one's own hardware and shows what was measured; figures come from the files alone."""

    calibrations: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE.json [FILE.json ...]", help_behavior_hint="(default: none)")] = ()
    """What llmsched calibrate engine wrote."""
    validations: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FOLDER [FOLDER ...]", help_behavior_hint="(default: none)")] = ()
    """What llmsched validate wrote."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The page; replaced."""


def run(options: HardwarePage, screen: Screen) -> Outcome:
    """Nothing is written unless the whole page could be."""
    check_file("--out", options.out)
    text = page(options.calibrations, options.validations)
    write_page(options.out, text.split("\n"))
    screen.print(str(options.out))
    return Outcome({"page": options.out})


COMMAND = Command("hardware-page", HardwarePage, run, "docs/hardware.md from what calibrate and validate have left")
main = COMMAND.main
