"""The networks: a scaled observation, a small tanh MLP for the actor, another for the critic, and a pull towards a clone.

The actor reads the first ``public`` numbers of the observation; the critic reads all of them and so
may see what is hidden from policies while it learns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch as th
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, MlpExtractor
from torch import nn
from torch.nn import functional as F

_MASKED = -1e8  # as sb3-contrib masks


class ScaledObservation(BaseFeaturesExtractor):
    """(observation - mean) * scale, cut to [-limit, limit]. The numbers are set once before training (``set_scale``) and kept.

    Observations lie in [0, 1] but many move in a small part of it.
    """

    limit = 5.0
    mean: th.Tensor
    scale: th.Tensor

    def __init__(self, observation_space: gym.spaces.Box) -> None:
        size = int(np.prod(observation_space.shape))
        super().__init__(observation_space, size)
        self.register_buffer("mean", th.full((size,), 0.5))
        self.register_buffer("scale", th.full((size,), 2.0))

    def set_scale(self, observations: npt.NDArray[np.float32]) -> None:
        """Standardise the first numbers by these (n, at most size) observations.

        The floor of 0.05 keeps a value that the first rollouts did not show from being blown up later.
        """
        width = observations.shape[1]
        self.mean[:width] = th.as_tensor(observations.mean(axis=0))
        self.scale[:width] = th.as_tensor(1.0 / np.maximum(observations.std(axis=0), 0.05))

    def forward(self, observations: th.Tensor) -> th.Tensor:
        scaled: th.Tensor = (observations - self.mean) * self.scale
        return scaled.clamp(-self.limit, self.limit)


class PublicMlp(MlpExtractor):
    """SB3's two MLPs, the actor's over the first ``public`` features only."""

    def __init__(self, feature_dim: int, public: int, net_arch: dict[str, list[int]], activation_fn: type[nn.Module], device: Any) -> None:
        super().__init__(feature_dim, net_arch, activation_fn, device)
        self.public = public
        self.policy_net = MlpExtractor(public, {"pi": net_arch["pi"], "vf": []}, activation_fn, device).policy_net

    def forward(self, features: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: th.Tensor) -> th.Tensor:
        hidden: th.Tensor = self.policy_net(features[:, : self.public])
        return hidden


class _AgentPolicy:
    """What both policies add; comes before one of SB3's in the bases.

    Args (as ``policy_kwargs``):
        public: how many numbers of the observation the actor reads; None for all.
        head_bias: initial biases of the action head: where the policy begins.
        net_arch, activation_fn: as SB3's; ``net_arch`` a list for actor and critic alike, or ``{"pi": [...], "vf": [...]}``.
    """

    def __init__(
        self,
        *args: Any,
        public: int | None = None,
        head_bias: Sequence[float] | None = None,
        net_arch: Sequence[int] | dict[str, list[int]] = (64, 64),
        **kwargs: Any,
    ) -> None:
        self.public = public
        self.kl_weight = 0.0
        self.entropy_weight = 0.0
        # In a list: a module assigned to a module would be trained and saved with it.
        self._reference: list[nn.Module] = []
        arch = net_arch if isinstance(net_arch, dict) else {"pi": list(net_arch), "vf": list(net_arch)}
        kwargs.update(net_arch=arch, features_extractor_class=ScaledObservation)
        super().__init__(*args, **kwargs)
        if head_bias is not None:
            with th.no_grad():
                self.action_net.bias.copy_(th.as_tensor(head_bias, dtype=th.float32))  # type: ignore[attr-defined]

    def _build_mlp_extractor(self) -> None:
        policy: Any = self
        public = policy.features_dim if self.public is None else self.public
        policy.mlp_extractor = PublicMlp(policy.features_dim, public, policy.net_arch, policy.activation_fn, policy.device)

    @property
    def components(self) -> list[int]:
        """Sizes of the action's components."""
        space = self.action_space  # type: ignore[attr-defined]
        return [int(space.n)] if isinstance(space, gym.spaces.Discrete) else [int(n) for n in space.nvec]

    def logits(self, observations: th.Tensor) -> th.Tensor:
        """(n, sum of components) unnormalised, unmasked."""
        policy: Any = self
        logits: th.Tensor = policy.action_net(policy.mlp_extractor.forward_actor(policy.features_extractor(observations)))
        return logits

    def follow(self, reference: nn.Module) -> None:
        """Take the pull towards this policy's decisions; ``kl_weight`` says how strong."""
        self._reference = [reference]

    def regularised(self, observations: th.Tensor, entropy: th.Tensor, masks: th.Tensor | None) -> th.Tensor:
        """``entropy_weight`` * entropy - ``kl_weight`` * KL(reference || policy), for PPO's loss with ``ent_coef = 1``.

        The direction of "kickstarting" (arXiv 1803.03835): the pupil must keep what its teacher does,
        and may do other things too.
        """
        if not self._reference or self.kl_weight == 0.0:
            return self.entropy_weight * entropy
        with th.no_grad():
            expected = self._reference[0].logits(observations)  # type: ignore[operator]
        divergence = masked_kl(expected, self.logits(observations), self.components, masks)
        return self.entropy_weight * entropy - self.kl_weight * divergence


def masked_kl(p: th.Tensor, q: th.Tensor, components: Sequence[int], masks: th.Tensor | None = None) -> th.Tensor:
    """(n,) KL(p || q) of two masked multi-categorical distributions given by their logits (n, sum of components)."""
    if masks is not None:
        legal = masks.reshape(p.shape).bool()
        p, q = p.masked_fill(~legal, _MASKED), q.masked_fill(~legal, _MASKED)
    total = th.zeros(p.shape[0])
    for a, b in zip(p.split(list(components), dim=1), q.split(list(components), dim=1), strict=True):
        a, b = F.log_softmax(a, dim=1), F.log_softmax(b, dim=1)
        total = total + (a.exp() * (a - b)).sum(dim=1)
    return total


class AgentPolicy(_AgentPolicy, ActorCriticPolicy):
    """For PPO and A2C."""

    def evaluate_actions(self, obs: Any, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        assert entropy is not None
        return values, log_prob, self.regularised(obs, entropy, None)


class MaskableAgentPolicy(_AgentPolicy, MaskableActorCriticPolicy):
    """For MaskablePPO."""

    def evaluate_actions(
        self, obs: th.Tensor, actions: th.Tensor, action_masks: th.Tensor | None = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        values, log_prob, entropy = super().evaluate_actions(obs, actions, action_masks)
        assert entropy is not None
        return values, log_prob, self.regularised(obs, entropy, action_masks)


def greedy_bias(components: Sequence[int], strength: float = 3.0) -> list[float]:
    """Head biases under which a fresh policy mostly takes the last value of each component.

    In ``admit`` that is: everything runs, as many enter as fit. From uniform choices most segments
    would be held most of the time, and no episode would show a working engine.
    """
    return [strength if i == size - 1 else 0.0 for size in components for i in range(size)]
