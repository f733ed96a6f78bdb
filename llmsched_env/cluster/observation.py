"""What a learned router observes: one table, one place.

Two float32 arrays, every element in [0, 1]; the scales are those of ``llmsched_env.observation`` (*share*, *count*, *time*) and *tokens*:
log(1 + n) / log(1 + 1,000,000), clipped.

``replicas``, (R, 14), one row each:

===  ===========================  ======  ==========================================================================
col  name                         scale   holds
===  ===========================  ======  ==========================================================================
0    legal                        share   1: can be chosen for this call
1    kv_used                      share   KV in use, of its own capacity
2    kv_free                      tokens  tokens that the free blocks hold
3    waiting                      count   calls handed to it that are not admitted
4    running                      count   residents
5    pending                      tokens  prompt tokens that it has still to compute: of those who wait and of residents
6    cached                       share   tokens of this call's prompt in its prefix cache, of the prompt
7    iteration                    time    measured seconds of its latest iterations, recent ones counting most; 0 before the first
8    ttft                         time    seconds from hand-over to first token of its latest requests, the same
9    home                         share   1: the program's latest call went there
10   kv_capacity                  tokens  tokens that all its blocks hold
11   decode_seconds               time    an iteration of 32 decodes of 1,024 tokens by its calibration
12   prefill_seconds              time    what 512 prompt tokens add to an iteration by its calibration
13   expected                     time    an iteration in which all its residents decode, by its calibration
===  ===========================  ======  ==========================================================================

``call``, (8,):

===  ===========================  ======  ==========================================================================
0    prompt                       tokens  prompt tokens
1    predicted                    tokens  output tokens as predicted, 0 where nobody predicts
2    turn                         count   depth in its program, 0 for the first call
3    new                          share   1: the first call of its program
4    routed                       count   how many times it was handed over before
5    age                          time    seconds since it arrived
6    part                         share   0: whole; 1/2: the prompt; 1: the answer
7    in_system                    count   calls in the cluster over the number of replicas
===  ===========================  ======  ==========================================================================

No output length enters any element, nor a call to come. Between the measured iteration (7) and what the calibration says (13) lies what
no metric says outright: that a replica is slower than it should be. After the last call the row of the call is 0.
"""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np

from llmsched_env.cluster.kernel import ENGINE
from llmsched_env.cluster.replicas import expected_seconds, find_cached, may_take
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.engine.step import engine_at
from llmsched_env.observation import _count, _share, _time

REPLICA_COLUMNS = (
    "legal", "kv_used", "kv_free", "waiting", "running", "pending", "cached", "iteration", "ttft", "home", "kv_capacity",
    "decode_seconds", "prefill_seconds", "expected",
)  # fmt: skip
CALL_COLUMNS = ("prompt", "predicted", "turn", "new", "routed", "age", "part", "in_system")
_TOKENS = 1.0 / math.log(1.0 + 1e6)


def observation_space(num_replicas: int) -> gym.spaces.Dict:
    """The space of the table above; names in the order in which Gymnasium sorts them."""
    return gym.spaces.Dict(
        {
            "call": gym.spaces.Box(0.0, 1.0, (len(CALL_COLUMNS),), np.float32),
            "replicas": gym.spaces.Box(0.0, 1.0, (num_replicas, len(REPLICA_COLUMNS)), np.float32),
        }
    )


@compiled
def _tokens(n):  # type: ignore[no-untyped-def]
    return min(math.log(1.0 + n) * _TOKENS, 1.0)


@compiled
def encode(cluster: Cluster, handles: Any, call_row: Any, replica_rows: Any) -> None:
    """Write the table.

    Args:
        handles: (R, 4) of the replicas.
        call_row: (8,) float32, written; replica_rows: (R, 14) float32, written.
    """
    encode_call(cluster, call_row)
    for i in range(cluster.num_replicas):
        encode_replica(cluster, engine_at(handles[i, ENGINE]), i, replica_rows[i])


@compiled
def encode_call(cluster: Cluster, out: Any) -> None:
    seen = cluster.call
    if cluster.row < 0:
        for k in range(out.shape[0]):
            out[k] = 0.0
        return
    out[0] = _tokens(seen.prompt)
    out[1] = _tokens(seen.predicted)
    out[2] = _count(seen.turn)
    out[3] = 1.0 if seen.home < 0 else 0.0
    out[4] = _count(seen.routed)
    out[5] = _time(seen.age)
    out[6] = 0.5 * seen.part
    out[7] = _count(int(cluster.in_system / cluster.num_replicas))


@compiled
def encode_replica(cluster: Cluster, engine: Any, i: int, out: Any) -> None:
    replicas, seen, size = cluster.replicas, cluster.call, cluster.block_size
    waits = cluster.row >= 0
    if waits:
        find_cached(cluster, i, engine, cluster.row)
    out[0] = 1.0 if waits and may_take(cluster, i) else 0.0
    out[1] = _share(replicas.kv_used[i] / replicas.kv_capacity[i])
    out[2] = _tokens((replicas.kv_capacity[i] - replicas.kv_used[i]) * size)
    out[3] = _count(replicas.waiting[i])
    out[4] = _count(replicas.running[i])
    out[5] = _tokens(replicas.waiting_tokens[i] + replicas.prefill_tokens[i])
    out[6] = replicas.cached[i] / seen.prompt if waits else 0.0
    out[7] = _time(replicas.iteration_seconds[i])
    out[8] = _time(replicas.ttft_seconds[i])
    out[9] = 1.0 if waits and seen.home == i else 0.0
    out[10] = _tokens(replicas.kv_capacity[i] * size)
    out[11] = _time(replicas.base_seconds[i] + 32 * replicas.running_seconds[i] + 32 * 1024 * replicas.kv_seconds[i])
    out[12] = _time(512 * replicas.prefill_seconds[i])
    out[13] = _time(expected_seconds(cluster, i))
