"""The action set ``peak``: admit while the KV that is predicted for the residents stays below a level, now and later.

Residents end at random and the others grow. With S_j(g) = P(output > g) of class j, a resident of
prompt l that has generated g tokens still runs t iterations from now with probability
S_j(g + t) / S_j(g) and then holds l + g + t tokens (and half a block, rounded, and ``Recipe.spare`` blocks). The
sum over the residents is the expected KV t iterations ahead, and its largest value over ``forecast_steps``
the predicted peak. An action is a level: requests enter in the engine's admission order while the peak
stays within level * C. ``reserve`` (``llmsched_env.action``) adds up final lengths, which are never
reached all at once; what over-commitment this allows depends on the workload, a level much less.

An empty engine takes the first request whatever it is expected to need, so nothing is held forever.

Features beside the observation (all in [0, 1] unless a name says otherwise), in this order:

========  ======================================================================================
14        expected KV of the residents at each of ``forecast_steps``, share of the capacity / 2
1         work waiting: expected KV x iterations of the requests outside / capacity, *log*
1         work left: the same of the residents' remaining iterations, *log*
1         age of the oldest request outside, *time*
2         residents; requests outside, *count*
1         recent arrival rate (30 s window) / twice the stability boundary
1         static: requests of expected final length that fill the memory, log2 / 16
1         static: coefficient of variation of the output length / 4
1         static: share of the prompt in a request's tokens
1         static: sequence cap as a share of those requests / 4 (1 in the ``paper`` preset)
3         static: throughput of the balanced batch at 1/4, 1/2 and 3/4 of the memory / that at all of it
========  ======================================================================================

*log* is log(1 + x) / log(1 + 10^6), *time* and *count* as in ``llmsched_env.observation``. Then, for a critic in
training alone (``HIDDEN`` numbers, never shown to a policy): the true work left of residents and of
requests outside (*log*), and the arrivals of the next 10, 30 and 100 s over three times what the
stability boundary allows.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_agents.kernel import GRID
from llmsched_agents.recipe import class_weights
from llmsched_env.fluid import Fluid
from llmsched_env.types import EngineConfig, LengthStatistics, QueueLayout

_LONGEST = 4096  # tokens; beyond, a length is as likely as at the end of the table


@dataclass(frozen=True, slots=True)
class LengthTables:
    """What the predictions of one workload on one engine read.

    Attributes:
        survival: (J, G, T) float32, P(output > g + steps[t] | output > g, class j).
        remaining: (J, G, 2) float64, E[output - g | output > g] and E[(output (output + 1) - g (g + 1)) / 2 | output > g].
        statics: (STATICS,) float32, the static features.
        steps: (T,) float64, ``forecast_steps``.
        headroom: tokens counted for each resident beyond those it holds: what its last block wastes on average, and the spare.
        boundary_rate: stability boundary, requests/s.
    """

    survival: npt.NDArray[np.float32]
    remaining: npt.NDArray[np.float64]
    statics: npt.NDArray[np.float32]
    steps: npt.NDArray[np.float64]
    headroom: float
    boundary_rate: float


def forecast_steps(max_output: int) -> npt.NDArray[np.float64]:
    """(T,) iterations ahead at which the KV is predicted: those of ``GRID`` within the longest output, and as many between them.

    Short outputs need a finer forecast: where all end within 20 iterations, the peak lies between two points of ``GRID``.
    """
    if max_output > GRID[-1]:
        return np.array(GRID, dtype=np.float64)
    last = max(max_output - 1, 0)
    points = [*(t for t in GRID if t < last), last]
    while len(points) < len(GRID):
        gaps = [b - a for a, b in itertools.pairwise(points)]
        if max(gaps, default=0) <= 1:
            return np.array(points + [last] * (len(GRID) - len(points)), dtype=np.float64)
        widest = gaps.index(max(gaps))
        points.insert(widest + 1, points[widest] + gaps[widest] // 2)
    return np.array(points, dtype=np.float64)


def length_tables(
    statistics: LengthStatistics, layout: QueueLayout, engine: EngineConfig, boundary_rate: float, spare: float = 0.0
) -> LengthTables:
    """Tables from what an operator knows of the lengths.

    Args:
        spare: blocks (tokens in the ``paper`` preset) counted for each resident beyond its own.
    """
    steps = forecast_steps(statistics.max_output)
    weights = class_weights(statistics, layout)
    size = min(statistics.max_output + 1, _LONGEST)
    lengths = np.arange(size)
    survival = np.empty((layout.num_classes, size, len(GRID)), dtype=np.float32)
    remaining = np.empty((layout.num_classes, size, 2))
    for j in range(layout.num_classes):
        weight = weights[j]
        tail = _tail(statistics.output, weight, size + int(steps[-1]))
        now = np.maximum(tail[:size], 1e-12)
        for t, ahead in enumerate(steps.astype(int).tolist()):
            survival[j, :, t] = 1.0 if ahead == 0 else tail[ahead : size + ahead] / now
        first = _tail(statistics.output, weight * statistics.output, size) / now
        second = _tail(statistics.output, weight * statistics.output * (statistics.output + 1) / 2, size) / now
        known = tail[:size] > 1e-9
        remaining[j, :, 0] = np.where(known, first - lengths, 1.0)
        remaining[j, :, 1] = np.where(known, second - lengths * (lengths + 1) / 2, lengths + 1.0)
    headroom = spare if engine.preset == "paper" else spare * engine.block_size + (engine.block_size - 1) / 2
    return LengthTables(survival, remaining, _statics(statistics, engine), steps, headroom, boundary_rate)


def _tail(output: npt.NDArray[np.float64], weight: npt.NDArray[np.float64], size: int) -> npt.NDArray[np.float64]:
    """(size,) sum of the weights of outputs > g, g = 0 .. size - 1."""
    order = np.argsort(output, kind="stable")
    above = np.concatenate([np.cumsum(weight[order][::-1])[::-1], [0.0]])
    tail: npt.NDArray[np.float64] = above[np.searchsorted(output[order], np.arange(size, dtype=np.float64), side="right")]
    return tail


def _statics(statistics: LengthStatistics, engine: EngineConfig) -> npt.NDArray[np.float32]:
    prompt, output = statistics.mean_prompt, statistics.mean_output
    fits = engine.kv_capacity_tokens / (prompt + output)
    spread = math.sqrt(max(float(statistics.weight @ statistics.output**2) - output**2, 0.0)) / output
    slots = 1.0 if engine.preset == "paper" else engine.max_num_seqs / fits / 4
    load = Fluid.of(statistics.prompt, statistics.output, statistics.weight, engine).load
    full = engine.kv_capacity_tokens / load.kv_tokens

    def throughput(share: float) -> float:
        return share * full / load.times(share * full).seconds

    curve = [throughput(share) / throughput(1.0) for share in (0.25, 0.5, 0.75)]
    values = [math.log2(1.0 + fits) / 16, spread / 4, prompt / (prompt + output), slots, *curve]
    return np.clip(values, 0.0, 1.0).astype(np.float32)
