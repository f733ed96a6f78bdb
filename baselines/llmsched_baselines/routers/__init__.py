"""Routers: which replica of a cluster gets a call. One file a concept, by name ``make_router(name, door, **options)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llmsched_baselines.routers.affinity import PrefixAffinity
from llmsched_baselines.routers.blind import Random, RoundRobin
from llmsched_baselines.routers.cost import Cost
from llmsched_baselines.routers.dynamo import Dynamo
from llmsched_baselines.routers.llm_d import LlmD
from llmsched_baselines.routers.router import Door, Router
from llmsched_baselines.routers.sglang import Sglang
from llmsched_baselines.routers.shortest import JoinShortestQueue, LeastKv, PowerOfTwo
from llmsched_baselines.routers.sticky import Sticky
from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.registry import ROUTERS, options_of

SHIPPED: tuple[type[Router], ...] = (
    RoundRobin,
    Random,
    PowerOfTwo,
    JoinShortestQueue,
    LeastKv,
    Sticky,
    PrefixAffinity,
    Sglang,
    LlmD,
    Dynamo,
    Cost,
)
ROUTERS.built_in({cls.name: cls for cls in SHIPPED})


def router_names() -> list[str]:
    """Names of the routers that ship, that this program registered and that installed packages offer."""
    return ROUTERS.names()


def router_class(name: str) -> Callable[..., Router]:
    """The class or factory behind a name, or behind ``module:attribute``: called with a ``Door`` and options it gives the router.

    Raises:
        ConfigError: unknown name (the nearest one is given), or a module that cannot be imported.
    """
    return ROUTERS.factory(name, "a door")


def router_options(name: str) -> dict[str, inspect.Parameter]:
    """The options a router's constructor takes, by name: all its parameters but the first, the door."""
    return options_of(router_class(name))


def make_router(name: str, door: Door, **options: Any) -> Router:
    """Build a router for a cluster.

    Args:
        name: of a router, or ``module:attribute``.
        options: arguments of the router's constructor.

    Raises:
        ConfigError: unknown router or option (the nearest one is given), or a refused value.
    """
    factory, allowed = router_class(name), router_options(name)
    if not isinstance(door, Door):
        raise ConfigError(f"door: {checks.shown(door)}, must be a Door")
    ROUTERS.check_options(name, options, allowed)
    return factory(door, **options)


__all__ = ["Door", "Router", "make_router", "router_class", "router_names", "router_options"]
