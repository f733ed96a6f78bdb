"""What a cluster's environment does in one step, compiled: hand over, go on to the next call, observe.

The scalar and the vector environment enter here with handles (``llmsched_env.records``).
"""

from __future__ import annotations

from typing import Any

from llmsched_env.cluster import state as cs
from llmsched_env.cluster.kernel import POLICY, advance, cluster_at, give
from llmsched_env.cluster.observation import encode
from llmsched_env.cluster.replicas import may_take
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.engine.state import Engine
from llmsched_env.peak import PeakRecord, decode_peak
from llmsched_env.records import Counts, Record, Vector, reader
from llmsched_env.types import Decision

TOTALS = ("duration", "system_seconds", "completed", "completed_tokens", "met", "rejected")
"""What a cluster adds up from the start of an episode; the differences are a step's ``Outcome`` (``llmsched_env.cluster.reward``)."""


class LevelRecord(Record):
    """The admission of a replica whose level the router chooses (``llmsched_env.peak``)."""

    peak: PeakRecord
    levels: Vector  # (L,) shares of the KV capacity
    chosen: Counts  # (1,) place of the level in force; the first one until the router has chosen


level_at = reader(LevelRecord)


@compiled
def admit_to_level(engine: Engine, own: LevelRecord, decision: Decision) -> None:
    """Requests enter while the KV predicted for the residents stays below the level in force."""
    decode_peak(engine, own.peak, own.levels[own.chosen[0]], decision)


@compiled
def totals_of(cluster: Cluster, out: Any) -> None:
    """Write ``TOTALS``."""
    out[0] = cluster.settled
    out[1] = cluster.system_seconds
    out[2] = cluster.completed
    out[3] = cluster.completed_tokens
    out[4] = cluster.met
    out[5] = cluster.rejected


@compiled
def totals_at(cluster: Any, out: Any) -> None:
    """``totals_of`` a handle."""
    totals_of(cluster_at(cluster), out)


@compiled
def look(cluster: Any, handles: Any, call_row: Any, replica_rows: Any, legal: Any) -> None:
    """Write observation and mask: (8,) and (R, 14) float32, (R + levels,) bool."""
    record = cluster_at(cluster)
    encode(record, handles, call_row, replica_rows)
    for i in range(legal.shape[0]):  # every level is
        legal[i] = i >= record.num_replicas or (record.row >= 0 and may_take(record, i))


@compiled
def is_inside(cluster: Cluster, action: Any, levels: int) -> bool:
    """Whether an action (1 or 2,) int64 lies in its space."""
    return 0 <= action[0] < cluster.num_replicas and (levels == 0 or 0 <= action[1] < levels)


@compiled
def hand_on(cluster: Cluster, handles: Any, action: Any, levels: int, events: int) -> int:
    """One step. Returns why it stops: ``DECIDE``, ``ENDED``, or what has to be done in Python before it goes on.

    Where the chosen replica does not take the call it goes to the next one that does, all round, as a proxy tries another server when one
    refuses.

    Args:
        action: (1 or 2,) int64, inside its space; levels: how many there are, 0 for none.
        events: at most so many.
    """
    i = action[0]
    while not may_take(cluster, i):
        i = i + 1 if i + 1 < cluster.num_replicas else 0
    if levels > 0:
        level_at(handles[i, POLICY]).chosen[0] = action[1]
    reason = give(cluster, handles, i)
    return advance(cluster, handles, events) if reason == 0 else reason


@compiled
def hand_on_at(cluster: Any, handles: Any, action: Any, levels: int, events: int) -> int:
    """``hand_on`` of a handle; -1, with nothing done, where the action is outside its space or no call is to be routed."""
    record = cluster_at(cluster)
    if record.row < 0 or not is_inside(record, action, levels):
        return -1
    return hand_on(record, handles, action, levels, events)


@compiled
def step_range(first, last, clusters, handles, actions, levels, ends, outputs):  # type: ignore[no-untyped-def]
    """``hand_on`` and ``look`` for clusters ``first`` .. ``last`` - 1 that run; the others keep still.

    Args:
        clusters: (E,) handles; handles: (E, R, 4).
        actions: (E, 1 or 2) int64, inside their space where a cluster runs.
        ends: (E,) int64: on entry ``DECIDE`` where a cluster runs; then why each of those stopped.
        outputs: (E, 8) and (E, R, 14) float32, (E, R + levels) bool, (E, 6) float64 (``TOTALS``): written.

    Returns:
        how many stopped for another reason than the next call.
    """
    count = 0
    for e in range(first, last):
        if ends[e] == cs.DECIDE and cluster_at(clusters[e]).row >= 0:
            ends[e] = hand_on(cluster_at(clusters[e]), handles[e], actions[e], levels, 1 << 40)
            count += ends[e] != cs.DECIDE
        look(clusters[e], handles[e], outputs[0][e], outputs[1][e], outputs[2][e])
        totals_of(cluster_at(clusters[e]), outputs[3][e])
    return count
