"""PPO of Tianshou 2: collectors over scalar environments, save and load.

    python examples/tianshou_ppo.py [epochs]

Leaves tianshou_ppo.pt.
"""

import sys

import gymnasium as gym
import torch
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic, dist_fn_categorical_from_logits

SETTINGS = {"num_requests": 50, "orders": ()}  # without a choice of order the action is Discrete


def make():
    return gym.wrappers.FlattenObservation(gym.make("llmsched_env:LLMSched-v1", **SETTINGS))


def algorithm(env):
    shape, choices = env.observation_space.shape, int(env.action_space.n)
    actor = DiscreteActor(preprocess_net=Net(state_shape=shape, hidden_sizes=[64]), action_shape=choices, softmax_output=False)
    critic = DiscreteCritic(preprocess_net=Net(state_shape=shape, hidden_sizes=[64]))
    choose = {"dist_fn": dist_fn_categorical_from_logits, "action_space": env.action_space, "action_scaling": False}
    policy = ProbabilisticActorPolicy(actor=actor, deterministic_eval=True, **choose)
    return PPO(policy=policy, critic=critic, optim=AdamOptimizerFactory(lr=3e-4), gamma=0.999)


def main(epochs: int = 10) -> None:
    torch.manual_seed(0)
    env, ppo = make(), algorithm(make())
    params = OnPolicyTrainerParams(
        training_collector=Collector(ppo, DummyVectorEnv([make] * 4), VectorReplayBuffer(4096, 4)),
        test_collector=Collector(ppo, DummyVectorEnv([make] * 2)),
        max_epochs=epochs,
        epoch_num_steps=2000,
        collection_step_num_env_steps=1000,
        batch_size=256,
        update_step_num_repetitions=4,
        test_step_num_episodes=4,
    )
    print(f"mean latency of the best test {-ppo.run_training(params).best_reward:.2f} s")
    torch.save(ppo.state_dict(), "tianshou_ppo.pt")
    again = algorithm(env)
    again.load_state_dict(torch.load("tianshou_ppo.pt", weights_only=True))
    rows = Batch(obs=torch.stack([torch.as_tensor(env.reset(seed=seed)[0]) for seed in range(16)]).numpy(), info=Batch())
    same = bool((ppo.policy(rows).logits == again.policy(rows).logits).all())
    print(f"the loaded policy is the same: {same}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
