"""Scheduling by priority: the simulator against vLLM's scheduler with ``--scheduling-policy priority``, no difference allowed in any step.

Cases are those of ``test_rival_settings_equality``, with its settings in every second one, asynchronous scheduling in every third, and
priorities. Some requests arrive at the same time with equal priority. vLLM before 0.33 ends the running loop where a request preempts
itself; 0.33 goes on with the next one, and so does the simulator, which is therefore compared with 0.33 on.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:  # importing it would read its settings before the backend has made them
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime
from llmsched_env.types import Decision, QueueLayout, Workload
from llmsched_hardware.options import PRIORITY
from tests.real_vllm.test_prefix_caching_equality import lockstep
from tests.real_vllm.test_rival_settings_equality import RivalCase, Watch
from tests.real_vllm.test_scheduler_equality import Case, Tally, backends, compare, shrink

__all__ = ["backends"]

WORKLOADS = int(os.environ.get("LLMSCHED_VLLM_RIVAL_WORKLOADS", "60"))
MIN_ITERATIONS = 50_000
needs_priority = pytest.mark.skipif(not PRIORITY.known(), reason="before vLLM 0.33 a request that preempts itself ends the running loop")


@dataclass(frozen=True)
class PriorityCase(RivalCase):
    """A random episode by priority."""

    priority: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    @classmethod
    def of(cls, seed: int, names: tuple[str, ...] = ()) -> PriorityCase:
        """``names``: settings to draw besides; default all in odd seeds, none in even ones."""
        case: Case = super().of(seed, names) if names or seed % 2 else Case.of(seed)
        g = np.random.default_rng((seed, 11))
        plain: dict[str, Any] = {"admission_order": "arrival", "class_rank": (), "late_after": 0.0}
        engine = case.engine.replace(**plain, scheduling_policy="priority", async_scheduling=seed % 3 == 2)
        n = case.arrival.size
        arrival = case.arrival
        if g.random() < 0.5:  # several at once
            arrival = np.floor(arrival * 20) / 20
        levels = g.choice([-500, -3, 0, 1, 2, 500], int(g.integers(1, 5)), replace=False)
        return cls(
            seed, engine, case.layout, case.limits, arrival, case.prompt, case.output, case.types, case.mode, priority=g.choice(levels, n)
        )

    def workload(self) -> Workload:
        return Workload.of(self.arrival, self.prompt, self.output, self.types, priority=self.priority)

    def without(self, drop: np.ndarray) -> PriorityCase:
        smaller = super().without(drop)
        assert isinstance(smaller, PriorityCase)
        return replace(smaller, priority=np.delete(self.priority, drop))


def found(case: Case, sim: Any, vllm: Any) -> str:
    """The smallest case with a difference, in words; empty where there is none."""
    small, difference = shrink(case, sim, vllm)
    rows = np.column_stack([small.arrival, small.prompt, small.output, small.types, getattr(small, "priority", small.types)])
    return f"seed {case.seed}, {small.engine}, {small.layout}\narrival, prompt, output, type, priority:\n{rows}\n{difference}"


@needs_priority
def test_simulator_equals_vllm(backends: Any) -> None:
    sim, vllm = backends
    total, preempting = Tally(), 0
    with Watch(sim, vllm) as watch:
        for seed in range(WORKLOADS):
            case = PriorityCase.of(seed)
            tally = compare(case, sim, vllm)
            if tally.difference:
                pytest.fail(found(case, sim, vllm))
            total.iterations += tally.iterations
            total.preemptions += tally.preemptions
            total.evictions += tally.evictions
            preempting += tally.preemptions > 0
    print(
        f"\n{WORKLOADS} workloads by priority ({preempting} with preemptions): {total.iterations:,} iterations ({watch.steps:,} steps with "
        f"an interval), {total.preemptions:,} preemptions, {total.evictions:,} evictions asked for: no difference"
    )
    assert preempting > WORKLOADS / 2
    assert total.preemptions > WORKLOADS and total.evictions > WORKLOADS / 4
    if WORKLOADS >= 60:
        assert total.iterations >= MIN_ITERATIONS


Worked = tuple[dict[str, Any], list[tuple[float, int, int, int]], list[Decision]]
SMALL = {"block_size": 4, "max_num_batched_tokens": 12, "max_num_seqs": 8, "scheduler_reserve_full_isl": False}
WORKED: dict[str, Worked] = {
    "itself": ({"num_blocks": 4, "max_model_len": 16}, [(0.0, 7, 4, 1), (0.5, 5, 4, 0)], []),
    "served": ({"num_blocks": 5, "max_model_len": 20}, [(0.0, 8, 9, 1), (0.5, 8, 3, 0)], []),
    "budget": ({"num_blocks": 10, "max_model_len": 40}, [(0.0, 30, 9, 1), (0.5, 4, 9, 0), (0.5, 20, 2, 0)], []),
    "equal": ({"num_blocks": 4, "max_model_len": 16}, [(0.0, 8, 4, 0), (0.0, 8, 4, 0)], []),
    "chunk": (
        {"num_blocks": 8, "max_model_len": 32, "long_prefill_token_threshold": 8, "prefill_schedule_interval": 3},
        [(0.0, 30, 2, 1), (0.5, 2, 12, 0)],
        [],
    ),
    "empty": (
        {"num_blocks": 10, "max_model_len": 40, "prefill_schedule_interval": 3},
        [(0.0, 23, 9, -1), (0.0, 3, 2, 1), (0.0, 20, 2, 0)],
        [
            Decision.of([1, 1, 1], [1, 0, 0]),
            Decision.of([1, 1, 1], [0, 1, 0]),
            Decision.of([0, 0, 1], [0, 0, 1]),
            Decision.of([0, 1, 1], [0, 0, 0]),
        ],
    ),
}
"""Engine, requests (arrival, prompt, output, priority) and first decisions of the traces of ``tests/test_engine_priority.py``."""


@needs_priority
@pytest.mark.parametrize("name", WORKED)
def test_worked_traces_are_those_of_vllm(backends: Any, name: str) -> None:
    """What happens in them is rare in random cases. With decisions each request is a class of its own, and there is no drain."""
    options, requests, decisions = WORKED[name]
    sim, vllm = backends
    arrival, prompt, output, priority = zip(*requests, strict=True)
    engine = EngineConfig.vllm(time_model=LinearTime(1.0, 0.0), scheduling_policy="priority", **SMALL, **options)
    layout = QueueLayout(by="type", num_types=len(requests)) if decisions else QueueLayout()
    workload = Workload.of(arrival, prompt, output, np.arange(len(requests)) if decisions else None, priority=priority)
    for backend in (sim, vllm):
        backend.reset(workload, layout, engine, EpisodeLimits(drain=not decisions))
    preempted = steps = 0
    with Watch(sim, vllm):
        while not sim.done:
            decision = decisions[steps] if steps < len(decisions) else Decision.greedy(layout.num_queues)
            report = sim.step(decision)
            assert vllm.step(decision) == report
            assert all(np.array_equal(a, b) for a, b in zip(sim.scheduled(), vllm.scheduled(), strict=True))
            preempted += len(report.preempted)
            steps += 1
    assert vllm.done and preempted > 0


@needs_priority
@pytest.mark.parametrize("overlaps", [False, True], ids=["sync", "async"])
def test_equal_to_vllm_with_prefix_caching(tmp_path: Path, overlaps: bool) -> None:
    count = max(WORKLOADS // 3, 1)
    totals = np.zeros(3, dtype=np.int64)
    for seed in range(count):
        totals += lockstep(seed, tmp_path, overlaps, by_priority=True)
    iterations, preemptions, hits = totals.tolist()
    print(f"\n{count} workloads by priority: {iterations:,} iterations, {preemptions:,} preemptions, {hits:,} cached tokens: no difference")
    assert preemptions > 5 * count and hits > 100 * count


@needs_priority
def test_a_simulator_without_priorities_is_caught(backends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison itself."""
    sim, vllm = backends
    original = sim.reset

    def without(workload: Workload, layout: QueueLayout, engine: EngineConfig, limits: EpisodeLimits) -> Any:
        return original(workload, layout, engine.replace(scheduling_policy="fcfs"), limits)

    monkeypatch.setattr(sim, "reset", without)
    cases = [case for case in map(PriorityCase.of, range(12)) if np.unique(case.priority).size > 1]
    assert len(cases) > 5
    assert all(compare(case, sim, vllm).difference for case in cases)


@pytest.mark.skipif(PRIORITY.known(), reason="vLLM 0.33 on has this rule")
def test_a_vllm_with_another_rule_is_refused() -> None:
    backend = make_backend("vllm-scheduler")
    engine = EngineConfig.vllm(scheduling_policy="priority")
    with pytest.raises(ConfigError, match=r"engine\.scheduling_policy: priority, must be fcfs with vLLM .* \(needs 0\.33 or later\)"):
        backend.reset(Workload.of([0.0], [5], [5]), QueueLayout(), engine, EpisodeLimits())
    backend.close()
