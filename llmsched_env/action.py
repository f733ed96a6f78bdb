"""Actions of an agent <-> decisions of the engine, and action masks. Two action sets.

``admit`` (default): ``MultiDiscrete([2] * Q + [max_admit + 1] * Q)``: the first Q components are
``run``, the others ``admit``; the largest count stands for "as many as fit". Eviction is not in the
agent's action space: the engine evicts when memory runs out, expert policies may ask for it.
Mask: ``run = 0`` (hold) is offered only where the segment has residents; ``admit = n`` only up to
the length of the queue, "as many as fit" only where the queue is not empty. ``run = 1`` and
``admit = 0`` are always legal.

``reserve``: ``Discrete(len(thetas))``: everything runs, boundary queues are admitted, and outside
requests enter in the engine's admission order while the final KV to expect of all residents stays
within ``theta * C``. Expected lengths come from the scenario's statistics (``llmsched_env.forecast``).
An empty engine takes the first request whatever it is expected to need, unless theta is 0.
Every action is legal. The ``reserve`` policy of ``baselines`` is one constant action of this set.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import next_in_order, start_of_queues
from llmsched_env.engine.residents import generated
from llmsched_env.engine.state import Engine
from llmsched_env.errors import ConfigError
from llmsched_env.forecast import Forecast
from llmsched_env.pointers import address_of, call
from llmsched_env.records import Record, Vector
from llmsched_env.types import ADMIT_ALL, Decision

ADMIT = 0
RESERVE = 1
THETAS = (0.0, 0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, math.inf)


@compiled
def fill_mask(engine, max_admit, out):  # type: ignore[no-untyped-def]
    """Write the mask of ``admit``, components concatenated, into ``out`` (2 Q + (max_admit + 1) Q,) bool."""
    queues, num_queues = engine.queues, engine.settings.num_queues
    at = 2 * num_queues
    for q in range(num_queues):
        out[2 * q] = queues.residents[q] > 0
        out[2 * q + 1] = True
        waiting = queues.waiting[q]
        for n in range(max_admit):
            out[at + n] = n <= waiting
        out[at + max_admit] = waiting > 0
        at += max_admit + 1


@compiled
def decode_action(action, num_queues, max_admit, decision):  # type: ignore[no-untyped-def]
    """Write ``run`` and ``admit`` of ``decision`` from an action (2 Q,) int64 of ``admit``."""
    for q in range(num_queues):
        decision.run[q] = action[q]
        count = action[num_queues + q]
        decision.admit[q] = ADMIT_ALL if count >= max_admit else count


@compiled
def run_everything(engine, greedy, decision):  # type: ignore[no-untyped-def]
    """Everything runs and boundaries are passed; from outside as many as fit enter (``greedy``) or nobody."""
    num_segments = engine.settings.num_segments
    for q in range(engine.settings.num_queues):
        decision.run[q] = 1
        decision.admit[q] = ADMIT_ALL if greedy or q % num_segments != 0 else 0
        decision.evict[q] = 0


@compiled
def decode_reserve(engine, theta, forecast, decision):  # type: ignore[no-untyped-def]
    """Write the decision of ``reserve`` at this theta, with what ``forecast`` expects."""
    run_everything(engine, theta == math.inf, decision)
    if theta == math.inf or theta == 0.0 or engine.num_waiting == 0:
        return
    requests, queues = engine.requests, engine.queues
    expected = forecast.expected
    top = expected.shape[0] - 1
    room = theta * forecast.capacity_tokens
    r = engine.oldest
    while r >= 0:
        room -= requests.prompt[r] + expected[min(generated(engine, r), top)]
        r = requests.next[r]
    empty = engine.num_residents == 0
    start_of_queues(engine)
    best = next_in_order(engine)
    while best >= 0:
        r = queues.left[best]
        kept = requests.base_generated[r]
        # A fresh request is expected to be as long as its class; a preempted one as those of its length.
        length = forecast.by_class[best // engine.settings.num_segments] if kept == 0 else expected[min(kept, top)]
        room -= requests.prompt[r] + length
        if room < 0.0 and not empty:
            return
        empty = False
        decision.admit[best] += 1
        queues.left[best] = requests.next[r]
        best = next_in_order(engine)


class CodecRecord(Record):
    """An action set as compiled code reads it."""

    kind: int  # ADMIT or RESERVE
    levels: Vector  # thetas of ``reserve``; max_admit alone of ``admit``
    forecast: Forecast
    reserve: int  # address of ``decode_level``, where the set is ``reserve``


@compiled
def decode_level(engine: Engine, codec: CodecRecord, decision: Decision, level: int) -> None:
    """``decode_reserve`` at a level by its number."""
    decode_reserve(engine, codec.levels[level], codec.forecast, decision)


def link_codec(codec: CodecRecord) -> None:
    """Write the addresses of an action set's functions; they are good in this process only."""
    codec.reserve = address_of(decode_level, (Engine, CodecRecord, Decision, int)) if codec.kind == RESERVE else 0


@compiled
def is_legal(kind, action, num_queues, levels):  # type: ignore[no-untyped-def]
    """Whether an action (W,) int64 lies in its space."""
    if kind == RESERVE:
        return 0 <= action[0] < levels.shape[0]
    for q in range(num_queues):  # noqa: SIM110 - a generator would be compiled to a slower loop
        if not (0 <= action[q] <= 1 and 0 <= action[num_queues + q] <= levels[0]):
            return False
    return True


@compiled
def decode(engine, codec, action, decision):  # type: ignore[no-untyped-def]
    """An action (W,) int64 of either set; ``codec`` is a ``CodecRecord``."""
    if codec.kind == RESERVE:
        call(codec.reserve, engine, codec, decision, action[0])
    else:
        decode_action(action, engine.settings.num_queues, int(codec.levels[0]), decision)


@compiled
def mask(engine, codec, out):  # type: ignore[no-untyped-def]
    """The mask of either set."""
    if codec.kind == RESERVE:
        for n in range(codec.levels.shape[0]):
            out[n] = True
    else:
        fill_mask(engine, int(codec.levels[0]), out)


def _array(action: Any, space: Callable[[], gym.Space[Any]]) -> npt.NDArray[Any]:
    try:
        return np.asarray(action)
    except (ValueError, TypeError) as error:  # rows of different lengths
        raise ConfigError(f"action: {action!r}, must be whole numbers in {space()}") from error


def _as_integers(action: Any, width: int, space: Callable[[], gym.Space[Any]]) -> npt.NDArray[np.int64]:
    if type(action) is np.ndarray and action.dtype == np.int64 and action.shape == (width,) and action.flags.c_contiguous:
        return action  # what ``action_space.sample`` and most agents give
    given = _array(action, space)
    if given.dtype.kind == "f" and np.isfinite(given).all() and (given == np.floor(given)).all() and (np.abs(given) < 2**53).all():
        given = given.astype(np.int64)
    if given.dtype.kind not in "iu":
        raise ConfigError(f"action: {action!r}, must be whole numbers in {space()}")
    if given.shape != (width,) and not (width == 1 and given.shape == ()):
        raise ConfigError(f"action: shape {given.shape}, must be {space().shape} in {space()}")
    if given.dtype.kind == "u" and (given > np.iinfo(np.int64).max).any():
        raise ConfigError(f"action: {action!r}, must be whole numbers in {space()}")
    return np.ascontiguousarray(given.reshape(width), dtype=np.int64)


def _all_as_integers(actions: Any, count: int, width: int, space: Callable[[], gym.Space[Any]]) -> npt.NDArray[np.int64]:
    if type(actions) is np.ndarray and actions.dtype == np.int64 and actions.shape == (count, width) and actions.flags.c_contiguous:
        return actions
    given = _array(actions, space)
    if given.shape[:1] != (count,):
        raise ConfigError(f"actions: shape {given.shape}, must begin with the number of environments, {count}")
    return np.stack([_as_integers(action, width, space) for action in given])


def _refuse(values: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64], who: str) -> NoReturn:
    at = int(np.flatnonzero((values < 0) | (values > bounds))[0])
    raise ConfigError(f"action: {who}component {at} is {values[at]}, must be from 0 to {bounds[at]}")


def whole_number(action: Any, most: int) -> int:
    """A ``Discrete`` action from 0 to ``most``.

    Raises:
        ConfigError: not a whole number, or outside the range.
    """
    values = _as_integers(action, 1, lambda: gym.spaces.Discrete(most + 1))
    if not 0 <= values[0] <= most:
        _refuse(values, np.array([most]), "")
    return int(values[0])


class Codec(ABC):
    """What every action set has; the numbers of an action are W integers from 0 to ``bounds``."""

    __slots__ = ()

    @property
    @abstractmethod
    def width(self) -> int:
        """Integers in one action, W."""

    @property
    @abstractmethod
    def bounds(self) -> npt.NDArray[np.int64]:
        """(W,) largest value of each component; the smallest is 0."""

    @abstractmethod
    def space(self) -> gym.Space[Any]:
        """The action space of one environment."""

    def as_integers(self, action: Any) -> npt.NDArray[np.int64]:
        """``action`` as (W,) int64.

        Raises:
            ConfigError: another shape, or numbers that are not whole.
        """
        return _as_integers(action, self.width, self.space)

    def as_integers_of(self, actions: Any, count: int) -> npt.NDArray[np.int64]:
        """Actions of ``count`` environments as (count, W) int64; raises as ``as_integers`` does."""
        return _all_as_integers(actions, count, self.width, self.space)

    def refuse(self, values: npt.NDArray[np.int64], who: str = "") -> NoReturn:
        """Raise the error of an action outside the space."""
        _refuse(values, self.bounds, who)


@dataclass(frozen=True, slots=True)
class ActionCodec(Codec):
    """Action <-> Decision of the set ``admit`` for Q queues.

    Attributes:
        num_queues: Q.
        max_admit: counts 0 .. max_admit - 1 are exact, ``max_admit`` means as many as fit.
    """

    num_queues: int
    max_admit: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "max_admit", checks.integer("max_admit", self.max_admit, low=1, high=4096))

    @property
    def kind(self) -> int:
        return ADMIT

    @property
    def levels(self) -> npt.NDArray[np.float64]:
        return np.array([self.max_admit], dtype=np.float64)

    def space(self) -> gym.spaces.MultiDiscrete:
        return gym.spaces.MultiDiscrete([2] * self.num_queues + [self.max_admit + 1] * self.num_queues)

    @property
    def width(self) -> int:
        """Integers in one action."""
        return 2 * self.num_queues

    @property
    def mask_size(self) -> int:
        return self.num_queues * (self.max_admit + 3)

    @property
    def bounds(self) -> npt.NDArray[np.int64]:
        """(W,) largest value of each component; the smallest is 0."""
        return np.repeat([1, self.max_admit], self.num_queues)

    def sample_mask(self, legal: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int8], ...]:
        """``legal`` (mask size,) as ``MultiDiscrete.sample(mask=...)`` takes it: an int8 array for each component."""
        return tuple(np.split(legal.view(np.int8), np.cumsum(self.bounds + 1)[:-1]))

    def decode(self, action: npt.ArrayLike, out: Decision) -> Decision:
        """Write the decision an action stands for into ``out``; ``evict`` stays 0."""
        values = self.as_integers(action)
        if ((values < 0) | (values > self.bounds)).any():
            self.refuse(values)
        n = self.num_queues
        out.run[:] = values[:n]
        out.admit[:] = np.where(values[n:] >= self.max_admit, ADMIT_ALL, values[n:])
        return out

    def encode(self, decision: Decision) -> npt.NDArray[np.int64]:
        """The action nearest to a decision: counts of ``max_admit`` and more become "as many as fit"."""
        n = self.num_queues
        action = np.empty(2 * n, dtype=np.int64)
        action[:n] = decision.run != 0
        action[n:] = np.clip(decision.admit, 0, self.max_admit)
        return action


@dataclass(frozen=True, slots=True)
class ReserveCodec(Codec):
    """The action set ``reserve``.

    Attributes:
        thetas: over-commitment of each action; 0 admits nothing, ``math.inf`` as many as fit.
    """

    thetas: tuple[float, ...] = THETAS

    def __post_init__(self) -> None:
        if not isinstance(self.thetas, list | tuple | np.ndarray) or len(self.thetas) == 0:
            raise ConfigError(f"thetas: {checks.shown(self.thetas)}, must be numbers >= 0 and at least one")
        object.__setattr__(self, "thetas", tuple(checks.number("thetas", theta, high=math.inf) for theta in self.thetas))

    @property
    def kind(self) -> int:
        return RESERVE

    @property
    def levels(self) -> npt.NDArray[np.float64]:
        return np.array(self.thetas, dtype=np.float64)

    def space(self) -> gym.spaces.Discrete:  # type: ignore[type-arg, unused-ignore]  # generic in some versions of Gymnasium
        return gym.spaces.Discrete(len(self.thetas))

    @property
    def width(self) -> int:
        return 1

    @property
    def mask_size(self) -> int:
        return len(self.thetas)

    @property
    def bounds(self) -> npt.NDArray[np.int64]:
        """(1,) largest action; the smallest is 0."""
        return np.array([len(self.thetas) - 1])

    def sample_mask(self, legal: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
        """``legal`` (n,) as ``Discrete.sample(mask=...)`` takes it."""
        return legal.view(np.int8)


def make_codec(action_set: str, num_queues: int, max_admit: int, thetas: Sequence[float]) -> ActionCodec | ReserveCodec:
    """The action set of that name.

    Raises:
        ConfigError: unknown name, or parameters it refuses.
    """
    makers: dict[str, Any] = {
        "admit": lambda: ActionCodec(num_queues, max_admit),
        "reserve": lambda: ReserveCodec(thetas),  # type: ignore[arg-type]  # checked and converted there
    }
    if action_set not in makers:
        raise ConfigError(f"action_set: {action_set!r}, must be 'admit' or 'reserve'")
    codec: ActionCodec | ReserveCodec = makers[action_set]()
    return codec
