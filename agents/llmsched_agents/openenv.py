"""The environment for OpenEnv: typed actions and observations over HTTP and WebSocket, an engine for every session.

``uvicorn --factory llmsched_agents.openenv:make_app`` serves the default environment, ``make_app(num_requests=100)`` one with other
arguments. OpenEnv's ``GenericEnvClient`` needs nothing of this package: ``client.step({"values": [3, 0]})``.
"""

from __future__ import annotations

import uuid
from typing import Any

import gymnasium as gym
import numpy as np

from llmsched_env.env import LLMSchedEnv
from llmsched_env.errors import MissingExtraError, install_command

try:
    from openenv.core.env_server import create_fastapi_app  # type: ignore[import-not-found, unused-ignore]
    from openenv.core.env_server.interfaces import Environment  # type: ignore[import-not-found, unused-ignore]
    from openenv.core.env_server.types import (  # type: ignore[import-not-found, unused-ignore]
        Action,
        EnvironmentMetadata,
        Observation,
        State,
    )
except ImportError as error:
    raise MissingExtraError(f"openenv is not installed; run: {install_command('openenv')}") from error


class SchedulingAction(Action):  # type: ignore[misc, unused-ignore]  # without OpenEnv the bases are Any
    """``values``: one integer for each component of the action space; one in all where it is ``Discrete``."""

    values: list[int]


class SchedulingObservation(Observation):  # type: ignore[misc, unused-ignore]
    """What the agent sees after an action.

    Attributes:
        features: the arrays of ``llmsched_env.observation``, every number in [0, 1].
        action_mask: legal values, the components of the action concatenated.
        clock, seconds: the engine's clock, and how far the last step moved it.
        truncated: the episode ended before its last request had completed.
        summary: metrics of the episode; empty until its end.
    """

    features: dict[str, list[float]]
    action_mask: list[bool]
    clock: float
    seconds: float = 0.0
    truncated: bool = False
    summary: dict[str, float] = {}  # noqa: RUF012 - pydantic copies it


class SchedulingState(State):  # type: ignore[misc, unused-ignore]
    """Of the session: the episode's return so far, beside ``episode_id`` and ``step_count``."""

    episode_return: float = 0.0


class SchedulingEnvironment(Environment):  # type: ignore[misc, unused-ignore]
    """One session.

    Args:
        settings: arguments of ``LLMSchedEnv``.

    Raises:
        ConfigError: an argument refused.
        MissingExtraError: on import of this module, without OpenEnv.
    """

    SUPPORTS_CONCURRENT_SESSIONS = True

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.env = LLMSchedEnv(**settings)
        self._state = SchedulingState()

    def reset(self, seed: int | None = None, episode_id: str | None = None, **options: Any) -> SchedulingObservation:
        """A new episode; ``options`` are those of ``LLMSchedEnv.reset``: rate, num_requests, backlog.

        Raises:
            ConfigError: an option refused.
        """
        features, info = self.env.reset(seed=seed, options=options or None)
        self._state = SchedulingState(episode_id=episode_id or str(uuid.uuid4()))
        return self._seen(features, info)

    def step(self, action: SchedulingAction, timeout_s: float | None = None, **kwargs: Any) -> SchedulingObservation:
        """Take an action. ``timeout_s`` is not needed: a step takes no longer than its iterations.

        Raises:
            ConfigError: numbers outside the action space.
        """
        features, reward, terminated, truncated, info = self.env.step(np.array(action.values, dtype=np.int64))
        self._state.step_count += 1
        self._state.episode_return += float(reward)
        return self._seen(features, info, reward=float(reward), done=terminated or truncated, truncated=truncated)

    def _seen(self, features: dict[str, Any], info: dict[str, Any], **outcome: Any) -> SchedulingObservation:
        return SchedulingObservation(
            features={name: values.tolist() for name, values in features.items()},
            action_mask=info["action_mask"].tolist(),
            clock=info["clock"],
            seconds=info.get("seconds", 0.0),
            summary=info["summary"],
            **outcome,
        )

    @property
    def state(self) -> SchedulingState:
        return self._state

    def get_metadata(self) -> EnvironmentMetadata:
        """The name, and the action space in words."""
        space: gym.Space[Any] = self.env.action_space
        return EnvironmentMetadata(name="LLMSched", description=f"LLM inference scheduling on one GPU; actions: {space}")

    def close(self) -> None:
        self.env.close()


def make_app(**settings: Any) -> Any:
    """A FastAPI application in which every session has an environment with these arguments of ``LLMSchedEnv``.

    Raises:
        ConfigError: an argument refused.
    """
    SchedulingEnvironment(**settings).close()  # refused here, not in the first session
    return create_fastapi_app(lambda: SchedulingEnvironment(**settings), SchedulingAction, SchedulingObservation, max_concurrent_envs=16)
