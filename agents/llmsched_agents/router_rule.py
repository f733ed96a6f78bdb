"""A learned rule for routers: seconds that a call costs on a replica, corrected by a small network that all replicas share.

The cost is that of ``llmsched_baselines.routers.cost``, at the pace that is measured; its weights are trained, too. The network sees
what the cost is made of, how full the replica is, and how it stands to the others, and gives the logarithm of a factor: a linear part
and some hidden units. The lowest product wins. Every replica is scored by the same weights, so the rule runs on any number of them and
does not depend on their order.
"""

from __future__ import annotations

import math
from typing import Annotated

from llmsched_env.cluster.replicas import expected_seconds
from llmsched_env.cluster.routing import may_take, outstanding
from llmsched_env.cluster.state import Cluster
from llmsched_env.compiled import compiled
from llmsched_env.records import Counts, Memory, Record, Vector

COST = ("pending", "uncached", "decoding", "waiting", "hinder", "trust", "pace_memory", "flow_memory")
"""What the cost is made of, by place in the tensor ``cost``: logarithms of weights, of the exponent of the pace, and of two time
constants in seconds.
"""
INPUTS = (
    "pending",  # log(1 + 4 x seconds of pending prompt tokens), at the pace
    "uncached",  # the same of what of this call is not cached there
    "calls",  # log(1 + calls there / 8)
    "pace",  # its logarithm
    "kv",  # share of the KV blocks in use
    "kv_after",  # the same with all who wait and this call, answer included; at most 3
    "cached",  # share of the prompt
    "home",  # 1: the program's latest call went there
    "ttft",  # log(1 + 4 x seconds to the first token lately)
    "iteration",  # log(measured seconds of an iteration / 0.03); 0 before the first
    "above_best",  # logarithm of the cost over the least one; at most 4
    "above_mean",  # logarithm of the cost, less the mean of the logarithms
    "prompt",  # tokens / 4,096
    "turn",  # log(1 + depth in the program)
    "mean_calls",  # log(1 + calls of the average replica / 8)
    "mean_pace",  # mean logarithm of the pace
    "decoding",  # log(seconds of an iteration in which all there decode, at the pace / 0.03)
    "prefilling",  # share of the time that the prompt tokens sent there lately take, at the pace; at most 3
)
"""What the network sees of a replica, in its order; the mean and the best are those of the replicas that can take the call."""
MICRO = 1_000_000
"""What is remembered is whole numbers: microseconds, and millionths."""
LOWEST_PACE, HIGHEST_PACE = 0.5, 8.0


class LearnedRecord(Record):
    cost: Vector  # (len(COST),)
    direct_weight: Vector  # (len(INPUTS),)
    hidden_weight: Vector  # (H x len(INPUTS),), one hidden unit after the other
    hidden_bias: Vector  # (H,)
    output_weight: Vector  # (H,)
    output: float  # tokens of an answer to expect where nobody predicts
    sees_pace: bool  # without it every pace is 1, and measured iterations are those of the calibration
    inputs: Vector  # (len(INPUTS),) scratch
    seconds: Vector  # (R,) scratch: logarithm of the cost
    log_pace: Vector  # (R,) scratch
    pace: Counts  # (R,) logarithm of the pace, in millionths
    flow: Counts  # (R,) uncached prompt tokens that were sent there, in millionths of one per second
    looked: Annotated[int, Memory]  # when that was, in microseconds


@compiled
def follow_pace(cluster: Cluster, own: LearnedRecord) -> None:
    """How many times longer than by its calibration each replica's iterations take, remembered for ``pace_memory``.

    An iteration takes longer than a decode of the residents because it carries prefill: as many prompt tokens a second as were sent there
    lately. What is measured beyond both is the pace. A replica that runs nothing measures nothing, and what was known of it fades.
    """
    replicas, now = cluster.replicas, int(cluster.clock * MICRO)
    passed = (own.looked - now) / MICRO
    own.looked = now
    weight = 1.0 - math.exp(passed / math.exp(own.cost[6]))
    kept = math.exp(passed / math.exp(own.cost[7]))
    for i in range(cluster.num_replicas):
        own.flow[i] = int(own.flow[i] * kept)
        measured, ratio = replicas.iteration_seconds[i], 0.0
        if measured > 0.0 and replicas.running[i] > 0:
            modelled = expected_seconds(cluster, i) + replicas.prefill_seconds[i] * own.flow[i] / MICRO * measured
            ratio = math.log(min(max(measured / modelled, LOWEST_PACE), HIGHEST_PACE))
        pace = own.pace[i] / MICRO
        pace += weight * (ratio - pace)
        own.pace[i] = int(pace * MICRO)
        own.log_pace[i] = pace if own.sees_pace else 0.0


@compiled
def answer_tokens(cluster: Cluster, own: LearnedRecord) -> float:
    """Output tokens of the call to expect."""
    predicted: float = cluster.call.predicted + 0.0  # of compiled code, where both branches must be of one type
    return predicted if cluster.call.predicted > 0 else own.output


@compiled
def log_seconds(cluster: Cluster, own: LearnedRecord, i: int) -> float:
    """Logarithm of the seconds that the call costs on replica i, its own and those of others, weighted."""
    replicas, call, cost = cluster.replicas, cluster.call, own.cost
    modelled, output = expected_seconds(cluster, i), answer_tokens(cluster, own)
    fresh = (call.prompt - replicas.cached[i]) * replicas.prefill_seconds[i]
    pending = (replicas.waiting_tokens[i] + replicas.prefill_tokens[i]) * replicas.prefill_seconds[i]
    longer = replicas.running_seconds[i] + replicas.kv_seconds[i] * (call.prompt + 0.5 * output)
    seconds = math.exp(cost[0]) * pending + math.exp(cost[1]) * fresh
    seconds += (math.exp(cost[2]) * output + math.exp(cost[3]) * replicas.waiting[i]) * modelled
    seconds += math.exp(cost[4]) * outstanding(cluster, i) * (fresh + output * longer)
    result: float = math.log(max(seconds, 1e-9)) + math.exp(cost[5]) * own.log_pace[i]
    return result


@compiled
def network(own: LearnedRecord) -> float:
    """What the network gives for ``own.inputs``."""
    inputs, width = own.inputs, own.inputs.shape[0]
    result = 0.0
    for k in range(width):
        result += own.direct_weight[k] * inputs[k]
    for h in range(own.hidden_bias.shape[0]):
        total = own.hidden_bias[h]
        for k in range(width):
            total += own.hidden_weight[h * width + k] * inputs[k]
        result += own.output_weight[h] * math.tanh(total)
    return result


@compiled
def see(cluster: Cluster, own: LearnedRecord, i: int, least: float, mean: float, calls: float, pace: float) -> None:
    """Write down what the network sees of replica i.

    Args:
        least, mean: of the logarithms of the cost over legal replicas; calls, pace: means of calls there and of the logarithms of the
            pace, the same.
    """
    replicas, call, x = cluster.replicas, cluster.call, own.inputs
    at_pace = math.exp(own.log_pace[i])
    fresh = call.prompt - replicas.cached[i]
    tokens = cluster.block_size * replicas.kv_used[i] + replicas.waiting_tokens[i] + fresh + answer_tokens(cluster, own)
    measured = replicas.iteration_seconds[i] if own.sees_pace else expected_seconds(cluster, i)
    x[0] = math.log1p(4.0 * (replicas.waiting_tokens[i] + replicas.prefill_tokens[i]) * replicas.prefill_seconds[i] * at_pace)
    x[1] = math.log1p(4.0 * fresh * replicas.prefill_seconds[i] * at_pace)
    x[2] = math.log1p(outstanding(cluster, i) / 8.0)
    x[3] = own.log_pace[i]
    x[4] = replicas.kv_used[i] / replicas.kv_capacity[i]
    x[5] = min(tokens / (cluster.block_size * replicas.kv_capacity[i]), 3.0)
    x[6] = replicas.cached[i] / call.prompt
    x[7] = 1.0 if call.home == i else 0.0
    x[8] = math.log1p(4.0 * replicas.ttft_seconds[i])
    x[9] = math.log(measured / 0.03) if measured > 0.0 else 0.0
    x[10] = min(own.seconds[i] - least, 4.0)
    x[11] = own.seconds[i] - mean
    x[12] = call.prompt / 4096.0
    x[13] = math.log1p(float(call.turn))
    x[14] = math.log1p(calls / 8.0)
    x[15] = pace
    x[16] = math.log(expected_seconds(cluster, i) / 0.03) + own.log_pace[i]
    x[17] = min(own.flow[i] / MICRO * replicas.prefill_seconds[i] * at_pace, 3.0)


@compiled
def least_score(cluster: Cluster, own: LearnedRecord) -> int:
    """The replica with the lowest score; of equal ones the first."""
    follow_pace(cluster, own)
    least, mean, calls, pace, legal = math.inf, 0.0, 0.0, 0.0, 0
    for i in range(cluster.num_replicas):
        if may_take(cluster, i):
            own.seconds[i] = log_seconds(cluster, own, i)
            least = min(least, own.seconds[i])
            mean += own.seconds[i]
            calls += outstanding(cluster, i)
            pace += own.log_pace[i]
            legal += 1
    best, lowest = -1, math.inf
    for i in range(cluster.num_replicas):
        if may_take(cluster, i):
            see(cluster, own, i, least, mean / legal, calls / legal, pace / legal)
            score = own.seconds[i] + network(own)
            if best < 0 or score < lowest:
                best, lowest = i, score
    own.flow[best] += int((cluster.call.prompt - cluster.replicas.cached[best]) * MICRO / math.exp(own.cost[7]))
    return best
