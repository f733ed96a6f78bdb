"""Nested WAIT: a threshold per segment of decode length, output lengths unknown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal

import numpy as np

from llmsched_baselines.policy import RulePolicy, Setting
from llmsched_env.compiled import compiled
from llmsched_env.engine.residents import computed, generated, kv_of
from llmsched_env.engine.rules import Rule, first_head_fits, kv_free, rotated
from llmsched_env.engine.state import BOUNDARY, Engine
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid import (
    NestedThresholds,
    check_nested,
    equal_probability_ends,
    nested_thresholds,
    segment_design,
)
from llmsched_env.fluid.buffer import segment_stages
from llmsched_env.records import Counts, Record, Vector
from llmsched_env.types import Decision, QueueLayout

# More segments promise less base memory, but where M_req exceeds the KV cache their boundary queues
# fill it and evictions never end (measured on azure-conv lengths at 0.8 to 1.0 of the boundary).
CANDIDATE_SEGMENTS = (1, 2, 3, 4)
OVERLOAD_SEGMENTS = 4


class NestedRecord(Record):
    """What the rules of ``NestedWait`` read and remember, by segment."""

    thresholds: Vector
    ends: Vector  # decode length at the end of the segment
    caps: Vector  # on residents; of the rules other than the paper's
    launched: Counts  # iterations so far
    longest_prompt: float
    no_wait: bool


@compiled
def hold_everything(engine: Engine, decision: Decision) -> None:
    for q in range(engine.settings.num_queues):
        decision.run[q] = 0
        decision.admit[q] = 0
        decision.evict[q] = 0


@compiled
def run_all_segments(engine: Engine, decision: Decision) -> None:
    for q in range(engine.settings.num_queues):
        decision.run[q] = 1


@compiled
def longest_prefix(engine: Engine, policy: NestedRecord, decision: Decision) -> None:
    """The longest prefix of segments whose queues hold their thresholds."""
    queues, num_segments = engine.queues, engine.settings.num_queues
    hold_everything(engine, decision)
    joined = 0
    asked = 0
    inside = 0
    while asked + inside == 0:
        # Under rotation an iteration may ask for nobody; with no resident to advance it is skipped.
        joined = 0
        while joined < num_segments and queues.waiting[joined] >= rotated(policy.thresholds[joined], policy.launched[joined]):
            joined += 1
        if joined == 0:
            return
        for k in range(joined):
            decision.admit[k] = rotated(policy.thresholds[k], policy.launched[k])
            policy.launched[k] += 1
            asked += decision.admit[k]
            inside += queues.residents[k]
    left_behind = 0
    for k in range(num_segments):
        decision.run[k] = 1 if k < joined else 0
        if k > 0:
            left_behind += queues.waiting[k] - decision.admit[k]
    evicted = 0
    if left_behind > 0:
        evicted = repair(engine, policy, joined, decision)
    if inside + evicted + asked - decision.admit[0] == 0 and not first_head_fits(engine, decision):
        run_all_segments(engine, decision)


@compiled
def repair(engine: Engine, policy: NestedRecord, joined: int, decision: Decision) -> int:
    """Evict unselected boundary requests, newest admission first, until projected memory fits. Returns how many."""
    requests, queues, capacity = engine.requests, engine.queues, engine.settings.capacity
    if kv_free(engine) - 2 * engine.num_residents >= decision.admit[0] * (policy.longest_prompt + 2):
        return 0  # fits whatever each request takes (tokens or blocks) in one iteration

    total = 0
    for k in range(engine.settings.num_queues):
        queues.left[k] = decision.admit[k]
    r = engine.oldest
    while r >= 0:
        selected = False
        if requests.status[r] == BOUNDARY:
            k = requests.queue[r]
            selected = queues.left[k] > 0
            if selected:
                queues.left[k] -= 1
        total += charge_after(engine, policy, r, selected, joined)
        r = requests.next[r]
    r = queues.head[0]
    for _ in range(decision.admit[0]):
        if r < 0:
            break
        total += kv_of(engine, requests.prompt[r] + requests.base_generated[r] + 1)
        r = requests.next[r]

    evicted = 0
    r = engine.newest
    while total > capacity and r >= 0:
        # Those selected are the oldest of their queue: counted from the newest, the others come first.
        k = requests.queue[r]
        if requests.status[r] == BOUNDARY and decision.evict[k] < queues.waiting[k] - decision.admit[k]:
            decision.evict[k] += 1
            evicted += 1
            total -= charge_after(engine, policy, r, False, joined)
        r = requests.previous[r]
    return evicted


@compiled
def charge_after(engine: Engine, policy: NestedRecord, r: int, selected: bool, joined: int) -> int:
    """KV units charged to resident r after the iteration, unknown lengths counted as longer.

    A survivor in a segment is charged the token it computes next (the paper's l + s), a boundary
    request what it holds, a request at the end of the last segment nothing.
    """
    requests, settings = engine.requests, engine.settings
    held = computed(engine, r)
    boundary = requests.status[r] == BOUNDARY
    if boundary and not selected:
        return kv_of(engine, held)
    if settings.paper == 0:
        # Next iteration's slots: one token computed now, room for the next.
        return kv_of(engine, max(held, requests.target[r]) + 2)
    ends = policy.ends
    last = int(ends[ends.shape[0] - 1])
    tokens = generated(engine, r)
    if boundary:
        return held + (1 if settings.boundary_slot != 0 else min(2, last - tokens))
    if requests.queue[r] >= joined:
        return held + 1
    if tokens + 1 >= last:
        return 0
    for end in ends:
        if tokens + 1 == end:
            return held + 1
    return held + 2


@compiled
def separate_segments(engine: Engine, policy: NestedRecord, decision: Decision) -> None:
    """The rules ``implemented`` and ``no-wait``: each segment for itself, with whole thresholds."""
    queues, num_segments = engine.queues, engine.settings.num_queues
    hold_everything(engine, decision)
    asked = 0
    inside = 0
    left_behind = 0
    for k in range(num_segments):
        quota = int(policy.thresholds[k])
        room = int(policy.caps[k]) - queues.residents[k]
        if policy.no_wait != 0 or room <= 0 or queues.waiting[k] >= quota:
            decision.run[k] = 1
            decision.admit[k] = max(min(quota, room, queues.waiting[k]), 0)
            inside += queues.residents[k]
        if k > 0:
            asked += decision.admit[k]
            left_behind += queues.waiting[k] - decision.admit[k]
    if inside + asked + decision.admit[0] == 0:
        return
    evicted = 0
    if left_behind > 0:  # counted as if every segment ran, which charges a frozen resident one token too much
        evicted = repair(engine, policy, num_segments, decision)
    if inside + evicted + asked == 0 and not first_head_fits(engine, decision):
        run_all_segments(engine, decision)


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
        setting = replace(setting, statistics=setting.statistics.without_predictions())
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
        n = self.parameters.thresholds
        caps = np.empty(0)
        if rule != "paper":
            first, last = segment_stages(self.parameters.segment_ends, self.engine)
            caps = np.maximum(np.floor(n * (last - first + 1) + 1e-9), 1.0)
            n = np.maximum(np.floor(n + 1e-9), 1.0)
        record = NestedRecord(
            thresholds=np.array(n, dtype=np.float64),
            ends=self._ends.astype(np.float64),
            caps=caps,
            launched=np.zeros(self.layout.num_segments, dtype=np.int64),
        )
        record.longest_prompt, record.no_wait = np.ceil(statistics.prompt.max()), rule == "no-wait"
        self.rule = Rule(longest_prefix if rule == "paper" else separate_segments, self.layout.num_queues, record)

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
