"""Least expected work first, by output lengths that are predicted and believed in part."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from llmsched_baselines.policy import RulePolicy, Setting, prompt_classes
from llmsched_env import checks
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.state import Engine
from llmsched_env.errors import ConfigError
from llmsched_env.peak import PeakRecord, PeakTables, peak_tables
from llmsched_env.records import Record
from llmsched_env.shrinkage import Prior
from llmsched_env.trust import decode_peak_by_trust
from llmsched_env.types import Decision, LengthStatistics, QueueLayout
from llmsched_env.workload.scenario import bucket_edges


class TrustRecord(Record):
    level: float  # share of the memory that the predicted peak may reach
    peak: PeakRecord


@compiled
def by_trust(engine: Engine, policy: TrustRecord, decision: Decision) -> None:
    """Least work first at a constant trust."""
    decode_peak_by_trust(engine, policy.peak, policy.level, decision)


class PredictedWork(RulePolicy):
    """Least expected work first, the predicted lengths shrunk towards what prompts tell; memory by its predicted peak.

    Requests stand in queues by prompt and predicted length, fine enough that the oldest of a queue stands for it, and enter by
    ``llmsched_env.shrinkage`` while the predicted peak of the KV (``llmsched_env.peak``) stays below ``level``. The peak is predicted
    from prompts alone. Where nothing is predicted queues are by prompt, whatever ``shrink``.

    Args:
        shrink: weight of a prediction, w: 1 believes it, 0 orders by prompts alone (hidden lengths).
        level: share of the memory that the predicted peak may reach.
        spare: KV blocks (tokens in the ``paper`` preset) counted for each resident beyond what it is expected to hold.
        prompts, buckets: queues by prompt length, and in each of these by predicted length.

    Raises:
        ConfigError: an argument out of range.
    """

    name: ClassVar[str] = "predicted-work"

    def __init__(
        self, setting: Setting, shrink: float = 0.5, level: float = 0.99, spare: float = 1.0, prompts: int = 32, buckets: int = 8
    ) -> None:
        checks.number("policy.shrink", shrink, high=1.0)
        if not (math.isfinite(level) and level > 0):
            raise ConfigError(f"policy.level: {level}, must be finite and > 0")
        checks.number("policy.spare", spare, high=64.0, unit="blocks")
        self.layout = prediction_classes(
            setting.statistics,
            checks.integer("policy.prompts", prompts, low=1, high=256),
            checks.integer("policy.buckets", buckets, low=1, high=256),
        )
        self.engine = setting.engine_for()
        record = TrustRecord(peak=prediction_tables(setting, self, spare).record())
        record.level, record.peak.prior.belief.trust = level, shrink
        self.rule = Rule(by_trust, self.layout.num_queues, record)

    def reset(self) -> None:
        super().reset()
        record: Any = self.rule.policy
        record.peak.forget()


def prediction_classes(statistics: LengthStatistics, prompts: int, buckets: int) -> QueueLayout:
    """Queues by prompt and predicted length, each of about equal probability; by prompt alone where nothing is predicted."""
    by_prompt = prompt_classes(statistics, prompts)
    if statistics.predicted is None:
        return by_prompt
    edges = bucket_edges(statistics.predicted, statistics.weight, buckets)
    return QueueLayout("predicted", edges, prompt_edges=by_prompt.edges)


def prediction_tables(setting: Setting, policy: PredictedWork, spare: float) -> PeakTables:
    """Tables of the predicted peak by prompt alone, shared by the queues of like prompts."""
    layout, statistics = policy.layout, setting.statistics
    by_prompt = QueueLayout("prompt", layout.prompt_edges) if layout.by == "predicted" and layout.prompt_edges else QueueLayout()
    if layout.by != "predicted":
        by_prompt = layout
    tables = peak_tables(statistics, by_prompt, policy.engine, spare)
    share = layout.num_classes // by_prompt.num_classes
    rows = np.arange(layout.num_classes) // share
    return replace(tables, group=rows, prior=Prior.of(statistics, policy.engine))
