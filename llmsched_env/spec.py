"""``EnvSpec``: every setting of an environment in one checked record, from which all kinds of environments are built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_env.action import THETAS, ActionCodec, CodecRecord, ReserveCodec, make_codec
from llmsched_env.engine.record_backend import check_served
from llmsched_env.errors import ConfigError
from llmsched_env.forecast import Forecast, make_forecast
from llmsched_env.perf import LinearTime, load_calibration
from llmsched_env.reward import Reward, make_reward
from llmsched_env.types import ClassBy, EngineConfig, EpisodeLimits, QueueLayout, Workload
from llmsched_env.workload import Scenario, load_scenario, scenario_from_trace


def engine_with(base: EngineConfig, changes: Mapping[str, Any] | EngineConfig | None) -> EngineConfig:
    """``base`` with plain-value changes; ``d0``, ``d1`` set a linear time model, ``time_model`` loads a calibration by name.

    Raises:
        ConfigError: unknown field, or a value the engine refuses.
    """
    if changes is None:
        return base
    if isinstance(changes, EngineConfig):
        return changes
    fields = dict(changes)
    if isinstance(fields.get("time_model"), str):
        fields["time_model"] = load_calibration(fields["time_model"])
    if "d0" in fields or "d1" in fields:
        model = fields.get("time_model", base.time_model)
        known = {"d0": model.d0, "d1": model.d1} if isinstance(model, LinearTime) else {}
        known.update({k: float(fields.pop(k)) for k in ("d0", "d1") if k in fields})
        missing = [k for k in ("d0", "d1") if k not in known]
        if missing:
            raise ConfigError(f"engine.{missing[0]}: missing, a linear time model needs d0 and d1")
        fields["time_model"] = LinearTime(known["d0"], known["d1"])
    allowed = EngineConfig.__dataclass_fields__
    for name in fields:
        if name not in allowed:
            raise ConfigError(f"engine.{name}: unknown field (allowed: {', '.join(allowed)}, d0, d1)")
    return base.replace(**fields)


def checked_rate(rate: Any) -> float:
    """``rate`` as a float.

    Raises:
        ConfigError: not a finite number above 0.
    """
    if isinstance(rate, bool) or not (isinstance(rate, int | float | np.number) and math.isfinite(rate) and rate > 0):
        raise ConfigError(f"rate: {rate!r}, must be finite and > 0 requests/s")
    return float(rate)


def checked_count(num_requests: Any) -> int:
    """``num_requests`` as an int.

    Raises:
        ConfigError: not an integer above 0.
    """
    if isinstance(num_requests, bool) or not isinstance(num_requests, int | np.integer) or num_requests < 1:
        raise ConfigError(f"num_requests: {num_requests!r}, must be an integer >= 1")
    return int(num_requests)


def checked_backlog(backlog: Any) -> tuple[int, int]:
    """(low, high) of ``backlog``, a number or two.

    Raises:
        ConfigError: something else.
    """
    pair = tuple(backlog) if isinstance(backlog, list | tuple) else (backlog, backlog)
    if len(pair) != 2 or any(isinstance(b, bool) or not isinstance(b, int | np.integer) for b in pair) or not 0 <= pair[0] <= pair[1]:
        raise ConfigError(f"backlog: {backlog!r}, must be a number of requests >= 0 or (low, high) of two")
    return int(pair[0]), int(pair[1])


@dataclass(frozen=True, slots=True)
class EnvSpec:
    """What an environment is; ``EnvSpec.of`` takes the arguments of ``LLMSchedEnv``.

    Attributes:
        scenario, engine, layout, limits: where requests come from, the engine, its queues, when an episode ends.
        rate: requests/s; num_requests: of an episode.
        reveal_output_length: policies and classes know output lengths.
        codec: action set.
        reward: what a step is worth.
        backlog: (low, high) requests waiting at time 0.
    """

    scenario: Scenario
    rate: float
    num_requests: int
    engine: EngineConfig
    layout: QueueLayout
    limits: EpisodeLimits
    reveal_output_length: bool
    codec: ActionCodec | ReserveCodec
    reward: Reward
    backlog: tuple[int, int]

    @classmethod
    def of(
        cls,
        scenario: str | Scenario = "azure-conv",
        *,
        trace: str | None = None,
        rate: float | None = None,
        num_requests: int | None = None,
        engine: Mapping[str, Any] | EngineConfig | None = None,
        class_by: ClassBy | None = None,
        class_edges: Sequence[int] = (),
        segment_ends: Sequence[int] | None = None,
        reveal_output_length: bool = False,
        action_set: str = "admit",
        max_admit: int = 16,
        thetas: Sequence[float] = THETAS,
        backlog: int | tuple[int, int] = 0,
        reward: str | Mapping[str, Any] | Reward = "latency",
        horizon: float = math.inf,
        drain: bool = True,
        max_iterations: int = 1_000_000,
    ) -> EnvSpec:
        """Check every setting.

        Raises:
            ConfigError: a setting refused, with its name, value and what is allowed.
        """
        if trace is not None:
            drawn = scenario_from_trace(trace, rate=rate)
        else:
            drawn = load_scenario(scenario) if isinstance(scenario, str) else scenario
        if not isinstance(drawn, Scenario):
            raise ConfigError(f"scenario: {scenario!r}, must be a name or a Scenario")
        layout = _layout(drawn, class_by, class_edges, segment_ends, reveal_output_length)
        return cls(
            scenario=drawn,
            rate=drawn.rate if rate is None else checked_rate(rate),
            num_requests=drawn.num_requests if num_requests is None else checked_count(num_requests),
            engine=engine_with(drawn.engine, engine),
            layout=layout,
            limits=EpisodeLimits(drain=drain, horizon=horizon, max_iterations=max_iterations),
            reveal_output_length=reveal_output_length,
            codec=make_codec(action_set, layout.num_queues, max_admit, thetas),
            reward=make_reward(reward),
            backlog=checked_backlog(backlog),
        )

    def replace(self, **changes: Any) -> EnvSpec:
        return dataclasses.replace(self, **changes)

    def forecast(self, rate: float | None = None) -> Forecast:
        """What an operator knows beforehand, at ``rate`` (default: the spec's)."""
        return make_forecast(self.scenario.statistics, self.rate if rate is None else rate, self.engine, self.layout)

    def codec_record(self, forecast: Forecast) -> CodecRecord:
        """The action set as compiled code reads it."""
        record = CodecRecord(levels=self.codec.levels, forecast=forecast)
        record.kind = self.codec.kind
        return record

    def workload(self, rng: np.random.Generator) -> Workload:
        """The requests of the next episode.

        Raises:
            ConfigError: a request that the engine could never serve.
        """
        seed = int(rng.integers(2**63))
        workload = self.scenario.generate(seed, rate=self.rate, num_requests=self.num_requests)
        workload = workload.with_backlog(draw_backlog(self.backlog, rng))
        check_served(workload, self.engine)
        return workload


def draw_backlog(backlog: tuple[int, int], rng: np.random.Generator) -> int:
    """Requests at time 0; nothing is drawn where there is no choice."""
    low, high = backlog
    return low if low == high else int(rng.integers(low, high + 1))


def _layout(
    scenario: Scenario, by: ClassBy | None, edges: Sequence[int], ends: Sequence[int] | None, reveal: bool
) -> QueueLayout:
    base = scenario.known_layout if reveal else scenario.layout
    if by is not None or edges:
        by = by or base.by
        num_types = scenario.statistics.num_types if by == "type" else 1
        base = QueueLayout(by, tuple(edges), num_types, base.segment_ends)
    if ends is not None:
        base = QueueLayout(base.by, base.edges, base.num_types, tuple(ends))
    if base.reveals_output_length and not reveal:
        raise ConfigError("class_by: 'output' needs reveal_output_length=True (LLMSchedKnown-v0): it shows hidden lengths")
    return base


__all__ = ["EnvSpec", "checked_backlog", "checked_count", "checked_rate", "draw_backlog", "engine_with"]
