"""The reference simulator itself: the exact traces T1-T3 and the FCFS cascade (arXiv 2504.11320, linear model)."""

from __future__ import annotations

import math

import pytest
from paper_cases import (
    CASCADE_ARRIVALS,
    CASCADE_ARRIVALS_EVICTIONS,
    CASCADE_BACKLOG,
    CASCADE_CAPACITY,
    TRACES,
    Trace,
)
from reference_paper import FCFS, Choice, NestedWait, Outcome, Policy, Request, System, Wait, poisson, simulate


def policy_of(trace: Trace) -> Policy:
    return Wait(trace.thresholds) if trace.policy == "wait" else NestedWait(trace.thresholds, trace.ends, trace.policy)


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: t.name)
def test_exact_trace(trace: Trace) -> None:
    requests = [Request(t, prompt, output, kind) for t, kind, prompt, output in trace.requests]
    outcome = simulate(policy_of(trace), requests, trace.d0, trace.d1, trace.capacity)
    assert [(round(i.start, 4), i.size, i.load, i.resident, round(i.tau, 4)) for i in outcome.iterations] == list(trace.batches)
    assert len(outcome.done) == trace.done
    assert outcome.resident == trace.resident
    assert outcome.stranded == trace.resident + trace.waiting
    assert outcome.evictions == 0
    assert outcome.latency == pytest.approx(trace.latency, abs=6e-4)
    assert outcome.ttft == pytest.approx(trace.ttft, abs=6e-4)


class ScriptedFCFS(FCFS):
    """FCFS that lets in at most ``counts[i]`` newcomers in its i-th iteration, to reach a start state."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def choose(self, system: System) -> Choice:
        choice = super().choose(system)
        if self.counts and choice.batch:
            old = [r for r in choice.batch if r.resident]
            new = [r for r in choice.batch if not r.resident]
            choice = Choice(old + new[: self.counts.pop(0)], choice.evict)
        return choice


def cascade(x0: int, x1: int, arrivals: list[float]) -> Outcome:
    """From an empty engine: x1 prompts, then x0 more while the first x1 decode; greedy from there on.

    An iteration takes one second, so the state (x0, x1) is the iteration that starts at time 1.
    """
    requests = [Request(t, 1, 1) for t in arrivals]
    return simulate(ScriptedFCFS([x1, x0]), requests, 1.0, 0.0, CASCADE_CAPACITY, horizon=arrivals[-1] + 0.5)


def states(outcome: Outcome) -> list[tuple[int, int]]:
    """(x0, x1) per iteration: memory x0 + 2 x1 with all residents in the batch."""
    return [(2 * i.size - i.load, i.load - i.size) for i in outcome.iterations]


@pytest.mark.parametrize("start", list(CASCADE_BACKLOG), ids=str)
def test_cascade_with_infinite_backlog(start: tuple[int, int]) -> None:
    # The last arrival only sets the horizon: 12 iterations after the one that builds the state.
    outcome = cascade(*start, arrivals=[0.0] * 200 + [13.0])
    assert states(outcome)[0] == (start[1], 0)
    assert states(outcome)[1:] == CASCADE_BACKLOG[start]


def test_cascade_with_infinite_backlog_long_run() -> None:
    outcome = cascade(6, 3, arrivals=[0.0] * 2000 + [401.0])
    completions = [x1 for _, x1 in states(outcome)[1:]]
    assert completions[:6] == [3, 6, 0, 6, 0, 6]
    assert sum(completions[:12]) / 12 == 3.25
    assert sum(completions[2:]) / len(completions[2:]) == pytest.approx(3.0, abs=0.01)
    balanced = cascade(4, 4, arrivals=[0.0] * 2000 + [401.0])
    assert {x1 for _, x1 in states(balanced)[1:]} == {4}
    assert balanced.evictions == 0


def test_cascade_with_four_arrivals_an_iteration() -> None:
    start = [0.0] * 9
    outcome = cascade(6, 3, start + [float(t) for t in range(2, 403) for _ in range(4)])
    assert states(outcome)[1 : 1 + len(CASCADE_ARRIVALS)] == CASCADE_ARRIVALS
    completions = [x1 for _, x1 in states(outcome)[1:401]]
    assert sum(completions) / 400 == 3.0075
    # Before iteration 401 everything but the completed stands outside or is admitted into it: (12, 0).
    assert states(outcome)[401] == (12, 0)
    assert 9 + 4 * 400 - sum(completions) - 12 == 394
    # From iteration 8 on every second decision evicts 6; the 402nd, the last inside the horizon, is one of them.
    assert CASCADE_ARRIVALS_EVICTIONS == [0, 0, 0, 2, 0, 4, 0, 6, 0, 6]
    assert outcome.evictions == 2 + 4 + 6 * len(range(8, 403, 2))

    balanced = cascade(4, 4, [0.0] * 8 + [float(t) for t in range(2, 403) for _ in range(4)])
    assert set(states(balanced)[1:402]) == {(4, 4)}
    assert balanced.evictions == 0


def test_wait_never_evicts_and_freezes_types_below_their_threshold() -> None:
    types = [(3, 4, 2.0), (2, 7, 0.7)]
    peak = sum(n * sum(prompt + s for s in range(output + 1)) for n, (prompt, output, _) in zip((3, 2), types, strict=True))
    outcome = simulate(Wait((3, 2)), poisson(types, 200, 1), 0.1, 1e-3, peak)
    assert 0 < outcome.peak <= peak
    assert outcome.evictions == 0


def test_horizon_does_not_count_the_iteration_that_crosses_it() -> None:
    requests = [Request(0.0, 1, 1)]
    outcome = simulate(FCFS(), requests, 1.0, 0.0, 12, horizon=1.5)
    assert len(outcome.iterations) == 1
    assert math.isnan(requests[0].completed)
    assert simulate(FCFS(), [Request(0.0, 1, 1)], 1.0, 0.0, 12, horizon=2.0).stranded == 0


def test_refuses_a_request_that_never_fits() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        simulate(FCFS(), [Request(0.0, 10, 3)], 1.0, 0.0, 12)
    with pytest.raises(ValueError, match="segment end"):
        simulate(NestedWait((1,), (2,)), [Request(0.0, 1, 3)], 1.0, 0.0, 12)
