"""Reward objects: what a step is worth.

A reward is any callable ``reward(outcome) -> float``, or a compiled function (``CompiledReward``); the built-in ones
are selected by name or by a plain dict (``{"name": "slo_goodput", "ttft": 1.0, "tpot": 0.1}``), so that an environment
specification stays serialisable.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numba
import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.compiled import compiled, is_compiled
from llmsched_env.engine.state import Engine
from llmsched_env.errors import ConfigError
from llmsched_env.pointers import address_of, call_float
from llmsched_env.records import Numbers, reader
from llmsched_env.registry import REWARDS
from llmsched_env.types import FloatArray, IntArray


class Outcome(Protocol):
    """What the last step did, read when asked; valid until the next step."""

    @property
    def num_requests(self) -> int:
        """Requests of the episode."""

    @property
    def duration(self) -> float:
        """Seconds the clock moved."""

    @property
    def system_seconds(self) -> float:
        """Number in system integrated over the step (request-seconds)."""

    @property
    def completed(self) -> int: ...
    @property
    def completed_tokens(self) -> int:
        """Output tokens of the requests completed in the step."""

    @property
    def generated_tokens(self) -> int:
        """Output tokens sampled in the step, those later lost included."""

    @property
    def evictions(self) -> int: ...
    def finished(self) -> FinishedRequests: ...


@dataclass(frozen=True, slots=True)
class FinishedRequests:
    """Requests completed in the step; arrays of shape (n,). Definitions: ``RequestLog``."""

    id: IntArray
    output_tokens: IntArray
    ttft: FloatArray
    latency: FloatArray

    @property
    def tpot(self) -> FloatArray:
        """Seconds per output token after the first; 0 for single-token outputs."""
        rest = np.maximum(self.output_tokens - 1, 1)
        return np.where(self.output_tokens > 1, (self.latency - self.ttft) / rest, 0.0)


Reward = Callable[[Outcome], float]


@dataclass(frozen=True, slots=True)
class LatencyReward:
    """Minus the number in system integrated over the step, per request of the episode (seconds).

    By Little's law the undiscounted return of a drained episode is minus the mean latency.
    """

    def __call__(self, outcome: Outcome) -> float:
        return -outcome.system_seconds / outcome.num_requests


@dataclass(frozen=True, slots=True)
class ThroughputReward:
    """Output tokens of requests completed in the step (the paper's effective throughput, integrated).

    Use it with a fixed horizon: over a drained episode every policy collects the same sum.
    """

    def __call__(self, outcome: Outcome) -> float:
        return float(outcome.completed_tokens)


@dataclass(frozen=True, slots=True)
class SloGoodputReward:
    """Share of the episode's requests completed in the step within both limits; the return is goodput in [0, 1].

    Attributes:
        ttft: most seconds to the first token.
        tpot: most seconds per output token after the first.
    """

    ttft: float = 1.0
    tpot: float = 0.1

    def __post_init__(self) -> None:
        for name in ("ttft", "tpot"):
            checks.number(f"reward.{name}", getattr(self, name), unit="seconds", open_low=True)

    def __call__(self, outcome: Outcome) -> float:
        if outcome.completed == 0:
            return 0.0
        done = outcome.finished()
        return float(np.count_nonzero((done.ttft <= self.ttft) & (done.tpot <= self.tpot))) / outcome.num_requests


# --- compiled rewards --------------------------------------------------------------------------------
@compiled
def latency_reward(engine: Engine, own: Numbers) -> float:
    """``LatencyReward`` in compiled code."""
    return -engine.report.system_seconds / engine.num_requests


@compiled
def throughput_reward(engine: Engine, own: Numbers) -> float:
    """``ThroughputReward`` in compiled code."""
    return float(engine.report.completed_tokens)


@compiled
def slo_goodput_reward(engine: Engine, own: Numbers) -> float:
    """``SloGoodputReward`` in compiled code; ``own.parameters``: TTFT and TPOT limits in seconds."""
    hidden = engine.hidden
    met = 0
    for i in range(engine.report.completed):
        r = engine.events.finished[i]
        first = hidden.first_token[r] - hidden.arrival[r]
        rest = hidden.output[r] - 1
        each = (hidden.completed[r] - hidden.arrival[r] - first) / rest if rest > 0 else 0.0
        if first <= own.parameters[0] and each <= own.parameters[1]:
            met += 1
    return met / engine.num_requests


_engine_at, _numbers_at = reader(Engine), reader(Numbers)


@compiled
def _reward_at(address: int, engine: Any, own: Any) -> float:
    return call_float(address, _engine_at(engine), _numbers_at(own))


class CompiledReward:
    """A reward as a compiled function ``(engine, own) -> float``: as fast as the built-in ones in every environment.

    ``engine`` is the whole record of ``llmsched_env.engine.state``, ``engine.report`` what the last step did::

        @compiled
        def tokens(engine, own):
            return own.parameters[0] * engine.report.generated_tokens

        gym.make("LLMSched-v1", reward=CompiledReward(tokens, [0.001]))

    Args:
        function: decorated with ``llmsched_env.compiled.compiled``.
        parameters: (P,) numbers for ``own.parameters``.
        memory: length of ``own.memory``, zeros at the start of an episode; each environment has its own.

    Raises:
        ConfigError: the function cannot be compiled.
    """

    def __init__(self, function: Callable[..., Any], parameters: npt.ArrayLike = (), memory: int = 0) -> None:
        self.function = function
        self.numbers = Numbers.of(parameters, memory)
        self._address: int | None = None
        _ = self.address

    @property
    def address(self) -> int:
        """Where the step calls it."""
        if self._address is None:
            try:
                self._address = address_of(self.function, (Engine, Numbers), float)
            except (TypeError, AttributeError, numba.core.errors.NumbaError) as error:
                name = getattr(self.function, "__name__", repr(self.function))
                raise ConfigError(f"reward: {name!r} cannot be compiled as (engine, own) -> float: {error}") from error
        return self._address

    def own_numbers(self) -> Numbers:
        """The parameters, and a memory that no other environment writes to."""
        return Numbers.of(self.numbers.parameters, len(self.numbers.memory))

    def own(self) -> CompiledReward:
        """The same reward with a memory of its own."""
        return CompiledReward(self.function, self.numbers.parameters, len(self.numbers.memory))

    def __call__(self, outcome: Outcome) -> float:
        record = getattr(outcome, "record", None)
        if not isinstance(record, Engine):
            raise ConfigError("reward: a CompiledReward reads an engine's record, which this outcome does not have")
        return float(_reward_at(self.address, record.handle, self.numbers.handle))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_address": None}  # good in its own process only


def compiled_reward(reward: Reward) -> CompiledReward | None:
    """A built-in or compiled reward for the compiled step; None for an ordinary callable."""
    if isinstance(reward, CompiledReward):
        return reward.own()
    if type(reward) is LatencyReward:
        return CompiledReward(latency_reward)
    if type(reward) is ThroughputReward:
        return CompiledReward(throughput_reward)
    if type(reward) is SloGoodputReward:
        return CompiledReward(slo_goodput_reward, [reward.ttft, reward.tpot])
    return None


REWARDS.built_in({"latency": LatencyReward, "throughput": ThroughputReward, "slo_goodput": SloGoodputReward})


def make_reward(spec: str | Mapping[str, Any] | Reward) -> Reward:
    """A reward from its name or ``module:attribute``, from ``{"name": ..., **arguments}``, or the callable itself.

    What a name stands for is a class or a function that gives a reward when it is called with the arguments, or the reward itself.

    Raises:
        ConfigError: unknown name (the nearest one is given) or argument; a callable that cannot be called with one outcome,
            or whose calls give no number: a class, a generator or a coroutine function.
    """
    if is_compiled(spec):
        return CompiledReward(spec)  # type: ignore[arg-type]
    if callable(spec):
        _check_callable(spec)
        return spec
    if not isinstance(spec, str | Mapping):
        raise ConfigError(
            f"reward: {checks.shown(spec)}, must be a name, an object with one, or a callable (known: {', '.join(REWARDS.names())})"
        )
    arguments = {"name": spec} if isinstance(spec, str) else checks.mapping("reward", spec)
    name = arguments.pop("name", None)
    found = REWARDS.find(name, "; or module:attribute, or a callable")
    if not arguments and not _is_factory(found):
        return make_reward(found)
    try:
        return make_reward(found(**arguments))
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"reward {name!r}: {error}") from error


def _is_factory(thing: Any) -> bool:
    """Whether a thing behind a name gives the reward when it is called: it needs no argument, where a reward needs an outcome."""
    if is_compiled(thing) or not callable(thing):
        return False
    try:
        inspect.signature(thing).bind()
    except (TypeError, ValueError):
        return False
    return True


def _check_callable(reward: Callable[..., Any]) -> None:
    """What can be told without a call, which could change the state of a reward that keeps one."""
    allowed = "must be called with one outcome and give a number"
    if isinstance(reward, type):
        raise ConfigError(f"reward: {reward.__name__} is a class, {allowed}: give an instance")
    for function in (reward, getattr(reward, "__call__", None)):  # noqa: B004
        if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigError(f"reward: {checks.shown(reward)} is a coroutine or generator function, {allowed}")
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # compiled ones may have none
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise ConfigError(f"reward: {checks.shown(reward)} takes {signature} ({error}), {allowed}") from error
