"""Admission by expected final KV: over-commit memory by a factor theta, no more."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from baselines.policy import Policy, Setting, prompt_classes
from llmsched_env.backend import View
from llmsched_env.errors import ConfigError
from llmsched_env.types import ADMIT_ALL, Decision, FloatArray, LengthStatistics, QueueLayout


def expected_output(statistics: LengthStatistics) -> FloatArray:
    """(max_output + 1,) E[output | output > g] for g = 0, 1, ...; g + 1 where nothing longer is known."""
    lengths = np.arange(statistics.max_output + 1, dtype=np.float64)
    order = np.argsort(statistics.output, kind="stable")
    output, weight = statistics.output[order], statistics.weight[order]
    # suffix sums of weight and weight * output over the support points longer than g
    above = np.concatenate([np.cumsum(weight[::-1])[::-1], [0.0]])
    tokens = np.concatenate([np.cumsum((weight * output)[::-1])[::-1], [0.0]])
    first = np.searchsorted(output, lengths, side="right")
    known = above[first] > 1e-12
    return np.where(known, tokens[first] / np.where(known, above[first], 1.0), lengths + 1)


class Reservation:
    """Counts how many outside requests may enter while expected final KV fits theta * C."""

    def __init__(self, statistics: LengthStatistics, theta: float, capacity_tokens: int, layout: QueueLayout) -> None:
        if not (np.isfinite(theta) and theta > 0):
            raise ConfigError(f"policy.theta: {theta}, must be finite and > 0")
        self._expected = expected_output(statistics)
        self._limit = theta * capacity_tokens
        self._layout = layout

    def grant(self, view: View, admit: np.ndarray) -> None:
        """Fill ``admit`` ((J * K,) int32): classes in the engine's admission order, until one does not fit."""
        admit[:: self._layout.num_segments] = 0
        if view.num_waiting == 0:
            return
        residents = view.resident_requests()
        top = self._expected.shape[0] - 1
        final = residents.prompt_tokens + self._expected[np.minimum(residents.generated, top)]
        room = self._limit - float(final.sum())
        for j in range(self._layout.num_classes):
            # The mean request bounds how many are worth looking at in one step.
            limit = 16
            while room > 0:
                waiting = view.waiting_requests(j, limit)
                need = waiting.prompt_tokens + self._expected[np.minimum(waiting.generated, top)]
                granted = int(np.searchsorted(np.cumsum(need), room, side="right"))
                if granted < need.shape[0] or need.shape[0] < limit:
                    admit[self._layout.queue(j)] = granted
                    room -= float(need[:granted].sum())
                    if granted < need.shape[0]:
                        return
                    break
                limit *= 4
        if view.num_residents == 0 and not admit.any():
            # An empty engine takes the head whatever it is expected to need.
            j = int(np.argmax(view.waiting[:, 0] > 0))
            admit[self._layout.queue(j)] = 1


class Reserve(Policy):
    """First come, first served while sum(prompt + E[output | generated]) of residents <= theta * C.

    Expected lengths come from the scenario's statistics; no request's own output length is read.

    Args:
        theta: over-commitment; 1 plans for the mean, above 1 bets on requests ending before others grow.
    """

    name: ClassVar[str] = "reserve"

    def __init__(self, setting: Setting, theta: float = 1.1) -> None:
        self.layout = QueueLayout()
        self.engine = setting.engine_for()
        self._reservation = Reservation(setting.statistics, theta, self.engine.kv_capacity_tokens, self.layout)
        self._decision = Decision.of([1], [0])

    def decide(self, view: View) -> Decision:
        self._reservation.grant(view, self._decision.admit)
        return self._decision


class ShortestPrompt(Policy):
    """Prompt-length buckets, shortest first; greedy, or with a reservation.

    Args:
        num_classes: buckets of equal probability.
        theta: over-commitment of the reservation; None admits everything that fits.
    """

    name: ClassVar[str] = "shortest-prompt"

    def __init__(self, setting: Setting, num_classes: int = 8, theta: float | None = None) -> None:
        if num_classes < 1:
            raise ConfigError(f"policy.num_classes: {num_classes}, must be >= 1")
        self.layout = prompt_classes(setting.statistics, num_classes)
        self.engine = setting.engine_for(admission_order="class")
        self._reservation = (
            None
            if theta is None
            else Reservation(setting.statistics, theta, self.engine.kv_capacity_tokens, self.layout)
        )
        self._decision = Decision.of([1] * self.layout.num_queues, [ADMIT_ALL] * self.layout.num_queues)

    def decide(self, view: View) -> Decision:
        if self._reservation is not None:
            self._reservation.grant(view, self._decision.admit)
        return self._decision
