"""The rules of ``baselines`` in plain Python over the `View`, for tests alone: same decision, other words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llmsched_env.backend import View
from llmsched_env.fluid import rotation_quota
from llmsched_env.forecast import expected_output, expected_output_by_class
from llmsched_env.types import ADMIT_ALL, Decision

Launched = list[int]
Reference = Callable[[Any, View, Launched], Decision]


def blocks(view: View, tokens: int) -> int:
    """KV units that ``tokens`` take."""
    return tokens if view.engine.preset == "paper" else -(-tokens // view.engine.block_size)


def in_order(view: View) -> list[tuple[int, int, int, int, int]]:
    """(class, prompt, generated, output or -1, id) of everything outside, in the engine's admission order."""
    found = []
    for j in range(view.layout.num_classes):
        waiting = view.waiting_requests(j, int(view.waiting[j, 0]))
        timely = len(waiting.id) - int(view.late[j])
        rank = (view.engine.class_rank or range(view.layout.num_classes))[j] if view.engine.admission_order == "class" else 0
        output = [-1] * len(waiting.id) if waiting.output_tokens is None else waiting.output_tokens.tolist()
        columns = (waiting.key, waiting.prompt_tokens, waiting.generated, np.array(output), waiting.id)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        found += [(i >= timely, rank, key, j, p, g, o, r) for i, (key, p, g, o, r) in enumerate(rows)]
    return [(j, p, g, o, r) for *_, j, p, g, o, r in sorted(found)]


def something_fits(view: View, admit: list[int]) -> bool:
    """The first outside request that ``admit`` names, beside everybody who is resident now."""
    for j, prompt, generated, _, _ in in_order(view):
        if admit[view.layout.queue(j)] > 0:
            tokens = prompt + generated
            if view.engine.preset == "paper":
                return tokens + view.kv_used + int(view.residents.sum()) <= view.engine.capacity_tokens
            first = tokens if view.engine.scheduler_reserve_full_isl else min(tokens, view.engine.max_num_batched_tokens)
            return view.kv_used + blocks(view, first) <= view.engine.num_blocks and view.num_residents < view.engine.max_num_seqs
    return False


def vllm_v0(policy: Any, view: View, launched: Launched) -> Decision:
    line = in_order(view)
    fits = False
    if line:
        tokens = line[0][1] + line[0][2]
        if view.engine.preset == "paper":
            fits = view.kv_used + view.num_residents + tokens <= view.engine.capacity_tokens
        else:
            need = blocks(view, tokens) + view.engine.watermark_blocks
            fits = view.kv_used + need <= view.engine.num_blocks and view.num_residents < view.engine.max_num_seqs
    return Decision.of([not fits], [ADMIT_ALL if fits else 0])


def wait(policy: Any, view: View, launched: Launched) -> Decision:
    quota = rotation_quota(policy.parameters.thresholds, launched).tolist()
    residents, waiting = view.residents[:, 0].tolist(), view.waiting[:, 0].tolist()
    need = [n if inside else max(n, 1) for n, inside in zip(quota, residents, strict=True)]
    ready = [w >= n for w, n in zip(waiting, need, strict=True)]
    for j, go in enumerate(ready):
        launched[j] += go
    admit = [n if go else 0 for n, go in zip(need, ready, strict=True)]
    stuck = any(ready) and not any(inside and go for inside, go in zip(residents, ready, strict=True)) and not something_fits(view, admit)
    return Decision.of([1] * len(ready) if stuck else ready, admit)


def nested_wait(policy: Any, view: View, launched: Launched) -> Decision:
    num_segments = view.layout.num_segments
    decision = Decision(num_segments)
    waiting, residents = view.waiting[0].tolist(), view.residents[0].tolist()
    while True:
        need = rotation_quota(policy.parameters.thresholds, launched).tolist()
        joined = next((k for k in range(num_segments) if waiting[k] < need[k]), num_segments)
        if joined == 0:
            return decision
        for k in range(joined):
            launched[k] += 1
        if any(need[:joined]) or any(residents[:joined]):
            break
    admit = need[:joined] + [0] * (num_segments - joined)
    evict = projected_evictions(policy, view, joined, admit)
    moves = any(residents[:joined]) or any(admit[1:]) or any(evict) or something_fits(view, admit)
    return Decision.of([k < joined or not moves for k in range(num_segments)], admit, evict)


def projected_evictions(policy: Any, view: View, joined: int, admit: list[int]) -> list[int]:
    """Nested WAIT's repair: KV charged after the iteration, boundary requests that do not enter evicted newest first."""
    evict = [0] * len(admit)
    ends = [int(end) for end in policy.parameters.segment_ends]
    one_slot = policy.engine.boundary_slot
    room = view.engine.kv_capacity - view.kv_used - 2 * view.num_residents
    longest = int(np.ceil(policy.longest_prompt))
    if room >= admit[0] * (longest + 2):
        return evict
    entering = [0, *admit[1:]]
    total, loose = 0, []
    r = view.resident_requests()
    rows = zip(r.queue.tolist(), r.at_boundary.tolist(), r.generated.tolist(), r.computed.tolist(), r.prefill_target.tolist(), strict=True)
    for queue, boundary, generated, computed, target in rows:
        enters = boundary and entering[queue] > 0
        entering[queue] -= enters
        if boundary and not enters:
            charge = blocks(view, computed)
            loose.append((queue, charge))
        elif view.engine.preset == "vllm":
            charge = blocks(view, max(computed, target) + 2)
        elif boundary:
            charge = computed + (1 if one_slot else min(2, ends[-1] - generated))
        elif queue >= joined:
            charge = computed + 1
        elif generated + 1 >= ends[-1]:
            charge = 0
        else:
            charge = computed + (1 if generated + 1 in ends else 2)
        total += charge
    new = view.waiting_requests(0, admit[0])
    total += sum(blocks(view, p + g + 1) for p, g in zip(new.prompt_tokens.tolist(), new.generated.tolist(), strict=True))
    while total > view.engine.kv_capacity and loose:
        queue, charge = loose.pop()
        evict[queue] += 1
        total -= charge
    return evict


def reserve(policy: Any, view: View, launched: Launched) -> Decision:
    expected, by_class = expected_output(policy.statistics), expected_output_by_class(policy.statistics, view.layout)
    top = len(expected) - 1
    residents = view.resident_requests()
    room = policy.theta * view.engine.kv_capacity_tokens
    for prompt, generated in zip(residents.prompt_tokens.tolist(), residents.generated.tolist(), strict=True):
        room -= prompt + expected[min(generated, top)]
    admit = [0] * view.layout.num_queues
    for j, prompt, generated, _, _ in in_order(view):
        room -= prompt + (expected[min(generated, top)] if generated else by_class[j])
        if room < 0 and (view.num_residents or any(admit)):
            break
        admit[view.layout.queue(j)] += 1
    return Decision.of([1] * len(admit), admit)


def mc_sf(policy: Any, view: View, launched: Launched) -> Decision:
    paper = view.engine.preset == "paper"
    rounding = 0 if paper else view.engine.block_size - 1
    r = view.resident_requests()
    assert r.output_tokens is not None
    held = np.maximum(r.computed, r.prefill_target) + rounding
    left = r.output_tokens - r.generated
    admit = [0] * view.layout.num_queues
    for j, prompt, generated, output, _ in in_order(view):
        held = np.append(held, prompt + generated + rounding)
        left = np.append(left, output - generated + (1 if paper else 0))
        peak = max(int((held + t)[left >= t].sum()) for t in np.unique(left))
        if peak > policy.capacity and len(held) > 1:
            break
        admit[view.layout.queue(j)] += 1
    return Decision.of([1] * len(admit), admit)


REFERENCES: dict[str, Reference] = {
    "vllm-v0": vllm_v0,
    "wait": wait,
    "nested-wait": nested_wait,
    "reserve": reserve,
    "shortest-prompt": reserve,
    "mc-sf": mc_sf,
}
