"""The compact iteration-time models, and the compiled functions that evaluate every model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from llmsched_env import checks
from llmsched_env.compiled import compiled
from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import (
    KIND_FORMULA,
    KIND_LINEAR,
    KIND_MIXED_ATTENTION,
    KIND_TABLE,
    FloatArray,
    IterationTimeModel,
    Provenance,
    check_coefficients,
    check_provenance,
)
from llmsched_env.perf.batch import DECODE_KV, DECODES, LOAD, PREFILL_TOKENS, PREFILL_WORK
from llmsched_env.perf.mixed_attention import mixed_attention_time, mixed_attention_valid
from llmsched_env.perf.tables import table_time, table_valid


@compiled
def iteration_time(model, batch):  # type: ignore[no-untyped-def]
    """Seconds of one iteration.

    Args:
        model: float64 array, ``IterationTimeModel.pack()``; element 0 is the kind.
        batch: (BATCH_FIELDS,) float64, see ``llmsched_env.perf.batch``.
    """
    kind = model[0]
    if kind == KIND_LINEAR:
        return model[1] + model[2] * batch[LOAD]
    if kind == KIND_MIXED_ATTENTION:
        return mixed_attention_time(model, batch)
    if kind == KIND_TABLE:
        return table_time(model, batch)
    n = batch[DECODES]
    kv = batch[DECODE_KV]
    tokens = n + batch[PREFILL_TOKENS]
    seconds = model[2] + model[3] * tokens if tokens <= model[1] else model[4] + model[5] * tokens
    seconds += model[6] * kv + model[8] * batch[PREFILL_WORK] + model[9] * n
    if n > 0.0:
        seconds += model[7] * kv / math.sqrt(n)
    return seconds


@compiled
def valid(model, batch):  # type: ignore[no-untyped-def]
    """Whether the batch lies inside the range of the data behind the model; arguments as ``iteration_time``."""
    kind = model[0]
    if kind == KIND_LINEAR:
        return True
    if kind == KIND_MIXED_ATTENTION:
        return mixed_attention_valid(model, batch)
    if kind == KIND_TABLE:
        return table_valid(model, batch)
    n = batch[DECODES]
    if n + batch[PREFILL_TOKENS] > model[10] or n > model[11]:
        return False
    return n == 0.0 or batch[DECODE_KV] <= model[12] * n


@dataclass(frozen=True, slots=True)
class LinearTime(IterationTimeModel):
    """tau = d0 + d1 * load (arXiv 2504.11320, model section): d0 seconds, d1 seconds per KV token of the batch."""

    d0: float
    d1: float
    provenance: Provenance = field(default=Provenance(name="linear", source="arXiv 2504.11320"), compare=False)

    def __post_init__(self) -> None:
        check_coefficients("time_model", {"d0": self.d0, "d1": self.d1})
        check_provenance(self.provenance)
        if self.d0 + self.d1 == 0:
            raise ConfigError("time_model: d0 and d1 are both 0, an iteration must take time")

    def pack(self) -> FloatArray:
        return np.array([KIND_LINEAR, self.d0, self.d1], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class FormulaTime(IterationTimeModel):
    """The compact calibrated form: a token staircase of two lines plus attention.

    With T tokens in the batch, n decodes with KV tokens in all and prefill work W::

        tau = (a + b T  if T <= knee else  s + c T) + d1 KV + d2 KV / sqrt(n) + d3 W + d4 n

    Seconds; eight coefficients and the knee (128 tokens, a GEMM tile boundary of the A100). The
    range of the data it was fitted to: at most ``max_tokens`` a batch, ``max_decodes`` decodes of at
    most ``max_context`` tokens on average. The formula goes on as it is beyond it.
    """

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
        return np.array([KIND_FORMULA, *coefficients, *limits], dtype=np.float64)


__all__ = ["FormulaTime", "IterationTimeModel", "LinearTime", "Provenance", "iteration_time", "valid"]
