"""A recorded trace that says what prompts have in common, as calls."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmsched_env import checks
from llmsched_env.cluster.calls import CallChunk
from llmsched_env.errors import ConfigError
from llmsched_env.types import IntArray, LengthStatistics
from llmsched_env.workload.arrivals import TraceArrivals
from llmsched_env.workload.lengths import grouped_statistics
from llmsched_env.workload.prefix_trace import PrefixTrace, common_beginnings, read_prefix_trace
from llmsched_env.workload.programs import check_request


@dataclass(frozen=True, eq=False)
class RecordedCalls:
    """Every request of a trace is a program of one call, at the time that was recorded; a ``CallSource``.

    Each request is a node. Its parent is the earlier request with which its prompt has the longest beginning in common, by the numbers of
    their blocks, and what they share are these blocks. Answers have no numbers in the trace: a prompt that goes on with an earlier
    prompt and its answer shares the prompt's whole blocks with it, and the answer counts as new.

    Nodes last to the end, since any later request may begin like them. The trace is one chunk, handed out once.

    Requests of more than ``max_tokens`` are left out, as they are from the scenario ``mooncake``; they are not cut.

    Attributes:
        trace: the requests.
        max_tokens: most tokens of a prompt and its answer.
        jitter_seconds: a uniform time below it is added to each arrival, drawn from the seed, and the times are put in order; requests
            keep theirs. Mooncake stamps arrivals in steps of 3 s, so that 3 spreads each step's requests over it.

    Raises:
        ConfigError: a value out of range, or no request short enough.
    """

    trace: PrefixTrace
    max_tokens: int = 32_768
    jitter_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.trace, PrefixTrace):
            raise ConfigError(f"recorded.trace: {checks.shown(self.trace)}, must be a PrefixTrace, see RecordedCalls.read")
        checks.integer("recorded.max_tokens", self.max_tokens, 2)
        checks.number("recorded.jitter_seconds", self.jitter_seconds)
        if not len(self.kept):
            raise ConfigError(f"recorded.max_tokens: {self.max_tokens}, but every request of {self.trace.path} is longer")

    @classmethod
    def read(cls, path: str | Path, *, max_tokens: int = 32_768, jitter_seconds: float = 0.0) -> RecordedCalls:
        """The calls of a file in Mooncake's format with ``hash_ids``.

        Raises:
            ConfigError: a file that ``read_prefix_trace`` refuses, or a value out of range.
        """
        return cls(read_prefix_trace(path), max_tokens, jitter_seconds)

    @functools.cached_property
    def kept(self) -> PrefixTrace:
        """The requests of at most ``max_tokens``."""
        return self.trace.at_most(self.max_tokens)

    @functools.cached_property
    def _common(self) -> tuple[IntArray, IntArray]:
        return common_beginnings(self.kept)

    @property
    def app_tokens(self) -> IntArray:
        """There are no applications: (0,) int32. What all requests begin with is among the nodes."""
        return np.zeros(0, np.int32)

    @functools.cached_property
    def statistics(self) -> LengthStatistics:
        """Those of the requests themselves, a perfect forecast of the distribution."""
        kept = self.kept
        return grouped_statistics(kept.prompt_tokens, kept.output_tokens, np.zeros(len(kept), np.int32), kept.path)

    @functools.cached_property
    def _arrivals(self) -> TraceArrivals:
        return TraceArrivals(self.kept.arrival)

    @property
    def rate(self) -> float:
        """Requests per second of those that are kept."""
        return float(self._arrivals.rate)

    def chunks(self, seed: int, *, rate: float | None = None, num_calls: int | None = None) -> Iterator[CallChunk]:
        """The requests in one chunk; see ``CallSource``. The seed matters to the jitter alone.

        Raises:
            ConfigError: a value out of range.
        """
        root = check_request(seed, num_calls)
        times = self.kept.arrival
        if self.jitter_seconds > 0:
            times = np.sort(times + np.random.default_rng(root).uniform(0.0, self.jitter_seconds, times.size))
        if rate is not None:
            checks.number("rate", rate, unit="calls/s", open_low=True)
            times = TraceArrivals(times).with_rate(rate).times
        count = len(self.kept) if num_calls is None else min(num_calls, len(self.kept))
        kept, (partner, shared) = self.kept, self._common
        rows = np.arange(count, dtype=np.int32)
        chunk = CallChunk(
            start=np.ascontiguousarray(times[:count]),
            app=np.zeros(count, np.int32),
            program=rows,
            parent=np.full(count, -1, np.int32),
            think=np.zeros(count),
            prompt_tokens=kept.prompt_tokens[:count],
            output_tokens=kept.output_tokens[:count],
            predicted_tokens=np.zeros(count, np.int32),
            node=rows,
            node_program=rows,
            node_parent=partner[:count],
            node_shared=shared[:count],
            lasting=True,
        )
        return iter((chunk,))
