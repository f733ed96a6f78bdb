"""Some steps of an environment or a vector of them under random legal actions, as bytes to compare."""

from __future__ import annotations

from typing import Any

import numpy as np

from llmsched_env import LLMSchedEnv
from llmsched_env.vector import LLMSchedVectorEnv


def walked(env: LLMSchedEnv, steps: int = 500) -> list[bytes]:
    """Everything that some steps with random legal actions give."""
    rng = np.random.default_rng(1)
    observed, info = env.reset(seed=3)
    seen = []
    for _ in range(steps):
        action = drawn(info["action_mask"][None], env.action_space.nvec, rng)[0]  # type: ignore[attr-defined]
        observed, reward, terminated, truncated, info = env.step(action)
        assert isinstance(reward, float)
        if terminated or truncated:
            observed, info = env.reset()
        seen.append(b"".join(part.tobytes() for part in observed.values()) + np.array([reward, info["clock"]]).tobytes())
    return seen


def together(count: int, **settings: Any) -> LLMSchedVectorEnv:
    return LLMSchedVectorEnv(count, autoreset_mode="SameStep", **settings)


def walked_together(env: LLMSchedVectorEnv, steps: int = 500) -> list[bytes]:
    rng = np.random.default_rng(1)
    observed, infos = env.reset(seed=3)
    seen = []
    for _ in range(steps):
        actions = drawn(infos["action_mask"], env.single_action_space.nvec, rng)  # type: ignore[attr-defined]
        observed, rewards, _, _, infos = env.step(actions)
        seen.append(b"".join(part.tobytes() for part in observed.values()) + rewards.tobytes() + infos["clock"].tobytes())
    env.close()
    return seen


def drawn(masks: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Legal actions, mostly large ones."""
    parts = np.split(masks, np.cumsum(sizes)[:-1], axis=1)
    return np.stack([[rng.choice(np.flatnonzero(row)[-3:]) for row in part] for part in parts], axis=1)
