"""Requests that have missed their limit already are served last."""

from __future__ import annotations

import math
from typing import ClassVar

from llmsched_baselines.policy import RulePolicy, Setting
from llmsched_baselines.reserve import reservation
from llmsched_env.errors import ConfigError
from llmsched_env.types import QueueLayout


class LateLast(RulePolicy):
    """First come, first served with a reservation; a request past ``limit`` without a first token goes behind all timely ones.

    Under overload a first-come queue makes every request late. What is late already cannot be saved,
    so it no longer delays the others (``EngineConfig.late_after``).

    Args:
        limit: seconds to the first token after which a request is late, > 0. The token still has to be
            computed, so a value below the limit that counts may serve it better.
        theta: over-commitment of the reservation, as in ``reserve``.

    Raises:
        ConfigError: an argument out of range.
    """

    name: ClassVar[str] = "late-last"

    def __init__(self, setting: Setting, limit: float = 1.0, theta: float = 1.1) -> None:
        if not (math.isfinite(limit) and limit > 0):
            raise ConfigError(f"policy.limit: {limit}, must be finite and > 0 seconds")
        self.layout = QueueLayout()
        self.engine = setting.engine_for(late_after=limit)
        self.rule = reservation(setting, theta, self.engine, self.layout)
