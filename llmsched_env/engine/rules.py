"""Policies as compiled rules: whole episodes, or decisions for many engines, without Python between two iterations.

A rule is a compiled function that reads an engine and writes a decision::

    @compiled
    def everybody(engine, policy, decision):
        for q in range(engine.settings.num_queues):
            decision.run[q] = 1
            decision.admit[q] = int(policy.parameters[0])
            decision.evict[q] = 0

==========  ====================================  =====================================================================
argument    record                                holds
==========  ====================================  =====================================================================
engine      ``llmsched_env.engine.state.Engine``  what ``View`` shows of the engine; only ``queues.left`` may be written
policy      ``Numbers``, or a record of its own   its parameters, and what it remembers within an episode
decision    ``llmsched_env.types.Decision``       to be written whole; the last decision is in it (``token_budget``: 0 unless the
                                                  rule writes it)
==========  ====================================  =====================================================================

The information boundary is that of ``View``: the record a rule gets has no output lengths, no request still to come and no
timestamps that ``View`` does not show. A rule that reads one fails when it is compiled, and as ordinary Python when it runs.
With ``known_lengths`` it has ``engine.requests.output``, where the environment reveals the lengths. Waiting requests stand
behind ``engine.queues.head[q]`` along ``engine.requests.next``, residents behind ``engine.oldest``.

The engine calls a rule by its address, so the loops below are compiled once and a policy costs no more than its own few lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, Protocol, cast

import numpy.typing as npt

from llmsched_env.backend import View
from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import next_outside
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine.state import RUNNING, Engine
from llmsched_env.engine.step import decision_at, engine_at
from llmsched_env.errors import ConfigError
from llmsched_env.fluid.wait import _ROTATION_SHIFT
from llmsched_env.pointers import call, given_address, name_of
from llmsched_env.records import Level, Numbers, Record, reader
from llmsched_env.types import Decision

SECONDS_PER_CALL = 0.1
"""Compiled code cannot be interrupted: about so often Python looks for Ctrl-C."""

RuleFunction = Callable[..., None]


# --- for rules --------------------------------------------------------------------------------------
@compiled
def kv_free(engine: Engine) -> int:
    """``View.kv_free``."""
    if engine.settings.paper != 0:
        return engine.settings.capacity - engine.kv_tokens
    return engine.settings.capacity - engine.kv_blocks


@compiled
def first_head_fits(engine: Engine, decision: Decision) -> bool:
    """Whether the first of the outside requests that the decision admits fits while all residents are held.

    A policy that freezes residents can freeze memory with them: where this is False and nothing
    else would run, no later decision of the same kind could ever run anything again.
    """
    queues, settings = engine.queues, engine.settings
    for q in range(0, settings.num_queues, settings.num_segments):
        queues.left[q] = decision.admit[q]
    q = next_outside(engine)
    if q < 0:
        return False
    tokens = queues.head_tokens[q]
    free = kv_free(engine)
    if settings.paper != 0:  # a resident outside a boundary queue is charged one token more than it holds
        return tokens <= free - (engine.num_residents - engine.num_boundary)
    if settings.reserve_full == 0:
        tokens = min(tokens, settings.max_num_batched_tokens)
    blocks = (tokens + settings.block_size - 1) // settings.block_size
    return blocks <= free and engine.num_residents < settings.most_active


@compiled
def rotated(threshold: float, iteration: int) -> int:
    """``llmsched_env.fluid.rotation_quota`` of one threshold."""
    return int(math.floor((iteration + 1) * threshold + _ROTATION_SHIFT) - math.floor(iteration * threshold + _ROTATION_SHIFT))


@compiled
def unchanged(engine: Engine, policy: Numbers, decision: Decision) -> None:
    """The rule of a policy that always decides the same."""


# --- the loops --------------------------------------------------------------------------------------
_policy_at = reader(Numbers)  # the type does not matter: rules are called with an address


@compiled
def _play(rule: int, steps: int, engine: Any, policy: Any, decision: Any) -> None:
    """Decide and step, at most ``steps`` times or to the end of the episode."""
    record, own, decided = engine_at(engine), _policy_at(policy), decision_at(decision)
    while steps > 0 and record.end == RUNNING:
        call(rule, record, own, decided)
        call(record.code.step, record, decided)
        steps -= 1


@compiled
def _repeat(steps: int, engine: Any, decision: Any) -> None:
    """``_play`` under a decision that never changes."""
    record, decided = engine_at(engine), decision_at(decision)
    while steps > 0 and record.end == RUNNING:
        call(record.code.step, record, decided)
        steps -= 1


@compiled
def _decide(rule: int, engine: Any, policy: Any, decision: Any) -> None:
    call(rule, engine_at(engine), _policy_at(policy), decision_at(decision))


class _WithHandle(Protocol):
    handle: Any


class Rule:
    """A compiled rule with its parameters, its memory and the decision it writes.

    Args:
        function: as described above.
        num_queues: Q of the policy's layout.
        parameters: (P,) numbers for ``policy.parameters``, or the policy's own record; its ``Counts`` and ``Memory`` are what
            it remembers.
        memory: length of ``policy.memory``.
        known_lengths: the policy is told output lengths.

    Raises:
        ConfigError: the function cannot be compiled, for example because it reads what the policy is not shown.
    """

    def __init__(
        self,
        function: RuleFunction,
        num_queues: int,
        parameters: npt.ArrayLike | Record = (),
        memory: int = 0,
        *,
        known_lengths: bool = False,
    ) -> None:
        self.policy: Record = parameters if isinstance(parameters, Record) else Numbers.of(parameters, memory)
        self.function, self.known_lengths = function, known_lengths
        self.decision = Decision(num_queues)
        self._constant = function is unchanged
        self._address: int | None = None

    @classmethod
    def constant(cls, decision: Decision) -> Rule:
        """Always this decision."""
        rule = cls(unchanged, len(decision))
        rule.decision.rows[:] = decision.rows
        rule.decision.token_budget = decision.token_budget
        return rule

    @property
    def is_constant(self) -> bool:
        """Whether the decision is always the same."""
        return self._constant

    @property
    def address(self) -> int:
        """Where compiled code calls the rule; compiled at the first use."""
        if self._address is None:
            level = Level.KNOWN if self.known_lengths else Level.VISIBLE
            arguments = ((Engine, level), type(self.policy), Decision)
            self._address = given_address(f"rule {name_of(self.function)}", self.function, arguments)
        return self._address

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_address": None}  # good in its own process only

    def reset(self) -> None:
        """Forget the last episode."""
        self.policy.forget()

    def decide(self, view: View) -> Decision:
        """The decision for the next iteration; the object is reused by the next call.

        Raises:
            ConfigError: the view has another number of queues.
        """
        if view.layout.num_queues != len(self.decision):
            raise ConfigError(f"policy: decides on {len(self.decision)} queues, the engine has {view.layout.num_queues}")
        if not self._constant:
            _decide(self.address, cast(_WithHandle, view).handle, self.policy.handle, self.decision.handle)
        return self.decision

    def play(self, backend: SimBackend) -> None:
        """Decide and step ``backend``, which has been reset, to the end of the episode.

        Raises:
            ConfigError: the backend has another number of queues.
            RuntimeError: the engine can make no progress.
        """
        backend.check_decision(self.decision)
        engine, decision = backend.record.handle, self.decision.handle
        steps = 100  # a rule may take long: how long shows
        while not backend.done:
            start = time.perf_counter()
            if self._constant:
                _repeat(steps, engine, decision)
            else:
                _play(self.address, steps, engine, self.policy.handle, decision)
            share = SECONDS_PER_CALL / max(time.perf_counter() - start, 1e-6)
            steps = int(min(max(steps * min(share, 10.0), 1), 10_000_000))
        backend.check_progress()


def run_constant(backend: SimBackend, decision: Decision) -> None:
    """Step ``backend``, which has been reset, with ``decision`` to the end of the episode.

    Raises:
        RuntimeError: the episode has ended already, or the engine can make no progress.
    """
    backend.check_running()
    Rule.constant(decision).play(backend)
