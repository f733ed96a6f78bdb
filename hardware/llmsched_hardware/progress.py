"""How work that takes minutes says how far it is, whoever shows it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol


class Bar(Protocol):
    """Counts to the total it was opened with."""

    def advance(self, count: int = 1, description: str | None = None) -> None:
        """Count."""

    def show(self, description: str) -> None:
        """What is being done now."""


Progress = Callable[[int], AbstractContextManager[Bar]]
"""Opens a bar that counts to a total."""
