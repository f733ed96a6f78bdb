"""Iteration times as live traffic shows them: what a batch costs, and what it costs that batches change.

A plan of synthetic batches measures each of them over and over, after a first time that is not counted. Live traffic never
repeats itself: requests start and end, and a batch has a number of tokens that was not seen lately. This model has terms for both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmsched_env import checks
from llmsched_env.compiled import compiled
from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import (
    FloatArray,
    IterationTimeModel,
    Provenance,
    check_axis,
    check_coefficients,
    check_provenance,
    check_values,
)
from llmsched_env.perf.batch import BatchSums
from llmsched_env.perf.interpolation import value_1d

COEFFICIENTS = (
    "decode",
    "decode_kv",
    "decode_kv_root",
    "prefill",
    "prefill_work",
    "started",
    "finished",
    "changed",
    "changed_decode",
    "new_shape",
    "new_shape_token",
)
"""Fields of ``TrafficTime`` that are seconds for one of something, in the order in which the compiled function reads them."""
MOST_SHAPES = 1024

# Header of the packed array: coefficients, the number of shapes that are kept, the range, then the table of tokens.
H_COEFFICIENTS = 0
H_SHAPES = len(COEFFICIENTS)
H_MAX_TOKENS = H_SHAPES + 1
H_MAX_DECODES = H_SHAPES + 2
H_MAX_CONTEXT = H_SHAPES + 3
H_TOKENS = H_SHAPES + 4
H_LINEAR = H_SHAPES + 6
H_FIELDS = H_SHAPES + 7


@compiled
def recall(memory, shapes, tokens):  # type: ignore[no-untyped-def]
    """Whether ``tokens`` is among the last ``shapes`` different numbers; it is the latest then (least recently used leaves).

    Args:
        memory: (>= shapes,) the numbers, latest first; 0 where there is none.
    """
    before = tokens
    for i in range(shapes):
        here = memory[i]
        memory[i] = before
        if here == tokens:
            return True
        if here == 0.0:
            return False
        before = here
    return False


@compiled
def traffic_seconds(batch: BatchSums) -> float:
    """Seconds of one iteration by ``TrafficTime``."""
    model, n, kv = batch.model, batch.decodes, batch.decode_kv
    tokens = n + batch.prefill_tokens
    seconds = value_1d(model, H_TOKENS, H_LINEAR, tokens, False)
    seconds += model[0] * n + model[1] * kv + model[3] * batch.prefills + model[4] * batch.prefill_work
    if n > 0.0:
        seconds += model[2] * kv / math.sqrt(n)
    if batch.started + batch.finished > 0.0:
        seconds += model[5] * batch.started + model[6] * batch.finished + model[7] + model[8] * n
    shapes = int(model[H_SHAPES])
    if shapes > 0 and not recall(batch.memory, shapes, tokens):
        seconds += model[9] + model[10] * tokens
    if tokens > model[H_MAX_TOKENS] or n > model[H_MAX_DECODES] or kv > model[H_MAX_CONTEXT] * n:
        batch.out_of_range = 1
    return seconds


@dataclass(frozen=True, slots=True)
class TrafficTime(IterationTimeModel):
    """Iteration time fitted to live traffic.

    With T tokens in the batch, n decodes of KV tokens in all, p prompts in prefill of attention work W, s requests that start and
    f that have finished since the batch before::

        tau = linear[T] + decode n + decode_kv KV + decode_kv_root KV / sqrt(n) + prefill p + prefill_work W
            + started s + finished f + (changed + changed_decode n   where s + f > 0)
            + (new_shape + new_shape_token T   where T is not among the last ``shapes`` different ones)

    ``linear`` is a table with straight lines between its points, on through the last ones beyond them. The last line is what a cache
    of kernels by number of tokens costs: vLLM's CPU build keeps 32 matmul primitives for each linear layer
    (``model_executor/layers/utils.py``, ``ops.create_onednn_mm(weight, 32)``, 0.28.0 to 0.32.0) and makes a new one for every other
    number of tokens. At the start of an episode nothing has been seen.

    Args:
        tokens, linear: (A,) axis from above 0, and seconds.
        decode, decode_kv, decode_kv_root, prefill, prefill_work, started, finished, changed, changed_decode, new_shape,
            new_shape_token: seconds for one of each, >= 0.
        shapes: how many numbers of tokens are remembered, up to 1,024; 0 for a machine without such a cache.
        max_tokens, max_decodes, max_context: the range of the data: tokens and decodes of a batch, mean context of a decode.

    Raises:
        ConfigError: an axis that does not increase, negative or non-finite seconds, an iteration that takes no time.
    """

    compiled_seconds: ClassVar[Any] = traffic_seconds

    tokens: tuple[float, ...]
    linear: tuple[float, ...]
    decode: float = 0.0
    decode_kv: float = 0.0
    decode_kv_root: float = 0.0
    prefill: float = 0.0
    prefill_work: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    changed: float = 0.0
    changed_decode: float = 0.0
    new_shape: float = 0.0
    new_shape_token: float = 0.0
    shapes: int = 0
    max_tokens: float = math.inf
    max_decodes: float = math.inf
    max_context: float = math.inf
    provenance: Provenance = field(default=Provenance(name="traffic"), compare=False)

    def __post_init__(self) -> None:
        axis = check_axis("time_model", "tokens", self.tokens)
        table = check_values("time_model", "linear", self.linear, (axis.size,))
        check_coefficients("time_model", {name: getattr(self, name) for name in COEFFICIENTS})
        object.__setattr__(self, "shapes", checks.integer("time_model.shapes", self.shapes, low=0, high=MOST_SHAPES))
        for name in ("max_tokens", "max_decodes", "max_context"):
            checks.number(f"time_model.{name}", getattr(self, name), high=math.inf, open_low=True)
        check_provenance(self.provenance)
        if not table.min() > 0:
            raise ConfigError("time_model.linear: 0 at a point, an iteration must take time")
        for name, array in (("tokens", axis), ("linear", table)):
            object.__setattr__(self, name, tuple(array.tolist()))

    @classmethod
    def memory_size(cls, numbers: FloatArray) -> int:
        return int(numbers[H_SHAPES])

    def pack(self) -> FloatArray:
        header = np.zeros(H_FIELDS)
        header[:H_SHAPES] = [getattr(self, name) for name in COEFFICIENTS]
        header[H_SHAPES] = self.shapes
        header[H_MAX_TOKENS], header[H_MAX_DECODES], header[H_MAX_CONTEXT] = self.max_tokens, self.max_decodes, self.max_context
        header[H_TOKENS], header[H_TOKENS + 1] = H_FIELDS, len(self.tokens)
        header[H_LINEAR] = H_FIELDS + len(self.tokens)
        return np.concatenate([header, self.tokens, self.linear])


__all__ = ["COEFFICIENTS", "MOST_SHAPES", "TrafficTime"]
