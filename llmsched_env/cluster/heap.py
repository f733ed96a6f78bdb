"""A binary heap of numbered items by time (compiled)."""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.records import Floats, Ints, Longs, Rows


class Heap(Rows):
    """Items by ``key``, equal ones by ``tie``. Rows are places of the heap, but for ``place``, whose rows are items."""

    count: int  # items in the heap
    key: Floats
    tie: Longs
    item: Ints
    place: Ints  # of each item, -1 where it is not in the heap


@compiled
def precedes(heap: Heap, a: int, b: int) -> bool:
    """Whether what stands at place a comes before what stands at place b."""
    return heap.key[a] < heap.key[b] or (heap.key[a] == heap.key[b] and heap.tie[a] < heap.tie[b])


@compiled
def exchange(heap: Heap, a: int, b: int) -> None:
    key, tie, item = heap.key[a], heap.tie[a], heap.item[a]
    heap.key[a], heap.tie[a], heap.item[a] = heap.key[b], heap.tie[b], heap.item[b]
    heap.key[b], heap.tie[b], heap.item[b] = key, tie, item
    heap.place[heap.item[a]] = a
    heap.place[heap.item[b]] = b


@compiled
def rise(heap: Heap, place: int) -> None:
    while place > 0:
        above = (place - 1) // 2
        if not precedes(heap, place, above):
            return
        exchange(heap, place, above)
        place = above


@compiled
def sink(heap: Heap, place: int) -> None:
    while True:
        least = place
        for below in range(2 * place + 1, min(2 * place + 3, heap.count)):
            if precedes(heap, below, least):
                least = below
        if least == place:
            return
        exchange(heap, place, least)
        place = least


@compiled
def push(heap: Heap, item: int, key: float, tie: int) -> None:
    """Put an item in that is not there."""
    place = heap.count
    heap.count = place + 1
    heap.key[place] = key
    heap.tie[place] = tie
    heap.item[place] = item
    heap.place[item] = place
    rise(heap, place)


@compiled
def change(heap: Heap, item: int, key: float, tie: int) -> None:
    """Give an item that is there another key."""
    place = heap.place[item]
    heap.key[place] = key
    heap.tie[place] = tie
    rise(heap, place)
    sink(heap, heap.place[item])


@compiled
def pop(heap: Heap) -> int:
    """Take the first item out."""
    item = heap.item[0]
    last = heap.count - 1
    exchange(heap, 0, last)
    heap.count = last
    heap.place[item] = -1
    sink(heap, 0)
    return item
