"""Hyper-parameters that rl_zoo3 itself runs, read, checked and trained by stable-baselines3 on the native vector environment.

``hyperparams/rl_zoo3/ppo.yml`` holds entries by environment, ``ppo-operate.yml`` those for ``action_set="operate"``: the zoo
looks an entry up by the environment's id alone (``rl_zoo3/exp_manager.py`` of rl_zoo3 2.9.2, ``read_hyperparameters``), so one file
cannot hold two for the same id. Unlike the entries of ``hyperparameters.py`` they have no key that the zoo does not know.

What the zoo does with an entry is done here, too: ``normalize`` becomes ``VecNormalize`` with the algorithm's ``gamma``, ``lin_X`` a
learning rate that falls to 0, ``env_kwargs`` arguments of the environment. ``FlattenObservation`` and ``SB3VecEnv(flatten=True)`` are
the same array, the parts of the observation in the order of its space.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_env.errors import ConfigError, did_you_mean, require
from llmsched_env.vector import LLMSchedVectorEnv

ZOO_FOLDER = Path(__file__).resolve().parent / "hyperparams" / "rl_zoo3"
ZOO_FILES = {"": "ppo.yml", "operate": "ppo-operate.yml"}
"""The file of each action set; the empty name stands for the environment's own."""

WRAPPER = "gymnasium.wrappers.FlattenObservation"
POLICY = "MlpPolicy"
ZOO_KEYS = ("n_envs", "n_timesteps", "policy", "env_wrapper", "normalize", "env_kwargs")
"""Keys of an entry that the zoo takes for itself; all others go to the constructor of PPO."""


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """One entry, checked.

    Attributes:
        environment: id of the environment.
        n_envs: environments; n_timesteps: decisions in all, those of every environment counted.
        normalize: ``norm_obs`` and ``norm_reward`` of ``VecNormalize``; empty: nothing is normalised.
        env_kwargs: arguments of the environment.
        options: of the constructor of PPO, as they stand in the file.
    """

    environment: str
    n_envs: int
    n_timesteps: int
    normalize: Mapping[str, bool] = field(default_factory=dict)
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, environment: str, values: Any) -> ZooEntry:
        """The entry of a file.

        Raises:
            ConfigError: an unknown key (the nearest is given), one that is missing, or a refused value.
            MissingExtraError: stable-baselines3 is not installed.
        """
        where = f"hyperparameters.{environment}"
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: {values!r}, must be a mapping")
        allowed = [*ZOO_KEYS, *ppo_options()]
        for key in values:
            if key not in allowed:
                raise ConfigError(f"{where}.{key}: unknown to rl_zoo3 and to PPO{did_you_mean(str(key), allowed)}")
        for key, only in (("policy", POLICY), ("env_wrapper", WRAPPER)):
            if values.get(key) != only:
                raise ConfigError(f"{where}.{key}: {values.get(key)!r}, must be {only!r}")
        for key in ("normalize", "env_kwargs"):
            if not isinstance(values.get(key, {}), dict):
                raise ConfigError(f"{where}.{key}: {values[key]!r}, must be a mapping")
        normalize = values.get("normalize", {})
        if any(key not in ("norm_obs", "norm_reward") or not isinstance(value, bool) for key, value in normalize.items()):
            raise ConfigError(f"{where}.normalize: {normalize!r}, must have norm_obs and norm_reward alone, each true or false")
        counts = [_count(where, key, values.get(key)) for key in ("n_envs", "n_timesteps")]
        options = {key: value for key, value in values.items() if key not in ZOO_KEYS}
        if "learning_rate" in options:
            _schedule()("learning_rate", options["learning_rate"])
        return cls(environment, counts[0], counts[1], normalize, values.get("env_kwargs", {}), options)

    def values(self) -> dict[str, Any]:
        """What ``of`` reads, for a file."""
        found: dict[str, Any] = {"n_envs": self.n_envs, "n_timesteps": self.n_timesteps, "policy": POLICY, "env_wrapper": WRAPPER}
        found |= {"env_kwargs": dict(self.env_kwargs)} if self.env_kwargs else {}
        found |= {"normalize": dict(self.normalize)} if self.normalize else {}
        return found | dict(self.options)

    def make(self, count: int) -> Any:
        """So many environments as a ``VecEnv`` of flat observations, nothing normalised."""
        from llmsched_agents.sb3_vec import SB3VecEnv

        vector = gym.make_vec(f"llmsched_env:{self.environment}", num_envs=count, **self.env_kwargs)
        return SB3VecEnv(cast(LLMSchedVectorEnv, vector), flatten=True)

    def train(self, seed: int, steps: int | None = None) -> ZooAgent:
        """Train PPO on the processor.

        Args:
            seed: of the network, of what is drawn from it and of the environments.
            steps: decisions in place of ``n_timesteps``; PPO ends its last roll-out.

        Raises:
            ConfigError: the environment refuses ``env_kwargs``.
            MissingExtraError: stable-baselines3 is not installed.
        """
        PPO = require("stable_baselines3", "agents").PPO
        VecNormalize = require("stable_baselines3.common.vec_env", "agents").VecNormalize
        options = dict(self.options)
        if "learning_rate" in options:
            options["learning_rate"] = _schedule()("learning_rate", options["learning_rate"])
        envs = self.make(self.n_envs)
        normalizer = None
        if self.normalize:
            normalizer = VecNormalize(envs, gamma=float(options.get("gamma", 0.99)), **self.normalize)
        model = PPO(POLICY, envs if normalizer is None else normalizer, device="cpu", seed=seed, **options)
        model.learn(total_timesteps=self.n_timesteps if steps is None else steps)
        envs.close()
        return ZooAgent(self, model, normalizer)


@dataclass(frozen=True, slots=True)
class ZooAgent:
    """What came out of a training: the entry, the ``PPO`` and its ``VecNormalize`` (None without one)."""

    entry: ZooEntry
    model: Any
    normalizer: Any

    @property
    def steps(self) -> int:
        """Decisions trained on."""
        return int(self.model.num_timesteps)

    def returns(self, episodes: int, first_seed: int) -> npt.NDArray[np.float64]:
        """(episodes,) returns of the likeliest actions on episodes with seeds from ``first_seed`` on."""
        envs = self.entry.make(episodes)
        envs.seed(first_seed)
        observed = envs.reset()
        total, over = np.zeros(episodes), np.zeros(episodes, dtype=np.bool_)
        while not over.all():
            seen = observed if self.normalizer is None else self.normalizer.normalize_obs(observed)
            actions, _ = self.model.predict(seen, deterministic=True)
            observed, rewards, ended, _ = envs.step(actions)
            total += np.where(over, 0.0, rewards)
            over |= ended
        envs.close()
        return total


def ppo_options() -> list[str]:
    """Names of the constructor's arguments that an entry may set; device, seed and logs are the caller's."""
    PPO = require("stable_baselines3", "agents").PPO
    callers = {"self", "policy", "env", "seed", "device", "verbose", "tensorboard_log"}
    return [name for name in inspect.signature(PPO.__init__).parameters if name not in callers and not name.startswith("_")]


def read_zoo(path: Path) -> dict[str, ZooEntry]:
    """The entries of a file by the ids of their environments.

    Raises:
        ConfigError: no such file, not YAML, or an entry that is refused.
        MissingExtraError: PyYAML or stable-baselines3 is not installed.
    """
    yaml = require("yaml", "agents")
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"hyperparameters: {path} cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"hyperparameters: {path} is not YAML ({error})") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"hyperparameters: {path} has no entries, must be a mapping of environments")
    return {str(environment): ZooEntry.of(str(environment), values) for environment, values in entries.items()}


def zoo_text(entries: Mapping[str, ZooEntry], heading: str) -> str:
    """A file of these entries that ``read_zoo`` and the zoo read; ``heading`` is a comment of whole lines."""
    yaml = require("yaml", "agents")
    parts = ["\n".join(f"# {line}".rstrip() for line in heading.splitlines())]
    for environment, entry in entries.items():
        parts.append(yaml.safe_dump({environment: entry.values()}, sort_keys=False, default_flow_style=None, width=140).rstrip())
    return "\n\n".join(parts) + "\n"


def _count(where: str, key: str, value: Any) -> int:
    """A number that the zoo turns into an integer: 1.0e+6 is one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 1 or value != int(value):
        raise ConfigError(f"{where}.{key}: {value!r}, must be an integer >= 1")
    return int(value)


def _schedule() -> Callable[[str, Any], Any]:
    """``hyperparameters.schedule``, whose module needs stable-baselines3: programs that train nothing do without."""
    from llmsched_agents.hyperparameters import schedule

    return schedule
