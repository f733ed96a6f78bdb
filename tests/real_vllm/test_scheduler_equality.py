"""The simulator's `vllm` preset against vLLM's own scheduler, iteration by iteration, with no difference allowed.

Run by ``make test-vllm`` in an environment with vLLM; skipped elsewhere. Random workloads, engine
settings, layouts and run / admit / evict decisions; after every step the whole state of both
backends must be equal: tokens scheduled per request, preemptions in order, blocks, queues, times.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:  # importing it would read its settings before the backend has made them
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_env.backends import make_backend
from llmsched_env.engine import state as st
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf.batch import BatchSums
from llmsched_env.records import Rows
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout, Workload
from tests.engine_walk import check_engine
from tests.env_settings import ADMIT

WORKLOADS = int(os.environ.get("LLMSCHED_VLLM_WORKLOADS", "260"))
MIN_ITERATIONS = 300_000
MAX_STEPS = 6_000
WALK_EVERY = 50


@dataclass(frozen=True)
class Case:
    """One random episode; decisions depend on the step number alone, so that requests can be left out."""

    seed: int
    engine: EngineConfig
    layout: QueueLayout
    limits: EpisodeLimits
    arrival: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    types: np.ndarray
    mode: str

    @classmethod
    def of(cls, seed: int) -> Case:
        g = np.random.default_rng(seed)
        block = int(g.choice([4, 8, 16]))
        num_blocks = int(g.integers(16, 90))
        max_len = min(num_blocks * block, int(g.integers(40, 400)))
        seqs = int(g.integers(3, 40))
        chunked = bool(g.random() < 0.7)
        budget = int(g.integers(max(seqs, 8), 240))
        engine = EngineConfig.vllm(
            block_size=block,
            num_blocks=num_blocks,
            max_num_seqs=seqs,
            max_num_batched_tokens=budget if chunked else max(budget, max_len),
            max_model_len=max_len,
            enable_chunked_prefill=chunked,
            watermark=float(g.choice([0, 0, 0.01, 0.05, 0.1])),
            scheduler_reserve_full_isl=bool(g.random() < 0.5),
            admission_order=str(g.choice(["arrival", "arrival", "class"])),
        )
        num_classes, num_segments = int(g.integers(1, 4)), int(g.integers(1, 4))
        ends = tuple(sorted({int(e) for e in g.integers(1, 40, num_segments - 1)}))
        layout = QueueLayout("type" if num_classes > 1 else "single", (), num_classes, ends)
        orders = np.random.default_rng((seed, 1))  # a stream of its own
        if engine.admission_order == "class" and orders.random() < 0.7:
            engine = engine.replace(class_rank=tuple(orders.integers(0, 3, num_classes)))
        if orders.random() < 0.5:
            engine = engine.replace(late_after=float(orders.choice([0.01, 0.1, 1.0])))
        n = int(g.integers(60, 160))
        prompt = g.integers(1, max(2, max_len // 3), n)
        output = np.minimum(g.integers(1, max(2, max_len // 2), n), max_len - prompt)
        return cls(
            seed,
            engine,
            layout,
            EpisodeLimits(drain=bool(g.random() < 0.8)),
            np.cumsum(g.exponential(float(g.choice([0.002, 0.02, 0.1])), n)),
            prompt,
            output,
            g.integers(0, num_classes, n),
            str(g.choice(["greedy", "mixed", "mixed", "random"])),
        )

    def workload(self) -> Workload:
        return Workload.of(self.arrival, self.prompt, self.output, self.types)

    def decision(self, step: int) -> Decision:
        g = np.random.default_rng((self.seed, step))
        q = self.layout.num_queues
        greedy = {"greedy": 1.0, "mixed": 0.75, "random": 0.3}[self.mode]
        if g.random() < greedy:
            return Decision.greedy(q)
        evict = g.choice([0, 0, 1, 2], q) if g.random() < 0.15 else np.zeros(q, int)
        run, admit = g.random(q) < 0.8, g.choice([0, 1, 2, ADMIT_ALL], q)
        budget = int(g.integers(1, 64)) if g.random() < 0.3 else 0  # often below the number of residents
        return Decision.of(run, admit, evict, budget)

    def without(self, drop: np.ndarray) -> Case:
        keep = np.ones(self.arrival.size, bool)
        keep[drop] = False
        parts = {name: getattr(self, name)[keep] for name in ("arrival", "prompt", "output", "types")}
        return replace(self, **parts)


@dataclass
class Tally:
    iterations: int = 0
    preemptions: int = 0
    evictions: int = 0
    preempting: int = 0  # episodes with preemptions
    difference: str = ""


def compare(case: Case, sim: Any, vllm: Any) -> Tally:
    """Step both backends together until the end or the first difference."""
    tally = Tally()
    with patch("llmsched_env.engine.record_backend.TILE_TOKENS", 1):  # budgets count as they are, however small
        for backend in (sim, vllm):
            backend.reset(case.workload(), case.layout, case.engine, case.limits)
    for step in range(MAX_STEPS):
        if sim.done and vllm.done:
            return tally
        decision = case.decision(step)
        ours, theirs = sim.step(decision), vllm.step(decision)
        tally.iterations += not ours.idle
        tally.preemptions += len(ours.preempted)
        tally.evictions += len(ours.evicted)
        if ours != theirs:
            tally.difference = f"step {step}, {decision}:\n  simulator {ours}\n  vLLM      {theirs}"
        for a, b in zip(sim.scheduled(), vllm.scheduled(), strict=True):
            if not np.array_equal(a, b):
                tally.difference = tally.difference or f"step {step}, {decision}: scheduled {a.tolist()} against {b.tolist()}"
        for name, mine, other in state(sim, vllm):
            if not equal(mine, other):
                tally.difference = tally.difference or f"step {step}, {decision}: {name}\n{mine}\n{other}"
        if tally.difference:
            return tally
        if step % WALK_EVERY == 0:  # lists and sums, followed by hand
            check_engine(vllm)
    return tally


# How each engine keeps its residents: by groups in the simulator, one by one where another engine schedules.
OWN = {
    "queues": {"left", "steps", "members", "member_kv", "phase", "first_peer", "last_peer"},
    "requests": {"base_generated", "base_computed", "group", "tokens", "next_peer", "previous_peer"},
    "hidden": {"due", "next_due", "previous_due"},
}
TABLES: dict[str, type[Rows]] = {"queues": st.Queues, "requests": st.Requests, "hidden": st.Hidden}


def facts(backend: Any) -> dict[str, np.ndarray]:
    """Everything in a backend's record that must be the same whoever schedules."""
    record, out = backend.record, {}
    for part, declared in (("engine", st.Engine), ("report", st.Report), ("batch", BatchSums)):
        held = record if part == "engine" else getattr(record, part)
        out[part] = np.array([getattr(held, name) for name, field in declared.FIELDS.items() if field.kind == "scalar"])
    for part, declared in TABLES.items():
        columns = [getattr(record, part).rows[name] for name in declared.FIELDS if name not in OWN[part]]
        out |= {f"{part}.{name}": column for name, column in zip((n for n in declared.FIELDS if n not in OWN[part]), columns, strict=True)}
    steps = record.queues.steps[record.requests.group]
    out["generated"], out["computed"] = record.requests.base_generated + steps, record.requests.base_computed + steps
    out["first_peer"], out["last_peer"] = record.queues.first_peer[:-1], record.queues.last_peer[:-1]  # boundary queues
    for kind, count in (("evicted", record.report.evicted), ("preempted", record.report.preempted), ("finished", record.report.completed)):
        out[kind] = getattr(record.events, kind)[:count]
    residents = backend.snapshot().resident_requests()
    return out | {f"residents.{field.name}": getattr(residents, field.name) for field in fields(residents)}


def state(sim: Any, vllm: Any) -> list[tuple[str, np.ndarray, np.ndarray]]:
    theirs = facts(vllm)
    return [(name, mine, theirs[name]) for name, mine in facts(sim).items()]


def equal(a: np.ndarray, b: np.ndarray) -> bool:
    return (a is None and b is None) or np.array_equal(a, b, equal_nan=np.asarray(a).dtype.kind == "f")


def shrink(case: Case, sim: Any, vllm: Any) -> tuple[Case, str]:
    """Leave out requests as long as a difference remains."""
    difference = compare(case, sim, vllm).difference
    size = case.arrival.size // 2
    while size >= 1:
        at = 0
        while at < case.arrival.size and case.arrival.size > 1:
            smaller = case.without(np.arange(at, min(at + size, case.arrival.size)))
            found = compare(smaller, sim, vllm).difference if smaller.arrival.size else ""
            if found:
                case, difference = smaller, found
            else:
                at += size
        size //= 2
    return case, difference


def compare_all(cases: Iterable[Case], sim: Any, vllm: Any) -> Tally:
    """Compare in every case; the first with a difference fails the test, as small as it can be made."""
    total = Tally()
    for case in cases:
        tally = compare(case, sim, vllm)
        if tally.difference:
            small, difference = shrink(case, sim, vllm)
            rows = np.column_stack([small.arrival, small.prompt, small.output, small.types])
            pytest.fail(f"seed {case.seed}, {small.engine}, {small.layout}\narrival, prompt, output, type:\n{rows}\n{difference}")
        total.iterations += tally.iterations
        total.preemptions += tally.preemptions
        total.evictions += tally.evictions
        total.preempting += tally.preemptions > 0
    return total


@pytest.fixture
def backends() -> Any:
    pair = make_backend("sim", trace=True), make_backend("vllm-scheduler", trace=True)
    yield pair
    for backend in pair:
        backend.close()


def test_simulator_equals_vllm(backends: Any) -> None:
    sim, vllm = backends
    total = compare_all(map(Case.of, range(WORKLOADS)), sim, vllm)
    print(
        f"\n{WORKLOADS} workloads ({total.preempting} with preemptions), {total.iterations:,} iterations, "
        f"{total.preemptions:,} preemptions, {total.evictions:,} evictions asked for: no difference"
    )
    assert total.preempting > WORKLOADS / 2
    assert total.evictions > 100
    if WORKLOADS >= 200:
        assert total.iterations >= MIN_ITERATIONS


def test_a_difference_is_found_and_shrunk(backends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself: a simulator that ignores the watermark must be caught."""
    sim, vllm = backends
    cases = [Case.of(seed) for seed in range(60)]
    cases = [c for c in cases if c.engine.watermark >= 0.05]
    original = sim.reset

    def without_watermark(workload: Workload, layout: QueueLayout, engine: EngineConfig, limits: EpisodeLimits) -> Any:
        return original(workload, layout, engine.replace(watermark=0.0), limits)

    monkeypatch.setattr(sim, "reset", without_watermark)
    caught = [c for c in cases if compare(c, sim, vllm).difference]
    assert caught
    small, difference = shrink(caught[0], sim, vllm)
    assert difference.startswith("step ")
    assert small.arrival.size < caught[0].arrival.size


def test_the_environment_runs_on_vllm_scheduler() -> None:
    import llmsched_env

    sim, vllm = (
        llmsched_env.LLMSchedEnv(**ADMIT, rate=7.0, num_requests=60, engine={"num_blocks": 600}, backend=name)
        for name in ("sim", "vllm-scheduler")
    )
    first = [env.reset(seed=3) for env in (sim, vllm)]
    assert all(np.array_equal(first[0][0][k], first[1][0][k]) for k in first[0][0])
    rng, done = np.random.default_rng(0), False
    while not done:
        action = np.concatenate([rng.random(4) < 0.9, rng.choice([0, 1, 16], 4)]).astype(np.int64)
        a, b = sim.step(action), vllm.step(action)
        assert all(np.array_equal(a[0][k], b[0][k]) for k in a[0])
        assert a[1:4] == b[1:4]
        done = a[2]
    assert a[4]["summary"] == b[4]["summary"]
    vllm.close()


def test_settings_vllm_does_not_have_are_refused() -> None:
    backend = make_backend("vllm-scheduler")
    w = Workload.of([0.0], [5], [5])
    limits = EpisodeLimits()
    with pytest.raises(ConfigError, match=r"engine\.preset: 'paper'"):
        backend.reset(w, QueueLayout(), EngineConfig.paper(100, 1.0, 0.0), limits)
    for name in ("decode_needs_free_block", "enable_prefix_caching"):
        with pytest.raises(ConfigError, match=rf"engine\.{name}: True, must be False on backend VllmSchedulerBackend"):
            backend.reset(w, QueueLayout(), EngineConfig.vllm(**{name: True}), limits)
    backend.close()


def test_another_version_is_judged_by_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from llmsched_hardware import versions
    from llmsched_hardware.fingerprints import UntestedVersionWarning

    monkeypatch.setattr(versions.metadata, "version", lambda name: "0.99.0")
    with pytest.warns(UntestedVersionWarning, match=r"0\.99\.0 is not supported \(tested: 0\.28\.0, 0\.30\.0, .* is the same as in"):
        versions.check_version()
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    monkeypatch.setattr(versions, "installed_folder", lambda: tmp_path)
    with pytest.raises(ConfigError, match=r"is not supported .* differ: vllm/v1/core/sched/scheduler\.py:Scheduler\.schedule \(gone\)"):
        versions.check_version()
