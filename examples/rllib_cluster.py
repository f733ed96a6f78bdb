"""PPO of RLlib learns to route, with two workers on a Ray cluster; replicas that cannot take a call are masked out.

    python examples/rllib_cluster.py [iterations]

Leaves the checkpoint in the folder rllib_cluster.
"""

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.ppo import PPO, PPOConfig
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.examples.rl_modules.classes.action_masking_rlm import ActionMaskingTorchRLModule
from ray.tune.registry import register_env

SETTINGS = {"num_calls": 100}


def make(config):
    env = gym.make("llmsched_env:LLMSchedCluster-v0", **SETTINGS, **config)
    # RLlib's masking module takes flat observations, and the mask beside them.
    parts = {"action_mask": gym.spaces.Box(0, 1, (env.action_space.n,)), "observations": gym.spaces.flatten_space(env.observation_space)}

    def masked(seen):
        mask = env.unwrapped.action_masks().astype(np.float32)
        return {"action_mask": mask, "observations": gym.spaces.flatten(env.observation_space, seen)}

    return gym.wrappers.TransformObservation(env, masked, gym.spaces.Dict(parts))


register_env("cluster", make)


def logits(algorithm, seen):
    batch = {"obs": {name: torch.as_tensor(np.stack([one[name] for one in seen])) for name in seen[0]}}
    with torch.no_grad():
        return algorithm.get_module().forward_inference(batch)["action_dist_inputs"].numpy()


def main(iterations: int = 10) -> None:
    masking = RLModuleSpec(module_class=ActionMaskingTorchRLModule)
    config = PPOConfig().environment("cluster", env_config={}).rl_module(rl_module_spec=masking).debugging(seed=0)
    config.env_runners(num_env_runners=2, num_envs_per_env_runner=4, sample_timeout_s=600.0)  # the first call compiles
    config.training(train_batch_size_per_learner=2048, minibatch_size=256, num_epochs=4, gamma=0.999, lr=3e-4)
    algorithm = config.build_algo()
    for i in range(iterations):
        found = algorithm.train()["env_runners"]
        print(f"iteration {i + 1}: {found['num_episodes_lifetime']:.0f} episodes, mean return {found['episode_return_mean']:.3f}")
    folder = algorithm.save_to_path(str(Path("rllib_cluster").resolve()))
    seen = [make({}).reset(seed=seed)[0] for seed in range(8)]
    learned = logits(algorithm, seen)
    print(f"every choice can take the call: {all(one['action_mask'][row.argmax()] for one, row in zip(seen, learned, strict=True))}")
    algorithm.stop()  # its workers hold the cores that those of the loaded one need
    print(f"the loaded policy is the same: {np.array_equal(learned, logits(PPO.from_checkpoint(folder), seen))}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
