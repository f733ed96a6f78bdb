"""The agent ``adaptive`` decides on vLLM's scheduler, and on a whole vLLM engine under the virtual clock, as it does on the simulator."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:  # importing it would read its settings before the backend has made them
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_agents.adaptive import Adaptive, AdaptiveAged
from llmsched_baselines import Setting
from llmsched_env.backend import Backend
from llmsched_env.backends import make_backend
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import LinearTime
from llmsched_env.types import LengthStatistics, RequestLog, Workload
from llmsched_hardware.versions import cpu_block_size
from llmsched_hardware.vllm_engine import VllmEngineBackend

NOTHING = LengthStatistics.of([1.0], [1.0], [1.0])


def drawn(seed: int, n: int, longest: int) -> Workload:
    """More than the engine can serve at once, so that memory, order and budget all decide."""
    g = np.random.default_rng(seed)
    prompt = np.ceil(g.lognormal(np.log(longest / 6), 0.8, n)).clip(1, longest // 2)
    output = np.ceil(g.lognormal(np.log(longest / 10), 0.8, n)).clip(1, longest // 2)
    return Workload.of(np.cumsum(g.exponential(0.02, n)), prompt.astype(int), output.astype(int))


def episode(policy: Adaptive, workload: Workload, backend: Backend) -> tuple[list[bytes], RequestLog, Any]:
    """Every decision byte by byte, the log and the counters."""
    policy.reset()
    view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits())
    made = []
    while not backend.done:
        decision = policy.decide(view)
        made.append(decision.rows.tobytes() + decision.token_budget.to_bytes(8))
        backend.step(decision)
    return made, backend.log(), backend.counters()


def assert_same(policy: Adaptive, workload: Workload, backend: Backend) -> Any:
    mine, log, counters = episode(policy, workload, SimBackend())
    theirs, other, theirs_counters = episode(policy, workload, backend)
    assert mine == theirs
    assert counters == theirs_counters and counters.finished == len(workload)
    for field in dataclasses.fields(RequestLog):
        a, b = getattr(log, field.name), getattr(other, field.name)
        assert a == b if a is None or field.name == "request_id" else a.tobytes() == b.tobytes(), field.name
    return counters


ENGINES = {
    "roomy": EngineConfig.vllm(
        num_blocks=300, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=400, time_model=LinearTime(0.01, 1e-5)
    ),
    "narrow": EngineConfig.vllm(
        num_blocks=60, max_num_seqs=32, max_num_batched_tokens=256, max_model_len=400, time_model=LinearTime(0.01, 1e-5)
    ),
    "whole prompts": EngineConfig.vllm(
        num_blocks=100, max_num_seqs=16, max_num_batched_tokens=400, max_model_len=400, enable_chunked_prefill=False
    ),
    "few seats": EngineConfig.vllm(num_blocks=300, max_num_seqs=4, max_num_batched_tokens=128, max_model_len=400),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", ENGINES)
def test_decisions_are_unchanged_on_vllms_scheduler(name: str, seed: int) -> None:
    backend = make_backend("vllm-scheduler")
    try:
        counters = assert_same(Adaptive(Setting(NOTHING, 1.0, ENGINES[name])), drawn(seed, 200, 400), backend)
        assert_same(AdaptiveAged(Setting(NOTHING, 1.0, ENGINES[name]), tau0=0.5, level=1.2, spare=0.0), drawn(seed, 200, 400), backend)
    finally:
        backend.close()
    assert counters.iterations > 200


def test_preemptions_teach_the_same() -> None:
    """A level so high that vLLM preempts."""
    backend = make_backend("vllm-scheduler")
    try:
        counters = assert_same(Adaptive(Setting(NOTHING, 1.0, ENGINES["narrow"]), level=2.0, spare=0.0), drawn(5, 200, 400), backend)
    finally:
        backend.close()
    assert counters.forced_evictions > 0


def test_decisions_are_unchanged_on_a_whole_engine() -> None:
    block = cpu_block_size()
    engine = EngineConfig.vllm(
        block_size=block,
        num_blocks=512 // block,
        max_num_seqs=8,
        max_num_batched_tokens=160,
        max_model_len=160,
        time_model=LinearTime(0.01, 1e-5),
    )
    backend = VllmEngineBackend(clock="virtual")
    try:
        for seed in range(2):
            assert_same(Adaptive(Setting(NOTHING, 1.0, engine)), drawn(seed, 60, 160), backend)
    finally:
        backend.close()
