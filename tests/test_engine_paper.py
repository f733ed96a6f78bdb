"""The ``paper`` preset of the simulator against `reference_paper`, request by request."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from local_policies import GreedyFCFS, LocalPolicy, PrefixNested, ThresholdWait, play
from lockstep import Case, lockstep, random_episode, small_cases
from lockstep import compare_many as lockstep_many
from reference_paper import FCFS, NestedWait, Outcome, Policy, Request, Wait, poisson, simulate

from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.perf import LinearTime, load_calibration
from llmsched_env.types import Workload

RELATIVE = 1e-9


@dataclass(frozen=True, slots=True)
class Draw:
    """One problem, with the policy written twice: for the reference and on `Decision`."""

    requests: list[Request]
    d0: float
    d1: float
    capacity: int
    reference: Policy
    policy: LocalPolicy
    horizon: float = math.inf
    boundary_slot: bool = False


def workload_of(requests: list[Request]) -> Workload:
    return Workload.of(
        [r.arrival for r in requests], [r.prompt for r in requests], [r.output for r in requests], [r.kind for r in requests]
    )


def compare(draw: Draw) -> Outcome | None:
    """Both simulators must agree in every iteration and every request.

    Returns None without a comparison where the reference's own memory exceeds the capacity: the
    paper's Nested WAIT then overflows, the engine does not.
    """
    outcome = simulate(draw.reference, draw.requests, draw.d0, draw.d1, draw.capacity, draw.horizon)
    if outcome.peak > draw.capacity:
        return None
    engine = EngineConfig.paper(draw.capacity, draw.d0, draw.d1, boundary_slot=draw.boundary_slot)
    limits = EpisodeLimits(drain=False, horizon=draw.horizon)
    backend, reports = play(draw.policy, workload_of(draw.requests), engine, limits)
    for number, (report, expected) in enumerate(zip(reports, outcome.iterations, strict=False)):
        assert (report.batch_size, report.load, report.kv_used) == (expected.size, expected.load, expected.resident), number
        assert report.start == pytest.approx(expected.start, rel=RELATIVE), number
        assert report.duration == pytest.approx(expected.tau, rel=RELATIVE), number
    assert len(reports) == len(outcome.iterations)
    log = backend.log()
    for name in ("arrival", "first_token", "completed"):
        expected_times = [getattr(r, name) for r in outcome.requests]
        np.testing.assert_allclose(getattr(log, name), expected_times, rtol=RELATIVE, err_msg=name)
    assert log.evictions.tolist() == [r.evictions for r in outcome.requests]
    view = backend.snapshot()
    assert view.evictions == outcome.evictions
    assert backend.counters().kv_peak == outcome.peak
    if math.isinf(draw.horizon):
        assert view.num_residents + view.num_waiting == outcome.stranded
        assert view.num_residents == outcome.resident
    return outcome


# --- random draws ------------------------------------------------------------------------------------


def arrivals(rng: random.Random, count: int, rate: float) -> list[float]:
    """Poisson arrivals; in a quarter of the draws on a grid, so that arrivals meet iteration ends."""
    gaps = [rng.expovariate(rate) for _ in range(count)]
    if rng.random() < 0.25:
        gaps = [round(4 * gap) / 4 for gap in gaps]
    now, times = 0.0, []
    for gap in gaps:
        now += gap
        times.append(now)
    return times


def coefficients(rng: random.Random) -> tuple[float, float]:
    return rng.choice([0.1, 0.5, 1.0]), rng.choice([0.0, 1e-3, 1e-2])


def cut(rng: random.Random, requests: list[Request]) -> tuple[list[Request], float]:
    """In a third of the draws a horizon before the last arrival, and no request that arrives after it."""
    if rng.random() < 2 / 3:
        return requests, math.inf
    horizon = requests[-1].arrival * rng.uniform(0.4, 0.9) + 1e-3
    return [r for r in requests if r.arrival <= horizon], horizon


def draw_fcfs(seed: int) -> Draw:
    rng = random.Random(seed)
    d0, d1 = coefficients(rng)
    longest_prompt, longest_output = rng.randint(1, 12), rng.randint(1, 15)
    capacity = rng.randint(longest_prompt + longest_output, 4 * (longest_prompt + longest_output) + 40)
    work = (longest_output / 2 + 1) * (longest_prompt + longest_output / 2) / 2
    rate = rng.uniform(0.5, 2.0) * capacity / work / (d0 + d1 * capacity)
    requests = [
        Request(t, rng.randint(1, longest_prompt), rng.randint(1, longest_output)) for t in arrivals(rng, rng.randint(5, 150), rate)
    ]
    requests, horizon = cut(rng, requests)
    return Draw(requests, d0, d1, capacity, FCFS(), GreedyFCFS(), horizon)


def stage_sum(prompt: int, first: int, last: int) -> int:
    """KV of one request at each of the stages first .. last."""
    return sum(prompt + s for s in range(first, last + 1))


def draw_wait(seed: int) -> Draw:
    rng = random.Random(seed)
    d0, d1 = coefficients(rng)
    num_types = rng.randint(1, 4)
    types = [(rng.randint(1, 12), rng.randint(1, 15)) for _ in range(num_types)]
    thresholds = [rng.randint(1, 6) for _ in types]
    peak = sum(n * stage_sum(prompt, 0, output) for n, (prompt, output) in zip(thresholds, types, strict=True))
    capacity = max(peak + rng.choice([0, 0, 5, 50]), max(p + o for p, o in types))
    rate = rng.uniform(0.4, 1.5) * sum(thresholds) / (d0 + d1 * peak)
    requests = []
    for t in arrivals(rng, rng.randint(5, 150), rate):
        kind = rng.randrange(num_types)
        requests.append(Request(t, *types[kind], kind))
    requests, horizon = cut(rng, requests)
    return Draw(requests, d0, d1, capacity, Wait(thresholds), ThresholdWait(thresholds), horizon)


def theta(before: int, n: int, p: float) -> float:
    """Positive root of exp(-theta n) (1 - p + p exp(theta))**before = 1 (safety buffer of Nested WAIT)."""

    def exponent(x: float) -> float:
        return before * math.log(1 - p + p * math.exp(x)) - x * n

    low, high = 1e-9, 1.0
    while exponent(high) < 0:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if exponent(middle) < 0 else (low, middle)
    return low


def draw_nested(seed: int, variant: str) -> Draw:
    """Capacity between M^pi and M_req, thresholds that meet p_k < n_k / n_{k-1} < 1."""
    rng = random.Random(seed)
    d0, d1 = coefficients(rng)
    while True:
        prompt = rng.randint(1, 8)
        ends = sorted(rng.sample(range(1, 16), rng.randint(2, 3)))
        outputs = rng.choices(range(1, ends[-1] + 1), k=4) + ends
        alive = [sum(o > end for o in outputs) / len(outputs) for end in (0, *ends[:-1])]
        p = [b / a for a, b in pairwise(alive)]
        thresholds = [rng.randint(4, 12)]
        for share in p:
            thresholds.append(math.floor(thresholds[-1] * share) + 1)
        if all(b < a for a, b in pairwise(thresholds)):
            break
    base = sum(n * stage_sum(prompt, start, end) for n, start, end in zip(thresholds, [0] + [e + 1 for e in ends], ends, strict=False))
    period = d0 + d1 * base
    count = rng.randint(40, 400)
    rate = rng.uniform(0.8, 1.6) * thresholds[0] / period
    chance = math.log(len(ends) * (1 + count / rate / d0) / 0.1)
    buffer = sum(
        (prompt + end) * (n + chance / theta(before, n, share))
        for before, n, end, share in zip(thresholds, thresholds[1:], ends, p, strict=False)
    )
    # A boundary queue that is only just drained makes the buffer huge: stay in the lower half then.
    capacity = max(base + int(min(rng.choice([0.0, 0.0, 0.05, 0.3]) * buffer, base)), prompt + ends[-1])
    requests = [Request(t, prompt, rng.choice(outputs)) for t in arrivals(rng, count, rate)]
    requests, horizon = cut(rng, requests)
    slot = variant == "A"
    return Draw(requests, d0, d1, capacity, NestedWait(thresholds, ends, variant), PrefixNested(thresholds, ends, slot), horizon, slot)


def compare_many(draw: Callable[[int], Draw], seeds: range) -> list[Outcome]:
    outcomes = []
    for seed in seeds:
        try:
            outcome = compare(draw(seed))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}\n{draw(seed)}") from error
        if outcome is not None:
            outcomes.append(outcome)
    return outcomes


def test_fcfs_equals_the_reference() -> None:
    outcomes = compare_many(draw_fcfs, range(100))
    assert len(outcomes) == 100
    assert sum(o.evictions for o in outcomes) > 500
    assert sum(o.evictions > 0 for o in outcomes) > 50


def test_wait_equals_the_reference_and_never_evicts() -> None:
    outcomes = compare_many(draw_wait, range(100))
    assert len(outcomes) == 100
    assert sum(o.evictions for o in outcomes) == 0
    assert sum(len(o.iterations) for o in outcomes) > 1_000


@pytest.mark.parametrize("variant", ["A", "B"])
def test_nested_equals_the_reference(variant: str) -> None:
    outcomes = compare_many(lambda seed: draw_nested(seed, variant), range(300))
    assert len(outcomes) >= 60
    assert sum(o.evictions for o in outcomes) > 300
    assert sum(o.evictions > 0 for o in outcomes) > 20


@pytest.mark.slow
@pytest.mark.parametrize("family", ["fcfs", "wait", "A", "B"])
def test_many_draws_equal_the_reference(family: str) -> None:
    draws: dict[str, Callable[[int], Draw]] = {"fcfs": draw_fcfs, "wait": draw_wait}
    draw = draws.get(family, lambda seed: draw_nested(seed, family))
    assert len(compare_many(draw, range(1_000, 3_000))) > 1_000


# --- the two-type workload of the linear-model table ---------------------------------------------------

TYPES = ((10, 10, 2.0), (10, 20, 1.0))
ENDS = (10, 20)


@dataclass(frozen=True, slots=True)
class TableRow:
    """One row: d0 and horizon (seconds), policy, capacity, then the printed results for seed 0."""

    d0: float
    horizon: float
    policy: str
    thresholds: tuple[int, ...]
    capacity: int
    throughput: float
    latency: float
    ttft: float
    evictions: int
    peak: int

    def pair(self) -> tuple[Policy, LocalPolicy]:
        if self.policy == "fcfs":
            return FCFS(), GreedyFCFS()
        if self.policy == "wait":
            return Wait(self.thresholds), ThresholdWait(self.thresholds)
        return NestedWait(self.thresholds, ENDS, self.policy), PrefixNested(self.thresholds, ENDS, self.policy == "A")


TABLE = (
    TableRow(0.1, 4000, "wait", (2, 1), 750, 40.79, 15.05, 2.86, 0, 750),
    TableRow(0.1, 4000, "fcfs", (), 750, 40.83, 7.35, 1.26, 53, 750),
    TableRow(0.1, 4000, "fcfs", (), 300, 31.90, 530, 521, 11151, 300),
    TableRow(0.1, 4000, "fcfs", (), 450, 34.99, 299, 287, 11223, 450),
    TableRow(0.1, 4000, "B", (4, 2), 1406, 40.80, 22.17, 3.63, 0, 1270),
    TableRow(0.1, 4000, "A", (4, 2), 1406, 40.82, 23.03, 3.85, 0, 1310),
    TableRow(1.0, 20000, "wait", (10, 5), 3750, 40.16, 77.5, 16.2, 0, 3750),
    TableRow(1.0, 20000, "fcfs", (), 3750, 35.38, 802, 711, 37635, 3750),
    TableRow(1.0, 20000, "fcfs", (), 3000, 32.43, 2294.5, 2207.9, 53218, 3000),
    TableRow(1.0, 20000, "fcfs", (), 3375, 33.35, 1750, 1656, 50684, 3375),
    TableRow(1.0, 20000, "fcfs", (), 4500, 40.20, 60.9, 10.3, 0, 4452),
    TableRow(1.0, 20000, "B", (16, 6), 5003, 40.17, 83.9, 15.1, 0, 4570),
    TableRow(1.0, 20000, "A", (16, 6), 5003, 40.19, 87.6, 16.8, 0, 4690),
    TableRow(1.0, 20000, "B", (18, 7), 5435, 40.18, 93.8, 15.9, 0, 5155),
    TableRow(1.0, 20000, "B", (24, 10), 7075, 40.17, 125.3, 19.6, 0, 6830),
)


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.d0}-{r.policy}-{r.thresholds}-{r.capacity}")
def test_table_row_on_a_short_horizon_equals_the_reference(row: TableRow) -> None:
    horizon = row.horizon / 20
    reference, policy = row.pair()
    outcome = compare(Draw(poisson(TYPES, horizon, 0), row.d0, 1e-3, row.capacity, reference, policy, horizon, row.policy == "A"))
    assert outcome is not None
    assert len(outcome.iterations) > 100
    if row.policy != "fcfs":
        assert outcome.evictions == 0


@pytest.mark.parametrize("row", TABLE, ids=lambda r: f"{r.d0}-{r.policy}-{r.thresholds}-{r.capacity}")
def test_table_row_gives_the_printed_numbers(row: TableRow) -> None:
    """Seed 0 over the whole horizon; means over arrivals after the first fifth, to the printed digits."""
    workload = workload_of(poisson(TYPES, row.horizon, 0))
    engine = EngineConfig.paper(row.capacity, row.d0, 1e-3, boundary_slot=row.policy == "A")
    backend, reports = play(row.pair()[1], workload, engine, EpisodeLimits(drain=False, horizon=row.horizon))
    log, start = backend.log(), 0.2 * row.horizon
    counted = (log.arrival >= start) & ~np.isnan(log.completed)
    tokens = log.output_tokens[log.completed >= start].sum()
    assert tokens / (row.horizon - start) == pytest.approx(row.throughput, abs=0.006)
    unit = 1.0 if row.latency in (530, 299, 802, 1750) else 0.1 if row.d0 == 1.0 else 0.01
    assert np.mean(log.completed[counted] - log.arrival[counted]) == pytest.approx(row.latency, abs=0.51 * unit)
    assert np.mean(log.first_token[counted] - log.arrival[counted]) == pytest.approx(row.ttft, abs=0.51 * unit)
    assert backend.snapshot().evictions == row.evictions
    assert max(r.kv_used for r in reports) == row.peak


@pytest.mark.parametrize(("capacity", "evictions"), [(4170, 10_108), (4250, 4_179), (4300, 1_390), (4400, 146), (4570, 3)])
def test_safety_buffer_in_action(capacity: int, evictions: int) -> None:
    """Nested B (16, 6) between M^pi = 4170 and M_req = 5003."""
    workload = workload_of(poisson(TYPES, 20_000, 0))
    engine = EngineConfig.paper(capacity, 1.0, 1e-3)
    backend, _ = play(PrefixNested((16, 6), ENDS), workload, engine, EpisodeLimits(drain=False, horizon=20_000))
    assert backend.snapshot().evictions == evictions
    assert backend.counters().kv_peak <= capacity


# --- arbitrary decisions, step by step ------------------------------------------------------------------


def random_engine(rng: np.random.Generator, workload: Workload) -> EngineConfig:
    longest = int((workload.prompt_tokens + workload.output_tokens).max())
    reject = bool(rng.random() < 0.15)
    return EngineConfig(
        preset="paper",
        time_model=LinearTime(0.1, 0.001) if rng.random() < 0.7 else load_calibration("a100-llama2-7b-c10"),
        capacity_tokens=max(2, int(longest * (rng.uniform(0.6, 1.0) if reject else rng.choice([1.0, 1.5, 3.0, 6.0])))),
        boundary_slot=bool(rng.random() < 0.3),
        admission_order="class" if rng.random() < 0.4 else "arrival",
        oversize="reject" if reject else "error",
    )


def random_case(seed: int) -> Case:
    return random_episode(seed, random_engine)


def test_random_decisions_equal_the_reference_step_by_step() -> None:
    total, preempting = lockstep_many(random_case, range(200))
    assert preempting > 100, total
    assert total.iterations > 20_000, total
    assert total.preemptions > 1_500, total
    assert total.evictions > 300, total
    assert total.held > 2_000, total
    assert total.drained > 100, total


@pytest.mark.slow
def test_many_random_decisions_equal_the_reference_step_by_step() -> None:
    _, preempting = lockstep_many(random_case, range(10_000, 11_500))
    assert preempting > 750


@settings(max_examples=200)
@given(small_cases("paper"))
def test_small_episodes_equal_the_reference_step_by_step(case: Case) -> None:
    lockstep(case)
