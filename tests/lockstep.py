"""The engine and an object-level reference on the same decisions, compared after every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import strategies as hs
from reference_paper_rules import ReferencePaperRules
from reference_vllm import ReferenceVLLM, Step

from llmsched_env.backend import View
from llmsched_env.backends import make_backend
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import LinearTime
from llmsched_env.types import ADMIT_ALL, Decision, IterationReport, QueueLayout, Workload

Decide = Callable[[int], Decision]


@dataclass(frozen=True, slots=True)
class Case:
    """One episode to compare. ``decide`` depends on the step number alone, so both sides get equal decisions."""

    workload: Workload
    layout: QueueLayout
    engine: EngineConfig
    limits: EpisodeLimits
    decide: Decide


@dataclass(slots=True)
class Tally:
    """What the compared episodes went through."""

    steps: int = 0
    iterations: int = 0
    preemptions: int = 0
    evictions: int = 0
    held: int = 0
    partial: int = 0
    drained: int = 0

    def add(self, other: Tally) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def waiting_ids(view: View) -> list[list[int]]:
    return [view.waiting_requests(j, 10**6).id.tolist() for j in range(view.layout.num_classes)]


def boundary_ids(view: View) -> list[list[int]]:
    residents = view.resident_requests()
    return [residents.id[residents.at_boundary & (residents.queue == q)].tolist() for q in range(view.layout.num_queues)]


def resident_rows(view: View) -> list[tuple[int, ...]]:
    """(id, queue, at boundary, computed, generated, prefill target) in admission order."""
    r = view.resident_requests()
    columns = (r.id, r.queue, r.at_boundary, r.computed, r.generated, r.prefill_target)
    return list(zip(*(c.astype(int).tolist() for c in columns), strict=True))


def engine_facts(backend: SimBackend, view: View, report: IterationReport) -> dict[str, object]:
    ids, tokens = backend.scheduled()
    return {
        "start": report.start,
        "seconds": report.duration,
        "idle": report.idle,
        "forced_drain": report.forced_drain,
        "scheduled": dict(zip(ids.tolist(), tokens.tolist(), strict=True)),
        "preempted": list(report.preempted),
        "evicted": list(report.evicted),
        "finished": list(report.finished),
        "admitted": report.admitted,
        "rejected": report.rejected,
        "kv used": report.kv_used,
        "kv held": view.kv_used,
        "waiting": waiting_ids(view),
        "boundary": boundary_ids(view),
        "residents": resident_rows(view),
        "kept tokens": [view.waiting_requests(j, 10**6).generated.tolist() for j in range(view.layout.num_classes)],
        "decodes": report.decode_requests,
        "prefills": report.prefill_requests,
        "prefill tokens": report.prefill_tokens,
        "load": report.load,
        "total tokens": report.total_tokens,
        "generated tokens": report.generated_tokens,
        "batch size": report.batch_size,
    }


def reference_facts(reference: ReferenceVLLM, step: Step) -> dict[str, object]:
    batch = step.batch
    return {
        "start": step.start,
        "seconds": step.seconds,
        "idle": step.idle,
        "forced_drain": step.forced_drain,
        "scheduled": {i: n for i, n in step.scheduled.items() if n},  # a boundary slot takes no token
        "preempted": step.preempted,
        "evicted": step.evicted,
        "finished": step.finished,
        "admitted": len(step.admitted),
        "rejected": len(step.rejected),
        "kv used": step.kv_used,
        "kv held": reference.kv_held,
        "waiting": step.waiting,
        "boundary": step.boundary,
        "residents": reference.resident_rows(),
        "kept tokens": [[r.generated for r in requests] for requests in reference.outside],
        "decodes": batch.decodes,
        "prefills": batch.prefills,
        "prefill tokens": batch.prefill_tokens,
        "load": batch.load,
        "total tokens": sum(step.scheduled.values()),
        "generated tokens": batch.sampled,
        "batch size": batch.batch_size,
    }


def assert_equal(number: int, decisions: list[Decision], engine: dict[str, object], reference: dict[str, object]) -> None:
    different = {
        name: (engine[name], reference[name])
        for name in engine
        if engine[name] != (pytest.approx(reference[name], rel=1e-12, abs=1e-12) if name == "seconds" else reference[name])
    }
    if different:
        lines = [f"step {number}: engine and reference differ; last decisions {decisions[-3:]}"]
        lines += [f"  {name}: engine {e} reference {r}" for name, (e, r) in different.items()]
        lines += ["  everything else agrees: " + str({n: v for n, v in reference.items() if n not in different})]
        raise AssertionError("\n".join(lines))


def lockstep(case: Case, max_steps: int = 20_000) -> Tally:
    """Run both engines on the same decisions and compare after every step; token budgets count as they are, however small."""
    backend = make_backend("sim", trace=True)
    assert isinstance(backend, SimBackend)
    with patch("llmsched_env.engine.record_backend.TILE_TOKENS", 1):
        view = backend.reset(case.workload, case.layout, case.engine, case.limits, reveal_output_length=False)
    oracle = ReferenceVLLM if case.engine.preset == "vllm" else ReferencePaperRules
    reference = oracle(case.workload, case.layout, case.engine, case.limits)
    reference.least_budget = 1
    tally = Tally()
    decisions: list[Decision] = []
    while not reference.done and tally.steps < max_steps:
        assert not backend.done, f"the engine ended ({backend.end}) before step {tally.steps}"
        decision = case.decide(tally.steps)
        decisions.append(decision)
        report = backend.step(decision)
        before = {r.ident: r.computed for r in reference.residents}
        step = reference.step(decision)
        if reference.done and step.scheduled and step.idle:  # crossed the horizon: the iteration does not count
            break
        assert_equal(tally.steps, decisions, engine_facts(backend, view, report), reference_facts(reference, step))
        tally.steps += 1
        tally.iterations += not step.idle
        tally.preemptions += len(step.preempted)
        tally.evictions += len(step.evicted)
        tally.drained += step.forced_drain
        tally.held += not step.idle and len(set(before) - set(step.scheduled) - set(step.preempted) - set(step.evicted))
        tally.partial += sum(0 < r.computed < r.target for r in reference.residents)
    assert reference.done == backend.done
    log = backend.log()
    for name, values in (
        ("admitted", [r.admitted for r in reference.requests]),
        ("first_token", [r.first_token for r in reference.requests]),
        ("completed", [r.completed for r in reference.requests]),
    ):
        np.testing.assert_allclose(getattr(log, name), values, rtol=1e-12, err_msg=name)
    assert log.evictions.tolist() == [r.evictions for r in reference.requests]
    assert log.forced_evictions.tolist() == [r.forced for r in reference.requests]
    return tally


# --- random cases ----------------------------------------------------------------------------------


def random_layout(rng: np.random.Generator, longest_output: int) -> QueueLayout:
    num_classes, num_segments = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    ends: tuple[int, ...] = ()
    if longest_output >= num_segments:
        ends = tuple(sorted(rng.choice(np.arange(1, longest_output + 1), num_segments - 1, replace=False).tolist()))
    if num_classes == 1:
        return QueueLayout(segment_ends=ends)
    if rng.random() < 0.5:
        return QueueLayout(by="type", num_types=num_classes, segment_ends=ends)
    edges = tuple(sorted(rng.choice(np.arange(1, 60), num_classes - 1, replace=False).tolist()))
    return QueueLayout(by="prompt" if rng.random() < 0.5 else "output", edges=edges, segment_ends=ends)


def random_workload(rng: np.random.Generator) -> Workload:
    n = int(rng.integers(1, 40)) if rng.random() < 0.1 else int(rng.integers(12, 40))
    gaps = rng.exponential(rng.choice([0.01, 0.1, 1.0]), n)
    if rng.random() < 0.3:
        gaps = np.round(gaps)  # many arrivals at one instant
    prompt = rng.integers(1, int(rng.choice([4, 16, 60])) + 1, n)
    output = rng.integers(1, int(rng.choice([4, 20, 50])) + 1, n)
    return Workload.of(np.cumsum(gaps), prompt, output, rng.integers(0, 3, n))


def random_decisions(rng: np.random.Generator, num_queues: int) -> Decide:
    """A decision per step from one generator; the habits of the episode are drawn first."""
    run_share = float(rng.choice([1.0, 0.95, 0.7]))
    admit_all = float(rng.choice([1.0, 0.7, 0.3]))
    evict_share = float(rng.choice([0.0, 0.1, 0.5]))
    budget_share = float(rng.choice([0.0, 0.0, 0.3, 0.9]))
    seed = int(rng.integers(2**31))

    def decide(number: int) -> Decision:
        draw = np.random.default_rng((seed, number))
        run = draw.random(num_queues) < run_share
        admit = np.where(draw.random(num_queues) < admit_all, ADMIT_ALL, draw.integers(0, 4, num_queues))
        evict = np.where(draw.random(num_queues) < evict_share, draw.integers(1, 4, num_queues), 0)
        budget = int(draw.integers(1, 24)) if draw.random() < budget_share else 0
        return Decision.of(run, admit, evict, budget)

    return decide


def random_episode(seed: int, random_engine: Callable[[np.random.Generator, Workload], EngineConfig]) -> Case:
    """A case from one seed; ``random_engine`` fits the engine to the workload."""
    rng = np.random.default_rng(seed)
    workload = random_workload(rng)
    layout = random_layout(rng, int(workload.output_tokens.max()))
    if layout.by == "type" and layout.num_types < 3:
        workload = Workload.of(workload.arrival, workload.prompt_tokens, workload.output_tokens, workload.type_id % layout.num_types)
    engine = random_engine(rng, workload)
    horizon = float(workload.arrival[-1] * 0.7) if rng.random() < 0.1 and workload.arrival[-1] > 0 else math.inf
    limits = EpisodeLimits(drain=bool(rng.random() < 0.85), horizon=horizon)
    return Case(workload, layout, engine, limits, random_decisions(rng, layout.num_queues))


def compare_many(random_case: Callable[[int], Case], seeds: range) -> tuple[Tally, int]:
    """The tally of all episodes and the number of those with a forced eviction."""
    total, preempting = Tally(), 0
    for seed in seeds:
        try:
            tally = lockstep(random_case(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}\n{random_case(seed)}") from error
        total.add(tally)
        preempting += tally.preemptions > 0
    return total, preempting


# --- cases that hypothesis can shrink ------------------------------------------------------------------


@hs.composite
def small_engines(draw: hs.DrawFn, preset: str, longest: int) -> EngineConfig:
    order = draw(hs.sampled_from(["arrival", "class"]))
    if preset == "paper":
        capacity, slot = longest + draw(hs.integers(0, 30)), draw(hs.booleans())
        return EngineConfig.paper(capacity, 1.0, 0.0, admission_order=order, boundary_slot=slot)
    block = draw(hs.integers(1, 4))
    free_block, chunked = draw(hs.booleans()), draw(hs.booleans())
    seqs = draw(hs.integers(1, 6))
    return EngineConfig.vllm(
        time_model=LinearTime(1.0, 0.0),
        num_blocks=-(-longest // block) + int(free_block) + draw(hs.integers(0, 6)),
        block_size=block,
        max_model_len=longest,
        max_num_seqs=seqs,
        max_num_batched_tokens=max(seqs, draw(hs.integers(1, 24)), 0 if chunked else longest),
        enable_chunked_prefill=chunked,
        scheduler_reserve_full_isl=draw(hs.booleans()),
        watermark=draw(hs.sampled_from([0.0, 0.2])),
        admission_order=order,
        padded_prefill=draw(hs.booleans()) and not chunked,
        decode_needs_free_block=free_block,
    )


@hs.composite
def small_cases(draw: hs.DrawFn, preset: str) -> Case:
    """Episodes that hypothesis can shrink: every request, setting and decision is drawn on its own."""
    rows = draw(hs.lists(hs.tuples(hs.sampled_from([0.0, 0.0, 0.1, 1.0]), hs.integers(1, 12), hs.integers(1, 8)), min_size=1, max_size=8))
    gaps, prompt, output = zip(*rows, strict=True)
    workload = Workload.of(np.cumsum(gaps), prompt, output)
    by_prompt = draw(hs.booleans())
    ends = tuple(sorted(draw(hs.sets(hs.integers(1, 7), max_size=2))))
    layout = QueueLayout(by="prompt", edges=(4,), segment_ends=ends) if by_prompt else QueueLayout(segment_ends=ends)
    longest = max(p + o for p, o in zip(prompt, output, strict=True))
    engine = draw(small_engines(preset, longest))
    queues = layout.num_queues
    row = hs.tuples(
        hs.lists(hs.booleans(), min_size=queues, max_size=queues),
        hs.lists(hs.sampled_from([ADMIT_ALL, 0, 1, 2]), min_size=queues, max_size=queues),
        hs.lists(hs.sampled_from([0, 0, 1, 2]), min_size=queues, max_size=queues),
        hs.sampled_from([0, 0, 1, 2, 5]),
    )
    script = [Decision.of(*r) for r in draw(hs.lists(row, max_size=40))]
    greedy = Decision.greedy(queues)
    limits = EpisodeLimits(drain=draw(hs.booleans()))
    return Case(workload, layout, engine, limits, lambda number: script[number] if number < len(script) else greedy)
