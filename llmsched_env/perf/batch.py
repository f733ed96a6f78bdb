"""The sums that describe a batch to an iteration-time model.

A request in the batch is a *decode* when it computes the one token it sampled last, else a
*prefill* chunk. ``context`` is the number of tokens computed before this iteration.

An engine keeps the sums in a record that compiled time models read, ``Batch`` is the same by value. Arrays of
batches, (n, BATCH_FIELDS) float64, have the columns numbered below.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

import numpy as np
import numpy.typing as npt

from llmsched_env.records import Record, Vector


class BatchSums(Record):
    """The fields of ``Batch`` in an engine, and the numbers of the time model that reads them."""

    model: Vector
    memory: Vector  # of the model, from one batch to the next; zeros at the start of an episode
    decodes: float
    decode_kv: float
    prefills: float
    prefill_tokens: float
    prefill_squares: float
    prefill_context: float
    prefill_context64: float
    prefill_work: float
    sampled: float
    load: float
    batch_size: float
    started: float
    finished: float
    decode_longest: float
    decode_shortest: float
    decode_squares: float
    out_of_range: int  # set to 1 by a model that had to go beyond the data behind it

    def array(self) -> npt.NDArray[np.float64]:
        """(BATCH_FIELDS,) float64 without the model's numbers."""
        return np.array([self._memory[field.name] for field in fields(Batch)], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Batch:
    """One batch.

    Attributes:
        decodes: decode requests.
        decode_kv: sum over decodes of context + 1 (tokens).
        prefills: requests with a prefill chunk.
        prefill_tokens: sum of chunks (tokens).
        prefill_squares: sum of chunk**2.
        prefill_context: sum of the contexts of prefill chunks (tokens).
        prefill_context64: the same with each context rounded up to 64 (Vidur's profile grid).
        prefill_work: sum of chunk * (chunk / 2 + context), attention work of prefill.
        sampled: requests that sample a token at the end of the iteration.
        load: sum of tokens held by the batch after its iteration (the paper's sum of l + s).
        batch_size: requests, those included that take a boundary slot without a token.
        started: requests that enter with this batch, from outside: for the first time or again after an eviction.
        finished: requests that ended since the batch before.
        decode_longest, decode_shortest: largest and smallest context + 1 of a decode (tokens).
        decode_squares: sum over decodes of (context + 1)**2.

    An engine fills the last three only for a time model that asks for them (``IterationTimeModel.reads_contexts``), because
    they cost a walk over the residents; 0 elsewhere.
    """

    decodes: float = 0.0
    decode_kv: float = 0.0
    prefills: float = 0.0
    prefill_tokens: float = 0.0
    prefill_squares: float = 0.0
    prefill_context: float = 0.0
    prefill_context64: float = 0.0
    prefill_work: float = 0.0
    sampled: float = 0.0
    load: float = 0.0
    batch_size: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    decode_longest: float = 0.0
    decode_shortest: float = 0.0
    decode_squares: float = 0.0

    def array(self) -> npt.NDArray[np.float64]:
        """(BATCH_FIELDS,) float64."""
        return np.array(astuple(self), dtype=np.float64)


BATCH_FIELDS = len(fields(Batch))
(
    DECODES,
    DECODE_KV,
    PREFILLS,
    PREFILL_TOKENS,
    PREFILL_SQUARES,
    PREFILL_CONTEXT,
    PREFILL_CONTEXT64,
    PREFILL_WORK,
    SAMPLED,
    LOAD,
    BATCH_SIZE,
    STARTED,
    FINISHED,
    DECODE_LONGEST,
    DECODE_SHORTEST,
    DECODE_SQUARES,
) = range(BATCH_FIELDS)
