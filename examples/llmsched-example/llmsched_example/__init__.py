"""A policy, a scenario and a reward, added to llmsched-env from outside by the entry points in ``pyproject.toml``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmsched_baselines import Policy, Setting
from llmsched_env import ConfigError, Decision
from llmsched_env.backend import View
from llmsched_env.compiled import compiled
from llmsched_env.reward import CompiledReward

NIGHT_CHAT = Path(__file__).with_name("night-chat.toml")


class AtMost(Policy):
    """Admits in order of arrival while fewer than ``limit`` requests hold KV."""

    name = "at-most"

    def __init__(self, setting: Setting, limit: int = 64) -> None:
        super().__init__(setting)
        if limit < 1:
            raise ConfigError(f"policy.limit: {limit}, must be >= 1")
        self.limit = limit

    def decide(self, view: View) -> Decision:
        return Decision.of(run=[1], admit=[max(self.limit - view.num_residents, 0)])


@compiled
def _minus_waiting(engine: Any, own: Any) -> Any:
    return -own.parameters[0] * engine.num_waiting


def few_waiting(weight: float = 0.01) -> CompiledReward:
    """Minus ``weight`` times the requests outside, after every step; compiled, so that training runs at full speed."""
    return CompiledReward(_minus_waiting, [weight])
