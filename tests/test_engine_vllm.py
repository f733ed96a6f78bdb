"""The ``vllm`` preset of the simulator against `reference_vllm`, step by step.

Every step must agree in start, duration, tokens per request, preemptions and evictions in order, blocks
held, completions, queue contents and batch sums, under random workloads, engine settings, layouts and
decisions.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from lockstep import Case, compare_many, lockstep, random_episode, small_cases

from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf import LinearTime, load_calibration
from llmsched_env.types import Workload

FORMULA = load_calibration("a100-llama2-7b-c10")


def random_engine(rng: np.random.Generator, workload: Workload) -> EngineConfig:
    longest = int((workload.prompt_tokens + workload.output_tokens).max())
    reject = bool(rng.random() < 0.15)
    longest = max(2, int(longest * rng.uniform(0.6, 1.0))) if reject else longest
    block = int(rng.choice([1, 2, 4, 16]))
    free_block = bool(rng.random() < 0.2)
    blocks = math.ceil((-(-longest // block) + free_block) * rng.choice([1.0, 1.3, 1.7, 2.5]))
    seqs = int(rng.choice([3, 10, 20, 40]))
    chunked = bool(rng.random() < 0.6)
    budget = max(seqs, int(rng.choice([4, 20, 60, 200])))
    return EngineConfig.vllm(
        time_model=FORMULA if rng.random() < 0.5 else LinearTime(0.1, 0.001),
        num_blocks=blocks,
        block_size=block,
        max_model_len=longest,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget if chunked else max(budget, longest),
        enable_chunked_prefill=chunked,
        scheduler_reserve_full_isl=bool(rng.random() < 0.6),
        watermark=float(rng.choice([0.0, 0.0, 0.05, 0.3])),
        admission_order="class" if rng.random() < 0.4 else "arrival",
        padded_prefill=bool(not chunked and rng.random() < 0.3),
        decode_needs_free_block=free_block,
        oversize="reject" if reject else "error",
    )


def random_case(seed: int) -> Case:
    return random_episode(seed, random_engine)


def test_random_episodes_equal_the_reference() -> None:
    total, preempting = compare_many(random_case, range(200))
    assert preempting > 100, total
    assert total.iterations > 20_000, total
    assert total.preemptions > 1_500, total
    assert total.evictions > 300, total
    assert total.held > 2_000, total
    assert total.partial > 1_000, total
    assert total.drained > 100, total


@pytest.mark.slow
def test_many_random_episodes_equal_the_reference() -> None:
    total, preempting = compare_many(random_case, range(10_000, 11_500))
    assert preempting > 750, total
    assert total.preemptions > 8_000, total


@settings(max_examples=200)
@given(small_cases("vllm"))
def test_small_episodes_equal_the_reference(case: Case) -> None:
    lockstep(case)
