"""Statistics of the sessions in a recorded trace: how ``mooncake-sessions.json`` in ``llmsched_env/workload/statistics`` is made.

The trace names no sessions; they are found by what prompts have in common. A request is the *next turn* of an earlier one if its prompt
begins with all full blocks of that one's, at least two (the first block of Mooncake's trace is the same in every request), and is longer
than that one's prompt and answer together; of several the one with most blocks, then the latest. What a prompt of fewer than two full
blocks goes on with cannot be told, so no session begins with one here.

    llmsched build-statistics conversation_trace.jsonl --sessions --name mooncake-sessions --out OUT.json

The same trace gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.errors import ConfigError
from llmsched_env.types import IntArray
from llmsched_env.workload.build_statistics import SOURCES, Source
from llmsched_env.workload.prefix_trace import PrefixTrace, PrefixTree

SESSION_SOURCES = {"mooncake-sessions": SOURCES["mooncake"]}
"""By the names of the statistics that ship."""
LEVELS = np.concatenate([np.linspace(0.0, 0.99, 100), [0.992, 0.994, 0.996, 0.998, 0.999, 1.0]])
"""Denser at the top: the tails are long."""
FULL_BLOCKS = 2
"""Full blocks that a turn must have in common with the one before it."""
FEWEST = 100
"""Turns from which statistics are made."""


@dataclass(frozen=True, slots=True)
class Turns:
    """What was found of N requests.

    Attributes:
        before: (N,) int32 row of the turn before, -1 for none.
        edited: (N,) bool, begins like an earlier one but is not longer than its prompt and answer: the history was changed, or the
            request repeated. It is no first turn, and what goes on with it is counted as a turn but in no session.
        begins: (N,) bool, a first turn of at least two full blocks.
        number: (N,) int32, the turn's number in its session, from 1.
        head: (N,) int32, the session's first request.
    """

    before: IntArray
    edited: npt.NDArray[np.bool_]
    begins: npt.NDArray[np.bool_]
    number: IntArray
    head: IntArray


def find_turns(trace: PrefixTrace) -> Turns:
    """The turns of a trace by the rule above."""
    count, size = len(trace), trace.block_tokens
    tree, latest = PrefixTree(), dict[int, int]()  # of each place, the latest request whose full blocks end there
    before, number, head = np.full(count, -1, np.int32), np.ones(count, np.int32), np.arange(count, dtype=np.int32)
    prompt, output = trace.prompt_tokens.tolist(), trace.output_tokens.tolist()
    edited = np.zeros(count, np.bool_)
    for i, blocks in enumerate(trace.blocks):
        places, _ = tree.enter(i, blocks)
        full = prompt[i] // size
        found = next((latest[place] for place in reversed(places[FULL_BLOCKS - 1 : full]) if place in latest), -1)
        if found >= 0 and prompt[i] > prompt[found] + output[found]:
            before[i], number[i], head[i] = found, number[found] + 1, head[found]
        elif found >= 0:
            edited[i] = True
        if full >= FULL_BLOCKS:
            latest[places[full - 1]] = i
    return Turns(before, edited, (before < 0) & ~edited & (trace.prompt_tokens >= FULL_BLOCKS * size), number, head)


def build_sessions(trace: PrefixTrace, name: str, source: Source) -> dict[str, Any]:
    """The JSON record.

    Raises:
        ConfigError: fewer than 100 turns that follow another.
    """
    turns = find_turns(trace)
    later = np.flatnonzero(turns.before >= 0)
    if later.size < FEWEST:
        raise ConfigError(f"{trace.path}: {later.size} requests go on with an earlier one, must be at least {FEWEST}")
    earlier = turns.before[later]
    new = trace.prompt_tokens[later] - trace.prompt_tokens[earlier] - trace.output_tokens[earlier]
    gaps = trace.arrival[later] - trace.arrival[earlier]
    first = np.flatnonzero(turns.begins)
    # The trace ends: the sessions of its first half are seen for as long as the second half lasts.
    half = first[trace.arrival[first] <= trace.arrival[-1] / 2]
    lengths = np.zeros(len(trace), np.int64)
    np.maximum.at(lengths, turns.head, turns.number)
    counts = np.bincount(lengths[half])[1:]
    return {
        "name": name,
        "form": "sessions",
        "provenance": {
            "source": source.source,
            "licence": source.licence,
            "script": "scripts/build_statistics.py --sessions",
            "turns": "next turn: begins with all full blocks (two at least) of an earlier prompt, longer than that prompt and its answer; "
            "the one with most blocks, the latest of equals",
            "turns_per_session": "sessions that begin in the first half of the trace with a prompt of two full blocks at least; "
            "a session that was under way when the trace began counts as one that begins there; "
            "a prompt that repeats an earlier one, or goes on with a changed history, begins none",
            "seconds": "between the arrivals of consecutive turns; the trace has no completions, so the service of the former turn is in "
            "it; arrivals are stamped in steps of 3 s",
            "first_prompt": "tokens beyond the block that all prompts begin with, of first turns of two full blocks at least",
            "new_tokens": "prompt less the prompt and the answer of the turn before",
            "rows": len(trace),
            "later_turns": int(later.size),
            "first_turns": int(first.size),
            "edited_or_repeated": int(turns.edited.sum()),
            "prompts_below_two_blocks": int((trace.prompt_tokens < FULL_BLOCKS * trace.block_tokens).sum()),
            "sessions_counted": int(half.size),
        },
        "shared_head": {
            "block_tokens": trace.block_tokens,
            # Of requests of at least k blocks, the share that begins with the commonest k of them.
            "share_by_blocks": [_commonest(trace, k) for k in (1, 2, 3, 4)],
        },
        "means": {
            "turns": round(float(lengths[half].mean()), 4),
            "seconds": round(float(gaps.mean()), 2),
            "first_prompt": round(float(trace.prompt_tokens[first].mean()) - trace.block_tokens, 2),
            "new_tokens": round(float(new.mean()), 2),
            "output_tokens": round(float(trace.output_tokens.mean()), 2),
        },
        "turn_shares": [round(float(share), 6) for share in counts / counts.sum()],
        "levels": [round(float(level), 4) for level in LEVELS],
        "quantiles": {
            "seconds": _quantiles(gaps),
            "first_prompt": _quantiles(trace.prompt_tokens[first] - trace.block_tokens),
            "new_tokens": _quantiles(new),
            "output_tokens": _quantiles(trace.output_tokens),
        },
    }


def _commonest(trace: PrefixTrace, blocks: int) -> float:
    begin = [ids[:blocks] for ids in trace.blocks if len(ids) >= blocks]
    if not begin:
        return 0.0
    counts: dict[tuple[int, ...], int] = {}
    for one in begin:
        counts[one] = counts.get(one, 0) + 1
    return round(max(counts.values()) / len(begin), 4)


def _quantiles(values: npt.ArrayLike) -> list[float]:
    """Hazen's quantiles, which keep the mean under linear interpolation."""
    return [round(float(v), 2) for v in np.quantile(np.asarray(values, dtype=np.float64), LEVELS, method="hazen")]
