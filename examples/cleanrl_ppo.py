"""PPO in one file, in the manner of CleanRL, on the native vector environment.

    python examples/cleanrl_ppo.py [updates]
"""

import sys

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

SETTINGS = {"num_requests": 100, "orders": ()}  # without a choice of order the action is Discrete
ENVS, STEPS, EPOCHS, BATCH = 32, 64, 4, 512
GAMMA, LAMBDA, CLIP, ENTROPY = 0.999, 0.95, 0.2, 0.01


def flat(observation):
    return torch.as_tensor(np.concatenate(list(observation.values()), axis=1))


def main(updates: int = 100) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks are small
    envs = gym.make_vec("llmsched_env:LLMSched-v1", num_envs=ENVS, autoreset_mode="SameStep", **SETTINGS)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    seen, means = flat(envs.reset(seed=0)[0]), []
    actor = nn.Sequential(nn.Linear(seen.shape[1], 64), nn.Tanh(), nn.Linear(64, int(envs.single_action_space.n)))
    critic = nn.Sequential(nn.Linear(seen.shape[1], 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=3e-4)
    for update in range(updates):
        kept = []
        for _ in range(STEPS):
            with torch.no_grad():
                policy = Categorical(logits=actor(seen))
                actions = policy.sample()
                row = [seen, actions, policy.log_prob(actions), critic(seen)[:, 0]]
            found, rewards, terminated, truncated, infos = envs.step(actions.numpy())
            kept.append([*row, torch.as_tensor(rewards).float(), torch.as_tensor(terminated | truncated).float()])
            means += list(infos["episode"]["r"][infos["_episode"]]) if "episode" in infos else []
            seen = flat(found)
        obs, act, old, values, rewards, ends = (torch.stack(column) for column in zip(*kept, strict=True))
        advantages, last, after = torch.zeros_like(rewards), torch.zeros(ENVS), critic(seen)[:, 0].detach()
        for t in reversed(range(STEPS)):  # generalised advantage estimation; an end has no value after it
            last = rewards[t] - values[t] + GAMMA * (1.0 - ends[t]) * (after + LAMBDA * last)
            advantages[t], after = last, values[t]
        obs, act, old, gains, targets = (x.flatten(0, 1) for x in (obs, act, old, advantages, advantages + values))
        for rows in torch.cat([torch.randperm(len(obs)) for _ in range(EPOCHS)]).split(BATCH):
            policy, gain = Categorical(logits=actor(obs[rows])), (gains[rows] - gains[rows].mean()) / (gains[rows].std() + 1e-8)
            ratio = (policy.log_prob(act[rows]) - old[rows]).exp()
            loss = -torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean() - ENTROPY * policy.entropy().mean()
            optimizer.zero_grad()
            (loss + 0.5 * (critic(obs[rows])[:, 0] - targets[rows]).pow(2).mean()).backward()
            optimizer.step()
        print(f"{(update + 1) * ENVS * STEPS} steps: mean latency of the last {len(means[-100:])} episodes {-np.mean(means[-100:]):.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
