"""Hyper-parameters in the form of rl_zoo3: one YAML file an algorithm, one entry a task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmsched_agents.ppo import ALGORITHMS as SB3_ALGORITHMS
from llmsched_agents.ppo import Decay, Discounting
from llmsched_agents.recipe import Recipe
from llmsched_agents.rollouts import RolloutPlan
from llmsched_env.errors import ConfigError, did_you_mean, require

ALGORITHMS = (*SB3_ALGORITHMS, "paired-rollouts")
FOLDER = Path(__file__).parent / "hyperparams"
_SCHEDULED = ("learning_rate", "clip_range", "clip_range_vf", "ent_coef")


@dataclass(frozen=True)
class Hyperparameters:
    """One entry, checked.

    Attributes:
        n_envs: environments.
        n_timesteps: decisions in all, those of every environment counted.
        entropy: weight of the entropy, a number or a schedule of the progress left (1 to 0).
        net_arch: hidden layers.
        options: of the algorithm's constructor (``n_steps``, ``batch_size``, ``learning_rate``, ...).
        env_kwargs: of ``AgentVecEnv``: ``num_requests``, ``horizon``, ``backlog``, ``max_iterations``.
        recipe, discounting, kl: ours, beside rl_zoo3's keys.
        hidden: the critic reads hidden numbers (``llmsched_agents.peak``).
        greedy_start: strength of ``greedy_bias``; 0 for none.
        rollouts, first_level: of ``paired-rollouts``: the plan, and the level that the first round follows.
    """

    n_envs: int = 256
    n_timesteps: int = 1_000_000
    entropy: Callable[[float], float] | float = 0.0
    net_arch: Any = (64, 64)
    options: Mapping[str, Any] = field(default_factory=dict)
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe = field(default_factory=Recipe)
    discounting: Discounting = field(default_factory=Discounting)
    kl: Decay | None = None
    hidden: bool = False
    greedy_start: float = 0.0
    rollouts: RolloutPlan | None = None
    first_level: float = 0.97


def schedule(name: str, value: Any) -> Callable[[float], float] | float:
    """A number, or rl_zoo3's ``lin_X``: X times the progress left.

    Raises:
        ConfigError: neither.
    """
    if isinstance(value, str) and value.startswith("lin_"):
        start = schedule(name, value.removeprefix("lin_"))
        assert isinstance(start, float)

        def linear(left: float) -> float:
            return start * left

        return linear
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"hyperparameters.{name}: {value!r}, must be a number or lin_NUMBER") from None


def read_hyperparameters(algo: str, entry: str, path: Path | None = None, changes: Mapping[str, Any] | None = None) -> Hyperparameters:
    """An entry of the YAML file of an algorithm.

    Args:
        entry: a key of the file.
        path: default ``agents/hyperparams/ALGO.yml``.
        changes: values that replace or extend those of the entry; dotted keys reach into mappings (``recipe.hold``).

    Raises:
        ConfigError: no such file or entry, not YAML, an unknown key (the nearest is given) or a refused value.
        MissingExtraError: PyYAML is not installed.
    """
    if algo not in ALGORITHMS:
        raise ConfigError(f"algo: {algo!r}, must be one of {', '.join(ALGORITHMS)}")
    yaml = require("yaml", "agents")
    file = path if path is not None else FOLDER / f"{algo}.yml"
    try:
        entries = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"hyperparameters: {file} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"hyperparameters: {file} is not YAML ({error})") from error
    if not isinstance(entries, dict) or entry not in entries:
        known = sorted(entries) if isinstance(entries, dict) else []
        raise ConfigError(f"hyperparameters: {file} has no entry {entry!r}{_near(entry, known)} (entries: {', '.join(known) or 'none'})")
    values = _deep(entries[entry])
    for key, value in (changes or {}).items():
        _set(values, key, value)
    return _checked(algo, values)


def _deep(values: Any) -> Any:
    return {k: _deep(v) for k, v in values.items()} if isinstance(values, dict) else values


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    head, dot, rest = key.partition(".")
    if not dot:
        values[key] = value
        return
    inner = values.setdefault(head, {})
    if not isinstance(inner, dict):
        raise ConfigError(f"hyperparameters.{key}: {head} is not a mapping")
    _set(inner, rest, value)


def _checked(algo: str, values: dict[str, Any]) -> Hyperparameters:
    options = dict(values)
    policy_kwargs = options.pop("policy_kwargs", {})
    if not isinstance(policy_kwargs, dict) or set(policy_kwargs) - {"net_arch"}:
        raise ConfigError(f"hyperparameters.policy_kwargs: {policy_kwargs!r}, must be a mapping with net_arch alone")
    options.pop("policy", None)  # rl_zoo3 needs it; here the policy is ``llmsched_agents.policy``'s
    found: dict[str, Any] = {"net_arch": policy_kwargs.get("net_arch", (64, 64))}
    for name, kind in (("n_envs", int), ("n_timesteps", int), ("hidden", bool), ("greedy_start", float), ("first_level", float)):
        if name in options:
            found[name] = _number(name, options.pop(name), kind)
    if algo != "dqn":
        found["entropy"] = schedule("ent_coef", options.pop("ent_coef", 0.0))
    makers: tuple[tuple[str, Callable[[dict[str, Any]], Any]], ...] = (
        ("recipe", Recipe.from_dict),
        ("discounting", lambda given: _record("discounting", Discounting, given)),
        ("kl", lambda given: _record("kl", Decay, given)),
        ("rollouts", lambda given: _record("rollouts", RolloutPlan, given)),
        ("env_kwargs", _env_kwargs),
    )
    for name, maker in makers:
        given = options.pop(name, None)
        if given is not None:
            if not isinstance(given, dict):
                raise ConfigError(f"hyperparameters.{name}: {given!r}, must be a mapping")
            found[name] = maker(given)
    allowed = _constructor_options(algo)
    for name, value in options.items():
        if name not in allowed:
            raise ConfigError(f"hyperparameters.{name}: unknown for {algo}{_near(name, allowed)}")
        if name in _SCHEDULED:
            options[name] = schedule(name, value)
        elif isinstance(value, float) and value.is_integer() and name in ("n_steps", "batch_size", "n_epochs", "buffer_size"):
            options[name] = int(value)
    # The clock's discounting takes the place of the constant one.
    return Hyperparameters(options=options, **found)


def _number(name: str, value: Any, kind: type) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"hyperparameters.{name}: {value!r}, must be true or false")
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ConfigError(f"hyperparameters.{name}: {value!r}, must be a number") from None
    if kind is int and (number < 1 or not number.is_integer()):
        raise ConfigError(f"hyperparameters.{name}: {value!r}, must be an integer >= 1")
    return kind(number)


def _record(name: str, cls: Any, given: dict[str, Any]) -> Any:
    allowed = [f.name for f in fields(cls)]
    for key in given:
        if key not in allowed:
            raise ConfigError(f"hyperparameters.{name}.{key}: unknown{_near(key, allowed)} (allowed: {', '.join(allowed)})")
    return cls(**given)


def _env_kwargs(given: dict[str, Any]) -> dict[str, Any]:
    allowed = ("num_requests", "horizon", "backlog", "max_iterations")
    for key in given:
        if key not in allowed:
            raise ConfigError(f"hyperparameters.env_kwargs.{key}: unknown{_near(key, allowed)} (allowed: {', '.join(allowed)})")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _constructor_options(algo: str) -> list[str]:
    from sb3_contrib import MaskablePPO
    from stable_baselines3 import A2C, DQN, PPO

    if algo == "paired-rollouts":
        return []
    cls: Any = {"ppo": PPO, "maskable-ppo": MaskablePPO, "a2c": A2C, "dqn": DQN}[algo]
    reserved = {"self", "policy", "env", "policy_kwargs", "seed", "device", "verbose", "tensorboard_log", "gamma", "gae_lambda"}
    return [name for name in inspect.signature(cls.__init__).parameters if name not in reserved and not name.startswith("_")]


def _near(word: str, allowed: Any) -> str:
    return did_you_mean(word, list(allowed))
