"""PPO, MaskablePPO, A2C and DQN of stable-baselines3 on the clock's time, with a decaying pull towards a clone.

``train()`` is stable-baselines3's own throughout: the entropy that the policy reports already holds
the weighted KL term, and ``ent_coef`` is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch as th
from sb3_contrib import MaskablePPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from torch import nn

from llmsched_agents.policy import AgentPolicy, MaskableAgentPolicy, _AgentPolicy
from llmsched_agents.time_aware import TimeAwareMaskableRolloutBuffer, TimeAwareReplayBuffer, TimeAwareRolloutBuffer
from llmsched_agents.training_env import AgentVecEnv
from llmsched_env.errors import ConfigError

Schedule = Callable[[float], float]

ALGORITHMS = ("ppo", "maskable-ppo", "a2c", "dqn")


@dataclass(frozen=True, slots=True)
class Discounting:
    """Time constants in seconds, over each environment's ``time_scale``; see ``llmsched_agents.time_aware``."""

    discount_seconds: float = 250.0
    trace_seconds: float = 30.0
    normalize: bool = True
    value_warmup: int = 0

    def __post_init__(self) -> None:
        for name in ("discount_seconds", "trace_seconds"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"discounting.{name}: {getattr(self, name)}, must be > 0 seconds")


@dataclass(frozen=True, slots=True)
class Decay:
    """A weight that halves every ``half_life`` of the training (a share of its steps) and ends at ``end``.

    Attributes:
        start: at the first step.
        half_life: share of the training in (0, 1].
        end: from the moment it would fall below.
    """

    start: float
    half_life: float = 0.15
    end: float = 0.0

    def __post_init__(self) -> None:
        if not (self.start >= self.end >= 0 and 0 < self.half_life <= 1):
            given = f"start {self.start}, half_life {self.half_life}, end {self.end}"
            raise ConfigError(f"kl: {given}; start >= end >= 0 and 0 < half_life <= 1 are needed")

    def at(self, done: float) -> float:
        """The weight when this share of the training is done."""
        weight: float = self.start * 0.5 ** (done / self.half_life)
        return max(weight, self.end)


class _Regularised:
    """PPO that sets the policy's entropy and KL weights before each update; comes before SB3's class in the bases."""

    entropy: Schedule | float = 0.0
    kl: Decay | None = None

    def train(self) -> None:
        algorithm: Any = self
        policy: _AgentPolicy = algorithm.policy
        left = algorithm._current_progress_remaining
        policy.entropy_weight = self.entropy(left) if callable(self.entropy) else float(self.entropy)
        policy.kl_weight = self.kl.at(1.0 - left) if self.kl is not None else 0.0
        algorithm.logger.record("train/entropy_weight", policy.entropy_weight)
        algorithm.logger.record("train/kl_weight", policy.kl_weight)
        super().train()  # type: ignore[misc]


class TimeAwarePPO(_Regularised, PPO):
    """PPO (stable-baselines3) with ``TimeAwareRolloutBuffer`` and the policy of ``llmsched_agents.policy``."""


class TimeAwareMaskablePPO(_Regularised, MaskablePPO):
    """MaskablePPO (sb3-contrib), the same."""


def make_algorithm(
    name: str,
    env: AgentVecEnv,
    *,
    discounting: Discounting | None = None,
    entropy: Schedule | float = 0.0,
    kl: Decay | None = None,
    net_arch: Any = (64, 64),
    head_bias: Sequence[float] | None = None,
    **options: Any,
) -> BaseAlgorithm:
    """An algorithm of stable-baselines3 on these environments.

    Args:
        name: one of ``ALGORITHMS``.
        discounting: time constants; default ``Discounting()``.
        entropy, kl: of the PPO variants, see ``llmsched_agents.policy``; A2C takes a constant ``entropy``.
        net_arch, head_bias: of the actor-critic policies; DQN takes a list of widths.
        options: of the algorithm's own constructor, ``seed`` among them.

    Raises:
        ConfigError: unknown name, or an option the algorithm does not have.
    """
    if name not in ALGORITHMS:
        raise ConfigError(f"algo: {name!r}, must be one of {', '.join(ALGORITHMS)}")
    time = discounting or Discounting()
    actor_critic = {"net_arch": net_arch, "public": env.public, "head_bias": head_bias, "activation_fn": nn.Tanh}
    record: dict[str, Any] = {"record": env.record, "discount_seconds": time.discount_seconds}
    rollout = {**record, "trace_seconds": time.trace_seconds, "normalize": time.normalize, "value_warmup": time.value_warmup}
    makers: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "dqn": (
            DQN,
            "MlpPolicy",
            {
                "policy_kwargs": {"net_arch": list(net_arch), "activation_fn": nn.Tanh},
                "replay_buffer_class": TimeAwareReplayBuffer,
                "replay_buffer_kwargs": record,
            },
        ),
        "a2c": (A2C, AgentPolicy, {"rollout_buffer_class": TimeAwareRolloutBuffer}),
        "ppo": (TimeAwarePPO, AgentPolicy, {"rollout_buffer_class": TimeAwareRolloutBuffer}),
        "maskable-ppo": (TimeAwareMaskablePPO, MaskableAgentPolicy, {"rollout_buffer_class": TimeAwareMaskableRolloutBuffer}),
    }
    algorithm, policy, own = makers[name]
    if name != "dqn":  # the policy reports entropy and KL with their weights
        own = {**own, "policy_kwargs": actor_critic, "rollout_buffer_kwargs": rollout, "ent_coef": 1.0}
    try:
        model: BaseAlgorithm = algorithm(policy, env, device="cpu", **own, **options)
    except TypeError as error:
        raise ConfigError(f"algo {name!r}: {error}") from error
    if isinstance(model, _Regularised):
        model.entropy, model.kl = entropy, kl
    elif name == "a2c":
        cast(AgentPolicy, model.policy).entropy_weight = entropy(1.0) if callable(entropy) else float(entropy)
    return model


def scale_observations(model: BaseAlgorithm, env: AgentVecEnv, steps: int = 40) -> None:
    """Set the policy's observation scale from what its own first choices meet; the environments are left stepped."""
    extractor = getattr(model.policy, "features_extractor", None)
    if extractor is None or not hasattr(extractor, "set_scale"):
        return
    seen = []
    observed: Any = env.reset()
    for _ in range(steps):
        masks = {"action_masks": env.action_masks()} if isinstance(model, MaskablePPO) else {}
        with th.no_grad():
            actions, _, _ = model.policy(th.as_tensor(observed), **masks)
        seen.append(observed)
        observed, _, _, _ = env.step(actions.numpy())
    extractor.set_scale(np.concatenate(seen))
