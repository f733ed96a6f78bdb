"""A recipe in one setting: what an agent sees of a backend and what its actions mean there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from agents.kernel import FEATURES, GRID, KINDS, decode_agent, observe_agent
from agents.peak import LengthTables, length_tables
from agents.recipe import Recipe
from baselines import Setting
from llmsched_env.action import ActionCodec
from llmsched_env.backend import View
from llmsched_env.engine import state as st
from llmsched_env.observation import X_BOUNDARY_RATE, ObservationLayout, static_context
from llmsched_env.types import Decision, QueueLayout


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
        self.whole, self.columns = observed_columns(recipe, self.layout)
        self.width = self.columns.size + (FEATURES if recipe.features else 0)
        self.components = component_sizes(recipe, self.layout.num_queues)
        self.context = static_context(setting.statistics, setting.rate, self.engine, self.layout)
        self.kind = KINDS[recipe.action_set]
        self.levels = np.array(recipe.choices, dtype=np.float64)
        if recipe.uses_tables:
            self.tables = length_tables(setting.statistics, self.layout, self.engine, float(self.context[X_BOUNDARY_RATE]), recipe.spare)
        else:
            self.tables = NO_TABLES
        self._scratch = np.zeros((2, len(GRID)))
        self._observation = np.zeros((1, self.width), dtype=np.float32)
        self._mask = np.ones((1, sum(self.components)), dtype=np.bool_)

    def observe(self, view: View) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """(1, D) observation and (1, sum of components) mask; the same two arrays at every call."""
        settings, requests, slots, queues, queue_f, scalars, clocks = view.arrays  # type: ignore[attr-defined]
        t = self.tables
        observe_agent(
            self.kind, self.recipe.max_admit, self.whole, self.columns, self.recipe.features, t.headroom, t.boundary_rate, t.steps,
            t.survival, t.remaining, t.survival.shape[1], t.statics, settings, self.context, requests, _NO_TIMES, slots, queues, queue_f,
            scalars, clocks, self._scratch, self._observation[0], self._mask[0],
        )  # fmt: skip
        return self._observation, self._mask

    def decode(self, view: View, action: npt.NDArray[np.int64], out: Decision) -> Decision:
        """Write what the action (components,) means now into ``out``."""
        settings, requests, slots, queues, _, scalars, _ = view.arrays  # type: ignore[attr-defined]
        t = self.tables
        decode_agent(
            self.kind, action, self.levels, self.recipe.max_admit, t.headroom, t.steps, t.survival, t.survival.shape[1], settings,
            self.context, requests, slots, queues, scalars, self._scratch, out.array,
        )  # fmt: skip
        return out


_NO_TIMES = np.zeros((st.T_ROWS, 1))  # read for hidden numbers alone
NO_TABLES = LengthTables(
    np.zeros((1, 1, len(GRID)), dtype=np.float32), np.zeros((1, 1, 2)), np.zeros(1, dtype=np.float32), np.zeros(len(GRID)), 0.0, 1.0
)


CLASS_FREE = ("kv", "committed", "sequences", "iteration", "evictions", "context")
"""Fields of the environment's observation that a compact agent reads."""


def observed_columns(recipe: Recipe, layout: QueueLayout) -> tuple[int, npt.NDArray[np.int64]]:
    """Width of the environment's observation, and the columns of it that the agent reads."""
    observation = ObservationLayout.of(layout)
    read = [np.arange(where.start, where.stop) for name, where in observation.slices() if not recipe.compact or name in CLASS_FREE]
    return observation.size, np.concatenate(read).astype(np.int64)


def component_sizes(recipe: Recipe, num_queues: int) -> tuple[int, ...]:
    """Sizes of the action's components."""
    if recipe.action_set == "admit":
        return tuple(int(n) for n in ActionCodec(num_queues, recipe.max_admit).space().nvec)
    return (recipe.max_admit + 1,) if recipe.action_set == "admit-only" else (len(recipe.choices),)

