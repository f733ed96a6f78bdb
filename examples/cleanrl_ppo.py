"""PPO in one file, in the manner of CleanRL, on the native vector environment.

    python examples/cleanrl_ppo.py [updates]
"""

import sys

import gymnasium as gym
import numpy as np
import torch
from torch import nn
from torch.distributions import Categorical

SETTINGS = {"num_requests": 100}
ENVS, STEPS, EPOCHS, BATCH = 32, 64, 4, 512
GAMMA, LAMBDA, CLIP, ENTROPY = 0.999, 0.95, 0.2, 0.01


def flat(observation):
    return torch.as_tensor(np.concatenate(list(observation.values()), axis=1))


def log_prob(parts, actions):
    return sum(part.log_prob(actions[..., i]) for i, part in enumerate(parts))


def main(updates: int = 100) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the networks are small
    envs = gym.make_vec("llmsched_env:LLMSched-v0", num_envs=ENVS, autoreset_mode="SameStep", **SETTINGS)
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs)
    observation = flat(envs.reset(seed=0)[0])
    space = envs.single_action_space  # the choices of each component of an action
    choices = [int(space.n)] if isinstance(space, gym.spaces.Discrete) else [int(n) for n in space.nvec]
    actor = nn.Sequential(nn.Linear(observation.shape[1], 64), nn.Tanh(), nn.Linear(64, sum(choices)))
    critic = nn.Sequential(nn.Linear(observation.shape[1], 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.Adam([*actor.parameters(), *critic.parameters()], lr=3e-4)

    def heads(observations):
        return [Categorical(logits=part) for part in actor(observations).split(choices, dim=-1)]

    means = []
    for update in range(updates):
        kept, returns = [], []
        for _ in range(STEPS):
            with torch.no_grad():
                parts = heads(observation)
                actions = torch.stack([part.sample() for part in parts], dim=-1)
                row = [observation, actions, log_prob(parts, actions), critic(observation)[:, 0]]
            found, rewards, terminated, truncated, infos = envs.step(actions.numpy().reshape(envs.action_space.shape))
            kept.append([*row, torch.as_tensor(rewards, dtype=torch.float32), torch.as_tensor(terminated | truncated).float()])
            returns += list(infos["episode"]["r"][infos["_episode"]]) if "episode" in infos else []
            observation = flat(found)
        obs, act, old, values, rewards, ends = (torch.stack(column) for column in zip(*kept, strict=True))
        advantages, last, after = torch.zeros_like(rewards), torch.zeros(ENVS), critic(observation)[:, 0].detach()
        for t in reversed(range(STEPS)):  # generalised advantage estimation; an end has no value after it
            last = rewards[t] - values[t] + GAMMA * (1.0 - ends[t]) * (after + LAMBDA * last)
            advantages[t], after = last, values[t]
        obs, act, old, advantages, targets = (x.flatten(0, 1) for x in (obs, act, old, advantages, advantages + values))
        for rows in torch.cat([torch.randperm(len(obs)) for _ in range(EPOCHS)]).split(BATCH):
            parts, gain = heads(obs[rows]), (advantages[rows] - advantages[rows].mean()) / (advantages[rows].std() + 1e-8)
            ratio = (log_prob(parts, act[rows]) - old[rows]).exp()
            loss = -torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
            loss += 0.5 * (critic(obs[rows])[:, 0] - targets[rows]).pow(2).mean()
            loss -= ENTROPY * sum(part.entropy() for part in parts).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        means += [-np.mean(returns)] if returns else []
        print(f"{(update + 1) * ENVS * STEPS} steps: mean latency {np.mean(means[-5:]):.2f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
