"""Errors a user can mend, the one "did you mean", and the hint for a missing extra."""

from __future__ import annotations

import difflib
import functools
import importlib
import json
import shlex
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from urllib.parse import unquote, urlsplit


class ConfigError(ValueError):
    """A setting outside what is allowed; the message names field, value and allowed range."""


class UnknownSettingError(ConfigError, TypeError):
    """A setting that there is not: also the ``TypeError`` of an unexpected keyword, from which tools see that they must do without it."""


class InfeasibleError(ConfigError):
    """Parameters that violate a condition of the theory; the message states which, and the nearest feasible value."""


class MissingExtraError(ImportError):
    """An optional package is not installed; the message gives the pip command that mends it."""


class EngineError(RuntimeError):
    """A real engine could not start or has died; the message names the cause."""


class PolicyError(RuntimeError):
    """A policy failed while it decided. The message says which, where and how; ``details`` is its own traceback, where there is one."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message, details)  # both, so that worker processes can hand it over
        self.details = details

    def __str__(self) -> str:
        return str(self.args[0])


@contextmanager
def policy_named(what: str) -> Iterator[None]:
    """Say whose run failed: ``what`` stands before the error's own words.

    Raises:
        PolicyError: in place of any error, and of a program's end that a policy asks for.
    """
    try:
        yield
    except PolicyError:
        raise
    except ConfigError as error:  # a decision that was refused: its words say all
        raise PolicyError(f"{what}: {error}") from error
    except (Exception, SystemExit) as error:
        raise PolicyError(f"{what}: {type(error).__name__}: {error}", traceback.format_exc()) from error


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """``; did you mean 'NAME'?`` where one of the allowed words is near, however it is capitalised; else nothing."""
    by_lower = {name.lower(): name for name in allowed}
    near = difflib.get_close_matches(word[:100].lower(), by_lower, n=1)
    return f"; did you mean {by_lower[near[0]]!r}?" if near else ""


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{module.partition('.')[0]} is not installed; run: {install_command(extra)}") from error


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
        return f"pip install {editable}{_quoted(f'{unquote(urlsplit(url).path)}[{extra}]')}"
    if "vcs_info" in record:
        url = f"{record['vcs_info']['vcs']}+{url}@{record['vcs_info']['commit_id']}"
    return f"pip install {_quoted(f'llmsched-env[{extra}]' + (f' @ {url}' if url else ''))}"


def _quoted(word: str) -> str:
    """A word for a shell: in plain quotes where it holds none itself."""
    return f"'{word}'" if "'" not in word else shlex.quote(word)
