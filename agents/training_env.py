"""The vector environment as agents train on it: their action sets, features, macro-steps and the clock of every step.

Everything is computed in one compiled loop over the arrays of ``LLMSchedVectorEnv``; with action set
``admit``, no features and ``hold = 1`` a step is equal to ``SB3VecEnv``'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from agents.domain import EnvSetting
from agents.interface import NO_TABLES, component_sizes, observed_columns
from agents.kernel import FEATURES, GRID, HIDDEN, KINDS, advance_all, branch_all, observe_agent
from agents.peak import LengthTables, TableStack, length_tables
from agents.recipe import Recipe
from agents.sb3_vec import SB3VecEnv
from llmsched_env.action import THETAS
from llmsched_env.errors import ConfigError
from llmsched_env.observation import X_BOUNDARY_RATE
from llmsched_env.types import QueueLayout
from llmsched_env.vector import LLMSchedVectorEnv


@dataclass(slots=True)
class StepRecord:
    """What the last step was, for the buffers; one object for the life of the environments.

    Attributes:
        durations: (num_envs,) seconds the clock moved, over ``time_scale``.
        truncated: (num_envs,) bool, the episode was cut rather than finished.
        group: (num_envs,) int64, environments of one number have the same setting.
        time_scale: (num_envs,) seconds in the unit of time of each environment's discounting.
    """

    durations: npt.NDArray[np.float64]
    truncated: npt.NDArray[np.bool_]
    group: npt.NDArray[np.int64]
    time_scale: npt.NDArray[np.float64]


class AgentVecEnv(SB3VecEnv):
    """``num_envs`` environments for stable-baselines3 with an agent's action set and observation.

    Observations are one float32 array: the environment's, the features of ``agents.peak`` where the
    recipe has them, and, with ``hidden``, what only a critic may read (``public`` says where it begins).
    An episode that is cut at the horizon gives neither ``terminal_observation`` nor
    ``TimeLimit.truncated``: the buffers of ``agents.time_aware`` read ``record`` instead.

    Args:
        settings: environment i has setting i modulo their number.
        recipe: queues, engine options, action set.
        reward, num_requests, horizon, backlog, max_iterations, threads: as for ``LLMSchedVectorEnv``.
        discount_seconds: time constant of discounting within a step; infinity for none.
        hidden: append the hidden numbers.

    Raises:
        ConfigError: a setting or the recipe is refused.
    """

    def __init__(
        self,
        settings: Sequence[EnvSetting],
        recipe: Recipe,
        num_envs: int,
        *,
        reward: Any = "latency",
        num_requests: int | None = None,
        horizon: float = np.inf,
        backlog: int | tuple[int, int] = 0,
        max_iterations: int = 1_000_000,
        threads: int | None = None,
        discount_seconds: float = np.inf,
        hidden: bool = False,
    ) -> None:
        if not settings:
            raise ConfigError("settings: none given, must be at least one")
        if hidden and not recipe.features:
            raise ConfigError("hidden: True, needs recipe.features")
        self.settings = [settings[i % len(settings)] for i in range(min(num_envs, len(settings)))]
        self.recipe = recipe
        placed = [s.placed(recipe) for s in self.settings]
        vector = LLMSchedVectorEnv(
            num_envs,
            scenario=[p.scenario for p in placed],
            rate=[p.rate for p in placed],
            engine=[p.engine for p in placed],
            reward=reward,
            threads=threads,
            num_requests=num_requests if num_requests is not None else min(p.scenario.num_requests for p in placed),
            horizon=horizon,
            backlog=backlog,
            max_iterations=max_iterations,
            reveal_output_length=recipe.known_lengths,
            action_set="reserve" if recipe.action_set == "reserve" else "admit",
            max_admit=recipe.max_admit,
            thetas=recipe.choices if recipe.action_set == "reserve" else THETAS,
        )
        super().__init__(vector, flatten=True)
        n = vector.num_envs
        self._whole, self._columns = observed_columns(recipe, vector.template(0).layout)
        self.public = self._columns.size + (FEATURES if recipe.features else 0)
        self._size = self.public + (HIDDEN if hidden else 0)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (self._size,), np.float32)
        self._kind = KINDS[recipe.action_set]
        self._levels = np.array(recipe.choices, dtype=np.float64)
        self.components = component_sizes(recipe, vector.template(0).layout.num_queues)
        self._mask_size = sum(self.components)
        if len(self.components) == 1:
            self.action_space = gym.spaces.Discrete(self._mask_size)
        per_setting = self._tables(len(placed))
        stack = TableStack.of([per_setting[i % len(placed)] for i in range(n)])
        self._stack = stack
        self._scratch = np.zeros((n, 2, len(GRID)))
        scale = np.array([placed[i % len(placed)].time_scale for i in range(n)])
        self.record = StepRecord(np.zeros(n), np.zeros(n, dtype=np.bool_), np.arange(n) % len(placed), scale)
        self._discount = discount_seconds * scale
        self.seconds = 0.0
        self._returns = np.zeros(n)
        self._lengths = np.zeros(n, dtype=np.int64)
        v = vector
        self._arrays = (
            v._decisions, v._models, v._settings, v._ends, v._requests, v._times, v._slots, v._queues, v._queue_f, v._scalars,
            v._clocks, v._batches, v._events, v._trace, v._contexts,
        )  # fmt: skip

    def _tables(self, count: int) -> list[LengthTables]:
        if not self.recipe.uses_tables:
            return [NO_TABLES] * count
        made = []
        for i in range(count):
            t = self.vector.template(i)
            made.append(length_tables(t.scenario.statistics, t.layout, t.engine, float(t.context[X_BOUNDARY_RATE]), self.recipe.spare))
        return made

    @property
    def layout(self) -> QueueLayout:
        """The queues of the first environment."""
        return self.vector.template(0).layout

    # --- stepping ---------------------------------------------------------------------------------
    def reset(self) -> npt.NDArray[np.float32]:
        self.vector.reset(seed=self._seeds)
        self._reset_seeds()
        self._actions = None
        self._returns[:] = 0.0
        self._lengths[:] = 0
        self._new_outputs()
        for i in range(self.num_envs):
            self._observe(i)
        return self._observations

    def _new_outputs(self) -> None:
        self._observations = np.empty((self.num_envs, self._size), dtype=np.float32)
        self._masks = np.empty((self.num_envs, self._mask_size), dtype=np.bool_)

    def _observe(self, i: int) -> None:
        s, v = self._stack, self.vector
        row = s.row[i]
        observe_agent(
            self._kind, self.recipe.max_admit, self._whole, self._columns, self.recipe.features, s.headroom[i], s.boundary_rate[i],
            s.steps[row], s.survival[row], s.remaining[row], s.size[row], s.statics[i], v._settings[i], v._contexts[i], v._requests[i],
            v._times[i], v._slots[i], v._queues[i], v._queue_f[i], v._scalars[i], v._clocks[i], self._scratch[i], self._observations[i],
            self._masks[i],
        )  # fmt: skip

    def step_wait(self) -> VecEnvStepReturn:
        if self._actions is None:
            raise gym.error.ResetNeeded("call step_async() before step_wait()")
        start = time.perf_counter()
        actions, self._actions = np.asarray(self._actions, dtype=np.int64).reshape(self.num_envs, len(self.components)), None
        self._new_outputs()
        n, s = self.num_envs, self._stack
        rewards, durations = np.empty(n), np.empty(n)
        terminated, truncated = np.empty(n, dtype=np.bool_), np.empty(n, dtype=np.bool_)
        advance_all(
            actions, self._kind, self._levels, self.recipe.max_admit, self.recipe.hold, self._discount, *self.vector._reward_code,
            self._whole, self._columns, self.recipe.features, s.row, s.headroom, s.boundary_rate, s.steps, s.survival, s.remaining, s.size,
            s.statics, *self._arrays, self._scratch, self._observations, self._masks, rewards, durations, terminated, truncated,
            self._returns, self._lengths,
        )  # fmt: skip
        self.record.durations[:] = durations / self.record.time_scale
        self.record.truncated[:] = truncated
        infos = self._no_infos
        dones = terminated | truncated
        if dones.any():
            infos = infos.copy()
            elapsed = round(time.time() - self._built, 6)
            for i in np.flatnonzero(dones).tolist():
                infos[i] = {"episode": {"r": float(self._returns[i]), "l": int(self._lengths[i]), "t": elapsed}}
                self._returns[i], self._lengths[i] = 0.0, 0
                self.vector._start(i)
                self._observe(i)
        self.seconds += time.perf_counter() - start
        return self._observations, rewards.astype(np.float32), dones, infos

    def branch(self, follow: npt.NDArray[np.int64], deviate_seconds: float, horizon_seconds: float) -> npt.NDArray[np.float64]:
        """(num_envs, A) what each of the A actions would cost from here; every action meets the same future requests.

        An action in force for ``deviate_seconds``, then ``follow`` (num_envs,). Arrivals stop after
        ``horizon_seconds`` and the rest is worked off. Both times are over each environment's ``time_scale``.
        Cost is minus the reward. The environments do not move.

        Raises:
            ConfigError: the action has several components.
        """
        if len(self.components) != 1:
            raise ConfigError(f"recipe.action_set: {self.recipe.action_set!r} has {len(self.components)} components, must have one")
        n, s, scale = self.num_envs, self._stack, self.record.time_scale
        tried = np.tile(np.arange(self._mask_size, dtype=np.int64), (n, 1))
        costs = np.empty((n, self._mask_size))
        start = time.perf_counter()
        branch_all(
            tried, np.asarray(follow, dtype=np.int64), self._kind, self._levels, self.recipe.max_admit, deviate_seconds * scale,
            horizon_seconds * scale, *self.vector._reward_code, s.row, s.headroom, s.steps, s.survival, s.size, *self._arrays,
            self._scratch, costs,
        )  # fmt: skip
        self.seconds += time.perf_counter() - start
        return costs

    # --- masks ------------------------------------------------------------------------------------
    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(num_envs, sum of the sizes of the action's components) bool."""
        return self._masks

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[npt.NDArray[np.bool_]]:
        if method_name == "action_masks":
            return [self._masks[i] for i in self._chosen(indices)]
        return super().env_method(method_name, *method_args, indices=indices, **method_kwargs)

    def _action_mask(self, i: int) -> npt.NDArray[np.bool_]:
        mask: npt.NDArray[np.bool_] = self._masks[i]
        return mask
