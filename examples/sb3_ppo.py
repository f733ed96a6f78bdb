"""PPO of stable-baselines3 on the native vector environment: normalised rewards, evaluation on the way, save and load.

    python examples/sb3_ppo.py [timesteps]

Leaves the folder sb3_ppo with the model, the statistics of the normalisation and what the evaluations found.
"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import EvalCallback
from stable_baselines3.common.vec_env import VecNormalize

from llmsched_agents.sb3_vec import SB3VecEnv

SETTINGS = {"num_requests": 100}
FOLDER = Path("sb3_ppo")


def make(num_envs: int) -> SB3VecEnv:
    return SB3VecEnv(gym.make_vec("llmsched_env:LLMSched-v1", num_envs=num_envs, **SETTINGS), flatten=True)


def main(timesteps: int = 200_000) -> None:
    envs = VecNormalize(make(16), norm_obs=False)  # observations lie in [0, 1] already
    # The evaluation is given the statistics of the training, and returns in seconds: minus the mean latency.
    tests = VecNormalize(make(4), norm_obs=False, training=False, norm_reward=False)
    every = max(timesteps // 16 // 4, 1)
    callback = EvalCallback(tests, n_eval_episodes=8, eval_freq=every, log_path=str(FOLDER), best_model_save_path=str(FOLDER), verbose=0)
    model = PPO("MlpPolicy", envs, n_steps=128, batch_size=512, gamma=0.999, seed=0, device="cpu")
    model.learn(timesteps, callback=callback)
    model.save(FOLDER / "model.zip")
    envs.save(str(FOLDER / "normalization.pkl"))

    again = PPO.load(FOLDER / "model.zip", env=VecNormalize.load(str(FOLDER / "normalization.pkl"), make(16)), device="cpu")
    observations = tests.reset()
    actions, _ = model.predict(observations, deterministic=True)
    same = np.array_equal(actions, again.predict(observations, deterministic=True)[0])
    returns = np.load(FOLDER / "evaluations.npz")["results"].mean(axis=1)
    print(f"mean latency in seconds, evaluation by evaluation: {np.round(-returns, 2)}")
    print(f"the loaded model takes the same actions: {same}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
