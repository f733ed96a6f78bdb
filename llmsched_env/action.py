"""Actions of an agent <-> decisions of the engine, and action masks.

``MultiDiscrete([2] * Q + [max_admit + 1] * Q)``: the first Q components are ``run``, the others
``admit``; the largest count stands for "as many as fit". Eviction is not in the agent's action
space: the engine evicts when memory runs out, expert policies may ask for it.

Mask: ``run = 0`` (hold) is offered only where the segment has residents; ``admit = n`` only up to
the length of the queue, "as many as fit" only where the queue is not empty. ``run = 1`` and
``admit = 0`` are always legal.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.engine import state as st
from llmsched_env.errors import ConfigError
from llmsched_env.types import ADMIT_ALL, Decision


@compiled
def fill_mask(queues, max_admit, out):  # type: ignore[no-untyped-def]
    """Write the mask, components concatenated, into ``out`` (2 Q + (max_admit + 1) Q,) bool."""
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
    """Write the ``run`` and ``admit`` rows of ``decision`` (3, Q) int32 from an action (2 Q,) int64."""
    num_queues = decision.shape[1]
    for q in range(num_queues):
        decision[0, q] = action[q]
        count = action[num_queues + q]
        decision[1, q] = ADMIT_ALL if count >= max_admit else count


@dataclass(frozen=True, slots=True)
class ActionCodec:
    """Action <-> Decision for Q queues.

    Attributes:
        num_queues: Q.
        max_admit: counts 0 .. max_admit - 1 are exact, ``max_admit`` means as many as fit.
    """

    num_queues: int
    max_admit: int

    def __post_init__(self) -> None:
        if not 1 <= self.max_admit <= 4096:
            raise ConfigError(f"max_admit: {self.max_admit}, must be from 1 to 4096")

    def space(self) -> gym.spaces.MultiDiscrete:
        return gym.spaces.MultiDiscrete([2] * self.num_queues + [self.max_admit + 1] * self.num_queues)

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
