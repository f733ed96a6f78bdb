"""Blocks with contents: vLLM's automatic prefix caching (compiled).

A full block keeps its contents when it is freed, until it is taken again. A request that enters, for
the first time or after a preemption, takes over the blocks that still hold the head of its tokens and
computes the rest. Rules of vLLM's ``v1/core/block_pool.py`` and ``v1/core/kv_cache_manager.py``:

* freed blocks join the end of the free queue, the last block of a request first, so that heads live
  longest; new blocks come from its front. From some version after 0.19 on (0.28 does), blocks
  without contents go to the front instead: ``uncached_first``.
* a full block has contents from the moment it is allocated. Blocks are not merged: two may have the
  same contents, the older one is found first.
* a hit covers whole blocks and at most all tokens but one.
* a hit on a free block takes it off the free queue, so it counts as taken in the memory tests.

What a block holds is a number: blocks of request r are numbered from ``files.base[r]`` on, those of a shared
head carry the numbers of the request they are shared with (``files.donor``, ``files.shared``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.engine.state import Blocks, Files, Holder, Pool, Seats, Table
from llmsched_env.errors import ConfigError
from llmsched_env.types import IntArray, Workload


@dataclass(frozen=True, slots=True)
class SharedPrompts:
    """Which head of its prompt each request shares with an earlier one.

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
            ConfigError: another number of requests, or a head longer than one of the two prompts.
        """
        n = len(workload)
        if self.donor.size != n:
            raise ConfigError(f"shared_prompts: {self.donor.size} rows, must be {n} as the workload has requests")
        has = np.flatnonzero(self.donor >= 0)
        heads = np.minimum(workload.prompt_tokens[has], workload.prompt_tokens[self.donor[has]])
        bad = has[self.tokens[has] > heads]
        if bad.size:
            i = int(bad[0])
            raise ConfigError(f"shared_prompts: row {i} shares {self.tokens[i]} tokens, more than one of the two prompts has")


def pool_tables(
    workload: Workload, num_blocks: int, block_size: int, seats: int, shared: SharedPrompts | None = None
) -> dict[str, npt.NDArray[np.void]]:
    """Tables of an empty pool by field of ``Pool``."""
    n = len(workload)
    shared = SharedPrompts.none(n) if shared is None else shared
    shared.check(workload)
    lengths = -(-(workload.prompt_tokens.astype(np.int64) + workload.output_tokens) // block_size)
    ends = np.cumsum(lengths)
    tables = {
        "blocks": np.zeros(num_blocks + 1, Blocks.DTYPE),
        "files": np.zeros(n, Files.DTYPE),
        "seats": np.zeros(seats, Seats.DTYPE),
        "table": np.zeros(seats * int(lengths.max(initial=1)), Table.DTYPE),
        "holder": np.zeros(int(ends[-1]) if n else 0, Holder.DTYPE),
    }
    files = tables["files"]
    files["base"], files["donor"], files["shared"], files["seat"] = ends - lengths, shared.donor, shared.tokens // block_size, -1
    return tables


def reset_pool(pool: Pool, num_blocks: int, uncached_first: bool) -> None:
    """All blocks are free and without contents."""
    blocks, order = pool.blocks, np.arange(num_blocks + 1)
    blocks.next[:], blocks.previous[:] = np.roll(order, -1), np.roll(order, 1)
    blocks.users[:] = 0
    blocks.contents[:] = blocks.twin[:] = -1
    pool.files.seat[:] = -1
    pool.files.in_flight[:] = 0
    pool.holder.block[:] = -1
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
def contents_of(pool: Pool, r: int, b: int) -> int:
    """What block b of request r holds when it is full."""
    files = pool.files
    while b < files.shared[r]:
        r = files.donor[r]
    return files.base[r] + b


@compiled
def forget(pool: Pool, block: int) -> None:
    """The block loses its contents."""
    blocks, holder = pool.blocks, pool.holder
    contents = blocks.contents[block]
    if contents < 0:
        return
    if holder.block[contents] == block:
        holder.block[contents] = blocks.twin[block]
    else:
        older = holder.block[contents]
        while blocks.twin[older] != block:
            older = blocks.twin[older]
        blocks.twin[older] = blocks.twin[block]
    blocks.contents[block] = -1
    blocks.twin[block] = -1


@compiled
def cached_blocks(pool: Pool, r: int, most: int) -> int:
    """Blocks at the head of request r that the cache holds, at most ``most``."""
    b = 0
    while b < most and pool.holder.block[contents_of(pool, r, b)] >= 0:
        b += 1
    return b


@compiled
def free_among(pool: Pool, r: int, hits: int) -> int:
    """How many of the first ``hits`` cached blocks of request r nobody uses."""
    free = 0
    for b in range(hits):
        if pool.blocks.users[pool.holder.block[contents_of(pool, r, b)]] == 0:
            free += 1
    return free


@compiled
def open_seat(pool: Pool, r: int, hits: int) -> None:
    """Request r becomes resident and takes over ``hits`` cached blocks."""
    pool.spare -= 1
    seat = pool.seats.spare[pool.spare]
    pool.files.seat[r] = seat
    pool.files.in_flight[r] = 0
    for b in range(hits):
        block = pool.holder.block[contents_of(pool, r, b)]
        if pool.blocks.users[block] == 0:
            unlink_block(pool, block)
            pool.free -= 1
        pool.blocks.users[block] += 1
        pool.table.block[seat * pool.blocks_per_seat + b] = block
    pool.seats.held[seat] = hits
    pool.seats.cached[seat] = hits


@compiled
def grow(pool: Pool, r: int, count: int, full: int) -> None:
    """Request r takes ``count`` blocks from the free queue; its first ``full`` blocks then have contents."""
    seat = pool.files.seat[r]
    blocks, seats, holder = pool.blocks, pool.seats, pool.holder
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
        block = pool.table.block[first + b]
        contents = contents_of(pool, r, b)
        blocks.contents[block] = contents
        older = holder.block[contents]
        if older < 0:
            holder.block[contents] = block
        else:
            while blocks.twin[older] >= 0:
                older = blocks.twin[older]
            blocks.twin[older] = block
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
