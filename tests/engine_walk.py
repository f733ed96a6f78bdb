"""An engine's record read field by field in plain Python: what a policy is shown of it, and whether it is in order.

Independent of the compiled functions that keep the record: lists are followed by hand, sums are taken from the requests.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from llmsched_env.engine import state as st
from llmsched_env.engine.record_backend import RecordBackend
from llmsched_env.records import Level, Record, Rows

ALONE_STATUS = (st.PREFILL, st.DECODE, st.ENTERING)
RESIDENT = (st.PREFILL, st.DECODE, st.BOUNDARY, st.ENTERING)


def shown(record: Record, level: Level = Level.VISIBLE, path: str = "") -> dict[str, bytes]:
    """Every byte that a reader of this level has, by field; addresses left out."""
    found: dict[str, bytes] = {}
    for name, field in type(record).FIELDS.items():
        if field.level > level or name == "code":
            continue
        value: Any = getattr(record, name)
        if isinstance(value, Record):
            found |= shown(value, level, f"{path}{name}.")
        elif isinstance(value, Rows):
            columns = [c for c, f in type(value).FIELDS.items() if f.level <= level]
            found |= {f"{path}{name}.{column}": getattr(value, column).tobytes() for column in columns}
        else:
            found[path + name] = np.asarray(value).tobytes()
    return found


def differing(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if one[name] != other[name]]


def chain(first: int, following: Any, most: int) -> list[int]:
    """A list of the record; it must end."""
    found = []
    r = int(first)
    while r >= 0:
        found.append(r)
        assert len(found) <= most, f"a list of more than {most} goes round: {found[:10]}"
        r = int(following[r])
    return found


class Columns:
    """The columns of a table as they are now."""

    def __init__(self, table: Rows) -> None:
        for name in type(table).FIELDS:
            setattr(self, name, getattr(table, name).copy())

    def __getattr__(self, name: str) -> Any:  # for type checkers alone
        raise AttributeError(name)


def check_engine(backend: RecordBackend, gone: set[int] | None = None, within: bool = False) -> None:
    """Everything that must hold of the record between two steps (an iteration that the horizon cuts short aside).

    Args:
        gone: of an engine that requests are handed in to one by one, the rows that hold none, or one that it has not received.
        within: a step has begun: residents have the blocks for its tokens, but not the tokens.
    """
    e = backend.record
    s = SimpleNamespace(**{name: getattr(e.settings, name) for name in st.Settings.FIELDS})
    requests, queues, hidden = Columns(e.requests), Columns(e.queues), Columns(e.hidden)
    n, alone = e.num_requests if gone is None else len(e.requests), s.num_queues
    status = requests.status[:n]
    if gone is not None:
        status[sorted(gone)] = st.FUTURE
        hidden.completed[sorted(gone)] = np.nan
    residents = chain(e.oldest, requests.next, n)
    outside = {q: chain(queues.head[q], requests.next, n) for q in range(0, alone, s.num_segments)}
    peers = {row: chain(queues.first_peer[row], requests.next_peer, n) for row in range(alone + 1)}

    # every request is in exactly one place
    waiting = [r for queue in outside.values() for r in queue]
    assert sorted(residents) == np.flatnonzero(np.isin(status, RESIDENT)).tolist()
    assert sorted(waiting) == np.flatnonzero(status == st.WAITING).tolist()
    assert (status == st.PREFILLED).sum() == 0
    assert np.array_equal(status == st.FINISHED, ~np.isnan(hidden.completed[:n]))
    finished, rejected = int((status == st.FINISHED).sum()), int((status == st.REJECTED).sum())
    if gone is None:
        assert np.array_equal(status == st.FUTURE, np.arange(n) >= e.next_arrival)
        assert not requests.prompt[e.next_arrival : n].any()
        assert np.array_equal(requests.prompt[: e.next_arrival], hidden.prompt[: e.next_arrival])
        assert (finished, rejected) == (e.finished, e.rejected)
        assert e.next_arrival == e.num_waiting + e.num_residents + finished + rejected
    else:
        assert finished == rejected == 0 and (status != st.FUTURE).sum() == e.num_waiting + e.num_residents
    assert e.num_waiting == len(waiting) and e.num_residents == len(residents)
    assert e.waiting_tokens == int((requests.prompt[waiting] + requests.base_generated[waiting]).sum() if waiting else 0)

    # the list by admission goes both ways and is sorted
    assert e.newest == (residents[-1] if residents else -1)
    assert [int(requests.previous[r]) for r in residents] == [-1, *residents[:-1]][: len(residents)]
    assert np.all(np.diff(requests.sequence[residents]) > 0)

    # outside queues
    for q, queue in outside.items():
        assert queues.waiting[q] == len(queue)
        assert all(requests.queue[r] == requests.outside[r] == hidden.outside[r] == q for r in queue)
        assert queues.tail[q] == (queue[-1] if queue else -1)
        timely = [r for r in queue if requests.key[r] < st.LATE_KEY // 2]
        assert queue[: len(timely)] == timely
        assert queues.timely[q] == (timely[-1] if timely else -1) and queues.late[q] == len(queue) - len(timely)
        assert np.all(np.diff(requests.key[queue]) > 0)
        assert all(requests.group[r] == alone for r in queue)

    # what each resident holds, and whom it advances with
    group = requests.group[residents] if residents else np.empty(0, dtype=int)
    steps = queues.steps[: alone + 1]
    assert steps[alone] == 0
    generated = dict(zip(residents, requests.base_generated[residents] + steps[group], strict=True)) if residents else {}
    computed = dict(zip(residents, requests.base_computed[residents] + steps[group], strict=True)) if residents else {}
    members = {q: [r for r in residents if requests.group[r] == q] for q in range(alone)}
    taken = {r: int(computed[r]) + (tokens_of(e, r) if within else 0) for r in residents}
    kv = {r: held if s.paper else -(-held // s.block_size) for r, held in taken.items()}
    ending = set(e.events.last_tokens[: e.num_last_tokens].tolist())  # whose last token is in flight
    assert ending <= set(residents) | (set(waiting) if within else set())  # evicted by the batch that has just been scheduled
    for r in residents:
        assert 0 <= generated[r] < hidden.output[r] or (r in ending and generated[r] == hidden.output[r])
        # tokens come out of computed ones; in the paper preset the prefill gives none
        if status[r] != st.PREFILL:
            assert computed[r] == requests.prompt[r] + generated[r] - (0 if s.paper else 1)
            assert computed[r] >= requests.target[r]
        else:
            assert computed[r] < requests.target[r] == requests.prompt[r] + generated[r]
        assert (status[r] == st.BOUNDARY) == (r in peers[requests.queue[r]])
        in_group = requests.group[r] != alone
        assert in_group + (r in peers[alone]) + (status[r] == st.BOUNDARY) == 1
        if in_group:
            assert status[r] == st.DECODE and requests.group[r] == requests.queue[r]
        assert requests.queue[r] // s.num_segments == hidden.outside[r] // s.num_segments

    # lists of peers go both ways, in the order of admission
    for row, listed in peers.items():
        assert queues.last_peer[row] == (listed[-1] if listed else -1)
        assert [int(requests.previous_peer[r]) for r in listed] == [-1, *listed[:-1]][: len(listed)]
        assert np.all(np.diff(requests.sequence[listed]) > 0)
        if row < alone:
            assert not listed or row % s.num_segments != 0
            assert all(status[r] == st.BOUNDARY and requests.queue[r] == row for r in listed)
            assert queues.waiting[row] == len(listed) or row % s.num_segments == 0
            ends = queues.segment_end[row - 1] if row % s.num_segments else None
            assert all(generated[r] == ends for r in listed)
        else:
            assert all(status[r] in ALONE_STATUS for r in listed)

    # sums of the segments
    for q in range(alone):
        inside = [r for r in residents if requests.queue[r] == q and status[r] != st.BOUNDARY]
        assert queues.residents[q] == len(inside) and queues.resident_kv[q] == sum(kv[r] for r in inside)
        assert queues.boundary_kv[q] == sum(kv[r] for r in peers[q])
        assert queues.members[q] == len(members[q])
        assert queues.member_kv[q] == sum(int(computed[r]) for r in members[q])
        low = 0 if q % s.num_segments == 0 else int(queues.segment_end[q - 1])
        for r in inside:
            # a request computed again after an eviction counts to its first segment until that is done
            assert status[r] == st.PREFILL or low <= generated[r] < queues.segment_end[q]
            assert status[r] != st.PREFILL or q == requests.outside[r]
    assert e.num_boundary == sum(len(peers[q]) for q in range(alone))
    assert e.num_prefilling == int((status == st.PREFILL).sum())
    assert e.kv_tokens == sum(int(c) for c in computed.values())
    if s.paper == 0 and s.prefix_caching == 0:
        assert e.kv_blocks == sum(kv.values())
    if s.prefix_caching:
        check_pool(backend, residents, kv, within)
    if not (within and s.prefix_caching):
        assert (e.kv_tokens if s.paper else e.kv_blocks) <= s.capacity
    if s.paper == 0:
        assert e.num_residents <= s.max_num_seqs

    # members by the place of their last token within a block
    if s.paper == 0:
        counts = e.phases.count.reshape(alone, s.block_size)
        for q in range(alone):
            assert queues.phase[q] == -int(steps[q]) % s.block_size
            counted = np.bincount([int(computed[r] - steps[q]) % s.block_size for r in members[q]], minlength=s.block_size)
            assert counts[q].tolist() == counted.tolist()

    # the wheel has each member once, where something happens to it next
    first = e.wheel.first.reshape(alone, s.wheel_size)
    for q in range(alone):
        on_wheel: list[int] = []
        for place in np.flatnonzero(first[q] >= 0):
            listed = chain(first[q, place], hidden.next_due, n)
            assert [int(hidden.previous_due[r]) for r in listed] == [-1, *listed[:-1]][: len(listed)]
            assert all(hidden.due[r] % s.wheel_size == place for r in listed)
            on_wheel += listed
        assert sorted(on_wheel) == sorted(members[q])
        for r in members[q]:
            stop = 1 if generated[r] == 0 else min(int(hidden.output[r]), int(queues.segment_end[q]))
            assert hidden.due[r] == stop - requests.base_generated[r] >= steps[q] + (r not in ending)


def tokens_of(engine: st.Engine, r: int) -> int:
    """Tokens of resident r in the batch that has been scheduled."""
    requests = engine.requests
    if requests.group[r] != engine.settings.num_queues:
        return int(engine.queues.runs[requests.queue[r]])
    return 0 if requests.status[r] == st.BOUNDARY else int(requests.tokens[r])


def check_pool(backend: RecordBackend, residents: list[int], kv: dict[int, int], within: bool = False) -> None:
    """Blocks held by residents are counted once each; the rest is free."""
    pool = backend.record.pool
    seats = [int(pool.files.seat[r]) for r in residents]
    assert len(set(seats)) == len(seats) and (pool.files.seat >= 0).sum() == len(seats)
    used: set[int] = set()
    for r, seat in zip(residents, seats, strict=True):
        assert pool.seats.held[seat] == kv[r]
        table = pool.table.block[seat * pool.blocks_per_seat : seat * pool.blocks_per_seat + kv[r]].tolist()
        assert len(set(table)) == len(table)
        used |= set(table)
    assert pool.free == pool.num_blocks - len(used)
    if not within:
        assert backend.record.kv_blocks == len(used)
