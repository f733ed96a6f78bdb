"""Single iterations of a recorded run against the iteration-time model, read off the requests' timestamps.

A record of requests does not hold iterations, but some show. After the last prompt every iteration gives one token to everybody
who is left, so that tokens a second are iterations a second. And where prompts are scheduled at one instant while nothing but
decodes is in flight, their first token comes when that batch and their own have ended.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.pages.fidelity.recorded_run import Run
from llmsched_env.perf import Batch, IterationTimeModel
from llmsched_env.types import FloatArray

_INSTANT = 1e-4  # seconds: timestamps of one iteration differ by microseconds, iterations last 10 ms
_STEPS = 60  # of a second, over which the contexts are followed


def decoding(run: Run, at: float) -> FloatArray:
    """(n,) contexts of the requests that decode at a time of the run, as if their tokens came evenly."""
    log = run.log
    alive = (log.first_token <= at + _INSTANT) & (log.completed > at + _INSTANT)
    share = (at - log.first_token[alive]) / (log.completed[alive] - log.first_token[alive])
    contexts: FloatArray = log.prompt_tokens[alive] + (log.output_tokens[alive] - 1) * share
    return contexts


def batch_of(contexts: FloatArray, chunks: FloatArray, hits: FloatArray) -> Batch:
    """A batch of decodes with these contexts and prefills of these chunks over tokens found in the cache."""
    kv = contexts + 1.0
    return Batch(
        decodes=float(kv.size),
        decode_kv=float(kv.sum()),
        decode_longest=float(kv.max(initial=0.0)),
        decode_shortest=float(kv.min()) if kv.size else 0.0,
        decode_squares=float((kv**2).sum()),
        prefills=float(chunks.size),
        prefill_tokens=float(chunks.sum()),
        prefill_squares=float((chunks**2).sum()),
        prefill_context=float(hits.sum()),
        prefill_work=float((chunks * (chunks / 2 + hits)).sum()),
        batch_size=float(kv.size + chunks.size),
    )


@dataclass(frozen=True, slots=True)
class DecodeSecond:
    """A second without prefill: mean number of decodes and longest context; tokens recorded, and those that models give."""

    decodes: float
    longest: float
    tokens: float
    modelled: tuple[float, ...]


def decode_seconds(run: Run, generated: FloatArray, models: tuple[IterationTimeModel, ...]) -> list[DecodeSecond]:
    """Whole seconds after the last prompt.

    Args:
        generated: (seconds,) tokens generated in each second of the recorded time series.
        models: each gives the tokens n / seconds of the second's batches, summed.
    """
    none = np.zeros(0)
    found = []
    for second in range(int(run.log.first_token.max() + run.started) + 1, generated.size):
        times = second - run.started + (np.arange(_STEPS) + 0.5) / _STEPS
        contexts = [decoding(run, float(t)) for t in times]
        if min(c.size for c in contexts) == 0:
            break
        modelled = tuple(sum(c.size / _STEPS / model.seconds(batch_of(c, none, none)) for c in contexts) for model in models)
        sizes, longest = np.array([c.size for c in contexts]), np.array([c.max() for c in contexts])
        found.append(DecodeSecond(float(sizes.mean()), float(longest.mean()), float(generated[second]), modelled))
    return found


@dataclass(frozen=True, slots=True)
class PrefillIteration:
    """An iteration with prompts that are computed whole: prefill tokens, decodes, and its seconds in the run and by the model."""

    tokens: float
    decodes: float
    recorded: float
    modelled: float


def prefill_iterations(run: Run, heads: SharedPrompts, block_size: int) -> list[PrefillIteration]:
    """Iterations that begin while decodes alone are in flight; the time of these, by the model, is taken off."""
    log, model, none = run.log, run.engine.time_model, np.zeros(0)
    hits = np.where(heads.donor >= 0, heads.tokens // block_size * block_size, 0)
    found = []
    for end in np.unique(log.first_token):
        ours = log.first_token == end
        begun = np.unique(log.admitted[ours])
        if begun.size != 1:
            continue
        start = float(begun[0])
        others = ~ours & (log.admitted <= start + _INSTANT) & (log.first_token > start + _INSTANT)
        contexts = decoding(run, start)
        chunks = (log.prompt_tokens - hits)[ours].astype(np.float64)
        if others.any() or contexts.size == 0 or chunks.sum() + contexts.size > run.engine.max_num_batched_tokens:
            continue
        before = model.seconds(batch_of(contexts, none, none))
        own = model.seconds(batch_of(contexts, chunks, hits[ours].astype(np.float64)))
        found.append(PrefillIteration(float(chunks.sum()), float(contexts.size), float(end) - start - before, own))
    return found
