"""Tenants on vLLM's own scheduler: who is admitted and what each has received are the simulator's, iteration by iteration."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig
from tests.tenant_cases import built, course, workload

WEIGHTS = (1.0, 3.0, 0.5)


@pytest.mark.parametrize("name", ["vtc", "wfq", "tenant-priority"])
def test_tenants_get_on_vllms_scheduler_what_they_get_on_the_simulator(name: str) -> None:
    engine = EngineConfig.vllm(num_blocks=24, max_model_len=128, max_num_seqs=8, max_num_batched_tokens=96)
    evictions = 0
    backend = make_backend("vllm-scheduler")
    try:
        for seed in range(8):
            requests = workload(np.random.default_rng(seed), 80, len(WEIGHTS))
            policy = built(name, requests, engine, WEIGHTS)
            ours, theirs = course(policy, requests), course(policy, requests, backend)
            np.testing.assert_array_equal(theirs.admitted, ours.admitted)
            np.testing.assert_array_equal(theirs.service, ours.service)
            if name != "tenant-priority":
                np.testing.assert_array_equal(theirs.asked, theirs.admitted)
            assert theirs.backend.log().completed.tobytes() == ours.backend.log().completed.tobytes()
            assert theirs.largest_gap(WEIGHTS)[1] <= 1.0 or name != "vtc"
            evictions += theirs.evictions
    finally:
        backend.close()
    assert evictions > 0
