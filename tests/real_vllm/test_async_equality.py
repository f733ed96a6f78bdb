"""Asynchronous scheduling: the simulator against vLLM's ``AsyncScheduler``, iteration by iteration, with no difference allowed.

The random cases and the comparison are those of ``test_scheduler_equality``. Every request ends by a stop token, which
the scheduler learns an iteration after it has scheduled the next one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from test_scheduler_equality import WORKLOADS, Case, backends, compare, compare_all

import llmsched_env
from llmsched_env.engine import state as st
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.types import Decision, IterationReport, QueueLayout, Workload
from tests.env_settings import ADMIT

__all__ = ["backends"]

CASES = WORKLOADS * 2 // 3
"""Episodes; with their superfluous steps they are longer than those of the synchronous comparison."""
MIN_ITERATIONS = 300_000


def overlapped(seed: int) -> Case:
    """A case of the synchronous comparison, with asynchronous scheduling; in every third many requests are as long as any may be."""
    case = Case.of(seed)
    engine = case.engine.replace(async_scheduling=True)
    output = case.output
    if seed % 3 == 0:
        longest = np.random.default_rng((seed, 2)).random(output.size) < 0.3
        output = np.where(longest, engine.max_model_len - case.prompt, output)
    return replace(case, engine=engine, output=output)


@dataclass
class Endings:
    """How requests stood when their last token came out."""

    evicted: int = 0  # since, with the token in flight
    boundary: int = 0  # at the end of a segment
    longest: int = 0  # as long as any may be: no further token

    def watch(self, sim: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        step = sim.step

        def watched(decision: Decision) -> IterationReport:
            requests = sim.record.requests
            at_boundary = requests.status == st.BOUNDARY
            report: IterationReport = step(decision)
            done = list(report.finished)
            self.evicted += len({*report.preempted, *report.evicted} & set(done))
            self.boundary += int(at_boundary[done].sum())
            self.longest += int((requests.prompt[done] + sim.record.hidden.output[done] == sim.engine.max_model_len).sum())
            return report

        monkeypatch.setattr(sim, "step", watched)


def test_simulator_equals_vllm(backends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sim, vllm = backends
    endings = Endings()
    endings.watch(sim, monkeypatch)
    total = compare_all(map(overlapped, range(CASES)), sim, vllm)
    print(
        f"\n{CASES} workloads ({total.preempting} with preemptions), {total.iterations:,} iterations, {total.preemptions:,} preemptions, "
        f"{total.evictions:,} evictions asked for, requests that ended after an eviction {endings.evicted:,}, "
        f"at a boundary {endings.boundary:,}, at the longest length {endings.longest:,}: no difference"
    )
    assert total.preempting > CASES / 2
    assert total.evictions > CASES / 2
    assert min(endings.evicted, endings.boundary, endings.longest) > CASES / 10
    if WORKLOADS >= 200:
        assert total.iterations >= MIN_ITERATIONS


def test_a_synchronous_simulator_is_caught(backends: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sim, vllm = backends
    original = sim.reset

    def synchronous(workload: Workload, layout: QueueLayout, engine: EngineConfig, limits: EpisodeLimits) -> Any:
        return original(workload, layout, engine.replace(async_scheduling=False), limits)

    monkeypatch.setattr(sim, "reset", synchronous)
    assert all(compare(overlapped(seed), sim, vllm).difference for seed in range(5))


def test_the_environment_runs_on_vllm_scheduler() -> None:
    engine = {"num_blocks": 600, "async_scheduling": True}
    sim, vllm = (
        llmsched_env.LLMSchedEnv(**ADMIT, rate=7.0, num_requests=60, engine=engine, backend=name) for name in ("sim", "vllm-scheduler")
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
