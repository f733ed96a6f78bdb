"""Iteration times from measured tables: a linear part, decode attention, prefill attention, several prompts, sampling, overhead."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

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
from llmsched_env.perf.interpolation import inside, value_1d, value_2d

Lookup = Literal["linear", "vidur"]
Beyond = Literal["extrapolate", "clip"]

# Header of the packed array: options, then (start, size) of every axis and the start of every table.
H_VIDUR = 1
H_CLIP = 2
H_CONSTANT = 3
H_PER_REQUEST = 4
H_TOKENS = 5
H_LINEAR = 7
H_DECODES = 8
H_DECODE_KV = 10
H_DECODE = 12
H_CONTEXT = 13
H_CHUNK = 15
H_PREFILL = 17
H_SEQUENCES = 18
H_PER_SEQUENCE = 20
H_PROMPTS = 21
H_PROMPT_LENGTH = 23
H_SEVERAL = 25
H_FIELDS = 26


@compiled
def _up_to(x, step):  # type: ignore[no-untyped-def]
    return math.ceil(x / step) * step


@compiled
def coordinates(batch: BatchSums) -> tuple[float, float, float, float]:
    """(tokens, mean decode kv, prefill context, prefill chunk) at which the tables are read."""
    model, n = batch.model, batch.decodes
    tokens = n + batch.prefill_tokens
    kv = batch.decode_kv / n if n > 0.0 else 0.0
    squares = batch.prefill_squares
    chunk = math.sqrt(squares)
    if model[H_VIDUR] != 0.0:
        return _up_to(tokens, 8.0), _up_to(math.floor(kv), 64.0), batch.prefill_context64, math.floor(chunk + 0.5)
    # The context that gives one chunk the attention work of all: chunk * context = sum of chunk_i * context_i.
    context = (batch.prefill_work - 0.5 * squares) / chunk if chunk > 0.0 else 0.0
    return tokens, kv, max(context, 0.0), chunk


@compiled
def decode_attention(model, n, kv, clip):  # type: ignore[no-untyped-def]
    """Decode attention; outside the batch sizes of the table it goes in proportion to n."""
    rows = int(model[H_DECODES])
    at = min(max(n, model[rows]), model[rows + int(model[H_DECODES + 1]) - 1])
    seconds = value_2d(model, H_DECODES, H_DECODE_KV, H_DECODE, at, kv, clip)
    return seconds if clip or at == n else seconds * n / at


@compiled
def equal_prompts(batch: BatchSums) -> tuple[float, float]:
    """(prompts, tokens of each) of equal chunks with the sums of this batch's: exact where they are equal, 1 where one outweighs all."""
    tokens, squares = batch.prefill_tokens, batch.prefill_squares
    return tokens * tokens / squares, squares / tokens


@compiled
def table_seconds(batch: BatchSums) -> float:
    """Seconds of one iteration by ``TableTime``; out of range where a table is read outside its axes."""
    model = batch.model
    clip = model[H_CLIP] != 0.0
    tokens, kv, context, chunk = coordinates(batch)
    good = inside(model, int(model[H_TOKENS]), int(model[H_TOKENS + 1]), tokens)
    seconds = model[H_CONSTANT] + model[H_PER_REQUEST] * batch.batch_size
    seconds += value_1d(model, H_TOKENS, H_LINEAR, tokens, clip)
    if batch.decodes > 0.0:
        good = good and inside(model, int(model[H_DECODES]), int(model[H_DECODES + 1]), batch.decodes)
        good = good and inside(model, int(model[H_DECODE_KV]), int(model[H_DECODE_KV + 1]), kv)
        seconds += decode_attention(model, batch.decodes, kv, clip)
    if chunk > 0.0:
        good = good and inside(model, int(model[H_CONTEXT]), int(model[H_CONTEXT + 1]), context)
        good = good and inside(model, int(model[H_CHUNK]), int(model[H_CHUNK + 1]), chunk)
        seconds += value_2d(model, H_CONTEXT, H_CHUNK, H_PREFILL, context, chunk, clip)
        if model[H_PROMPTS + 1] > 0.0 and batch.prefills > 1.0:
            prompts, length = equal_prompts(batch)
            good = good and inside(model, int(model[H_PROMPTS]), int(model[H_PROMPTS + 1]), prompts)
            seconds += value_2d(model, H_PROMPTS, H_PROMPT_LENGTH, H_SEVERAL, prompts, length, clip)
    if model[H_SEQUENCES + 1] > 0.0 and batch.sampled > 0.0:
        good = good and inside(model, int(model[H_SEQUENCES]), int(model[H_SEQUENCES + 1]), batch.sampled)
        seconds += value_1d(model, H_SEQUENCES, H_PER_SEQUENCE, batch.sampled, clip)
    if not good:
        batch.out_of_range = 1
    return seconds


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class TableTime(IterationTimeModel):
    """Iteration time as a sum of table look-ups, each interpolated linearly in its axes.

    With T tokens in the batch, n decodes of mean context k (each context counts the token now
    computed), and prefill chunks c_i over contexts x_i::

        tau = constant + per_request * requests + linear[T] + decode[n, k] + prefill[x, c] + several_prompts[m, l] + per_sequence[s]

    Several chunks are read as one with the same attention work: c = sqrt(sum c_i^2) and
    x = sum(c_i x_i) / c. ``several_prompts`` is what they take beyond that one: as many equal chunks
    with the same sums, m = (sum c_i)^2 / sum c_i^2 of l = sum c_i^2 / sum c_i tokens. s is the number of
    requests that sample a token. ``decode`` and ``prefill`` count only where the batch has such requests.

    ``lookup="vidur"`` reads the tables as microsoft/vidur @ 7d47513 does
    (``sklearn_execution_time_predictor.py``): T up to the next multiple of 8, k = the mean's whole
    part up to the next multiple of 64, x = sum of the contexts each rounded up to 64, c rounded to
    the nearest token.

    Outside the axes the tables go on linearly (``llmsched_env.perf.interpolation``; decode attention
    in proportion to n), or, with ``beyond="clip"``, hold their edge values, as Vidur's forests do.
    Either way ``valid`` is False there and the engine counts the iteration.

    Args:
        tokens: (A,) axis of ``linear``.
        linear: (A,) seconds of everything that depends on the number of tokens alone.
        decode_batch, decode_kv: (B,), (C,) axes of ``decode``: requests, tokens of context.
        decode: (B, C) seconds of decode attention.
        prefill_context, prefill_chunk: (D,), (E,) axes of ``prefill``: tokens.
        prefill: (D, E) seconds of prefill attention.
        prompts, prompt_length: (G,), (H,) axes of ``several_prompts``: prompts (from 1) and tokens of each; empty for none.
        several_prompts: (G, H) seconds that m prompts of l tokens take beyond one chunk of the same attention work; 0 for m = 1.
        sequences, per_sequence: (F,) axis and seconds by sampled requests (lm_head, sampler); empty for none.
        constant, per_request: engine overhead of an iteration and of each of its requests, seconds.

    Raises:
        ConfigError: axes that do not increase, shapes that do not fit, negative or non-finite seconds.
    """

    compiled_seconds: ClassVar[Any] = table_seconds

    tokens: FloatArray
    linear: FloatArray
    decode_batch: FloatArray
    decode_kv: FloatArray
    decode: FloatArray
    prefill_context: FloatArray
    prefill_chunk: FloatArray
    prefill: FloatArray
    sequences: FloatArray = field(default_factory=lambda: np.empty(0))
    per_sequence: FloatArray = field(default_factory=lambda: np.empty(0))
    constant: float = 0.0
    per_request: float = 0.0
    lookup: Lookup = "linear"
    beyond: Beyond = "extrapolate"
    provenance: Provenance = field(default=Provenance(name="tables"))
    prompts: FloatArray = field(default_factory=lambda: np.empty(0))
    prompt_length: FloatArray = field(default_factory=lambda: np.empty(0))
    several_prompts: FloatArray = field(default_factory=lambda: np.empty((0, 0)))
    _packed: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        checks.one_of("time_model.lookup", self.lookup, ("linear", "vidur"))
        checks.one_of("time_model.beyond", self.beyond, ("extrapolate", "clip"))
        check_provenance(self.provenance)
        check_coefficients("time_model", {"constant": self.constant, "per_request": self.per_request})
        arrays: dict[str, FloatArray] = {}
        for axis in ("tokens", "decode_batch", "decode_kv", "prefill_context", "prefill_chunk"):
            arrays[axis] = check_axis("time_model", axis, getattr(self, axis))
        for axis in ("sequences", "prompts", "prompt_length"):
            given = getattr(self, axis)
            arrays[axis] = check_axis("time_model", axis, given) if checks.numbers(f"time_model.{axis}", given).size else np.empty(0)
        if arrays["prompts"].size and arrays["prompts"][0] != 1:
            raise ConfigError(f"time_model.prompts: begins with {arrays['prompts'][0]:g}, must begin with 1 prompt")
        if arrays["decode_batch"][0] == 0:
            raise ConfigError("time_model.decode_batch: begins with 0, must begin with >= 1 request")
        for name, axes in (
            ("linear", ("tokens",)),
            ("decode", ("decode_batch", "decode_kv")),
            ("prefill", ("prefill_context", "prefill_chunk")),
            ("per_sequence", ("sequences",)),
            ("several_prompts", ("prompts", "prompt_length")),
        ):
            arrays[name] = check_values("time_model", name, getattr(self, name), tuple(arrays[a].size for a in axes))
        if not (self.constant > 0 or arrays["linear"][0] > 0):
            raise ConfigError("time_model: linear[0] and constant are both 0, an iteration must take time")
        for name, array in arrays.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "_packed", self._pack())

    def _pack(self) -> FloatArray:
        header = np.zeros(H_FIELDS, dtype=np.float64)
        header[H_VIDUR] = self.lookup == "vidur"
        header[H_CLIP] = self.beyond == "clip"
        header[H_CONSTANT] = self.constant
        header[H_PER_REQUEST] = self.per_request
        parts: list[FloatArray] = [header]
        end = H_FIELDS
        for place, array, is_axis in (
            (H_TOKENS, self.tokens, True),
            (H_LINEAR, self.linear, False),
            (H_DECODES, self.decode_batch, True),
            (H_DECODE_KV, self.decode_kv, True),
            (H_DECODE, self.decode, False),
            (H_CONTEXT, self.prefill_context, True),
            (H_CHUNK, self.prefill_chunk, True),
            (H_PREFILL, self.prefill, False),
            (H_SEQUENCES, self.sequences, True),
            (H_PER_SEQUENCE, self.per_sequence, False),
            (H_PROMPTS, self.prompts, True),
            (H_PROMPT_LENGTH, self.prompt_length, True),
            (H_SEVERAL, self.several_prompts, False),
        ):
            header[place] = end
            if is_axis:
                header[place + 1] = array.size
            parts.append(array.ravel())
            end += array.size
        return np.concatenate(parts)

    def pack(self) -> FloatArray:
        return self._packed

    def clipped(self) -> TableTime:
        """The same tables with ``beyond="clip"``."""
        return dataclasses.replace(self, beyond="clip")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TableTime) and np.array_equal(self._packed, other._packed)

    def __hash__(self) -> int:
        return hash((self._packed.size, float(self._packed.sum())))

    def __repr__(self) -> str:
        return f"TableTime({self.provenance.name!r}, lookup={self.lookup!r}, beyond={self.beyond!r})"
