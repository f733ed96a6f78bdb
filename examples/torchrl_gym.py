"""TorchRL: the environment's specs checked, roll-outs, and a short training with PPO.

    python examples/torchrl_gym.py [updates]
"""

import sys

import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.envs import CatTensors, GymEnv, TransformedEnv, check_env_specs
from torchrl.modules import MLP, ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

SETTINGS = {"num_requests": 50, "orders": ()}  # without a choice of order the action is Discrete


def main(updates: int = 20) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    base = GymEnv("llmsched_env:LLMSched-v1", **SETTINGS, categorical_action_encoding=True)
    names = list(base.observation_spec.keys())
    env = TransformedEnv(base, CatTensors(names, "observation"))
    env.set_seed(0)
    check_env_specs(env)
    print("specs hold")

    width, choices = env.observation_spec["observation"].shape[-1], env.action_spec.n
    network = TensorDictModule(MLP(width, choices, num_cells=[64], activation_class=torch.nn.Tanh), ["observation"], ["logits"])
    actor = ProbabilisticActor(
        TensorDictSequential(network), in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )
    critic = ValueOperator(MLP(width, 1, num_cells=[64], activation_class=torch.nn.Tanh), in_keys=["observation"])
    advantage = GAE(gamma=0.999, lmbda=0.95, value_network=critic)
    loss = ClipPPOLoss(actor, critic, entropy_coeff=0.01)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-4)
    for update in range(updates):
        with torch.no_grad():
            batch = env.rollout(256, actor, break_when_any_done=False)
        advantage(batch)
        for rows in torch.cat([torch.randperm(len(batch)) for _ in range(4)]).split(64):
            found = loss(batch[rows])
            optimizer.zero_grad()
            (found["loss_objective"] + found["loss_critic"] + found["loss_entropy"]).backward()
            optimizer.step()
        reward = batch["next", "reward"].sum() / batch["next", "done"].sum().clamp(min=1)
        print(f"update {update + 1}: {int(batch['next', 'done'].sum())} episodes, reward for each {reward.item():.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
