"""What the iterations of a validation say: the calibration on the engine's batches, and the simulator with other times."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsched_agents.lookup import named_policies
from llmsched_env.engine_config import EngineConfig
from llmsched_env.perf import LinearTime
from llmsched_env.workload import load_scenario
from llmsched_hardware.calibration.iteration_log import COLUMNS, IterationLog
from llmsched_hardware.validation import ENGINE, SIM, Gap, Task, Validation, gaps, on_engine, run_task
from llmsched_hardware.validation_iterations import chosen, fit_to_warm_ups, gaps_with, iteration_gaps, shares, within_own_noise
from llmsched_hardware.validation_report import iteration_parts, measured_page

MODEL = LinearTime(1e-3, 1e-7)
SMALL = EngineConfig.vllm(time_model=MODEL, num_blocks=40, max_model_len=256, max_num_seqs=16, max_num_batched_tokens=256)


def log(slower: dict[int, float], rows: int = 300) -> IterationLog:
    """Segments of decodes alone; segment k is ``slower[k]`` times as slow as the model says."""
    at = {name: k for k, name in enumerate(COLUMNS)}
    tables, segments = [], {}
    for k, factor in slower.items():
        table = np.zeros((rows, len(COLUMNS)))
        n = 1 + np.arange(rows) % 5
        table[:, at["decodes"]] = table[:, at["batch_size"]] = table[:, at["sampled"]] = n
        table[:, at["decode_kv"]] = table[:, at["load"]] = 100.0 * n
        table[:, at["finished"]] = np.arange(rows) % 5 == 0
        seconds = factor * (MODEL.d0 + MODEL.d1 * table[:, at["load"]])
        table[:, at["end"]] = np.cumsum(seconds)
        table[:, at["begin"]] = table[:, at["end"]] - seconds
        table[:, at["segment"]] = k
        tables.append(table)
        segments[k] = {"policy": "vllm", "rate": 200.0, "seed": 0, "repeat": max(k - 1, 0), "warm_up": k == 0}
    return IterationLog({"steps": "whole", "device": "a CPU"}, np.concatenate(tables), segments)


def test_times_are_compared_over_counted_runs_with_their_own_spread() -> None:
    own, every = iteration_gaps(log({0: 3.0, 1: 1.0, 2: 1.5}), MODEL)
    assert (own.policy, own.rate, own.iterations) == ("vllm", 200.0, 600)
    assert own.error == pytest.approx(1 / 1.25 - 1)
    assert own.spread == pytest.approx(0.5 / 1.25)
    assert every.policy == "" and every.measured == pytest.approx(own.measured)
    assert iteration_gaps(log({0: 1.0}), MODEL) == []


def test_a_run_that_was_begun_again_counts_once() -> None:
    twice = log({0: 1.0, 1: 9.0, 2: 2.0})
    twice.segments[2]["repeat"] = 0  # type: ignore[index]
    assert set(chosen(twice, warm_up=False).segments) == {2}
    assert iteration_gaps(twice, MODEL)[0].error == pytest.approx(-0.5)


def test_shares_of_the_error_add_up() -> None:
    found = shares(log({1: 1.2, 2: 1.4}), MODEL)
    assert sum(s.share for s in found) == pytest.approx(1.0)
    assert sum(s.iterations for s in found) == 600
    kinds = {s.kind: s.iterations for s in found}
    assert kinds["a number of tokens that is not among the last 32"] == 5  # the five sizes, once: both runs are one engine's
    assert kinds["decodes alone, somebody started or ended before"] > 100
    assert all(math.isnan(s.share) or s.share >= 0 for s in found)


def test_the_simulator_is_run_with_the_times_of_the_warm_up_runs() -> None:
    validation = Validation(
        on_engine(load_scenario("azure-conv"), SMALL, 0.06, 250), named_policies("--policies", ("vllm", "wait")), (200.0,), (0,), 40
    )
    slow = LinearTime(2e-3, 2e-7)
    simulated = [run_task(validation, Task(p, 200.0, 0, SIM), None) for p in validation.policies]
    engine = [dataclasses.replace(run, backend=ENGINE) for run in simulated]
    ours = {g.policy: g for g in gaps([*simulated, *engine], validation.policies) if g.metric == "latency_mean"}
    other = {g.policy: g for g in gaps_with(validation, slow, engine) if g.metric == "latency_mean"}
    assert all(gap.error == 0.0 for gap in ours.values())
    assert all(gap.error > 0.5 for gap in other.values())
    same = {g.policy: g for g in gaps_with(validation, MODEL, engine) if g.metric == "latency_mean"}
    assert all(gap.error == 0.0 for gap in same.values())  # policies decide as they did: with the calibration's own times


def test_too_few_warm_up_iterations_are_not_fitted() -> None:
    assert fit_to_warm_ups(log({0: 1.0}, rows=20)) is None
    assert fit_to_warm_ups(log({1: 1.0})) is None
    found = fit_to_warm_ups(log({0: 2.0}))
    assert found is not None and found.held_out.count == 300


def test_the_report_shows_times_shares_and_the_refitted_simulator(tmp_path: Path) -> None:
    logged = log({0: 1.1, 1: 1.2, 2: 1.4})
    gap = Gap("vllm", 200.0, "latency_mean", 2, 1.0, 1.3, 1.2, 1.4)
    fields: dict[str, Any] = {"metric": "evictions", "sim": 0.0, "real": 0.0, "low": 0.0, "high": 0.0}
    whole = [
        dataclasses.replace(gap, metric=m) for m in ("throughput_tok_s", "latency_p99", "ttft_mean", "ttft_p99", "tpot_mean", "tpot_p99")
    ]
    found = [gap, *whole, dataclasses.replace(gap, **fields)]
    parts = iteration_parts(iteration_gaps(logged, MODEL), shares(logged, MODEL), found, fit_to_warm_ups(logged))
    page = measured_page("Title", [("Fact", "text")], found, [], parts)
    assert "## Iteration times on the engine's own batches" in page and "| all | all | 600 |" in page
    assert "## With iteration times of the warm-up runs" in page
    assert within_own_noise(found) == (1, 1) and "1 of 1 mean latencies" in page
    assert within_own_noise([dataclasses.replace(gap, sim=0.5)]) == (0, 1)
