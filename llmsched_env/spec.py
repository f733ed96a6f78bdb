"""``EnvSpec``: every setting of an environment in one checked record, from which all kinds of environments are built."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_env import checks
from llmsched_env.action import (
    AGEING,
    BUDGETS,
    OPERATE,
    PEAK,
    THETAS,
    ActionCodec,
    Codec,
    CodecRecord,
    OperateCodec,
    PeakCodec,
    ReserveCodec,
)
from llmsched_env.engine.record_backend import check_served
from llmsched_env.engine_changes import engine_with
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError, UnknownSettingError, did_you_mean
from llmsched_env.fluid.equilibrium import check_rate
from llmsched_env.forecast import Forecast, make_forecast
from llmsched_env.peak import LEVELS, NO_TABLES, PREDICTED_ORDERS, WORK_ORDERS, PeakTables, peak_tables
from llmsched_env.perf import load_calibration
from llmsched_env.reward import Reward, make_reward
from llmsched_env.tenant_reward import TenantReward
from llmsched_env.types import ClassBy, QueueLayout, Workload
from llmsched_env.work import expected_work, work_weights
from llmsched_env.workload import PredictionModel, Scenario, load_scenario, scenario_from_trace
from llmsched_env.workload.scenario import predicted_layout


def checked_rate(rate: Any) -> float:
    """``rate`` as a float.

    Raises:
        ConfigError: not a number so far from 0 and infinity that cycles and loads are finite.
    """
    return check_rate("rate", rate)


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


ACTION_SETS = {
    "peak": ("levels", "orders"),
    "admit": ("max_admit",),
    "reserve": ("thetas",),
    "operate": ("levels", "ageing"),
}
"""Action sets and the settings that only they have."""

DEFAULT_SCENARIO = "azure-conv-40gb"
PREDICTED_CLASSES = 4
"""Buckets by predicted output length where nobody gives edges, for each bucket by prompt length that the scenario's classes have."""

HOLD_SECONDS = 4.0
"""How long a level stays in force by default. A decision in every iteration makes an episode of thousands of decisions, of
which none matters, and steps of one length in seconds are what a fixed discount per step is right for."""


@dataclass(frozen=True, slots=True)
class EnvSettings:
    """The settings of an environment beside its scenario, as people give them (``LLMSchedEnv`` says what each means).

    ``calibration`` sets the time model of the engine and nothing else of it.

    ``None`` stands for the scenario's own.
    """

    trace: str | None = None
    rate: float | None = None
    num_requests: int | None = None
    engine: Mapping[str, Any] | EngineConfig | None = None
    calibration: str | None = None
    class_by: ClassBy | None = None
    class_edges: Sequence[int] = ()
    segment_ends: Sequence[int] | None = None
    reveal_output_length: bool = False
    predictions: PredictionModel | Mapping[str, Any] | float | None = None
    action_set: str = "peak"
    levels: Sequence[float] = LEVELS
    orders: Sequence[str] | None = None
    ageing: Sequence[float] | None = None
    max_admit: int = 16
    thetas: Sequence[float] = THETAS
    token_budgets: Sequence[int] = ()
    hold: int | None = None
    hold_seconds: float | None = None
    discount_seconds: float = math.inf
    backlog: int | tuple[int, int] = 0
    reward: str | Mapping[str, Any] | Reward = "latency"
    horizon: float = math.inf
    drain: bool = True
    max_iterations: int = 1_000_000


@dataclass(frozen=True, slots=True)
class EnvSpec:
    """What an environment is; ``EnvSpec.of`` makes one from ``EnvSettings``.

    Attributes:
        scenario, engine, layout, limits: where requests come from, the engine, its queues, when an episode ends.
        rate: requests/s; num_requests: of an episode.
        reveal_output_length: policies and classes know output lengths.
        codec: action set.
        reward: what a step is worth.
        backlog: (low, high) requests waiting at time 0.
        hold, hold_seconds: an action stays in force for so many iterations and at least so long (seconds).
        discount_seconds: time constant of the discount that ``info`` tells; infinite: nothing is discounted.
    """

    scenario: Scenario
    rate: float
    num_requests: int
    engine: EngineConfig
    layout: QueueLayout
    limits: EpisodeLimits
    reveal_output_length: bool
    codec: Codec
    reward: Reward
    backlog: tuple[int, int]
    hold: int = 1
    hold_seconds: float = 0.0
    discount_seconds: float = math.inf

    @classmethod
    def of(cls, scenario: str | Scenario = DEFAULT_SCENARIO, **settings: Any) -> EnvSpec:
        """Check every setting; their names, meanings and defaults are those of ``EnvSettings``.

        Raises:
            ConfigError: a setting unknown or refused, with its name, value and what is allowed.
        """
        known = EnvSettings.__dataclass_fields__
        for name in settings:
            if name not in known:
                hint = did_you_mean(name, ("scenario", *known))
                allowed = f"allowed: scenario, {', '.join(known)}"
                # The words are Python's own: TorchRL looks for them to learn that an environment has no frameskip.
                words = f"{name}: unknown setting of an environment, unexpected keyword argument '{name}'"
                raise UnknownSettingError(f"{words}{hint} ({allowed})")
        given = EnvSettings(**settings)
        for name in ("reveal_output_length", "drain"):
            checks.flag(name, getattr(given, name))
        if given.trace is not None:
            if not isinstance(scenario, str) or scenario != DEFAULT_SCENARIO:
                shown = checks.shown(scenario)
                raise ConfigError(f"scenario: {shown} beside trace={given.trace!r}, must be left out: the trace is the workload")
            drawn = scenario_from_trace(given.trace, rate=given.rate)
        else:
            drawn = load_scenario(scenario) if isinstance(scenario, str) else scenario
        if not isinstance(drawn, Scenario):
            raise ConfigError(f"scenario: {scenario!r}, must be a name or a Scenario")
        if given.predictions is not None:
            drawn = dataclasses.replace(drawn, predictions=PredictionModel.of(given.predictions))
        layout = _layout(drawn, given)
        engine = _engine(drawn, given)
        codec = _codec(given, layout, engine)
        if codec.token_budgets and engine.preset == "paper":
            raise ConfigError(f"token_budgets: {codec.token_budgets}, must be empty: the paper preset has no token budget")
        levels_alone = given.action_set != "admit" and given.hold is None
        hold_seconds = given.hold_seconds if given.hold_seconds is not None else HOLD_SECONDS if levels_alone else 0.0
        return cls(
            scenario=drawn,
            rate=drawn.rate if given.rate is None else checked_rate(given.rate),
            num_requests=drawn.num_requests if given.num_requests is None else checked_count(given.num_requests),
            engine=engine,
            layout=layout,
            limits=EpisodeLimits(drain=given.drain, horizon=given.horizon, max_iterations=given.max_iterations),
            reveal_output_length=given.reveal_output_length,
            codec=codec,
            reward=_reward(given.reward, drawn, layout),
            backlog=checked_backlog(given.backlog),
            hold=checks.integer("hold", 1 if given.hold is None else given.hold, low=1, high=1_000_000),
            hold_seconds=checks.number("hold_seconds", hold_seconds, unit="seconds"),
            discount_seconds=checks.number("discount_seconds", given.discount_seconds, high=math.inf, unit="seconds", open_low=True),
        )

    def replace(self, **changes: Any) -> EnvSpec:
        return dataclasses.replace(self, **changes)

    def forecast(self, rate: float | None = None) -> Forecast:
        """What an operator knows beforehand, at ``rate`` (default: the spec's)."""
        return make_forecast(self.scenario.statistics, self.rate if rate is None else rate, self.engine, self.layout)

    def peak_tables(self) -> PeakTables:
        """Tables of the predictions that the action set needs; many environments may share them."""
        if self.codec.kind not in (PEAK, OPERATE):
            return NO_TABLES
        statistics = self.scenario.statistics
        tables = peak_tables(statistics, self.layout, self.engine)
        if self.codec.kind == PEAK:
            return tables
        return dataclasses.replace(tables, work=expected_work(statistics, self.layout, work_weights(self.engine, statistics)))

    def codec_record(self, forecast: Forecast, peak: PeakTables) -> CodecRecord:
        """The action set as compiled code reads it."""
        return self.codec.record(forecast, peak)

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


def _codec(given: EnvSettings, layout: QueueLayout, engine: EngineConfig) -> Codec:
    """The action set of the settings."""
    checks.one_of("action_set", given.action_set, tuple(ACTION_SETS))
    for action_set, names in ACTION_SETS.items():
        for name in names:
            value, default = getattr(given, name), EnvSettings.__dataclass_fields__[name].default
            same = value is default or (type(value) is type(default) and value == default)
            if name not in ACTION_SETS[given.action_set] and not same:
                raise ConfigError(f"{name}: {checks.shown(value)}, is for action_set={action_set!r}, not {given.action_set!r}")
    budgets: Any = given.token_budgets  # checked and converted there, as the others
    if given.action_set == "admit":
        return ActionCodec(layout.num_queues, given.max_admit, token_budgets=budgets)
    if given.action_set == "reserve":
        return ReserveCodec(given.thetas, token_budgets=budgets)  # type: ignore[arg-type]
    if given.action_set == "operate":
        ageing: Any = given.ageing if given.ageing is not None else AGEING if layout.num_classes > 1 else ()
        if engine.preset == "vllm" and not budgets:
            budgets = tuple(budget for budget in BUDGETS if budget < engine.max_num_batched_tokens)
        return OperateCodec(given.levels, ageing, token_budgets=budgets)  # type: ignore[arg-type]
    default = PREDICTED_ORDERS if layout.by == "predicted" else WORK_ORDERS if layout.num_classes > 1 else ()
    orders = given.orders if given.orders is not None else default
    return PeakCodec(given.levels, orders, token_budgets=budgets)  # type: ignore[arg-type]


def _engine(scenario: Scenario, given: EnvSettings) -> EngineConfig:
    """The scenario's engine with the changes of ``engine`` and the iteration times of ``calibration``.

    Raises:
        ConfigError: iteration times given twice, a calibration that cannot be loaded, or one for the ``paper`` preset.
    """
    engine = engine_with(scenario.engine, given.engine)
    if given.calibration is None:
        return engine
    named = f"calibration: {checks.shown(given.calibration)}"
    if isinstance(given.engine, EngineConfig):
        raise ConfigError(f"{named} beside an EngineConfig as engine, whose time_model is set already; must be None with it")
    for name in ("time_model", "d0", "d1"):
        if given.engine is not None and name in given.engine:
            shown = checks.shown(given.engine[name])
            raise ConfigError(f"{named} beside engine.{name}={shown}: both set the iteration times, must be None with it")
    if engine.preset == "paper":
        raise ConfigError(f"{named}, must be None with the paper preset, whose model states its iteration times (d0, d1)")
    return engine.replace(time_model=load_calibration(given.calibration))


def _reward(given: str | Mapping[str, Any] | Reward, scenario: Scenario, layout: QueueLayout) -> Reward:
    reward = make_reward(given)
    return reward.of(scenario.statistics.tenants, layout) if isinstance(reward, TenantReward) else reward


def _layout(scenario: Scenario, given: EnvSettings) -> QueueLayout:
    base = scenario.known_layout if given.reveal_output_length else scenario.layout
    if (given.class_by is not None and given.class_by != base.by) or given.class_edges:
        by = given.class_by or base.by
        num_types = scenario.statistics.num_types if by == "type" else scenario.num_tenants if by == "tenant" else 1
        weights = scenario.tenants.layout.tenant_weights if by == "tenant" and scenario.tenants is not None else ()
        edges: Any = given.class_edges  # checked and converted there
        if by == "predicted":
            found = predicted_layout(scenario.statistics, PREDICTED_CLASSES, base)
            base = dataclasses.replace(found, edges=edges) if given.class_edges else found
        else:
            base = QueueLayout(by, edges, num_types, base.segment_ends, tenant_weights=weights)
    if given.segment_ends is not None:
        base = dataclasses.replace(base, segment_ends=given.segment_ends)  # type: ignore[arg-type]  # converted there
    if base.by == "predicted" and scenario.statistics.predicted is None:
        predicted_layout(scenario.statistics, 1)  # refuses
    if base.reveals_output_length and not given.reveal_output_length:
        raise ConfigError("class_by: 'output' needs reveal_output_length=True (LLMSchedKnown-v1): it shows hidden lengths")
    return base


__all__ = ["EnvSettings", "EnvSpec", "checked_backlog", "checked_count", "checked_rate", "draw_backlog"]
