"""What a user's own rule is refused: hidden fields, lengths it is not told, writing to the engine. Compiled and as plain Python."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from llmsched_env import ConfigError, EngineConfig, EpisodeLimits, QueueLayout, Workload
from llmsched_env.compiled import compiled
from llmsched_env.engine import state as st
from llmsched_env.engine.residents import computed, generated
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine.step import engine_at
from llmsched_env.records import Level
from llmsched_env.types import ADMIT_ALL, Decision

ROOT = Path(__file__).resolve().parents[1]
SMALL = EngineConfig.vllm(num_blocks=30, block_size=4, max_num_batched_tokens=32, max_num_seqs=6, max_model_len=60)
PAPER = EngineConfig.paper(150, 0.05, 1e-3)
LAYOUT = QueueLayout(by="prompt", edges=(10,), segment_ends=(4,))


def workload(seed: int = 0, n: int = 30) -> Workload:
    rng = np.random.default_rng(seed)
    return Workload.of(np.cumsum(rng.exponential(0.05, n)), rng.integers(1, 30, n), rng.integers(1, 25, n))


def started(rule: Rule | None = None, config: EngineConfig = SMALL, reveal: bool | None = None) -> tuple[SimBackend, Any]:
    backend = SimBackend()
    known = rule is not None and rule.known_lengths if reveal is None else reveal
    return backend, backend.reset(workload(), LAYOUT, config, EpisodeLimits(), reveal_output_length=known)


# --- reading ------------------------------------------------------------------------------------------
@compiled
def reads_hidden_output(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = engine.hidden.output[0]


@compiled
def reads_hidden_arrival(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = engine.hidden.arrival[5] > 1.0


@compiled
def reads_output(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = engine.requests.output[0]


@compiled
def reads_next_arrival(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = engine.next_arrival


@compiled
def reads_num_requests(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = engine.num_requests


@compiled
def reads_wheel(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = engine.wheel.first[0]


@compiled
def reads_phases(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = engine.phases.count[0]


@compiled
def reads_due(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = engine.events.due[0]


@compiled
def reads_pool(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = engine.pool.hit_tokens


@compiled
def _longest(engine):  # type: ignore[no-untyped-def]
    return engine.requests.output[engine.oldest]


@compiled
def reads_output_through_a_helper(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = _longest(engine)


@compiled
def reads_behind_a_condition(engine, policy, decision):  # type: ignore[no-untyped-def]
    decision.run[0] = 1
    if engine.clock >= 0.0:
        decision.run[0] = engine.hidden.output[0]


HIDDEN = [
    reads_hidden_output,
    reads_hidden_arrival,
    reads_output,
    reads_next_arrival,
    reads_num_requests,
    reads_wheel,
    reads_phases,
    reads_due,
    reads_pool,
    reads_output_through_a_helper,
    reads_behind_a_condition,
]
OF_LENGTHS = [reads_output, reads_output_through_a_helper]


def refused(rule: Rule, match: str) -> None:
    """When it is compiled; plain Python has nothing to compile and fails in the first decision."""
    backend, view = started(rule)
    before = backend.record._memory.tobytes()
    with pytest.raises(AttributeError if numba.config.DISABLE_JIT else ConfigError, match=match):
        rule.decide(view)
    with pytest.raises(AttributeError if numba.config.DISABLE_JIT else ConfigError, match=match):
        rule.play(backend)
    assert backend.record._memory.tobytes() == before


@pytest.mark.parametrize("function", HIDDEN, ids=lambda f: f.__name__)
def test_a_rule_that_reads_what_is_hidden_is_refused(function: Callable[..., Any]) -> None:
    refused(Rule(function, LAYOUT.num_queues), "not shown to a policy")


@pytest.mark.parametrize("function", [f for f in HIDDEN if f not in OF_LENGTHS], ids=lambda f: f.__name__)
def test_known_lengths_open_the_lengths_alone(function: Callable[..., Any]) -> None:
    refused(Rule(function, LAYOUT.num_queues, known_lengths=True), "not shown to a policy")


def test_the_refusal_says_what_would_open_it() -> None:
    refused(Rule(reads_output, LAYOUT.num_queues), "output: not shown to a policy unless it declares known_lengths")


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="plain Python has no compiler")
def test_the_refusal_names_rule_and_field() -> None:
    with pytest.raises(ConfigError, match=r"(?s)rule 'reads_hidden_output' cannot be compiled.*Engine\.hidden: not shown to a policy"):
        _ = Rule(reads_hidden_output, LAYOUT.num_queues).address
    with pytest.raises(ConfigError, match="must be a function decorated with"):
        _ = Rule(lambda engine, policy, decision: None, 1).address


@compiled
def shortest_known(engine, policy, decision):  # type: ignore[no-untyped-def]
    """Remembers the sum of the output lengths of all residents and heads."""
    total = 0
    r = engine.oldest
    while r >= 0:
        total += engine.requests.output[r]
        r = engine.requests.next[r]
    for q in range(engine.settings.num_queues):
        if engine.queues.head[q] >= 0:
            total += engine.requests.output[engine.queues.head[q]]
        decision.run[q] = 1
        decision.admit[q] = ADMIT_ALL
        decision.evict[q] = 0
    policy.memory[0] = total


def test_with_known_lengths_a_rule_reads_them() -> None:
    rule = Rule(shortest_known, LAYOUT.num_queues, memory=1, known_lengths=True)
    backend, view = started(rule)
    seen = 0
    while not backend.done:
        decision = rule.decide(view)
        lengths = workload().output_tokens
        heads = [view.waiting_requests(j, 1).id for j in range(LAYOUT.num_classes)]
        expected = int(lengths[view.resident_requests().id].sum() + sum(lengths[ids].sum() for ids in heads))
        assert rule.policy.memory[0] == expected
        seen += expected > 0
        backend.advance(decision)
    assert seen > 20


def test_where_lengths_are_not_revealed_even_a_rule_that_knows_them_reads_zeros() -> None:
    rule = Rule(shortest_known, LAYOUT.num_queues, memory=1, known_lengths=True)
    backend, view = started(rule, reveal=False)
    while not backend.done:
        backend.advance(rule.decide(view))
        assert rule.policy.memory[0] == 0
        assert not backend.record.requests.output.any()


# --- writing ------------------------------------------------------------------------------------------
@compiled
def writes_clock(engine, policy, decision):  # type: ignore[no-untyped-def]
    engine.clock = 0.0


@compiled
def writes_status(engine, policy, decision):  # type: ignore[no-untyped-def]
    engine.requests.status[0] = 7


@compiled
def writes_report(engine, policy, decision):  # type: ignore[no-untyped-def]
    engine.report.completed_tokens = 1000


@compiled
def writes_settings(engine, policy, decision):  # type: ignore[no-untyped-def]
    engine.settings.capacity = 10**6


@compiled
def writes_code(engine, policy, decision):  # type: ignore[no-untyped-def]
    engine.code.seconds = 0


@compiled
def writes_queues(engine, policy, decision):  # type: ignore[no-untyped-def]
    engine.queues.residents[0] = 0


@compiled
def writes_events(engine, policy, decision):  # type: ignore[no-untyped-def]
    engine.events.finished[0] = 0


@compiled
def writes_time_model(engine, policy, decision):  # type: ignore[no-untyped-def]
    engine.batch.model[0] = 0.0


@compiled
def writes_batch(engine, policy, decision):  # type: ignore[no-untyped-def]
    engine.batch.load = 0.0


WRITING = [
    writes_clock,
    writes_status,
    writes_report,
    writes_settings,
    writes_code,
    writes_queues,
    writes_events,
    writes_time_model,
    writes_batch,
]


@pytest.mark.parametrize("known_lengths", [False, True])
@pytest.mark.parametrize("function", WRITING, ids=lambda f: f.__name__)
def test_a_rule_cannot_write_to_the_engine(function: Callable[..., Any], known_lengths: bool) -> None:
    rule = Rule(function, LAYOUT.num_queues, known_lengths=known_lengths)
    backend, view = started(rule)
    record = backend.record
    tables = [record.requests, record.hidden, record.queues, record.events, record.phases, record.wheel]

    def everything() -> bytes:
        return b"".join(x.tobytes() for x in (record._memory, record.batch.model, *(t.rows for t in tables)))

    before = everything()
    with pytest.raises((AttributeError, ValueError) if numba.config.DISABLE_JIT else ConfigError):
        rule.decide(view)
    assert everything() == before


@compiled
def uses_scratch(engine, policy, decision):  # type: ignore[no-untyped-def]
    for q in range(engine.settings.num_queues):
        engine.queues.left[q] = 12345
        decision.run[q] = 1
        decision.admit[q] = ADMIT_ALL
        decision.evict[q] = 0


@pytest.mark.parametrize("config", [SMALL, PAPER], ids=lambda c: c.preset)
def test_scratch_may_be_written_and_changes_nothing(config: EngineConfig) -> None:
    rule = Rule(uses_scratch, LAYOUT.num_queues)
    backend, _ = started(config=config)
    rule.play(backend)
    plain, _ = started(config=config)
    while not plain.done:
        plain.advance(Decision.greedy(LAYOUT.num_queues))
    assert backend.counters() == plain.counters()
    assert backend.log().completed.tobytes() == plain.log().completed.tobytes()


# --- requests to come ---------------------------------------------------------------------------------
@compiled
def adds_up_requests_to_come(engine, policy, decision):  # type: ignore[no-untyped-def]
    """Remembers what it finds in rows whose request has not arrived; the number of rows is its parameter."""
    requests = engine.requests
    found = 0
    for r in range(int(policy.parameters[0])):
        if requests.status[r] == st.FUTURE:
            found += requests.prompt[r] + requests.target[r] + requests.tokens[r] + requests.sequence[r] + requests.key[r]
            found += requests.queue[r] + requests.outside[r] + generated(engine, r) + computed(engine, r)
    policy.memory[0] = found
    for q in range(engine.settings.num_queues):
        decision.run[q] = 1
        decision.admit[q] = ADMIT_ALL
        decision.evict[q] = 0


@pytest.mark.parametrize("reveal", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        SMALL.replace(enable_prefix_caching=True),
        SMALL.replace(async_scheduling=True),
        SMALL.replace(scheduling_policy="priority"),
        PAPER,
    ],
    ids=["vllm", "caching", "async", "priority", "paper"],
)
def test_requests_that_have_not_arrived_read_as_zeros(config: EngineConfig, reveal: bool) -> None:
    """In the first episode, and in later ones of the same size, whose tables are used again."""
    n = 30
    rule = Rule(adds_up_requests_to_come, LAYOUT.num_queues, [n], memory=1, known_lengths=reveal)
    backend = SimBackend()
    for seed in (0, 0, 1):
        view = backend.reset(workload(seed), LAYOUT, config, EpisodeLimits(), reveal_output_length=reveal)
        future_steps = 0
        while not backend.done:
            requests = backend.record.requests
            future = requests.status == st.FUTURE
            future_steps += future.any()
            assert not requests.prompt[future].any() and not requests.output[future].any()
            alike = {name: set(requests.rows[name][future].tolist()) for name in requests.rows.dtype.names}
            # one value for all of them tells nothing of any
            assert all(len(values) <= 1 for values in alike.values()), alike
            decision = rule.decide(view)
            assert rule.policy.memory[0] == 0
            backend.advance(decision)
        assert future_steps > 10


def test_all_of_this_holds_in_plain_python_too() -> None:
    if numba.config.DISABLE_JIT:
        return
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not plain_python", __file__]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- what a rule may not do, and what becomes of its errors ------------------------------------------------
@compiled
def _raises(engine: Any, policy: Any, decision: Any) -> None:
    decision.run[0] = 1
    decision.admit[0] = 5
    decision.evict[0] = 0
    if engine.clock > 0.05:
        raise ValueError("a rule's own error")


@compiled
def _divides(engine: Any, policy: Any, decision: Any) -> None:
    decision.run[0] = 1
    decision.admit[0] = 1 // engine.num_waiting
    decision.evict[0] = 0


@compiled
def _asks_for_everything(engine: Any, policy: Any, decision: Any) -> None:
    decision.run[0] = 1
    decision.admit[0] = 2**62
    decision.evict[0] = 0


@compiled
def _takes_the_whole_engine(engine: Any, policy: Any, decision: Any) -> None:
    decision.run[0] = engine_at(engine).hidden.output[0]


def _five_requests() -> SimBackend:
    backend = SimBackend()
    workload = Workload.of(np.arange(5) * 0.01, [10] * 5, [20] * 5)
    backend.reset(workload, QueueLayout(), EngineConfig.vllm(), EpisodeLimits())
    return backend


@pytest.mark.parametrize(("rule", "error"), [(_raises, ValueError), (_divides, ZeroDivisionError)])
def test_what_a_rule_raises_ends_the_episode(rule: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        Rule(rule, 1).play(_five_requests())
    backend = _five_requests()
    with pytest.raises(error):
        while not backend.done:
            backend.advance(Rule(rule, 1).decide(backend.snapshot()))


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="numpy refuses such a number itself")
def test_more_than_a_count_can_hold_is_the_largest_count() -> None:
    one, other = _five_requests(), _five_requests()
    Rule(_asks_for_everything, 1).play(one)
    Rule.constant(Decision.greedy(1)).play(other)
    assert one.counters() == other.counters()


def test_a_rule_cannot_raise_its_own_level() -> None:
    with pytest.raises((ConfigError, AttributeError)):
        Rule(_takes_the_whole_engine, 1).play(_five_requests())
    shown = _five_requests().record.at_level(Level.VISIBLE)
    with pytest.raises(AttributeError, match="not shown"):
        shown.at_level(Level.HIDDEN)


def test_a_python_policy_finds_the_record_at_its_own_level() -> None:
    backend, view = started(reveal=False)
    for _ in range(5):
        backend.step(Decision.greedy(LAYOUT.num_queues))
    for read in (lambda: view.record.hidden, lambda: view.record.next_arrival, lambda: view.record.requests.output):
        with pytest.raises(AttributeError, match="not shown"):
            read()
    assert view.record.clock == view.clock > 0 and view.record.requests.prompt[0] > 0
    _, view = started(reveal=True)
    assert len(view.record.requests.output) == len(view.record.requests)
    with pytest.raises(AttributeError, match="not shown"):
        view.record.hidden  # noqa: B018
