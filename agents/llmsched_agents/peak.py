"""What agents see of the predicted KV (``llmsched_env.peak``) beside the environment's observation.

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

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.engine_config import EngineConfig
from llmsched_env.fluid import Fluid
from llmsched_env.forecast import class_weights
from llmsched_env.peak import NO_TABLES as NO_PEAK
from llmsched_env.peak import PeakTables, peak_tables, table_size, tail
from llmsched_env.types import LengthStatistics, QueueLayout


@dataclass(frozen=True, slots=True)
class LengthTables:
    """What the predictions and the features of one workload on one engine read.

    Attributes:
        peak: of the predictions.
        remaining: (J, G, 2) float64, E[output - g | output > g] and E[(output (output + 1) - g (g + 1)) / 2 | output > g].
        statics: (STATICS,) float32, the static features.
        boundary_rate: stability boundary, requests/s.
    """

    peak: PeakTables
    remaining: npt.NDArray[np.float64]
    statics: npt.NDArray[np.float32]
    boundary_rate: float


NO_TABLES = LengthTables(NO_PEAK, np.zeros((1, 1, 2)), np.zeros(1, dtype=np.float32), 1.0)
"""Where a recipe uses none."""


def length_tables(
    statistics: LengthStatistics, layout: QueueLayout, engine: EngineConfig, boundary_rate: float, spare: float = 0.0
) -> LengthTables:
    """Tables from what an operator knows of the lengths.

    Args:
        spare: blocks (tokens in the ``paper`` preset) counted for each resident beyond its own.
    """
    weights = class_weights(statistics, layout)
    size = table_size(statistics)
    lengths = np.arange(size)
    remaining = np.empty((layout.num_classes, size, 2))
    for j in range(layout.num_classes):
        weight = weights[j]
        above = tail(statistics.output, weight, size)
        now = np.maximum(above, 1e-12)
        first = tail(statistics.output, weight * statistics.output, size) / now
        second = tail(statistics.output, weight * statistics.output * (statistics.output + 1) / 2, size) / now
        known = above > 1e-9
        remaining[j, :, 0] = np.where(known, first - lengths, 1.0)
        remaining[j, :, 1] = np.where(known, second - lengths * (lengths + 1) / 2, lengths + 1.0)
    return LengthTables(peak_tables(statistics, layout, engine, spare), remaining, _statics(statistics, engine), boundary_rate)


def _statics(statistics: LengthStatistics, engine: EngineConfig) -> npt.NDArray[np.float32]:
    prompt, output = statistics.mean_prompt, statistics.mean_output
    fits = engine.kv_capacity_tokens / (prompt + output)
    spread = math.sqrt(max(float(statistics.weight @ statistics.output**2) - output**2, 0.0)) / output
    slots = 1.0 if engine.preset == "paper" else engine.most_active / fits / 4
    load = Fluid.of(statistics.prompt, statistics.output, statistics.weight, engine).load
    full = engine.kv_capacity_tokens / load.kv_tokens

    def throughput(share: float) -> float:
        return share * full / load.times(share * full).seconds

    curve = [throughput(share) / throughput(1.0) for share in (0.25, 0.5, 0.75)]
    values = [math.log2(1.0 + fits) / 16, spread / 4, prompt / (prompt + output), slots, *curve]
    return np.clip(values, 0.0, 1.0).astype(np.float32)
