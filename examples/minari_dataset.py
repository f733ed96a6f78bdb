"""A Minari data set of an expert's actions with their masks: recorded, read back and cloned.

    python examples/minari_dataset.py [episodes]

The data set goes where Minari keeps its own (MINARI_DATASETS_PATH), in place of an older one of that name.
"""

import sys

import gymnasium as gym
import minari
import numpy as np
import torch
from torch.nn import functional

from llmsched_agents.minari_record import MaskedStepData

DATASET = "llmsched/busy-admit-v0"
SETTINGS = {"num_requests": 50, "action_set": "admit", "max_admit": 4}


def expert(mask, sizes):
    """Everything runs, and as many enter as may."""
    return np.array([np.flatnonzero(part)[-1] for part in np.split(mask, np.cumsum(sizes)[:-1])])


def main(episodes: int = 20) -> None:
    torch.manual_seed(0)
    env = gym.make("llmsched_env:LLMSched-v1", **SETTINGS)
    sizes = env.action_space.nvec
    collector = minari.DataCollector(env, step_data_callback=MaskedStepData, record_infos=True)
    for seed in range(episodes):
        _, info = collector.reset(seed=seed)
        over = False
        while not over:
            *_, terminated, truncated, info = collector.step(expert(info["action_mask"], sizes))
            over = terminated or truncated
    if DATASET in minari.list_local_datasets():
        minari.delete_dataset(DATASET)
    collector.create_dataset(DATASET, algorithm_name="greedy admission")

    read = list(minari.load_dataset(DATASET).iterate_episodes())
    flat = np.concatenate([np.concatenate(list(e.observations.values()), axis=1)[:-1] for e in read])
    masks = torch.as_tensor(np.concatenate([e.infos["action_mask"][:-1] for e in read]), dtype=torch.bool)
    actions = torch.as_tensor(np.concatenate([e.actions for e in read]))
    network = torch.nn.Sequential(torch.nn.Linear(flat.shape[1], 64), torch.nn.Tanh(), torch.nn.Linear(64, int(sizes.sum())))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(301):
        logits = network(torch.as_tensor(flat)).masked_fill(~masks, -1e9).split(sizes.tolist(), dim=1)
        loss = sum(functional.cross_entropy(part, actions[:, i]) for i, part in enumerate(logits))
        if step % 100 == 0:
            alike = np.mean([(part.argmax(1) == actions[:, i]).float().mean() for i, part in enumerate(logits)])
            print(f"{len(read)} episodes, {len(flat)} steps: loss {loss.item():.3f}, {alike:.1%} of the components as the expert")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
