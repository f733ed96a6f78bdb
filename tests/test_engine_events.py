"""Events at the same instant, and everything the engine's record must agree on after every step.

The record is followed by hand (`engine_walk`) after each step; where the independent restatements of the rules apply
(`reference_vllm`, `reference_paper_rules`) every step is compared with them too (`lockstep`).
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs
from lockstep import Case, lockstep

from llmsched_env.engine import state as st
from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import LinearTime
from llmsched_env.types import ADMIT_ALL, Decision, IterationReport, QueueLayout, Workload
from tests.engine_walk import check_engine

ROOT = Path(__file__).resolve().parents[1]
SECOND = LinearTime(1.0, 0.0)  # every iteration takes one second


@dataclass(slots=True)
class Seen:
    """What the walked episodes went through."""

    steps: int = 0
    preempted: int = 0
    evicted: int = 0
    together: int = 0  # steps with two completions or more
    mixed: int = 0  # steps with a completion and a segment end
    held: int = 0  # iterations that leave out a segment with members
    readmitted: int = 0

    def add(self, other: Seen) -> None:
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


def walk(case: Case, *, shared: SharedPrompts | None = None, most: int = 5_000) -> tuple[Seen, SimBackend, list[IterationReport]]:
    """Play an episode and check the record after every step."""
    backend = SimBackend(shared=shared)
    backend.reset(case.workload, case.layout, case.engine, case.limits)
    check_engine(backend)
    seen, reports = Seen(), []
    clock = 0.0
    once: set[int] = set()
    while not backend.done:
        record = backend.record
        decision = case.decide(seen.steps)
        before = (record.num_boundary, record.queues.members.copy())
        report = backend.step(decision)
        reports.append(report)
        assert record.clock >= clock
        clock = record.clock
        crossed = backend.end == "horizon" and not report.idle
        if not crossed:  # members of an iteration that does not count stay scheduled
            check_engine(backend)
        gone = set(report.evicted) | set(report.preempted)
        assert (len(report.finished) == len(set(report.finished)) and not gone & set(report.finished)) or report.forced_drain
        order = record.requests.sequence[list(report.finished)].tolist()
        assert order == sorted(order), "completions are told in the order of admission"
        seen.readmitted += len(once & set(report.finished))
        once |= gone
        seen.steps += 1
        seen.preempted += len(report.preempted)
        seen.evicted += len(report.evicted)
        seen.together += len(report.finished) > 1
        seen.mixed += bool(report.finished) and record.num_boundary > before[0]
        seen.held += bool(not report.idle and not report.forced_drain and np.any((before[1][:-1] > 0) & (decision.run == 0)))
        assert seen.steps < most
    counters = backend.counters()
    log = backend.log()
    assert counters.finished == int((~np.isnan(log.completed)).sum())
    assert counters.finished + counters.rejected <= len(log)
    if backend.end == "finished":
        assert counters.finished + counters.rejected == len(log)
    return seen, backend, reports


def both(case: Case, *, shared: SharedPrompts | None = None) -> Seen:
    """Walked, and compared with the reference where there is one for such an engine."""
    seen = walk(case, shared=shared)[0]
    if not case.engine.enable_prefix_caching and case.engine.late_after == 0 and case.engine.eviction == "recompute":
        lockstep(case)
    return seen


def constant(decision: Decision) -> Any:
    return lambda number: decision


def drain() -> EpisodeLimits:
    return EpisodeLimits()


# --- several things in one iteration ------------------------------------------------------------------
@settings(max_examples=60)
@given(
    preset=hs.sampled_from(["vllm", "caching", "paper"]),
    outputs=hs.lists(hs.sampled_from([1, 2, 4, 4, 4, 8, 9]), min_size=2, max_size=8),
    prompts=hs.lists(hs.sampled_from([1, 3, 4, 4, 8]), min_size=8, max_size=8),
    ends=hs.sampled_from([(), (4,), (2, 4), (4, 8), (1, 2, 3)]),
    boundary=hs.lists(hs.sampled_from([0, 1, ADMIT_ALL]), min_size=1, max_size=30),
    capacity=hs.sampled_from([17, 25, 60, 200]),
    slot=hs.booleans(),
)
def test_completions_and_segment_ends_in_one_iteration(
    preset: str, outputs: list[int], prompts: list[int], ends: tuple[int, ...], boundary: list[int], capacity: int, slot: bool
) -> None:
    n = len(outputs)
    layout = QueueLayout(segment_ends=ends)
    if preset == "paper":
        engine = EngineConfig.paper(capacity, 1.0, 0.0, boundary_slot=slot)
    else:
        sizes = {"block_size": 4, "num_blocks": max(capacity // 4, 5), "max_model_len": 20, "max_num_seqs": 8}
        engine = EngineConfig.vllm(time_model=SECOND, max_num_batched_tokens=64, enable_prefix_caching=preset == "caching", **sizes)

    def decide(number: int) -> Decision:
        q = layout.num_queues
        return Decision.of([1] * q, [ADMIT_ALL, *[boundary[number % len(boundary)]] * (q - 1)])

    both(Case(Workload.of([0.0] * n, prompts[:n], outputs), layout, engine, drain(), decide))


def test_they_do_happen_in_one_iteration() -> None:
    """Four requests of equal prompts: two complete with token 4, two end their segment with it, in the same iteration."""
    layout = QueueLayout(segment_ends=(4,))
    workload = Workload.of([0.0] * 4, [5] * 4, [4, 6, 4, 6])
    for engine in (EngineConfig.vllm(time_model=SECOND, block_size=4), EngineConfig.paper(100, 1.0, 0.0)):
        seen, backend, reports = walk(Case(workload, layout, engine, drain(), constant(Decision.of([1, 1], [ADMIT_ALL, 0]))))
        at_once = [r for r in reports if r.completed]
        assert [r.finished for r in at_once] == [(0, 2), (1, 3)]
        assert seen.together == 2 and seen.mixed == 1
        assert len({float(t) for t in backend.log().completed}) == 2
        both(Case(workload, layout, engine, drain(), constant(Decision.of([1, 1], [ADMIT_ALL, 0]))))


# --- memory short by one block ------------------------------------------------------------------------
@pytest.mark.parametrize(("caching", "free_block"), [(False, False), (False, True), (True, False)])  # both are refused together
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("short", [0, 1, 2])
def test_many_cross_a_block_boundary_with_blocks_short(short: int, held: bool, caching: bool, free_block: bool) -> None:
    """Eight residents fill their blocks in the same iteration and ask for one more each, with ``short`` blocks too few."""
    block, n = 4, 8
    layout = QueueLayout(by="type", num_types=2)
    # all hold one full block after the prefill of 4; the first decode of each takes a second one
    workload = Workload.of([0.0] * n, [block] * n, [10] * n, [0, 1] * (n // 2))
    spare = int(free_block)  # the engine wants one more for its longest request
    engine = EngineConfig.vllm(
        time_model=SECOND,
        block_size=block,
        num_blocks=2 * n - short + spare,
        max_model_len=16,
        max_num_seqs=n,
        max_num_batched_tokens=64,
        enable_prefix_caching=caching,
        decode_needs_free_block=free_block,
    )
    everybody, second_held = Decision.greedy(2), Decision.of([1, 0], [ADMIT_ALL, ADMIT_ALL])

    def decide(number: int) -> Decision:
        return second_held if held and number in (1, 2) else everybody

    case = Case(workload, layout, engine, drain(), decide)
    both(case)
    _, backend, reports = walk(case)
    assert reports[0].admitted == n
    # as vLLM does: the newest that runs gives up its one block and its claim to another, which ends it
    forced = len(reports[1].preempted)
    if held:  # four of eight ask, and 8 - short are free
        assert forced == 0
    else:
        assert forced == (max(short - spare, 0) + 1) // 2
        assert reports[1].preempted == tuple(range(n - 1, n - 1 - forced, -1))
    assert backend.end == "finished"


@settings(max_examples=80)
@given(
    residents=hs.integers(2, 12),
    short=hs.integers(0, 6),
    prompt=hs.integers(1, 9),
    output=hs.integers(2, 14),
    block=hs.sampled_from([1, 2, 3, 4, 8]),
    classes=hs.sampled_from([1, 2]),
    ends=hs.sampled_from([(), (3,), (4, 8)]),
    option=hs.sampled_from(["plain", "caching", "free block", "lose progress", "watermark"]),
    seed=hs.integers(0, 2**16),
    pattern=hs.lists(hs.tuples(hs.integers(0, 7), hs.integers(0, 7), hs.integers(0, 7)), min_size=1, max_size=20),
)
def test_equal_requests_in_a_memory_that_is_short_for_all_of_them(
    residents: int,
    short: int,
    prompt: int,
    output: int,
    block: int,
    classes: int,
    ends: tuple[int, ...],
    option: str,
    seed: int,
    pattern: list[tuple[int, int, int]],
) -> None:
    layout = QueueLayout(by="type", num_types=classes, segment_ends=ends)
    q = layout.num_queues
    longest = prompt + output
    whole = -(-longest // block)
    engine = EngineConfig.vllm(
        time_model=SECOND,
        block_size=block,
        num_blocks=max(residents * whole - short, whole + 1),
        max_model_len=longest,
        max_num_seqs=residents,
        max_num_batched_tokens=max(64, residents),
        enable_prefix_caching=option == "caching",
        decode_needs_free_block=option == "free block",
        eviction="lose_progress" if option == "lose progress" else "recompute",
        watermark=0.1 if option == "watermark" else 0.0,
    )
    rng = np.random.default_rng(seed)
    n = 2 * residents
    arrival = np.sort(rng.integers(0, 6, n)).astype(float)
    workload = Workload.of(arrival, [prompt] * n, [output] * n, rng.integers(0, classes, n))

    def decide(number: int) -> Decision:
        if number >= 40:  # a pattern may go round for ever
            return Decision.greedy(q)
        run, admit, evict = pattern[number % len(pattern)]
        bits = [(run >> (i % 3)) & 1 for i in range(q)]
        counts = [(0, 1, 2, ADMIT_ALL)[(admit >> (i % 2)) & 3] for i in range(q)]
        gone = [(evict >> (i % 3)) & 1 if evict % 3 == 0 else 0 for i in range(q)]
        return Decision.of(bits, counts, gone)

    both(Case(workload, layout, engine, drain(), decide))


# --- back after an eviction ---------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["vllm", "caching", "lose progress", "paper"])
def test_members_come_back_after_an_eviction(engine: str) -> None:
    """Preempted decodes are computed again, some from the middle of a later segment, and all complete."""
    layout = QueueLayout(segment_ends=(3, 9))
    rng = np.random.default_rng(5)
    n = 40
    workload = Workload.of(np.sort(rng.integers(0, 20, n)).astype(float), rng.integers(1, 12, n), rng.integers(1, 20, n))
    if engine == "paper":
        config = EngineConfig.paper(60, 1.0, 0.0)
    else:
        config = EngineConfig.vllm(
            time_model=SECOND,
            block_size=4,
            num_blocks=16,
            max_model_len=32,
            max_num_seqs=10,
            max_num_batched_tokens=24,
            enable_prefix_caching=engine == "caching",
            eviction="lose_progress" if engine == "lose progress" else "recompute",
        )
    case = Case(workload, layout, config, drain(), constant(Decision.greedy(3)))
    seen = both(case)
    assert seen.preempted > 10 and seen.readmitted > 5
    _, backend, _ = walk(case)
    assert backend.end == "finished"
    log = backend.log()
    assert (log.forced_evictions == log.evictions).all() and log.evictions.max() >= 2


# --- many alike ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["vllm", "caching", "paper"])
@pytest.mark.parametrize("ends", [(), (20,)])
def test_hundreds_of_equal_residents_do_everything_together(engine: str, ends: tuple[int, ...]) -> None:
    """350 requests that complete, end their segment and cross blocks in the same iterations; more than one lap of a small wheel."""
    n, prompt, output = 350, 16, 40
    layout = QueueLayout(by="type", num_types=2, segment_ends=ends)
    if engine == "paper":
        config = EngineConfig.paper(n * (prompt + output) + 7, 1.0, 0.0)
    else:
        config = EngineConfig.vllm(
            time_model=SECOND,
            block_size=16,
            num_blocks=n * 4 - 3,  # the last block of each is one of too few for three of them
            max_model_len=64,
            max_num_seqs=400,
            max_num_batched_tokens=8192,
            enable_prefix_caching=engine == "caching",
        )
    workload = Workload.of([0.0] * n, [prompt] * n, [output] * n, np.arange(n) % 2)
    case = Case(workload, layout, config, drain(), constant(Decision.greedy(layout.num_queues)))
    seen, backend, reports = walk(case)
    assert backend.end == "finished"
    assert max(r.completed for r in reports) > 300 and reports[0].admitted >= 340
    first = max(reports, key=lambda r: r.completed)
    assert list(first.finished) == sorted(first.finished)
    if engine != "caching":
        lockstep(case)
    assert seen.steps < 200


def test_a_wheel_of_several_laps() -> None:
    """Groups are many, so each wheel is small, and outputs are many laps long: members of other laps stay where they are."""
    layout = QueueLayout(by="prompt", edges=tuple(range(1, 64)), segment_ends=(500,))
    size = st.wheel_size(layout.num_queues)
    assert size < 64
    n = 24
    rng = np.random.default_rng(2)
    outputs = rng.integers(1, 5 * size, n)
    outputs[:8] = [size, size + 1, 2 * size, 2 * size + 1, 3 * size, 600, 600 + size, 501]
    workload = Workload.of([0.0] * n, rng.integers(1, 4, n), outputs)
    for engine in (EngineConfig.vllm(time_model=SECOND, max_model_len=1024, num_blocks=800), EngineConfig.paper(10_000, 1.0, 0.0)):
        both(Case(workload, layout, engine, drain(), constant(Decision.greedy(layout.num_queues))))


# --- random episodes ----------------------------------------------------------------------------------
def random_case(seed: int) -> tuple[Case, SharedPrompts | None]:
    """Small episodes of every kind that the engine knows, invariants in mind rather than realism."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 24))
    equal = rng.random() < 0.3  # lengths that meet
    prompt = rng.choice([4, 8], n) if equal else rng.integers(1, int(rng.choice([3, 12, 40])) + 1, n)
    output = rng.choice([1, 4, 8, 16], n) if equal else rng.integers(1, int(rng.choice([3, 12, 40])) + 1, n)
    gaps = rng.choice([0.0, 0.0, 1.0, 3.0], n) if rng.random() < 0.5 else rng.exponential(rng.choice([0.05, 0.5, 3.0]), n)
    classes = int(rng.integers(1, 4))
    kinds = rng.integers(0, classes, n)
    ends = tuple(sorted(rng.choice(np.arange(1, 17), int(rng.integers(0, 4)), replace=False).tolist()))
    if rng.random() < 0.4:
        layout = QueueLayout(by="prompt", edges=tuple(sorted({int(x) for x in rng.integers(1, 20, classes - 1)})), segment_ends=ends)
    else:
        layout = QueueLayout(by="type", num_types=classes, segment_ends=ends)
    workload = Workload.of(np.cumsum(gaps), prompt, output, kinds)
    longest = int((prompt + output).max())
    reject = bool(rng.random() < 0.15) and longest > 4
    longest = max(longest // 2, 2) if reject else longest
    order = {"admission_order": "class"} if rng.random() < 0.3 else {}
    if order and rng.random() < 0.5:
        order["class_rank"] = tuple(rng.integers(0, 3, layout.num_classes).tolist())  # type: ignore[assignment]
    common: dict[str, Any] = {
        **order,
        "oversize": "reject" if reject else "error",
        "late_after": float(rng.choice([0.0, 0.0, 0.5, 4.0])),
    }
    shared = None
    model = SECOND if rng.random() < 0.5 else LinearTime(0.1, 0.003)
    if rng.random() < 0.35:
        capacity = int(longest * rng.choice([1.0, 1.2, 2.0, 5.0]))
        engine = EngineConfig(preset="paper", time_model=model, capacity_tokens=capacity, boundary_slot=bool(rng.random() < 0.4), **common)
    else:
        block = int(rng.choice([1, 2, 3, 4, 16]))
        caching = bool(rng.random() < 0.4)
        free_block = bool(not caching and rng.random() < 0.25)
        chunked = bool(rng.random() < 0.7)
        seqs = int(rng.integers(1, 14))
        engine = EngineConfig.vllm(
            time_model=model,
            block_size=block,
            num_blocks=-(-longest // block) + free_block + int(rng.choice([0, 1, 3, 20])),
            max_model_len=longest,
            max_num_seqs=seqs,
            max_num_batched_tokens=max(seqs, int(rng.choice([1, 6, 20, 100])), 0 if chunked else longest),
            enable_chunked_prefill=chunked,
            scheduler_reserve_full_isl=bool(rng.random() < 0.5),
            watermark=float(rng.choice([0.0, 0.0, 0.1])),
            padded_prefill=bool(not caching and not chunked and rng.random() < 0.4),
            decode_needs_free_block=free_block,
            eviction="lose_progress" if rng.random() < 0.2 else "recompute",
            enable_prefix_caching=caching,
            **common,
        )
        if caching:
            donor, tokens = np.full(n, -1), np.zeros(n, dtype=int)
            for i in range(1, n):
                if rng.random() < 0.5:
                    donor[i] = rng.integers(i)
                    tokens[i] = rng.integers(1, min(prompt[i], prompt[donor[i]]) + 1)
            shared = SharedPrompts.of(donor, tokens)
    run_share, admit_all, evict_share = rng.choice([1.0, 0.9, 0.6]), rng.choice([1.0, 0.6]), rng.choice([0.0, 0.1, 0.4])

    def decide(number: int) -> Decision:
        draw = np.random.default_rng((seed, number))
        q = layout.num_queues
        admit = np.where(draw.random(q) < admit_all, ADMIT_ALL, draw.integers(0, 3, q))
        return Decision.of(draw.random(q) < run_share, admit, np.where(draw.random(q) < evict_share, draw.integers(1, 3, q), 0))

    horizon = float(rng.choice([math.inf, math.inf, math.inf, 5.0]))
    limits = EpisodeLimits(drain=bool(rng.random() < 0.8), horizon=horizon, max_iterations=4_000)
    return Case(workload, layout, engine, limits, decide), shared


def walk_many(seeds: range) -> Seen:
    total = Seen()
    for seed in seeds:
        case, shared = random_case(seed)
        try:
            total.add(walk(case, shared=shared)[0])
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}\n{case}") from error
    return total


def test_the_record_is_in_order_after_every_step_of_random_episodes() -> None:
    total = walk_many(range(300))
    assert total.steps > 8_000, total
    assert min(total.preempted, total.evicted, total.together, total.held, total.readmitted) > 150, total
    assert total.mixed > 60, total


@pytest.mark.slow
def test_the_record_is_in_order_in_ten_thousand_random_episodes() -> None:
    total = walk_many(range(1_000, 11_000))
    assert total.steps > 250_000 and total.preempted > 20_000 and total.mixed > 600, total


@pytest.mark.parametrize("seeds", [range(40_000, 40_150)])
def test_random_episodes_equal_the_references(seeds: range) -> None:
    compared = 0
    for seed in seeds:
        case, _ = random_case(seed)
        if case.engine.enable_prefix_caching or case.engine.late_after > 0 or case.engine.class_rank:
            continue
        if case.engine.preset == "vllm" and case.engine.eviction != "recompute":
            continue
        try:
            lockstep(case)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error!r}\n{case}") from error
        compared += 1
    assert compared > 25


# --- plain Python -------------------------------------------------------------------------------------
def digest() -> str:
    """One hash over the reports and logs of random episodes of every kind; printed by the subprocess below."""
    found = hashlib.sha256()
    kinds = set()
    for seed in range(70_000, 70_080):
        case, shared = random_case(seed)
        _, backend, reports = walk(case, shared=shared)
        log = backend.log()
        times = (log.admitted, log.first_token, log.completed, log.evictions, log.forced_evictions, log.rejected)
        found.update(b"".join(a.tobytes() for a in times) + repr(reports).encode() + repr(backend.counters()).encode())
        kinds.add((case.engine.preset, case.layout.num_segments > 1, case.engine.enable_prefix_caching))
    assert {k[:2] for k in kinds} == {(p, s) for p in ("paper", "vllm") for s in (False, True)}
    assert {("vllm", True, True), ("vllm", False, True)} & kinds
    return found.hexdigest()


def test_compiled_code_equals_plain_python_on_random_episodes() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1", PYTHONPATH=paths)
    code = "import test_engine_events as t; print(t.digest())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == digest()
