"""Nested WAIT: a threshold per segment of decode length, output lengths unknown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from baselines.policy import RulePolicy, Setting
from llmsched_env.compiled import compiled
from llmsched_env.engine.fleet import Rule, first_head_fits, rotated
from llmsched_env.engine.state import (
    C_BLOCK_SIZE,
    C_BOUNDARY_SLOT,
    C_CAPACITY,
    C_PRESET,
    I_KV_BLOCKS,
    I_KV_TOKENS,
    I_RESIDENTS,
    PRESET_PAPER,
    Q_HEAD,
    Q_LEFT,
    Q_RESIDENTS,
    Q_WAITING,
    R_GENERATED,
    R_NEXT,
    R_PROMPT,
    S_COMPUTED,
    S_GENERATED,
    S_QUEUE,
    S_STATE,
    S_TARGET,
    SLOT_BOUNDARY,
)
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid import (
    NestedThresholds,
    check_nested,
    equal_probability_ends,
    nested_thresholds,
    segment_design,
)
from llmsched_env.fluid.buffer import segment_stages
from llmsched_env.types import QueueLayout

# More segments promise less base memory, but where M_req exceeds the KV cache their boundary queues
# fill it and evictions never end (measured on azure-conv lengths at 0.8 to 1.0 of the boundary).
CANDIDATE_SEGMENTS = (1, 2, 3, 4)
OVERLOAD_SEGMENTS = 4


@compiled
def longest_prefix(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision):  # type: ignore[no-untyped-def]
    """The longest prefix of segments whose queues hold their thresholds.

    ``parameters``: K thresholds, K segment ends, the longest prompt; ``memory``: iterations launched, by segment.
    """
    num_segments = queues.shape[1]
    run, admit, evict = decision[0], decision[1], decision[2]
    decision[:] = 0
    joined = 0
    asked = 0
    inside = 0
    while asked + inside == 0:
        # Under rotation an iteration may ask for nobody; with no resident to advance it is skipped.
        joined = 0
        while joined < num_segments and queues[Q_WAITING, joined] >= rotated(parameters[joined], memory[joined]):
            joined += 1
        if joined == 0:
            return
        for k in range(joined):
            admit[k] = rotated(parameters[k], memory[k])
            memory[k] += 1
            asked += admit[k]
            inside += queues[Q_RESIDENTS, k]
    run[:joined] = 1
    left_behind = 0
    for k in range(1, num_segments):
        left_behind += queues[Q_WAITING, k] - admit[k]
    evicted = 0
    if left_behind > 0:
        evicted = repair(joined, admit, evict, parameters, settings, requests, slots, queues, scalars)
    if inside + evicted + asked - admit[0] == 0 and not first_head_fits(settings, requests, queues, scalars, admit):
        run[:] = 1


@compiled
def repair(joined, admit, evict, parameters, settings, requests, slots, queues, scalars):  # type: ignore[no-untyped-def]
    """Evict unselected boundary requests, newest admission first, until projected memory fits. Returns how many."""
    num_segments = queues.shape[1]
    ends = parameters[num_segments : 2 * num_segments]
    longest_prompt = parameters[2 * num_segments]
    capacity = settings[C_CAPACITY]
    used = scalars[I_KV_TOKENS if settings[C_PRESET] == PRESET_PAPER else I_KV_BLOCKS]
    if capacity - used - 2 * scalars[I_RESIDENTS] >= admit[0] * (longest_prompt + 2):
        return 0  # fits whatever each request takes (tokens or blocks) in one iteration

    total = 0
    for k in range(num_segments):
        queues[Q_LEFT, k] = admit[k]
    for i in range(scalars[I_RESIDENTS]):
        selected = False
        if slots[S_STATE, i] == SLOT_BOUNDARY:
            k = slots[S_QUEUE, i]
            selected = queues[Q_LEFT, k] > 0
            queues[Q_LEFT, k] -= selected
        total += charge_after(i, selected, joined, ends, settings, slots)
    r = queues[Q_HEAD, 0]
    for _ in range(admit[0]):
        if r < 0:
            break
        total += held(requests[R_PROMPT, r] + requests[R_GENERATED, r] + 1, settings)
        r = requests[R_NEXT, r]

    evicted = 0
    i = scalars[I_RESIDENTS] - 1
    while total > capacity and i >= 0:
        # Those selected are the oldest of their queue: counted from the newest, the others come first.
        k = slots[S_QUEUE, i]
        if slots[S_STATE, i] == SLOT_BOUNDARY and evict[k] < queues[Q_WAITING, k] - admit[k]:
            evict[k] += 1
            evicted += 1
            total -= charge_after(i, False, joined, ends, settings, slots)
        i -= 1
    return evicted


@compiled
def held(tokens, settings):  # type: ignore[no-untyped-def]
    """KV units of a request that holds ``tokens``."""
    if settings[C_PRESET] == PRESET_PAPER:
        return tokens
    return (tokens + settings[C_BLOCK_SIZE] - 1) // settings[C_BLOCK_SIZE]


@compiled
def charge_after(i, selected, joined, ends, settings, slots):  # type: ignore[no-untyped-def]
    """KV units charged to resident i after the iteration, unknown lengths counted as longer.

    A survivor in a segment is charged the token it computes next (the paper's l + s), a boundary
    request what it holds, a request at the end of the last segment nothing.
    """
    computed = slots[S_COMPUTED, i]
    boundary = slots[S_STATE, i] == SLOT_BOUNDARY
    if boundary and not selected:
        return held(computed, settings)
    if settings[C_PRESET] != PRESET_PAPER:
        # Next iteration's slots: one token computed now, room for the next.
        return held(max(computed, slots[S_TARGET, i]) + 2, settings)
    last = int(ends[ends.shape[0] - 1])
    generated = slots[S_GENERATED, i]
    if boundary:
        return computed + (1 if settings[C_BOUNDARY_SLOT] != 0 else min(2, last - generated))
    if slots[S_QUEUE, i] >= joined:
        return computed + 1
    if generated + 1 >= last:
        return 0
    for end in ends:
        if generated + 1 == end:
            return computed + 1
    return computed + 2


@compiled
def separate_segments(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision):  # type: ignore[no-untyped-def]
    """The rules ``implemented`` and ``no-wait``: each segment for itself.

    ``parameters``: as ``longest_prefix`` with whole thresholds, then the caps of the segments and 1 where nobody waits.
    """
    num_segments = queues.shape[1]
    run, admit, evict = decision[0], decision[1], decision[2]
    decision[:] = 0
    no_wait = parameters[3 * num_segments + 1] != 0.0
    asked = 0
    inside = 0
    left_behind = 0
    for k in range(num_segments):
        quota = int(parameters[k])
        room = int(parameters[2 * num_segments + 1 + k]) - queues[Q_RESIDENTS, k]
        if no_wait or room <= 0 or queues[Q_WAITING, k] >= quota:
            run[k] = 1
            admit[k] = max(min(quota, room, queues[Q_WAITING, k]), 0)
            inside += queues[Q_RESIDENTS, k]
        if k > 0:
            asked += admit[k]
            left_behind += queues[Q_WAITING, k] - admit[k]
    if inside + asked + admit[0] == 0:
        return
    evicted = 0
    if left_behind > 0:  # counted as if every segment ran, which charges a frozen resident one token too much
        evicted = repair(num_segments, admit, evict, parameters, settings, requests, slots, queues, scalars)
    if inside + evicted + asked == 0 and not first_head_fits(settings, requests, queues, scalars, admit):
        run[:] = 1


class NestedWait(RulePolicy):
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
        rule: ``paper``, or with whole thresholds max(floor(n_k), 1) and a cap of n_k times its stages on each segment:
            ``implemented``, where every segment decides for itself and one whose cap is used up does not wait
            (the authors' code of 2026), or ``no-wait``, where all segments run and the caps alone remain.

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
        rule: Literal["paper", "implemented", "no-wait"] = "paper",
    ) -> None:
        if rule not in ("paper", "implemented", "no-wait"):
            raise ConfigError(f"policy.rule: {rule!r}, must be 'paper', 'implemented' or 'no-wait'")
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
        longest_prompt = np.ceil(statistics.prompt.max())
        n = self.parameters.thresholds
        if rule == "paper":
            numbers = np.concatenate([n, self._ends, [longest_prompt]])
            self.rule = Rule(longest_prefix, self.layout.num_queues, numbers, memory=self.layout.num_segments)
        else:
            first, last = segment_stages(self.parameters.segment_ends, self.engine)
            caps = np.maximum(np.floor(n * (last - first + 1) + 1e-9), 1.0)
            whole = np.maximum(np.floor(n + 1e-9), 1.0)
            numbers = np.concatenate([whole, self._ends, [longest_prompt], caps, [rule == "no-wait"]])
            self.rule = Rule(separate_segments, self.layout.num_queues, numbers)

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
