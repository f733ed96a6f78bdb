"""Recorded requests of which the trace says what their prompts have in common: Mooncake's files with ``hash_ids``.

A prompt is cut into blocks of 512 tokens, the last one perhaps shorter, and each block has a number. Two prompts begin alike for as long
as their numbers do. The times and lengths are those of ``read_trace``; only the numbers are read here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray, IntArray
from llmsched_env.workload import trace_values
from llmsched_env.workload.readers import REORDER_SECONDS, read_trace
from llmsched_env.workload.trace_files import Absent, BadRow, read_rows, read_text
from llmsched_env.workload.trace_formats import KNOWN_COLUMNS

BLOCK_TOKENS = 512
"""Tokens of a block of Mooncake's traces."""
COLUMN = "hash_ids"


@dataclass(frozen=True, slots=True, eq=False)
class PrefixTrace:
    """N requests in order of arrival.

    Attributes:
        path: the file.
        arrival: (N,) float64 seconds from the first one.
        prompt_tokens, output_tokens: (N,) int32, at least 1.
        blocks: the numbers of each prompt's blocks, ``ceil(prompt / block_tokens)`` of them.
        block_tokens: tokens of a block.
    """

    path: str
    arrival: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    blocks: tuple[tuple[int, ...], ...]
    block_tokens: int = BLOCK_TOKENS

    def __len__(self) -> int:
        return int(self.prompt_tokens.size)

    def at_most(self, max_tokens: int) -> PrefixTrace:
        """The requests whose prompt and output have at most ``max_tokens`` together."""
        rows = np.flatnonzero(self.prompt_tokens.astype(np.int64) + self.output_tokens <= max_tokens)
        blocks = tuple(self.blocks[i] for i in rows.tolist())
        return PrefixTrace(
            self.path, self.arrival[rows], self.prompt_tokens[rows], self.output_tokens[rows], blocks, self.block_tokens
        )  # fmt: skip


def read_prefix_trace(path: str | Path, *, block_tokens: int = BLOCK_TOKENS) -> PrefixTrace:
    """Read a trace in Mooncake's format with its ``hash_ids``.

    Args:
        path: JSON lines, gzip or not.
        block_tokens: tokens of a block.

    Raises:
        ConfigError: what ``read_trace`` refuses, another format, no ``hash_ids``, or numbers that are not as many as the prompt has blocks
            (``FILE:LINE: column 'hash_ids': ...``).
    """
    size = checks.integer("block_tokens", block_tokens, 1)
    trace = read_trace(path, invalid_rows="error", reorder_seconds=REORDER_SECONDS)
    where = trace.path
    if trace.format != "mooncake" or trace.arrival is None:
        raise ConfigError(f"{where}: {trace.format} format, must be mooncake's (timestamp, input_length, output_length, {COLUMN})")
    header, rows = read_rows(where, read_text(where), KNOWN_COLUMNS)
    if COLUMN not in header:
        raise ConfigError(f"{where}: no column {COLUMN!r}, which says what prompts have in common")
    i_time, i_prompt, i_blocks = header.index("timestamp"), header.index("input_length"), header.index(COLUMN)
    times: list[float] = []
    blocks: list[tuple[int, ...]] = []
    for line, cells in rows:
        assert not isinstance(cells, BadRow)  # read_trace has refused it
        times.append(float(trace_values.time(cells[i_time])))
        blocks.append(_block_ids(where, line, cells[i_blocks], -(-trace_values.tokens(cells[i_prompt]) // size)))
    order = np.argsort(np.asarray(times) - min(times), kind="stable")  # as read_trace does
    return PrefixTrace(where, trace.arrival, trace.prompt_tokens, trace.output_tokens, tuple(blocks[i] for i in order.tolist()), size)


def _block_ids(where: str, line: int, cell: Any, count: int) -> tuple[int, ...]:
    problem = ""
    if isinstance(cell, Absent):
        problem = cell.why
    elif not isinstance(cell, list):
        problem = f"{trace_values.shown(cell)} is not a list of block numbers"
    elif not all(type(one) is int and 0 <= one < 2**63 for one in cell):
        problem = f"{trace_values.shown(cell)} must hold integers from 0 to 2**63 - 1"
    elif len(cell) != count:
        problem = f"{trace_values.shown(cell)} has {len(cell)} blocks, must have {count}, as many as the prompt fills"
    if problem:
        raise ConfigError(f"{where}:{line}: column {COLUMN!r}: value {problem}")
    return tuple(cell)


class PrefixTree:
    """What has been seen, block by block: each place of the tree stands for a beginning of prompts."""

    ROOT = 0

    def __init__(self) -> None:
        self._next: dict[tuple[int, int], int] = {}
        self.creator: list[int] = [-1]  # of each place, the request that was there first

    def enter(self, request: int, blocks: tuple[int, ...]) -> tuple[list[int], int]:
        """Add a prompt: its places, one for each block, and how many of them had been there before."""
        places: list[int] = []
        place, known = self.ROOT, 0
        for block in blocks:
            found = self._next.get((place, block))
            if found is None:
                found = len(self.creator)
                self._next[place, block] = found
                self.creator.append(request)
            else:
                known += 1
            place = found
            places.append(place)
        return places, known


def common_beginnings(trace: PrefixTrace) -> tuple[IntArray, IntArray]:
    """With which earlier request each has the longest beginning in common.

    Returns:
        (N,) int32 row of that request (the first that began so), -1 for none; (N,) int32 tokens in common, whole blocks or a whole prompt.
    """
    tree = PrefixTree()
    partner, shared = np.full(len(trace), -1, np.int32), np.zeros(len(trace), np.int32)
    for i, blocks in enumerate(trace.blocks):
        places, known = tree.enter(i, blocks)
        if known:
            partner[i] = tree.creator[places[known - 1]]
            shared[i] = known * trace.block_tokens
    shorter = np.minimum(trace.prompt_tokens, np.where(partner >= 0, trace.prompt_tokens[partner], 0))
    return partner, np.minimum(shared, shorter).astype(np.int32)
