"""A recipe in one setting: what an agent sees of a backend and what its actions mean there."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from agents.kernel import FEATURES, KINDS, STEPS, decode_agent, observe_agent
from agents.peak import LengthTables, length_tables
from agents.recipe import Recipe
from baselines import Setting
from llmsched_env.action import ActionCodec
from llmsched_env.backend import View
from llmsched_env.engine import state as st
from llmsched_env.errors import ConfigError
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
        self._env_width = ObservationLayout.of(self.layout).size
        self.width = observation_width(recipe, self.layout)
        self.components = component_sizes(recipe, self.layout.num_queues)
        self._context = static_context(setting.statistics, setting.rate, self.engine, self.layout)
        self._kind = KINDS[recipe.action_set]
        self._levels = np.array(recipe.choices, dtype=np.float64)
        if recipe.uses_tables:
            self._tables = length_tables(setting.statistics, self.layout, self.engine, float(self._context[X_BOUNDARY_RATE]))
        else:
            self._tables = NO_TABLES
        self._scratch = np.zeros((2, STEPS.size))
        self._observation = np.zeros((1, self.width), dtype=np.float32)
        self._mask = np.ones((1, sum(self.components)), dtype=np.bool_)

    def observe(self, view: View) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """(1, D) observation and (1, sum of components) mask; the same two arrays at every call."""
        b, t = _arrays_of(view), self._tables
        observe_agent(
            self._kind, self.recipe.max_admit, self._env_width, self.recipe.features, t.half_block, t.boundary_rate, STEPS, t.survival,
            t.remaining, t.survival.shape[1], t.statics, b.settings, self._context, b.requests, b.times, b.slots, b.queues, b.queue_f,
            b.scalars, b.clocks, self._scratch, self._observation[0], self._mask[0],
        )  # fmt: skip
        return self._observation, self._mask

    def decode(self, view: View, action: npt.NDArray[np.int64], out: Decision) -> Decision:
        """Write what the action (components,) means now into ``out``."""
        b, t = _arrays_of(view), self._tables
        decode_agent(
            self._kind, action, self._levels, self.recipe.max_admit, t.half_block, STEPS, t.survival, t.survival.shape[1], b.settings,
            self._context, b.requests, b.slots, b.queues, b.scalars, self._scratch, out.array,
        )  # fmt: skip
        return out


NO_TABLES = LengthTables(
    np.zeros((1, 1, STEPS.size), dtype=np.float32), np.zeros((1, 1, 2)), np.zeros(1, dtype=np.float32), 0.0, 1.0
)


def observation_width(recipe: Recipe, layout: QueueLayout) -> int:
    """D: the environment's numbers and the features."""
    return ObservationLayout.of(layout).size + (FEATURES if recipe.features else 0)


def component_sizes(recipe: Recipe, num_queues: int) -> tuple[int, ...]:
    """Sizes of the action's components."""
    if recipe.action_set == "admit":
        return tuple(int(n) for n in ActionCodec(num_queues, recipe.max_admit).space().nvec)
    return (recipe.max_admit + 1,) if recipe.action_set == "admit-only" else (len(recipe.choices),)


def _arrays_of(view: View) -> Any:
    """The backend's arrays (``llmsched_env.backend.Backend``) behind its view.

    Raises:
        ConfigError: a view of something else.
    """
    backend = getattr(view, "_backend", None)
    if backend is None or backend.scalars.shape[0] != st.I_ROWS:
        raise ConfigError(f"view: {type(view).__name__}, must be the view of a backend that keeps the arrays of llmsched_env.engine.state")
    return backend
