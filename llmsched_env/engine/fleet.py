"""Policies as compiled rules: whole episodes, or decisions for many engines, without Python between two iterations.

A rule is a compiled function that reads one engine's arrays (``llmsched_env.engine.state`` names their
rows) and writes a decision::

    rule(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision)

==========  =======  ==========  ================================================================
argument    dtype    shape       holds
==========  =======  ==========  ================================================================
parameters  float64  (P,)        numbers of the policy that never change (maybe with more behind them)
memory      int64    (M,)        what it remembers within an episode; zeros at the start
decision    int32    (3, Q)      rows run, admit, evict: all to be written, the last decision is in it
others                           the engine's, only to be read; row ``Q_LEFT`` of ``queues`` is free
                                 for scratch between two steps
==========  =======  ==========  ================================================================

The information boundary is that of ``View``: a rule reads output lengths (``R_OUTPUT``, ``S_OUTPUT``,
``S_STOP``) only if its policy declares ``known_lengths``, and no request before it has arrived: it finds
waiting ones from ``Q_HEAD`` along ``R_NEXT``. Timestamps are not among the arguments.

The loops below take the rule as a function pointer, so they are compiled once and a policy costs no more
than its own few lines. A rule may call compiled functions of its own file and of this package: the
cache would not notice a change in any other file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from numba import types

from llmsched_env.backend import View
from llmsched_env.compiled import compiled, inlined
from llmsched_env.engine.backend import SimBackend
from llmsched_env.engine.kernel import step
from llmsched_env.engine.moves import next_outside
from llmsched_env.engine.state import (
    C_BLOCK_SIZE,
    C_BUDGET,
    C_CAPACITY,
    C_MAX_SEQS,
    C_PRESET,
    C_RESERVE_FULL,
    C_SEGMENTS,
    END_NOT,
    I_BOUNDARY,
    I_DONE,
    I_KV_BLOCKS,
    I_KV_TOKENS,
    I_RESIDENTS,
    PRESET_PAPER,
    Q_HEAD_TOKENS,
    Q_LEFT,
)
from llmsched_env.fluid.wait import _ROTATION_SHIFT
from llmsched_env.types import Decision, FloatArray, IntArray

STEPS_PER_CALL = 100_000
"""Compiled code cannot be interrupted: every so many steps (a fraction of a second) Python looks for Ctrl-C."""

Arrays = tuple[npt.NDArray[np.int64], IntArray, IntArray, IntArray, FloatArray, npt.NDArray[np.int64], FloatArray]
RuleFunction = Callable[..., None]

_INT64, _FLOAT64, _INT32_ROWS, _FLOAT64_ROWS = types.int64[::1], types.float64[::1], types.int32[:, ::1], types.float64[:, ::1]
_ENGINE = (_INT64, _INT32_ROWS, _INT32_ROWS, _INT32_ROWS, _FLOAT64_ROWS, _INT64, _FLOAT64)
_RULE = types.void(_FLOAT64, _INT64, *_ENGINE, _INT32_ROWS)
_PLAY = types.void(
    types.FunctionType(_RULE), types.int64, _FLOAT64, _INT64, _INT32_ROWS, _FLOAT64, _INT64, types.int32[::1], _INT32_ROWS,
    _FLOAT64_ROWS, _INT32_ROWS, _INT32_ROWS, _FLOAT64_ROWS, _INT64, _FLOAT64, _FLOAT64, _INT32_ROWS, _INT32_ROWS,
)  # fmt: skip
_DECIDE_ALL = types.void(
    types.FunctionType(_RULE), _FLOAT64_ROWS, types.int64[:, ::1], types.int64[:, ::1], types.int32[:, :, ::1], types.int32[:, :, ::1],
    types.int32[:, :, ::1], types.float64[:, :, ::1], types.int64[:, ::1], types.float64[:, ::1], types.int32[:, :, ::1],
)  # fmt: skip


# --- for rules --------------------------------------------------------------------------------------
@inlined
def kv_free(settings, scalars):  # type: ignore[no-untyped-def]
    """``View.kv_free``."""
    return settings[C_CAPACITY] - scalars[I_KV_TOKENS if settings[C_PRESET] == PRESET_PAPER else I_KV_BLOCKS]


@compiled
def first_head_fits(settings, requests, queues, scalars, admit):  # type: ignore[no-untyped-def]
    """Whether the first of the outside requests that ``admit`` asks for fits while all residents are held.

    A policy that freezes residents can freeze memory with them: where this is False and nothing
    else would run, no later decision of the same kind could ever run anything again.
    """
    for q in range(0, queues.shape[1], settings[C_SEGMENTS]):
        queues[Q_LEFT, q] = admit[q]
    q = next_outside(settings, requests, queues)
    if q < 0:
        return False
    tokens = queues[Q_HEAD_TOKENS, q]
    free = kv_free(settings, scalars)
    if settings[C_PRESET] == PRESET_PAPER:  # a resident outside a boundary queue is charged one token more than it holds
        return tokens <= free - (scalars[I_RESIDENTS] - scalars[I_BOUNDARY])
    if settings[C_RESERVE_FULL] == 0:
        tokens = min(tokens, settings[C_BUDGET])
    blocks = (tokens + settings[C_BLOCK_SIZE] - 1) // settings[C_BLOCK_SIZE]
    return blocks <= free and scalars[I_RESIDENTS] < settings[C_MAX_SEQS]


@inlined
def rotated(threshold, iteration):  # type: ignore[no-untyped-def]
    """``llmsched_env.fluid.rotation_quota`` of one threshold."""
    return int(math.floor((iteration + 1) * threshold + _ROTATION_SHIFT) - math.floor(iteration * threshold + _ROTATION_SHIFT))


@compiled
def unchanged(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision):  # type: ignore[no-untyped-def]
    """The rule of a policy that always decides the same."""


# --- the loops --------------------------------------------------------------------------------------
@compiled
def _play(  # type: ignore[no-untyped-def]
    rule, steps, parameters, memory, decision, model, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks,
    batch, events, trace,
):  # fmt: skip
    """Decide and step, at most ``steps`` times or to the end of the episode."""
    while steps > 0 and scalars[I_DONE] == END_NOT:
        rule(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision)
        step(decision, model, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batch, events, trace)
        steps -= 1


@compiled
def _decide_all(rule, parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decisions):  # type: ignore[no-untyped-def]
    """The rule's decision for every engine whose episode runs. Leading axis: engine."""
    for e in range(decisions.shape[0]):
        if scalars[e, I_DONE] == END_NOT:
            rule(
                parameters[e], memory[e], settings[e], requests[e], slots[e], queues[e], queue_f[e], scalars[e], clocks[e], decisions[e]
            )  # fmt: skip


def _ready(function: Any, signature: Any) -> Any:
    """Compiled for this signature alone, at the first use: a function pointer has one type."""
    if hasattr(function, "compile") and not function.signatures:  # not under NUMBA_DISABLE_JIT=1
        function.compile(signature)
        function.disable_compile()
    return function


class _WithArrays(Protocol):
    arrays: Arrays


class Rule:
    """A compiled rule with its parameters, its memory and the decision it writes.

    Args:
        function: as described above.
        num_queues: Q of the policy's layout.
        parameters: (P,) float64.
        memory: M.
    """

    __slots__ = ("decision", "function", "memory", "parameters")

    def __init__(self, function: RuleFunction, num_queues: int, parameters: npt.ArrayLike = (), memory: int = 0) -> None:
        self.function: RuleFunction = _ready(function, _RULE)
        self.parameters: FloatArray = np.array(parameters, dtype=np.float64).reshape(-1)
        self.memory = np.zeros(memory, dtype=np.int64)
        self.decision = Decision(num_queues)

    @classmethod
    def constant(cls, decision: Decision) -> Rule:
        """Always this decision."""
        rule = cls(unchanged, decision.array.shape[1])
        rule.decision.array[:] = decision.array
        return rule

    def reset(self) -> None:
        self.memory[:] = 0

    def decide(self, view: View) -> Decision:
        """The decision for the next iteration; the object is reused by the next call."""
        self.function(self.parameters, self.memory, *cast(_WithArrays, view).arrays, self.decision.array)
        return self.decision

    def play(self, backend: SimBackend) -> None:
        """Decide and step ``backend``, which has been reset, to the end of the episode.

        Raises:
            RuntimeError: the engine can make no progress.
        """
        play = _ready(_play, _PLAY)
        while not backend.done:
            play(
                self.function, STEPS_PER_CALL, self.parameters, self.memory, self.decision.array, backend.model, backend.settings,
                backend.ends, backend.requests, backend.times, backend.slots, backend.queues, backend.queue_f, backend.scalars,
                backend.clocks, backend.batch, backend.events, backend.trace,
            )  # fmt: skip
        backend.check_progress()


def decide_all(
    rule: RuleFunction,
    parameters: FloatArray,
    memory: npt.NDArray[np.int64],
    arrays: tuple[npt.NDArray[Any], ...],
    decisions: IntArray,
) -> None:
    """One rule's decisions for many engines.

    Args:
        parameters: (E, P) float64.
        memory: (E, M) int64, zeros where an episode begins.
        arrays: ``Arrays``, each with a leading axis E.
        decisions: (E, 3, Q) int32, written for every engine whose episode runs.
    """
    _ready(_decide_all, _DECIDE_ALL)(_ready(rule, _RULE), parameters, memory, *arrays, decisions)
