"""Least expected work first: prompt-length buckets ordered by what their requests are expected to cost."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from llmsched_baselines.policy import RulePolicy, Setting, prompt_classes
from llmsched_baselines.reserve import reservation
from llmsched_env.errors import ConfigError
from llmsched_env.forecast import expected_output_by_class, middles
from llmsched_env.types import FloatArray, LengthStatistics, QueueLayout


class ExpectedWork(RulePolicy):
    """Buckets by prompt length, smallest prompt + c E[output | bucket] first, with a reservation.

    The order a server can know: the prompt it sees, the output it expects from past requests of the
    bucket (``Setting.statistics``). With c = 0 it is ``shortest-prompt``; a large c orders by the
    expected output alone. Requests of one bucket keep their order of arrival.

    Args:
        num_classes: buckets of equal probability.
        c: weight of an expected output token against a prompt token, >= 0. A decoded token takes part
            in many more iterations than a prefilled one, hence the default.
        theta: over-commitment of the reservation, as in ``reserve``.

    Raises:
        ConfigError: an argument out of range.
    """

    name: ClassVar[str] = "expected-work"

    def __init__(self, setting: Setting, num_classes: int = 8, c: float = 4.0, theta: float = 1.1) -> None:
        if num_classes < 1:
            raise ConfigError(f"policy.num_classes: {num_classes}, must be >= 1")
        if not (math.isfinite(c) and c >= 0):
            raise ConfigError(f"policy.c: {c}, must be finite and >= 0")
        self.layout = prompt_classes(setting.statistics, num_classes)
        work = expected_prompt_by_class(setting.statistics, self.layout) + c * expected_output_by_class(setting.statistics, self.layout)
        rank = np.argsort(np.argsort(work, kind="stable"), kind="stable")
        self.engine = setting.engine_for(admission_order="class", class_rank=tuple(int(r) for r in rank))
        self.rule = reservation(setting, theta, self.engine, self.layout)


def expected_prompt_by_class(statistics: LengthStatistics, layout: QueueLayout) -> FloatArray:
    """(J,) E[prompt | class], tokens; the middle of the bucket where the statistics know no request of the class."""
    index = layout.classify(statistics.prompt, statistics.output, statistics.type_id, statistics.tenant, statistics.predicted)
    mass = np.bincount(index, statistics.weight, layout.num_classes)
    tokens = np.bincount(index, statistics.weight * statistics.prompt, layout.num_classes)
    return np.where(mass > 0, tokens / np.where(mass > 0, mass, 1.0), middles(statistics, layout))
