"""llm-d's weighted scorers."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from llmsched_baselines.routers.router import Door, Router
from llmsched_env import checks
from llmsched_env.cluster.routing import RouterRule, chance, first_legal, may_take
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Counts, Record


class ScorerRecord(Record):
    queue: float
    kv: float
    prefix: float
    block_size: int
    memory: Counts  # (1,) the generator's state


@compiled
def scorers(cluster: Cluster, own: ScorerRecord) -> int:
    replicas, blocks = cluster.replicas, cluster.call.prompt // own.block_size
    first = first_legal(cluster)
    least = most = replicas.waiting[first]
    for i in range(first + 1, cluster.num_replicas):
        if may_take(cluster, i):
            least, most = min(least, replicas.waiting[i]), max(most, replicas.waiting[i])
    best, highest, equal = first, -1.0, 0
    for i in range(first, cluster.num_replicas):
        if may_take(cluster, i):
            score = own.queue * ((most - replicas.waiting[i]) / (most - least) if most > least else 1.0)
            score += own.kv * (1.0 - replicas.kv_used[i] / replicas.kv_capacity[i])
            if blocks > 0:
                score += own.prefix * (replicas.cached[i] // own.block_size) / blocks
            if score > highest:
                best, highest, equal = i, score, 1
            elif score == highest:  # each of the equal ones is as likely
                equal += 1
                if chance(own, 0, equal) == 0:
                    best = i
    return best


class LlmD(Router):
    """The largest weighted sum of three scores, drawn among equal ones.

    They are the scorers of llm-d and of Kubernetes' Gateway API inference extension, on which it builds.

    Three scores from 0 to 1. Queue: (longest - own) / (longest - shortest) of calls that wait, 1 where all queues are alike. KV: share of
    the blocks that is not in use. Prefix: share of the prompt's whole blocks that is cached. Weights 2, 2 and 3 are those of the
    extension's chart. (``pkg/epp/scheduling/framework/plugins/``: ``scorer/queue.go``, commit 02308be;
    ``kvcacheutilizationscorer/kvcache_utilization.go``, commit a172f54; ``multi/prefix/plugin.go``, commit 00913f9;
    ``config/charts/inferencepool/templates/epp-config.yaml``, commit 0ae94df.)

    There the prefix score comes from an index of what was sent, in blocks of 64 characters, at most 256 of them, unless llm-d's precise
    scorer reads the caches by events; this router sees the caches themselves.

    Args:
        queue, kv, prefix: weights.
    """

    name: ClassVar[str] = "llm-d"

    def __init__(self, door: Door, queue: float = 2.0, kv: float = 2.0, prefix: float = 3.0) -> None:
        super().__init__(door)
        record = ScorerRecord(memory=np.zeros(1, dtype=np.int64))
        record.queue = checks.number("router.queue", queue, high=1e6)
        record.kv = checks.number("router.kv", kv, high=1e6)
        record.prefix = checks.number("router.prefix", prefix, high=1e6)
        record.block_size = door.block_size
        self.rule = RouterRule(scorers, record, reads_cache=True)
