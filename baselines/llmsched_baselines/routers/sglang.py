"""SGLang's cache-aware rule."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from llmsched_baselines.routers.router import Door, Router
from llmsched_baselines.routers.shortest import shortest_queue
from llmsched_env import checks
from llmsched_env.cluster.routing import RouterRule, first_legal, may_take, outstanding
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Counts, Record


class SglangRecord(Record):
    threshold: float
    absolute: float
    relative: float
    tree: Counts  # (R,) tokens that were sent to each replica and were not cached there


@compiled
def cache_aware(cluster: Cluster, own: SglangRecord) -> int:
    cached = cluster.replicas.cached
    best = first_legal(cluster)
    smallest = best
    least = most = outstanding(cluster, best)
    for i in range(best + 1, cluster.num_replicas):
        if may_take(cluster, i):
            least, most = min(least, outstanding(cluster, i)), max(most, outstanding(cluster, i))
            if cached[i] > cached[best]:
                best = i
            if own.tree[i] < own.tree[smallest]:
                smallest = i
    if most - least > own.absolute and most > own.relative * least:
        best = shortest_queue(cluster)
    elif not cached[best] > own.threshold * cluster.call.prompt:
        best = smallest
    own.tree[best] += cluster.call.prompt - cached[best]
    return best


class Sglang(Router):
    """The rule ``cache_aware`` of SGLang's router.

    While queues are balanced the call goes to the replica that matches most of its prompt, if that is more than a share of it, else to
    the one to which least has been sent so far. Queues are unbalanced if the longest exceeds the shortest by more than an absolute number
    and by more than a factor; then the call goes to the shortest one, whatever is cached. (``sgl-router/src/policies/cache_aware.rs``,
    commit 026f853; defaults in ``sgl-router/src/policies/mod.rs``, commit 08fc574.)

    SGLang matches characters in a tree of what it has sent, cut back every so many seconds; this router sees tokens in the caches
    themselves, and what it has sent is a sum of tokens that is never cut back. Replicas that refuse count nowhere, while SGLang counts
    their load.

    Args:
        cache_threshold: share of the prompt, 0 to 1.
        balance_abs_threshold: calls.
        balance_rel_threshold: factor, at least 1.
    """

    name: ClassVar[str] = "sglang"

    def __init__(
        self, door: Door, cache_threshold: float = 0.5, balance_abs_threshold: int = 32, balance_rel_threshold: float = 1.1
    ) -> None:
        super().__init__(door)
        record = SglangRecord(tree=np.zeros(len(door.engines), dtype=np.int64))
        record.threshold = checks.number("router.cache_threshold", cache_threshold, high=1.0)
        record.absolute = float(checks.integer("router.balance_abs_threshold", balance_abs_threshold, low=0, high=2**31 - 1))
        record.relative = checks.number("router.balance_rel_threshold", balance_rel_threshold, low=1.0, high=1e6)
        self.rule = RouterRule(cache_aware, record, reads_cache=True)
