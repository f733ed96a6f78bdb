"""What is known of the sessions of a chat service: turns, seconds between them, and tokens, as marginal distributions."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray

QUANTITIES = ("seconds", "first_prompt", "new_tokens", "output_tokens")


@dataclass(frozen=True, slots=True, eq=False)
class SessionStatistics:
    """Marginal distributions; what is drawn from them is drawn independently.

    Attributes:
        turn_shares: (K,) share of the sessions that have 1 .. K turns; sums to 1.
        levels: (A,) levels from 0 to 1 of the quantiles that follow, linear in between.
        seconds: (A,) between the arrivals of consecutive turns.
        first_prompt: (A,) tokens of a first prompt beyond the head that the service sends before it.
        new_tokens: (A,) tokens that a later prompt adds to the history.
        output_tokens: (A,) tokens of an answer.
        source: where the numbers come from.
        record: the file's other fields (provenance, means, shared head), as read.

    Raises:
        ConfigError: an array that is no distribution.
    """

    turn_shares: FloatArray
    levels: FloatArray
    seconds: FloatArray
    first_prompt: FloatArray
    new_tokens: FloatArray
    output_tokens: FloatArray
    source: str = "session statistics"
    record: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arrays = {name: checks.numbers(f"sessions.{name}", getattr(self, name)) for name in ("turn_shares", "levels", *QUANTITIES)}
        shares, levels = arrays["turn_shares"], arrays["levels"]
        if shares.ndim != 1 or not shares.size or not np.all(shares >= 0) or not abs(float(shares.sum()) - 1.0) < 1e-3:
            raise ConfigError("sessions.turn_shares: must be shares >= 0 of 1, 2, ... turns that sum to 1")
        if levels.ndim != 1 or levels.size < 2 or levels[0] != 0 or levels[-1] != 1 or not np.all(np.diff(levels) > 0):
            raise ConfigError("sessions.levels: must increase from 0 to 1")
        for name in QUANTITIES:
            values = arrays[name]
            if values.shape != levels.shape or not (np.all(np.isfinite(values) & (values >= 0)) and np.all(np.diff(values) >= 0)):
                raise ConfigError(f"sessions.{name}: must be {levels.size} finite numbers >= 0 that do not decrease, as many as levels")
        arrays["turn_shares"] = shares / shares.sum()
        checks.text("sessions.source", self.source)
        for name, array in arrays.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    @property
    def mean_turns(self) -> float:
        """Turns of a session."""
        return float(self.turn_shares @ np.arange(1, self.turn_shares.size + 1))

    def draw_turns(self, rng: np.random.Generator, count: int) -> npt.NDArray[np.int64]:
        """(count,) int64 turns, at least 1."""
        edges = np.cumsum(self.turn_shares)
        drawn = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
        return np.asarray(np.minimum(drawn, edges.size - 1) + 1)

    def at(self, quantity: str, level: FloatArray) -> FloatArray:
        """The quantiles of one of ``QUANTITIES`` at (n,) levels."""
        return np.asarray(np.interp(level, self.levels, getattr(self, quantity)))


@functools.lru_cache(maxsize=16)
def load_session_statistics(name_or_file: str = "mooncake-sessions") -> SessionStatistics:
    """Statistics from a JSON file of ``build_sessions``, or by the name of one in ``workload/statistics``.

    Raises:
        ConfigError: a file that cannot be read, is not JSON, or lacks a field.
    """
    told = f"sessions {name_or_file!r}"
    if name_or_file.endswith(".json"):
        data = checks.file_bytes(told, Path(name_or_file))
    else:
        with resources.as_file(resources.files("llmsched_env.workload") / "statistics" / f"{name_or_file}.json") as path:
            data = checks.file_bytes(told, path)
    record = checks.json_object(told, data)
    with checks.told(told):
        if record.get("form") != "sessions":
            raise ConfigError(f"form: {checks.shown(record.get('form'))}, must be 'sessions'")
        rest = {key: value for key, value in record.items() if key not in ("turn_shares", "levels", "quantiles")}
        quantiles = {name: record["quantiles"][name] for name in QUANTITIES}
        return SessionStatistics(
            turn_shares=record["turn_shares"], levels=record["levels"], source=str(record["provenance"]["source"]), record=rest, **quantiles
        )
