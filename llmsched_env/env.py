"""The environment: an LLM serving engine whose admission decisions are the actions."""

from __future__ import annotations

import math
import operator
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.action import ActionCodec, link_codec, whole_number
from llmsched_env.backend import View
from llmsched_env.backends import make_backend
from llmsched_env.compiled import entry
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine.state import END_FINISHED, END_STUCK, RUNNING, Engine
from llmsched_env.env_step import ILLEGAL, LOOK, EnvRecord, env_decode, env_mask, env_step
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import summarize
from llmsched_env.observation import ObservationLayout
from llmsched_env.records import Numbers
from llmsched_env.reward import CompiledReward, FinishedRequests, compiled_reward
from llmsched_env.spec import DEFAULT_SCENARIO, EnvSpec, checked_backlog, checked_count, checked_rate, draw_backlog
from llmsched_env.types import Decision, Workload
from llmsched_env.workload import Scenario

Observation = dict[str, npt.NDArray[np.float32]]

MOST_RATES = 32
"""Rates for which the forecast is kept: ``reset(options={"rate": ...})`` may draw a new one every time."""


class StepOutcome:
    """``llmsched_env.reward.Outcome`` read from the engine's record."""

    __slots__ = ("num_requests", "record")

    def __init__(self, record: Engine) -> None:
        self.record = record
        self.num_requests = record.num_requests

    @property
    def duration(self) -> float:
        return self.record.report.duration

    @property
    def system_seconds(self) -> float:
        return self.record.report.system_seconds

    @property
    def completed(self) -> int:
        return self.record.report.completed

    @property
    def completed_tokens(self) -> int:
        return self.record.report.completed_tokens

    @property
    def generated_tokens(self) -> int:
        return self.record.report.generated_tokens

    @property
    def evictions(self) -> int:
        return self.record.report.evicted + self.record.report.preempted

    def finished(self) -> FinishedRequests:
        ids = self.record.events.finished[: self.completed].copy()
        rows = self.record.hidden.rows[ids]
        return FinishedRequests(
            id=ids,
            output_tokens=rows["output"],
            ttft=rows["first_token"] - rows["arrival"],
            latency=rows["completed"] - rows["arrival"],
        )


class LLMSchedEnv(gym.Env[Observation, npt.NDArray[np.int64]]):
    """LLM inference scheduling on one GPU.

    ## Description
    Requests with a prompt and an unknown number of output tokens arrive at a serving engine that runs
    iterations of continuous batching. KV memory is limited: every resident grows by one token per
    iteration, and when memory runs out the engine evicts. The agent says who enters: letting too many in
    makes the engine preempt and compute again, letting too few in makes requests wait.

    Requests stand in Q = J * K queues: J classes (known at arrival), K segments of decode length.
    Queue (j, 0) is the outside queue of class j; queue (j, k) holds requests that have generated
    ``segment_ends[k-1]`` tokens, their KV kept, until they are admitted to segment k.

    One step of the environment is as many engine iterations under one action as take ``hold_seconds``, or ``hold`` of
    them (an iteration in which nothing is scheduled is a jump to the next arrival). What the action means is decided
    anew in every iteration.

    ## Action Space
    Four sets (``llmsched_env.action``), ``peak`` by default:

    * ``peak``: ``MultiDiscrete([len(levels), len(orders)])``, without classes ``Discrete(len(levels))``: the share of the
      memory that the KV predicted for the residents may reach, and who enters first, by "arrival" or least "work";
      with predicted classes "arrival" and "trust-0" to "trust-1" (``llmsched_env.trust``).
    * ``admit``: ``MultiDiscrete([2] * Q + [max_admit + 1] * Q)``, for queue q = j * K + k: component q says whether the
      residents of segment q are held with their KV (0) or advance (1); component Q + q how many requests enter segment q
      from its queue, oldest first, the largest standing for as many as fit.
    * ``reserve``: ``Discrete(len(thetas))``: the share of the memory that the final KV to expect of all residents may reach.

    * ``operate``: ``MultiDiscrete([len(levels), len(ageing), len(token_budgets)])``, without classes or in the ``paper`` preset
      fewer: a level as in ``peak``; seconds tau0, requests entering by (wait + tau0) / expected work, highest first; a token budget,
      beyond which no request becomes resident.

    ``token_budgets`` adds one more component, the token budget of the iterations. The engine does what its token
    budget, sequence cap and KV memory allow. Requests admitted in an iteration advance in it. ``action_masks()`` and
    ``info["action_mask"]`` give the legal values.

    ## Observation Space
    A ``Dict`` of float32 arrays in [0, 1]; the table is in ``llmsched_env.observation``.

    ## Rewards
    ``latency`` (default): minus the number in system integrated over the step, divided by the number
    of requests of the episode, in seconds: the return is minus the mean latency (Little's law).
    ``throughput``: output tokens of requests completed in the step. ``slo_goodput``: share of the
    episode's requests completed within the TTFT and TPOT limits. Or any callable, see ``llmsched_env.reward``.

    The reward of a step is the sum over its iterations. Steps take different times, so agents that discount should do
    it by the clock: ``info["seconds"]`` is how far the step moved it, and with ``discount_seconds`` ``info["discount"]`` is
    exp(-seconds / discount_seconds), the factor for what follows, and rewards within a step are discounted to its start.

    ## Starting State
    An empty engine at time 0. The requests of the episode are drawn from the scenario with the
    environment's random generator.

    ## Episode End
    Terminated when every request has completed. Truncated at ``horizon`` seconds, at
    ``max_iterations``, or, with ``drain=False``, when no arrival is left and the action schedules
    nothing. With ``drain=True`` such an action is replaced by one greedy iteration instead, so that
    every finite episode completes.

    ## Arguments
    All but the last three are fields of ``llmsched_env.spec.EnvSettings``.

    | argument | default | meaning |
    | --- | --- | --- |
    | scenario | "azure-conv-40gb" | a name of ``llmsched_env.workload.scenario_names()`` or a ``Scenario`` |
    | trace | None | a trace file to replay instead of a scenario |
    | rate | scenario's | mean arrival rate, requests/s |
    | num_requests | scenario's | requests per episode |
    | engine | scenario's | dict of ``EngineConfig`` fields to change (also ``d0``, ``d1``), or an ``EngineConfig`` |
    | calibration | None | iteration times, by name (``llmsched_env.perf.calibration_names()``) or file; None: the scenario's own |
    | class_by, class_edges | scenario's | ``single``, ``type``, ``prompt``, ``predicted``, ``output`` or ``tenant`` and upper edges |
    | predictions | scenario's | predicted output lengths: the sigma of their error, a ``PredictionModel`` or its fields |
    | segment_ends | scenario's | decode lengths that end segments |
    | reveal_output_length | False (True in LLMSchedKnown-v1) | classes by output length and per-request lengths in the view |
    | action_set | "peak" | one of the four above |
    | levels, orders | ``peak.LEVELS``, both | choices of "peak" (levels of "operate", too); ``orders=()``: none, the engine's |
    | ageing | ``action.AGEING`` | seconds tau0, choices of "operate"; ``ageing=()``: none, least work first |
    | max_admit | 16 | largest admit count of "admit" |
    | thetas | ``action.THETAS`` | over-commitments of "reserve" |
    | token_budgets | (), "operate": ``action.BUDGETS`` | choices of one more component, tokens; 0: the engine's own |
    | hold, hold_seconds | None | iterations, and least seconds, that an action stays in force; None: 4 s, with "admit" one iteration |
    | discount_seconds | inf | time constant of the discount in ``info`` |
    | backlog | 0 | requests waiting at time 0, taken from the front of the episode: a number, or (low, high) to draw it |
    | reward | "latency" | name, ``{"name": ..., arguments}``, callable or compiled function |
    | horizon, drain, max_iterations | inf, True, 1,000,000 | see Episode End |
    | backend, backend_config | "sim", {} | "sim", "sim-prefix-cache", "vllm-scheduler" or "vllm" (a real engine), and its arguments |
    | render_mode | None | "rgb_array" or "human" (needs the ``render`` extra) |

    ``calibration`` sets the time model alone: the engine keeps its blocks, so the memory stays as it was, unlike ``--calibration`` of the
    programs, which takes the calibration's number of blocks as well. It cannot stand beside ``engine`` with iteration times of its own
    (``time_model``, ``d0``, ``d1``, a whole ``EngineConfig``), nor with the ``paper`` preset.

    ``reset(options={"rate": ..., "num_requests": ..., "workload": Workload})`` changes one episode.

    ## Headroom
    Of the defaults (``docs/environments.md`` has all named environments). Mean latency: admitting everything 15.9 s, best
    constant action 11.1 s (level 0.95, by work), best policy 9.1 s (generalist), gap 43 %; reward threshold -11.5.

    ## Version History
    * v1: iteration times of the measured table ``a100-llama2-7b-vllm``, which has the staircase of a GPU's tiles.
    * v0: those of the smooth formula ``a100-llama2-7b-c10`` (``calibration``), under which token budgets pay off that cost time on
      measured tables. ``gym.make("LLMSched-v0")`` plays them to the bit; a scenario or an ``engine`` with iteration times of its own
      needs ``calibration=None`` there. Scheduler rules of vLLM 0.28.0.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": 30}  # noqa: RUF012 - gymnasium's form

    def __init__(
        self,
        scenario: str | Scenario = DEFAULT_SCENARIO,
        *,
        backend: str = "sim",
        backend_config: Mapping[str, Any] | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ConfigError(f"render_mode: {render_mode!r}, must be None, 'rgb_array' or 'human'")
        self.settings = EnvSpec.of(scenario, **settings)
        self.backend = make_backend(backend, **checks.mapping("backend_config", {} if backend_config is None else backend_config))
        self._use(self.settings)
        self.render_mode = render_mode
        self._started = False
        self._viewer: Any = None  # llmsched_env.render.env_viewer.EnvViewer, with a render_mode

    def _use(self, settings: EnvSpec) -> None:
        self.scenario, self.rate, self.num_requests = settings.scenario, settings.rate, settings.num_requests
        self.engine, self.layout, self.limits = settings.engine, settings.layout, settings.limits
        self.reveal_output_length, self.reward, self.codec = settings.reveal_output_length, settings.reward, settings.codec
        observation = ObservationLayout.of(self.layout)
        self.observation_space = cast("gym.Space[Observation]", observation.space())
        self.action_space = cast("gym.Space[npt.NDArray[np.int64]]", self.codec.space())
        self._action_shape = (self.codec.width,)
        self._compiled_reward = compiled_reward(self.reward)
        self._reward = self._compiled_reward if isinstance(self.reward, CompiledReward) else self.reward
        names, slices = zip(*observation.slices(), strict=True)
        self._names, self._parts = names, operator.itemgetter(*slices)
        self._size, self._mask_size = observation.size, self.codec.mask_size
        self.discount_seconds, self._clock = settings.discount_seconds, 0.0
        self._undiscounted = settings.discount_seconds == math.inf
        self._peak = settings.peak_tables()
        self._decision = Decision(self.layout.num_queues)
        self._records: OrderedDict[float, EnvRecord] = OrderedDict()
        self._env = self._record_at(self.rate)

    def _record_at(self, rate: float) -> EnvRecord:
        """What the compiled step reads at this rate."""
        if rate not in self._records:
            settings, reward = self.settings, self._compiled_reward
            numbers = reward.numbers if reward is not None else Numbers.of()
            record = EnvRecord(codec=settings.codec_record(settings.forecast(rate), self._peak), reward_numbers=numbers)
            record.hold, record.hold_seconds, record.discount_seconds = settings.hold, settings.hold_seconds, settings.discount_seconds
            self._records[rate] = record
            if len(self._records) > MOST_RATES:
                self._records.popitem(last=False)
        self._records.move_to_end(rate)
        record = self._records[rate]
        self._link(record)
        return record

    def _link(self, record: EnvRecord) -> None:
        link_codec(record.codec)
        record.reward = 0 if self._compiled_reward is None else self._compiled_reward.address

    @property
    def forecast(self) -> Any:
        """What an operator knows beforehand, as the observation shows it (``llmsched_env.forecast.Forecast``)."""
        return self._env.codec.forecast

    # --- Gymnasium API ----------------------------------------------------------------------------
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        super().reset(seed=seed)
        chosen = checks.mapping("options", options) if options is not None else {}
        rate = checked_rate(chosen.pop("rate", self.rate))
        count = checked_count(chosen.pop("num_requests", self.num_requests))
        workload: Workload | None = chosen.pop("workload", None)
        backlog = checked_backlog(chosen.pop("backlog", self.settings.backlog))
        if chosen:
            raise ConfigError(f"options: {sorted(chosen)} unknown (allowed: rate, num_requests, workload, backlog)")
        # Drawn even for a given workload: the generator's state then depends on the seed alone.
        episode_seed = int(self.np_random.integers(2**63))
        if workload is None:
            workload = self.scenario.generate(episode_seed, rate=rate, num_requests=count)
            workload = workload.with_backlog(draw_backlog(backlog, self.np_random))
        elif not isinstance(workload, Workload):
            raise ConfigError(f"options.workload: {type(workload).__name__}, must be a Workload")
        self._env = self._record_at(rate)
        self._env.reward_numbers.forget()
        self._env.codec.peak.forget()
        self.backend.reset(workload, self.layout, self.engine, self.limits, reveal_output_length=self.reveal_output_length)
        self._bind()
        observation, info = self._observe()
        self._watch(rate)
        if self.render_mode == "human":
            self.render()
        return observation, info

    def _bind(self) -> None:
        """Take hold of the backend's engine: its handles are read once an episode."""
        record = self.backend.record
        self._outcome = StepOutcome(record)
        self._handles = (record.handle, self._env.handle, self._decision.handle)
        self._step = entry(env_step)
        self._compiled_step = type(self.backend) is SimBackend and self._compiled_reward is not None
        self._over = record.end != RUNNING
        self._clock = record.clock
        self._started = True

    def step(self, action: npt.ArrayLike) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before step()")
        values = self.codec.as_integers(action)
        if not self._compiled_step or self._over or self._viewer is not None:
            return self._step_by_iteration(values)
        flat = np.empty(self._size, dtype=np.float32)
        legal = np.empty(self._mask_size, dtype=np.bool_)
        reward, end, clock = self._step(*self._handles, values, flat, legal)
        if end == ILLEGAL:
            self.codec.refuse(values)
        observation = dict(zip(self._names, self._parts(flat)))  # noqa: B905 - strict costs a tenth of the step
        seconds, self._clock = clock - self._clock, clock
        discount = 1.0 if self._undiscounted else self._discount(seconds)
        info = {"clock": clock, "seconds": seconds, "discount": discount, "action_mask": legal, "summary": {}}
        if end == RUNNING and self.render_mode is None:
            return observation, reward, False, False, info
        if end == END_STUCK:
            cast(SimBackend, self.backend).check_progress()
        return self._result(observation, reward, end, info)

    def _step_by_iteration(self, values: npt.NDArray[np.int64]) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """``step`` where an iteration is not one compiled call: another backend, a reward in Python, or frames that show every one."""
        if self._viewer is not None:
            self._viewer.begin(values)
        record, start, total, count = self.backend.record, self.backend.record.clock, 0.0, 0
        while True:
            elapsed = record.clock - start
            if not env_decode(*self._handles, values):
                self.codec.refuse(values)
            total += self._advance(self._decision) * self._discount(elapsed)
            count += 1
            if record.end != RUNNING or (count >= self.settings.hold and record.clock - start >= self.settings.hold_seconds):
                break
        observation, info = self._observe()
        return self._result(observation, total, record.end, info)

    def step_decision(self, decision: Decision) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One iteration under a decision of an expert policy, which may also evict; ``hold`` does not apply.

        Raises:
            ConfigError: a decision for another number of queues.
        """
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before step_decision()")
        if self._viewer is not None:
            self._viewer.begin(None)
        reward = self._advance(decision)
        observation, info = self._observe()
        return self._result(observation, reward, self.backend.record.end, info)

    def _advance(self, decision: Decision) -> float:
        """One iteration; returns its reward."""
        self.backend.advance(decision)
        if self._viewer is not None:
            self._viewer.note(decision)
        assert self._reward is not None
        return checks.number("reward", self._reward(self._outcome), low=-math.inf, high=math.inf)

    def _discount(self, seconds: float) -> float:
        """What a reward is worth that comes so much later."""
        return 1.0 if self.discount_seconds == math.inf else math.exp(-seconds / self.discount_seconds)

    def _result(
        self, observation: Observation, reward: float, end: int, info: dict[str, Any]
    ) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        if end != RUNNING:
            self._over = True
            info["summary"] = self.summary()
        if self.render_mode == "human":
            self.render()
        return observation, reward, end == END_FINISHED, end > END_FINISHED, info

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(sum of the sizes of the components,) bool, components concatenated (sb3-contrib's convention)."""
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before action_masks()")
        legal = np.empty(self._mask_size, dtype=np.bool_)
        env_mask(*self._handles[:2], legal)
        return legal

    def sample_mask(self) -> Any:
        """``action_masks()`` in the form that ``env.action_space.sample(mask=...)`` takes."""
        return self.codec.sample_mask(self.action_masks())

    def view(self) -> View:
        """What expert policies decide from."""
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before view()")
        return self.backend.snapshot()

    def summary(self) -> dict[str, float]:
        """Metrics of the episode so far, undefined ones left out."""
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before summary()")
        summary = summarize(self.backend.log(), self.backend.counters(), kv_capacity=self.engine.kv_capacity)
        return {name: float(value) for name, value in summary.as_dict().items() if math.isfinite(value)}

    def _observe(self) -> tuple[Observation, dict[str, Any]]:
        flat = np.empty(self._size, dtype=np.float32)
        legal = np.empty(self._mask_size, dtype=np.bool_)
        env_step(*self._handles, LOOK, flat, legal)
        observation = dict(zip(self._names, self._parts(flat), strict=True))
        clock = self.backend.record.clock
        seconds, self._clock = clock - self._clock, clock
        return observation, {
            "clock": clock,
            "seconds": seconds,
            "discount": self._discount(seconds),
            "action_mask": legal,
            "summary": {},
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_outcome", "_handles", "_step", "_viewer")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._viewer = None
        if self._started:  # handles are good in their own process only
            self._link(self._env)
            self._bind()

    def render(self) -> npt.NDArray[np.uint8] | None:  # type: ignore[override, unused-ignore]  # a type variable before Gymnasium 1.3
        if self.render_mode is None:
            gym.logger.warn("render() was called without render_mode; use gym.make(..., render_mode='rgb_array')")
            return None
        if not self._started:
            raise gym.error.ResetNeeded("call reset() before render()")
        if self._viewer is None:
            self._watch(self.rate)
        frame: npt.NDArray[np.uint8] | None = self._viewer.draw()
        return frame

    def _watch(self, rate: float) -> None:
        """From here on the frames show an episode's course: every iteration of it, rendered or not."""
        if self.render_mode is not None and self._viewer is None:
            from llmsched_env.render.env_viewer import EnvViewer

            self._viewer = EnvViewer(self, rate)
        elif self._viewer is not None:
            self._viewer.start(rate)

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
            raise ConfigError("AdmitOnly: wraps an environment of levels, which are one choice already; must have action_set='admit'")
        if base.codec.token_budgets:
            raise ConfigError(f"AdmitOnly: token_budgets={base.codec.token_budgets}, must be empty")
        self._codec, self._num_segments = base.codec, base.layout.num_segments
        self.action_space = gym.spaces.Discrete(base.codec.max_admit + 1)

    def action(self, action: Any) -> npt.NDArray[np.int64]:
        n = self._codec.num_queues
        out = np.full(2 * n, self._codec.max_admit, dtype=np.int64)
        out[:n] = 1
        out[n :: self._num_segments] = whole_number(action, self._codec.max_admit)
        return out

    def action_masks(self) -> npt.NDArray[np.bool_]:
        """(max_admit + 1,) bool."""
        waiting = int(cast(LLMSchedEnv, self.unwrapped).view().waiting[:, 0].max())
        mask = np.arange(self._codec.max_admit + 1) <= waiting
        mask[-1] = waiting > 0
        return mask

    def sample_mask(self) -> npt.NDArray[np.int8]:
        """The same in the form that ``env.action_space.sample(mask=...)`` takes."""
        return self.action_masks().view(np.int8)

    def reset(self, **kwargs: Any) -> tuple[Observation, dict[str, Any]]:
        observation, info = super().reset(**kwargs)
        return observation, {**info, "action_mask": self.action_masks()}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = super().step(action)
        return observation, float(reward), terminated, truncated, {**info, "action_mask": self.action_masks()}
