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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.engine import state as st
from llmsched_env.engine.moves import next_in_order, start_of_queues
from llmsched_env.errors import ConfigError
from llmsched_env.observation import X_CAPACITY_TOKENS, X_ROWS, X_TABLE
from llmsched_env.types import ADMIT_ALL, Decision

ADMIT = 0
RESERVE = 1
THETAS = (0.0, 0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, math.inf)


@compiled
def fill_mask(queues, max_admit, out):  # type: ignore[no-untyped-def]
    """Write the mask of ``admit``, components concatenated, into ``out`` (2 Q + (max_admit + 1) Q,) bool."""
    num_queues = queues.shape[1]
    at = 2 * num_queues
    for q in range(num_queues):
        out[2 * q] = queues[st.Q_RESIDENTS, q] > 0
        out[2 * q + 1] = True
        waiting = queues[st.Q_WAITING, q]
        for n in range(max_admit):
            out[at + n] = n <= waiting
        out[at + max_admit] = waiting > 0
        at += max_admit + 1


@compiled
def decode_action(action, max_admit, decision):  # type: ignore[no-untyped-def]
    """Write the ``run`` and ``admit`` rows of ``decision`` (3, Q) int32 from an action (2 Q,) int64 of ``admit``."""
    num_queues = decision.shape[1]
    for q in range(num_queues):
        decision[0, q] = action[q]
        count = action[num_queues + q]
        decision[1, q] = ADMIT_ALL if count >= max_admit else count


@compiled
def decode_reserve(theta, settings, context, requests, slots, queues, scalars, decision):  # type: ignore[no-untyped-def]
    """Write the decision of ``reserve`` at this theta; the queues' scratch row holds the next request to look at."""
    num_queues, num_segments = queues.shape[1], settings[st.C_SEGMENTS]
    num_classes = num_queues // num_segments
    for q in range(num_queues):
        decision[0, q] = 1
        decision[1, q] = 0 if q % num_segments == 0 and theta < math.inf else ADMIT_ALL
    if theta == math.inf or theta == 0.0 or scalars[st.I_WAITING] == 0:
        return
    expected = context[X_ROWS + num_classes + num_queues :]
    top = int(context[X_TABLE]) - 1
    room = theta * context[X_CAPACITY_TOKENS]
    for i in range(scalars[st.I_RESIDENTS]):
        room -= slots[st.S_PROMPT, i] + expected[min(slots[st.S_GENERATED, i], top)]
    empty = scalars[st.I_RESIDENTS] == 0
    start_of_queues(settings, queues)
    best = next_in_order(settings, requests, queues)
    while best >= 0:
        r = queues[st.Q_LEFT, best]
        generated = requests[st.R_GENERATED, r]
        # A fresh request is expected to be as long as its class; a preempted one as those of its length.
        length = context[X_ROWS + best // num_segments] if generated == 0 else expected[min(generated, top)]
        room -= requests[st.R_PROMPT, r] + length
        if room < 0.0 and not empty:
            return
        empty = False
        decision[1, best] += 1
        queues[st.Q_LEFT, best] = requests[st.R_NEXT, r]
        best = next_in_order(settings, requests, queues)


@compiled
def decode(kind, levels, action, settings, context, requests, slots, queues, scalars, decision):  # type: ignore[no-untyped-def]
    """An action of either set; ``levels`` are its thetas, or max_admit alone."""
    if kind == RESERVE:
        decode_reserve(levels[action[0]], settings, context, requests, slots, queues, scalars, decision)
    else:
        decode_action(action, int(levels[0]), decision)


@compiled
def mask(kind, levels, queues, out):  # type: ignore[no-untyped-def]
    """The mask of either set."""
    if kind == RESERVE:
        out[:] = True
    else:
        fill_mask(queues, int(levels[0]), out)


@dataclass(frozen=True, slots=True)
class ActionCodec:
    """Action <-> Decision of the set ``admit`` for Q queues.

    Attributes:
        num_queues: Q.
        max_admit: counts 0 .. max_admit - 1 are exact, ``max_admit`` means as many as fit.
    """

    num_queues: int
    max_admit: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_admit <= 4096:
            raise ConfigError(f"max_admit: {self.max_admit}, must be from 1 to 4096")

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

    def decode(self, action: npt.ArrayLike, out: Decision) -> Decision:
        """Write the decision an action stands for into ``out``; ``evict`` stays 0."""
        values = np.ascontiguousarray(action, dtype=np.int64)
        n = self.num_queues
        if values.shape != (2 * n,):
            raise ConfigError(f"action: shape {values.shape}, must be ({2 * n},)")
        decode_action(values, self.max_admit, out.array)
        return out

    def encode(self, decision: Decision) -> npt.NDArray[np.int64]:
        """The action nearest to a decision: counts of ``max_admit`` and more become "as many as fit"."""
        n = self.num_queues
        action = np.empty(2 * n, dtype=np.int64)
        action[:n] = decision.run != 0
        action[n:] = np.clip(decision.admit, 0, self.max_admit)
        return action


@dataclass(frozen=True, slots=True)
class ReserveCodec:
    """The action set ``reserve``.

    Attributes:
        thetas: over-commitment of each action; 0 admits nothing, ``math.inf`` as many as fit.
    """

    thetas: tuple[float, ...] = THETAS

    def __post_init__(self) -> None:
        if not self.thetas or any(math.isnan(theta) or theta < 0 for theta in self.thetas):
            raise ConfigError(f"thetas: {self.thetas}, must be numbers >= 0 and at least one")

    @property
    def kind(self) -> int:
        return RESERVE

    @property
    def levels(self) -> npt.NDArray[np.float64]:
        return np.array(self.thetas, dtype=np.float64)

    def space(self) -> gym.spaces.Discrete:
        return gym.spaces.Discrete(len(self.thetas))

    @property
    def width(self) -> int:
        return 1

    @property
    def mask_size(self) -> int:
        return len(self.thetas)


def make_codec(action_set: str, num_queues: int, max_admit: int, thetas: Sequence[float]) -> ActionCodec | ReserveCodec:
    """The action set of that name.

    Raises:
        ConfigError: unknown name, or parameters it refuses.
    """
    makers: dict[str, Any] = {
        "admit": lambda: ActionCodec(num_queues, max_admit),
        "reserve": lambda: ReserveCodec(tuple(float(theta) for theta in thetas)),
    }
    if action_set not in makers:
        raise ConfigError(f"action_set: {action_set!r}, must be 'admit' or 'reserve'")
    codec: ActionCodec | ReserveCodec = makers[action_set]()
    return codec
