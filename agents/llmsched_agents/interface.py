"""A recipe in one setting: what an agent sees of a backend and what its actions mean there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_agents.kernel import FEATURES, KINDS, AgentRecord, decode_at, observe_at
from llmsched_agents.peak import NO_TABLES, LengthTables, length_tables
from llmsched_agents.recipe import Recipe
from llmsched_baselines import Setting
from llmsched_env.action import ActionCodec
from llmsched_env.backend import View
from llmsched_env.errors import ConfigError
from llmsched_env.forecast import Forecast, make_forecast
from llmsched_env.observation import ObservationLayout
from llmsched_env.types import Decision, QueueLayout


def agent_record(
    recipe: Recipe, layout: QueueLayout, forecast: Forecast, tables: LengthTables, **network: npt.NDArray[Any]
) -> AgentRecord:
    """What the compiled functions of ``llmsched_agents.kernel`` read of a recipe in one setting.

    Args:
        tables: ``NO_TABLES`` where the recipe uses none.
        network: arrays of an actor by field, where there is one.
    """
    whole, columns = observed_columns(recipe, layout)
    components = component_sizes(recipe, layout.num_queues)
    record = AgentRecord(
        levels=np.array(recipe.choices, dtype=np.float64),
        forecast=forecast,
        columns=columns,
        peak=tables.peak.record(),
        remaining=tables.remaining,
        statics=tables.statics.astype(np.float64),
        components=np.array(components, dtype=np.int64),
        action=np.zeros(len(components), dtype=np.int64),
        held=np.zeros(layout.num_queues, dtype=np.int64),
        **network,
    )
    record.kind, record.max_admit, record.hold = KINDS[recipe.action_set], recipe.max_admit, recipe.hold
    record.whole, record.extended = whole, recipe.features
    record.width = columns.size + (FEATURES if recipe.features else 0)
    record.boundary_rate, record.discount = tables.boundary_rate, np.inf
    return record


class Interface:
    """Observations from, and decisions for, one engine at a time; equal to ``AgentVecEnv``'s.

    Attributes:
        layout, engine: as the recipe wants them in this setting.
        width: D, numbers of an observation, nothing hidden among them.
        components: sizes of the action's components.
    """

    def __init__(self, recipe: Recipe, setting: Setting) -> None:
        self.recipe = recipe
        self.layout = recipe.layout_for(setting.statistics)
        self.engine = recipe.engine_for(setting)
        self.components = component_sizes(recipe, self.layout.num_queues)
        self.forecast = make_forecast(setting.statistics, setting.rate, self.engine, self.layout)
        if recipe.uses_tables:
            self.tables = length_tables(setting.statistics, self.layout, self.engine, self.forecast.boundary_rate, recipe.spare)
        else:
            self.tables = NO_TABLES
        self.record = agent_record(recipe, self.layout, self.forecast, self.tables)
        self.width = self.record.width
        self._observation = np.zeros((1, self.width), dtype=np.float32)
        self._mask = np.ones((1, sum(self.components)), dtype=np.bool_)

    def observe(self, view: View) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """(1, D) observation and (1, sum of components) mask; the same two arrays at every call.

        Raises:
            ConfigError: the view has other queues.
        """
        self._check(view)
        observe_at(view.handle, self.record.handle, self._observation[0], self._mask[0])  # type: ignore[attr-defined]
        return self._observation, self._mask

    def decode(self, view: View, action: npt.NDArray[np.int64], out: Decision) -> Decision:
        """Write what the action (components,) means now into ``out``."""
        self._check(view)
        decode_at(view.handle, self.record.handle, action, out.handle)  # type: ignore[attr-defined]
        return out

    def _check(self, view: View) -> None:
        if view.layout.num_queues != self.layout.num_queues:
            raise ConfigError(f"view: {view.layout.num_queues} queues, must be {self.layout.num_queues} as the agent's layout has")


FIELDS = (
    "kv",
    "sequences",
    "segment_residents",
    "segment_kv",
    "queue_length",
    "head_age",
    "head_tokens",
    "arrival_rate",
    "iteration",
    "evictions",
    "late",
    "context",
)
"""Fields of the environment's observation in the order in which agents read them: it is part of every checkpoint."""

CLASS_FREE = ("kv", "sequences", "iteration", "evictions", "context")
"""Fields that a compact agent reads."""


def observed_fields(layout: QueueLayout) -> list[tuple[str, int]]:
    """Names and widths of ``FIELDS``."""
    widths = dict(ObservationLayout.of(layout).fields)
    return [(name, widths[name]) for name in FIELDS]


def observed_columns(recipe: Recipe, layout: QueueLayout) -> tuple[int, npt.NDArray[np.int64]]:
    """Width of the environment's observation, and the columns of it that the agent reads, in its order."""
    observation = ObservationLayout.of(layout)
    slices = dict(observation.slices())
    read = [np.arange(slices[name].start, slices[name].stop) for name in FIELDS if not recipe.compact or name in CLASS_FREE]
    return observation.size, np.concatenate(read).astype(np.int64)


def component_sizes(recipe: Recipe, num_queues: int) -> tuple[int, ...]:
    """Sizes of the action's components."""
    if recipe.action_set == "admit":
        return ActionCodec(num_queues, recipe.max_admit).sizes
    return (recipe.max_admit + 1,) if recipe.action_set == "admit-only" else (len(recipe.choices),)

