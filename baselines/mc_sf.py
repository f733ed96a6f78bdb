"""MC-SF: shortest first, admitted only if memory will never overflow (output lengths known)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from baselines.policy import Policy, Setting, output_classes
from llmsched_env.backend import View
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision


def fits_forever(held: np.ndarray, remaining: np.ndarray, capacity: float) -> bool:
    """Whether requests that each grow by one token an iteration stay within capacity until all are done.

    Args:
        held: (n,) tokens held before the next iteration.
        remaining: (n,) iterations until completion.
        capacity: tokens.

    Memory only peaks just before a completion (Jaillet et al., arXiv 2502.07115): at remaining time t
    every request with remaining >= t holds held + t.
    """
    order = np.argsort(remaining, kind="stable")
    times = remaining[order]
    active = np.arange(times.shape[0], 0, -1)
    total = np.cumsum(held[order][::-1])[::-1]
    # Requests ending together are all still there: take the first of each group.
    first = np.searchsorted(times, times, side="left")
    return bool(np.all(total[first] + active[first] * times <= capacity))


class McSf(Policy):
    """Memory-constrained shortest first (Jaillet et al., arXiv 2502.07115).

    Classes are buckets by true output length, shortest first, first come first served inside a
    bucket; a request enters if the predicted KV at every future completion time fits.

    Args:
        num_classes: buckets of equal probability (types where the workload has types).
        margin: share of the capacity left free.
    """

    name: ClassVar[str] = "mc-sf"
    known_lengths: ClassVar[bool] = True

    def __init__(self, setting: Setting, num_classes: int = 16, margin: float = 0.0) -> None:
        if not 0 <= margin < 1:
            raise ConfigError(f"policy.margin: {margin}, must be in [0, 1)")
        self.layout = output_classes(setting.statistics, num_classes)
        self.engine = setting.engine_for(admission_order="class")
        self._capacity = (1.0 - margin) * self.engine.kv_capacity_tokens
        # A block partly filled counts whole: at most block_size - 1 tokens more for each request.
        self._rounding = 0 if self.engine.preset == "paper" else self.engine.block_size - 1
        self._first_stage = 1 if self.engine.preset == "paper" else 0
        self._decision = Decision.of([1] * self.layout.num_queues, [0] * self.layout.num_queues)

    def decide(self, view: View) -> Decision:
        admit = self._decision.admit
        admit[:] = 0
        if view.num_waiting == 0:
            return self._decision
        residents = view.resident_requests()
        assert residents.output_tokens is not None, "mc-sf needs revealed output lengths"
        held = (np.maximum(residents.computed, residents.prefill_target) + self._rounding).astype(np.float64)
        # Prefill takes one iteration, whose token is the first output in the vllm preset only.
        remaining = (residents.output_tokens - residents.generated).astype(np.float64)
        for j in range(self.layout.num_classes):
            q = self.layout.queue(j)
            waiting = int(view.waiting[j, 0])
            while admit[q] < waiting:
                limit = min(waiting, int(admit[q]) + 8)
                batch = view.waiting_requests(j, limit)
                assert batch.output_tokens is not None
                for i in range(int(admit[q]), limit):
                    new_held = np.append(held, batch.prompt_tokens[i] + batch.generated[i] + self._rounding)
                    new_remaining = np.append(remaining, batch.output_tokens[i] - batch.generated[i] + self._first_stage)
                    if not fits_forever(new_held, new_remaining, self._capacity) and held.size + admit.sum() > 0:
                        return self._decision
                    held, remaining = new_held, new_remaining
                    admit[q] += 1
        return self._decision
