"""Errors a user can mend, and the hint for a missing extra."""

from __future__ import annotations

import importlib
from types import ModuleType


class ConfigError(ValueError):
    """A setting outside what is allowed; the message names field, value and allowed range."""


class InfeasibleError(ConfigError):
    """Parameters that violate a condition of the theory; the message states which, and the nearest feasible value."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message gives the pip command that mends it."""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module} is not installed; run: pip install 'llmsched-env[{extra}]'") from error
