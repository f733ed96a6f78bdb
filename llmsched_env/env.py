"""The environment: an LLM serving engine whose admission decisions are the actions."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast

import gymnasium as gym
import numba
import numpy as np
import numpy.typing as npt

from llmsched_env.action import THETAS, ActionCodec, decode, make_codec, mask
from llmsched_env.backend import Backend, View, make_backend
from llmsched_env.compiled import compiled
from llmsched_env.engine import state as st
from llmsched_env.engine.array_table import ArrayTable
from llmsched_env.engine.backend import SimBackend
from llmsched_env.engine.batch import step_from
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import summarize
from llmsched_env.observation import ObservationLayout, encode, static_context
from llmsched_env.perf import LinearTime, load_calibration
from llmsched_env.reward import FinishedRequests, Reward, compiled_reward, make_reward
from llmsched_env.types import ClassBy, Decision, EngineConfig, EpisodeLimits, QueueLayout, Workload
from llmsched_env.workload import Scenario, load_scenario, scenario_from_trace

Observation = dict[str, npt.NDArray[np.float32]]


def engine_with(base: EngineConfig, changes: Mapping[str, Any] | EngineConfig | None) -> EngineConfig:
    """``base`` with plain-value changes; ``d0``, ``d1`` set a linear time model, ``time_model`` loads a calibration by name.

    Raises:
        ConfigError: unknown field, or a value the engine refuses.
    """
    if changes is None:
        return base
    if isinstance(changes, EngineConfig):
        return changes
    fields = dict(changes)
    if isinstance(fields.get("time_model"), str):
        fields["time_model"] = load_calibration(fields["time_model"])
    if "d0" in fields or "d1" in fields:
        model = fields.get("time_model", base.time_model)
        known = {"d0": model.d0, "d1": model.d1} if isinstance(model, LinearTime) else {}
        known.update({k: float(fields.pop(k)) for k in ("d0", "d1") if k in fields})
        missing = [k for k in ("d0", "d1") if k not in known]
        if missing:
            raise ConfigError(f"engine.{missing[0]}: missing, a linear time model needs d0 and d1")
        fields["time_model"] = LinearTime(known["d0"], known["d1"])
    allowed = EngineConfig.__dataclass_fields__
    for name in fields:
        if name not in allowed:
            raise ConfigError(f"engine.{name}: unknown field (allowed: {', '.join(allowed)}, d0, d1)")
    return base.replace(**fields)


@compiled
def observe(settings, context, queues, queue_f, scalars, clocks, action_kind, levels, observation, legal):  # type: ignore[no-untyped-def]
    """Observation and mask in one call."""
    encode(settings, context, queues, queue_f, scalars, clocks, observation)
    mask(action_kind, levels, queues, legal)


def draw_backlog(backlog: tuple[int, int], rng: np.random.Generator) -> int:
    """Requests at time 0; nothing is drawn where there is no choice."""
    low, high = backlog
    return low if low == high else int(rng.integers(low, high + 1))


class StepOutcome:
    """``llmsched_env.reward.Outcome`` read from the backend's arrays."""

    __slots__ = ("_backend", "num_requests")

    def __init__(self, backend: Backend, num_requests: int) -> None:
        self._backend = backend
        self.num_requests = num_requests

    @property
    def duration(self) -> float:
        return float(self._backend.clocks[st.F_DURATION])

    @property
    def system_seconds(self) -> float:
        return float(self._backend.clocks[st.F_STEP_SYSTEM_SECONDS])

    @property
    def completed(self) -> int:
        return int(self._backend.scalars[st.I_COMPLETED])

    @property
    def completed_tokens(self) -> int:
        return int(self._backend.scalars[st.I_COMPLETED_TOKENS])

    @property
    def generated_tokens(self) -> int:
        return int(self._backend.scalars[st.I_GENERATED_TOKENS])

    @property
    def evictions(self) -> int:
        return int(self._backend.scalars[st.I_STEP_EVICTED] + self._backend.scalars[st.I_STEP_PREEMPTED])

    def finished(self) -> FinishedRequests:
        ids = self._backend.events[2, : self.completed].copy()
        times = self._backend.times[:, ids]
        return FinishedRequests(
            id=ids,
            output_tokens=self._backend.requests[st.R_OUTPUT, ids],
            ttft=times[st.T_FIRST_TOKEN] - times[st.T_ARRIVAL],
            latency=times[st.T_COMPLETED] - times[st.T_ARRIVAL],
        )


class LLMSchedEnv(gym.Env[Observation, npt.NDArray[np.int64]]):
    """LLM inference scheduling on one GPU.

    ## Description
    Requests with a prompt and an unknown number of output tokens arrive at a serving engine that runs
    iterations of continuous batching. KV memory is limited: every resident grows by one token per
    iteration, and when memory runs out the engine evicts. One step of the environment is one engine
    iteration (or, when the action schedules nothing, a jump to the next arrival): the agent says which
    segments of residents advance and how many requests enter each segment. Waiting is legal.

    Requests stand in Q = J * K queues: J classes (known at arrival), K segments of decode length.
    Queue (j, 0) is the outside queue of class j; queue (j, k) holds requests that have generated
    ``segment_ends[k-1]`` tokens, their KV kept, until they are admitted to segment k.

    ## Action Space
    ``MultiDiscrete([2] * Q + [max_admit + 1] * Q)``, queue q = j * K + k:

    | component | values | meaning |
    | --- | --- | --- |
    | q | 0, 1 | residents of segment q: 0 held with their KV, 1 advance by one iteration |
    | Q + q | 0 .. max_admit | requests that enter segment q from its queue, oldest first; max_admit = as many as fit |

    The engine does what its token budget, sequence cap and KV memory allow. Requests admitted in an
    iteration advance in it. ``action_masks()`` and ``info["action_mask"]`` give the legal values.
    With ``action_set="reserve"`` the action is a ``Discrete`` choice of how far admission may
    over-commit KV memory (``llmsched_env.action``).

    ## Observation Space
    A ``Dict`` of float32 arrays in [0, 1]; the table is in ``llmsched_env.observation``.

    ## Rewards
    ``latency`` (default): minus the number in system integrated over the step, divided by the number
    of requests of the episode, in seconds: the return is minus the mean latency (Little's law).
    ``throughput``: output tokens of requests completed in the step. ``slo_goodput``: share of the
    episode's requests completed within the TTFT and TPOT limits. Or any callable, see ``llmsched_env.reward``.

    ## Starting State
    An empty engine at time 0. The requests of the episode are drawn from the scenario with the
    environment's random generator.

    ## Episode End
    Terminated when every request has completed. Truncated at ``horizon`` seconds, at
    ``max_iterations``, or, with ``drain=False``, when no arrival is left and the action schedules
    nothing. With ``drain=True`` such an action is replaced by one greedy iteration instead, so that
    every finite episode completes.

    ## Arguments
    | argument | default | meaning |
    | --- | --- | --- |
    | scenario | "azure-conv" | a name of ``llmsched_env.workload.scenario_names()`` or a ``Scenario`` |
    | trace | None | a trace file to replay instead of a scenario |
    | rate | scenario's | mean arrival rate, requests/s |
    | num_requests | scenario's | requests per episode |
    | engine | scenario's | dict of ``EngineConfig`` fields to change (also ``d0``, ``d1``), or an ``EngineConfig`` |
    | class_by, class_edges | scenario's | ``single``, ``type``, ``prompt`` or ``output`` classes and their upper edges |
    | segment_ends | scenario's | decode lengths that end segments |
    | reveal_output_length | False (True in LLMSchedKnown-v0) | classes by output length and per-request lengths in the view |
    | action_set | "admit" | the actions above, or "reserve" |
    | max_admit | 16 | largest admit count |
    | thetas | ``action.THETAS`` | over-commitments of "reserve" |
    | backlog | 0 | requests waiting at time 0, taken from the front of the episode: a number, or (low, high) to draw it |
    | reward | "latency" | name, ``{"name": ..., arguments}`` or callable |
    | horizon, drain, max_iterations | inf, True, 1,000,000 | see Episode End |
    | backend, backend_config | "sim", {} | "sim", "sim-prefix-cache", "vllm-scheduler" or "vllm" (a real engine), and its arguments |
    | render_mode | None | "rgb_array" or "human" (needs the ``plots`` extra) |

    ``reset(options={"rate": ..., "num_requests": ..., "workload": Workload})`` changes one episode.

    ## Version History
    * v0: first version; scheduler rules of vLLM 0.28.0.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 30}  # noqa: RUF012 - gymnasium's form

    def __init__(
        self,
        scenario: str | Scenario = "azure-conv",
        *,
        trace: str | None = None,
        rate: float | None = None,
        num_requests: int | None = None,
        engine: Mapping[str, Any] | EngineConfig | None = None,
        class_by: ClassBy | None = None,
        class_edges: Sequence[int] = (),
        segment_ends: Sequence[int] | None = None,
        reveal_output_length: bool = False,
        action_set: str = "admit",
        max_admit: int = 16,
        thetas: Sequence[float] = THETAS,
        backlog: int | tuple[int, int] = 0,
        reward: str | Mapping[str, Any] | Reward = "latency",
        horizon: float = math.inf,
        drain: bool = True,
        max_iterations: int = 1_000_000,
        backend: str = "sim",
        backend_config: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ConfigError(f"render_mode: {render_mode!r}, must be None, 'rgb_array' or 'human'")
        if trace is not None:
            self.scenario = scenario_from_trace(trace, rate=rate)
        else:
            self.scenario = load_scenario(scenario) if isinstance(scenario, str) else scenario
        self.rate = self.scenario.rate if rate is None else self._checked_rate(rate)
        self.num_requests = self._checked_count(num_requests)
        self.engine = engine_with(self.scenario.engine, engine)
        self.layout = self._layout(class_by, class_edges, segment_ends, reveal_output_length)
        self.reveal_output_length = reveal_output_length
        self.limits = EpisodeLimits(drain=drain, horizon=horizon, max_iterations=max_iterations)
        self.reward = make_reward(reward)
        self.backend = make_backend(backend, **(backend_config or {}))
        self.codec = make_codec(action_set, self.layout.num_queues, max_admit, thetas)
        self.backlog = self._checked_backlog(backlog)
        observation = ObservationLayout.of(self.layout)
        self.observation_space = cast("gym.Space[Observation]", observation.space())
        self.action_space = cast("gym.Space[npt.NDArray[np.int64]]", self.codec.space())
        self._levels, self._action_shape = self.codec.levels, (self.codec.width,)
        self._compiled_reward = compiled_reward(self.reward)
        self.render_mode = render_mode
        names, slices = zip(*observation.slices(), strict=True)
        self._names, self._parts = names, operator.itemgetter(*slices)
        self._size = observation.size
        self._mask_size = self.codec.mask_size
        self._decision = Decision(self.layout.num_queues)
        self._contexts: dict[float, npt.NDArray[np.float64]] = {}
        self.context = self._context_at(self.rate)
        self._started = False
        self._viewer: Any = None

    # --- construction -----------------------------------------------------------------------------
    def _layout(
        self, by: ClassBy | None, edges: Sequence[int], ends: Sequence[int] | None, reveal: bool
    ) -> QueueLayout:
        base = self.scenario.known_layout if reveal else self.scenario.layout
        if by is not None or edges:
            by = by or base.by
            num_types = self.scenario.statistics.num_types if by == "type" else 1
            base = QueueLayout(by, tuple(int(e) for e in edges), num_types, base.segment_ends)
        if ends is not None:
            base = QueueLayout(base.by, base.edges, base.num_types, tuple(int(e) for e in ends))
        if base.reveals_output_length and not reveal:
            raise ConfigError("class_by: 'output' needs reveal_output_length=True (LLMSchedKnown-v0): it shows hidden lengths")
        return base

    @staticmethod
    def _checked_rate(rate: float) -> float:
        if not (isinstance(rate, int | float | np.number) and math.isfinite(rate) and rate > 0):
            raise ConfigError(f"rate: {rate!r}, must be finite and > 0 requests/s")
        return float(rate)

    def _checked_count(self, num_requests: int | None) -> int:
        if num_requests is None:
            return self.scenario.num_requests
        if isinstance(num_requests, bool) or not isinstance(num_requests, int | np.integer) or num_requests < 1:
            raise ConfigError(f"num_requests: {num_requests!r}, must be an integer >= 1")
        return int(num_requests)

    @staticmethod
    def _checked_backlog(backlog: int | Sequence[int]) -> tuple[int, int]:
        pair = (backlog, backlog) if isinstance(backlog, int | np.integer) else tuple(backlog)
        if len(pair) != 2 or not 0 <= pair[0] <= pair[1]:
            raise ConfigError(f"backlog: {backlog!r}, must be a number of requests >= 0 or (low, high) of two")
        return int(pair[0]), int(pair[1])

    def _context_at(self, rate: float) -> npt.NDArray[np.float64]:
        if rate not in self._contexts:
            self._contexts[rate] = static_context(self.scenario.statistics, rate, self.engine, self.layout)
        return self._contexts[rate]

    # --- Gymnasium API ----------------------------------------------------------------------------
    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        chosen = dict(options or {})
        rate = self._checked_rate(chosen.pop("rate", self.rate))
        count = self._checked_count(chosen.pop("num_requests", self.num_requests))
        workload: Workload | None = chosen.pop("workload", None)
        backlog = self._checked_backlog(chosen.pop("backlog", self.backlog))
        if chosen:
            raise ConfigError(f"options: {sorted(chosen)} unknown (allowed: rate, num_requests, workload, backlog)")
        # Drawn even for a given workload: the generator's state then depends on the seed alone.
        episode_seed = int(self.np_random.integers(2**63))
        if workload is None:
            workload = self.scenario.generate(episode_seed, rate=rate, num_requests=count)
            workload = workload.with_backlog(draw_backlog(backlog, self.np_random))
        self.context = self._context_at(rate)
        self.backend.reset(
            workload, self.layout, self.engine, self.limits, reveal_output_length=self.reveal_output_length
        )
        self._outcome = StepOutcome(self.backend, len(workload))
        b = self.backend
        kind, levels = self.codec.kind, self._levels
        self._observed = (b.settings, self.context, b.queues, b.queue_f, b.scalars, b.clocks, kind, levels)
        self._compiled_step: ArrayTable | None = None
        if type(b) is SimBackend and self._compiled_reward is not None and not numba.config.DISABLE_JIT:  # a step in one call
            self._compiled_step = ArrayTable((levels, self._decision.array, *b.arrays, self.context))
            self._step_codes = (kind, *self._compiled_reward)
        self._started = True
        observation, info = self._observe()
        if self.render_mode == "human":
            self.render()
        return observation, info

    def step(
        self, action: npt.ArrayLike
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before step()")
        values = np.ascontiguousarray(action, dtype=np.int64)
        if values.shape != self._action_shape:
            raise ConfigError(f"action: shape {np.shape(action)}, must be {self.action_space.shape}")
        b = self.backend
        if self._compiled_step is None or b.scalars.item(st.I_DONE) != st.END_NOT:
            chosen = self._decision
            decode(self.codec.kind, self._levels, values, b.settings, self.context, b.requests, b.slots, b.queues, b.scalars, chosen.array)
            return self.step_decision(chosen)
        flat = np.empty(self._size, dtype=np.float32)
        legal = np.empty(self._mask_size, dtype=np.bool_)
        reward, end, clock = step_from(self._compiled_step.table, values, *self._step_codes, flat, legal)
        observation = dict(zip(self._names, self._parts(flat)))  # noqa: B905 - strict costs a tenth of the step
        info = {"clock": clock, "action_mask": legal}
        if end == st.END_NOT and self.render_mode is None:
            return observation, reward, False, False, info
        if end == st.END_STUCK:
            cast(SimBackend, b).check_progress()
        return self._result(observation, reward, end, info)

    def step_decision(self, decision: Decision) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """``step`` for expert policies, whose decisions may also evict."""
        self.backend.advance(decision)
        reward = float(self.reward(self._outcome))
        observation, info = self._observe()
        return self._result(observation, reward, int(self.backend.scalars[st.I_DONE]), info)

    def _result(
        self, observation: Observation, reward: float, end: int, info: dict[str, Any]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if end != st.END_NOT:
            info["summary"] = self.summary()
        if self.render_mode == "human":
            self.render()
        return observation, reward, end == st.END_FINISHED, end > st.END_FINISHED, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(2 Q + (max_admit + 1) Q,) bool, components concatenated (sb3-contrib's convention); (n,) for ``reserve``."""
        legal = np.empty(self.codec.mask_size, dtype=np.bool_)
        mask(self.codec.kind, self._levels, self.backend.queues, legal)
        return legal

    def view(self) -> View:
        """What expert policies decide from."""
        return self.backend.snapshot()

    def summary(self) -> dict[str, float]:
        """Metrics of the episode so far, undefined ones left out."""
        summary = summarize(self.backend.log(), self.backend.counters(), kv_capacity=self.engine.kv_capacity)
        return {name: float(value) for name, value in summary.as_dict().items() if math.isfinite(value)}

    def _observe(self) -> tuple[Observation, dict[str, Any]]:
        flat = np.empty(self._size, dtype=np.float32)
        legal = np.empty(self._mask_size, dtype=np.bool_)
        observe(*self._observed, flat, legal)
        observation = dict(zip(self._names, self._parts(flat), strict=True))
        return observation, {"clock": float(self.backend.clocks[st.F_CLOCK]), "action_mask": legal}

    def render(self) -> npt.NDArray[np.uint8] | None:
        if self.render_mode is None:
            gym.logger.warn("render() was called without render_mode; use gym.make(..., render_mode='rgb_array')")
            return None
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self._viewer is None:
            from llmsched_env.render import Viewer

            self._viewer = Viewer(self.layout, self.engine, human=self.render_mode == "human", fps=self.metadata["render_fps"])
        frame: npt.NDArray[np.uint8] | None = self._viewer.draw(self.backend.snapshot())
        return frame

    def close(self) -> None:
        if self._viewer is not None:
            self._viewer.close()
            self._viewer = None
        self.backend.close()
        self._started = False


class AdmitOnly(gym.ActionWrapper[Observation, Any, npt.NDArray[np.int64]]):
    """A ``Discrete`` action for beginners: how many requests to admit from each outside queue.

    Residents always advance and boundary queues are always admitted; action ``max_admit`` means as
    many as fit. ``action_masks()`` offers counts up to the longest outside queue.
    """

    def __init__(self, env: gym.Env[Observation, npt.NDArray[np.int64]]) -> None:
        super().__init__(env)
        base = cast(LLMSchedEnv, self.unwrapped)
        if not isinstance(base, LLMSchedEnv):
            raise ConfigError(f"AdmitOnly: wraps {type(base).__name__}, must wrap LLMSchedEnv")
        if not isinstance(base.codec, ActionCodec):
            raise ConfigError("AdmitOnly: wraps action_set='reserve', which is Discrete already; must be 'admit'")
        self._codec, self._num_segments = base.codec, base.layout.num_segments
        self.action_space = gym.spaces.Discrete(base.codec.max_admit + 1)

    def action(self, action: Any) -> npt.NDArray[np.int64]:
        n = self._codec.num_queues
        out = np.full(2 * n, self._codec.max_admit, dtype=np.int64)
        out[:n] = 1
        out[n :: self._num_segments] = int(action)
        return out

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(max_admit + 1,) bool."""
        waiting = int(cast(LLMSchedEnv, self.unwrapped).view().waiting[:, 0].max())
        mask = np.arange(self._codec.max_admit + 1) <= waiting
        mask[-1] = waiting > 0
        return mask

    def reset(self, **kwargs: Any) -> tuple[Observation, dict[str, Any]]:
        observation, info = super().reset(**kwargs)
        return observation, {**info, "action_mask": self.action_masks()}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, float(reward), terminated, truncated, {**info, "action_mask": self.action_masks()}
