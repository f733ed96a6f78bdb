"""What an operator has promised a tenant: a weight and latency limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmsched_env import checks
from llmsched_env.errors import ConfigError

MOST_WEIGHT = 1e9


@dataclass(frozen=True, slots=True)
class TenantTerms:
    """The terms of one tenant.

    Attributes:
        name: for people; the tenants of a workload have different names.
        weight: share of the service that the tenant is entitled to, relative to the others', > 0.
        ttft: most seconds to the first token, > 0; infinite: no limit.
        tpot: most seconds per output token after the first, > 0; infinite: no limit.

    Raises:
        ConfigError: a value out of range.
    """

    name: str
    weight: float = 1.0
    ttft: float = math.inf
    tpot: float = math.inf

    def __post_init__(self) -> None:
        checks.text("tenant.name", self.name, empty=False)
        object.__setattr__(self, "weight", checks.number("tenant.weight", self.weight, high=MOST_WEIGHT, open_low=True))
        for name in ("ttft", "tpot"):
            limit = checks.number(f"tenant.{name}", getattr(self, name), high=math.inf, unit="seconds", open_low=True)
            object.__setattr__(self, name, limit)


def check_terms(field: str, tenants: object) -> tuple[TenantTerms, ...]:
    """``tenants`` as a tuple of terms, each name once.

    Raises:
        ConfigError: something else.
    """
    if not isinstance(tenants, tuple | list) or not all(isinstance(one, TenantTerms) for one in tenants):
        raise ConfigError(f"{field}: {checks.shown(tenants)}, must be TenantTerms")
    names = [one.name for one in tenants]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"{field}: {twice!r} is named {names.count(twice)} times, every tenant must have a name of its own")
    return tuple(tenants)
