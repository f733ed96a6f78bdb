"""Nested WAIT: a threshold per segment of decode length, output lengths unknown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from baselines.policy import Policy, Setting, first_head_fits
from llmsched_env.backend import View
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid import (
    NestedThresholds,
    check_nested,
    equal_probability_ends,
    nested_thresholds,
    rotation_quota,
    segment_design,
)
from llmsched_env.types import Decision, IntArray, QueueLayout

# More segments promise less base memory, but where M_req exceeds the KV cache their boundary queues
# fill it and evictions never end (measured on azure-conv lengths at 0.8 to 1.0 of the boundary).
CANDIDATE_SEGMENTS = (1, 2, 3, 4)
OVERLOAD_SEGMENTS = 4


class NestedWait(Policy):
    """Algorithm 2 of arXiv 2504.11320 v4.

    Segments 1..k run, k the longest prefix whose queues all hold their threshold n_k'; n_k' requests
    enter each. Segments after k are frozen, KV kept. Where the memory projected after the iteration
    exceeds C, the most recently admitted boundary requests that do not enter are evicted.

    Thresholds below one per iteration rotate as in ``wait``. Where memory is full of frozen residents
    and nothing could run, all segments advance; the conditions of the theory rule this out.

    Args:
        segment_ends: decode lengths r_1 < ... < r_{K-1} (the last segment ends at the longest output);
            by default designed from the statistics for the smallest memory requirement.
        num_segments: K for that design; None lets it choose.
        thresholds: n_k per segment; by default from the fluid model, checked after rounding.
        slack: cycle length over the smallest feasible one.
        delta: allowed probability of an overflow over the horizon (safety buffer).
        variant: ``B``, or ``A`` where entering a segment costs one iteration without a token (``paper`` preset).
        overload: accept parameters that break a condition, said in ``notes``.

    Raises:
        InfeasibleError: the conditions cannot be met, with the nearest feasible value.
    """

    name: ClassVar[str] = "nested-wait"

    def __init__(
        self,
        setting: Setting,
        segment_ends: Sequence[int] | None = None,
        num_segments: int | None = None,
        thresholds: Sequence[float] | None = None,
        slack: float = 1.25,
        delta: float = 0.1,
        rounding: str = "auto",
        variant: Literal["A", "B"] = "B",
        overload: bool = False,
    ) -> None:
        if variant not in ("A", "B"):
            raise ConfigError(f"policy.variant: {variant!r}, must be 'A' or 'B'")
        if variant == "A" and setting.engine.preset != "paper":
            raise ConfigError("policy.variant: 'A' needs the paper preset")
        self.engine = setting.engine_for(boundary_slot=variant == "A")
        self._variant = variant
        statistics = setting.statistics
        if segment_ends is None:
            ends = self._design(setting, num_segments, slack, delta, overload)
        else:
            ends = (*(int(e) for e in segment_ends if e < statistics.max_output), statistics.max_output)
        self.parameters: NestedThresholds
        if thresholds is None:
            self.parameters = nested_thresholds(
                statistics,
                setting.rate,
                self.engine,
                ends,
                slack=slack,
                delta=delta,
                horizon_seconds=setting.horizon_seconds,
                rounding=rounding,  # type: ignore[arg-type]
                overload=overload,
            )
        else:
            self.parameters = check_nested(
                thresholds,
                statistics,
                setting.rate,
                self.engine,
                ends,
                delta=delta,
                horizon_seconds=setting.horizon_seconds,
                overload=overload,
            )
        self.notes = "; ".join(self.parameters.notes)
        # The design may have merged segments that no request passes.
        self._ends = np.asarray(self.parameters.segment_ends, dtype=np.int64)
        self.layout = QueueLayout(segment_ends=tuple(int(e) for e in self._ends[:-1]))
        self._longest_prompt = int(np.ceil(statistics.prompt.max()))
        self._decision = Decision(self.layout.num_queues)
        self._launched = np.zeros(self.layout.num_queues, dtype=np.int64)

    def _design(
        self, setting: Setting, num_segments: int | None, slack: float, delta: float, overload: bool
    ) -> tuple[int, ...]:
        """Segment ends for the smallest memory; outside the stability region, where none is smallest, of equal probability."""
        try:
            return segment_design(
                setting.statistics,
                setting.rate,
                self.engine,
                num_segments=num_segments,
                candidates=CANDIDATE_SEGMENTS,
                slack=slack,
                delta=delta,
                horizon_seconds=setting.horizon_seconds,
            )
        except InfeasibleError:
            if not overload:
                raise
            return equal_probability_ends(setting.statistics, num_segments or OVERLOAD_SEGMENTS)

    def reset(self) -> None:
        self._launched[:] = 0

    def decide(self, view: View) -> Decision:
        run, admit, evict = self._decision.array
        run[:] = admit[:] = evict[:] = 0
        waiting, residents = view.waiting[0], view.residents[0]
        while True:
            need = rotation_quota(self.parameters.thresholds, self._launched)
            joined = 0
            while joined < need.shape[0] and waiting[joined] >= need[joined]:
                joined += 1
            if joined == 0:
                return self._decision
            self._launched[:joined] += 1
            if need[:joined].any() or residents[:joined].any():
                break
            # Under rotation an iteration may ask for nobody; with no resident to advance it is skipped.
        run[:joined] = 1
        admit[:joined] = need[:joined]
        if view.layout.num_segments > 1 and waiting[1:].sum() > admit[1:].sum():
            self._repair(view, joined, admit, evict)
        if not (residents[:joined].any() or admit[1:].any() or evict.any() or first_head_fits(view, admit)):
            run[:] = 1
        return self._decision

    def _repair(self, view: View, joined: int, admit: IntArray, evict: IntArray) -> None:
        """Evict unselected boundary requests, newest admission first, until projected memory fits."""
        room = self.engine.kv_capacity - view.kv_used - 2 * view.num_residents
        if room >= int(admit[0]) * (self._longest_prompt + 2):
            return  # fits whatever each request takes (tokens or blocks) in one iteration
        residents = view.resident_requests()
        boundary = residents.at_boundary
        selected = np.zeros(boundary.shape[0], dtype=np.bool_)
        for q in range(1, joined):
            selected[np.flatnonzero(boundary & (residents.queue == q))[: admit[q]]] = True
        after = self._after(residents.computed, residents.generated, residents.prefill_target, boundary, selected, residents.queue < joined)
        new = view.waiting_requests(0, int(admit[0]))
        total = int(after.sum()) + int(self._held(new.prompt_tokens + new.generated + 1).sum())
        victims = np.flatnonzero(boundary & ~selected)
        held = after[victims]
        for i in range(victims.shape[0] - 1, -1, -1):
            if total <= self.engine.kv_capacity:
                break
            evict[residents.queue[victims[i]]] += 1
            total -= int(held[i])

    def _held(self, tokens: np.ndarray) -> np.ndarray:
        """KV units of a request that holds ``tokens``."""
        return tokens if self.engine.preset == "paper" else -(-tokens // self.engine.block_size)

    def _after(
        self,
        computed: np.ndarray,
        generated: np.ndarray,
        target: np.ndarray,
        boundary: np.ndarray,
        selected: np.ndarray,
        runs: np.ndarray,
    ) -> np.ndarray:
        """(n,) KV units charged to each resident after the iteration, unknown lengths counted as longer.

        A survivor in a segment is charged the token it computes next (the paper's l + s), a boundary
        request what it holds, a request at the end of the last segment nothing.
        """
        if self.engine.preset != "paper":
            # Next iteration's slots: one token computed now, room for the next.
            tokens = np.where(boundary & ~selected, computed, np.maximum(computed, target) + 2)
            return self._held(tokens)
        last = int(self._ends[-1])
        advanced = np.where(generated + 1 >= last, 0, np.where(np.isin(generated + 1, self._ends), computed + 1, computed + 2))
        entering = computed + (1 if self._variant == "A" else np.minimum(2, last - generated))
        return np.where(boundary, np.where(selected, entering, computed), np.where(runs, advanced, computed + 1))
