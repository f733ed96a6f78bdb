"""FCFS, WAIT and Nested WAIT written on `Decision` for these tests alone, independent of ``baselines``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from llmsched_env.backend import View
from llmsched_env.backends import make_backend
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.types import ADMIT_ALL, Decision, IterationReport, QueueLayout, Workload


class LocalPolicy(Protocol):
    def layout(self) -> QueueLayout: ...
    def decide(self, view: View) -> Decision: ...


class GreedyFCFS:
    """Everything runs and everything that fits enters; ``admits`` caps the first decisions that find work."""

    def __init__(self, admits: Sequence[int] = ()) -> None:
        self.admits = list(admits)

    def layout(self) -> QueueLayout:
        return QueueLayout()

    def decide(self, view: View) -> Decision:
        count = self.admits.pop(0) if self.admits and view.num_waiting + view.num_residents else ADMIT_ALL
        return Decision.of([1], [count])


class ThresholdWait:
    """WAIT: the types whose queue holds its threshold move, the others are held."""

    def __init__(self, thresholds: Sequence[int]) -> None:
        self.thresholds = tuple(thresholds)

    def layout(self) -> QueueLayout:
        return QueueLayout(by="type", num_types=len(self.thresholds))

    def decide(self, view: View) -> Decision:
        ready = [int(w) >= n for w, n in zip(view.waiting[:, 0], self.thresholds, strict=True)]
        return Decision.of(ready, [n if go else 0 for n, go in zip(self.thresholds, ready, strict=True)])


class PrefixNested:
    """Nested WAIT: the longest prefix of ready segments moves; projected memory is repaired by eviction.

    ``ends`` holds every segment end, the longest output included; the layout needs all but that one.
    """

    def __init__(self, thresholds: Sequence[int], ends: Sequence[int], boundary_slot: bool = False) -> None:
        self.thresholds, self.ends, self.boundary_slot = tuple(thresholds), tuple(ends), boundary_slot

    def layout(self) -> QueueLayout:
        return QueueLayout(segment_ends=self.ends[:-1])

    def decide(self, view: View) -> Decision:
        num_segments = len(self.ends)
        depth = 0
        while depth < num_segments and int(view.waiting[0, depth]) >= self.thresholds[depth]:
            depth += 1
        decision = Decision(num_segments)
        if depth == 0:
            return decision
        decision.run[:depth] = 1
        decision.admit[:depth] = self.thresholds[:depth]
        self._repair(view, depth, decision)
        return decision

    def _repair(self, view: View, depth: int, decision: Decision) -> None:
        newcomers = view.waiting_requests(0, self.thresholds[0])
        memory = int(newcomers.prompt_tokens.sum()) + len(newcomers.id)  # at stage 1 after the iteration
        r = view.resident_requests()
        rows = zip(r.queue.tolist(), r.at_boundary.tolist(), r.prompt_tokens.tolist(), r.generated.tolist(), strict=True)
        entering = list(self.thresholds)
        loose: list[tuple[int, int]] = []
        for queue, at_boundary, prompt, generated in rows:
            if at_boundary:
                if queue < depth and entering[queue] > 0:
                    entering[queue] -= 1
                    memory += prompt + (generated + 1 if self.boundary_slot else min(generated + 2, self.ends[-1]))
                else:
                    memory += prompt + generated
                    loose.append((queue, prompt + generated))
            else:
                stage = generated + 1
                if queue >= depth:
                    memory += prompt + stage
                elif stage < self.ends[-1]:
                    memory += prompt + stage + (stage not in self.ends)
        while memory > view.engine.kv_capacity and loose:
            queue, kv = loose.pop()
            memory -= kv
            decision.evict[queue] += 1


def play(policy: LocalPolicy, workload: Workload, engine: EngineConfig, limits: EpisodeLimits) -> tuple[SimBackend, list[IterationReport]]:
    """Run an episode; the reports of its iterations, idle steps and one that crosses the horizon left out."""
    backend = make_backend("sim")
    assert isinstance(backend, SimBackend)
    view = backend.reset(workload, policy.layout(), engine, limits)
    reports = []
    while not backend.done:
        report = backend.step(policy.decide(view))
        if not report.idle:
            reports.append(report)
    crossing = backend.end == "horizon" and backend.counters().iterations == len(reports) - 1
    return backend, reports[:-1] if crossing else reports
