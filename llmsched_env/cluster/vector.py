"""Many clusters stepped in one compiled call: the native vector environment of routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from llmsched_env import checks
from llmsched_env.action import all_as_integers
from llmsched_env.autoreset import AutoresetVectorEnv, Observations
from llmsched_env.cluster import state as cs
from llmsched_env.cluster.env import action_space, check_any_call, refuse, split_mask, summary_of
from llmsched_env.cluster.env_step import TOTALS, look, step_range, totals_at
from llmsched_env.cluster.observation import CALL_COLUMNS, REPLICA_COLUMNS, observation_space
from llmsched_env.cluster.reward import Outcome, latency_reward, slo_goodput_reward, throughput_reward
from llmsched_env.cluster.settings import ClusterSettings
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.sinks import KeepAll
from llmsched_env.compiled import entry
from llmsched_env.errors import ConfigError
from llmsched_env.threads import Workers


class LLMSchedClusterVectorEnv(AutoresetVectorEnv):
    """``num_envs`` independent ``LLMSchedCluster`` over the same kernel, equal to them step by step.

    ``gym.make_vec("llmsched_env:LLMSchedCluster-v0", num_envs=64)``. Spaces, observations, masks and rewards are those of
    ``LLMSchedCluster``; ``final_info`` has ``summary``, ``episode_return`` and ``episode_length``.

    Args:
        num_envs: number of clusters.
        scenario, rate: as for ``LLMSchedCluster``, or a sequence of them, environment i taking entry i modulo its length. All must have as
            many replicas.
        threads: threads of the compiled loop; None for as many processors as the process may use, each with at least 64 environments.
        autoreset_mode: as for ``LLMSchedVectorEnv``.
        kwargs: the other arguments of ``LLMSchedCluster``.

    Raises:
        ConfigError: an argument refused, or clusters of different size.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        scenario: Any = "equal",
        rate: float | Sequence[float] | None = None,
        threads: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        self._set_up(num_envs, autoreset_mode, render_mode)
        self._workers = Workers(self.num_envs, threads)
        self._settings = self._make_settings(scenario, rate, kwargs)
        first = self._settings[0]
        self.num_replicas, self.levels = first.num_replicas, first.levels
        self.single_observation_space = observation_space(self.num_replicas)
        self.single_action_space = action_space(self.num_replicas, len(self.levels))
        self._width = 2 if self.levels else 1
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.sims: list[ClusterSim | None] = [None] * self.num_envs
        self._kept = [KeepAll() for _ in range(self.num_envs)]
        self._broken = False
        self._num_calls = np.ones(self.num_envs, dtype=np.int64)
        self._totals = np.zeros((self.num_envs, len(TOTALS)))
        self._returns, self._lengths = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=np.int64)
        handle: Any = object if numba.config.DISABLE_JIT else np.int64
        self._clusters = np.zeros(self.num_envs, dtype=handle)
        self._handles = np.zeros((self.num_envs, self.num_replicas, 4), dtype=handle)
        self._new_outputs()

    def _make_settings(self, scenario: Any, rate: Any, kwargs: dict[str, Any]) -> list[ClusterSettings]:
        """Each different setting once; environment i has number i modulo their count."""
        scenarios = list(scenario) if isinstance(scenario, list | tuple) else [scenario]
        rates = list(rate) if isinstance(rate, list | tuple | np.ndarray) else [rate]
        if not scenarios or not rates:
            raise ConfigError("scenario, rate: [], must be one value or a list of at least one")
        for name in scenarios[self.num_envs :]:  # those that no environment takes are no less wrong
            ClusterSettings.of(name, **kwargs)
        count = min(math.lcm(len(scenarios), len(rates)), self.num_envs)
        made = [ClusterSettings.of(scenarios[i % len(scenarios)], rate=rates[i % len(rates)], **kwargs) for i in range(count)]
        sizes = sorted({settings.num_replicas for settings in made})
        if len(sizes) > 1:
            raise ConfigError(f"replicas: {sizes} among the environments, must be the same in all")
        return made

    def settings_of(self, i: int) -> ClusterSettings:
        """The settings of environment i."""
        return self._settings[i % len(self._settings)]

    def _new_outputs(self) -> None:
        """Arrays that one call returns: fresh ones, written by the compiled loop, so that nothing need be copied."""
        e, r = self.num_envs, self.num_replicas
        self._calls = np.empty((e, len(CALL_COLUMNS)), dtype=np.float32)
        self._replicas = np.empty((e, r, len(REPLICA_COLUMNS)), dtype=np.float32)
        self._masks = np.empty((e, r + len(self.levels)), dtype=np.bool_)
        self._seconds, self._redirected = np.zeros(e), np.zeros(e, dtype=np.bool_)

    # --- Gymnasium API ----------------------------------------------------------------------------
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        self._new_outputs()
        self._broken = True  # until all is there
        self._start_all(seed, options)
        self._broken = False
        return self._observed(), self._infos()

    def _start(self, i: int) -> None:
        episode = self.settings_of(i).episode(self._generators[i])
        sim = self.sims[i] = ClusterSim(episode.spec)
        self._kept[i] = KeepAll()
        sim.reset(episode.chunks, episode.app_tokens, self._kept[i])
        check_any_call(sim.advance(), sim)
        self._bind(i, sim)
        self._num_calls[i] = episode.num_calls
        self._returns[i], self._lengths[i] = 0.0, 0
        entry(totals_at)(self._clusters[i], self._totals[i])
        entry(look)(self._clusters[i], self._handles[i], self._calls[i], self._replicas[i], self._masks[i])

    def _bind(self, i: int, sim: ClusterSim) -> None:
        self._clusters[i], self._handles[i] = sim.record.handle, sim.handles

    def step(
        self, actions: npt.ArrayLike
    ) -> tuple[Observations, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        self._need_reset("step")
        if self._broken:
            raise RuntimeError("the last step was interrupted or failed, the episodes cannot go on; call reset()")
        chosen = all_as_integers(actions, self.num_envs, self._width, lambda: self.single_action_space)
        self._check(chosen)
        self._broken = True  # until the step is done: whatever interrupts it, the episodes cannot go on
        runs = ~self._ended
        ends = np.where(runs, cs.DECIDE, cs.ENDED)
        redirected = self._redirected
        self._new_outputs()
        self._redirected = redirected
        before, self._totals = self._totals, np.empty_like(self._totals)
        outputs = (self._calls, self._replicas, self._masks, self._totals)
        self._workers.run(entry(step_range), self._clusters, self._handles, chosen, len(self.levels), ends, outputs)
        for i in np.flatnonzero(runs & (ends != cs.DECIDE) & (ends != cs.ENDED)):
            sim = self._sim(int(i))
            ends[i] = cs.DECIDE if sim.go_on(int(ends[i])) else cs.ENDED
            self._bind(int(i), sim)
            entry(look)(self._clusters[i], self._handles[i], self._calls[i], self._replicas[i], self._masks[i])
            entry(totals_at)(self._clusters[i], self._totals[i])
        rewards = self._value(self._totals - before, runs)
        over = runs & (ends == cs.ENDED)
        cut = np.zeros(self.num_envs, dtype=np.bool_)
        for i in np.flatnonzero(over):
            self._sim(int(i)).flush()
            cut[i] = self._sim(int(i)).cut
        infos = self._begin_anew(over)
        infos.update(self._infos())
        self._broken = False
        return self._observed(), rewards, over & ~cut, cut, infos

    def _value(self, differences: npt.NDArray[np.float64], runs: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
        """(num_envs,) rewards of a step, 0 of those that kept still."""
        self._seconds = np.where(runs, differences[:, 0], 0.0)
        reward = self._settings[0].reward
        if reward is latency_reward:
            rewards = -differences[:, 1] / self._num_calls
        elif reward is throughput_reward:
            rewards = differences[:, 3].copy()
        elif reward is slo_goodput_reward:
            rewards = differences[:, 4] / self._num_calls
        else:
            rewards = np.zeros(self.num_envs)
            for i in np.flatnonzero(runs):
                value = reward(Outcome.of(int(self._num_calls[i]), differences[i]))
                rewards[i] = checks.finite("reward", value)
        rewards[~runs] = 0.0
        self._returns[runs] += rewards[runs]
        self._lengths[runs] += 1
        return rewards

    def _check(self, chosen: npt.NDArray[np.int64]) -> None:
        """Refuse actions outside their space, before anything is done, and note which calls go elsewhere."""
        inside = (chosen[:, 0] >= 0) & (chosen[:, 0] < self.num_replicas)
        if self.levels:
            inside &= (chosen[:, 1] >= 0) & (chosen[:, 1] < len(self.levels))
        wrong = np.flatnonzero(~inside & ~self._ended)
        if wrong.size:
            i = int(wrong[0])
            refuse(chosen[i], self.num_replicas, len(self.levels), f"environment {i}, ")
        rows = np.arange(self.num_envs)
        self._redirected = ~self._ended & ~self._legal[rows, np.where(inside, chosen[:, 0], 0)]

    def _sim(self, i: int) -> ClusterSim:
        sim = self.sims[i]
        assert sim is not None
        return sim

    def _last_of(self, i: int) -> dict[str, Any]:
        last = {"call": self._calls[i].copy(), "replicas": self._replicas[i].copy()}
        info = {
            "clock": float(self._totals[i, 0]),
            "seconds": float(self._seconds[i]),
            "discount": self.settings_of(i).discount(float(self._seconds[i])),
            "action_mask": self._masks[i].copy(),
            "redirected": bool(self._redirected[i]),
            "episode_return": float(self._returns[i]),
            "episode_length": int(self._lengths[i]),
            "summary": summary_of(self._sim(i), self._kept[i]),
        }
        return {"final_obs": last, "final_info": info}

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(num_envs, R + number of levels) bool."""
        self._need_reset("action_masks")
        return self._legal.copy()

    def sample_mask(self) -> Any:
        """The masks in the form that ``single_action_space.sample(mask=...)`` takes, a list with one for each environment."""
        return [split_mask(legal, self.num_replicas) for legal in self.action_masks()]

    def _observed(self) -> Observations:
        return {"call": self._calls, "replicas": self._replicas}

    def _infos(self) -> dict[str, Any]:
        self._legal = self._masks
        return {
            "clock": self._totals[:, 0].copy(),
            "seconds": self._seconds,
            "discount": np.array([self._settings[0].discount(s) for s in self._seconds.tolist()]),
            "action_mask": self._masks,
            "redirected": self._redirected,
        }

    def close_extras(self, **kwargs: Any) -> None:
        if hasattr(self, "_workers"):  # Gymnasium before 1.3 closes at last also what ``__init__`` refused
            self._workers.close()
