"""Behaviour cloning and DAgger: a policy of ``llmsched_agents.policy`` learns to decide as an expert does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from torch import nn
from torch.nn import functional as F

from llmsched_agents.demonstrations import Demonstrations
from llmsched_agents.policy import MaskableAgentPolicy
from llmsched_env.action import ActionCodec
from llmsched_env.errors import ConfigError

_MASKED = -1e8


def clone_policy(data: Demonstrations, net_arch: Sequence[int], num_queues: int, max_admit: int, seed: int = 0) -> MaskableAgentPolicy:
    """A fresh policy of ``admit`` for these observations; its critic is not used."""
    th.manual_seed(seed)
    space = gym.spaces.Box(0.0, 1.0, (data.observations.shape[1],), np.float32)
    actions = ActionCodec(num_queues, max_admit).space()
    return MaskableAgentPolicy(space, actions, lambda _: 1e-3, net_arch=list(net_arch), activation_fn=nn.Tanh)


@dataclass(frozen=True, slots=True)
class CloneReport:
    """How a fit ended.

    Attributes:
        loss: mean negative log-likelihood of the held-out decisions.
        accuracy: share of them whose likeliest action is the expert's in every component that had a choice.
        epochs: passes over the data.
    """

    loss: float
    accuracy: float
    epochs: int


def fit(
    policy: Any,
    data: Demonstrations,
    *,
    epochs: int = 30,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    held_out: float = 0.1,
    patience: int = 4,
    seed: int = 0,
    set_scale: bool = True,
    progress: Callable[[str], None] | None = None,
) -> CloneReport:
    """Minimise the negative log-likelihood of the expert's actions under their masks; the best epoch on held-out data is kept.

    Args:
        policy: ``AgentPolicy`` or ``MaskableAgentPolicy`` whose actor reads D numbers.
        held_out: share of the data, whole stretches of 256 decisions, so that neighbours are not on both sides.
        set_scale: standardise the observation by the data.

    Raises:
        ConfigError: the data's observations or actions are not the policy's.
    """
    components = policy.components
    public = policy.public or policy.features_dim
    if data.observations.shape[1] != public:
        raise ConfigError(f"demonstrations: observations of {data.observations.shape[1]} numbers, the policy reads {public}")
    if data.actions.shape[1] != len(components) or data.masks.shape[1] != sum(components):
        raise ConfigError(f"demonstrations: actions of {data.actions.shape[1]} components, the policy has {len(components)}")
    rng = np.random.default_rng(seed)
    blocks = np.arange(len(data)) // 256
    outside = rng.permutation(int(blocks[-1]) + 1)[: max(1, round(held_out * (int(blocks[-1]) + 1)))]
    test = np.isin(blocks, outside)
    if test.all():  # too little for a block of its own
        test = np.arange(len(data)) % 10 == 0
    padded = np.zeros((len(data), policy.features_dim), dtype=np.float32)
    padded[:, :public] = data.observations
    if set_scale:
        policy.features_extractor.set_scale(data.observations)
    observations, actions = th.as_tensor(padded), th.as_tensor(data.actions.astype(np.int64))
    masks = th.as_tensor(data.masks)
    actor = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    optimizer = th.optim.Adam(actor, lr=learning_rate)

    def loss_of(rows: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        logits = policy.logits(observations[rows]).masked_fill(~masks[rows], _MASKED)
        total, right = th.zeros(()), th.ones(rows.shape[0], dtype=th.bool)
        for i, part in enumerate(logits.split(components, dim=1)):
            total = total + F.cross_entropy(part, actions[rows, i])
            right &= part.argmax(dim=1) == actions[rows, i]
        return total, right.float().mean()

    train_rows, test_rows = th.as_tensor(np.flatnonzero(~test)), th.as_tensor(np.flatnonzero(test))
    best, kept, since, done = np.inf, None, 0, 0
    generator = th.Generator().manual_seed(seed)
    for epoch in range(epochs):
        order = train_rows[th.randperm(train_rows.shape[0], generator=generator)]
        for rows in order.split(batch_size):
            loss, _ = loss_of(rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with th.no_grad():
            held, accuracy = loss_of(test_rows)
        done = epoch + 1
        if progress is not None:
            progress(f"epoch {done}: held-out loss {float(held):.4f}, decisions equal {100 * float(accuracy):.2f} %")
        if float(held) < best - 1e-5:
            best, since = float(held), 0
            kept = [p.detach().clone() for p in actor]
        else:
            since += 1
            if since >= patience:
                break
    if kept is not None:
        with th.no_grad():
            for parameter, value in zip(actor, kept, strict=True):
                parameter.copy_(value)
    with th.no_grad():
        held, accuracy = loss_of(test_rows)
    return CloneReport(float(held), float(accuracy), done)
