"""Calls and the programs they belong to, as a workload hands them to a cluster: in chunks, in order of time.

A *call* is one request to the cluster. A *program* is a tree of calls, each released so many seconds after its parent has completed,
and ends when the last of them has: a chat session is a chain whose seconds are think times, an agent program forks, and a request
that stands alone is a program of one call.

What calls have in common is said by *nodes*. A node is a sequence of tokens of which every call that names it sends the beginning, so
that two calls of one node share the shorter of their prompts, and the answer of the first is part of the second's prompt where that
is longer. A node may itself begin like another one, its parent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.errors import ConfigError
from llmsched_env.types import FloatArray, IntArray, LengthStatistics

NO_PARENT = -1


def app_parent(app: int) -> int:
    """What stands in ``CallChunk.node_parent`` for the prompt head of application ``app``."""
    return -2 - app


@dataclass(frozen=True, slots=True)
class CallChunk:
    """P programs with C calls on M nodes. Programs stand in order of their start; calls and nodes in order of their program.

    Attributes:
        start: (P,) float64 seconds, non-decreasing, from chunk to chunk as well.
        app: (P,) int32, the application of each program (0 where there are none).
        program: (C,) int32, row of the program, non-decreasing.
        parent: (C,) int32, row of the call whose completion releases this one, an earlier one; -1: the start of the program does.
        think: (C,) float64 seconds from that completion, or start, to the arrival.
        prompt_tokens, output_tokens: (C,) int32, at least 1; the prompt is the whole of it, what is shared included.
        predicted_tokens: (C,) int32 output length as predicted, 0 for none.
        node: (C,) int32, row of the node that the prompt and the answer are the beginning of.
        node_program: (M,) int32, row of the program whose node it is, non-decreasing.
        node_parent: (M,) int32: an earlier row, ``NO_PARENT``, or ``app_parent(a)``.
        node_shared: (M,) int32, tokens that it has in common with its parent, 0 where there is none.
        lasting: nodes are kept to the end, because those of later programs begin like them.

    Raises:
        ConfigError: a field that is no one-dimensional array of numbers, whole ones within int32 where they belong, with its row.
    """

    start: FloatArray
    app: IntArray
    program: IntArray
    parent: IntArray
    think: FloatArray
    prompt_tokens: IntArray
    output_tokens: IntArray
    predicted_tokens: IntArray
    node: IntArray
    node_program: IntArray
    node_parent: IntArray
    node_shared: IntArray
    lasting: bool = False

    def __post_init__(self) -> None:
        for name in _SECONDS:
            object.__setattr__(self, name, _seconds(f"calls.{name}", getattr(self, name)))
        for name in _WHOLE:
            object.__setattr__(self, name, _whole(f"calls.{name}", getattr(self, name)))
        checks.flag("calls.lasting", self.lasting)

    @classmethod
    def single(
        cls,
        arrival: npt.ArrayLike,
        prompt_tokens: npt.ArrayLike,
        output_tokens: npt.ArrayLike,
        predicted_tokens: npt.ArrayLike | None = None,
    ) -> CallChunk:
        """Requests that have nothing to do with each other: (N,) each.

        Raises:
            ConfigError: as the class.
        """
        start = np.atleast_1d(checks.numbers("calls.start", arrival))
        prompt = _whole("calls.prompt_tokens", prompt_tokens, single=True)
        output = _whole("calls.output_tokens", output_tokens, single=True)
        rows, none = np.arange(start.size, dtype=np.int32), np.zeros(start.size, dtype=np.int32)
        return cls(
            start=start,
            app=none,
            program=rows,
            parent=none - 1,
            think=np.zeros(start.size),
            prompt_tokens=prompt,
            output_tokens=output,
            predicted_tokens=none if predicted_tokens is None else _whole("calls.predicted_tokens", predicted_tokens, single=True),
            node=rows,
            node_program=rows,
            node_parent=none + NO_PARENT,
            node_shared=none,
        )

    @classmethod
    def joined(cls, chunks: Iterable[CallChunk]) -> CallChunk:
        """Several chunks as one, in their order.

        Raises:
            ConfigError: no chunk.
        """
        parts = list(chunks)
        if not parts:
            raise ConfigError("chunks: none, must be at least one")
        sizes = [(part.start.size, len(part), part.node_program.size) for part in parts]
        programs, calls, nodes = (np.cumsum([0, *column[:-1]]) for column in zip(*sizes, strict=True))
        columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in cls.__dataclass_fields__ if name != "lasting"}
        for part, p, c, n in zip(parts, programs, calls, nodes, strict=True):
            moved = {
                "program": part.program + p,
                "node_program": part.node_program + p,
                "parent": np.where(part.parent >= 0, part.parent + c, part.parent),
                "node": part.node + n,
                "node_parent": np.where(part.node_parent >= 0, part.node_parent + n, part.node_parent),
            }
            for name, values in columns.items():
                own = getattr(part, name)
                values.append(moved.get(name, own).astype(own.dtype))
        return cls(**{name: np.concatenate(values) for name, values in columns.items()}, lasting=any(part.lasting for part in parts))

    def __len__(self) -> int:
        """Calls."""
        return int(self.program.size)

    def check(self) -> None:
        """Refuse what no cluster could run.

        Raises:
            ConfigError: the field, the row and what is allowed.
        """
        calls, nodes = len(self), self.node_program.size
        sizes = {"app": self.start.size, "node_parent": nodes, "node_shared": nodes}
        sizes |= dict.fromkeys(("parent", "think", "prompt_tokens", "output_tokens", "predicted_tokens", "node"), calls)
        for name, size in sizes.items():
            if getattr(self, name).shape != (size,):
                raise ConfigError(f"calls.{name}: shape {getattr(self, name).shape}, must be ({size},)")
        rows = np.arange(calls)
        lengths = f">= 1 and <= {checks.MOST_TOKENS}"
        for name, wrong, allowed in (
            ("start", _falls(self.start) | _no_seconds(self.start), f"finite, >= 0 and in order, at most {checks.MOST_SECONDS:g} s"),
            ("app", self.app < 0, ">= 0"),
            ("program", _falls(self.program) | (self.program < 0) | (self.program >= self.start.size), "a program's row, in order"),
            ("parent", (self.parent >= rows) | (self.parent < -1), "an earlier row, or -1"),
            ("think", _no_seconds(self.think), f"finite seconds >= 0, at most {checks.MOST_SECONDS:g}"),
            ("prompt_tokens", (self.prompt_tokens < 1) | (self.prompt_tokens > checks.MOST_TOKENS), lengths),
            ("output_tokens", (self.output_tokens < 1) | (self.output_tokens > checks.MOST_TOKENS), lengths),
            (
                "predicted_tokens",
                (self.predicted_tokens < 0) | (self.predicted_tokens > checks.MOST_TOKENS),
                f">= 0 and <= {checks.MOST_TOKENS}",
            ),
            ("node", (self.node < 0) | (self.node >= nodes), f"a row of {nodes} nodes"),
            ("node_program", _falls(self.node_program) | (self.node_program < 0) | (self.node_program >= self.start.size), "as program"),
            ("node_shared", (self.node_shared < 0) | (self.node_shared > checks.MOST_TOKENS), f">= 0 and <= {checks.MOST_TOKENS}"),
            ("node_parent", self.node_parent >= np.arange(nodes), "an earlier row, -1, or an application"),
        ):
            if wrong.any():
                row = int(np.flatnonzero(wrong)[0])
                raise ConfigError(f"calls.{name}: {getattr(self, name)[row]} in row {row}, must be {allowed}")
        self._check_programs()

    def _check_programs(self) -> None:
        """Refuse rows that belong to different programs, programs without a call, and prefixes that no call has. All rows are there."""
        child, node = np.flatnonzero(self.parent >= 0), np.flatnonzero(self.node_parent >= 0)
        for name, wrong, allowed in (
            ("parent", child[self.program[self.parent[child]] != self.program[child]], "a call of the same program"),
            ("node", np.flatnonzero(~self._own(self.node_program[self.node], self.program)), "a node of the call's program"),
            (
                "node_parent",
                node[~self._own(self.node_program[self.node_parent[node]], self.node_program[node])],
                "a node of the same program",
            ),
        ):
            if wrong.size:
                raise ConfigError(f"calls.{name}: {getattr(self, name)[wrong[0]]} in row {wrong[0]}, must be {allowed}")
        empty = np.flatnonzero(np.bincount(self.program, minlength=self.start.size) == 0)
        if empty.size:
            raise ConfigError(f"calls.program: no call of program {empty[0]}, must be at least one")
        reach = np.zeros(self.node_program.size, dtype=np.int64)  # tokens of the longest call that begins like a node, and its answer
        np.maximum.at(reach, self.node, self.prompt_tokens.astype(np.int64) + self.output_tokens)
        np.maximum.at(reach, self.node_parent[node], self.node_shared[node])  # which the nodes below must reach in turn
        for row in np.flatnonzero((self.node_shared > reach) & (reach > 0))[:1]:  # 0: no call has it
            raise ConfigError(f"calls.node_shared: {self.node_shared[row]} in row {row}, must be <= {reach[row]}, the most of its calls")

    def _own(self, owner: IntArray, program: IntArray) -> npt.NDArray[np.bool_]:
        """Where a node outlives a program that names it."""
        return np.asarray((owner == program) | self.lasting)


_SECONDS = ("start", "think")
_WHOLE = (
    "app",
    "program",
    "parent",
    "prompt_tokens",
    "output_tokens",
    "predicted_tokens",
    "node",
    "node_program",
    "node_parent",
    "node_shared",
)


def _seconds(name: str, values: npt.ArrayLike) -> FloatArray:
    """(n,) float64."""
    found = checks.numbers(name, values)
    if found.ndim != 1:
        raise ConfigError(f"{name}: shape {found.shape}, must be one-dimensional")
    return found


def _whole(name: str, values: npt.ArrayLike, *, single: bool = False) -> IntArray:
    """(n,) int32; with ``single`` also of one number."""
    if isinstance(values, np.ndarray) and values.dtype == np.int32 and values.ndim == 1:  # what a source gives
        return np.ascontiguousarray(values)
    return checks.counts(name, values, low=-(2**31), high=2**31 - 1, single=single)


def _no_seconds(values: FloatArray) -> npt.NDArray[np.bool_]:
    """Where a value is no time."""
    return ~((values >= 0.0) & (values <= checks.MOST_SECONDS))


def _falls(values: npt.NDArray[np.generic]) -> npt.NDArray[np.bool_]:
    """Where a value is below the one before."""
    out = np.zeros(values.size, dtype=np.bool_)
    out[1:] = values[1:] < values[:-1]  # type: ignore[operator]
    return out


class CallSource(Protocol):
    """Where calls come from. ``llmsched_env.workload.sessions`` has the generators."""

    @property
    def app_tokens(self) -> IntArray:
        """(A,) int32 tokens of the prompt head that all programs of an application share; empty for none."""

    @property
    def statistics(self) -> LengthStatistics:
        """What an operator knows of prompts and outputs."""

    @property
    def rate(self) -> float:
        """Calls per second to expect, as far as nobody has to wait."""

    def chunks(self, seed: int, *, rate: float | None = None, num_calls: int | None = None) -> Iterator[CallChunk]:
        """The programs of an episode, chunk by chunk, equal for equal seeds.

        Args:
            rate: calls per second to expect; None for the source's own.
            num_calls: no further program begins once so many calls have been handed out, so there may be a few more; None: for ever, or
                to the end of a trace.
        """
