"""PPO of RLlib, new API stack, on this machine: train, save, load.

    python examples/rllib_ppo.py [iterations]

Leaves the checkpoint in the folder rllib_ppo.
"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.tune.registry import register_env

SETTINGS = {"num_requests": 100}


def make(config):
    # RLlib's default encoders take flat observations.
    return gym.wrappers.FlattenObservation(gym.make("llmsched_env:LLMSched-v1", **SETTINGS, **config))


register_env("llmsched", make)


def logits(algorithm, observations):
    with torch.no_grad():
        return algorithm.get_module().forward_inference({"obs": torch.as_tensor(observations)})["action_dist_inputs"].numpy()


def main(iterations: int = 20) -> None:
    config = (
        PPOConfig()
        .environment("llmsched", env_config={})
        .env_runners(num_env_runners=0, num_envs_per_env_runner=4)
        .training(train_batch_size_per_learner=1024, minibatch_size=256, num_epochs=4, gamma=0.999, lr=3e-4)
        .debugging(seed=0)
    )
    algorithm = config.build_algo()
    for i in range(iterations):
        found = algorithm.train()["env_runners"]
        print(f"iteration {i + 1}: {found['num_episodes_lifetime']} episodes, mean latency {-found['episode_return_mean']:.2f} s")
    folder = algorithm.save_to_path(str(Path("rllib_ppo").resolve()))
    env = make({})
    observations = np.stack([env.reset(seed=seed)[0] for seed in range(8)])
    same = np.array_equal(logits(algorithm, observations), logits(PPO.from_checkpoint(folder), observations))
    print(f"the loaded policy is the same: {same}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
