"""The compact iteration-time models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmsched_env import checks
from llmsched_env.compiled import compiled
from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import FloatArray, IterationTimeModel, Provenance, check_coefficients, check_provenance
from llmsched_env.perf.batch import BatchSums


@compiled
def linear_seconds(batch: BatchSums) -> float:
    """Seconds of one iteration by ``LinearTime``."""
    return batch.model[0] + batch.model[1] * batch.load


@compiled
def formula_seconds(batch: BatchSums) -> float:
    """Seconds of one iteration by ``FormulaTime``."""
    model = batch.model
    n = batch.decodes
    kv = batch.decode_kv
    tokens = n + batch.prefill_tokens
    seconds = model[1] + model[2] * tokens if tokens <= model[0] else model[3] + model[4] * tokens
    seconds += model[5] * kv + model[7] * batch.prefill_work + model[8] * n
    if n > 0.0:
        seconds += model[6] * kv / math.sqrt(n)
    if tokens > model[9] or n > model[10] or kv > model[11] * n:
        batch.out_of_range = 1
    return seconds


@dataclass(frozen=True, slots=True)
class LinearTime(IterationTimeModel):
    """tau = d0 + d1 * load (arXiv 2504.11320, model section): d0 seconds, d1 seconds per KV token of the batch."""

    compiled_seconds: ClassVar[Any] = linear_seconds

    d0: float
    d1: float
    provenance: Provenance = field(default=Provenance(name="linear", source="arXiv 2504.11320"), compare=False)

    def __post_init__(self) -> None:
        check_coefficients("time_model", {"d0": self.d0, "d1": self.d1})
        check_provenance(self.provenance)
        if self.d0 + self.d1 == 0:
            raise ConfigError("time_model: d0 and d1 are both 0, an iteration must take time")

    def pack(self) -> FloatArray:
        return np.array([self.d0, self.d1], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class FormulaTime(IterationTimeModel):
    """The compact calibrated form: a token staircase of two lines plus attention.

    With T tokens in the batch, n decodes with KV tokens in all and prefill work W::

        tau = (a + b T  if T <= knee else  s + c T) + d1 KV + d2 KV / sqrt(n) + d3 W + d4 n

    Seconds; eight coefficients and the knee (128 tokens, a GEMM tile boundary of the A100). The
    range of the data it was fitted to: at most ``max_tokens`` a batch, ``max_decodes`` decodes of at
    most ``max_context`` tokens on average. The formula goes on as it is beyond it.
    """

    compiled_seconds: ClassVar[Any] = formula_seconds

    a: float
    b: float
    s: float
    c: float
    d1: float
    d2: float
    d3: float
    d4: float
    knee: float = 128.0
    max_tokens: float = math.inf
    max_decodes: float = math.inf
    max_context: float = math.inf
    provenance: Provenance = field(default=Provenance(name="formula"), compare=False)

    def __post_init__(self) -> None:
        names = ("a", "b", "s", "c", "d1", "d2", "d3", "d4", "knee")
        check_coefficients("time_model", {name: getattr(self, name) for name in names})
        for name in ("max_tokens", "max_decodes", "max_context"):
            checks.number(f"time_model.{name}", getattr(self, name), high=math.inf, open_low=True)
        check_provenance(self.provenance)
        if self.a == 0:
            raise ConfigError("time_model.a: 0, an iteration must take time")

    def pack(self) -> FloatArray:
        coefficients = (self.knee, self.a, self.b, self.s, self.c, self.d1, self.d2, self.d3, self.d4)
        limits = (self.max_tokens, self.max_decodes, self.max_context)
        return np.array([*coefficients, *limits], dtype=np.float64)


__all__ = ["FormulaTime", "IterationTimeModel", "LinearTime", "Provenance"]
