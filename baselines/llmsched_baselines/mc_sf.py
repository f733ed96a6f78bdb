"""MC-SF: shortest first, admitted only if memory will never overflow (output lengths known)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from llmsched_baselines.policy import RulePolicy, Setting, output_classes
from llmsched_baselines.walk import admit_and_go_on, begin_walk
from llmsched_env.compiled import compiled
from llmsched_env.engine.residents import computed, generated
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.state import Engine
from llmsched_env.errors import ConfigError
from llmsched_env.records import Numbers
from llmsched_env.types import Decision


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
def shortest_that_fit(engine: Engine, policy: Numbers, decision: Decision) -> None:
    """Admit in the engine's order until one does not fit. ``policy.parameters``: the capacity in tokens."""
    requests, settings = engine.requests, engine.settings
    q = begin_walk(engine, decision)
    if q < 0:
        return
    paper = settings.paper != 0
    # A block partly filled counts whole: at most block_size - 1 tokens more for each request.
    rounding = 0 if paper else settings.block_size - 1
    # Prefill takes one iteration, whose token is the first output in the vllm preset only.
    first_stage = 1 if paper else 0
    n = engine.num_residents
    remaining = np.empty(n + engine.num_waiting, dtype=np.int64)
    held = np.empty(n + engine.num_waiting, dtype=np.int64)
    left = np.empty(n, dtype=np.int64)
    tokens = np.empty(n, dtype=np.int64)
    r = engine.oldest
    for i in range(n):
        left[i] = requests.output[r] - generated(engine, r)
        tokens[i] = max(computed(engine, r), requests.target[r]) + rounding
        r = requests.next[r]
    order = np.argsort(left)
    for at in range(n):
        remaining[at] = left[order[at]]
        held[at] = tokens[order[at]]
    while q >= 0:
        r = engine.queues.left[q]
        kept = requests.base_generated[r]
        insert(requests.output[r] - kept + first_stage, requests.prompt[r] + kept + rounding, n, remaining, held)
        # An empty engine takes the first request whatever it needs.
        if n > 0 and not fits_forever(held[: n + 1], remaining[: n + 1], policy.parameters[0]):
            return
        n += 1
        q = admit_and_go_on(engine, q, decision)


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
        self.rule = Rule(shortest_that_fit, self.layout.num_queues, [capacity], known_lengths=True)
