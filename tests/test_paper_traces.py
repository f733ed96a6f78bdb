"""The exact traces T1-T3 and the FCFS cascade through the engine's ``paper`` preset."""

from __future__ import annotations

import numpy as np
import pytest
from local_policies import GreedyFCFS, LocalPolicy, PrefixNested, ThresholdWait, play
from paper_cases import CASCADE_ARRIVALS, CASCADE_ARRIVALS_EVICTIONS, CASCADE_BACKLOG, CASCADE_CAPACITY, TRACES, Trace

from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.types import IterationReport, Workload


def policy_of(trace: Trace) -> LocalPolicy:
    if trace.policy == "wait":
        return ThresholdWait(trace.thresholds)
    return PrefixNested(trace.thresholds, trace.ends, boundary_slot=trace.policy == "A")


@pytest.mark.parametrize("trace", TRACES, ids=lambda t: t.name)
def test_exact_trace(trace: Trace) -> None:
    arrival, kind, prompt, output = zip(*trace.requests, strict=True)
    engine = EngineConfig.paper(trace.capacity, trace.d0, trace.d1, boundary_slot=trace.policy == "A")
    backend, reports = play(policy_of(trace), Workload.of(arrival, prompt, output, kind), engine, EpisodeLimits(drain=False))
    rows = [(round(r.start, 4), r.batch_size, r.load, r.kv_used, round(r.duration, 4)) for r in reports]
    assert rows == list(trace.batches)
    log, view = backend.log(), backend.snapshot()
    done = ~np.isnan(log.completed)
    assert (int(done.sum()), view.num_residents, view.num_waiting) == (trace.done, trace.resident, trace.waiting)
    assert view.evictions == 0
    assert backend.end == "stranded"
    assert np.mean(log.completed[done] - log.arrival[done]) == pytest.approx(trace.latency, abs=6e-4)
    assert np.mean(log.first_token[done] - log.arrival[done]) == pytest.approx(trace.ttft, abs=6e-4)


# The cascade. The start state (x0, x1) is the second iteration from an empty engine: the first admits
# x1 prompts (memory x1), the second admits x0 more while those decode (memory x0 + 2 x1 <= 12). With
# d0 = 1, d1 = 0 iteration i starts at second i, so "arrivals at the end of iteration i" are at i + 1.


def cascade(start: tuple[int, int], arrivals: list[float]) -> list[IterationReport]:
    """Reports from the start state on, those that end by the last arrival."""
    n = len(arrivals)
    engine = EngineConfig.paper(CASCADE_CAPACITY, 1.0, 0.0)
    limits = EpisodeLimits(drain=False, horizon=arrivals[-1])
    _, reports = play(GreedyFCFS([start[1], start[0]]), Workload.of(arrivals, np.ones(n, int), np.ones(n, int)), engine, limits)
    assert (reports[0].prefill_requests, reports[0].decode_requests) == (start[1], 0)
    return reports[1:]


def states(reports: list[IterationReport]) -> list[tuple[int, int]]:
    return [(r.prefill_requests, r.decode_requests) for r in reports]


@pytest.mark.parametrize("start", list(CASCADE_BACKLOG), ids=str)
def test_cascade_with_infinite_backlog(start: tuple[int, int]) -> None:
    reports = cascade(start, [0.0] * 3000 + [401.0])
    expected = CASCADE_BACKLOG[start]
    assert states(reports)[:12] == expected
    for report, (x0, x1) in zip(reports, expected, strict=False):
        assert (report.completed, report.admitted, report.kv_used, report.load) == (x1, x0, x0 + 2 * x1, x0 + 2 * x1)
    assert len(reports) == 400
    completions = [r.completed for r in reports]
    evictions = [len(r.preempted) for r in reports]
    assert sum(len(r.evicted) for r in reports) == 0
    if start == (4, 4):
        assert set(completions) == {4}
        assert sum(evictions) == 0
        return
    assert sum(completions[4:]) / len(completions[4:]) == 3.0
    cycle = completions[4:6]
    assert sorted(cycle) == [0, 6]
    assert completions[4:] == cycle * (len(completions[4:]) // 2)
    # Six of the twelve are evicted before every iteration that completes six.
    assert evictions[5:] == [6 * (c == 6) for c in completions[5:]]


def test_cascade_means_of_the_first_twelve_iterations() -> None:
    assert sum(r.completed for r in cascade((6, 3), [0.0] * 3000 + [13.0])) / 12 == 3.25


def test_cascade_with_four_arrivals_an_iteration() -> None:
    arrivals = [0.0] * 9 + [float(t) for t in range(2, 403) for _ in range(4)]
    reports = cascade((6, 3), arrivals)
    assert states(reports)[: len(CASCADE_ARRIVALS)] == CASCADE_ARRIVALS
    assert [len(r.preempted) for r in reports[: len(CASCADE_ARRIVALS_EVICTIONS)]] == CASCADE_ARRIVALS_EVICTIONS
    assert all(r.arrived == 4 for r in reports)
    assert sum(r.completed for r in reports[:400]) / 400 == 3.0075
    # After 400 iterations the engine is empty and 406 stand outside; the next decision admits 12 of them.
    assert reports[399].waiting == 406
    assert states(reports)[400] == (12, 0)
    assert reports[400].waiting - reports[400].arrived == 394


def test_balanced_cascade_stays_balanced() -> None:
    reports = cascade((4, 4), [0.0] * 8 + [float(t) for t in range(2, 403) for _ in range(4)])
    assert set(states(reports)) == {(4, 4)}
    assert {r.waiting for r in reports} == {4}  # the four that have just arrived
    assert sum(len(r.preempted) for r in reports) == 0
