"""MC-SF: shortest first, admitted only if memory will never overflow (output lengths known)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from baselines.policy import RulePolicy, Setting, output_classes
from llmsched_env.compiled import compiled
from llmsched_env.engine.fleet import Rule
from llmsched_env.engine.moves import next_in_order, start_of_queues
from llmsched_env.engine.state import (
    C_BLOCK_SIZE,
    C_PRESET,
    I_RESIDENTS,
    I_WAITING,
    PRESET_PAPER,
    Q_LEFT,
    R_GENERATED,
    R_NEXT,
    R_OUTPUT,
    R_PROMPT,
    S_COMPUTED,
    S_GENERATED,
    S_OUTPUT,
    S_TARGET,
)
from llmsched_env.errors import ConfigError


@compiled
def fits_forever(held, remaining, capacity):  # type: ignore[no-untyped-def]
    """Whether requests that each grow by one token an iteration stay within capacity until all are done.

    Args:
        held: (n,) tokens held before the next iteration.
        remaining: (n,) iterations until completion, ascending.
        capacity: tokens.

    Memory only peaks just before a completion (Jaillet et al., arXiv 2502.07115): at remaining time t
    every request with remaining >= t holds held + t.
    """
    n = held.shape[0]
    total = 0
    for i in range(n - 1, -1, -1):
        total += held[i]
        # Requests ending together are all still there: the first of each group counts.
        if (i == 0 or remaining[i - 1] != remaining[i]) and total + (n - i) * remaining[i] > capacity:
            return False
    return True


@compiled
def insert(value, weight, n, values, weights):  # type: ignore[no-untyped-def]
    """Put (value, weight) where it belongs among the first n of two arrays sorted by value."""
    i = n
    while i > 0 and values[i - 1] > value:
        values[i], weights[i] = values[i - 1], weights[i - 1]
        i -= 1
    values[i], weights[i] = value, weight


@compiled
def shortest_that_fit(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision):  # type: ignore[no-untyped-def]
    """Admit in the engine's order until one does not fit. ``parameters``: the capacity in tokens."""
    decision[0, :] = 1
    decision[1, :] = 0
    decision[2, :] = 0
    if scalars[I_WAITING] == 0:
        return
    paper = settings[C_PRESET] == PRESET_PAPER
    # A block partly filled counts whole: at most block_size - 1 tokens more for each request.
    rounding = 0 if paper else settings[C_BLOCK_SIZE] - 1
    # Prefill takes one iteration, whose token is the first output in the vllm preset only.
    first_stage = 1 if paper else 0
    n = scalars[I_RESIDENTS]
    remaining = np.empty(n + scalars[I_WAITING], dtype=np.int64)
    held = np.empty(n + scalars[I_WAITING], dtype=np.int64)
    order = np.argsort(slots[S_OUTPUT, :n] - slots[S_GENERATED, :n])
    for at in range(n):
        i = order[at]
        remaining[at] = slots[S_OUTPUT, i] - slots[S_GENERATED, i]
        held[at] = max(slots[S_COMPUTED, i], slots[S_TARGET, i]) + rounding
    start_of_queues(settings, queues)
    q = next_in_order(settings, requests, queues)
    while q >= 0:
        r = queues[Q_LEFT, q]
        generated = requests[R_GENERATED, r]
        insert(
            requests[R_OUTPUT, r] - generated + first_stage, requests[R_PROMPT, r] + generated + rounding, n, remaining, held
        )  # fmt: skip
        # An empty engine takes the first request whatever it needs.
        if n > 0 and not fits_forever(held[: n + 1], remaining[: n + 1], parameters[0]):
            return
        n += 1
        decision[1, q] += 1
        queues[Q_LEFT, q] = requests[R_NEXT, r]
        q = next_in_order(settings, requests, queues)


class McSf(RulePolicy):
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
        capacity = (1.0 - margin) * self.engine.kv_capacity_tokens
        self.rule = Rule(shortest_that_fit, self.layout.num_queues, [capacity])
