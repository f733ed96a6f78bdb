"""Demonstrations as a Minari data set, with the flat observation and the ``MultiDiscrete`` action."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np

from llmsched_agents.demonstrations import Demonstrations
from llmsched_agents.interface import component_sizes
from llmsched_agents.recording import Recorder
from llmsched_env.errors import require


def export(data: Demonstrations, recorder: Recorder, *, dataset: str, expert: str, description: str) -> None:
    """Write the data set where Minari keeps its own.

    Args:
        dataset: its identifier, such as ``llmsched/reserve-v0``.
        expert: name of what decided.
        description: for the data set's metadata.

    Raises:
        MissingExtraError: Minari is not installed.
    """
    minari = require("minari", "minari")
    episode_buffer = require("minari.data_collector", "minari").EpisodeBuffer
    buffers = []
    for i, rows in enumerate(data.episodes()):
        observations = data.observations[rows]
        n = observations.shape[0]
        ended = np.zeros(n, dtype=np.bool_)
        ended[-1] = True
        buffers.append(
            episode_buffer(
                id=i,
                seed=recorder.seed + i,
                # Minari wants the observation after the last step as well: an empty engine's was not recorded.
                observations=np.concatenate([observations, observations[-1:]]),
                actions=data.actions[rows].astype(np.int64),
                rewards=data.rewards[rows].astype(np.float64).tolist(),
                terminations=ended.tolist(),
                truncations=np.zeros(n, dtype=np.bool_).tolist(),
            )
        )
    with warnings.catch_warnings():
        # Minari asks for links to the code and for an author, which are the user's to give.
        warnings.simplefilter("ignore", UserWarning)
        minari.create_dataset_from_buffers(
            dataset_id=dataset,
            buffer=buffers,
            observation_space=gym.spaces.Box(0.0, 1.0, (data.observations.shape[1],), np.float32),
            action_space=gym.spaces.MultiDiscrete(list(component_sizes(recorder.recipe, recorder.layout.num_queues))),
            algorithm_name=expert,
            description=description,
        )
