"""Errors a user can mend, the one "did you mean", and the hint for a missing extra."""

from __future__ import annotations

import difflib
import functools
import importlib
import json
from collections.abc import Iterable
from importlib import metadata
from types import ModuleType
from urllib.parse import unquote, urlsplit


class ConfigError(ValueError):
    """A setting outside what is allowed; the message names field, value and allowed range."""


class InfeasibleError(ConfigError):
    """Parameters that violate a condition of the theory; the message states which, and the nearest feasible value."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message gives the pip command that mends it."""


class EngineError(RuntimeError):
    """A real engine could not start or has died; the message names the cause."""


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """``; did you mean 'NAME'?`` where one of the allowed words is near, else nothing."""
    near = difflib.get_close_matches(word[:100], list(allowed), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module} is not installed; run: {install_command(extra)}") from error


@functools.cache
def install_command(extra: str) -> str:
    """The command that adds an extra to this installation, from where it came (PEP 610): a checkout, a file, a repository or the index."""
    try:
        record = json.loads(metadata.distribution("llmsched-env").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        record = {}
    url = record.get("url", "")
    if "dir_info" in record:
        editable = "-e " if record["dir_info"].get("editable") else ""
        return f"pip install {editable}'{unquote(urlsplit(url).path)}[{extra}]'"
    if "vcs_info" in record:
        url = f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}"
    return f"pip install 'llmsched-env[{extra}] @ {url}'" if url else f"pip install 'llmsched-env[{extra}]'"
