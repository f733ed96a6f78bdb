"""Many engines stepped in one compiled call: the native vector environment."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numba
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from llmsched_env.engine import state as st
from llmsched_env.engine.arrays import check_served, engine_settings
from llmsched_env.engine.batch import reset_one, step_all
from llmsched_env.env import LLMSchedEnv, draw_backlog
from llmsched_env.errors import ConfigError
from llmsched_env.observation import ObservationLayout
from llmsched_env.perf.batch import BATCH_FIELDS
from llmsched_env.reward import Reward, compiled_reward, make_reward

_CHOSEN = threading.local()  # as numba keeps it: one setting for each Python thread

Observations = dict[str, npt.NDArray[np.float32]]


class LLMSchedVectorEnv(gym.vector.VectorEnv[Observations, npt.NDArray[np.int64], npt.NDArray[Any]]):
    """``num_envs`` independent ``LLMSchedEnv`` over the same kernel, equal to them step by step.

    ``gym.make_vec("llmsched_env:LLMSched-v0", num_envs=256, scenario="azure-conv", rate=6.0)``. Spaces,
    observations, masks and rewards are those of ``LLMSchedEnv``; environment i is seeded with ``seed + i``.

    Args:
        num_envs: number of engines.
        scenario, rate, engine: as for ``LLMSchedEnv``, or a sequence of them, environment i taking entry
            i modulo its length (domain randomisation across environments). All must have the same
            number of classes and segments.
        threads: threads of the compiled loop; None leaves numba's setting.
        autoreset_mode: ``SAME_STEP`` (the observation after an end is the next episode's, the last one is
            in ``infos["final_obs"]``) or ``NEXT_STEP``.
        kwargs: the other arguments of ``LLMSchedEnv``; ``reward`` must be a built-in one, ``backend`` ``sim``.

    Raises:
        ConfigError: an argument refused, or environments of different shape.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - gymnasium's form

    def __init__(
        self,
        num_envs: int = 1,
        *,
        scenario: Any = "azure-conv",
        rate: float | Sequence[float] | None = None,
        engine: Any = None,
        reward: str | Mapping[str, Any] | Reward = "latency",
        threads: int | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        max_episode_steps: int | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(num_envs, bool) or not isinstance(num_envs, int | np.integer) or num_envs < 1:
            raise ConfigError(f"num_envs: {num_envs!r}, must be an integer >= 1")
        if render_mode is not None:
            raise ConfigError(f"render_mode: {render_mode!r}, must be None in a vector environment")
        if kwargs.get("backend", "sim") != "sim":
            raise ConfigError(f"backend: {kwargs['backend']!r}, must be 'sim' in a vector environment")
        if threads is not None and not 1 <= threads <= numba.config.NUMBA_NUM_THREADS:
            raise ConfigError(f"threads: {threads}, must be from 1 to {numba.config.NUMBA_NUM_THREADS}")
        mode = AutoresetMode(autoreset_mode)
        if mode not in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
            raise ConfigError(f"autoreset_mode: {mode}, must be SAME_STEP or NEXT_STEP")
        self.metadata = {**self.metadata, "autoreset_mode": mode}
        self._same_step = mode == AutoresetMode.SAME_STEP
        self._threads = threads or 0
        self.num_envs = int(num_envs)
        code = compiled_reward(make_reward(reward))
        if code is None:
            raise ConfigError(f"reward: {reward!r}, must be a built-in one in a vector environment (latency, throughput, slo_goodput)")
        self._reward_code = code
        if max_episode_steps is not None:
            kwargs["max_iterations"] = min(max_episode_steps, kwargs.get("max_iterations", max_episode_steps))
        self._templates = self._make_templates(scenario, rate, engine, reward, kwargs)
        first = self._templates[0]
        self.single_observation_space = first.observation_space
        self.single_action_space = first.action_space
        self.observation_space = batch_space(first.observation_space, self.num_envs)
        self.action_space = batch_space(first.action_space, self.num_envs)
        self._allocate(first)
        self._generators: list[np.random.Generator] = []

    def _make_templates(self, scenario: Any, rate: Any, engine: Any, reward: Any, kwargs: dict[str, Any]) -> list[LLMSchedEnv]:
        """One scalar environment for each different setting; environment i uses number i modulo their count."""
        scenarios, rates, engines = (_listed(x) for x in (scenario, rate, engine))
        count = min(math.lcm(len(scenarios), len(rates), len(engines)), self.num_envs)
        made = [
            LLMSchedEnv(
                scenarios[i % len(scenarios)], rate=rates[i % len(rates)], engine=engines[i % len(engines)], reward=reward, **kwargs
            )
            for i in range(count)
        ]
        for name, shape in (
            ("layout", lambda e: (e.layout.num_classes, e.layout.num_segments)),
            ("num_requests", lambda e: e.num_requests),
        ):
            shapes = {shape(e) for e in made}
            if len(shapes) > 1:
                raise ConfigError(f"{name}: {sorted(shapes)} among the environments, must be the same in all")
        return made

    def template(self, i: int) -> LLMSchedEnv:
        """The scalar environment with the settings of environment i (scenario, rate, engine, layout, codec); never stepped."""
        return self._templates[i % len(self._templates)]

    def _allocate(self, first: LLMSchedEnv) -> None:
        e, n, q = self.num_envs, first.num_requests, first.layout.num_queues
        engines = [t.engine for t in self._templates]
        slots = max(n if g.preset == "paper" else min(n, g.max_num_seqs) for g in engines)
        packed = [g.time_model.pack() for g in engines]
        width = max(p.size for p in packed)
        self._models = np.zeros((e, width))
        self._settings = np.zeros((e, st.C_ROWS + first.layout.num_classes), dtype=np.int64)
        self._ends = np.full((e, max(first.layout.num_segments - 1, 1)), st.NO_END, dtype=np.int32)
        self._contexts = np.zeros((e, max(t.context.size for t in self._templates)))
        for i in range(e):
            t = self.template(i)
            p = packed[i % len(packed)]
            self._models[i, : p.size] = p
            self._settings[i] = engine_settings(t.engine, t.layout, t.limits, False)
            if t.layout.segment_ends:
                self._ends[i] = t.layout.segment_ends
            self._contexts[i, : t.context.size] = t.context
        self._decisions = np.zeros((e, 3, q), dtype=np.int32)
        self._requests = np.zeros((e, st.R_ROWS, n), dtype=np.int32)
        self._times = np.zeros((e, st.T_ROWS, n))
        self._slots = np.zeros((e, st.S_ROWS, slots), dtype=np.int32)
        self._queues = np.zeros((e, st.Q_ROWS, q), dtype=np.int32)
        self._queue_f = np.zeros((e, st.QF_ROWS, q))
        self._scalars = np.zeros((e, st.I_ROWS), dtype=np.int64)
        self._clocks = np.zeros((e, st.F_ROWS))
        self._batches = np.zeros((e, BATCH_FIELDS))
        self._events = np.zeros((e, 3, slots), dtype=np.int32)
        self._trace = np.zeros((e, 2, 1), dtype=np.int32)
        layout = ObservationLayout.of(first.layout)
        self._where = layout.slices()
        self._codec, self._levels = first.codec, first.codec.levels
        self._observation_size = layout.size
        self._new_outputs()
        self._ended = np.zeros(e, dtype=np.bool_)
        self._any_ended = False
        self._returns = np.zeros(e)
        self._lengths = np.zeros(e, dtype=np.int64)

    def _new_outputs(self) -> None:
        """Arrays that one call returns: fresh ones, written by the compiled loop, so that nothing need be copied."""
        e = self.num_envs
        self._observations = np.empty((e, self._observation_size), dtype=np.float32)
        self._masks = np.empty((e, self._codec.mask_size), dtype=np.bool_)
        self._rewards = np.empty(e)
        self._terminated = np.empty(e, dtype=np.bool_)
        self._truncated = np.empty(e, dtype=np.bool_)

    @property
    def nbytes(self) -> int:
        """Memory of all engines' arrays."""
        return sum(a.nbytes for a in vars(self).values() if isinstance(a, np.ndarray))

    # --- Gymnasium API ----------------------------------------------------------------------------
    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observations, dict[str, Any]]:
        if options:
            raise ConfigError(f"options: {sorted(options)} unknown (a vector environment takes none)")
        if seed is not None or not self._generators:
            base = [None if seed is None else seed + i for i in range(self.num_envs)] if not isinstance(seed, Sequence) else list(seed)
            if len(base) != self.num_envs:
                raise ConfigError(f"seed: {len(base)} seeds for {self.num_envs} environments")
            kept: Sequence[np.random.Generator | None] = self._generators or [None] * self.num_envs
            pairs = zip(base, kept, strict=True)
            self._generators = [old if s is None and old is not None else seeding.np_random(s)[0] for s, old in pairs]
        self._new_outputs()
        for i in range(self.num_envs):
            self._start(i)
        self._ended[:] = False
        self._any_ended = False
        return self._observed(), self._infos()

    def _start(self, i: int) -> None:
        """The next episode of environment i: its requests into the arrays, and the first observation."""
        t = self.template(i)
        seed = int(self._generators[i].integers(2**63))
        workload = t.scenario.generate(seed, rate=t.rate, num_requests=t.num_requests)
        workload = workload.with_backlog(draw_backlog(t.backlog, self._generators[i]))
        check_served(workload, t.engine)
        requests, times = self._requests[i], self._times[i]
        requests[:] = 0
        requests[st.R_PROMPT], requests[st.R_OUTPUT] = workload.prompt_tokens, workload.output_tokens
        requests[st.R_CLASS] = t.layout.classify(workload.prompt_tokens, workload.output_tokens, workload.type_id)
        times[:] = np.nan
        times[st.T_ARRIVAL] = workload.arrival
        self._clocks[i, st.F_HORIZON] = t.limits.horizon
        self._clocks[i, st.F_LATE_AFTER] = t.engine.late_after
        self._returns[i] = 0.0
        self._lengths[i] = 0
        reset_one(
            self._codec.kind,
            self._levels,
            self._settings[i],
            requests,
            times,
            self._queues[i],
            self._queue_f[i],
            self._scalars[i],
            self._clocks[i],
            self._contexts[i],
            self._observations[i],
            self._masks[i],
        )

    def step(
        self, actions: npt.ArrayLike
    ) -> tuple[Observations, npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.bool_], dict[str, Any]]:
        if not self._generators:
            raise gym.error.ResetNeeded("call reset() before step()")
        chosen = np.ascontiguousarray(actions, dtype=np.int64)
        if chosen.shape != self.action_space.shape:
            raise ConfigError(f"actions: shape {chosen.shape}, must be {self.action_space.shape}")
        self._new_outputs()
        if self._threads:
            _use_threads(self._threads)
        ends = step_all(
            chosen.reshape(self.num_envs, self._codec.width),
            self._codec.kind,
            self._levels,
            *self._reward_code,
            self._decisions,
            self._models,
            self._settings,
            self._ends,
            self._requests,
            self._times,
            self._slots,
            self._queues,
            self._queue_f,
            self._scalars,
            self._clocks,
            self._batches,
            self._events,
            self._trace,
            self._contexts,
            self._observations,
            self._masks,
            self._rewards,
            self._terminated,
            self._truncated,
            self._returns,
            self._lengths,
        )
        infos: dict[str, Any] = {}
        if not self._same_step and self._any_ended:
            for i in np.flatnonzero(self._ended):  # NEXT_STEP: this step was the reset, its action was ignored
                self._start(int(i))
                self._ended[i] = False
        self._any_ended = ends > 0
        for i in np.flatnonzero(self._terminated | self._truncated) if ends else ():
            infos = self._add_info(infos, {"episode": {"r": self._returns[i], "l": int(self._lengths[i])}}, int(i))
            if self._same_step:
                last = {name: self._observations[i, where].copy() for name, where in self._where}
                final = {"clock": float(self._clocks[i, st.F_CLOCK]), "action_mask": self._masks[i].copy()}
                infos = self._add_info(infos, {"final_obs": last, "final_info": final}, int(i))
                self._start(int(i))
            else:
                self._ended[i] = True
        infos.update(self._infos())
        return self._observed(), self._rewards, self._terminated, self._truncated, infos

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(num_envs, size of the mask of ``llmsched_env.action``) bool."""
        return self._masks.copy()

    def _observed(self) -> Observations:
        return {name: self._observations[:, where] for name, where in self._where}

    def _infos(self) -> dict[str, Any]:
        return {"clock": self._clocks[:, st.F_CLOCK].copy(), "action_mask": self._masks}

    def close_extras(self, **kwargs: Any) -> None:
        for template in self._templates:
            template.close()


def _use_threads(count: int) -> None:
    """numba's thread count, set only where it changes: asking numba takes as long as ten engines' steps."""
    if getattr(_CHOSEN, "threads", None) != count:
        numba.set_num_threads(count)
        _CHOSEN.threads = count


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]
