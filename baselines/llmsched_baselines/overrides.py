"""`--set KEY=VALUE`: engine fields and policy options from the command line, parsed by the type of their target.

Keys are ``engine.FIELD`` and ``policy.OPTION``; where several policies run, ``policy.NAME.OPTION``.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from llmsched_baselines import policy_class, policy_options
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, did_you_mean
from llmsched_env.perf import IterationTimeModel, load_calibration


@dataclass(frozen=True, slots=True)
class Overrides:
    """What the user set: fields of the engine, and options by policy name."""

    engine: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def options(self, policy: str) -> Mapping[str, Any]:
        return self.policy.get(policy, {})

    def items(self) -> list[tuple[str, Any]]:
        """(key, value) pairs as they would stand on the command line."""
        pairs = [(f"engine.{name}", value) for name, value in self.engine.items()]
        return pairs + [(f"policy.{name}.{option}", value) for name, options in self.policy.items() for option, value in options.items()]


def engine_keys(exclude: Iterable[str] = ()) -> dict[str, Any]:
    """Settable engine fields and their types; ``d0`` and ``d1`` stand for a linear time model, ``time_model`` is a name or file."""
    hints = typing.get_type_hints(EngineConfig)
    keys = {f.name: hints[f.name] for f in dataclasses.fields(EngineConfig)} | {"d0": float, "d1": float}
    return {name: hint for name, hint in keys.items() if name not in set(exclude)}


def policy_keys(text: str) -> dict[str, Any]:
    """Options of a policy, a name or ``module:attribute``, and their types; text where none is declared."""
    factory = policy_class(text)
    signature: Any = inspect.getattr_static(factory, "__init__") if isinstance(factory, type) else factory
    hints = typing.get_type_hints(signature)
    return {option: hints.get(option, str) for option in policy_options(text)}


def parse_overrides(pairs: Sequence[str], policies: Mapping[str, str], *, exclude_engine: Iterable[str] = ()) -> Overrides:
    """Parse the words of ``--set``.

    Args:
        policies: whose options can be set: name to what has the signature (``policy_keys``).

    Raises:
        ConfigError: not KEY=VALUE, unknown key (the nearest is given), a value of the wrong type, a key given twice.
    """
    engine: dict[str, Any] = {}
    policy: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r}: must be KEY=VALUE, such as engine.num_blocks=2816")
        kind, _, name = key.partition(".")
        if kind == "engine":
            target, allowed = engine, engine_keys(exclude_engine)
        elif kind == "policy":
            owner, name = _policy_of(key, name, policies)
            target, allowed = policy.setdefault(owner, {}), policy_keys(policies[owner])
        else:
            raise ConfigError(f"--set {key}: must begin with 'engine.' or 'policy.'{did_you_mean(kind, ('engine', 'policy'))}")
        if name not in allowed:
            raise ConfigError(f"--set {key}: unknown key{did_you_mean(name, allowed)} (allowed: {', '.join(allowed) or 'none'})")
        if name in target:
            raise ConfigError(f"--set {key}: given twice")
        target[name] = parse_value(key, text, allowed[name])
    return Overrides(engine, policy)


def with_calibration(overrides: Overrides, calibration: str | None) -> Overrides:
    """``--calibration``: its time model and, where it states them, its KV blocks; what the user set wins.

    Raises:
        ConfigError: a calibration that cannot be loaded, or a time model set as well.
    """
    if calibration is None:
        return overrides
    for name in ("time_model", "d0", "d1"):
        if name in overrides.engine:
            raise ConfigError(f"--set engine.{name}: the time model is --calibration {calibration} already, give one of them")
    try:
        provenance = load_calibration(calibration).provenance
    except ConfigError as error:
        raise ConfigError(f"--calibration: {error}") from error
    stated = {"num_blocks": provenance.num_blocks, "block_size": provenance.block_size}
    known = {name: value for name, value in stated.items() if value is not None}
    return Overrides({"time_model": calibration, **known, **overrides.engine}, overrides.policy)


def parse_value(key: str, text: str, hint: Any) -> Any:
    """``text`` as a value of type ``hint``: bool, int, float, str, Literal, Optional, or a sequence (``10,5``).

    Raises:
        ConfigError: naming key, value and what is allowed.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        kinds = [a for a in arguments if a is not types.NoneType]
        if len(kinds) < len(arguments) and text.lower() == "none":
            return None
        for kind in kinds[:-1]:
            try:
                return parse_value(key, text, kind)
            except ConfigError:
                continue
        return parse_value(key, text, kinds[-1])
    if origin is Literal:
        if text not in arguments:
            raise ConfigError(f"--set {key}: {text!r}, must be one of {', '.join(arguments)}{did_you_mean(text, arguments)}")
        return text
    if hint is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ConfigError(f"--set {key}: {text!r}, must be true or false")
        return text.lower() in ("true", "1")
    if hint is int:
        try:
            return int(text)
        except ValueError:
            raise ConfigError(f"--set {key}: {text!r}, must be an integer") from None
    if hint is float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if math.isnan(number):
            raise ConfigError(f"--set {key}: {text!r}, must be a number")
        return number
    if origin is not None and isinstance(origin, type) and issubclass(origin, Sequence):
        words = text.split(",") if text else []
        return tuple(parse_value(key, word.strip(), arguments[0]) for word in words)
    if hint is str or hint is IterationTimeModel:
        return text
    raise ConfigError(f"--set {key}: cannot be set from the command line")


def _policy_of(key: str, name: str, policies: Mapping[str, str]) -> tuple[str, str]:
    owner, dot, option = name.partition(".")
    if dot:
        if owner not in policies:
            hint = did_you_mean(owner, policies)
            raise ConfigError(f"--set {key}: policy {owner!r} does not run here{hint} (policies: {', '.join(policies)})")
        return owner, option
    if not policies:
        raise ConfigError(f"--set {key}: no policy with options runs here")
    if len(policies) == 1:
        return next(iter(policies)), name
    raise ConfigError(f"--set {key}: several policies run, name one, such as policy.{next(iter(policies))}.{name}")
