"""The simulator with vLLM's automatic prefix caching: the same step, over blocks that keep their contents.

``schedule_cached`` follows ``llmsched_env.engine.vllm.schedule_vllm`` rule by rule; what differs is
which blocks are free and how many tokens an admission has left to compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.engine.arrays import ArrayBackend, ArrayView
from llmsched_env.engine.kernel import begin_step, finish_step, model_seconds, needs_drain, note_drain
from llmsched_env.engine.moves import admit, compact, enter_boundaries, evict, next_outside, requeue
from llmsched_env.engine.prefix_cache import N_ASKED, N_FREE, N_HIT, close_seat, find, grow, new_pool, open_seat
from llmsched_env.engine.state import (
    C_BLOCK_SIZE,
    C_BUDGET,
    C_CAPACITY,
    C_CHUNKED,
    C_MAX_SEQS,
    C_RESERVE_FULL,
    C_SEGMENTS,
    C_WATERMARK,
    F_CLOCK,
    I_ADMITTED,
    I_BOUNDARY,
    I_COMPLETED,
    I_FORCED_EVICTIONS,
    I_KV_BLOCKS,
    I_KV_RESERVED,
    I_KV_TOKENS,
    I_RESIDENTS,
    I_STEP_EVICTED,
    I_STEP_PREEMPTED,
    NO_END,
    Q_HEAD,
    Q_LEFT,
    Q_RESIDENT_KV,
    R_FORCED,
    R_GENERATED,
    R_PROMPT,
    S_BLOCKS,
    S_COMPUTED,
    S_GENERATED,
    S_ID,
    S_PROMPT,
    S_QUEUE,
    S_STATE,
    S_TOKENS,
    SLOT_BOUNDARY,
    SLOT_ENTERING,
    SLOT_GONE,
)
from llmsched_env.engine.vllm import batch_sums
from llmsched_env.errors import ConfigError
from llmsched_env.types import Decision, EngineConfig, EpisodeLimits, IntArray, QueueLayout, Workload


@compiled
def schedule_cached(n, run_all, decision, settings, ends, requests, times, slots, queues, scalars, clocks, batch, events, pool):  # type: ignore[no-untyped-def]
    """Blocks for residents with preemptions, admissions, and the batch. Returns the number of slots in use."""
    if scalars[I_BOUNDARY] > 0:
        enter_boundaries(n, run_all, decision, settings, slots, queues, scalars)
    for q in range(0, queues.shape[1], settings[C_SEGMENTS]):
        queues[Q_LEFT, q] = NO_END if run_all else decision[1, q]
    block = settings[C_BLOCK_SIZE]
    budget = settings[C_BUDGET]

    running = 0  # residents that are neither held nor at a boundary
    for i in range(n):
        slots[S_TOKENS, i] = 0
        state = slots[S_STATE, i]
        if state == SLOT_ENTERING or (state != SLOT_GONE and state != SLOT_BOUNDARY and (run_all or decision[0, slots[S_QUEUE, i]] != 0)):
            slots[S_TOKENS, i] = -1  # runs, tokens not yet granted
            running += 1

    preempted = 0
    victim = n - 1
    for i in range(n):
        if budget == 0:
            break
        if slots[S_TOKENS, i] != -1:
            continue
        computed = slots[S_COMPUTED, i]
        total = slots[S_PROMPT, i] + slots[S_GENERATED, i]
        tokens = min(total - computed, budget)
        need = (computed + tokens + block - 1) // block - slots[S_BLOCKS, i]
        while need > pool.counts[N_FREE]:
            while slots[S_TOKENS, victim] != -1:
                victim -= 1  # never below i: slot i itself runs
            r = evict(victim, settings, requests, slots, queues, scalars)
            close_seat(r, pool)
            requests[R_FORCED, r] += 1
            scalars[I_FORCED_EVICTIONS] += 1
            events[1, scalars[I_STEP_PREEMPTED]] = r
            scalars[I_STEP_PREEMPTED] += 1
            preempted += 1
            running -= 1
            if victim == i:
                break
        if slots[S_STATE, i] == SLOT_GONE:
            break
        slots[S_TOKENS, i] = tokens
        grow(slots[S_ID, i], need, (computed + tokens) // block, pool)
        slots[S_BLOCKS, i] += need
        queues[Q_RESIDENT_KV, slots[S_QUEUE, i]] += need
        budget -= tokens

    if preempted == 0:
        while budget > 0 and scalars[I_RESIDENTS] < settings[C_MAX_SEQS]:
            q = next_outside(settings, requests, queues)
            if q < 0:
                break
            r = queues[Q_HEAD, q]
            total = requests[R_PROMPT, r] + requests[R_GENERATED, r]
            hits, taken = find(r, total, block, pool)
            tokens = total - hits * block
            if tokens > budget:
                if settings[C_CHUNKED] == 0:
                    break
                tokens = budget
            reserve = settings[C_WATERMARK] if running > 0 else 0
            need = (hits * block + tokens + block - 1) // block - hits
            whole = (total + block - 1) // block - hits if settings[C_RESERVE_FULL] != 0 else need
            if whole + taken + reserve > pool.counts[N_FREE]:
                break
            queues[Q_LEFT, q] -= 1
            admit(q, n, clocks[F_CLOCK], settings, ends, requests, times, slots, queues, scalars)
            open_seat(r, hits, pool)
            grow(r, need, (hits * block + tokens) // block, pool)
            slots[S_COMPUTED, n] = hits * block
            scalars[I_KV_TOKENS] += hits * block
            slots[S_TOKENS, n] = tokens
            slots[S_BLOCKS, n] = hits + need
            queues[Q_RESIDENT_KV, q] += hits + need
            scalars[I_ADMITTED] += 1
            pool.counts[N_ASKED] += total
            pool.counts[N_HIT] += hits * block
            budget -= tokens
            running += 1
            n += 1
    scalars[I_KV_RESERVED] = settings[C_CAPACITY] - pool.counts[N_FREE]
    batch_sums(n, slots, batch)
    return n


@compiled
def step_cached(  # type: ignore[no-untyped-def]
    decision, model, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batch, events, trace, pool
):
    """``llmsched_env.engine.kernel.step`` with prefix caching."""
    n = begin_step(decision, settings, requests, slots, queues, scalars, clocks, events)
    for e in range(scalars[I_STEP_EVICTED]):
        close_seat(events[0, e], pool)
    n = schedule_cached(n, False, decision, settings, ends, requests, times, slots, queues, scalars, clocks, batch, events, pool)
    requeue(events[0], 0, scalars[I_STEP_EVICTED], settings, requests, queues, scalars)
    requeue(events[1], 0, scalars[I_STEP_PREEMPTED], settings, requests, queues, scalars)
    if needs_drain(settings, requests, scalars, batch):
        n = compact(n, slots)
        preempted = scalars[I_STEP_PREEMPTED]
        n = schedule_cached(n, True, decision, settings, ends, requests, times, slots, queues, scalars, clocks, batch, events, pool)
        requeue(events[1], preempted, scalars[I_STEP_PREEMPTED], settings, requests, queues, scalars)
        note_drain(scalars, batch)
    seconds = model_seconds(model, scalars, batch)
    finish_step(n, seconds, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batch, events, trace)
    for e in range(scalars[I_COMPLETED]):
        close_seat(events[2, e], pool)
    scalars[I_KV_BLOCKS] = settings[C_CAPACITY] - pool.counts[N_FREE]  # a shared block counts once


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Which head of its prompt each request shares with an earlier one.

    Attributes:
        donor: (N,) int32, the earlier request with the longest common head (the first such), -1 for none.
        tokens: (N,) int32, length of that head; 0 for none.
    """

    donor: IntArray
    tokens: IntArray

    @classmethod
    def of(cls, donor: npt.ArrayLike, tokens: npt.ArrayLike) -> SharedPrompts:
        """Check and convert; raises ``ConfigError`` naming the first offending row."""
        d, t = (np.ascontiguousarray(a, dtype=np.int32) for a in (donor, tokens))
        if d.ndim != 1 or d.shape != t.shape:
            raise ConfigError(f"shared_prompts: shapes {d.shape} and {t.shape}, must be equal and (N,)")
        bad = np.flatnonzero((d >= np.arange(d.size)) | (d < -1) | (t < 0) | ((d < 0) != (t == 0)))
        if bad.size:
            i = int(bad[0])
            raise ConfigError(f"shared_prompts: row {i} shares {t[i]} tokens with {d[i]}, must be >= 1 with an earlier one, or 0 with -1")
        return cls(d, t)

    @classmethod
    def none(cls, n: int) -> SharedPrompts:
        """All prompts differ from their first token on."""
        return cls(np.full(n, -1, dtype=np.int32), np.zeros(n, dtype=np.int32))


class PrefixCachingBackend(ArrayBackend):
    """The fast simulator with ``enable_prefix_caching=True`` (``llmsched_env.backend.Backend``), for the ``vllm`` preset.

    Even where no two prompts are alike this matters: a preempted request finds again those of its
    blocks that nobody has taken meanwhile. In the view and the reports a shared block counts once in
    ``kv_used`` and once for each user in ``resident_kv`` and ``boundary_kv``.

    Args:
        shared: common heads of the prompts; default none. A workload of another length is refused.
        uncached_first: blocks freed without contents are taken again first, as vLLM 0.28 does and 0.19 did not.
        trace: keep (request, tokens) of the last iteration for ``scheduled()``.
    """

    def __init__(self, shared: SharedPrompts | None = None, *, uncached_first: bool = True, trace: bool = False) -> None:
        super().__init__(trace)
        self._shared = shared
        self._uncached_first = uncached_first

    def reset(
        self,
        workload: Workload,
        layout: QueueLayout,
        engine: EngineConfig,
        limits: EpisodeLimits,
        *,
        reveal_output_length: bool = False,
    ) -> ArrayView:
        if engine.preset != "vllm":
            raise ConfigError(f"engine.preset: {engine.preset!r}, must be 'vllm' with prefix caching")
        for name in ("padded_prefill", "decode_needs_free_block"):
            if getattr(engine, name):
                raise ConfigError(f"engine.{name}: True, must be False with prefix caching (not a rule of vLLM)")
        n = len(workload)
        shared = SharedPrompts.none(n) if self._shared is None else self._shared
        if shared.donor.size != n:
            raise ConfigError(f"shared_prompts: {shared.donor.size} rows, must be {n} as the workload has requests")
        has = np.flatnonzero(shared.donor >= 0)
        heads = np.minimum(workload.prompt_tokens[has], workload.prompt_tokens[shared.donor[has]])
        bad = has[shared.tokens[has] > heads]
        if bad.size:
            i = int(bad[0])
            raise ConfigError(f"shared_prompts: row {i} shares {shared.tokens[i]} tokens, more than one of the two prompts has")
        view = super().reset(workload, layout, engine, limits, reveal_output_length=reveal_output_length)
        size = engine.block_size
        lengths = -(-(workload.prompt_tokens.astype(np.int64) + workload.output_tokens) // size)
        ends = np.cumsum(lengths)
        self.pool = new_pool(
            engine.num_blocks,
            self.slots.shape[1],
            int(lengths.max(initial=1)),
            (ends - lengths).astype(np.int32),
            shared.donor,
            shared.tokens // size,
            int(ends[-1]) if n else 0,
            self._uncached_first,
        )
        return view

    def advance(self, decision: Decision) -> None:
        self.check_running()
        step_cached(
            decision.array,
            self.model,
            self.settings,
            self.ends,
            self.requests,
            self.times,
            self.slots,
            self.queues,
            self.queue_f,
            self.scalars,
            self.clocks,
            self.batch,
            self.events,
            self.trace,
            self.pool,
        )
        self.check_progress()

    @property
    def hit_tokens(self) -> int:
        """Tokens found in the cache so far."""
        return int(self.pool.counts[N_HIT])

    @property
    def asked_tokens(self) -> int:
        """Tokens of all admissions so far, re-admissions included."""
        return int(self.pool.counts[N_ASKED])


__all__ = ["PrefixCachingBackend", "SharedPrompts", "schedule_cached", "step_cached"]
