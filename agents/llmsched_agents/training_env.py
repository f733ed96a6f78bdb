"""The vector environment as agents train on it: their action sets, features, macro-steps and the clock of every step.

Everything is computed in one compiled loop over the arrays of ``LLMSchedVectorEnv``; with action set
``admit``, no features and ``hold = 1`` a step is equal to ``SB3VecEnv``'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvStepReturn

from llmsched_agents.domain import EnvSetting
from llmsched_agents.interface import agent_record, component_sizes
from llmsched_agents.kernel import HIDDEN, AgentRecord, advance_range, carry_on, observe_all_at
from llmsched_agents.peak import NO_TABLES, length_tables
from llmsched_agents.recipe import Recipe
from llmsched_agents.sb3_vec import SB3VecEnv, StepRecord
from llmsched_env.compiled import entry
from llmsched_env.engine.state import END_FINISHED, RUNNING
from llmsched_env.errors import ConfigError
from llmsched_env.records import Level
from llmsched_env.types import QueueLayout
from llmsched_env.vector import LLMSchedVectorEnv


def _action_set(recipe: Recipe) -> dict[str, Any]:
    """The settings of the environment's own action set, which ``agent_record`` replaces where the recipe has another."""
    if recipe.action_set == "reserve":
        return {"action_set": "reserve", "thetas": recipe.choices}
    return {"action_set": "admit", "max_admit": recipe.max_admit}


class AgentVecEnv(SB3VecEnv):
    """``num_envs`` environments for stable-baselines3 with an agent's action set and observation.

    Observations are one float32 array: the environment's, the features of ``llmsched_agents.peak`` where the
    recipe has them, and, with ``hidden``, what only a critic may read (``public`` says where it begins).
    An episode that is cut at the horizon gives neither ``terminal_observation`` nor
    ``TimeLimit.truncated``: the buffers of ``llmsched_agents.time_aware`` read ``record`` instead.

    Args:
        settings: environment i has setting i modulo their number.
        recipe: queues, engine options, action set.
        num_requests: of an episode; None for the fewest of the scenarios.
        discount_seconds: time constant of discounting within a step; infinity for none.
        hidden: append the hidden numbers.
        options: ``reward``, ``horizon``, ``backlog``, ``max_iterations``, ``threads`` of ``LLMSchedVectorEnv``.

    Raises:
        ConfigError: a setting or the recipe is refused.
    """

    def __init__(
        self,
        settings: Sequence[EnvSetting],
        recipe: Recipe,
        num_envs: int,
        *,
        num_requests: int | None = None,
        discount_seconds: float = np.inf,
        hidden: bool = False,
        **options: Any,
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
            num_requests=num_requests if num_requests is not None else min(p.scenario.num_requests for p in placed),
            reveal_output_length=recipe.known_lengths,
            hold=1,  # ``advance_range`` holds actions itself
            **_action_set(recipe),
            **options,
        )
        super().__init__(vector, flatten=True)
        n = vector.num_envs
        if vector._compiled_reward is None:
            given = options.get("reward")
            raise ConfigError(f"reward: {given!r}, must be a built-in or compiled one (llmsched_env.reward.CompiledReward) in training")
        per_setting = self._records(placed)
        self._agents = [self._own(per_setting[i % len(placed)]) for i in range(n)]
        self.public = self._agents[0].width
        self._size = self.public + (HIDDEN if hidden else 0)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (self._size,), np.float32)
        self.components = component_sizes(recipe, self.layout.num_queues)
        self._mask_size = sum(self.components)
        if len(self.components) == 1:
            self.action_space = gym.spaces.Discrete(self._mask_size)
        scale = np.array([placed[i % len(placed)].time_scale for i in range(n)])
        self.record = StepRecord(np.zeros(n), np.zeros(n, dtype=np.bool_), np.arange(n) % len(placed), scale)
        for agent, seconds in zip(self._agents, discount_seconds * scale, strict=True):
            agent.discount = seconds
        self.seconds = 0.0
        self._bind()

    def _bind(self) -> None:
        """(num_envs, 4) handles of engine, environment, decision and agent; good in this process only."""
        self._handles = np.empty((self.num_envs, 4), dtype=self.vector._handles.dtype)
        self._handles[:, :3] = self.vector._handles
        for i, agent in enumerate(self._agents):
            self._handles[i, 3] = agent.handle

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._bind()

    def _records(self, placed: Sequence[Any]) -> list[AgentRecord]:
        """One record for each setting."""
        made = []
        for i in range(len(placed)):
            spec = self.vector.spec_of(i)
            forecast, tables = self.vector._envs[i].codec.forecast, NO_TABLES
            if self.recipe.uses_tables:
                tables = length_tables(spec.scenario.statistics, spec.layout, spec.engine, forecast.boundary_rate, self.recipe.spare)
            made.append(agent_record(self.recipe, spec.layout, forecast, tables))
        return made

    @staticmethod
    def _own(shared: AgentRecord) -> AgentRecord:
        """A record that shares the tables of another; only what is written is its own."""
        own: dict[str, Any] = {name: np.zeros_like(shared._parts[name]) for name in ("action", "held")}
        scratch = {name: np.zeros_like(shared._parts["peak"][name]) for name in ("total", "own")}
        own["peak"] = {**shared._parts["peak"], **scratch}
        return AgentRecord(shared._memory.copy(), Level.HIDDEN, **{**shared._parts, **own})

    @property
    def layout(self) -> QueueLayout:
        """The queues of the first environment."""
        return self.vector.spec_of(0).layout

    # --- stepping ---------------------------------------------------------------------------------
    def reset(self) -> npt.NDArray[np.float32]:
        self.vector.reset(seed=self._seeds)
        self._reset_seeds()
        self._actions = None
        self._new_outputs()
        for i in range(self.num_envs):
            self._observe(i)
        return self._observations

    def _new_outputs(self) -> None:
        self._observations = np.empty((self.num_envs, self._size), dtype=np.float32)
        self._masks = np.empty((self.num_envs, self._mask_size), dtype=np.bool_)

    def _observe(self, i: int) -> None:
        observe_all_at(self._handles[i, 0], self._handles[i, 3], self._observations[i], self._masks[i])

    def step_wait(self) -> VecEnvStepReturn:
        if self._actions is None:
            raise gym.error.ResetNeeded("call step_async() before step_wait()")
        start = time.perf_counter()
        actions, self._actions = self._checked(self._actions), None
        self._new_outputs()
        n = self.num_envs
        results, ends = np.empty((n, 2)), np.empty(n, dtype=np.int64)
        self.vector._workers.run(entry(advance_range), self._handles, actions, self._observations, self._masks, results, ends)
        rewards, durations = results[:, 0], results[:, 1]
        self.record.durations[:] = durations / self.record.time_scale
        self.record.truncated[:] = ends > END_FINISHED
        infos = self._no_infos
        dones = ends != RUNNING
        if dones.any():
            infos = infos.copy()
            elapsed = round(time.time() - self._built, 6)
            for i in np.flatnonzero(dones).tolist():
                env = self.vector._envs[i]
                infos[i] = {"episode": {"r": env.episode_return, "l": env.episode_length, "t": elapsed}}
                self.vector._start(i)
                self._observe(i)
        self.seconds += time.perf_counter() - start
        return self._observations, rewards.astype(np.float32), dones, infos

    def _checked(self, actions: Any) -> npt.NDArray[np.int64]:
        """(N, W) int64, every one in its space: compiled code reads tables by them."""
        chosen = np.asarray(actions, dtype=np.int64).reshape(self.num_envs, len(self.components))
        if ((chosen < 0) | (chosen >= np.array(self.components))).any():
            raise ConfigError(f"actions: {actions!r}, must be from 0 to {[size - 1 for size in self.components]}")
        return chosen

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
        n, scale = self.num_envs, self.record.time_scale
        followed = self._checked(follow)
        costs = np.empty((n, self._mask_size))
        start = time.perf_counter()

        def try_all(first: int, last: int) -> None:
            for e in range(first, last):
                kept, memory = self.vector.fleet.save(e), self.vector._envs[e].reward_numbers.memory
                remembered = memory.copy()
                for a in range(self._mask_size):
                    tried = np.array([a])
                    costs[e, a] = carry_on(self._handles[e], tried, followed[e], deviate_seconds * scale[e], horizon_seconds * scale[e])
                    self.vector.fleet.restore(e, kept)
                    memory[:] = remembered

        self.vector._workers.run(try_all)
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
