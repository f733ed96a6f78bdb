"""Routers that somebody names: built and compiled before any work, and known by what they are made of."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llmsched_agents.lookup  # the learned router has a name only once this is imported, in worker processes too
from llmsched_agents.checkpoint import CONFIG, WEIGHTS
from llmsched_baselines.routers import SHIPPED, Door, Router, make_router, router_class
from llmsched_env import checks
from llmsched_env.cluster.routing import RouterRule
from llmsched_env.errors import ConfigError, MissingExtraError, policy_named


def build_router(name: str, door: Door, options: Mapping[str, Any]) -> Router:
    """A router for a cluster, whoever wrote it.

    Raises:
        ConfigError: as ``make_router``; its constructor raises; or what it gives has no rule.
        MissingExtraError: a package that it needs is not installed.
    """
    try:
        made = make_router(name, door, **options)
    except (ConfigError, MissingExtraError):
        raise
    except (Exception, SystemExit) as error:  # somebody's own code: whatever it raises, the run does not start with it
        raise ConfigError(f"router: {name!r}: {type(error).__name__}: {error}") from error
    rule = getattr(made, "rule", None)
    if not isinstance(rule, RouterRule):
        raise ConfigError(f"router: {name!r}: {type(made).__name__}: rule is {checks.shown(rule)}, must be a RouterRule")
    return made


def check_router(option: str, name: str, door: Door, options: Mapping[str, Any]) -> None:
    """Build a router and compile its rule.

    Raises:
        ConfigError: as ``build_router``, or the rule cannot be compiled; ``option`` and the name stand before the reason.
        MissingExtraError: a package that it needs is not installed.
    """
    try:
        _ = build_router(name, door, options).rule.address
    except ConfigError as error:
        raise ConfigError(f"{option}: {name!r}: {str(error).removeprefix(f'router: {name!r}: ')}") from error


@contextmanager
def router_named(name: str) -> Iterator[None]:
    """Say whose run failed; a disk that is full is not the router's doing.

    Raises:
        PolicyError: as ``policy_named``.
        OSError: what the run itself could not write or read.
    """
    failed: OSError | None = None
    with policy_named(f"router {name!r}"):
        try:
            yield
        except OSError as error:
            failed = error
    if failed is not None:
        raise failed


def router_digest(name: str) -> str:
    """Of what a router does, so that rows of another state are not taken for its own.

    It is that of the source file of a router from outside; for one of ``llmsched_agents`` that of the package's sources and of the
    checkpoints of routers that ship. Empty for baselines that ship, and where there is no source.

    Raises:
        ConfigError: as ``router_class``.
    """
    factory = router_class(name)
    if factory in SHIPPED:
        return ""
    try:
        source = Path(inspect.getsourcefile(factory) or "")
        files = [source]
        if getattr(factory, "__module__", "").partition(".")[0] == llmsched_agents.__name__:  # its rule is spread over several files
            checkpoints = (path for kind in (CONFIG, WEIGHTS) for path in source.parent.glob(f"routers/*/{kind}"))
            files = [*sorted(source.parent.glob("*.py")), *sorted(checkpoints)]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
    except (OSError, TypeError):  # made in an interactive session, or of no source
        return ""
