"""Work of a request from a prediction that is trusted in part.

Work is a request's share of the machine's seconds (``llmsched_env.work``)::

    work = c * prompt + w0 * output + w1 * (output * prompt + output ** 2 / 2)

Predictions err, and an order that believes them puts requests first that were only predicted short. So a predicted length is
shrunk towards what the request's prompt tells, by a ``trust`` w from 0 (the prompt alone) to 1 (the prediction alone). With

    x = (log(predicted) - m - offset) / scale

and m, v the mean and variance of log(output) among requests of like prompt, w stands for a normal error of variance v (1 - w) / w
of x: were log(output) normal too, its mean would be m + w x, James and Stein's shrinkage, and w the squared correlation of prediction
and output. Lengths are not lognormal, so the expected output and its square are those of the lengths that are known, reweighed by
the error's likelihood (``Prior``). ``offset`` and ``scale`` are the predictor's bias: 0 and 1 where it has none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.engine_config import EngineConfig
from llmsched_env.forecast import class_weights
from llmsched_env.records import Cube, Indices, Record, Vector
from llmsched_env.types import FloatArray, LengthStatistics, QueueLayout
from llmsched_env.work import WorkWeights, work_weights
from llmsched_env.workload.scenario import interpolated_edges

PROMPT_BUCKETS = 48
"""Of about equal probability, within which requests are alike to the prior."""

TRUST_STEPS = 10
"""Steps of the table from trust 0 to 1."""

REACH, STEP = 4.0, 0.25
"""The table's x run from -``REACH`` to ``REACH`` in steps of ``STEP``."""


class Belief(Record):
    """How far predictions are trusted; whoever orders requests writes it first."""

    trust: float  # the same for all; below 0: as ``error`` says
    error: float  # variance of x around log(output) - m: the trust of requests of like prompt is v / (v + error)
    offset: float  # the predictor's bias, 0 and 1 where it has none
    scale: float


class PriorRecord(Record):
    """What is known of a request without its prediction, and what its tokens cost. B buckets by prompt length."""

    prompt_cost: float  # c, seconds a token
    output_cost: float  # w0, seconds a token
    kv_cost: float  # w1, seconds a token and iteration
    edges: Indices  # (B - 1,) upper edges of the buckets, tokens
    mean: Vector  # (B,) E[log(output) | bucket]
    variance: Vector  # (B,) Var[log(output) | bucket]
    belief: Belief
    output: Cube  # (B, TRUST_STEPS + 1, X) log E[output | bucket, x]
    square: Cube  # log E[output ** 2 | bucket, x]


@dataclass(frozen=True, slots=True)
class Prior:
    """The numbers of a ``PriorRecord``; many records may share them.

    Attributes:
        weights: of prompt, output and KV.
        edges: (B - 1,) int64 tokens.
        mean, variance: (B,) float64, of log(output).
        output, square: (B, TRUST_STEPS + 1, X) float64, logarithms of the expected output and of its square.
    """

    weights: WorkWeights
    edges: npt.NDArray[np.int64]
    mean: FloatArray
    variance: FloatArray
    output: FloatArray
    square: FloatArray

    @classmethod
    def of(cls, statistics: LengthStatistics, engine: EngineConfig) -> Prior:
        """From what an operator knows of the lengths; predictions do not count."""
        edges = interpolated_edges(statistics, PROMPT_BUCKETS)
        lengths, index = np.unique(statistics.output, return_inverse=True)
        points = class_weights(statistics, QueueLayout("prompt", edges) if edges else QueueLayout())
        weights = np.stack([np.bincount(index, row, lengths.size) for row in points])
        logarithm = np.log(lengths)
        mean: FloatArray = np.asarray(weights @ logarithm, dtype=np.float64)
        variance = np.maximum(weights @ logarithm**2 - mean**2, 0.0)
        x = np.arange(-REACH, REACH + STEP / 2, STEP)
        output = np.empty((mean.size, TRUST_STEPS + 1, x.size))
        square = np.empty_like(output)
        for step in range(TRUST_STEPS + 1):
            trust = step / TRUST_STEPS
            for b in range(mean.size):
                if step == TRUST_STEPS or variance[b] < 1e-12:
                    output[b, step] = mean[b] + (x if step == TRUST_STEPS else 0.0)
                    square[b, step] = 2.0 * output[b, step]
                    continue
                error = variance[b] * (1.0 - trust) / max(trust, 1e-9)
                likely = -0.5 * (mean[b] + x[:, None] - logarithm[None, :]) ** 2 / error + np.log(np.maximum(weights[b], 1e-300))
                chance = np.exp(likely - likely.max(axis=1, keepdims=True))
                chance /= chance.sum(axis=1, keepdims=True)
                output[b, step], square[b, step] = np.log(chance @ lengths), np.log(chance @ lengths**2)
        return cls(work_weights(engine, statistics), np.array(edges, dtype=np.int64), mean, variance, output, square)

    def record(self) -> PriorRecord:
        """As compiled code reads it."""
        names = ("edges", "mean", "variance", "output", "square")
        made = PriorRecord(**{name: getattr(self, name) for name in names})
        made.belief.scale = 1.0
        made.prompt_cost, made.output_cost, made.kv_cost = self.weights.c, self.weights.w0, self.weights.w1
        return made


NO_PRIOR = Prior(WorkWeights(1.0, 0.0, 0.0), np.zeros(0, dtype=np.int64), *np.zeros((2, 1)), *np.zeros((2, 1, TRUST_STEPS + 1, 1)))
"""Where nothing is predicted."""


@compiled
def prompt_bucket(prior: PriorRecord, prompt: int) -> int:
    """The bucket of a prompt of so many tokens."""
    low, high = 0, prior.edges.shape[0]
    while low < high:
        middle = (low + high) // 2
        if prior.edges[middle] < prompt:
            low = middle + 1
        else:
            high = middle
    return low


@compiled
def surprise(prior: PriorRecord, prompt: int, tokens: int) -> float:
    """log(tokens) less the mean logarithm of the outputs of like prompts."""
    return math.log(float(tokens)) - float(prior.mean[prompt_bucket(prior, prompt)])


@compiled
def between(table, bucket, trust, x):  # type: ignore[no-untyped-def]
    """The value of a table at a trust and an x, linear between its points and constant beyond their ends."""
    down = min(max(trust, 0.0), 1.0) * TRUST_STEPS
    across = min(max((x + REACH) / STEP, 0.0), table.shape[2] - 1.0)
    k, i = min(int(down), TRUST_STEPS - 1), min(int(across), table.shape[2] - 2)
    down -= k
    across -= i
    upper = (1.0 - across) * table[bucket, k, i] + across * table[bucket, k, i + 1]
    lower = (1.0 - across) * table[bucket, k + 1, i] + across * table[bucket, k + 1, i + 1]
    return (1.0 - down) * upper + down * lower


@compiled
def shrunk_work(prior: PriorRecord, prompt: int, predicted: int) -> float:
    """Expected work (seconds) of a request of which ``predicted`` output tokens are foretold, 0 for none."""
    bucket, belief = prompt_bucket(prior, prompt), prior.belief
    x = 0.0
    trust = 0.0
    if predicted > 0:
        x = (math.log(float(predicted)) - prior.mean[bucket] - belief.offset) / belief.scale
        trust = belief.trust
        if trust < 0.0:
            trust = prior.variance[bucket] / max(prior.variance[bucket] + belief.error, 1e-12)
    output = math.exp(between(prior.output, bucket, trust, x))
    square = math.exp(between(prior.square, bucket, trust, x))
    return prior.prompt_cost * prompt + prior.output_cost * output + prior.kv_cost * (output * prompt + square / 2.0)
