"""Reward objects: what a step is worth.

A reward is any callable ``reward(outcome) -> float``; the built-in ones are selected by name or by a
plain dict (``{"name": "slo_goodput", "ttft": 1.0, "tpot": 0.1}``), so that an environment
specification stays serialisable.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray, IntArray


class Outcome(Protocol):
    """What the last step did, read when asked; valid until the next step."""

    @property
    def num_requests(self) -> int:
        """Requests of the episode."""
    @property
    def duration(self) -> float:
        """Seconds the clock moved."""
    @property
    def system_seconds(self) -> float:
        """Number in system integrated over the step (request-seconds)."""
    @property
    def completed(self) -> int: ...
    @property
    def completed_tokens(self) -> int:
        """Output tokens of the requests completed in the step."""
    @property
    def generated_tokens(self) -> int:
        """Output tokens sampled in the step, those later lost included."""
    @property
    def evictions(self) -> int: ...
    def finished(self) -> FinishedRequests: ...


@dataclass(frozen=True, slots=True)
class FinishedRequests:
    """Requests completed in the step; arrays of shape (n,). Definitions: ``RequestLog``."""

    id: IntArray
    output_tokens: IntArray
    ttft: FloatArray
    latency: FloatArray

    @property
    def tpot(self) -> FloatArray:
        """Seconds per output token after the first; 0 for single-token outputs."""
        rest = np.maximum(self.output_tokens - 1, 1)
        return np.where(self.output_tokens > 1, (self.latency - self.ttft) / rest, 0.0)


Reward = Callable[[Outcome], float]


@dataclass(frozen=True, slots=True)
class LatencyReward:
    """Minus the number in system integrated over the step, per request of the episode (seconds).

    By Little's law the undiscounted return of a drained episode is minus the mean latency.
    """

    def __call__(self, outcome: Outcome) -> float:
        return -outcome.system_seconds / outcome.num_requests


@dataclass(frozen=True, slots=True)
class ThroughputReward:
    """Output tokens of requests completed in the step (the paper's effective throughput, integrated).

    Use it with a fixed horizon: over a drained episode every policy collects the same sum.
    """

    def __call__(self, outcome: Outcome) -> float:
        return float(outcome.completed_tokens)


@dataclass(frozen=True, slots=True)
class SloGoodputReward:
    """Share of the episode's requests completed in the step within both limits; the return is goodput in [0, 1].

    Attributes:
        ttft: most seconds to the first token.
        tpot: most seconds per output token after the first.
    """

    ttft: float = 1.0
    tpot: float = 0.1

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"reward.{name}: {value}, must be finite and > 0 seconds")

    def __call__(self, outcome: Outcome) -> float:
        if outcome.completed == 0:
            return 0.0
        done = outcome.finished()
        return float(np.count_nonzero((done.ttft <= self.ttft) & (done.tpot <= self.tpot))) / outcome.num_requests


REWARD_LATENCY = 0
REWARD_THROUGHPUT = 1
REWARD_SLO_GOODPUT = 2


def compiled_reward(reward: Reward) -> tuple[int, float, float] | None:
    """(kind, TTFT limit, TPOT limit) of a built-in reward for the compiled step; None for a user's own."""
    if type(reward) is LatencyReward:
        return REWARD_LATENCY, 0.0, 0.0
    if type(reward) is ThroughputReward:
        return REWARD_THROUGHPUT, 0.0, 0.0
    if type(reward) is SloGoodputReward:
        return REWARD_SLO_GOODPUT, reward.ttft, reward.tpot
    return None


_REWARDS: dict[str, type[LatencyReward] | type[ThroughputReward] | type[SloGoodputReward]] = {
    "latency": LatencyReward,
    "throughput": ThroughputReward,
    "slo_goodput": SloGoodputReward,
}


def make_reward(spec: str | Mapping[str, Any] | Reward) -> Reward:
    """A reward from its name, from ``{"name": ..., **arguments}``, or the callable itself.

    Raises:
        ConfigError: unknown name (the nearest one is given) or argument.
    """
    if callable(spec):
        return spec
    arguments: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    if name not in _REWARDS:
        near = difflib.get_close_matches(str(name), _REWARDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"reward: {name!r} is unknown{hint} (known: {', '.join(_REWARDS)}, or a callable)")
    try:
        return _REWARDS[name](**arguments)
    except TypeError as error:
        raise ConfigError(f"reward {name!r}: {error}") from error
