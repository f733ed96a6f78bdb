"""One episode: a policy decides, a backend executes, until the episode ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llmsched_env.backend import Backend, Counters, View
from llmsched_env.backends import make_backend
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.metrics import Summary, summarize
from llmsched_env.types import Decision, IterationReport, QueueLayout, RequestLog, Workload


class Policy(Protocol):
    """What decides. The policies in ``baselines`` and the learned agents have this form.

    Attributes:
        name: as it stands in tables.
        layout: the queues the policy decides on.
        engine: the engine it runs on; a policy may set the options that define it (a token budget).
        known_lengths: the policy is told output lengths, which a server does not know.
        notes: what a reader of its figures must know (e.g. an overload mode); empty if nothing.
    """

    @property
    def name(self) -> str: ...
    @property
    def layout(self) -> QueueLayout: ...
    @property
    def engine(self) -> EngineConfig: ...
    @property
    def known_lengths(self) -> bool: ...
    @property
    def notes(self) -> str: ...
    def reset(self) -> None:
        """Forget the last episode."""

    def decide(self, view: View) -> Decision:
        """The decision for the next iteration, from the view alone."""


def rule_of(policy: Policy) -> Rule | None:
    """The policy as compiled code: its attribute ``constant`` or ``rule``, where it has one."""
    constant: Decision | None = getattr(policy, "constant", None)
    rule: Rule | None = getattr(policy, "rule", None)
    return rule if constant is None else Rule.constant(constant)


OnStep = Callable[[IterationReport, View], None]


@dataclass(frozen=True, slots=True)
class EpisodeResult:
    """Outcome of one episode; ``wall_seconds`` is the time that deciding and stepping took."""

    log: RequestLog
    counters: Counters
    summary: Summary
    wall_seconds: float


def run_episode(
    policy: Policy,
    workload: Workload,
    *,
    limits: EpisodeLimits | None = None,
    backend: Backend | None = None,
    on_step: OnStep | None = None,
) -> EpisodeResult:
    """Run one episode to its end.

    Args:
        limits: default ``EpisodeLimits()``: drain until every request has completed.
        backend: default a new simulator; one that is given is reset and left open.
        on_step: called after every step with its report and the view; without it no report is built.

    Raises:
        ConfigError: a request that ``policy.engine`` could never serve.
    """
    engine = backend if backend is not None else make_backend("sim")
    policy.reset()
    view = engine.reset(
        workload,
        policy.layout,
        policy.engine,
        limits if limits is not None else EpisodeLimits(),
        reveal_output_length=policy.known_lengths,
    )
    start = time.perf_counter()
    if on_step is not None:
        while not engine.done:
            on_step(engine.step(policy.decide(view)), view)
    else:
        rule = rule_of(policy)
        if rule is not None and type(engine) is SimBackend:
            rule.play(engine)
        while not engine.done:
            engine.advance(policy.decide(view))
    wall_seconds = time.perf_counter() - start
    log = engine.log()
    counters = engine.counters()
    summary = summarize(log, counters, kv_capacity=policy.engine.kv_capacity)
    if backend is None:
        engine.close()
    return EpisodeResult(log, counters, summary, wall_seconds)
