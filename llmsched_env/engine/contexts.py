"""The contexts of the single decodes of a batch, for a time model that asks for them (compiled).

The sums of ``describe_batch`` follow from counters of groups. A longest context does not: this walks over the residents.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine.residents import computed
from llmsched_env.engine.state import BOUNDARY, PREFILL, Engine


@compiled
def decodes_now(engine: Engine, r: int) -> bool:
    """Whether resident r is one of the decodes of the batch just scheduled."""
    requests, settings = engine.requests, engine.settings
    if requests.group[r] != settings.num_queues:
        return engine.queues.runs[requests.group[r]] != 0
    if requests.status[r] == BOUNDARY:
        return False
    if settings.paper != 0:
        return requests.status[r] != PREFILL and settings.boundary_slot == 0
    return requests.tokens[r] > 0 and requests.base_computed[r] >= requests.target[r]


@compiled
def describe_contexts(engine: Engine) -> None:
    """Longest and shortest context of a decode, and the sum of the squares, each context with its new token."""
    longest = 0
    shortest = 0
    squares = 0.0
    r = engine.oldest
    while r >= 0:
        if decodes_now(engine, r):
            tokens = computed(engine, r) + 1
            longest = max(longest, tokens)
            shortest = tokens if shortest == 0 else min(shortest, tokens)
            squares += float(tokens) * float(tokens)
        r = engine.requests.next[r]
    batch = engine.batch
    batch.decode_longest = float(longest)
    batch.decode_shortest = float(shortest)
    batch.decode_squares = squares
