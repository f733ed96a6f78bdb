"""The native vector environment as a ``VecEnv`` of stable-baselines3.

What stable-baselines3 2.9.2 does with the arrays and dictionaries of a step decides what may be shared between steps
(read in its source; paths below ``stable_baselines3/common``):

* ``on_policy_algorithm.collect_rollouts`` adds the value of the terminal observation to ``rewards`` in place and keeps
  ``dones`` and the observations as the next step's inputs, so these arrays are fresh each step. It reads
  ``infos`` through ``.get`` alone; so do ``base_class._update_info_buffer`` and the replay buffers.
* ``vec_env/vec_monitor`` copies the list and the dictionaries of the environments that ended before it writes.
* ``vec_env/vec_normalize`` (like ``vec_transpose``, ``vec_extract_dict_obs`` and ``stacked_observations``) replaces
  ``terminal_observation`` in place, only in dictionaries that have one: those are fresh.
* None of them writes to the dictionary of an environment that goes on, so these are the same empty ones every step.
  Should a wrapper of the user's write to one, ``step_wait`` sees it and starts the next step with new ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from llmsched_env.autoreset import Observations
from llmsched_env.errors import ConfigError, require
from llmsched_env.vector import LLMSchedVectorEnv

require("torch", "agents")  # before stable-baselines3, whose own message would not say which extra is missing
require("stable_baselines3", "agents")

from stable_baselines3.common.monitor import Monitor  # noqa: E402
from stable_baselines3.common.vec_env import VecEnv  # noqa: E402
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn  # noqa: E402

# What `get_attr` reads from the settings of environment i.
SETTINGS = (
    "scenario",
    "rate",
    "num_requests",
    "engine",
    "layout",
    "limits",
    "codec",
    "reward",
    "reveal_output_length",
    "backlog",
    "hold",
    "hold_seconds",
    "discount_seconds",
)
_SHARED = {"observation_space": "single_observation_space", "action_space": "single_action_space"}
_FIXED = ("render_mode", "metadata", *_SHARED, *SETTINGS)


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


class SB3VecEnv(VecEnv):  # type: ignore[misc, unused-ignore]  # without stable-baselines3 the base is Any
    """``LLMSchedVectorEnv`` for stable-baselines3 (>= 2.9), equal to ``DummyVecEnv`` over as many monitored ``LLMSchedEnv``.

    ``PPO("MultiInputPolicy", SB3VecEnv(LLMSchedVectorEnv(256, rate=6.0)))``, or ``PPO("MlpPolicy", SB3VecEnv(..., flatten=True))``.

    A step returns observations, float32 rewards ``(num_envs,)``, bool dones ``(num_envs,)`` and a list of ``num_envs``
    dictionaries: empty, and shared between steps, where the episode goes on; where it ended

    * ``terminal_observation``: the last observation of the episode (the one returned is the next episode's first);
    * ``TimeLimit.truncated``: whether it was truncated rather than terminated;
    * ``episode``: ``{"r": return, "l": steps, "t": seconds since this object was built}``, as ``Monitor`` gives it.

    Action masks come from ``env_method("action_masks")``; ``reset_infos`` stays empty. Steps take different times; ``record``
    tells how long the last one was, and the buffers of ``llmsched_agents.time_aware`` discount by it::

        PPO("MlpPolicy", envs, rollout_buffer_class=TimeAwareRolloutBuffer, rollout_buffer_kwargs={"record": envs.record})

    Args:
        vector: the environments, not reset yet in another mode than SAME_STEP, which is set here.
        flatten: False: observations are dictionaries of ``(num_envs, width)`` float32 arrays (``MultiInputPolicy``).
            True: one ``(num_envs, size)`` float32 array, their concatenation in the order of the table in
            ``llmsched_env.observation`` (``MlpPolicy``).

    Raises:
        ConfigError: ``vector`` is of another class (a wrapped one included) or runs in another autoreset mode.
        MissingExtraError: on import of this module, without torch or stable-baselines3.
    """

    def __init__(self, vector: LLMSchedVectorEnv, *, flatten: bool = False) -> None:
        if not isinstance(vector, LLMSchedVectorEnv):
            raise ConfigError(f"vector: {type(vector).__name__}, must be a LLMSchedVectorEnv without wrappers")
        vector.set_autoreset_mode(AutoresetMode.SAME_STEP)  # what a VecEnv does
        self.vector = vector
        self.flatten = flatten
        self._actions: npt.NDArray[Any] | None = None
        self._no_infos: list[dict[str, Any]] = [{} for _ in range(vector.num_envs)]
        self._attributes: list[dict[str, Any]] = [{} for _ in range(vector.num_envs)]
        self._built = time.time()
        n = vector.num_envs
        settings = len(vector._specs)
        self.record = StepRecord(np.zeros(n), np.zeros(n, dtype=np.bool_), np.arange(n) % settings, np.ones(n))
        space: gym.Space[Any] = vector.single_observation_space
        if flatten:
            assert isinstance(space, gym.spaces.Dict)
            bounds = [np.concatenate([getattr(box, end) for box in space.values()]) for end in ("low", "high")]
            space = gym.spaces.Box(bounds[0], bounds[1], dtype=np.float32)
        super().__init__(vector.num_envs, space, vector.single_action_space)

    # --- stepping ---------------------------------------------------------------------------------
    def reset(self) -> VecEnvObs:
        observed, _ = self.vector.reset(seed=self._seeds)
        self._reset_seeds()  # seeds count for one reset
        self._actions = None
        return self._shaped(observed)

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        if self._actions is None:
            raise gym.error.ResetNeeded("call step_async() before step_wait()")
        actions, self._actions = self._actions, None
        observed, rewards, terminated, truncated, last = self.vector.step(actions)
        if any(self._no_infos):  # a wrapper wrote to one: its entry must not outlive its step
            self._no_infos = [{} for _ in range(self.num_envs)]
        infos = self._no_infos
        dones = terminated | truncated
        self.record.durations[:] = last["seconds"] / self.record.time_scale
        self.record.truncated[:] = truncated
        if dones.any():
            infos = infos.copy()
            seconds = round(time.time() - self._built, 6)
            returns, lengths = last["final_info"]["episode_return"], last["final_info"]["episode_length"]
            for i in np.flatnonzero(dones):
                infos[i] = {
                    "terminal_observation": self._shaped(last["final_obs"][i]),
                    "TimeLimit.truncated": bool(truncated[i] and not terminated[i]),
                    "episode": {"r": round(float(returns[i]), 6), "l": int(lengths[i]), "t": seconds},
                }
        return self._shaped(observed), rewards.astype(np.float32), dones, infos

    def _shaped(self, observed: Observations) -> VecEnvObs:
        """Of all environments or of one: its arrays differ in the last axis."""
        return np.concatenate(list(observed.values()), axis=-1) if self.flatten else observed

    def close(self) -> None:
        self.vector.close()

    # --- single environments ----------------------------------------------------------------------
    def _chosen(self, indices: VecEnvIndices) -> list[int]:
        everyone = range(self.num_envs)
        return [everyone[i] for i in self._get_indices(indices)]

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """A setting of the environments (``SETTINGS``), what ``set_attr`` stored, or the method ``action_masks``.

        Raises:
            AttributeError: any other name.
        """
        chosen = self._chosen(indices)
        if attr_name == "action_masks":
            return [partial(self._action_mask, i) for i in chosen]
        if attr_name in SETTINGS:
            return [getattr(self.vector.spec_of(i), attr_name) for i in chosen]
        if attr_name in _FIXED:
            return [getattr(self.vector, _SHARED.get(attr_name, attr_name)) for _ in chosen]
        missing = [i for i in chosen if attr_name not in self._attributes[i]]
        if missing:
            raise AttributeError(f"{attr_name}: no attribute of environment {missing[0]} (settings: {', '.join(_FIXED)})")
        return [self._attributes[i][attr_name] for i in chosen]

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Store a label for ``get_attr``; the environments do not see it.

        Raises:
            AttributeError: the name of an attribute of the environment: these are fixed when it is built.
        """
        chosen = self._chosen(indices)
        if attr_name in _FIXED:
            raise AttributeError(f"{attr_name}: fixed when the environment is built, pass it to LLMSchedVectorEnv")
        for i in chosen:
            self._attributes[i][attr_name] = value

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[npt.NDArray[np.bool_]]:
        """``action_masks``: for each environment its ``(2 Q + (max_admit + 1) Q,)`` bool array.

        Raises:
            AttributeError: another method; the environments share their state and have no methods of their own.
        """
        if method_name != "action_masks":
            raise AttributeError(f"{method_name}: no method of one environment in a vector (there is action_masks)")
        if method_args or method_kwargs:
            raise TypeError("action_masks takes no arguments")
        masks = self.vector.action_masks()
        return [masks[i] for i in self._chosen(indices)]

    def _action_mask(self, i: int) -> npt.NDArray[np.bool_]:
        mask: npt.NDArray[np.bool_] = self.vector.action_masks()[i]
        return mask

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None) -> list[bool]:
        """True for ``Monitor``: stable-baselines3 asks to learn whether ``infos`` carry ``episode``, which they do."""
        return [wrapper_class is Monitor for _ in self._chosen(indices)]

    def set_options(self, options: list[dict[str, Any]] | dict[str, Any] | None = None) -> None:
        """Refused unless empty: the vector environment takes no options at reset.

        Raises:
            ConfigError: options given.
        """
        for given in [options] if isinstance(options, dict) else options or []:
            if given:
                raise ConfigError(f"options: {sorted(given)} unknown (a vector environment takes none)")

    def get_images(self) -> Sequence[npt.NDArray[Any] | None]:
        """None for each environment: a vector environment does not render."""
        return [None] * self.num_envs
