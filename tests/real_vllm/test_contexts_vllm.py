"""Contexts of single decodes where vLLM's own scheduler schedules: the same batches, the same times."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("vllm")

from llmsched_baselines import Setting, make_policy
from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf import load_calibration
from llmsched_env.runner import run_episode
from llmsched_env.types import LengthStatistics, Workload

CALIBRATION = "rtxpro6000-llama31-8b-vllm"


@pytest.mark.parametrize("asynchronous", [False, True])
def test_vllms_scheduler_fills_them_in(asynchronous: bool) -> None:
    rng = np.random.default_rng(0)
    n = 60
    work = Workload.of(np.sort(rng.uniform(0, 3, n)), rng.integers(20, 900, n), rng.integers(5, 120, n))
    statistics = LengthStatistics.of(work.prompt_tokens, work.output_tokens, np.ones(n))
    model = load_calibration(CALIBRATION)
    assert model.reads_contexts
    engine = EngineConfig.vllm(
        time_model=model, num_blocks=600, max_model_len=2048, max_num_seqs=32, max_num_batched_tokens=512, async_scheduling=asynchronous
    )
    logs, longest = [], []
    for name in ("sim", "vllm-scheduler"):
        backend = make_backend(name)
        policy = make_policy("vllm", Setting(statistics=statistics, rate=20.0, engine=engine))
        seen: list[float] = []
        result = run_episode(
            policy, work, backend=backend, on_step=lambda report, view, b=backend, s=seen: s.append(b.record.batch.decode_longest)
        )
        logs.append(result.log)
        longest.append(seen)
    assert longest[0] == longest[1] and max(longest[0]) > 500
    np.testing.assert_array_equal(logs[0].completed, logs[1].completed)
    np.testing.assert_array_equal(logs[0].first_token, logs[1].first_token)
