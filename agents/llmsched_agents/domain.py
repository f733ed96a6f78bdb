"""Settings to train on: one, a grid, or random ones over workloads, loads, memory sizes, burstiness and calibrations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmsched_agents.recipe import Recipe
from llmsched_baselines import Setting
from llmsched_env.engine_changes import engine_with
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.fluid import Fluid, stability_boundary
from llmsched_env.types import IntArray, LengthStatistics
from llmsched_env.workload import Scenario, load_scenario
from llmsched_env.workload.arrivals import MMPP2, Gamma, Poisson
from llmsched_env.workload.lengths import LengthModel

REFERENCE_SECONDS = 10.0


@dataclass(frozen=True)
class EnvSetting:
    """One workload at one rate on one engine.

    Attributes:
        scenario: lengths and arrivals.
        rate: requests/s.
        engine: before the agent's own options.
    """

    scenario: Scenario
    rate: float
    engine: EngineConfig

    @property
    def setting(self) -> Setting:
        """The same as policies see it."""
        return Setting(self.scenario.statistics, self.rate, self.engine)

    def placed(self, recipe: Recipe) -> PlacedSetting:
        """With the queues and the engine that a recipe asks for."""
        layout = recipe.layout_for(self.scenario.statistics)
        if layout.reveals_output_length and not recipe.known_lengths:
            raise ConfigError("recipe.layout: classes by output length, needs known_lengths=True")
        engine = recipe.engine_for(self.setting)
        if recipe.known_lengths:
            scenario = dataclasses.replace(self.scenario, known_layout=layout)
        else:
            scenario = dataclasses.replace(self.scenario, layout=layout)
        return PlacedSetting(scenario, self.rate, engine, time_scale(self.scenario, engine))

    def describe(self) -> dict[str, object]:
        """Plain values, for the record of a training."""
        return {
            "scenario": self.scenario.name,
            "rate": self.rate,
            "kv": self.engine.kv_capacity,
            "calibration": self.engine.time_model.provenance.name or "linear",
            "arrivals": repr(self.scenario.arrivals),
        }


@dataclass(frozen=True)
class PlacedSetting:
    """A setting as the vector environment takes it; ``time_scale`` in seconds is its unit of time for discounting."""

    scenario: Scenario
    rate: float
    engine: EngineConfig
    time_scale: float


def time_scale(scenario: Scenario, engine: EngineConfig) -> float:
    """Time that a mean request is served in at half the memory, over 10 s (about that of azure-conv): waits scale with it."""
    s = scenario.statistics
    load = Fluid.of(s.prompt, s.output, s.weight, engine).load
    half = 0.5 * engine.kv_capacity_tokens / load.kv_tokens
    return s.mean_output * load.times(half).seconds / REFERENCE_SECONDS


@dataclass(frozen=True)
class OneOf(LengthModel):
    """Every episode has the lengths of one of several workloads, and the statistics are those of all: what is
    known is the long run's, and the traffic of the hour is of another kind.

    Attributes:
        parts: equally likely.
    """

    parts: tuple[LengthModel, ...]

    def sample(self, rng: np.random.Generator, n: int) -> tuple[IntArray, IntArray, IntArray]:
        return self.parts[int(rng.integers(len(self.parts)))].sample(rng, n)

    def statistics(self) -> LengthStatistics:
        found = [part.statistics() for part in self.parts]
        return LengthStatistics.of(
            np.concatenate([s.prompt for s in found]),
            np.concatenate([s.output for s in found]),
            np.concatenate([s.weight for s in found]),
            source="; ".join(s.source for s in found),
        )


def workload_of(name: str) -> Scenario:
    """A built-in scenario, or ``A+B``: one with the lengths of A or B in every episode (``OneOf``) and the rest of A.

    Raises:
        ConfigError: unknown name, or scenarios for different presets.
    """
    names = name.split("+")
    found = [load_scenario(part) for part in names]
    if len(found) == 1:
        return found[0]
    if len({scenario.engine.preset for scenario in found}) > 1:
        raise ConfigError(f"scenarios: {name!r}, all must be for engines of one preset")
    return dataclasses.replace(found[0], name=name, lengths=OneOf(tuple(scenario.lengths for scenario in found)))


@dataclass(frozen=True)
class Domain:
    """A set of settings.

    Attributes:
        scenarios: names, or several joined by ``+`` (``workload_of``).
        loads: shares of the fluid stability boundary of the scenario on the engine.
        kv: KV capacities in blocks (``paper``: tokens); empty for each scenario's own.
        calibrations: iteration-time models by name; empty for each scenario's own.
        bursts: "poisson", "gamma-CV" or "mmpp" (high and low phases of 60 s, 1.5 and 0.5 times the rate); empty for
            each scenario's own arrivals.
    """

    scenarios: tuple[str, ...] = ("azure-conv",)
    loads: tuple[float, ...] = (0.8,)
    kv: tuple[int, ...] = ()
    calibrations: tuple[str, ...] = ()
    bursts: tuple[str, ...] = ()

    def grid(self) -> list[EnvSetting]:
        """Every combination, loads fastest: the first settings differ in load."""
        return [
            self._made(name, load, kv, calibration, burst)
            for name in self.scenarios
            for kv in self.kv or (None,)
            for calibration in self.calibrations or (None,)
            for burst in self.bursts or (None,)
            for load in self.loads
        ]

    def sample(self, count: int, rng: np.random.Generator) -> list[EnvSetting]:
        """``count`` random settings: scenarios in turn, loads uniform between the least and the largest, KV log-uniform
        between the least and the largest, calibrations and bursts uniform among those named."""
        made = []
        for i in range(count):
            name = self.scenarios[i % len(self.scenarios)]
            load = float(rng.uniform(min(self.loads), max(self.loads)))
            kv = int(np.exp(rng.uniform(np.log(min(self.kv)), np.log(max(self.kv))))) if self.kv else None
            calibration = str(rng.choice(self.calibrations)) if self.calibrations else None
            burst = str(rng.choice(self.bursts)) if self.bursts else None
            made.append(self._made(name, load, kv, calibration, burst))
        return made

    def _made(self, name: str, load: float, kv: int | None, calibration: str | None, burst: str | None) -> EnvSetting:
        scenario = workload_of(name)
        paper = scenario.engine.preset == "paper"
        changes: dict[str, object] = {}
        if kv is not None and not paper:
            changes["num_blocks"] = kv
        if calibration is not None and not paper:
            changes["time_model"] = calibration
        engine = engine_with(scenario.engine, changes)
        rate = load * stability_boundary(scenario.statistics, engine)
        if burst is not None:
            scenario = dataclasses.replace(scenario, arrivals=arrivals_of(burst, rate))
        return EnvSetting(scenario, rate, engine)

    def describe(self) -> dict[str, Sequence[object]]:
        """Plain values, for JSON."""
        return {f.name: list(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[Any]]) -> Domain:
        """The inverse of ``describe``.

        Raises:
            ConfigError: an unknown field.
        """
        unknown = sorted(set(values) - {f.name for f in dataclasses.fields(cls)})
        if unknown:
            raise ConfigError(f"trained_on.{unknown[0]}: unknown field")
        return cls(**{name: tuple(value) for name, value in values.items()})


def arrivals_of(burst: str, rate: float) -> Poisson | Gamma | MMPP2:
    """The arrival process that a name stands for.

    Raises:
        ConfigError: unknown name.
    """
    if burst == "poisson":
        return Poisson(rate)
    if burst == "mmpp":
        return MMPP2(0.5 * rate, 1.5 * rate, 60.0, 60.0)
    kind, _, value = burst.partition("-")
    try:
        if kind == "gamma":
            return Gamma(rate, float(value))
    except ValueError:
        pass
    raise ConfigError(f"bursts: {burst!r}, must be poisson, mmpp or gamma-CV, such as gamma-3")
