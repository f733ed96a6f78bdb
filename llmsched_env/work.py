"""Machine work of a request: seconds of one machine that all residents share.

An iteration of P prompt tokens, n decodes and their K tokens of context takes about

    tau = d0 + c P + b n + w1 K

seconds. All but d0 belongs to the requests it is done for. d0, which reads the weights once, serves everybody who is resident, and
how many that can be is what binds: seats, or KV memory. So d0 is shared out over them: a decode has d0 / N of an iteration with N
seats, or d0 k / C with k of C tokens of memory, or a mixture of both with a share ``a`` of memory. Summed over a request's life::

    work = c prompt + w0 output + w1 (output prompt + output^2 / 2)

This is the size of a job on one machine: least work first is shortest-job-first there, and the sum of works over a machine's seconds
is a load. The coefficients are a fit to the engine's time model over batches that the engine may run; how well it fits is told.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.forecast import class_weights
from llmsched_env.perf.batch import Batch
from llmsched_env.types import FloatArray, LengthStatistics, QueueLayout


@dataclass(frozen=True, slots=True)
class WorkWeights:
    """Seconds of machine work.

    Attributes:
        c: of a prompt token.
        w0: of an output token.
        w1: of an output token for each token of its context.
    """

    c: float
    w0: float
    w1: float

    def __post_init__(self) -> None:
        for name in ("c", "w0", "w1"):
            checks.number(f"work.{name}", getattr(self, name), unit="seconds")
        if self.c + self.w0 + self.w1 == 0:
            raise ConfigError("work: c, w0 and w1 are all 0, a request must be some work")

    def of(self, prompt: npt.ArrayLike, output: npt.ArrayLike) -> FloatArray:
        """Seconds of requests of so many tokens."""
        prompts, outputs = np.asarray(prompt, dtype=np.float64), np.asarray(output, dtype=np.float64)
        seconds: FloatArray = self.c * prompts + outputs * (self.w0 + self.w1 * (prompts + outputs / 2))
        return seconds


@dataclass(frozen=True, slots=True)
class LinearBatch:
    """tau = d0 + c P + b n + w1 K, seconds, with P prompt tokens, n decodes and K tokens of their context.

    Attributes:
        error: mean over the batches of the fit of |fitted / model - 1|.
    """

    d0: float
    c: float
    b: float
    w1: float
    error: float


def linear_batch(engine: EngineConfig, statistics: LengthStatistics) -> LinearBatch:
    """The engine's time model as a linear one: least squares of relative errors, coefficients >= 0, over batches the engine may run.

    Batches have 1 to ``seats`` decodes that hold 1/10 to all of the KV memory, no context longer than the engine serves, and prompt
    tokens from none to what the token budget leaves, in chunks of at most the mean prompt.
    """
    most = seats(engine, statistics)
    capacity, prompt = engine.kv_capacity_tokens, max(statistics.mean_prompt, 1.0)
    budget = capacity if engine.preset == "paper" else engine.max_num_batched_tokens
    rows, design = [], []
    for n in np.unique(np.round(np.geomspace(1.0, most, 12))).tolist():
        for kv in (np.array([0.1, 0.3, 0.5, 0.7, 0.9, 1.0]) * capacity).tolist():
            kv = min(max(kv, n), n * engine.longest_request)
            for share in (0.0, 0.25, 0.5, 1.0):
                tokens = share * min(max(budget - n, 0.0), max(capacity - kv, prompt) if engine.preset == "paper" else budget)
                rows.append(_batch(n, kv, tokens, prompt).array())
                design.append((1.0, tokens, n, kv))
    seconds = engine.time_model.seconds_of(np.array(rows))
    relative = np.array(design) / seconds[:, np.newaxis]
    found = _non_negative(relative)
    error = float(np.abs(relative @ found - 1.0).mean())
    d0, c, b, w1 = found.tolist()
    return LinearBatch(d0, c, b, w1, error)


def _batch(decodes: float, kv: float, tokens: float, prompt: float) -> Batch:
    """Decodes of equal context, and prompt tokens in equal chunks of at most one prompt."""
    prefills = float(np.ceil(tokens / prompt))
    chunk = tokens / prefills if prefills else 0.0
    return Batch(
        decodes=decodes,
        decode_kv=kv,
        prefills=prefills,
        prefill_tokens=tokens,
        prefill_squares=tokens * chunk,
        prefill_work=tokens * chunk / 2,
        sampled=decodes + prefills,
        load=kv + tokens,
        batch_size=decodes + prefills,
        decode_longest=kv / decodes,
        decode_shortest=kv / decodes,
        decode_squares=kv * kv / decodes,
    )


def _non_negative(rows: FloatArray) -> FloatArray:
    """(4,) coefficients >= 0 that make every row's sum nearest to 1: the most negative one is left out until none is."""
    found = np.zeros(rows.shape[1])
    kept = list(range(rows.shape[1]))
    while kept:
        scale = np.abs(rows[:, kept]).max(axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        solved = np.linalg.lstsq(rows[:, kept] / scale, np.ones(len(rows)), rcond=None)[0]
        if (solved >= 0).all():
            found[kept] = solved / scale
            break
        kept.pop(int(np.argmin(solved)))
    return found


def kv_of_a_resident(statistics: LengthStatistics) -> float:
    """Tokens that a resident holds on average over its iterations: E[output (prompt + output / 2)] / E[output]."""
    held = statistics.output * (statistics.prompt + statistics.output / 2)
    return float(statistics.weight @ held) / statistics.mean_output


def seats(engine: EngineConfig, statistics: LengthStatistics) -> float:
    """Residents that the engine has seats for, each with a token of the budget; without seats (``paper``) those that memory holds."""
    if engine.preset == "paper":
        return max(engine.kv_capacity_tokens / kv_of_a_resident(statistics), 1.0)
    return float(min(engine.most_active, engine.max_num_batched_tokens))


def memory_binds(engine: EngineConfig, statistics: LengthStatistics) -> bool:
    """Whether residents of average size fill the memory before the seats."""
    return engine.kv_capacity_tokens / kv_of_a_resident(statistics) <= seats(engine, statistics)


def work_weights(engine: EngineConfig, statistics: LengthStatistics, memory_share: float | None = None) -> WorkWeights:
    """The weights of requests on an engine.

    Args:
        memory_share: ``a``, the part of an iteration's fixed seconds that goes by tokens of memory, the rest by seats; None: all of
            it by whichever binds (``memory_binds``).

    Raises:
        ConfigError: ``memory_share`` outside [0, 1].
    """
    fit = linear_batch(engine, statistics)
    share = float(memory_binds(engine, statistics)) if memory_share is None else checks.number("memory_share", memory_share, high=1.0)
    by_seat = (1.0 - share) * fit.d0 / seats(engine, statistics)
    by_token = share * fit.d0 / engine.kv_capacity_tokens
    return WorkWeights(fit.c, fit.b + by_seat, fit.w1 + by_token)


def expected_work(statistics: LengthStatistics, layout: QueueLayout, weights: WorkWeights) -> FloatArray:
    """(J,) seconds of work to expect of a request of each class, > 0."""
    work: FloatArray = class_weights(statistics, layout) @ weights.of(statistics.prompt, statistics.output)
    return work


__all__ = [
    "LinearBatch",
    "WorkWeights",
    "expected_work",
    "kv_of_a_resident",
    "linear_batch",
    "memory_binds",
    "seats",
    "work_weights",
]
