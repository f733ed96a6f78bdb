"""Iteration times from a profile of whole batches: operators by tokens, attention by prefill chunk and decodes together.

A table of prefill attention and one of decode attention miss what happens when both share a kernel
call. This model reads one table of measured mixed batches instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from llmsched_env import checks
from llmsched_env.compiled import compiled
from llmsched_env.errors import ConfigError
from llmsched_env.perf.base import MOST, FloatArray, IterationTimeModel, Provenance, check_axis, check_provenance, check_values
from llmsched_env.perf.batch import BatchSums
from llmsched_env.perf.interpolation import inside, last_at_or_below, locate, value_1d
from llmsched_env.perf.skew import READINGS, S_ALPHA, S_CHUNK, S_CONTEXT, S_DECODES, S_FIELDS, S_LONGEST, S_RATE, S_READING, alpha_of

# Header of the packed array: (start, size) of every axis, the start of every table, the measured reach of mixed batches.
H_TOKENS = 1
H_LINEAR = 3
H_SEQUENCES = 4
H_PER_SEQUENCE = 6
H_CHUNK = 7
H_CONTEXT = 9
H_DECODES = 11
H_DECODE_KV = 13
H_ATTENTION = 15
H_MIXED_DECODES = 16
H_SKEW = 17
H_FIELDS = H_SKEW + S_FIELDS


@compiled
def coordinates(batch: BatchSums) -> tuple[float, float, float, float]:
    """(prefill tokens, context of the prefill, decodes, mean context of a decode) at which attention is read."""
    chunk = batch.prefill_tokens
    context = batch.prefill_work / chunk - 0.5 * chunk if chunk > 0.0 else 0.0
    n = batch.decodes
    kv = batch.decode_kv / n - 1.0 if n > 0.0 else 0.0
    return chunk, context, n, kv


@compiled
def _context_position(model, chunk, context):  # type: ignore[no-untyped-def]
    """(i, j, w) of a prefill context; below 0 on the line through 0 and the first point at or above the chunk."""
    start = int(model[H_CONTEXT])
    size = int(model[H_CONTEXT + 1])
    if context >= 0.0:
        return locate(model, start, size, context, False)
    j = last_at_or_below(model, start, size, chunk)
    if model[start + j] < chunk and j < size - 1:
        j += 1
    j = max(j, 1)
    return 0, j, context / model[start + j]


@compiled
def _attention(model, chunk, context, n, kv):  # type: ignore[no-untyped-def]
    """Attention of all layers: linear in each of the four coordinates."""
    size_k = int(model[H_CONTEXT + 1])
    size_d = int(model[H_DECODES + 1])
    size_e = int(model[H_DECODE_KV + 1])
    c0, c1, wc = locate(model, int(model[H_CHUNK]), int(model[H_CHUNK + 1]), chunk, False)
    k0, k1, wk = _context_position(model, chunk, context)
    d0, d1, wd = locate(model, int(model[H_DECODES]), size_d, n, False)
    e0, e1, we = 0, 0, 0.0
    if n > 0.0:
        e0, e1, we = locate(model, int(model[H_DECODE_KV]), size_e, kv, False)
    total = 0.0
    for a in range(2):
        weight_c = wc if a == 1 else 1.0 - wc
        if weight_c == 0.0:
            continue
        for b in range(2):
            weight_k = weight_c * (wk if b == 1 else 1.0 - wk)
            if weight_k == 0.0:
                continue
            row = ((c1 if a == 1 else c0) * size_k + (k1 if b == 1 else k0)) * size_d
            for c in range(2):
                weight_d = weight_k * (wd if c == 1 else 1.0 - wd)
                if weight_d == 0.0:
                    continue
                cell = int(model[H_ATTENTION]) + (row + (d1 if c == 1 else d0)) * size_e
                low = model[cell + e0]
                total += weight_d * (low + we * (model[cell + e1] - low))
    return max(total, 0.0)


@compiled
def mixed_attention_seconds(batch: BatchSums) -> float:
    """Seconds of one iteration by ``MixedAttentionTime``; out of range where a table is read outside what was measured."""
    model = batch.model
    chunk, context, n, kv = coordinates(batch)
    seconds = value_1d(model, H_TOKENS, H_LINEAR, n + chunk, False)
    requests = n + batch.prefills
    seconds += value_1d(model, H_SEQUENCES, H_PER_SEQUENCE, requests, False)
    good = inside(model, int(model[H_TOKENS]), int(model[H_TOKENS + 1]), n + chunk)
    good = good and inside(model, int(model[H_SEQUENCES]), int(model[H_SEQUENCES + 1]), n + batch.prefills)
    if n > 0.0:
        good = good and n <= model[int(model[H_DECODES]) + int(model[H_DECODES + 1]) - 1]
        good = good and inside(model, int(model[H_DECODE_KV]), int(model[H_DECODE_KV + 1]), kv)
    if chunk > 0.0:
        good = good and chunk <= model[int(model[H_CHUNK]) + int(model[H_CHUNK + 1]) - 1]
        good = good and context <= model[int(model[H_CONTEXT]) + int(model[H_CONTEXT + 1]) - 1]
        good = good and n <= model[H_MIXED_DECODES]
    if not good:
        batch.out_of_range = 1
    attention = _attention(model, chunk, context, n, kv)
    if n > 1.0 and model[H_SKEW + S_ALPHA] != 0.0 and batch.decode_longest - 1.0 > kv:
        alpha = alpha_of(batch, H_SKEW)
        longest = _attention(model, chunk, context, n, batch.decode_longest - 1.0)
        if longest > attention:
            attention = max(attention + alpha * (longest - attention), 0.0)
    return seconds + attention


_EDGES = (
    ("skew_chunk", S_CHUNK),
    ("skew_decodes", S_DECODES),
    ("skew_rate", S_RATE),
    ("skew_longest", S_LONGEST),
    ("skew_context", S_CONTEXT),
)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class MixedAttentionTime(IterationTimeModel):
    """Iteration time from operators by tokens and one attention table over mixed batches.

    With T tokens in the batch, s requests, n decodes of mean context k (tokens cached before the
    iteration) and prefill chunks c_i over contexts x_i::

        tau = linear[T] + per_sequence[s] + attention[c, x, n, k]
        c = sum c_i,    x = sum c_i (c_i / 2 + x_i) / c - c / 2

    so that several chunks are read as one with the same tokens and the same attention work. x is
    below 0 where several short prompts share the batch; there the line through x = 0 and the first
    measured context at or above c goes on. (The chord is as long as the chunk because the slope of
    one short interval of the profile is mostly measurement noise.) Every table is linear between
    its points: measured decode attention is, and in logarithms it would be 11 to 14 % too high
    (casys-kaist/LLMServingSim @ 5daddb2, ``CHANGELOG.md``).

    s counts every request of the batch, unfinished prefills included: vLLM computes logits at the
    last token of each and drops those it does not need (``v1/worker/gpu_model_runner.py``,
    ``_prepare_inputs``, 0.28.0).

    Outside the axes the tables go on linearly (``llmsched_env.perf.interpolation``); ``valid`` is
    False there and the engine counts the iteration.

    Args:
        tokens, linear: (A,) axis, and seconds of everything that depends on the number of tokens alone.
        sequences, per_sequence: (B,) axis, and seconds of lm_head and sampler by number of requests.
        prefill_chunk, prefill_context: (C,), (D,) axes, tokens; ``prefill_context`` begins with 0.
        decode_batch, decode_context: (E,), (F,) axes: requests, tokens.
        prefill: (C, D) seconds of attention without decodes.
        decode: (E, F) seconds of attention without prefill.
        mixed: (C, D, M, F) seconds of attention with both, for the first M >= 2 points of ``decode_batch``.
        skew: alpha of decodes of unequal contexts (``llmsched_env.perf.skew``) by cell, one cell more on each axis than it has edges;
            None: attention is read at the mean context alone. The longest context may lie beyond ``decode_context``.
        skew_chunk, skew_decodes, skew_rate, skew_longest, skew_context: upper edges of the cells.
        skew_reading: one of ``llmsched_env.perf.skew.READINGS``.

    Raises:
        ConfigError: axes that do not increase, shapes that do not fit, negative or non-finite seconds, a correction in part.
    """

    compiled_seconds: ClassVar[Any] = mixed_attention_seconds

    tokens: FloatArray
    linear: FloatArray
    sequences: FloatArray
    per_sequence: FloatArray
    prefill_chunk: FloatArray
    prefill_context: FloatArray
    decode_batch: FloatArray
    decode_context: FloatArray
    prefill: FloatArray
    decode: FloatArray
    mixed: FloatArray
    skew: FloatArray | None = None
    skew_chunk: FloatArray | None = None
    skew_decodes: FloatArray | None = None
    skew_rate: FloatArray | None = None
    skew_longest: FloatArray | None = None
    skew_context: FloatArray | None = None
    skew_reading: str | None = None
    provenance: Provenance = field(default=Provenance(name="mixed-attention"))
    _packed: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        arrays: dict[str, FloatArray] = {}
        for axis in ("tokens", "sequences", "prefill_chunk", "prefill_context", "decode_batch", "decode_context"):
            arrays[axis] = check_axis("time_model", axis, getattr(self, axis))
        for axis in ("tokens", "sequences", "prefill_chunk", "decode_batch"):
            if arrays[axis][0] == 0:
                raise ConfigError(f"time_model.{axis}: begins with 0, must begin above 0")
        if arrays["prefill_context"][0] != 0:
            raise ConfigError(f"time_model.prefill_context: begins with {arrays['prefill_context'][0]}, must begin with 0")
        check_provenance(self.provenance)
        shape = checks.numbers("time_model.mixed", self.mixed).shape
        if len(shape) != 4 or not 2 <= shape[2] <= arrays["decode_batch"].size:
            raise ConfigError(f"time_model.mixed: shape {shape}, must be 4-D with 2 to {arrays['decode_batch'].size} decode batches")
        sizes = {name: axis.size for name, axis in arrays.items()}
        plane = (sizes["prefill_chunk"], sizes["prefill_context"])
        for name, expected in (
            ("linear", (sizes["tokens"],)),
            ("per_sequence", (sizes["sequences"],)),
            ("prefill", plane),
            ("decode", (sizes["decode_batch"], sizes["decode_context"])),
            ("mixed", (*plane, shape[2], sizes["decode_context"])),
        ):
            arrays[name] = check_values("time_model", name, getattr(self, name), expected)
        if arrays["linear"][0] == 0:
            raise ConfigError("time_model.linear: begins with 0, an iteration must take time")
        arrays |= self._skew_arrays()
        for name, array in arrays.items():
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        object.__setattr__(self, "_packed", self._pack())

    def _skew_arrays(self) -> dict[str, FloatArray]:
        """The correction for unequal contexts, checked; none of its fields or all."""
        names = ("skew", *(name for name, _ in _EDGES), "skew_reading")
        missing = [name for name in names if getattr(self, name) is None]
        if len(missing) == len(names):
            return {}
        if missing:
            raise ConfigError(f"time_model.{missing[0]}: None, must be there with the other fields of the correction ({', '.join(names)})")
        if self.skew_reading not in READINGS:
            raise ConfigError(f"time_model.skew_reading: {checks.shown(self.skew_reading)}, must be one of {', '.join(READINGS)}")
        arrays = {name: check_axis("time_model", name, getattr(self, name), least=1) for name, _ in _EDGES}
        alpha = checks.numbers("time_model.skew", self.skew)
        shape = tuple(arrays[name].size + 1 for name, _ in _EDGES)
        if alpha.shape != shape:
            raise ConfigError(f"time_model.skew: shape {alpha.shape}, must be {shape}, one cell more than edges on each axis")
        if not np.all(np.abs(alpha) <= MOST):
            raise ConfigError(f"time_model.skew: must be finite, from -{MOST:g} to {MOST:g}")
        return arrays | {"skew": alpha.copy()}

    @property
    def reads_contexts(self) -> bool:
        return self.skew is not None

    def _attention_table(self) -> FloatArray:
        """(C + 1, D, E + 1, F): the three attention tables as one whose axes begin with 0 (no prefill, no decode)."""
        measured = self.mixed.shape[2]
        table = np.zeros((self.prefill_chunk.size + 1, self.prefill_context.size, self.decode_batch.size + 1, self.decode_context.size))
        table[0, :, 1:, :] = self.decode
        table[1:, :, 0, :] = self.prefill[:, :, np.newaxis]
        table[1:, :, 1 : measured + 1, :] = self.mixed
        a, b = self.decode_batch[measured - 2 : measured]
        slope = (self.mixed[:, :, -1] - self.mixed[:, :, -2]) / (b - a)
        for e in range(measured, self.decode_batch.size):  # not measured: on from the last two
            table[1:, :, e + 1, :] = self.mixed[:, :, -1] + slope * (self.decode_batch[e] - b)
        return table

    def _pack(self) -> FloatArray:
        header = np.zeros(H_FIELDS, dtype=np.float64)
        header[H_MIXED_DECODES] = self.decode_batch[self.mixed.shape[2] - 1]
        parts: list[FloatArray] = [header]
        end = H_FIELDS
        for place, array, is_axis in (
            (H_TOKENS, self.tokens, True),
            (H_LINEAR, self.linear, False),
            (H_SEQUENCES, self.sequences, True),
            (H_PER_SEQUENCE, self.per_sequence, False),
            (H_CHUNK, np.concatenate(([0.0], self.prefill_chunk)), True),
            (H_CONTEXT, self.prefill_context, True),
            (H_DECODES, np.concatenate(([0.0], self.decode_batch)), True),
            (H_DECODE_KV, self.decode_context, True),
            (H_ATTENTION, self._attention_table(), False),
        ):
            header[place] = end
            if is_axis:
                header[place + 1] = array.size
            parts.append(array.ravel())
            end += array.size
        if self.skew is not None and self.skew_reading is not None:
            header[H_SKEW + S_READING] = READINGS.index(self.skew_reading)
            for place, edges in ((place, getattr(self, name)) for name, place in _EDGES):
                header[H_SKEW + place], header[H_SKEW + place + 1] = end, edges.size
                parts.append(edges)
                end += edges.size
            header[H_SKEW + S_ALPHA] = end
            parts.append(self.skew.ravel())
        return np.concatenate(parts)

    def pack(self) -> FloatArray:
        return self._packed

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MixedAttentionTime) and np.array_equal(self._packed, other._packed)

    def __hash__(self) -> int:
        return hash((self._packed.size, float(self._packed.sum())))

    def __repr__(self) -> str:
        return f"MixedAttentionTime({self.provenance.name!r})"


__all__ = ["MixedAttentionTime"]
