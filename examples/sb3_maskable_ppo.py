"""MaskablePPO of sb3-contrib on single admissions: illegal actions are never taken.

    python examples/sb3_maskable_ppo.py [timesteps]

Leaves sb3_maskable_ppo.zip.
"""

import sys

import gymnasium as gym
import numpy as np
from sb3_contrib import MaskablePPO
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks

from llmsched_agents.sb3_vec import SB3VecEnv

SETTINGS = {"num_requests": 20, "action_set": "admit", "max_admit": 4}


def main(timesteps: int = 100_000) -> None:
    envs = SB3VecEnv(gym.make_vec("llmsched_env:LLMSched-v1", num_envs=16, **SETTINGS), flatten=True)
    model = MaskablePPO("MlpPolicy", envs, n_steps=128, batch_size=512, gamma=0.999, seed=0, device="cpu")
    model.learn(timesteps)
    model.save("sb3_maskable_ppo.zip")
    mean, _ = evaluate_policy(model, envs, n_eval_episodes=16)
    print(f"mean latency {-mean:.2f} s")

    again = MaskablePPO.load("sb3_maskable_ppo.zip", device="cpu")
    starts = np.concatenate([[0], np.cumsum(envs.action_space.nvec)[:-1]])  # of each component in the mask
    observations, legal, same = envs.reset(), True, True
    for _ in range(200):
        masks = get_action_masks(envs)
        actions, _ = model.predict(observations, action_masks=masks, deterministic=True)
        same &= np.array_equal(actions, again.predict(observations, action_masks=masks, deterministic=True)[0])
        legal &= bool(np.take_along_axis(masks, starts + actions, axis=1).all())
        observations, *_ = envs.step(actions)
    print(f"every action was legal: {legal}")
    print(f"the loaded model takes the same actions: {same}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
