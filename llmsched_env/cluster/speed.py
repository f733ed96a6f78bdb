"""What a calibration says of a replica's speed, in four numbers: what an operator tells a router of it beforehand."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf.batch import Batch

_DECODES = (1, 8, 16, 32, 64, 128)
_CONTEXTS = (128, 512, 1_024, 2_048)
_PROMPT = 512


@dataclass(frozen=True, slots=True)
class Speed:
    """An iteration takes ``base + running * decodes + kv * tokens of KV`` seconds, and each prompt token ``prefill`` more.

    The first three are the least squares of relative errors over batches of 1 to 128 decodes of 128 to 2,048 tokens each, as far as
    engine and KV have room for them; the last is what a prompt of 512 tokens adds to 8 decodes.
    """

    base: float
    running: float
    kv: float
    prefill: float

    @classmethod
    def of(cls, engine: EngineConfig) -> Speed:
        """By the engine's time model."""
        return _speed(engine)


@functools.lru_cache(maxsize=256)  # replicas of a cluster are mostly alike
def _speed(engine: EngineConfig) -> Speed:
    pairs = [
        (n, context)
        for n in _DECODES
        for context in _CONTEXTS
        if (n, context) == (1, _CONTEXTS[0]) or (n <= engine.max_num_seqs and n * context <= engine.kv_capacity_tokens)
    ]
    seconds = engine.time_model.seconds_of(np.stack([_decodes(n, context).array() for n, context in pairs]))
    terms = np.array([(1.0, n, n * context) for n, context in pairs]) / seconds[:, None]
    base, running, kv = np.linalg.lstsq(terms, np.ones(len(pairs)), rcond=None)[0]
    chunk = min(_PROMPT, engine.max_num_batched_tokens - 1)
    with_prompt, without = engine.time_model.seconds_of(np.stack([_decodes(_FEW, _CONTEXTS[1], prompt).array() for prompt in (chunk, 0)]))
    return Speed(float(base), float(running), float(kv), float(max(with_prompt - without, 0.0) / chunk))


_FEW = 8


def _decodes(n: int, context: int, prompt: int = 0) -> Batch:
    """``n`` decodes, each of which attends to ``context`` tokens, and a whole prompt beside them."""
    return Batch(
        decodes=n,
        decode_kv=n * context,
        prefills=float(prompt > 0),
        prefill_tokens=prompt,
        prefill_squares=float(prompt) ** 2,
        prefill_work=0.5 * float(prompt) ** 2,
        sampled=n + (prompt > 0),
        load=n * context + prompt,
        batch_size=n + (prompt > 0),
        decode_longest=context,
        decode_shortest=context,
        decode_squares=n * float(context) ** 2,
    )
