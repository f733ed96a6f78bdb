"""Expert policies: one file a policy, one method ``decide(view) -> Decision``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from llmsched_baselines.expected_work import ExpectedWork
from llmsched_baselines.greedy import Fcfs, Sarathi, Vllm
from llmsched_baselines.late_last import LateLast
from llmsched_baselines.mc_sf import McSf
from llmsched_baselines.modified_wait import ModifiedWait
from llmsched_baselines.nested_wait import NestedWait
from llmsched_baselines.operate import Operate
from llmsched_baselines.oracle import OracleSjf
from llmsched_baselines.policy import Policy, Setting
from llmsched_baselines.pooled_work import PooledWork
from llmsched_baselines.predicted import PredictedWork
from llmsched_baselines.reserve import Reserve, ShortestPrompt
from llmsched_baselines.rivals import ActiveCap, PrefillCadence, PrefillDecodeInterval, PrefillThreshold
from llmsched_baselines.vllm_v0 import VllmV0
from llmsched_baselines.vtc import Vtc
from llmsched_baselines.wait import Wait
from llmsched_baselines.wait_cp import WaitCp
from llmsched_baselines.wfq import TenantPriority, Wfq
from llmsched_env.registry import POLICIES, options_of

SHIPPED: tuple[type[Policy], ...] = (
    Fcfs,
    Vllm,
    VllmV0,
    Sarathi,
    PrefillCadence,
    PrefillDecodeInterval,
    ActiveCap,
    PrefillThreshold,
    Wait,
    NestedWait,
    ShortestPrompt,
    Reserve,
    ExpectedWork,
    LateLast,
    McSf,
    OracleSjf,
    PooledWork,
    Operate,
    ModifiedWait,
    WaitCp,
    Vtc,
    Wfq,
    TenantPriority,
    PredictedWork,
)
POLICIES.built_in({cls.name: cls for cls in SHIPPED})


def policy_names() -> list[str]:
    """Names of the policies that ship, that this program registered and that installed packages offer."""
    return POLICIES.names()


def policy_class(name: str) -> Callable[..., Policy]:
    """The class or factory behind a name, or behind ``module:attribute``: called with a ``Setting`` and options it gives the policy.

    Raises:
        ConfigError: unknown name (the nearest one is given), or a module that cannot be imported.
    """
    return POLICIES.factory(name, "a setting")


def policy_options(name: str) -> dict[str, inspect.Parameter]:
    """The options a policy's constructor takes, by name: all its parameters but the first, the setting."""
    return options_of(policy_class(name))


def make_policy(name: str, setting: Setting, *, overload: bool = False, **options: Any) -> Policy:
    """Build a policy for a setting.

    Args:
        name: of a policy, or ``module:attribute``.
        overload: let policies whose theory has a stability region run outside it (said in ``notes``).
        options: arguments of the policy's constructor.

    Raises:
        ConfigError: unknown policy or option (the nearest one is given), or a refused value.
        InfeasibleError: parameters that violate a condition, unless ``overload``.
    """
    factory = policy_class(name)
    allowed = policy_options(name)
    POLICIES.check_options(name, options, allowed)
    if "overload" in allowed:
        options.setdefault("overload", overload)
    return factory(setting, **options)


__all__ = ["Policy", "Setting", "make_policy", "policy_class", "policy_names", "policy_options"]
