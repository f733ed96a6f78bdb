"""Expert policies: one file a policy, one method ``decide(view) -> Decision``."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from baselines.expected_work import ExpectedWork
from baselines.greedy import Fcfs, Sarathi, Vllm
from baselines.late_last import LateLast
from baselines.mc_sf import McSf
from baselines.modified_wait import ModifiedWait
from baselines.nested_wait import NestedWait
from baselines.oracle import OracleSjf
from baselines.policy import Policy, Setting
from baselines.reserve import Reserve, ShortestPrompt
from baselines.vllm_v0 import VllmV0
from baselines.wait import Wait
from baselines.wait_cp import WaitCp
from llmsched_env.errors import ConfigError

_POLICIES: dict[str, type[Policy]] = {
    cls.name: cls
    for cls in (
        Fcfs,
        Vllm,
        VllmV0,
        Sarathi,
        Wait,
        NestedWait,
        ShortestPrompt,
        Reserve,
        ExpectedWork,
        LateLast,
        McSf,
        OracleSjf,
        ModifiedWait,
        WaitCp,
    )
}


def policy_names() -> list[str]:
    return list(_POLICIES)


def policy_class(name: str) -> type[Policy]:
    """The class behind a name.

    Raises:
        ConfigError: unknown name (the nearest one is given).
    """
    if name not in _POLICIES:
        near = difflib.get_close_matches(name, _POLICIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"policy: {name!r} is unknown{hint} (known: {', '.join(_POLICIES)})")
    return _POLICIES[name]


def policy_options(name: str) -> dict[str, inspect.Parameter]:
    """The options a policy's constructor takes, by name."""
    parameters = dict(inspect.signature(policy_class(name)).parameters)
    del parameters["setting"]
    return parameters


def make_policy(name: str, setting: Setting, *, overload: bool = False, **options: Any) -> Policy:
    """Build a policy for a setting.

    Args:
        overload: let policies whose theory has a stability region run outside it (said in ``notes``).
        options: arguments of the policy's constructor.

    Raises:
        ConfigError: unknown policy or option (the nearest one is given), or a refused value.
        InfeasibleError: parameters that violate a condition, unless ``overload``.
    """
    cls = policy_class(name)
    allowed = policy_options(name)
    for option in options:
        if option not in allowed:
            near = difflib.get_close_matches(option, allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"policy.{option}: not an option of {name!r}{hint} (options: {', '.join(allowed) or 'none'})")
    if "overload" in allowed:
        options.setdefault("overload", overload)
    factory: Any = cls
    policy: Policy = factory(setting, **options)
    return policy


__all__ = ["Policy", "Setting", "make_policy", "policy_class", "policy_names", "policy_options"]
