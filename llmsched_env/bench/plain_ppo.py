"""A plain PPO of stable-baselines3 on a named environment, as README trains it: nothing of ours but the environments."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_agents.zoo import ZooEntry

STEPS = 60_000
"""Decisions: on the default environment about 1,800 episodes."""

PLAIN: dict[str, Any] = {
    "n_envs": 16,
    "normalize": {"norm_obs": False, "norm_reward": True},
    "n_steps": 128,
    "batch_size": 512,
    # Nothing is discounted: an episode is finite, and its return is minus the mean latency.
    "gamma": 1.0,
    "gae_lambda": 1.0,
}
"""Values that differ from those of stable-baselines3."""


@dataclass(frozen=True, slots=True)
class PlainPPO:
    """What came out of a training.

    Attributes:
        returns: (episodes,) returns of the likeliest actions.
        steps: decisions trained on.
        seconds: processor seconds of the training, evaluation left out.
    """

    returns: npt.NDArray[np.float64]
    steps: int
    seconds: float


def train_plain_ppo(environment: str, episodes: int, first_seed: int, *, steps: int = STEPS, seed: int = 0) -> PlainPPO:
    """Train, then play ``episodes`` episodes with seeds from ``first_seed`` on.

    Raises:
        MissingExtraError: stable-baselines3 is not installed.
    """
    values = dict(PLAIN)
    count, normalize = values.pop("n_envs"), values.pop("normalize")
    start = time.process_time()
    agent = ZooEntry(environment, count, steps, normalize, {}, values).train(seed)
    seconds = time.process_time() - start
    return PlainPPO(agent.returns(episodes, first_seed), agent.steps, seconds)
