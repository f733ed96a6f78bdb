"""The contexts of single decodes in a batch: brute force against the engine, both presets, and only where a time model asks."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from lockstep import Case, lockstep, small_cases
from test_engine_properties import Episode, episodes

from llmsched_env.backends import make_backend
from llmsched_env.compiled import compiled
from llmsched_env.engine.record_backend import RecordBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import IterationTimeModel, LinearTime
from llmsched_env.perf.batch import BatchSums
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout, Workload


@compiled
def by_contexts(batch: BatchSums) -> float:
    return 1.0 + batch.decode_longest * 0.5 + batch.decode_shortest * 0.015625 + batch.decode_squares * 0.0009765625


class ByContexts(IterationTimeModel):
    """An iteration as long as its decodes' contexts say, exact in binary."""

    compiled_seconds = by_contexts

    @property
    def reads_contexts(self) -> bool:
        return True

    def pack(self) -> Any:
        return np.zeros(1)


def asking(case: Case) -> Case:
    return dataclasses.replace(case, engine=case.engine.replace(time_model=ByContexts()))


@settings(max_examples=200)
@given(small_cases("vllm"))
def test_the_contexts_are_those_of_a_walk_in_the_vllm_preset(case: Case) -> None:
    lockstep(asking(case))


@settings(max_examples=200)
@given(small_cases("paper"))
def test_the_contexts_are_those_of_a_walk_in_the_paper_preset(case: Case) -> None:
    lockstep(asking(case))


def sums(backend: RecordBackend) -> tuple[float, float, float]:
    batch = backend.record.batch
    return batch.decode_longest, batch.decode_shortest, batch.decode_squares


@settings(max_examples=100)
@given(episodes(horizon=False))
def test_asynchronous_scheduling_and_the_prefix_cache_describe_what_they_schedule(episode: Episode) -> None:
    """Against the requests that were scheduled: one token to somebody whose prefill target is computed is a decode."""
    if episode.engine.preset == "paper" or episode.engine.padded_prefill or episode.engine.decode_needs_free_block:
        return
    for changes in ({"async_scheduling": True}, {"enable_prefix_caching": True}):
        backend = make_backend("sim", trace=True)
        engine = episode.engine.replace(time_model=ByContexts(), **changes)
        view = backend.reset(episode.workload, episode.layout, engine, episode.limits)
        number = 0
        while not backend.done and number < 300:
            backend.step(episode.decision(number))
            number += 1
            batch = backend.record.batch
            longest, shortest, squares = sums(backend)
            n = batch.decodes
            if batch.batch_size == 0:
                continue
            assert (longest == 0) == (n == 0) and shortest <= longest
            if n:
                mean = batch.decode_kv / n
                assert shortest <= mean <= longest and mean**2 * n <= squares * (1 + 1e-12) <= longest**2 * n * (1 + 1e-9)
                assert n > 1 or shortest == longest == mean
        assert view is not None


@pytest.mark.parametrize("preset", ["vllm", "paper"])
def test_a_model_that_does_not_ask_costs_no_walk(preset: str) -> None:
    engine = EngineConfig.vllm(time_model=LinearTime(1.0, 0.0), num_blocks=300) if preset == "vllm" else EngineConfig.paper(1000, 1.0, 0.0)
    work = Workload.of(np.zeros(3), [5, 9, 7], [4, 4, 4])
    for model, seen in ((LinearTime(1.0, 0.0), False), (ByContexts(), True), (LinearTime(1.0, 0.0), False)):
        backend = make_backend("sim")
        backend.reset(work, QueueLayout(), engine.replace(time_model=model), EpisodeLimits())
        for _ in range(3):
            backend.step(Decision.of([1], [ADMIT_ALL], [0]))
        assert (backend.record.code.describe_contexts != 0) == seen
        assert (sums(backend) != (0.0, 0.0, 0.0)) == seen
