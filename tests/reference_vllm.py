"""Object-level restatement of vLLM's scheduler under our `Decision` (run / admit / evict per queue).

An oracle for the engine's ``vllm`` preset: request objects in plain lists, nothing shared with the
compiled kernel. What it restates of vLLM is ``vllm/v1/core/sched/scheduler.py`` ``schedule`` and
``vllm/v1/core/kv_cache_manager.py`` ``allocate_slots`` (0.28.0), without prefix caching, speculation or
connectors; of 0.33.0 the interval between prefills, the cap on active requests, the limit on long prompts and scheduling by priority.
On top come queues, segments, holds and evictions:

* a step evicts what the decision asks for, lets boundary requests enter, serves the running residents,
  admits from outside, moves the clock, hands out tokens and queues the arrivals, in this order;
* a held resident and one that stands at a boundary keep their blocks, take none, are no victims, and
  count towards ``max_num_seqs``;
* a request re-prefills prompt + generated after an eviction; until that prefill is complete it
  belongs to segment 0 of its class;
* where a step schedules nothing after the last arrival and the episode drains, the step is done once
  more with the greedy decision; what that step evicted may come back in the repetition.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import Batch
from llmsched_env.types import Decision, QueueLayout, Workload


@dataclass(slots=True, eq=False)
class Request:
    """One request; times are seconds, NaN until they happen."""

    ident: int
    prompt: int
    output: int
    arrival: float
    klass: int
    priority: int = 0
    key: int = 0
    generated: int = 0
    computed: int = 0
    target: int = 0
    blocks: int = 0
    segment: int = 0
    boundary: bool = False
    admitted: float = math.nan
    first_token: float = math.nan
    completed: float = math.nan
    evictions: int = 0
    forced: int = 0

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated

    @property
    def decoding(self) -> bool:
        return self.computed >= self.target


@dataclass(slots=True)
class Step:
    """What one step did. ``kv_used`` (KV units) is read after the admissions; the queues after the step."""

    start: float
    seconds: float = 0.0
    idle: bool = True
    forced_drain: bool = False
    scheduled: dict[int, int] = field(default_factory=dict)
    evicted: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    kv_used: int = 0
    batch: Batch = field(default_factory=Batch)
    waiting: list[list[int]] = field(default_factory=list)
    boundary: list[list[int]] = field(default_factory=list)
    residents: list[int] = field(default_factory=list)


def context_facts(contexts: list[int]) -> dict[str, float]:
    """What a batch says of the contexts of its decodes, one by one."""
    with_new = [c + 1 for c in contexts]
    return {
        "decode_longest": max(with_new, default=0),
        "decode_shortest": min(with_new, default=0),
        "decode_squares": sum(c * c for c in with_new),
    }


class ReferenceVLLM:
    """The engine of one episode. ``done`` tells when no further step makes sense."""

    def __init__(self, workload: Workload, layout: QueueLayout, config: EngineConfig, limits: EpisodeLimits) -> None:
        self.layout, self.config, self.limits = layout, config, limits
        self.least_budget = 128  # a tile
        classes = layout.classify(workload.prompt_tokens, workload.output_tokens, workload.type_id)
        self.requests = [
            Request(i, int(workload.prompt_tokens[i]), int(workload.output_tokens[i]), float(workload.arrival[i]), int(classes[i]))
            for i in range(len(workload))
        ]
        self.by_priority = config.scheduling_policy == "priority"
        if workload.priority is not None:
            for request, priority in zip(self.requests, workload.priority.tolist(), strict=True):
                request.priority = priority
        self.future = list(reversed(self.requests))
        self.outside: list[list[Request]] = [[] for _ in range(layout.num_classes)]
        self.residents: list[Request] = []
        self.free = config.num_blocks
        self.clock = 0.0
        self.done = False
        self.preemptions = 0
        self._next_key, self._low_key = 0, 0
        self._since_prefill = config.prefill_schedule_interval
        self._capacity_bound = False
        self._arrivals(Step(0.0))

    # --- one step ---------------------------------------------------------------------------------

    def step(self, decision: Decision) -> Step:
        step = Step(self.clock)
        barred = self._evict(decision, step)
        self._boundary_and_batch(decision, step, barred)
        if not step.scheduled and not self.future and self.limits.drain:
            step.forced_drain = True
            self._boundary_and_batch(Decision.greedy(self.layout.num_queues), step, set())
        step.kv_used = self.kv_reserved
        if step.scheduled:
            self._execute(step)
        elif not step.evicted and not step.preempted:  # after an eviction the policy decides again at once
            end = min(self.future[-1].arrival, self.limits.horizon) if self.future else self.clock
            self.done = not self.future or self.future[-1].arrival > self.limits.horizon
            step.seconds = end - self.clock
            self.clock = end
        if not self.done:
            self._arrivals(step)
            self.done = not (self.future or self.residents or any(self.outside))
        self._report_queues(step)
        return step

    def _evict(self, decision: Decision, step: Step) -> set[int]:
        chosen: list[Request] = []
        for j in range(self.layout.num_classes):
            for k in range(1, self.layout.num_segments):
                count = int(decision.evict[self.layout.queue(j, k)])
                standing = [r for r in self.residents if r.boundary and (r.klass, r.segment) == (j, k)]
                chosen += standing[max(0, len(standing) - count) :] if count > 0 else []
        rank = {r.ident: i for i, r in enumerate(self.residents)}
        for request in sorted(chosen, key=lambda r: rank[r.ident], reverse=True):
            self._send_outside(request)
            step.evicted.append(request.ident)
        return set(step.evicted)

    def _boundary_and_batch(self, decision: Decision, step: Step, barred: set[int]) -> None:
        entering = self._enter(decision)
        running = [
            r for r in self.residents if r.ident in entering or (not r.boundary and decision.run[self.layout.queue(r.klass, r.segment)])
        ]
        asked = decision.token_budget
        most = self.config.max_num_batched_tokens
        budget = min(max(asked, self.least_budget), most) if asked else most
        room = budget
        self._begin_prefill(decision, running, barred)
        budget, forced = self._serve(running, budget, step)
        if not forced:
            self._admit(decision, running, budget, room, step, barred)
            if not self._deferred:
                self._capacity_bound = any(self._left[r.klass] > 0 for r in self._standing(barred))
        if step.scheduled:
            self._since_prefill = 0 if self._carried else self._since_prefill + 1
        elif self._carried:  # computed nothing: whoever was served was preempted afterwards
            self._since_prefill = 0

    def _standing(self, barred: set[int]) -> list[Request]:
        return [r for requests in self.outside for r in requests if r.ident not in barred]

    def _begin_prefill(self, decision: Decision, running: list[Request], barred: set[int]) -> None:
        """Whether prefills wait in this iteration, and the most tokens of one of them."""
        config = self.config
        self._left = [int(decision.admit[self.layout.queue(j)]) for j in range(self.layout.num_classes)]
        early = self._since_prefill + 1 < config.prefill_schedule_interval
        released = self._capacity_bound and config.prefill_interval_release
        self._deferred = early and not released and any(r.decoding for r in running)
        self._carried = False
        standing = self._standing(barred)
        may_enter = sum(min(self._left[j], sum(r.klass == j for r in standing)) for j in range(self.layout.num_classes))
        alone = len(running) + may_enter <= 1
        self._most = config.max_model_len if alone or not config.long_prefill_token_threshold else config.long_prefill_token_threshold

    def _enter(self, decision: Decision) -> set[int]:
        entering: set[int] = set()
        left = decision.admit.tolist()
        for request in self.residents:
            queue = self.layout.queue(request.klass, request.segment)
            if request.boundary and left[queue] > 0:
                left[queue] -= 1
                request.boundary = False
                entering.add(request.ident)
        return entering

    def _serve(self, running: list[Request], budget: int, step: Step) -> tuple[int, bool]:
        """Tokens and blocks for the running list, which loses those preempted. Returns (budget left, preempted?)."""
        config = self.config
        forced, index = False, 0
        while index < len(running) and budget > 0:
            request = running[index]
            if self._deferred and not request.decoding:
                index += 1
                continue
            tokens = min(request.tokens - request.computed, budget, self._most)
            more = math.ceil((request.computed + tokens) / config.block_size) - request.blocks
            wanted = max(1, more) if config.decode_needs_free_block and request.decoding else more
            while wanted > self.free:
                victim = max(running, key=lambda r: (r.priority, r.arrival)) if self.by_priority else running[-1]
                index -= running.index(victim) < index
                running.remove(victim)
                budget += step.scheduled.pop(victim.ident, 0)
                self._send_outside(victim)
                victim.forced += 1
                self.preemptions += 1
                step.preempted.append(victim.ident)
                forced = True
                if victim is request:
                    break
            if forced and request not in running:
                if self.by_priority:
                    continue
                return budget, forced
            self._carried |= not request.decoding
            self._schedule(request, tokens, more, step)
            budget -= tokens
            index += 1
        return budget, forced

    def _admit(self, decision: Decision, running: list[Request], budget: int, room: int, step: Step, barred: set[int]) -> None:
        """``budget``: tokens left; ``room``: those of the whole iteration."""
        config = self.config
        queue = self._standing(barred)
        by_class = config.admission_order == "class"
        queue.sort(key=self._by_priority if self.by_priority else lambda r: (r.klass if by_class else 0, r.key))
        left = self._left
        count = longest = 0
        for request in queue:
            if left[request.klass] <= 0:
                continue
            if len(self.residents) >= (config.max_num_active_seqs or config.max_num_seqs):
                return
            if config.padded_prefill:
                if (count + 1) * max(longest, request.tokens) > room:
                    return
                tokens = request.tokens
            else:
                tokens = min(request.tokens, self._most)
                if budget <= 0 or (not config.enable_chunked_prefill and tokens > budget) or (self._deferred and request.tokens > 1):
                    return
                tokens = min(tokens, budget)
            spare = config.watermark_blocks if running else 0
            blocks = math.ceil(tokens / config.block_size)
            whole = math.ceil(request.tokens / config.block_size) if config.scheduler_reserve_full_isl else 0
            if max(blocks, whole) + spare > self.free:
                return
            self._enter_from_outside(request, step)
            running.append(request)
            left[request.klass] -= 1
            count, longest = count + 1, max(longest, request.tokens)
            budget -= tokens
            self._carried |= request.tokens > 1
            self._schedule(request, tokens, blocks, step)

    def _enter_from_outside(self, request: Request, step: Step) -> None:
        self.outside[request.klass].remove(request)
        self.residents.append(request)
        request.target = request.tokens
        if math.isnan(request.admitted):
            request.admitted = self.clock
        step.admitted.append(request.ident)

    def _schedule(self, request: Request, tokens: int, blocks: int, step: Step) -> None:
        request.blocks += blocks
        self.free -= blocks
        assert self.free >= 0
        step.scheduled[request.ident] = tokens

    def _send_outside(self, request: Request) -> None:
        """The request loses its KV, keeps its generated tokens and takes the head of its outside queue, or its place by priority."""
        self.free += request.blocks
        request.blocks = request.computed = request.target = request.segment = 0
        request.boundary = False
        request.evictions += 1
        self._low_key -= 1
        request.key = self._low_key
        self.residents.remove(request)
        self.outside[request.klass].insert(0, request)
        self._sort(request.klass)

    @staticmethod
    def _by_priority(request: Request) -> tuple[int, float, int]:
        return request.priority, request.arrival, request.ident

    def _sort(self, klass: int) -> None:
        if self.by_priority:
            self.outside[klass].sort(key=self._by_priority)

    # --- time and tokens ----------------------------------------------------------------------------

    def _execute(self, step: Step) -> None:
        step.batch = self._describe(step)
        seconds = self.config.time_model.seconds(step.batch)
        if self.clock + seconds > self.limits.horizon:
            self.done = True
            return
        step.idle = False
        step.seconds = seconds
        self.clock += seconds
        for request in [r for r in self.residents if r.ident in step.scheduled]:
            request.computed += step.scheduled[request.ident]
            if request.computed >= request.tokens:
                self._sample(request, step)

    def _describe(self, step: Step) -> Batch:
        chunks = [(r, step.scheduled[r.ident]) for r in self.residents if r.ident in step.scheduled]
        prefills = [(r.computed, n) for r, n in chunks if not r.decoding]
        contexts = [r.computed for r, _ in chunks if r.decoding]
        return Batch(
            decodes=len(contexts),
            decode_kv=sum(c + 1 for c in contexts),
            prefills=len(prefills),
            prefill_tokens=sum(n for _, n in prefills),
            prefill_squares=sum(n * n for _, n in prefills),
            prefill_context=sum(c for c, _ in prefills),
            prefill_context64=sum(-(-c // 64) * 64 for c, _ in prefills),
            prefill_work=sum(n * (n / 2 + c) for c, n in prefills),
            sampled=sum(r.computed + n == r.tokens for r, n in chunks),
            load=sum(r.computed + n for r, n in chunks),
            batch_size=len(chunks),
            **context_facts(contexts),
        )

    def _sample(self, request: Request, step: Step) -> None:
        request.generated += 1
        if math.isnan(request.first_token):
            request.first_token = self.clock
        if request.generated == request.output:
            request.completed = self.clock
            self.free += request.blocks
            request.blocks = 0
            self.residents.remove(request)
            step.finished.append(request.ident)
            return
        ends = self.layout.segment_ends
        request.segment = sum(end <= request.generated for end in ends)
        request.boundary = request.generated in ends

    def _arrivals(self, step: Step) -> None:
        while self.future and self.future[-1].arrival <= self.clock:
            request = self.future.pop()
            if request.prompt + request.output > self.config.longest_request:
                step.rejected.append(request.ident)
                continue
            request.key = self._next_key
            self._next_key += 1
            self.outside[request.klass].append(request)
            self._sort(request.klass)

    def _report_queues(self, step: Step) -> None:
        step.waiting = [[r.ident for r in requests] for requests in self.outside]
        step.residents = [r.ident for r in self.residents]
        step.boundary = [
            [r.ident for r in self.residents if r.boundary and self.layout.queue(r.klass, r.segment) == q]
            for q in range(self.layout.num_queues)
        ]

    def resident_rows(self) -> list[tuple[int, ...]]:
        """(id, queue, at boundary, computed, generated, prefill target) in admission order."""
        queue = self.layout.queue
        return [(r.ident, queue(r.klass, r.segment), int(r.boundary), r.computed, r.generated, r.target) for r in self.residents]

    @property
    def kv_reserved(self) -> int:
        """KV units reserved at this moment of a step: blocks taken."""
        return self.config.num_blocks - self.free

    @property
    def kv_held(self) -> int:
        """KV units of the residents between steps."""
        return sum(r.blocks for r in self.residents)


def run(
    workload: Workload,
    layout: QueueLayout,
    config: EngineConfig,
    limits: EpisodeLimits,
    decide: Callable[[int], Decision],
) -> Iterator[Step]:
    """Yield one `Step` per decision until the episode is done."""
    engine = ReferenceVLLM(workload, layout, config, limits)
    number = 0
    while not engine.done:
        yield engine.step(decide(number))
        number += 1
