"""Least pooled work first, memory by a forecast without error: the reference with output lengths known."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from llmsched_baselines.mc_sf import shortest_that_fit
from llmsched_baselines.policy import RulePolicy, Setting
from llmsched_env.engine.rules import Rule
from llmsched_env.errors import ConfigError
from llmsched_env.types import LengthStatistics, QueueLayout
from llmsched_env.work import WorkWeights, work_weights


class PooledWork(RulePolicy):
    """Shortest job first where a job is its share of the machine (``llmsched_env.work``), no preemption (output lengths known).

    Classes are buckets by work of prompt and output, least first, first come first served inside a bucket. A request enters if the
    memory that all residents will hold at each of their completions fits (``mc_sf.fits_forever``); their true lengths are known.

    Args:
        num_classes: buckets, each up to the same factor wider than the one before (``work_classes``).
        level: share of the capacity that the predicted peak may reach.
        memory_share: of an iteration's fixed seconds, the part that goes by tokens of memory, the rest by seats; None: whichever binds.

    Raises:
        ConfigError: an argument out of range.
    """

    name: ClassVar[str] = "pooled-work"
    known_lengths: ClassVar[bool] = True

    def __init__(self, setting: Setting, num_classes: int = 64, level: float = 0.99, memory_share: float | None = None) -> None:
        if not 1 <= num_classes <= 4_096:
            raise ConfigError(f"policy.num_classes: {num_classes}, must be from 1 to 4096")
        if not (math.isfinite(level) and level > 0):
            raise ConfigError(f"policy.level: {level}, must be finite and > 0")
        if memory_share is not None and not 0 <= memory_share <= 1:
            raise ConfigError(f"policy.memory_share: {memory_share}, must be from 0 to 1")
        self.engine = setting.engine_for(admission_order="class")
        self.layout = work_classes(setting.statistics, work_weights(self.engine, setting.statistics, memory_share), num_classes)
        self.rule = Rule(shortest_that_fit, self.layout.num_queues, [level * self.engine.kv_capacity_tokens], known_lengths=True)


def work_classes(statistics: LengthStatistics, weights: WorkWeights, num_classes: int) -> QueueLayout:
    """Buckets by work whose edges grow by one factor, from two thirds of the least work that the statistics know to 3/2 of the greatest.

    So two requests of one bucket differ by at most that factor, however rare they are; buckets of equal probability would put
    all long ones into the last.
    """
    if num_classes == 1:
        return QueueLayout()
    work = 1e6 * weights.of(statistics.prompt, statistics.output)[statistics.weight > 0]
    edges = np.unique(np.round(np.geomspace(max(work.min() / 1.5, 1.0), max(work.max() * 1.5, 2.0), num_classes - 1)))
    return QueueLayout(by="work", edges=tuple(edges.astype(np.int64).tolist()), weights=(weights.c, weights.w0, weights.w1))
