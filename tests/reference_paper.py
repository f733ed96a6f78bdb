"""Event-driven reference of the linear model of arXiv 2504.11320 with FCFS, WAIT and Nested WAIT.

An oracle for the engine's ``paper`` preset: plain Python over lists of request objects, nothing shared
with the package. A request with prompt l and d output tokens passes the stages 0 (prefill, no token),
1, ..., d (one token each); "at stage s" means s is the stage it takes next. KV charge at stage s is
l + s, a batch takes d0 + d1 * (sum of its charges) seconds.

Conventions where the paper leaves room:

* arrivals at the very instant an iteration ends are seen by the decision taken then;
* FCFS evicts (newest admission first) before it batches, and admits nothing when it has evicted;
* evicted requests lose all progress, go to the front of the queue and keep arrival and TTFT;
* TTFT ends with the stage-1 iteration; there is no drain rule: requests may stay stranded;
* Nested variant B: a boundary queue is a waiting room for the stage after the segment end, its requests
  charged l + (segment end). Variant A: leaving it takes an iteration of its own that yields no token;
* an iteration that ends after the horizon is not counted.
"""

from __future__ import annotations

import heapq
import math
import random
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True, eq=False)
class Request:
    """One request; times are absolute seconds, NaN until they happen."""

    arrival: float
    prompt: int
    output: int
    kind: int = 0
    stage: int = 0
    parked: bool = False  # stands in a boundary queue; ``stage`` is then the segment end it has passed
    resident: bool = False
    first_token: float = math.nan
    completed: float = math.nan
    evictions: int = 0

    @property
    def charge(self) -> int:
        return self.prompt + self.stage


@dataclass(frozen=True, slots=True)
class Iteration:
    """start and tau in seconds; load = KV charged to the batch, resident = to everything on the GPU (tokens)."""

    start: float
    size: int
    load: int
    resident: int
    tau: float


@dataclass(slots=True)
class System:
    """What a policy sees: ``waiting[i]`` is its i-th queue, ``residents`` stand in admission order."""

    capacity: int
    waiting: list[deque[Request]]
    residents: list[Request] = field(default_factory=list)

    @property
    def memory(self) -> int:
        return sum(r.charge for r in self.residents)


@dataclass(frozen=True, slots=True)
class Choice:
    """``batch`` in the order in which newcomers are admitted; ``evict`` in the order of eviction."""

    batch: list[Request]
    evict: list[Request]


class Policy(ABC):
    """Base: one queue, no segments."""

    num_queues = 1
    segment_ends: tuple[int, ...] = ()
    boundary_slot = False

    def queue_of(self, request: Request) -> int:
        return 0

    @abstractmethod
    def choose(self, system: System) -> Choice:
        """The batch of the next iteration and what is evicted first."""


class FCFS(Policy):
    """All residents advance; the queue is admitted while it fits."""

    def choose(self, system: System) -> Choice:
        keep, evict, memory = list(system.residents), [], system.memory
        while memory > system.capacity:
            victim = keep.pop()
            memory -= victim.charge
            evict.append(victim)
        if not evict:
            for request in system.waiting[0]:
                memory += request.prompt
                if memory > system.capacity:
                    break
                keep.append(request)
        return Choice(keep, evict)


class Wait(Policy):
    """Algorithm 1: a type moves, all stages together, exactly when its queue holds its threshold."""

    def __init__(self, thresholds: Sequence[int]) -> None:
        self.thresholds = tuple(thresholds)
        self.num_queues = len(self.thresholds)

    def queue_of(self, request: Request) -> int:
        return request.kind

    def choose(self, system: System) -> Choice:
        batch: list[Request] = []
        moving = [len(queue) >= n for queue, n in zip(system.waiting, self.thresholds, strict=True)]
        taken: Counter[tuple[int, int]] = Counter()
        for request in system.residents:
            place = (request.kind, request.stage)
            if moving[request.kind] and taken[place] < self.thresholds[request.kind]:
                taken[place] += 1
                batch.append(request)
        for kind, moves in enumerate(moving):
            if moves:
                batch.extend(list(system.waiting[kind])[: self.thresholds[kind]])
        return Choice(batch, [])


class NestedWait(Policy):
    """Algorithm 2: the longest prefix of segments whose queues all hold their thresholds moves."""

    def __init__(self, thresholds: Sequence[int], ends: Sequence[int], variant: str = "B") -> None:
        if len(thresholds) != len(ends) or variant not in ("A", "B"):
            raise ValueError(f"{len(thresholds)} thresholds, {len(ends)} segment ends, variant {variant!r}")
        self.thresholds = tuple(thresholds)
        self.segment_ends = tuple(ends)
        self.boundary_slot = variant == "A"

    def choose(self, system: System) -> Choice:
        ends = self.segment_ends
        entrances: list[list[Request]] = [list(system.waiting[0])] + [[] for _ in ends[1:]]
        for request in system.residents:
            if request.parked:
                entrances[ends.index(request.stage) + 1].append(request)
        depth = 0
        while depth < len(ends) and len(entrances[depth]) >= self.thresholds[depth]:
            depth += 1
        if depth == 0:
            return Choice([], [])

        batch: list[Request] = []
        for n, entrance in zip(self.thresholds[:depth], entrances, strict=False):
            batch.extend(entrance[:n])
        taken: Counter[int] = Counter()
        for request in system.residents:
            segment = bisect_left(ends, request.stage)
            if not request.parked and segment < depth and taken[request.stage] < self.thresholds[segment]:
                taken[request.stage] += 1
                batch.append(request)

        # Memory after the batch if every request of unknown length survives; repaired by evicting from
        # the boundary queues, newest admission first.
        chosen = {id(r) for r in batch}
        memory = sum(self._after(r) for r in batch) + sum(r.charge for r in system.residents if id(r) not in chosen)
        loose = [r for r in system.residents if r.parked and id(r) not in chosen]
        evict: list[Request] = []
        while memory > system.capacity and loose:
            victim = loose.pop()
            memory -= victim.charge
            evict.append(victim)
        return Choice(batch, evict)

    def _after(self, request: Request) -> int:
        last = self.segment_ends[-1]
        if request.parked:
            return request.prompt + (request.stage + 1 if self.boundary_slot else min(request.stage + 2, last))
        if request.stage == last:
            return 0
        return request.charge + (request.stage not in self.segment_ends)


@dataclass(frozen=True, slots=True)
class Outcome:
    """``requests`` in the order given to ``simulate``; ``peak`` = highest resident memory (tokens), idle times included."""

    requests: list[Request]
    iterations: list[Iteration]
    evictions: int
    peak: int
    stranded: int
    resident: int

    @property
    def done(self) -> list[Request]:
        return [r for r in self.requests if r.completed == r.completed]

    @property
    def latency(self) -> float:
        done = self.done
        return sum(r.completed - r.arrival for r in done) / len(done)

    @property
    def ttft(self) -> float:
        done = self.done
        return sum(r.first_token - r.arrival for r in done) / len(done)


_ARRIVES, _ENDS = 0, 1


class _Server:
    """One server: the queues, the residents and the batch that runs."""

    def __init__(self, policy: Policy, d0: float, d1: float, capacity: int) -> None:
        self.policy, self.d0, self.d1 = policy, d0, d1
        self.system = System(capacity, [deque() for _ in range(policy.num_queues)])
        self.batch: list[Request] = []
        self.running: Iteration | None = None
        self.peak = 0
        self.evictions = 0

    def enqueue(self, request: Request) -> None:
        self.system.waiting[self.policy.queue_of(request)].append(request)

    def launch(self, now: float) -> float | None:
        """Let the policy decide; returns the end of the iteration, None if the server stays idle."""
        choice = self.policy.choose(self.system)
        for victim in choice.evict:
            self.system.residents.remove(victim)
            victim.stage, victim.parked, victim.resident = 0, False, False
            victim.evictions += 1
            self.system.waiting[self.policy.queue_of(victim)].appendleft(victim)
        self.evictions += len(choice.evict)
        if not choice.batch:
            self.peak = max(self.peak, self.system.memory)
            return None
        for request in choice.batch:
            if not request.resident:
                self.system.waiting[self.policy.queue_of(request)].remove(request)
                self.system.residents.append(request)
                request.resident = True
            elif request.parked and not self.policy.boundary_slot:
                request.parked = False
                request.stage += 1
        load, memory = sum(r.charge for r in choice.batch), self.system.memory
        self.peak = max(self.peak, memory)
        tau = self.d0 + self.d1 * load
        self.batch, self.running = choice.batch, Iteration(now, len(choice.batch), load, memory, tau)
        return now + tau

    def land(self, now: float) -> Iteration:
        """The end of the iteration: tokens, completions, next stages."""
        assert self.running is not None
        for request in self.batch:
            if request.parked:  # variant A: the slot yields no token
                request.parked = False
                request.stage += 1
                continue
            if request.stage == 1 and request.first_token != request.first_token:
                request.first_token = now
            if request.stage == request.output:
                request.completed = now
                request.resident = False
                self.system.residents.remove(request)
            elif request.stage in self.policy.segment_ends:
                request.parked = True
            else:
                request.stage += 1
        ended, self.batch, self.running = self.running, [], None
        return ended


def simulate(policy: Policy, requests: Sequence[Request], d0: float, d1: float, capacity: int, horizon: float = math.inf) -> Outcome:
    """Run until no event is left or an iteration ends after ``horizon``. Works on the given requests."""
    longest = policy.segment_ends[-1] if policy.segment_ends else math.inf
    for r in requests:
        if r.output < 1 or r.prompt < 1 or r.output > longest or r.prompt + r.output > capacity:
            raise ValueError(f"{r} does not fit capacity {capacity} or segment end {longest}")
    server = _Server(policy, d0, d1, capacity)
    events = [(r.arrival, _ARRIVES, i) for i, r in enumerate(requests)]
    heapq.heapify(events)
    iterations: list[Iteration] = []
    while events:
        now = events[0][0]
        if now > horizon:
            break
        while events and events[0][0] == now:
            _, what, index = heapq.heappop(events)
            if what == _ARRIVES:
                server.enqueue(requests[index])
            else:
                iterations.append(server.land(now))
        if server.running is None:
            end = server.launch(now)
            if end is not None:
                heapq.heappush(events, (end, _ENDS, 0))
    done = sum(1 for r in requests if r.completed == r.completed)
    return Outcome(list(requests), iterations, server.evictions, server.peak, len(requests) - done, len(server.system.residents))


def poisson(types: Sequence[tuple[int, int, float]], horizon: float, seed: int) -> list[Request]:
    """Poisson arrivals of types (prompt, output, rate) up to ``horizon``, in arrival order."""
    draw = random.Random(seed)
    requests: list[Request] = []
    for kind, (prompt, output, rate) in enumerate(types):
        now = draw.expovariate(rate)
        while now <= horizon:
            requests.append(Request(now, prompt, output, kind))
            now += draw.expovariate(rate)
    return sorted(requests, key=lambda r: r.arrival)
