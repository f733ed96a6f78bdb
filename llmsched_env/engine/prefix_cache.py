"""Blocks with contents: vLLM's automatic prefix caching (compiled).

A full block keeps its contents when it is freed, until it is taken again. A request that enters, for
the first time or after a preemption, takes over the blocks that still hold the head of its tokens and
computes the rest. Rules of vLLM's ``v1/core/block_pool.py`` and ``v1/core/kv_cache_manager.py``:

* freed blocks join the end of the free queue, the last block of a request first, so that heads live
  longest; new blocks come from its front. From some version after 0.19 on (0.28 does), blocks
  without contents go to the front instead: ``uncached_first``.
* a full block has contents from the moment it is allocated for its last token. The block that the last
  output token of a request would fill never has: the request leaves when it has that token. Blocks are
  not merged: two may have the same contents, the older one is found first.
* a hit covers whole blocks and at most all tokens but one.
* a hit on a free block takes it off the free queue, so it counts as taken in the memory tests.

What a block holds is a number. A *node* is a sequence of tokens that a request's prompt and answer are the beginning of; its blocks
are numbered from ``nodes.base`` on, and those at its beginning that are its parent's carry the parent's numbers. In an episode every
request has a node of its own. Which block holds given contents is found in a hash table (``Index``) whose length depends on
the number of blocks alone, however many requests go through the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.engine.state import Blocks, Files, Index, Nodes, Pool, Seats, Table
from llmsched_env.errors import ConfigError
from llmsched_env.types import IntArray, Workload

HASH_BITS = 31
"""Bits of a hash: a product of two such numbers fits 64 bits, in plain Python's numpy numbers as well."""
_LOW_BITS = 2**HASH_BITS - 1
_FACTOR = 1327217885
"""2**31 divided by the golden ratio, odd: numbers that follow one another fall far apart (Knuth, TAOCP 3, 6.4)."""


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Which head of its prompt each request shares with an earlier one: with its prompt, or with prompt and answer as a later turn of
    a chat does.

    Attributes:
        donor: (N,) int32, the earlier request with the longest common head (the first such), -1 for none.
        tokens: (N,) int32, length of that head; 0 for none.
    """

    donor: IntArray
    tokens: IntArray

    @classmethod
    def of(cls, donor: npt.ArrayLike, tokens: npt.ArrayLike) -> SharedPrompts:
        """Check and convert; raises ``ConfigError`` naming the first offending row."""
        d, t = (np.ascontiguousarray(a, dtype=np.int32) for a in (donor, tokens))
        if d.ndim != 1 or d.shape != t.shape:
            raise ConfigError(f"shared_prompts: shapes {d.shape} and {t.shape}, must be equal and (N,)")
        bad = np.flatnonzero((d >= np.arange(d.size)) | (d < -1) | (t < 0) | ((d < 0) != (t == 0)))
        if bad.size:
            i = int(bad[0])
            raise ConfigError(f"shared_prompts: row {i} shares {t[i]} tokens with {d[i]}, must be >= 1 with an earlier one, or 0 with -1")
        return cls(d, t)

    @classmethod
    def none(cls, n: int) -> SharedPrompts:
        """All prompts differ from their first token on."""
        return cls(np.full(n, -1, dtype=np.int32), np.zeros(n, dtype=np.int32))

    def check(self, workload: Workload) -> None:
        """Refuse heads that these requests cannot share.

        Raises:
            ConfigError: another number of requests, or a head longer than the prompt, or than prompt and answer of the earlier request.
        """
        n = len(workload)
        if self.donor.size != n:
            raise ConfigError(f"shared_prompts: {self.donor.size} rows, must be {n} as the workload has requests")
        has = np.flatnonzero(self.donor >= 0)
        whole = workload.prompt_tokens.astype(np.int64) + workload.output_tokens
        heads = np.minimum(workload.prompt_tokens[has], whole[self.donor[has]])
        bad = has[self.tokens[has] > heads]
        if bad.size:
            i = int(bad[0])
            raise ConfigError(
                f"shared_prompts: row {i} shares {self.tokens[i]} tokens with {self.donor[i]}, must be at most {workload.prompt_tokens[i]} "
                f"of its prompt and {whole[self.donor[i]]} of the other's prompt and answer"
            )


def request_nodes(workload: Workload, block_size: int, shared: SharedPrompts | None = None) -> npt.NDArray[np.void]:
    """(N,) rows of ``Nodes`` for the requests of an episode, node r that of request r.

    Raises:
        ConfigError: heads that these requests cannot share.
    """
    n = len(workload)
    shared = SharedPrompts.none(n) if shared is None else shared
    shared.check(workload)
    lengths = _blocks_of_requests(workload, block_size)
    nodes = np.zeros(n, Nodes.DTYPE)
    nodes["base"], nodes["parent"], nodes["shared"] = np.cumsum(lengths) - lengths, shared.donor, shared.tokens // block_size
    return nodes


def _blocks_of_requests(workload: Workload, block_size: int) -> npt.NDArray[np.int64]:
    """(N,) blocks that prompt and answer fill, the last one in part."""
    lengths: npt.NDArray[np.int64] = -(-(workload.prompt_tokens.astype(np.int64) + workload.output_tokens) // block_size)
    return lengths


def empty_pool(
    num_requests: int, num_blocks: int, seats: int, blocks_per_seat: int, nodes: npt.NDArray[np.void]
) -> dict[str, npt.NDArray[np.void]]:
    """Tables of an empty pool by field of ``Pool``, for ``reset_pool``. None grows with what goes through it.

    Args:
        num_requests: rows of requests in the engine; whoever puts a request into one writes its node into ``files.node``.
        seats: residents that there can be at once.
        blocks_per_seat: blocks of the longest request.
        nodes: (M,) of ``Nodes.DTYPE``; pools may share them.
    """
    files = np.zeros(num_requests, Files.DTYPE)
    files["node"] = -1
    return {
        "blocks": np.zeros(num_blocks + 1, Blocks.DTYPE),
        "nodes": nodes,
        "files": files,
        "seats": np.zeros(seats, Seats.DTYPE),
        "table": np.zeros(seats * blocks_per_seat, Table.DTYPE),
        "index": np.zeros(1 << (4 * num_blocks - 1).bit_length(), Index.DTYPE),  # so sparse that few rows collide
    }


def pool_tables(
    workload: Workload, num_blocks: int, block_size: int, seats: int, shared: SharedPrompts | None = None
) -> dict[str, npt.NDArray[np.void]]:
    """``empty_pool`` for the requests of an episode.

    Raises:
        ConfigError: heads that these requests cannot share.
    """
    n = len(workload)
    longest = int(_blocks_of_requests(workload, block_size).max(initial=1))
    tables = empty_pool(n, num_blocks, seats, longest, request_nodes(workload, block_size, shared))
    tables["files"]["node"] = np.arange(n)
    return tables


def reset_pool(pool: Pool, num_blocks: int, uncached_first: bool) -> None:
    """All blocks are free and without contents."""
    blocks, order = pool.blocks, np.arange(num_blocks + 1)
    blocks.next[:], blocks.previous[:] = np.roll(order, -1), np.roll(order, 1)
    blocks.users[:] = 0
    blocks.contents[:] = blocks.twin[:] = -1
    pool.files.seat[:] = -1
    pool.files.in_flight[:] = 0
    pool.index.block[:] = -1
    pool.index_mask = len(pool.index) - 1
    pool.index_shift = HASH_BITS - pool.index_mask.bit_length()
    pool.seats.spare[:] = np.arange(len(pool.seats))
    pool.num_blocks, pool.free, pool.spare = num_blocks, num_blocks, len(pool.seats)
    pool.blocks_per_seat = len(pool.table) // max(len(pool.seats), 1)
    pool.uncached_first = uncached_first
    pool.asked_tokens = pool.hit_tokens = 0


@compiled
def unlink_block(pool: Pool, block: int) -> None:
    blocks = pool.blocks
    before, after = blocks.previous[block], blocks.next[block]
    blocks.next[before] = after
    blocks.previous[after] = before


@compiled
def link_before(pool: Pool, block: int, place: int) -> None:
    blocks = pool.blocks
    before = blocks.previous[place]
    blocks.next[before] = block
    blocks.previous[block] = before
    blocks.next[block] = place
    blocks.previous[place] = block


@compiled
def contents_of(pool: Pool, node: int, b: int) -> int:
    """What block b of a node holds when it is full."""
    nodes = pool.nodes
    while b < nodes.shared[node]:
        node = nodes.parent[node]
    return nodes.base[node] + b


# --- the index: open addressing, linear probing -------------------------------------------------------
@compiled
def home_of(pool: Pool, contents: int) -> int:
    """Row of the index from which contents are looked for."""
    return ((((contents ^ (contents >> HASH_BITS)) & _LOW_BITS) * _FACTOR) & _LOW_BITS) >> pool.index_shift


@compiled
def row_of(pool: Pool, contents: int) -> int:
    """Row of the index that has these contents, or the empty one where they belong."""
    index = pool.index
    row = home_of(pool, contents)
    while index.block[row] >= 0 and index.contents[row] != contents:
        row = (row + 1) & pool.index_mask
    return row


@compiled
def oldest_block(pool: Pool, contents: int) -> int:
    """The oldest block that has these contents; -1 if there is none."""
    return pool.index.block[row_of(pool, contents)]


@compiled
def clear_row(pool: Pool, row: int) -> None:
    """Empty a row of the index. Rows behind it move up, so that no gap lies between any of them and its home."""
    index, mask = pool.index, pool.index_mask
    gap = row
    row = (row + 1) & mask
    while index.block[row] >= 0:
        contents = index.contents[row]
        if ((row - home_of(pool, contents)) & mask) >= ((row - gap) & mask):
            index.contents[gap] = contents
            index.block[gap] = index.block[row]
            gap = row
        row = (row + 1) & mask
    index.block[gap] = -1


@compiled
def remember(pool: Pool, block: int, contents: int) -> None:
    """The block, which has none, gets contents."""
    blocks, index = pool.blocks, pool.index
    blocks.contents[block] = contents
    row = row_of(pool, contents)
    older = index.block[row]
    if older < 0:
        index.contents[row] = contents
        index.block[row] = block
    else:
        while blocks.twin[older] >= 0:
            older = blocks.twin[older]
        blocks.twin[older] = block


@compiled
def forget(pool: Pool, block: int) -> None:
    """The block loses its contents."""
    blocks = pool.blocks
    contents = blocks.contents[block]
    if contents < 0:
        return
    row = row_of(pool, contents)
    older = pool.index.block[row]
    if older != block:
        while blocks.twin[older] != block:
            older = blocks.twin[older]
        blocks.twin[older] = blocks.twin[block]
    elif blocks.twin[block] >= 0:
        pool.index.block[row] = blocks.twin[block]
    else:
        clear_row(pool, row)
    blocks.contents[block] = -1
    blocks.twin[block] = -1


# --- requests -----------------------------------------------------------------------------------------
@compiled
def find_blocks(pool: Pool, node: int, most: int, place: int) -> int:
    """Blocks at the head of a node that the cache holds, at most ``most``, written from row ``place`` of the table on; -1: nowhere."""
    for b in range(most):
        block = oldest_block(pool, contents_of(pool, node, b))
        if block < 0:
            return b
        if place >= 0:
            pool.table.block[place + b] = block
    return most


@compiled
def cached_blocks_of(pool: Pool, node: int, most: int) -> int:
    """Blocks at the head of a node that the cache holds, at most ``most``; for a call that is in no engine yet."""
    return find_blocks(pool, node, most, -1)


@compiled
def next_place(pool: Pool) -> int:
    """First row of the table of the next who becomes resident; -1 if there is no room for one."""
    return pool.seats.spare[pool.spare - 1] * pool.blocks_per_seat if pool.spare > 0 else -1


@compiled
def cached_blocks(pool: Pool, r: int, most: int) -> int:
    """The same of request r, which may become the next resident: its blocks are noted for ``free_among`` and ``open_seat``."""
    return find_blocks(pool, pool.files.node[r], most, next_place(pool))


@compiled
def free_among(pool: Pool, r: int, hits: int) -> int:
    """How many of the first ``hits`` blocks nobody uses that ``cached_blocks`` has just found for request r."""
    place = next_place(pool)
    free = 0
    for b in range(hits):
        if pool.blocks.users[pool.table.block[place + b]] == 0:
            free += 1
    return free


@compiled
def open_seat(pool: Pool, r: int, hits: int) -> None:
    """Request r becomes resident and takes over the first ``hits`` blocks that ``cached_blocks`` has just found for it."""
    place = next_place(pool)
    pool.spare -= 1
    seat = pool.seats.spare[pool.spare]
    pool.files.seat[r] = seat
    pool.files.in_flight[r] = 0
    for b in range(hits):
        block = pool.table.block[place + b]
        if pool.blocks.users[block] == 0:
            unlink_block(pool, block)
            pool.free -= 1
        pool.blocks.users[block] += 1
    pool.seats.held[seat] = hits
    pool.seats.cached[seat] = hits


@compiled
def grow(pool: Pool, r: int, count: int, full: int) -> None:
    """Request r takes ``count`` blocks from the free queue; its first ``full`` blocks then have contents."""
    seat, node = pool.files.seat[r], pool.files.node[r]
    blocks, seats = pool.blocks, pool.seats
    first = seat * pool.blocks_per_seat
    held = seats.held[seat]
    for b in range(held, held + count):
        block = blocks.next[pool.num_blocks]
        unlink_block(pool, block)
        forget(pool, block)
        blocks.users[block] = 1
        pool.table.block[first + b] = block
    pool.free -= count
    seats.held[seat] = held + count
    for b in range(seats.cached[seat], full):
        remember(pool, pool.table.block[first + b], contents_of(pool, node, b))
    seats.cached[seat] = max(seats.cached[seat], full)


@compiled
def close_seat(pool: Pool, r: int) -> None:
    """Request r is no longer resident; blocks without another user become free and keep their contents."""
    seat = pool.files.seat[r]
    blocks = pool.blocks
    sentinel = pool.num_blocks
    front = blocks.next[sentinel]
    for b in range(pool.seats.held[seat] - 1, -1, -1):
        block = pool.table.block[seat * pool.blocks_per_seat + b]
        blocks.users[block] -= 1
        if blocks.users[block] > 0:
            continue
        pool.free += 1
        if pool.uncached_first != 0 and blocks.contents[block] < 0:
            link_before(pool, block, front)  # a request's blocks without contents keep their order
        else:
            link_before(pool, block, sentinel)
    pool.files.seat[r] = -1
    pool.seats.spare[pool.spare] = seat
    pool.spare += 1
