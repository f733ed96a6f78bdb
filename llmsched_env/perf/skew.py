"""The weight of the longest context in the attention of decodes of unequal contexts (compiled).

A profile measures decodes of one context. Where contexts differ the kernel waits for the longest, so that::

    seconds = seconds(mean) + alpha (seconds(longest) - seconds(mean))

alpha comes from batches of two contexts, r n long ones and the rest short, by cell of: prefill tokens, decodes n, r, the
longest context, context of the prefills. This is the correction of casys-kaist/LLMServingSim
(``profiler/core/skew.py``, ``fit_alpha.py`` and ``serving/core/trace_generator.py``, commit 5daddb2).

A batch in service has more than two contexts, and there are two ways to say what r it has (``READINGS``):

* ``range``, theirs: r = (mean - shortest) / (longest - shortest). A prefill that was not profiled has the pooled alpha.
* ``moments``: the batch of two contexts with the same longest, mean and variance has r = v / (v + (longest - mean)**2). A prefill
  falls to the next larger one that was profiled.

On batches of two contexts both are the same number. Where contexts are spread and one is much longer than all others, ``range`` reads
a quarter of all decodes as long, and ``moments`` one of them, which is what there is.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.perf.batch import BatchSums

READINGS = ("range", "moments")

# Header: (start, size) of the edges of each axis in the order of the table's axes, and the start of the table; relative to its place.
S_CHUNK = 0
S_DECODES = 2
S_RATE = 4
S_LONGEST = 6
S_CONTEXT = 8
S_ALPHA = 10  # 0: no correction
S_READING = 11  # place in ``READINGS``
S_FIELDS = 12


@compiled
def cell_of(model, axis, x):  # type: ignore[no-untyped-def]
    """Index of the first edge >= x: cells include their upper edge; the number of edges where x is beyond them."""
    start = int(model[axis])
    size = int(model[axis + 1])
    i = 0
    while i < size and model[start + i] < x:
        i += 1
    return i


@compiled
def long_share(batch: BatchSums, by_moments: bool) -> float:
    """r of the batch, from 0 to 1; its decodes differ."""
    mean = batch.decode_kv / batch.decodes
    if not by_moments:
        return (mean - batch.decode_shortest) / (batch.decode_longest - batch.decode_shortest)
    variance = max(batch.decode_squares / batch.decodes - mean * mean, 0.0)
    above = batch.decode_longest - mean
    return variance / (variance + above * above)


@compiled
def alpha_of(batch: BatchSums, header: int) -> float:
    """alpha of a batch with decodes of unequal context; ``header``: where the correction's header begins."""
    model = batch.model
    by_moments = model[header + S_READING] != 0.0
    chunks = int(model[header + S_CHUNK + 1])
    i = cell_of(model, header + S_CHUNK, batch.prefill_tokens)
    if not by_moments and i < chunks and model[int(model[header + S_CHUNK]) + i] != batch.prefill_tokens:
        i = chunks
    for axis, x in (
        (S_DECODES, batch.decodes),
        (S_RATE, long_share(batch, by_moments)),
        (S_LONGEST, batch.decode_longest - 1.0),
        (S_CONTEXT, batch.prefill_context),
    ):
        i = i * (int(model[header + axis + 1]) + 1) + cell_of(model, header + axis, x)
    return model[int(model[header + S_ALPHA]) + i]
