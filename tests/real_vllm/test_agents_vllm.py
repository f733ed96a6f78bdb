"""The checkpoints that ship decide on vLLM's scheduler as they do on the simulator."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)
pytest.importorskip("safetensors", reason="safetensors is not installed (extra: checkpoints)")

from llmsched_agents.checkpoint import load_checkpoint
from llmsched_baselines import Setting
from llmsched_env.backends import make_backend
from llmsched_env.runner import run_episode
from llmsched_env.workload import load_scenario

CHECKPOINTS = Path(__file__).resolve().parents[2] / "agents" / "llmsched_agents" / "checkpoints"


@pytest.mark.parametrize("name", ["generalist", "slo"])
def test_a_checkpoint_runs_unchanged_on_vllms_scheduler(name: str) -> None:
    scenario = load_scenario("azure-conv")
    agent = load_checkpoint(CHECKPOINTS / name, Setting(scenario.statistics, 6.0, scenario.engine, overrides={"num_blocks": 600}))
    workload = scenario.generate(1, rate=6.0, num_requests=80)
    ours = run_episode(agent, workload)
    backend = make_backend("vllm-scheduler")
    try:
        theirs = run_episode(agent, workload, backend=backend)
    finally:
        backend.close()
    np.testing.assert_array_equal(theirs.log.completed, ours.log.completed)
    np.testing.assert_array_equal(theirs.log.first_token, ours.log.first_token)
    assert theirs.counters.evictions == ours.counters.evictions
