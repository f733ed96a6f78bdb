"""A recording that nothing here was made for: Qwen3-32B on two RTX PRO 6000, from a checkout of casys-kaist/LLMServingSim."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.engine.simulator import PrefixCachingBackend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.pages.fidelity.recorded_prompts import common_heads
from llmsched_env.pages.fidelity.recorded_run import Run, errors, replay
from llmsched_env.types import RequestLog, Workload
from llmsched_hardware.calibration.importers.llmservingsim import import_profile

BLOCKS = 25_000  # not recorded; the run uses less than half of them


@pytest.fixture
def checkout() -> Path:
    folder = Path(os.environ.get("LLMSCHED_LLMSERVINGSIM", "not set"))
    if not (folder / "bench").is_dir():
        pytest.skip(f"no checkout of casys-kaist/LLMServingSim: {folder} (set LLMSCHED_LLMSERVINGSIM)")
    return folder


def recorded(folder: Path, engine: EngineConfig) -> Run:
    rows = [json.loads(line) for line in (folder / "vllm" / "requests.jsonl").read_text().splitlines()]
    column = {key: np.array([row[key] for row in rows]) for key in rows[0] if key != "request_id"}
    begun, n = column["queued_ts"].min(), len(rows)
    work = Workload.of(column["queued_ts"] - begun, column["input_toks"], column["output_toks"])
    log = RequestLog(
        arrival=work.arrival,
        prompt_tokens=work.prompt_tokens,
        output_tokens=work.output_tokens,
        class_id=np.zeros(n, np.int32),
        admitted=column["scheduled_ts"] - begun,
        first_token=column["first_token_ts"] - begun,
        completed=column["last_token_ts"] - begun,
        evictions=np.zeros(n, np.int32),
        forced_evictions=np.zeros(n, np.int32),
        rejected=np.zeros(n, np.bool_),
    )
    return Run(work, log, np.zeros((0, 3)), engine, 0.0, "")


def test_two_gpus_and_another_model_within_one_percent(checkout: Path, tmp_path: Path) -> None:
    """All fifteen figures; LLMServingSim's own errors on this run are up to 1.7 %."""
    run_folder = checkout / "bench" / "examples" / "RTXPRO6000" / "Qwen3-32B"
    profile = tmp_path / "bf16"
    shutil.copytree(checkout / "profiler" / "perf" / "RTXPRO6000" / "Qwen" / "Qwen3-32B" / "bf16", profile)
    shutil.copyfile(run_folder / "config.json", profile / "bench_config.json")
    config = checkout / "configs" / "model" / "Qwen" / "Qwen3-32B.json"
    model = import_profile(profile, "Qwen3-32B", "qwen3-32b", config=config, tensor_parallel=2)
    engine = EngineConfig.vllm(
        time_model=model,
        num_blocks=BLOCKS,
        max_num_batched_tokens=2048,
        max_num_seqs=128,
        max_model_len=40_960,
        async_scheduling=True,
    )
    run = recorded(run_folder, engine)
    lines = (checkout / "workloads" / "sharegpt-qwen3-30b-a3b-300-sps10.jsonl").read_text().splitlines()  # the same prompts
    donor, tokens = np.full(len(lines), -1), np.zeros(len(lines), dtype=np.int64)
    for request, earlier, common in common_heads([json.loads(line)["input_tok_ids"] for line in lines], 16):
        donor[request], tokens[request] = earlier, common
    result = replay(run, PrefixCachingBackend(SharedPrompts.of(donor, tokens), uncached_first=False))
    assert np.abs(errors(run, result.log)).max() < 0.01
    assert result.summary.out_of_range == 0 and result.summary.kv_max < 0.5
