"""The sums of ``llmsched_env.perf.batch`` for a batch of a real engine.

``batch_of`` is the one place where they are taken. ``BatchFollower`` finds out from what vLLM's scheduler puts out
(``v1/core/sched/output.py``, 0.28.0 to 0.33.0) who decodes and who computes a chunk. Nothing of vLLM is imported.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from operator import mul
from typing import Any, NamedTuple

from llmsched_env.perf import Batch


class Chunk(NamedTuple):
    """A request in a batch that computes tokens that were there before: of its prompt or, after a preemption, all it has.

    Attributes:
        tokens: computed in this iteration.
        context: tokens computed before.
        last: it samples a token at the end of this iteration.
    """

    tokens: int
    context: int
    last: bool


def batch_of(decodes: Collection[int], chunks: Sequence[Chunk] = (), *, started: int = 0, finished: int = 0) -> Batch:
    """The sums of one batch.

    Args:
        decodes: of each request that computes the one token it sampled last, the tokens computed before (its context).
        chunks: all other requests of the batch.
        started: requests that enter this batch from the waiting queue.
        finished: requests that have ended since the batch before.
    """
    count = len(decodes)
    decode_kv = sum(decodes) + count
    tokens = squares = context = context64 = last = 0
    work = 0.0
    for chunk in chunks:
        tokens += chunk.tokens
        squares += chunk.tokens**2
        context += chunk.context
        context64 += -(-chunk.context // 64) * 64
        work += chunk.tokens * (chunk.tokens / 2 + chunk.context)
        last += chunk.last
    sums = {
        "decodes": count,
        "decode_kv": decode_kv,
        "prefills": len(chunks),
        "prefill_tokens": tokens,
        "prefill_squares": squares,
        "prefill_context": context,
        "prefill_context64": context64,
        "prefill_work": work,
        "sampled": count + last,
        "load": decode_kv + context + tokens,
        "batch_size": count + len(chunks),
        "started": started,
        "finished": finished,
        "decode_longest": max(decodes, default=-1) + 1,
        "decode_shortest": min(decodes, default=-1) + 1,
        "decode_squares": sum(map(mul, decodes, decodes)) + 2 * decode_kv - count,
    }
    return Batch(**{name: float(value) for name, value in sums.items()})


class BatchFollower:
    """Who in vLLM's batches decodes, from one ``SchedulerOutput`` to the next.

    A request computes chunks from its admission, the first one or one after a preemption, until an iteration has caught up with all its
    tokens; from then on it decodes. So the last chunk of a request that is computed again is a chunk, even of one token, as in the
    simulator. The tokens computed before are vLLM's own: a hit in the prefix cache, or what it computed while a batch was in flight,
    is in them.
    """

    def __init__(self) -> None:
        self._behind: set[str] = set()  # in a batch before, and not caught up by it
        self._present: set[str] = set()  # in a batch before, and not ended
        self._finished = 0

    def follow(self, output: Any, requests: Mapping[str, Any]) -> Batch | None:
        """The batch of a ``SchedulerOutput``; None where it holds no token. Every output must be followed, in order.

        Args:
            requests: the scheduler's, by id, right after ``schedule``.
        """
        ended = output.finished_req_ids
        if ended:
            self._finished += len(self._present & ended)
            self._present -= ended
            self._behind -= ended
        tokens: dict[str, int] = output.num_scheduled_tokens
        if not tokens:
            return None
        new, cached = output.scheduled_new_reqs, output.scheduled_cached_reqs
        resumed, behind = cached.resumed_req_ids, self._behind
        decodes: Collection[int] = cached.num_computed_tokens
        chunks: list[Chunk] = []

        def chunk(request_id: str, context: int) -> None:
            last = not requests[request_id].is_prefill_chunk
            (behind.discard if last else behind.add)(request_id)
            chunks.append(Chunk(tokens[request_id], context, last))

        if behind or resumed:
            decodes = []
            for request_id, context in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
                if request_id in behind or request_id in resumed:
                    chunk(request_id, context)
                else:
                    decodes.append(context)
        for request in new:
            self._present.add(request.req_id)
            chunk(request.req_id, request.num_computed_tokens)
        finished, self._finished = self._finished, 0
        return batch_of(decodes, chunks, started=len(new) + len(resumed), finished=finished)
