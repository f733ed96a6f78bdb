"""KV, admissions and the batch of one iteration, ``paper`` preset (rules 4 and 6; compiled).

Source: arXiv 2504.11320 v4, model section: a resident at stage s holds l + s tokens, eviction is
last in first out by admission, all progress is lost.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import next_outside
from llmsched_env.engine.residents import admit, computed, preempt, running_members
from llmsched_env.engine.state import BOUNDARY, ENTERING, PREFILL, Engine
from llmsched_env.pointers import call


@compiled
def schedule_paper(engine: Engine) -> None:
    """Forced evictions, admissions and the batch.

    Every resident outside a boundary queue is charged computed + 1, held or not; a boundary request
    computed, computed + 1 if it enters now (variant A: computed, its slot yields no token).
    """
    requests, queues, settings, report = engine.requests, engine.queues, engine.settings, engine.report
    no_token = settings.boundary_slot != 0
    charged = engine.kv_tokens + engine.num_residents - engine.num_boundary
    if no_token:
        charged -= report.entered
    before = report.preempted
    while charged > settings.capacity:
        last = engine.newest
        charged -= computed(engine, last)
        status = requests.status[last]
        if not (status == BOUNDARY or (no_token and status == ENTERING)):
            charged -= 1
        preempt(engine, last)
    if report.preempted == before:
        while True:
            q = next_outside(engine)
            if q < 0:
                break
            prompt = requests.prompt[queues.head[q]]
            if charged + prompt > settings.capacity:
                break
            queues.left[q] -= 1
            charged += prompt
            requests.tokens[admit(engine, q)] = prompt
            report.admitted += 1
    report.kv_reserved = charged
    describe_paper_batch(engine)


@compiled
def describe_paper_batch(engine: Engine) -> None:
    """The batch: every running member decodes, whoever has just been admitted is prefilled whole."""
    requests, queues, settings, batch = engine.requests, engine.queues, engine.settings, engine.batch
    decodes, decode_kv = running_members(engine)
    load = decode_kv
    size = decodes
    prefills = 0
    prefill_tokens = 0
    squares = 0.0
    r = queues.first_peer[settings.num_queues]
    while r >= 0:
        held = requests.base_computed[r]
        if requests.status[r] == PREFILL:
            prompt = requests.tokens[r]
            prefills += 1
            prefill_tokens += prompt
            squares += float(prompt) * float(prompt)
            load += prompt
        elif settings.boundary_slot != 0:
            load += held
        else:
            requests.tokens[r] = 1
            decodes += 1
            decode_kv += held + 1
            load += held + 1
        size += 1
        r = requests.next_peer[r]
    batch.batch_size = float(size)
    batch.decodes = float(decodes)
    batch.decode_kv = float(decode_kv)
    batch.prefills = float(prefills)
    batch.prefill_tokens = float(prefill_tokens)
    batch.prefill_squares = squares
    batch.prefill_work = 0.5 * squares
    batch.prefill_context = 0.0
    batch.prefill_context64 = 0.0
    batch.sampled = float(decodes)
    batch.load = float(load)
    if engine.code.describe_contexts != 0:
        call(engine.code.describe_contexts, engine)
