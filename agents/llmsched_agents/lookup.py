"""One builder for every policy that a person names: in tables, on command lines, in a server's configuration.

A text is the name of a policy (one that ships, that the program registered or that an installed package offers), the name of an agent
that ships (``generalist``), the folder of a checkpoint, or ``module:attribute``.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llmsched_agents.adaptive import Adaptive, AdaptiveAged
from llmsched_agents.checkpoint import CONFIG, WEIGHTS, checkpoint_folder, load_checkpoint, shipped_agents
from llmsched_agents.learned_shrinkage import LearnedShrinkage
from llmsched_agents.router_agent import LearnedRouter
from llmsched_baselines import SHIPPED as SHIPPED_POLICIES
from llmsched_baselines import Setting, make_policy, policy_class, policy_names
from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.registry import POLICIES, ROUTERS, is_reference
from llmsched_env.runner import Policy
from llmsched_env.types import LengthStatistics, QueueLayout

LEARNERS = (Adaptive, AdaptiveAged, LearnedShrinkage)
"""Policies that learn while they serve; they have no checkpoint."""
POLICIES.built_in({policy.name: policy for policy in LEARNERS})
ROUTERS.built_in({LearnedRouter.name: LearnedRouter})

Kind = Literal["registered", "checkpoint", "own"]

# What ``llmsched_env.runner.Policy`` asks for; None for a method.
_MEMBERS: dict[str, type | None] = {
    "name": str,
    "layout": QueueLayout,
    "engine": EngineConfig,
    "known_lengths": bool,
    "notes": str,
    "decide": None,
    "reset": None,
}


@dataclass(frozen=True, slots=True)
class NamedPolicy:
    """A policy that can be built for any setting; plain values, so that worker processes build it themselves.

    Attributes:
        name: in tables and as the owner of options (``policy.NAME.OPTION``).
        text: as given.
        kind: a name in the registry, a checkpoint, or ``module:attribute``.
    """

    name: str
    text: str
    kind: Kind

    def build(self, setting: Setting, *, overload: bool = True, **options: Any) -> Policy:
        """The policy in a setting.

        Args:
            overload: let policies whose theory has a stability region run outside it (said in ``notes``).
            options: of the policy's constructor; of a checkpoint ``deterministic`` and ``seed``.

        Raises:
            ConfigError: options or a setting that it refuses, or an object that is no policy.
            MissingExtraError: a package that it needs is not installed.
        """
        if self.kind == "checkpoint":
            unknown = sorted(set(options) - {"deterministic", "seed"})
            if unknown:
                raise ConfigError(f"options.{unknown[0]}: not an option of a learned agent (options: deterministic, seed)")
            return load_checkpoint(self.text, setting, name=self.name, **options)
        try:
            made = make_policy(self.text, setting, overload=overload, **options)
        except ConfigError:
            raise
        except Exception as error:  # somebody's own code: whatever it raises, the run does not start with it
            raise ConfigError(f"policy: {self.text!r}: {type(error).__name__}: {error}") from error
        check_policy(f"policy: {self.text!r}", made)
        return made


    def digest(self) -> str:
        """Of what it does, so that results of another state are not taken for its own: a checkpoint's files, the sources of all agents
        for one of them, or the source file of a policy from outside. Empty for baselines that ship, which the version stands for, and
        where there is no source.

        Raises:
            ConfigError: a folder without the files of a checkpoint.
        """
        if self.kind == "checkpoint":
            folder = checkpoint_folder(self.text)
            read = [checks.file_bytes(f"checkpoint: {folder / name}", folder / name) for name in (CONFIG, WEIGHTS)]
            return hashlib.sha256(b"".join(read)).hexdigest()[:16]
        factory = policy_class(self.text)
        if factory in SHIPPED_POLICIES:
            return ""
        try:
            source = Path(inspect.getsourcefile(factory) or "")
            own = factory.__module__.partition(".")[0] == __name__.partition(".")[0]  # its rule is spread over several files
            files = sorted(source.parent.glob("*.py")) if own else [source]
            return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]
        except (OSError, TypeError):  # made in an interactive session, or of no source
            return ""


def replica_policy(text: str, **options: Any) -> Callable[[EngineConfig, LengthStatistics, float], Policy]:
    """Who decides about admissions on each replica of a cluster, by name, for ``LLMSchedCluster`` (``policy``).

    Raises:
        ConfigError: as ``named_policy``; when it is called, an option or a setting that the policy refuses.
    """
    named = named_policy(text)

    def build(engine: EngineConfig, statistics: LengthStatistics, rate: float) -> Policy:
        return named.build(Setting(statistics, rate, engine), **options)

    return build


def check_policy(owner: str, made: Any) -> None:
    """Refuse an object that lacks what ``llmsched_env.runner.Policy`` asks for.

    Raises:
        ConfigError: naming the member.
    """
    for name, kind in _MEMBERS.items():
        if not hasattr(made, name):
            raise ConfigError(f"{owner}: {type(made).__name__} has no {name!r} (see llmsched_env.runner.Policy)")
        value = getattr(made, name)
        if kind is None and not callable(value):
            raise ConfigError(f"{owner}: {type(made).__name__}: {name} is {checks.shown(value)}, must be a method")
        if kind is not None and not isinstance(value, kind):
            raise ConfigError(f"{owner}: {type(made).__name__}: {name} is {checks.shown(value)}, must be a {kind.__name__}")


def named_policy(text: str) -> NamedPolicy:
    """What a text stands for; a reference's module is imported now, so that a mistake shows before any work.

    Raises:
        ConfigError: nothing of that name (the nearest is given), or a reference that cannot be imported.
    """
    if text in POLICIES:
        policy_class(text)
        return NamedPolicy(text, text, "registered")
    if is_checkpoint(text):
        return NamedPolicy(checkpoint_folder(text).resolve().name, text, "checkpoint")
    if is_reference(text):
        own = getattr(policy_class(text), "name", None)
        return NamedPolicy(own if isinstance(own, str) and own else text.partition(":")[2], text, "own")
    known = [*policy_names(), *shipped_agents()]
    where = "neither a folder with a checkpoint nor a policy" if "/" in text or "\\" in text else "unknown"
    also = "; or the folder of a checkpoint, or module:attribute"
    raise ConfigError(f"policy: {text!r} is {where}{did_you_mean(text, known)} (known: {', '.join(known)}{also})")


def named_policies(option: str, texts: Sequence[str]) -> dict[str, NamedPolicy]:
    """What several texts stand for, by name in tables; the same text twice counts once.

    Raises:
        ConfigError: as ``named_policy``; or two of them with one name.
    """
    found: dict[str, NamedPolicy] = {}
    for text in dict.fromkeys(texts):
        policy = named_policy(text)
        if policy.name in found:
            raise ConfigError(f"{option}: {found[policy.name].text!r} and {text!r} would both be {policy.name!r} in the tables")
        found[policy.name] = policy
    return found


def is_checkpoint(text: str) -> bool:
    """Whether a text is an agent that ships, or a folder, which must then be a checkpoint's."""
    try:
        return bool(text) and text not in POLICIES and (text in shipped_agents() or Path(text).is_dir())
    except OSError:  # a name that is too long
        return False


def option_owners(policies: Mapping[str, NamedPolicy]) -> dict[str, str]:
    """Whose options ``--set policy.NAME.OPTION`` can set: name in tables to what has the signature; checkpoints have none."""
    return {name: policy.text for name, policy in policies.items() if policy.kind != "checkpoint"}
