"""What a step of the routing environment is worth; the names are those of ``llmsched_env.reward``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class Outcome:
    """What has happened since the call before.

    Attributes:
        num_calls: of the episode.
        duration: seconds from the call before to this one, or to the last completion.
        system_seconds: number in system integrated over them (call-seconds).
        completed, completed_tokens: calls that completed, and their output tokens.
        met: of these calls, how many met both limits.
        rejected: calls that no replica could ever serve.
    """

    num_calls: int
    duration: float
    system_seconds: float
    completed: int
    completed_tokens: int
    met: int
    rejected: int

    @classmethod
    def of(cls, num_calls: int, differences: npt.NDArray[np.float64]) -> Outcome:
        """From the differences of ``llmsched_env.cluster.env_step.TOTALS``."""
        seconds, system, *counts = differences.tolist()
        return cls(num_calls, seconds, system, *map(int, counts))


ClusterReward = Callable[[Outcome], float]


def latency_reward(outcome: Outcome) -> float:
    """Minus the number in system integrated, per call: the return is minus the mean latency (Little's law)."""
    return -outcome.system_seconds / outcome.num_calls


def throughput_reward(outcome: Outcome) -> float:
    """Output tokens of calls that completed. Use it with a horizon: over a whole episode every router collects the same sum."""
    return float(outcome.completed_tokens)


def slo_goodput_reward(outcome: Outcome) -> float:
    """Share of the episode's calls that completed within both limits; the return is goodput in [0, 1]."""
    return outcome.met / outcome.num_calls


CLUSTER_REWARDS: dict[str, ClusterReward] = {
    "latency": latency_reward,
    "throughput": throughput_reward,
    "slo_goodput": slo_goodput_reward,
}


def make_cluster_reward(given: Any) -> tuple[ClusterReward, dict[str, float]]:
    """A reward, and the limits that come with it, from a name, ``{"name": "slo_goodput", "ttft": 1.0, "tpot": 0.1}`` or a callable.

    Raises:
        ConfigError: an unknown name or argument, or something that cannot be called.
    """
    if callable(given):
        return given, {}
    if not isinstance(given, str | Mapping):
        raise ConfigError(f"reward: {checks.shown(given)}, must be a name, an object with one, or a callable")
    arguments = {"name": given} if isinstance(given, str) else checks.mapping("reward", given)
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in CLUSTER_REWARDS:
        known = tuple(CLUSTER_REWARDS)
        raise ConfigError(
            f"reward: {checks.shown(name)} is unknown{did_you_mean(str(name), known)} (known: {', '.join(known)}; or a callable)"
        )
    limits = {
        key: checks.number(f"reward.{key}", arguments.pop(key), unit="seconds", open_low=True)
        for key in ("ttft", "tpot")
        if key in arguments
    }
    if arguments or (limits and name != "slo_goodput"):
        wrong = next(iter(arguments or limits))
        raise ConfigError(f"reward.{wrong}: not an argument of {name!r} (allowed: {'ttft, tpot' if name == 'slo_goodput' else 'none'})")
    return CLUSTER_REWARDS[name], {f"{key}_limit": value for key, value in limits.items()}
