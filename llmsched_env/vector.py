"""Many engines stepped in one compiled call: the native vector environment."""

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
from llmsched_env.action import link_codec
from llmsched_env.autoreset import AutoresetVectorEnv, Observations
from llmsched_env.compiled import entry
from llmsched_env.engine.fleet import Fleet
from llmsched_env.engine.state import END_FINISHED, END_STUCK, RUNNING
from llmsched_env.engine.step import step_at
from llmsched_env.env import StepOutcome
from llmsched_env.env_step import EnvRecord, env_decode, env_look, env_reset, first_illegal, step_range
from llmsched_env.errors import ConfigError
from llmsched_env.observation import ObservationLayout
from llmsched_env.records import Numbers
from llmsched_env.reward import compiled_reward
from llmsched_env.spec import DEFAULT_SCENARIO, EnvSpec
from llmsched_env.threads import Workers
from llmsched_env.types import Decision


class LLMSchedVectorEnv(AutoresetVectorEnv):
    """``num_envs`` independent ``LLMSchedEnv`` over the same kernel, equal to them step by step.

    ``gym.make_vec("llmsched_env:LLMSched-v1", num_envs=256, scenario="azure-conv", rate=6.0)``. Spaces,
    observations, masks and rewards are those of ``LLMSchedEnv``; environment i is seeded with ``seed + i``.

    Args:
        num_envs: number of engines.
        scenario, rate, engine: as for ``LLMSchedEnv``, or a sequence of them, environment i taking entry
            i modulo its length (domain randomisation across environments). All must have the same
            number of classes and segments.
        threads: threads of the compiled loop; None for as many processors as the process may use (``OMP_NUM_THREADS``
            counts), each with at least 64 environments.
        autoreset_mode: ``NEXT_STEP``, Gymnasium's default (the step after an end is a reset, its action is ignored), or
            ``SAME_STEP`` (the observation after an end is the next episode's, the last one is in ``infos["final_obs"]``).
            Gymnasium's vector wrappers of observations take ``NEXT_STEP`` alone.
        kwargs: the other arguments of ``LLMSchedEnv``; ``backend`` must be ``sim`` or ``sim-prefix-cache``. A reward that is
            an ordinary Python callable is called once for each environment and step; a compiled one
            (``llmsched_env.reward.CompiledReward``) costs nothing beside.

    Raises:
        ConfigError: an argument refused, or environments of different shape.
    """

    def __init__(
        self,
        num_envs: int = 1,
        *,
        scenario: Any = DEFAULT_SCENARIO,
        rate: float | Sequence[float] | None = None,
        engine: Any = None,
        threads: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        **kwargs: Any,
    ) -> None:
        backend = kwargs.pop("backend", "sim")
        if backend not in ("sim", "sim-prefix-cache"):
            raise ConfigError(f"backend: {backend!r}, must be 'sim' or 'sim-prefix-cache' in a vector environment")
        if kwargs.pop("backend_config", None):
            raise ConfigError("backend_config: takes nothing in a vector environment, must be empty")
        self._set_up(num_envs, autoreset_mode, render_mode)
        self._workers = Workers(self.num_envs, threads)
        max_episode_steps = kwargs.pop("max_episode_steps", None)  # Gymnasium's name
        if max_episode_steps is not None:
            self._limit_steps(max_episode_steps, kwargs)
        self._specs = self._make_specs(scenario, rate, engine, kwargs, backend == "sim-prefix-cache")
        first = self._specs[0]
        self.codec = first.codec
        observation = ObservationLayout.of(first.layout)
        self._where, self._observation_size = observation.slices(), observation.size
        self.single_observation_space = observation.space()
        self.single_action_space = self.codec.space()
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.fleet = Fleet(self.num_envs, self._specs)
        self._make_records()
        self._new_outputs()

    @staticmethod
    def _limit_steps(steps: int, kwargs: dict[str, Any]) -> None:
        """``max_episode_steps`` as a limit on iterations."""
        spec = EnvSpec.of(**{name: kwargs[name] for name in ("action_set", "hold", "hold_seconds") if name in kwargs})
        if spec.hold_seconds > 0.0:
            raise ConfigError(f"max_episode_steps: {steps}, must be None with hold_seconds={spec.hold_seconds:g}; use horizon, in seconds")
        hold = spec.hold
        kwargs["max_iterations"] = min(steps * hold, kwargs.get("max_iterations", steps * hold))

    def _make_specs(self, scenario: Any, rate: Any, engine: Any, kwargs: dict[str, Any], caching: bool) -> list[EnvSpec]:
        """Each different setting once; environment i has number i modulo their count."""
        scenarios, rates, engines = _listed("scenario", scenario), _listed("rate", rate), _listed("engine", engine)
        count = min(math.lcm(len(scenarios), len(rates), len(engines)), self.num_envs)
        made = [
            EnvSpec.of(scenarios[i % len(scenarios)], rate=rates[i % len(rates)], engine=engines[i % len(engines)], **kwargs)
            for i in range(count)
        ]
        if caching:
            made = [spec.replace(engine=spec.engine.replace(enable_prefix_caching=True)) for spec in made]
        for name, shape in (
            ("layout", lambda spec: (spec.layout.num_classes, spec.layout.num_segments, spec.layout.by == "predicted")),
            ("num_requests", lambda spec: spec.num_requests),
        ):
            shapes = {shape(spec) for spec in made}
            if len(shapes) > 1:
                raise ConfigError(f"{name}: {sorted(shapes)} among the environments, must be the same in all")
        return made

    def spec_of(self, i: int) -> EnvSpec:
        """The settings of environment i."""
        return self._specs[i % len(self._specs)]

    def _make_records(self) -> None:
        """What every environment keeps beside its engine."""
        known = [(spec.forecast(), spec.peak_tables()) for spec in self._specs]
        self._compiled_reward = compiled_reward(self._specs[0].reward)
        reward = self._compiled_reward
        self._envs = [
            EnvRecord(
                codec=self.spec_of(i).codec_record(*known[i % len(known)]),
                reward_numbers=Numbers.of() if reward is None else reward.own_numbers(),
            )
            for i in range(self.num_envs)
        ]
        for i, env in enumerate(self._envs):
            spec = self.spec_of(i)
            env.hold, env.hold_seconds, env.discount_seconds = spec.hold, spec.hold_seconds, spec.discount_seconds
        self._discount_seconds = self._specs[0].discount_seconds
        self._decisions = [Decision(self.spec_of(i).layout.num_queues) for i in range(self.num_envs)]
        self._bind()

    def _bind(self) -> None:
        """(num_envs, 3) handles of engine, environment and decision; good in this process only."""
        self._handles = np.empty((self.num_envs, 3), dtype=object if numba.config.DISABLE_JIT else np.int64)
        for i, (engine, env, decision) in enumerate(zip(self.fleet.records, self._envs, self._decisions, strict=True)):
            link_codec(env.codec)
            env.reward = 0 if self._compiled_reward is None else self._compiled_reward.address
            self._handles[i] = engine.handle, env.handle, decision.handle

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_handles"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._bind()

    def _new_outputs(self) -> None:
        """Arrays that one call returns: fresh ones, written by the compiled loop, so that nothing need be copied."""
        e = self.num_envs
        self._observations = np.empty((e, self._observation_size), dtype=np.float32)
        self._masks = np.empty((e, self.codec.mask_size), dtype=np.bool_)
        self._rewards = np.empty(e)
        self._seconds = np.zeros(e)
        self._ends = np.empty(e, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Memory of all engines."""
        return self.fleet.nbytes + sum(a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray))

    # --- Gymnasium API ----------------------------------------------------------------------------
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        self._new_outputs()
        self._start_all(seed, options)
        return self._observed(), self._infos()

    def _start(self, i: int) -> None:
        """The next episode of environment i: its requests into its engine, and the first observation."""
        self.fleet.load(i, self.spec_of(i).workload(self._generators[i]))
        env_reset(self._handles[i, 0], self._handles[i, 1], self._observations[i], self._masks[i])

    def step(
        self, actions: npt.ArrayLike
    ) -> tuple[Observations, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        self._need_reset("step")
        chosen = self.codec.as_integers_of(actions, self.num_envs)
        wrong = entry(first_illegal)(self._handles[0, 1], chosen)
        if wrong >= 0:
            self.codec.refuse(chosen[wrong], f"environment {wrong}, ")
        self._new_outputs()
        outputs = (self._observations, self._masks, self._rewards, self._seconds, self._ends)
        if self._compiled_reward is None:
            count = self._step_by_iteration(chosen)
        else:
            count = sum(self._workers.run(entry(step_range), self._handles, chosen, *outputs))
        terminated, truncated = self._ends == END_FINISHED, self._ends > END_FINISHED
        if count and (self._ends == END_STUCK).any():
            stuck = int(np.flatnonzero(self._ends == END_STUCK)[0])
            raise RuntimeError(f"environment {stuck}: the engine can schedule nothing at {self.fleet.records[stuck].clock:.6f} s")
        infos = self._begin_anew(self._ends != RUNNING)
        infos.update(self._infos())
        return self._observed(), self._rewards, terminated, truncated, infos

    def _last_of(self, i: int) -> dict[str, Any]:
        last = {name: self._observations[i, where].copy() for name, where in self._where}
        return {"final_obs": last, "final_info": self._final_info(i)}

    def _final_info(self, i: int) -> dict[str, Any]:
        """Of the last step of environment i: ``episode_return`` and ``episode_length`` (decisions) of its episode besides."""
        env = self._envs[i]
        return {
            "clock": self.fleet.records[i].clock,
            "seconds": float(self._seconds[i]),
            "discount": float(self._discounts()[i]),
            "action_mask": self._masks[i].copy(),
            "episode_return": env.episode_return,
            "episode_length": env.episode_length,
        }

    def _step_by_iteration(self, chosen: npt.NDArray[np.int64]) -> int:
        """``step_range`` with an ordinary callable as reward, environment by environment. Returns how many episodes ended."""
        ended = 0
        self._rewards[:], self._ends[:] = 0.0, RUNNING
        for i in range(self.num_envs):
            record, env, spec = self.fleet.records[i], self._envs[i], self.spec_of(i)
            start, count = record.clock, 0
            outcome = StepOutcome(record)
            while not self._ended[i]:
                elapsed = record.clock - start
                engine, own, decision = self._handles[i]
                env_decode(engine, own, decision, chosen[i])
                step_at(engine, decision)
                value = checks.number("reward", spec.reward(outcome), low=-math.inf, high=math.inf)
                self._rewards[i] += value * math.exp(-elapsed / spec.discount_seconds)
                count += 1
                if record.end != RUNNING or (count >= spec.hold and record.clock - start >= spec.hold_seconds):
                    break
            if not self._ended[i]:
                env.episode_return += self._rewards[i]
                env.episode_length += 1
                self._seconds[i], self._ends[i] = record.clock - start, record.end
                ended += record.end != RUNNING
            env_look(self._handles[i, 0], self._handles[i, 1], self._observations[i], self._masks[i])
        return ended

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(num_envs, size of the mask of ``llmsched_env.action``) bool."""
        self._need_reset("action_masks")
        return self._masks.copy()

    def sample_mask(self) -> Any:
        """The masks in the form that ``single_action_space.sample(mask=...)`` takes, a list with one for each environment."""
        return [self.codec.sample_mask(legal) for legal in self.action_masks()]

    def _observed(self) -> Observations:
        return {name: self._observations[:, where] for name, where in self._where}

    def _discounts(self) -> npt.NDArray[np.float64]:
        """(num_envs,) factors of what follows the step, each as the scalar environment computes it, to the last bit."""
        if self._discount_seconds == math.inf:
            return np.ones(self.num_envs)
        return np.array([math.exp(-seconds / self._discount_seconds) for seconds in self._seconds.tolist()])

    def _infos(self) -> dict[str, Any]:
        return {
            "clock": self.fleet.clocks.copy(),
            "seconds": self._seconds,
            "discount": self._discounts(),
            "action_mask": self._masks,
        }

    def close_extras(self, **kwargs: Any) -> None:
        if hasattr(self, "_workers"):  # Gymnasium before 1.3 closes at last also what ``__init__`` refused
            self._workers.close()


def _listed(name: str, value: Any) -> list[Any]:
    """The values that the environments take in turn."""
    values = list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
    if not values:
        raise ConfigError(f"{name}: [], must be one value or a list of at least one")
    return values
