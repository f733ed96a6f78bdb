"""What sources of programs have in common: applications with a prompt head each, and the chunks that programs are handed out in."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.cluster.calls import CallChunk
from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray, IntArray, LengthStatistics
from llmsched_env.workload.arrival_stream import ArrivalStream
from llmsched_env.workload.arrivals import ArrivalProcess
from llmsched_env.workload.lengths import grouped_statistics

CHUNK_CALLS = 50_000
"""Calls of a chunk, more or less."""
FIRST_CALLS = 1_000
"""Calls of the first one, more or less: a short episode then draws little that it does not use."""
MOST_CALLS = 65_536
"""Calls that one program may have."""
_PROBE = (64, 4_096)
"""Fewest and most programs from which a source knows its rate and statistics."""
_PROBE_CALLS = 2**22
"""Most calls of them, where 64 programs have no more."""
_TIMES, _PROGRAMS, _SAMPLE = range(3)
"""Random streams of a seed: when programs start, what they are, and the sample from which rate and statistics are known."""


@dataclass(frozen=True, slots=True)
class Apps:
    """Applications, each of which sends a prompt head of its own before everything else.

    Attributes:
        count: how many, at least 1.
        head_tokens: tokens of every head, or (count,) of each; at least 1.
        zipf: the program is of the k-th application with a probability proportional to ``k ** -zipf``; 0: all alike.

    Raises:
        ConfigError: a value out of range.
    """

    count: int = 8
    head_tokens: int | tuple[int, ...] = 256
    zipf: float = 1.0

    def __post_init__(self) -> None:
        checks.integer("apps.count", self.count, 1, 65_536)
        checks.number("apps.zipf", self.zipf, 0.0, 10.0)
        if not isinstance(self.head_tokens, tuple | list):
            checks.integer("apps.head_tokens", self.head_tokens, 1)
            return
        heads = checks.integers("apps.head_tokens", self.head_tokens, 1)
        if len(heads) != self.count:
            raise ConfigError(f"apps.head_tokens: {len(heads)} of them, must be {self.count}, one an application")
        object.__setattr__(self, "head_tokens", heads)

    @property
    def tokens(self) -> IntArray:
        """(count,) int32 tokens of each head."""
        return np.broadcast_to(np.asarray(self.head_tokens, dtype=np.int32), (self.count,)).copy()

    @property
    def shares(self) -> FloatArray:
        """(count,) probability of each."""
        weight = np.arange(1, self.count + 1, dtype=np.float64) ** -float(self.zipf)
        return np.asarray(weight / weight.sum())

    def draw(self, rng: np.random.Generator, count: int) -> IntArray:
        """(count,) int32 applications."""
        edges = np.cumsum(self.shares)
        drawn = np.searchsorted(edges, rng.random(count) * edges[-1], side="right")
        return np.asarray(np.minimum(drawn, self.count - 1), dtype=np.int32)


def draw_apps(apps: Apps | None, rng: np.random.Generator, count: int) -> tuple[IntArray, IntArray, IntArray]:
    """Of each of ``count`` programs the application, the tokens of its head, and the parent of a node that begins with it."""
    if apps is None:
        none = np.zeros(count, np.int32)
        return none, none, none - 1
    app = apps.draw(rng, count)
    return app, apps.tokens[app], (-2 - app).astype(np.int32)  # ``app_parent`` of an array


def check_room(field: str, apps: Apps | None, max_tokens: int) -> None:
    """Refuse a limit that leaves no room for a prompt and an answer beside a head.

    Raises:
        ConfigError: the limit and what it must be.
    """
    if apps is not None and not isinstance(apps, Apps):
        raise ConfigError(f"{field}.apps: {checks.shown(apps)}, must be Apps or None")
    longest = 0 if apps is None else int(apps.tokens.max())
    if max_tokens < longest + 2:
        raise ConfigError(f"{field}.max_tokens: {max_tokens}, must be at least {longest + 2}: a head of {longest}, a prompt and an answer")


def first_programs(chunk: CallChunk, num_calls: int) -> CallChunk:
    """A chunk without the programs that would begin once ``num_calls`` calls have been handed out."""
    if len(chunk) <= num_calls:
        return chunk
    ends = np.searchsorted(chunk.program, np.arange(chunk.start.size), side="right")
    programs = int(np.searchsorted(ends, num_calls, side="left")) + 1
    calls, nodes = int(ends[programs - 1]), int(np.searchsorted(chunk.node_program, programs, side="left"))
    return replace(
        chunk,
        **{name: getattr(chunk, name)[:programs] for name in ("start", "app")},
        **{
            name: getattr(chunk, name)[:calls]
            for name in ("program", "parent", "think", "prompt_tokens", "output_tokens", "predicted_tokens", "node")
        },
        **{name: getattr(chunk, name)[:nodes] for name in ("node_program", "node_parent", "node_shared")},
    )


def check_request(seed: int, num_calls: int | None) -> int:
    """The seed of an episode.

    Raises:
        ConfigError: a seed or a number of calls out of range.
    """
    if num_calls is not None:
        checks.integer("num_calls", num_calls, 1)
    return checks.integer("seed", seed, 0, 2**63 - 1)


class ProgramSource(ABC):
    """A ``CallSource`` of random programs that start by an arrival process.

    Programs are drawn a block at a time, each block with a random stream of its own, so that the same seed gives the same programs at any
    rate, and as many calls more begin with the same calls.
    """

    apps: Apps | None
    arrivals: ArrivalProcess

    @abstractmethod
    def draw(self, rng: np.random.Generator, start: FloatArray) -> CallChunk:
        """The programs that start at (P,) seconds."""

    @property
    @abstractmethod
    def most_calls(self) -> int:
        """Calls that a program may have."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Where the numbers come from."""

    @property
    def app_tokens(self) -> IntArray:
        """(A,) int32 tokens of the prompt head of each application."""
        return np.zeros(0, np.int32) if self.apps is None else self.apps.tokens

    @functools.cached_property
    def _probe(self) -> CallChunk:
        rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(_SAMPLE,)))
        return self.draw(rng, np.zeros(min(max(_PROBE_CALLS // self.most_calls, _PROBE[0]), _PROBE[1])))

    @property
    def calls_per_program(self) -> float:
        """Calls to expect of a program: the mean of 4,096 programs, fewer if they are very large, from a seed that is always the same."""
        return len(self._probe) / self._probe.start.size

    @functools.cached_property
    def statistics(self) -> LengthStatistics:
        """Prompts and outputs of the calls of these same programs."""
        probe = self._probe
        return grouped_statistics(probe.prompt_tokens, probe.output_tokens, np.zeros(len(probe), np.int32), self.source)

    @property
    def rate(self) -> float:
        """Calls per second: programs per second times ``calls_per_program``."""
        return float(self.arrivals.rate) * self.calls_per_program

    def chunks(self, seed: int, *, rate: float | None = None, num_calls: int | None = None) -> Iterator[CallChunk]:
        """The programs of an episode, in chunks of about 1,000 calls, 4,000, and so on up to 50,000; see ``CallSource``.

        Raises:
            ConfigError: a value out of range.
        """
        root = check_request(seed, num_calls)
        if rate is not None:
            checks.number("rate", rate, unit="calls/s", open_low=True)
        process = self.arrivals if rate is None else self.arrivals.with_rate(rate / self.calls_per_program)
        return self._chunks(root, process, num_calls)

    def _chunks(self, seed: int, process: ArrivalProcess, num_calls: int | None) -> Iterator[CallChunk]:
        times = ArrivalStream(process, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_TIMES,))))
        block, left = 0, num_calls
        while left is None or left > 0:
            calls = min(FIRST_CALLS * 4**block, CHUNK_CALLS)
            start = times.take(max(1, round(calls / self.calls_per_program)))
            if not start.size:
                return
            chunk = self.draw(np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_PROGRAMS, block))), start)
            if left is not None:
                chunk = first_programs(chunk, left)
                left -= len(chunk)
            yield chunk
            block += 1


def fit_first(prompt: npt.NDArray[np.int64], output: npt.NDArray[np.int64], room: npt.NDArray[np.int64]) -> None:
    """Cut the first call of each program, in place, to ``room`` tokens: the answer to all of it but one, then the prompt to the rest."""
    np.minimum(output, room - 1, out=output)
    np.minimum(prompt, room - output, out=prompt)
