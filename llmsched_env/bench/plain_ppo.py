"""A plain PPO of stable-baselines3 on a named environment, as README trains it: nothing of ours but the environments."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_env.errors import require
from llmsched_env.vector import LLMSchedVectorEnv

STEPS = 60_000
"""Decisions: on the default environment about 1,800 episodes."""


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
    PPO = require("stable_baselines3", "agents").PPO
    VecNormalize = require("stable_baselines3.common.vec_env", "agents").VecNormalize
    from llmsched_agents.sb3_vec import SB3VecEnv

    def envs(count: int) -> SB3VecEnv:
        return SB3VecEnv(cast(LLMSchedVectorEnv, gym.make_vec(f"llmsched_env:{environment}", num_envs=count)), flatten=True)

    start = time.process_time()
    # Nothing is discounted: an episode is finite, and its return is minus the mean latency.
    learner = VecNormalize(envs(16), norm_obs=False, gamma=1.0)
    model = PPO("MlpPolicy", learner, n_steps=128, batch_size=512, gamma=1.0, gae_lambda=1.0, device="cpu", seed=seed)
    model.learn(total_timesteps=steps)
    seconds = time.process_time() - start
    played = envs(episodes)
    played.seed(first_seed)
    observed = played.reset()
    total, over = np.zeros(episodes), np.zeros(episodes, dtype=np.bool_)
    while not over.all():
        actions, _ = model.predict(observed, deterministic=True)
        observed, rewards, ended, _ = played.step(actions)
        total += np.where(over, 0.0, rewards)
        over |= ended
    played.close()
    return PlainPPO(total, int(model.num_timesteps), seconds)
