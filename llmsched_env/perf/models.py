"""Iteration-time models and the compiled function that evaluates them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from numba import njit

from llmsched_env.errors import ConfigError
from llmsched_env.perf.batch import DECODE_KV, DECODES, LOAD, PREFILL_TOKENS, PREFILL_WORK, Batch

KIND_LINEAR = 0
KIND_FORMULA = 1


@njit(cache=True, inline="always")
def iteration_time(model, batch):  # type: ignore[no-untyped-def]
    """Seconds of one iteration.

    Args:
        model: float64 array, ``IterationTimeModel.pack()``; element 0 is the kind.
        batch: (BATCH_FIELDS,) float64, see ``llmsched_env.perf.batch``.
    """
    if model[0] == KIND_LINEAR:
        return model[1] + model[2] * batch[LOAD]
    n = batch[DECODES]
    kv = batch[DECODE_KV]
    tokens = n + batch[PREFILL_TOKENS]
    seconds = model[2] + model[3] * tokens if tokens <= model[1] else model[4] + model[5] * tokens
    seconds += model[6] * kv + model[8] * batch[PREFILL_WORK] + model[9] * n
    if n > 0.0:
        seconds += model[7] * kv / math.sqrt(n)
    return seconds


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a calibration comes from and how well it fits."""

    name: str = ""
    source: str = ""
    licence: str = ""
    gpu: str = ""
    model: str = ""
    engine: str = ""
    valid_range: str = ""
    fit_error: str = ""


class IterationTimeModel(ABC):
    """Seconds of one iteration as a function of its batch."""

    provenance: Provenance

    @abstractmethod
    def pack(self) -> npt.NDArray[np.float64]:
        """The model as the one float64 array that ``iteration_time`` reads."""

    def seconds(self, batch: Batch) -> float:
        """Seconds of one iteration."""
        return float(iteration_time(self.pack(), batch.array()))


def _check_coefficients(owner: str, values: dict[str, float]) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{owner}.{name}: {value}, must be finite and >= 0")


@dataclass(frozen=True, slots=True)
class LinearTime(IterationTimeModel):
    """tau = d0 + d1 * load (arXiv 2504.11320, model section): d0 seconds, d1 seconds per KV token of the batch."""

    d0: float
    d1: float
    provenance: Provenance = field(default=Provenance(name="linear", source="arXiv 2504.11320"), compare=False)

    def __post_init__(self) -> None:
        _check_coefficients("time_model", {"d0": self.d0, "d1": self.d1})
        if self.d0 + self.d1 == 0:
            raise ConfigError("time_model: d0 and d1 are both 0, an iteration must take time")

    def pack(self) -> npt.NDArray[np.float64]:
        return np.array([KIND_LINEAR, self.d0, self.d1], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class FormulaTime(IterationTimeModel):
    """The compact calibrated form: a token staircase of two lines plus attention.

    With T tokens in the batch, n decodes with KV tokens in all and prefill work W::

        tau = (a + b T  if T <= knee else  s + c T) + d1 KV + d2 KV / sqrt(n) + d3 W + d4 n

    Seconds; eight coefficients and the knee (128 tokens, a GEMM tile boundary of the A100).
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
    provenance: Provenance = field(default=Provenance(name="formula"), compare=False)

    def __post_init__(self) -> None:
        names = ("a", "b", "s", "c", "d1", "d2", "d3", "d4", "knee")
        _check_coefficients("time_model", {name: getattr(self, name) for name in names})
        if self.a == 0:
            raise ConfigError("time_model.a: 0, an iteration must take time")

    def pack(self) -> npt.NDArray[np.float64]:
        coefficients = (self.knee, self.a, self.b, self.s, self.c, self.d1, self.d2, self.d3, self.d4)
        return np.array([KIND_FORMULA, *coefficients], dtype=np.float64)
