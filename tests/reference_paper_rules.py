"""The ``paper`` preset under arbitrary decisions, at object level.

`reference_paper` knows three policies; this oracle takes any `Decision`, and so covers holds, partial
admissions, evictions on request and the forced evictions that follow from them. Queues, segments, idle
steps and drain are those of `ReferenceVLLM`; memory, prefill and eviction are the paper's:

* KV is charged in tokens: computed + 1 for every resident in a segment, held or not, computed for one
  at a boundary, and for one that takes a boundary slot (variant A);
* while the charges exceed the capacity the most recently admitted of all residents is evicted; only
  where none was, prompts enter while charges + prompt fit;
* a prompt is computed at once and yields no token; an eviction loses all progress.
"""

from __future__ import annotations

from dataclasses import replace

from reference_vllm import ReferenceVLLM, Request, Step, context_facts

from llmsched_env.perf import Batch
from llmsched_env.types import Decision


class ReferencePaperRules(ReferenceVLLM):
    """`ReferenceVLLM` with the paper's memory and prefill. ``slots`` are entrants of variant A in this step."""

    slots: frozenset[int] = frozenset()

    def _boundary_and_batch(self, decision: Decision, step: Step, barred: set[int]) -> None:
        config = self.config
        entering = self._enter(decision)
        self.slots = frozenset(entering) if config.boundary_slot else frozenset()
        forced = False
        while self.kv_reserved > config.capacity_tokens:
            victim = self.residents[-1]
            self._send_outside(victim)
            victim.forced += 1
            step.preempted.append(victim.ident)
            forced = True
        for r in self.residents:
            if r.ident in entering or (not r.boundary and decision.run[self.layout.queue(r.klass, r.segment)]):
                step.scheduled[r.ident] = 0 if r.ident in self.slots else 1
        if not forced:
            self._admit_prompts(decision, step, barred)

    @property
    def kv_reserved(self) -> int:
        return sum(self.charge(r) for r in self.residents)

    def charge(self, request: Request) -> int:
        if request.computed == 0:  # admitted in this step
            return request.prompt
        return request.computed + (not request.boundary and request.ident not in self.slots)

    def _admit_prompts(self, decision: Decision, step: Step, barred: set[int]) -> None:
        by_class = self.config.admission_order == "class"
        queue = [r for requests in self.outside for r in requests if r.ident not in barred]
        queue.sort(key=lambda r: (r.klass if by_class else 0, r.key))
        left = [int(decision.admit[self.layout.queue(j)]) for j in range(self.layout.num_classes)]
        for request in queue:
            if left[request.klass] <= 0:
                continue
            if self.kv_reserved + request.prompt > self.config.capacity_tokens:
                return
            left[request.klass] -= 1
            self._enter_from_outside(request, step)
            step.scheduled[request.ident] = request.prompt

    def _send_outside(self, request: Request) -> None:
        super()._send_outside(request)
        request.generated = 0

    def _describe(self, step: Step) -> Batch:
        batch = super()._describe(step)
        slots = [r for r in self.residents if r.ident in self.slots and r.ident in step.scheduled]
        decodes = batch.decodes - len(slots)
        kv = batch.decode_kv - sum(r.computed + 1 for r in slots)
        contexts = [r.computed for r in self.residents if r.decoding and r.ident in step.scheduled and r.ident not in self.slots]
        return replace(batch, decodes=decodes, decode_kv=kv, sampled=decodes, **context_facts(contexts))

    def _sample(self, request: Request, step: Step) -> None:
        if request.computed > request.target and request.ident not in self.slots:
            super()._sample(request, step)

    @property
    def kv_held(self) -> int:
        return sum(r.computed for r in self.residents)
