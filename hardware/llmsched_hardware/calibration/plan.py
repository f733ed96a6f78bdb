"""Which batches a calibration measures, the most useful first: a coarse grid, then finer ones between its points.

Batches that share their preparation form a group: decodes of one context length, with more of them
from probe to probe, and prefill chunks behind them; or chunks of one size at growing contexts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmsched_hardware.calibration.points import Probe

WARM_STEPS = 3
DECODE_STEPS = 9
"""Untimed and timed steps of a decode probe; a chunk is timed ``CHUNK_STEPS`` times after one untimed."""
CHUNK_STEPS = 4
SHORTEST = 16
"""Smallest context and chunk of the grids, tokens."""
LEVELS = 3
LAST_ROOM = 128
"""Tokens that requests at the longest context still may generate, which bounds how many probes there are."""
SATURATED = 0.97


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine at hand can run.

    Attributes:
        max_batch: most decodes to measure, at most ``max_num_seqs``.
        max_num_seqs: the engine's sequence cap.
        budget: tokens of an iteration.
        max_model_len: longest prompt + output, tokens.
        num_blocks, block_size: KV memory.
    """

    max_batch: int
    max_num_seqs: int
    budget: int
    max_model_len: int
    num_blocks: int
    block_size: int

    @property
    def capacity(self) -> int:
        """KV tokens."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True)
class Group:
    """Probes of one preparation, in the order in which they are measured; ``level`` 0 is the coarsest."""

    level: int
    probes: tuple[Probe, ...]

    @property
    def is_prefill(self) -> bool:
        return self.probes[0].kind == "prefill"

    @property
    def context(self) -> int:
        return self.probes[0].context

    @property
    def growth(self) -> int:
        """Tokens that the oldest decode gains while the group is measured."""
        return sum(WARM_STEPS + DECODE_STEPS if probe.kind == "decode" else 1 + CHUNK_STEPS for probe in self.probes)

    def without(self, done: set[Probe]) -> Group:
        return dataclasses.replace(self, probes=tuple(probe for probe in self.probes if probe not in done))


def plan(limits: EngineLimits) -> list[Group]:
    """All groups, coarse to fine; no probe twice, none that the engine cannot hold."""
    seen: set[Probe] = set()
    groups = []
    for level in range(LEVELS):
        for probes in (*_prefill(limits, level), *_stacks(limits, level)):
            fresh = tuple(probe for probe in dict.fromkeys(probes) if probe not in seen)
            if fresh:
                groups.append(Group(level, fresh))
                seen.update(fresh)
    return groups


def geometric(low: int, high: int, ratio: int) -> list[int]:
    """low, low * ratio, ... and ``high``, which ends the list; empty for high < 1."""
    if high < 1:
        return []
    values = []
    value = low
    while value < high:
        values.append(value)
        value *= ratio
    return [*values, high]


def _sizes(limits: EngineLimits, level: int) -> list[int]:
    """Numbers of decodes."""
    sizes = geometric(1, limits.max_batch, 4 if level == 0 else 2)
    if level == 2:
        sizes += [3 * s // 2 for s in sizes if s % 2 == 0 and 3 * s // 2 < limits.max_batch]
    return sorted(set(sizes))


def _chunks(limits: EngineLimits, level: int) -> list[int]:
    chunks = geometric(min(SHORTEST, limits.budget), min(limits.budget, limits.max_model_len - 1), 4 if level == 0 else 2)
    if level == 2:
        chunks += [3 * c // 2 for c in chunks if 3 * c // 2 < chunks[-1]]
    return sorted(set(chunks))


def _contexts(limits: EngineLimits, level: int) -> list[int]:
    """Contexts of decodes; the longest leaves room to decode in."""
    room = min(limits.max_model_len // 8, LAST_ROOM)
    return geometric(SHORTEST, min(limits.max_model_len - room, limits.capacity * 7 // 8), 8 if level == 0 else 2)


def _prefill(limits: EngineLimits, level: int) -> Iterator[list[Probe]]:
    """A group for each chunk size: its chunks at growing contexts."""
    for chunk in _chunks(limits, level):
        last = min(limits.max_model_len - 1, limits.capacity) - chunk
        places = {0: (0, 2), 1: (0, 1, 2, 4), 2: (0, 2)}[level]
        probes: list[Probe] = []
        for context in (last * place // 4 for place in places):
            if context >= 0 and (not probes or context >= probes[-1].chunk_context + chunk):
                probes.append(Probe("prefill", chunk=chunk, chunk_context=context))
        yield probes


def _stacks(limits: EngineLimits, level: int) -> Iterator[list[Probe]]:
    """A group for each context: more and more decodes, chunks behind them at some contexts, and the KV memory nearly full."""
    contexts = _contexts(limits, level)
    middle = contexts[(len(contexts) - 1) // 2]
    mixed = {0: {middle}, 1: {contexts[0], middle, contexts[-1]}, 2: {middle}}[level]
    sizes = _sizes(limits, level)
    for context in contexts:
        yield _stack(limits, context, sizes, _behind(limits, level) if context in mixed else [])
    if level < 2:
        for size in reversed(sizes):
            full = int(SATURATED * limits.capacity / size) - WARM_STEPS - DECODE_STEPS - 3 * (1 + CHUNK_STEPS)
            if SHORTEST <= full < contexts[-1]:
                yield _stack(limits, full, [size], _behind(limits, level)[:1])
            if level == 0:
                break


def _behind(limits: EngineLimits, level: int) -> list[int]:
    """Chunk sizes behind decodes."""
    sizes = {0: (64, limits.budget // 2), 1: (SHORTEST, 256, limits.budget), 2: (32, 128)}[level]
    return sorted({min(size, limits.budget, limits.max_model_len - 1) for size in sizes})


def _stack(limits: EngineLimits, context: int, sizes: Sequence[int], chunks: Sequence[int]) -> list[Probe]:
    """Decodes of one context in growing number, as many as stay inside the KV memory and the longest request."""
    probes: list[Probe] = []
    for size in sizes:
        at_size = [Probe("decode", size, context)]
        # A chunk that would not fit the budget behind the decodes is cut to what does.
        cut = sorted({min(chunk, limits.budget - size) for chunk in chunks}) if size < limits.max_num_seqs else []
        at_size += [Probe("mixed", size, context, chunk) for chunk in cut if chunk > 0]
        for probe in at_size:
            growth = Group(0, (*probes, probe)).growth
            each = -(-(context + growth) // limits.block_size)
            if context + growth >= limits.max_model_len:
                return probes
            if size * each + -(-probe.chunk // limits.block_size) <= limits.num_blocks:
                probes.append(probe)
    return probes
