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

What a block holds is a number: blocks of request r are numbered from ``F_BASE`` on, those of a shared
head carry the numbers of the request they are shared with (``F_DONOR``, ``F_SHARED``).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.types import IntArray

# --- blocks (B_ROWS, num_blocks + 1); the last column is the free queue's sentinel ---------------
B_NEXT = 0
B_PREVIOUS = 1
B_USERS = 2
B_CONTENTS = 3  # -1: none
B_TWIN = 4  # next younger block with the same contents, -1
B_ROWS = 5

# --- files: one column a request ------------------------------------------------------------------
F_BASE = 0
F_DONOR = 1
F_SHARED = 2  # blocks
F_SEAT = 3  # row of ``table`` while resident, -1
F_ROWS = 4

# --- seats: one column a resident -----------------------------------------------------------------
T_HELD = 0  # blocks of the request
T_CACHED = 1  # of these, how many have contents
T_SPARE = 2  # stack of seats not in use
T_ROWS = 3

# --- counts -----------------------------------------------------------------------------------------
N_FREE = 0
N_SPARE = 1
N_UNCACHED_FIRST = 2
N_ASKED = 3  # tokens of all admissions
N_HIT = 4  # of these, found in the cache
N_ROWS = 5


class Pool(NamedTuple):
    """Arrays of one block pool (int32; ``counts`` int64)."""

    blocks: IntArray
    files: IntArray
    seats: IntArray
    table: IntArray
    holder: IntArray
    counts: np.ndarray


def new_pool(
    num_blocks: int,
    seats: int,
    blocks_per_seat: int,
    base: IntArray,
    donor: IntArray,
    shared: IntArray,
    contents: int,
    uncached_first: bool,
) -> Pool:
    """An empty pool; ``base``, ``donor``, ``shared``: (N,), rows of ``files``; ``contents``: how many numbers there are."""
    n = base.shape[0]
    pool = Pool(
        blocks=np.zeros((B_ROWS, num_blocks + 1), dtype=np.int32),
        files=np.stack([base, donor, shared, np.full(n, -1)]).astype(np.int32),
        seats=np.zeros((T_ROWS, seats), dtype=np.int32),
        table=np.zeros((seats, blocks_per_seat), dtype=np.int32),
        holder=np.full(contents, -1, dtype=np.int32),
        counts=np.zeros(N_ROWS, dtype=np.int64),
    )
    order = np.arange(num_blocks + 1)
    pool.blocks[B_NEXT] = np.roll(order, -1)
    pool.blocks[B_PREVIOUS] = np.roll(order, 1)
    pool.blocks[B_CONTENTS] = -1
    pool.blocks[B_TWIN] = -1
    pool.seats[T_SPARE] = np.arange(seats)
    pool.counts[N_FREE] = num_blocks
    pool.counts[N_SPARE] = seats
    pool.counts[N_UNCACHED_FIRST] = uncached_first
    return pool


@compiled
def _unlink(block, blocks):  # type: ignore[no-untyped-def]
    before = blocks[B_PREVIOUS, block]
    after = blocks[B_NEXT, block]
    blocks[B_NEXT, before] = after
    blocks[B_PREVIOUS, after] = before


@compiled
def _link_before(block, place, blocks):  # type: ignore[no-untyped-def]
    before = blocks[B_PREVIOUS, place]
    blocks[B_NEXT, before] = block
    blocks[B_PREVIOUS, block] = before
    blocks[B_NEXT, block] = place
    blocks[B_PREVIOUS, place] = block


@compiled
def _contents(r, b, files):  # type: ignore[no-untyped-def]
    """What block b of request r holds when it is full."""
    while b < files[F_SHARED, r]:
        r = files[F_DONOR, r]
    return files[F_BASE, r] + b


@compiled
def _forget(block, pool):  # type: ignore[no-untyped-def]
    """The block loses its contents."""
    blocks = pool.blocks
    contents = blocks[B_CONTENTS, block]
    if contents < 0:
        return
    if pool.holder[contents] == block:
        pool.holder[contents] = blocks[B_TWIN, block]
    else:
        older = pool.holder[contents]
        while blocks[B_TWIN, older] != block:
            older = blocks[B_TWIN, older]
        blocks[B_TWIN, older] = blocks[B_TWIN, block]
    blocks[B_CONTENTS, block] = -1
    blocks[B_TWIN, block] = -1


@compiled
def find(r, tokens, block_size, pool):  # type: ignore[no-untyped-def]
    """(cached blocks at the head of the request's ``tokens`` tokens, how many of them are free)."""
    most = (tokens - 1) // block_size
    free = 0
    b = 0
    while b < most:
        block = pool.holder[_contents(r, b, pool.files)]
        if block < 0:
            break
        if pool.blocks[B_USERS, block] == 0:
            free += 1
        b += 1
    return b, free


@compiled
def open_seat(r, hits, pool):  # type: ignore[no-untyped-def]
    """Request r becomes resident and takes over ``hits`` cached blocks."""
    pool.counts[N_SPARE] -= 1
    seat = pool.seats[T_SPARE, pool.counts[N_SPARE]]
    pool.files[F_SEAT, r] = seat
    for b in range(hits):
        block = pool.holder[_contents(r, b, pool.files)]
        if pool.blocks[B_USERS, block] == 0:
            _unlink(block, pool.blocks)
            pool.counts[N_FREE] -= 1
        pool.blocks[B_USERS, block] += 1
        pool.table[seat, b] = block
    pool.seats[T_HELD, seat] = hits
    pool.seats[T_CACHED, seat] = hits


@compiled
def grow(r, count, full, pool):  # type: ignore[no-untyped-def]
    """Request r takes ``count`` blocks from the free queue; its first ``full`` blocks then have contents."""
    seat = pool.files[F_SEAT, r]
    blocks = pool.blocks
    held = pool.seats[T_HELD, seat]
    sentinel = blocks.shape[1] - 1
    for b in range(held, held + count):
        block = blocks[B_NEXT, sentinel]
        _unlink(block, blocks)
        _forget(block, pool)
        blocks[B_USERS, block] = 1
        pool.table[seat, b] = block
    pool.counts[N_FREE] -= count
    pool.seats[T_HELD, seat] = held + count
    for b in range(pool.seats[T_CACHED, seat], full):
        block = pool.table[seat, b]
        contents = _contents(r, b, pool.files)
        blocks[B_CONTENTS, block] = contents
        if pool.holder[contents] < 0:
            pool.holder[contents] = block
        else:
            older = pool.holder[contents]
            while blocks[B_TWIN, older] >= 0:
                older = blocks[B_TWIN, older]
            blocks[B_TWIN, older] = block
    pool.seats[T_CACHED, seat] = max(pool.seats[T_CACHED, seat], full)


@compiled
def close_seat(r, pool):  # type: ignore[no-untyped-def]
    """Request r is no longer resident; blocks without another user become free and keep their contents."""
    seat = pool.files[F_SEAT, r]
    blocks = pool.blocks
    sentinel = blocks.shape[1] - 1
    front = blocks[B_NEXT, sentinel]
    for b in range(pool.seats[T_HELD, seat] - 1, -1, -1):
        block = pool.table[seat, b]
        blocks[B_USERS, block] -= 1
        if blocks[B_USERS, block] > 0:
            continue
        pool.counts[N_FREE] += 1
        if pool.counts[N_UNCACHED_FIRST] != 0 and blocks[B_CONTENTS, block] < 0:
            _link_before(block, front, blocks)  # a request's blocks without contents keep their order
        else:
            _link_before(block, sentinel, blocks)
    pool.files[F_SEAT, r] = -1
    pool.seats[T_SPARE, pool.counts[N_SPARE]] = seat
    pool.counts[N_SPARE] += 1
