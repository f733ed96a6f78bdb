"""PPO of RLlib learns to route: two workers on a Ray cluster, each with the native vector environment; masks by RLlib's own module.

python examples/rllib_cluster.py [iterations] leaves the checkpoint in the folder rllib_cluster.
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


class Masked(gym.vector.VectorObservationWrapper):
    """One flat array, which RLlib's masking module takes, and the mask beside it."""

    def __init__(self, env):
        super().__init__(env)
        parts = {"action_mask": env.single_action_space.n, "observations": gym.spaces.flatdim(env.single_observation_space)}
        self.single_observation_space = gym.spaces.Dict({name: gym.spaces.Box(0.0, 1.0, (width,)) for name, width in parts.items()})
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, env.num_envs)

    def observations(self, observations):
        flat = np.concatenate([observations[name].reshape(self.num_envs, -1) for name in ("call", "replicas")], axis=1)
        return {"action_mask": self.unwrapped.action_masks().astype(np.float32), "observations": flat}


def make(config):
    return Masked(gym.make_vec("llmsched_env:LLMSchedCluster-v0", num_envs=config.get("num_envs", 8), num_calls=100))


def logits(algorithm, seen):
    batch = {"obs": {name: torch.as_tensor(values) for name, values in seen.items()}}
    return algorithm.get_module().forward_inference(batch)["action_dist_inputs"].detach().numpy()


def main(iterations: int = 10) -> None:
    register_env("cluster", make)
    config = PPOConfig().environment("cluster").rl_module(rl_module_spec=RLModuleSpec(module_class=ActionMaskingTorchRLModule))
    config.env_runners(gym_env_vectorize_mode=gym.VectorizeMode.VECTOR_ENTRY_POINT, num_env_runners=2, num_envs_per_env_runner=4)
    config.env_runners(sample_timeout_s=600.0)  # the first call compiles
    config.training(train_batch_size_per_learner=2048, minibatch_size=256, num_epochs=4, gamma=0.999, lr=3e-4).debugging(seed=0)
    algorithm = config.build_algo()
    for i in range(iterations):
        found = algorithm.train()["env_runners"]
        print(f"iteration {i + 1}: {found['num_episodes_lifetime']:.0f} episodes, mean return {found['episode_return_mean']:.3f}")
    folder = algorithm.save_to_path(str(Path("rllib_cluster").resolve()))
    seen = make({}).reset(seed=0)[0]
    learned = logits(algorithm, seen)
    print(f"every choice can take the call: {seen['action_mask'][np.arange(8), learned.argmax(axis=1)].all()}")
    algorithm.stop()  # its workers hold the cores that those of the loaded one need
    print(f"the loaded policy is the same: {np.array_equal(learned, logits(PPO.from_checkpoint(folder), seen))}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
