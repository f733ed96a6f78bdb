"""Actions of an agent <-> decisions of the engine, and action masks. Four action sets.

``peak`` (default): a level of predicted KV memory (``llmsched_env.peak``): everything runs, boundary queues are admitted,
and requests enter from outside while the KV predicted for the residents, now and later, stays below level * C. With
``orders`` a second component chooses in which order they enter. Every action is legal.

``admit``: ``MultiDiscrete([2] * Q + [max_admit + 1] * Q)``: the first Q components are ``run``, the others ``admit``; the
largest count stands for "as many as fit". Eviction is not in the agent's action space: the engine evicts when memory
runs out, expert policies may ask for it. Mask: ``run = 0`` (hold) is offered only where the segment has residents;
``admit = n`` only up to the length of the queue, "as many as fit" only where the queue is not empty. ``run = 1`` and
``admit = 0`` are always legal.

``reserve``: a choice of how far admission may over-commit KV memory: as ``peak``, but requests enter while the final KV
to expect of all residents stays within ``theta * C``. Expected lengths come from the scenario's statistics
(``llmsched_env.forecast``). An empty engine takes the first request whatever it is expected to need, unless theta is 0.
Every action is legal. The ``reserve`` policy of ``baselines`` is one constant action of this set.

``operate``: what an operator turns: a level of predicted KV memory as in ``peak``; with classes how waiting counts against work, a
number of seconds tau0, requests entering by (wait + tau0) / work (``llmsched_env.operate``); and in the ``vllm`` preset a token
budget in whole tiles, beyond which no request becomes resident. The work of a class is that to expect of its requests
(``llmsched_env.work``). Every action is legal.

With ``token_budgets`` each set has one more component, the last: the token budget of the iterations, 0 for the
engine's own (``Decision.token_budget``). An action of one component is ``Discrete``, of several ``MultiDiscrete``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
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
from llmsched_env.operate import decode_operate
from llmsched_env.peak import (
    LEVELS,
    NO_TABLES,
    ORDERS,
    TRUSTS,
    PeakRecord,
    PeakTables,
    decode_peak,
    decode_peak_by_work,
    run_everything,
)
from llmsched_env.pointers import address_of, call
from llmsched_env.records import Indices, Record, Vector
from llmsched_env.trust import decode_peak_by_trust
from llmsched_env.types import ADMIT_ALL, TILE_TOKENS, Decision

ADMIT = 0
RESERVE = 1
PEAK = 2
OPERATE = 3
THETAS = (0.0, 0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, math.inf)
AGEING = (0.0, 10.0, 60.0, 300.0, math.inf)
"""Seconds tau0 that ``operate`` offers; infinite: waiting does not count."""
BUDGETS = (128, 256, 512, 1024, 0)
"""Token budgets that ``operate`` offers, as far as the engine's own is not smaller."""


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
    """An action set as compiled code reads it. W components, B token budgets."""

    kind: int  # ADMIT, RESERVE, PEAK or OPERATE
    sizes: Indices  # (W,) values of each component
    levels: Vector  # thetas of ``reserve``, levels of ``peak`` and ``operate``; max_admit alone of ``admit``
    orders: Indices  # what the second component means, as places in ``ORDERS`` (``peak``) or in ``ageing``; empty: there is none
    ageing: Vector  # (A,) seconds tau0 of ``operate``
    work: Vector  # (J,) work to expect of a request of each class, of ``operate``
    budgets: Vector  # (B,) what the last component means; empty: there is none
    forecast: Forecast
    peak: PeakRecord
    choose: int  # address of ``decode_level``, where the set has levels


@compiled
def decode_theta(engine: Engine, codec: CodecRecord, decision: Decision, level: int, order: int) -> None:
    """``decode_reserve`` at a level by its number."""
    decode_reserve(engine, codec.levels[level], codec.forecast, decision)


@compiled
def decode_level(engine: Engine, codec: CodecRecord, decision: Decision, level: int, order: int) -> None:
    """A level of ``peak`` and a place in ``ORDERS``, by their numbers."""
    if order == 0:
        decode_peak(engine, codec.peak, codec.levels[level], decision)
    elif order == 1:
        decode_peak_by_work(engine, codec.peak, codec.levels[level], decision)
    else:
        codec.peak.prior.belief.trust = TRUSTS[order - 2]
        decode_peak_by_trust(engine, codec.peak, codec.levels[level], decision)


@compiled
def decode_operation(engine: Engine, codec: CodecRecord, decision: Decision, level: int, order: int) -> None:
    """A level of ``operate`` and a place in ``ageing``, by their numbers; the token budget is in the decision already."""
    decode_operate(engine, codec.peak, codec.levels[level], codec.work, codec.ageing[order], decision)


def link_codec(codec: CodecRecord) -> None:
    """Write the addresses of an action set's functions; they are good in this process only."""
    if codec.kind == ADMIT:
        codec.choose = 0
    else:
        function = {RESERVE: decode_theta, PEAK: decode_level, OPERATE: decode_operation}[codec.kind]
        codec.choose = address_of(function, (Engine, CodecRecord, Decision, int, int))


@compiled
def is_legal(codec, action):  # type: ignore[no-untyped-def]
    """Whether an action (W,) int64 lies in its space; ``codec`` is a ``CodecRecord``."""
    sizes = codec.sizes
    for i in range(sizes.shape[0]):  # noqa: SIM110 - a generator would be compiled to a slower loop
        if not 0 <= action[i] < sizes[i]:
            return False
    return True


@compiled
def decode(engine, codec, action, decision):  # type: ignore[no-untyped-def]
    """An action (W,) int64 of any set; ``codec`` is a ``CodecRecord``."""
    # First: some orders ask for no more than the budget can begin.
    decision.token_budget = int(codec.budgets[action[action.shape[0] - 1]]) if codec.budgets.shape[0] > 0 else 0
    if codec.kind == ADMIT:
        decode_action(action, engine.settings.num_queues, int(codec.levels[0]), decision)
    else:
        order = codec.orders[action[1]] if codec.orders.shape[0] > 0 else 0
        call(codec.choose, engine, codec, decision, action[0], order)


@compiled
def mask(engine, codec, out):  # type: ignore[no-untyped-def]
    """The mask of any set."""
    first = 0
    if codec.kind == ADMIT:
        max_admit, num_queues = int(codec.levels[0]), engine.settings.num_queues
        fill_mask(engine, max_admit, out)
        first = num_queues * (max_admit + 3)
    for n in range(first, out.shape[0]):
        out[n] = True


def _array(action: Any, space: Callable[[], gym.Space[Any]]) -> npt.NDArray[Any]:
    try:
        return np.asarray(action)
    except (ValueError, TypeError) as error:  # rows of different lengths
        raise ConfigError(f"action: {action!r}, must be whole numbers in {space()}") from error


def as_integers(action: Any, width: int, space: Callable[[], gym.Space[Any]]) -> npt.NDArray[np.int64]:
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


def all_as_integers(actions: Any, count: int, width: int, space: Callable[[], gym.Space[Any]]) -> npt.NDArray[np.int64]:
    if type(actions) is np.ndarray and actions.dtype == np.int64 and actions.shape == (count, width) and actions.flags.c_contiguous:
        return actions
    given = _array(actions, space)
    if given.shape[:1] != (count,):
        raise ConfigError(f"actions: shape {given.shape}, must begin with the number of environments, {count}")
    return np.stack([as_integers(action, width, space) for action in given])


def _refuse(values: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64], who: str) -> NoReturn:
    at = int(np.flatnonzero((values < 0) | (values > bounds))[0])
    raise ConfigError(f"action: {who}component {at} is {values[at]}, must be from 0 to {bounds[at]}")


def whole_number(action: Any, most: int) -> int:
    """A ``Discrete`` action from 0 to ``most``.

    Raises:
        ConfigError: not a whole number, or outside the range.
    """
    values = as_integers(action, 1, lambda: gym.spaces.Discrete(most + 1))
    if not 0 <= values[0] <= most:
        _refuse(values, np.array([most]), "")
    return int(values[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec(ABC):
    """What every action set has: an action is W integers, component i from 0 to ``sizes[i] - 1``.

    Attributes:
        token_budgets: what the last component means, in tokens, 0 for the engine's own; empty: there is no such component.
    """

    token_budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        budgets = checks.integers("token_budgets", self.token_budgets, most=4096)
        for budget in budgets:
            if 0 < budget < TILE_TOKENS:
                raise ConfigError(f"token_budgets: {budget}, must be 0 (the engine's own) or at least {TILE_TOKENS}")
        object.__setattr__(self, "token_budgets", budgets)

    @property
    @abstractmethod
    def kind(self) -> int:
        """``ADMIT``, ``RESERVE``, ``PEAK`` or ``OPERATE``."""

    @property
    @abstractmethod
    def choices(self) -> tuple[int, ...]:
        """Sizes of the components without the token budget."""

    @property
    @abstractmethod
    def numbers(self) -> npt.NDArray[np.float64]:
        """What ``CodecRecord.levels`` holds."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """(W,) sizes of the components."""
        return (*self.choices, len(self.token_budgets)) if self.token_budgets else self.choices

    @property
    def width(self) -> int:
        """Integers in one action, W."""
        return len(self.sizes)

    @property
    def mask_size(self) -> int:
        """Bools of a mask: one for each value of each component."""
        return sum(self.sizes)

    @property
    def bounds(self) -> npt.NDArray[np.int64]:
        """(W,) largest value of each component; the smallest is 0."""
        return np.array(self.sizes, dtype=np.int64) - 1

    def space(self) -> gym.Space[Any]:
        """The action space of one environment."""
        return gym.spaces.Discrete(self.sizes[0]) if self.width == 1 else gym.spaces.MultiDiscrete(list(self.sizes))

    def sample_mask(self, legal: npt.NDArray[np.bool_]) -> Any:
        """``legal`` (mask size,) as ``sample(mask=...)`` of the space takes it: int8, an array for each of several components."""
        flags = legal.view(np.int8)
        return flags if self.width == 1 else tuple(np.split(flags, np.cumsum(self.sizes)[:-1]))

    def record(self, forecast: Forecast, peak: PeakTables = NO_TABLES) -> CodecRecord:
        """The action set as compiled code reads it, with scratch of its own."""
        record = CodecRecord(
            sizes=np.array(self.sizes, dtype=np.int64),
            levels=self.numbers,
            orders=self.order_numbers,
            ageing=self.waits,
            work=peak.work,
            budgets=np.array(self.token_budgets, dtype=np.float64),
            forecast=forecast,
            peak=peak.record(),
        )
        record.kind = self.kind
        return record

    @property
    def order_numbers(self) -> npt.NDArray[np.int64]:
        """What ``CodecRecord.orders`` holds."""
        return np.zeros(0, dtype=np.int64)

    @property
    def waits(self) -> npt.NDArray[np.float64]:
        """What ``CodecRecord.ageing`` holds."""
        return np.zeros(0)

    def as_integers(self, action: Any) -> npt.NDArray[np.int64]:
        """``action`` as (W,) int64.

        Raises:
            ConfigError: another shape, or numbers that are not whole.
        """
        return as_integers(action, self.width, self.space)

    def as_integers_of(self, actions: Any, count: int) -> npt.NDArray[np.int64]:
        """Actions of ``count`` environments as (count, W) int64; raises as ``as_integers`` does."""
        return all_as_integers(actions, count, self.width, self.space)

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
        Codec.__post_init__(self)
        object.__setattr__(self, "max_admit", checks.integer("max_admit", self.max_admit, low=1, high=4096))

    @property
    def kind(self) -> int:
        return ADMIT

    @property
    def choices(self) -> tuple[int, ...]:
        return (2,) * self.num_queues + (self.max_admit + 1,) * self.num_queues

    @property
    def numbers(self) -> npt.NDArray[np.float64]:
        return np.array([self.max_admit], dtype=np.float64)

    def decode(self, action: npt.ArrayLike, out: Decision) -> Decision:
        """Write the decision an action stands for into ``out``; ``evict`` stays as it is."""
        values = self.as_integers(action)
        if ((values < 0) | (values > self.bounds)).any():
            self.refuse(values)
        n = self.num_queues
        out.run[:] = values[:n]
        out.admit[:] = np.where(values[n : 2 * n] >= self.max_admit, ADMIT_ALL, values[n : 2 * n])
        out.token_budget = self.token_budgets[values[-1]] if self.token_budgets else 0
        return out

    def encode(self, decision: Decision) -> npt.NDArray[np.int64]:
        """The action nearest to a decision: counts of ``max_admit`` and more become "as many as fit"."""
        n = self.num_queues
        action = np.zeros(self.width, dtype=np.int64)
        action[:n] = decision.run != 0
        action[n : 2 * n] = np.clip(decision.admit, 0, self.max_admit)
        if self.token_budgets:
            budgets = np.array([budget or np.inf for budget in self.token_budgets])
            asked = decision.token_budget or np.inf
            action[-1] = np.argmin(np.where(budgets == asked, 0.0, np.abs(np.minimum(budgets, 1e9) - min(asked, 1e9))))
        return action


def _checked_levels(name: str, levels: Any) -> tuple[float, ...]:
    if not isinstance(levels, list | tuple | np.ndarray) or len(levels) == 0:
        raise ConfigError(f"{name}: {checks.shown(levels)}, must be numbers >= 0 and at least one")
    return tuple(checks.number(name, level, high=math.inf) for level in levels)


@dataclass(frozen=True, slots=True)
class ReserveCodec(Codec):
    """The action set ``reserve``.

    Attributes:
        thetas: over-commitment of each action; 0 admits nothing, ``math.inf`` as many as fit.
    """

    thetas: tuple[float, ...] = THETAS

    def __post_init__(self) -> None:
        Codec.__post_init__(self)
        object.__setattr__(self, "thetas", _checked_levels("thetas", self.thetas))

    @property
    def kind(self) -> int:
        return RESERVE

    @property
    def choices(self) -> tuple[int, ...]:
        return (len(self.thetas),)

    @property
    def numbers(self) -> npt.NDArray[np.float64]:
        return np.array(self.thetas, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class PeakCodec(Codec):
    """The action set ``peak``.

    Attributes:
        levels: shares of the KV capacity that the predicted peak may reach; ``math.inf`` admits as many as fit.
        orders: names of ``ORDERS`` that the second component chooses from; empty: there is no such component, and requests
            enter in the engine's order.
    """

    levels: tuple[float, ...] = LEVELS
    orders: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Codec.__post_init__(self)
        object.__setattr__(self, "levels", _checked_levels("levels", self.levels))
        if isinstance(self.orders, str) or not isinstance(self.orders, list | tuple):
            raise ConfigError(f"orders: {checks.shown(self.orders)}, must be a list of names among {', '.join(ORDERS)}")
        for order in self.orders:
            checks.one_of("orders", order, ORDERS)
        object.__setattr__(self, "orders", tuple(self.orders))

    @property
    def kind(self) -> int:
        return PEAK

    @property
    def choices(self) -> tuple[int, ...]:
        return (len(self.levels), len(self.orders)) if self.orders else (len(self.levels),)

    @property
    def numbers(self) -> npt.NDArray[np.float64]:
        return np.array(self.levels, dtype=np.float64)

    @property
    def order_numbers(self) -> npt.NDArray[np.int64]:
        return np.array([ORDERS.index(order) for order in self.orders], dtype=np.int64)


@dataclass(frozen=True, slots=True)
class OperateCodec(Codec):
    """The action set ``operate``.

    Attributes:
        levels: as of ``PeakCodec``.
        ageing: seconds tau0 that the second component chooses from, >= 0, ``math.inf`` for least work first; empty: there is no such
            component, and least work enters first.
        token_budgets: whole tiles of ``TILE_TOKENS``, and 0 for the engine's own.
    """

    levels: tuple[float, ...] = LEVELS
    ageing: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        Codec.__post_init__(self)
        object.__setattr__(self, "levels", _checked_levels("levels", self.levels))
        none = isinstance(self.ageing, list | tuple) and len(self.ageing) == 0
        object.__setattr__(self, "ageing", () if none else _checked_levels("ageing", self.ageing))
        for budget in self.token_budgets:
            if budget % TILE_TOKENS:
                raise ConfigError(f"token_budgets: {budget}, must be a multiple of {TILE_TOKENS} with action_set='operate'")

    @property
    def kind(self) -> int:
        return OPERATE

    @property
    def choices(self) -> tuple[int, ...]:
        return (len(self.levels), len(self.ageing)) if self.ageing else (len(self.levels),)

    @property
    def numbers(self) -> npt.NDArray[np.float64]:
        return np.array(self.levels, dtype=np.float64)

    @property
    def order_numbers(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self.ageing))

    @property
    def waits(self) -> npt.NDArray[np.float64]:
        return np.array(self.ageing or (math.inf,), dtype=np.float64)
