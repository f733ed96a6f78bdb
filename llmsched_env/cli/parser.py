"""The argument parser of the programs."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Refuses in the same words as every other refusal here."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")
