"""The simulator with prefix caching: equal to the plain one where nothing can be found again, sound pool, known hits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from llmsched_env.backend import Backend
from llmsched_env.backends import make_backend
from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.engine.simulator import PrefixCachingBackend, SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout, Workload
from tests.engine_walk import check_engine

TIME = LinearTime(0.01, 1e-6)


def engine(**options: Any) -> EngineConfig:
    settings = dict(time_model=TIME, block_size=4, num_blocks=40, max_num_seqs=8, max_num_batched_tokens=32, max_model_len=100)
    return EngineConfig.vllm(**(settings | options))


def greedy(backend: Backend, workload: Workload, config: EngineConfig) -> list[Any]:
    """Reports of an episode under the work-conserving decision."""
    backend.reset(workload, QueueLayout(), config, EpisodeLimits())
    reports = []
    while not backend.done:
        reports.append(backend.step(Decision.greedy(1)))
    return reports


def check_pool(backend: PrefixCachingBackend) -> None:
    """Every block is in the free queue once, or used as often as residents hold it; contents and holders agree."""
    pool, blocks = backend.record.pool, backend.record.pool.blocks
    sentinel = len(blocks) - 1
    assert sentinel == pool.num_blocks == backend.engine.num_blocks
    free, block = [], int(blocks.next[sentinel])
    while block != sentinel:
        free.append(block)
        assert blocks.previous[blocks.next[block]] == block
        block = int(blocks.next[block])
    assert len(set(free)) == len(free) == pool.free
    residents = backend.snapshot().resident_requests()
    users: Counter[int] = Counter()
    for r, computed in zip(residents.id.tolist(), residents.computed.tolist(), strict=True):
        seat = int(pool.files.seat[r])
        held = int(pool.seats.held[seat])
        assert computed <= held * backend.engine.block_size
        table = pool.table.block[seat * pool.blocks_per_seat :][:held].tolist()
        assert len(set(table)) == held <= pool.blocks_per_seat
        users.update(table)
    assert (pool.files.seat >= 0).sum() == residents.id.size
    assert users == {b: int(blocks.users[b]) for b in range(sentinel) if blocks.users[b] > 0}
    assert set(free) == {b for b in range(sentinel) if blocks.users[b] == 0}
    known: list[int] = []
    for contents, block in enumerate(pool.holder.block.tolist()):
        while block >= 0:
            assert blocks.contents[block] == contents
            known.append(block)
            block = int(blocks.twin[block])
    assert sorted(known) == np.flatnonzero(blocks.contents[:sentinel] >= 0).tolist()
    assert backend.snapshot().kv_used == len(users)


def random_workload(g: np.random.Generator) -> tuple[Workload, SharedPrompts]:
    n = int(g.integers(5, 40))
    prompt = g.integers(1, 40, n)
    donor, tokens = np.full(n, -1), np.zeros(n, dtype=int)
    for i in range(1, n):
        if g.random() < 0.5:
            donor[i] = g.integers(i)
            tokens[i] = g.integers(1, min(prompt[i], prompt[donor[i]]) + 1)
    workload = Workload.of(np.cumsum(g.exponential(0.03, n)), prompt, g.integers(1, 40, n))
    return workload, SharedPrompts.of(donor, tokens)


@given(seed=hs.integers(0, 2**32 - 1), uncached_first=hs.booleans())
def test_the_pool_stays_sound_under_any_decision(seed: int, uncached_first: bool) -> None:
    g = np.random.default_rng(seed)
    workload, shared = random_workload(g)
    layout = QueueLayout(segment_ends=(5, 12)) if g.random() < 0.5 else QueueLayout()
    config = engine(num_blocks=int(g.integers(25, 60)), watermark=float(g.choice([0.0, 0.05])))
    backend = PrefixCachingBackend(shared, uncached_first=uncached_first)
    view = backend.reset(workload, layout, config, EpisodeLimits())
    queues = layout.num_queues
    for _ in range(4000):
        if backend.done:
            break
        evict = g.integers(0, 3, queues) * (g.random(queues) < 0.1) if g.random() < 0.5 else np.zeros(queues, dtype=int)
        evict[0] = 0
        decision = Decision.of(g.random(queues) < 0.9, np.where(g.random(queues) < 0.7, ADMIT_ALL, g.integers(0, 3, queues)), evict)
        report = backend.step(decision)
        assert report.kv_used <= config.num_blocks and view.kv_free >= 0
        check_pool(backend)
        check_engine(backend)
    assert backend.end == "finished"
    log = backend.log()
    assert np.all(log.completed > log.arrival) and np.all(log.first_token <= log.completed)
    assert backend.record.pool.free == config.num_blocks
    assert 0 <= backend.hit_tokens < backend.asked_tokens


@given(seed=hs.integers(0, 2**32 - 1))
def test_without_preemptions_and_common_heads_it_is_the_plain_simulator(seed: int) -> None:
    workload, _ = random_workload(np.random.default_rng(seed))
    config = engine(num_blocks=800)
    plain, cached = make_backend("sim"), PrefixCachingBackend()
    assert greedy(plain, workload, config) == greedy(cached, workload, config)
    for name in ("admitted", "first_token", "completed"):
        np.testing.assert_array_equal(getattr(plain.log(), name), getattr(cached.log(), name))
    assert plain.counters() == cached.counters()


@given(seed=hs.integers(0, 2**32 - 1))
def test_the_engine_option_is_the_backend_of_that_name(seed: int) -> None:
    workload, shared = random_workload(np.random.default_rng(seed))
    config = engine(num_blocks=30)
    named, option = PrefixCachingBackend(shared), SimBackend(shared=shared)
    assert greedy(named, workload, config) == greedy(option, workload, config.replace(enable_prefix_caching=True))
    assert named.counters() == option.counters()
    assert (named.hit_tokens, named.asked_tokens) == (option.hit_tokens, option.asked_tokens)


def test_a_preempted_request_finds_its_blocks_again_and_finishes_sooner() -> None:
    workload = Workload.of(np.zeros(6), np.full(6, 20), np.full(6, 30))
    config = engine(num_blocks=40)
    plain, cached = make_backend("sim"), PrefixCachingBackend()
    greedy(plain, workload, config)
    greedy(cached, workload, config)
    assert plain.counters().forced_evictions > 0 and cached.counters().forced_evictions > 0
    assert cached.hit_tokens > 0
    assert cached.counters().clock < plain.counters().clock


@pytest.mark.parametrize(
    ("first", "second", "common", "hit"),
    [
        (17, 17, 17, 16),  # whole blocks
        (16, 16, 16, 12),  # never the last token
        (16, 30, 16, 16),
        (30, 30, 10, 8),
        (30, 30, 3, 0),
    ],
)
def test_a_prompt_finds_the_whole_blocks_it_shares(first: int, second: int, common: int, hit: int) -> None:
    workload = Workload.of([0.0, 5.0], [first, second], [2, 2])
    backend = PrefixCachingBackend(SharedPrompts.of([-1, 0], [0, common]))
    reports = greedy(backend, workload, engine(max_num_batched_tokens=100))
    assert backend.hit_tokens == hit
    assert [r.prefill_tokens for r in reports if r.prefill_tokens] == [first, second - hit]


def test_heads_are_shared_through_the_request_they_come_from() -> None:
    # 2 shares 8 tokens with 1, which shares 16 with 0: the first 8 are those of 0.
    workload = Workload.of([0.0, 5.0, 10.0], [20, 20, 20], [2, 2, 2])
    backend = PrefixCachingBackend(SharedPrompts.of([-1, 0, 1], [0, 16, 8]))
    reports = greedy(backend, workload, engine(max_num_batched_tokens=100))
    assert [r.prefill_tokens for r in reports if r.prefill_tokens] == [20, 4, 12]


def test_a_shared_block_counts_once() -> None:
    workload = Workload.of([0.0, 0.0], [20, 20], [10, 10])
    backend = PrefixCachingBackend(SharedPrompts.of([-1, 0], [0, 16]))
    view = backend.reset(workload, QueueLayout(), engine(max_num_batched_tokens=100), EpisodeLimits())
    report = backend.step(Decision.greedy(1))
    assert report.prefill_tokens == 20 + 4
    assert report.kv_used == view.kv_used == 5 + 1
    assert view.resident_kv[0, 0] == 5 + 5


@pytest.mark.parametrize(
    ("donor", "tokens", "message"),
    [
        ([0], [4], "row 0 shares 4 tokens with 0"),
        ([-1, 0], [0, 0], "row 1 shares 0 tokens with 0"),
        ([-1, -1], [0, 4], "row 1 shares 4 tokens with -1"),
        ([-1, 0, 1], [0, 4], r"shapes \(3,\) and \(2,\)"),
    ],
)
def test_refuses_heads_that_cannot_be(donor: list[int], tokens: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SharedPrompts.of(donor, tokens)


def test_refuses_what_does_not_fit_the_workload_or_the_engine() -> None:
    workload = Workload.of([0.0, 0.0], [20, 8], [10, 10])
    limits, layout = EpisodeLimits(), QueueLayout()
    with pytest.raises(ConfigError, match="shared_prompts: 1 rows, must be 2"):
        PrefixCachingBackend(SharedPrompts.none(1)).reset(workload, layout, engine(), limits)
    with pytest.raises(ConfigError, match="row 1 shares 9 tokens, more than one of the two prompts has"):
        PrefixCachingBackend(SharedPrompts.of([-1, 0], [0, 9])).reset(workload, layout, engine(), limits)
    with pytest.raises(ConfigError, match=r"engine\.enable_prefix_caching: True, but it is an option of the vllm preset"):
        PrefixCachingBackend().reset(workload, layout, EngineConfig.paper(1000, 0.01, 1e-6), limits)
    with pytest.raises(ConfigError, match=r"engine\.decode_needs_free_block: True"):
        PrefixCachingBackend().reset(workload, layout, engine(decode_needs_free_block=True), limits)
