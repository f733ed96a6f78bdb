"""The simulator with prefix caching: equal to the plain one where nothing can be found again, sound pool, known hits.

And the pool by itself, as several engines on common nodes use it: the index against a dictionary, rows of nodes used again.
"""

from __future__ import annotations

import pickle
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from llmsched_env.backend import Backend
from llmsched_env.backends import make_backend
from llmsched_env.engine.prefix_cache import (
    SharedPrompts,
    cached_blocks,
    cached_blocks_of,
    close_seat,
    contents_of,
    empty_pool,
    forget,
    free_among,
    grow,
    home_of,
    oldest_block,
    open_seat,
    remember,
    request_nodes,
    reset_pool,
)
from llmsched_env.engine.simulator import PrefixCachingBackend, SimBackend
from llmsched_env.engine.state import Nodes, Pool
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
    """Every block is in the free queue once, or used as often as residents hold it; contents and index agree."""
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
    check_index(pool)
    assert backend.snapshot().kv_used == len(users)


def check_index(pool: Pool) -> None:
    """Contents stand in one row each, without a gap between it and their home, and every block with contents is found from there."""
    blocks, index, mask = pool.blocks, pool.index, len(pool.index) - 1
    known: list[int] = []
    for row in np.flatnonzero(index.block >= 0).tolist():
        contents, block = int(index.contents[row]), int(index.block[row])
        while block >= 0:
            assert blocks.contents[block] == contents
            known.append(block)
            block = int(blocks.twin[block])
        home = home_of(pool, contents)
        assert 0 <= home <= mask
        assert all(index.block[(home + k) & mask] >= 0 for k in range((row - home) & mask))
        assert oldest_block(pool, contents) == index.block[row]
    assert sorted(known) == np.flatnonzero(blocks.contents[: pool.num_blocks] >= 0).tolist()


def random_workload(g: np.random.Generator) -> tuple[Workload, SharedPrompts]:
    n = int(g.integers(5, 40))
    prompt, output = g.integers(1, 40, n), g.integers(1, 40, n)
    donor, tokens = np.full(n, -1), np.zeros(n, dtype=int)
    for i in range(1, n):
        if g.random() < 0.5:
            donor[i] = g.integers(i)
            tokens[i] = g.integers(1, min(prompt[i], prompt[donor[i]] + output[donor[i]]) + 1)
    workload = Workload.of(np.cumsum(g.exponential(0.03, n)), prompt, output)
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


@pytest.mark.parametrize("overlaps", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("prompt", "output", "common", "hit"),
    [
        (17, 9, 26, 24),
        (16, 8, 24, 20),  # the block that the last token of the answer would fill never has contents
        (16, 9, 25, 24),
        (16, 1, 17, 16),
        (15, 1, 16, 12),
        (16, 12, 22, 20),  # a head that ends within the answer
        (16, 12, 16, 16),
    ],
)
def test_a_later_turn_finds_what_was_computed_of_prompt_and_answer(prompt: int, output: int, common: int, hit: int, overlaps: bool) -> None:
    workload = Workload.of([0.0, 5.0], [prompt, 40], [output, 2])
    backend = PrefixCachingBackend(SharedPrompts.of([-1, 0], [0, common]))
    reports = greedy(backend, workload, engine(max_num_batched_tokens=100, async_scheduling=overlaps))
    assert backend.hit_tokens == hit
    assert [r.prefill_tokens for r in reports if r.prefill_tokens] == [prompt, 40 - hit]


def test_the_turns_of_a_chat_share_from_turn_to_turn() -> None:
    # Turn 1 computes the block with the last token of turn 0's answer; turn 2 finds it.
    workload = Workload.of([0.0, 5.0, 10.0], [8, 20, 32], [8, 8, 2])
    backend = PrefixCachingBackend(SharedPrompts.of([-1, 0, 1], [0, 16, 28]))
    reports = greedy(backend, workload, engine(max_num_batched_tokens=100))
    assert [r.prefill_tokens for r in reports if r.prefill_tokens] == [8, 20 - 12, 32 - 24]


def test_a_turn_that_comes_while_the_earlier_one_answers_finds_what_there_is() -> None:
    workload = Workload.of([0.0, 0.105], [8, 30], [20, 2])
    backend = PrefixCachingBackend(SharedPrompts.of([-1, 0], [0, 28]))
    config = engine(max_num_batched_tokens=100, time_model=LinearTime(0.01, 0.0))
    reports = greedy(backend, workload, config)
    # It enters at 0.11 s. The eleven iterations before have computed 18 tokens of the other one, and the twelfth computes one more.
    assert [(round(r.start, 3), r.prefill_tokens) for r in reports if r.prefill_tokens] == [(0.0, 8), (0.11, 30 - 16)]


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
    with pytest.raises(ConfigError, match="row 1 shares 9 tokens with 0, must be at most 8 of its prompt and 30 of the other's prompt and"):
        PrefixCachingBackend(SharedPrompts.of([-1, 0], [0, 9])).reset(workload, layout, engine(), limits)
    short = Workload.of([0.0, 0.0], [20, 80], [10, 10])
    with pytest.raises(
        ConfigError, match="row 1 shares 31 tokens with 0, must be at most 80 of its prompt and 30 of the other's prompt and"
    ):
        PrefixCachingBackend(SharedPrompts.of([-1, 0], [0, 31])).reset(short, layout, engine(), limits)
    with pytest.raises(ConfigError, match=r"engine\.enable_prefix_caching: True, but it is an option of the vllm preset"):
        PrefixCachingBackend().reset(workload, layout, EngineConfig.paper(1000, 0.01, 1e-6), limits)
    with pytest.raises(ConfigError, match=r"engine\.decode_needs_free_block: True"):
        PrefixCachingBackend().reset(workload, layout, engine(decode_needs_free_block=True), limits)


# --- the pool by itself ---------------------------------------------------------------------------------
def nodes_of(*rows: tuple[int, int, int]) -> np.ndarray[Any, Any]:
    """(base, parent, shared) each."""
    return np.array(list(rows), dtype=Nodes.DTYPE)


def empty(nodes: np.ndarray[Any, Any], *, requests: int = 4, num_blocks: int = 12, seats: int = 3, blocks_per_seat: int = 8) -> Pool:
    pool = Pool(**empty_pool(requests, num_blocks, seats, blocks_per_seat, nodes))
    reset_pool(pool, num_blocks, True)
    return pool


def enter(pool: Pool, r: int, node: int, blocks: int) -> int:
    """Request r computes so many whole blocks of a node; how many of them were there already."""
    pool.files.node[r] = node
    hits = cached_blocks(pool, r, blocks)
    assert hits == cached_blocks_of(pool, node, blocks)
    assert free_among(pool, r, hits) <= hits
    open_seat(pool, r, hits)
    grow(pool, r, blocks - hits, blocks)
    return int(hits)


def test_an_empty_pool_is_as_long_as_it_is_told() -> None:
    pool = empty(nodes_of((0, -1, 0)), requests=5, num_blocks=12, seats=3, blocks_per_seat=8)
    assert [len(t) for t in (pool.blocks, pool.nodes, pool.files, pool.seats, pool.table)] == [13, 1, 5, 3, 24]
    assert len(pool.index) == 64 == pool.index_mask + 1
    assert (pool.free, pool.spare, pool.blocks_per_seat) == (12, 3, 8)
    assert pool.files.node.tolist() == [-1] * 5 and cached_blocks_of(pool, 0, 8) == 0


@pytest.mark.parametrize("num_blocks", [1, 2, 3, 4, 5, 2816, 2**14])
def test_the_index_has_room(num_blocks: int) -> None:
    pool = empty(nodes_of((0, -1, 0)), num_blocks=num_blocks)
    rows = len(pool.index)
    assert rows & (rows - 1) == 0 and 4 * num_blocks <= rows < 8 * num_blocks
    homes = [home_of(pool, contents) for contents in (*range(200), 2**31 - 1, 2**31, 2**62)]
    assert min(homes) >= 0 and max(homes) < rows


def test_numbers_that_follow_one_another_do_not_collide() -> None:
    pool = empty(nodes_of((0, -1, 0)), num_blocks=1000)
    for first in (0, 2**31 - 500, 2**40 + 12345):
        homes = Counter(home_of(pool, contents) for contents in range(first, first + 1000))
        assert max(homes.values()) <= 2


@given(seed=hs.integers(0, 2**32 - 1))
def test_the_index_is_a_dictionary(seed: int) -> None:
    g = np.random.default_rng(seed)
    pool = empty(nodes_of((0, -1, 0)), num_blocks=int(g.integers(1, 20)))
    numbers = [*range(8), *(2**40 + np.arange(4)).tolist()]
    last = len(pool.index) - 1  # homes at the end of the table: what collides goes on at its beginning
    numbers += [c for c in range(10**6, 10**6 + 3000) if home_of(pool, c) >= last - 1][:8]
    held: dict[int, list[int]] = {}
    for _ in range(200):
        block = int(g.integers(pool.num_blocks))
        if pool.blocks.contents[block] >= 0:
            contents = int(pool.blocks.contents[block])
            held[contents].remove(block)
            forget(pool, block)
        else:
            contents = int(g.choice(numbers))
            held.setdefault(contents, []).append(block)
            remember(pool, block, contents)
        assert [oldest_block(pool, c) for c in numbers] == [held[c][0] if held.get(c) else -1 for c in numbers]
    check_index(pool)


def test_contents_are_those_of_the_node_that_they_come_from() -> None:
    pool = empty(nodes_of((100, -1, 0), (200, 0, 3), (2**40, 1, 5), (300, 2, 2)))
    assert [contents_of(pool, 0, b) for b in range(4)] == [100, 101, 102, 103]
    assert [contents_of(pool, 1, b) for b in range(5)] == [100, 101, 102, 203, 204]
    assert [contents_of(pool, 2, b) for b in range(7)] == [100, 101, 102, 203, 204, 2**40 + 5, 2**40 + 6]
    assert [contents_of(pool, 3, b) for b in range(4)] == [100, 101, 302, 303]


def test_pools_on_common_nodes_hold_each_its_own() -> None:
    nodes = nodes_of((0, -1, 0), (50, 0, 2))
    one, other = empty(nodes), empty(nodes)
    assert enter(one, 0, node=0, blocks=4) == 0
    assert [cached_blocks_of(pool, node, 8) for pool in (one, other) for node in (0, 1)] == [4, 2, 0, 0]
    close_seat(one, 0)
    assert enter(one, 3, node=1, blocks=5) == 2  # the next request of the session, in another row
    assert enter(other, 3, node=1, blocks=5) == 0
    assert [cached_blocks_of(pool, node, 8) for pool in (one, other) for node in (0, 1)] == [4, 5, 2, 5]
    assert (one.free, other.free) == (12 - 5, 12 - 5)
    for pool in (one, other):
        check_index(pool)


def test_copies_of_pools_share_their_nodes_with_each_other_alone() -> None:
    nodes = nodes_of((0, -1, 0), (50, 0, 2))
    pools = empty(nodes), empty(nodes)
    enter(pools[0], 0, node=0, blocks=4)
    one, other = pickle.loads(pickle.dumps(pools))
    assert [cached_blocks_of(pool, 1, 8) for pool in (one, other)] == [2, 0]
    one.nodes.base[0] = 10**12
    assert other.nodes.base[0] == 10**12 and nodes["base"][0] == 0
    assert [contents_of(pool, 1, 1) for pool in (one, other, *pools)] == [10**12 + 1, 10**12 + 1, 1, 1]


def test_rows_of_requests_and_of_nodes_are_used_again_without_end() -> None:
    """A stream of sessions on two rows of nodes: whoever comes never finds what an earlier session of its row has left."""
    g = np.random.default_rng(5)
    nodes = nodes_of((0, -1, 0), (0, -1, 0))
    pool = empty(nodes)
    base = 2**31 - 40  # across the end of 32 bits
    for session in range(60):
        node = session % 2
        pool.nodes.base[node], pool.nodes.parent[node] = base, -1
        base += 8
        computed = 0
        for turn in range(int(g.integers(1, 4))):
            blocks = min(computed + int(g.integers(1, 4)), 8)
            assert enter(pool, (session + turn) % 4, node, blocks) == computed
            computed = blocks
            close_seat(pool, (session + turn) % 4)
            check_index(pool)
            assert pool.free == 12 and pool.spare == 3
    assert (pool.blocks.contents[:12] >= 2**31).all()


def test_nodes_of_an_episode_are_its_requests() -> None:
    workload = Workload.of([0.0, 0.0, 0.0], [9, 17, 30], [3, 4, 2])
    nodes = request_nodes(workload, 4, SharedPrompts.of([-1, 0, 1], [0, 7, 21]))
    assert nodes["base"].tolist() == [0, 3, 9]  # 12, 21 and 32 tokens are 3, 6 and 8 blocks
    assert nodes["parent"].tolist() == [-1, 0, 1] and nodes["shared"].tolist() == [0, 1, 5]
