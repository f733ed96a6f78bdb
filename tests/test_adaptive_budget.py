"""The fluid model behind the token budget: its formulas in plain Python, and what it chooses where the answer is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_agents.adaptive_budget import FILLED, Demand, Flow, choose_budget, cost_of, most_decodes, solve, visit
from llmsched_agents.adaptive_times import UNITS, TimesRecord, times_record

BUDGETS = (128, 256, 512, 1_024, 2_048)


@dataclass(frozen=True)
class Times:
    """Seconds of an iteration: at the knots straight between them, and of context, work and decodes."""

    at: tuple[float, ...] = (0, 2_048)
    value: tuple[float, ...] = (0.02, 0.12)
    kv: float = 2e-8
    work: float = 3e-9
    context: float = 1e-6
    decode: float = 0.0

    def __call__(self, decodes: float, context: float, prefill: float, work: float) -> float:
        flat = float(np.interp(decodes + prefill, self.at, self.value))
        chunk = self.context * work if prefill > 0 else 0.0
        return flat + self.kv * decodes * context + self.work * prefill * work + chunk + self.decode * decodes

    def record(self) -> TimesRecord:
        times = times_record(2_048)
        knots = times.knots.size
        times.found[:knots] = np.interp(times.knots, self.at, self.value)
        times.found[knots:] = np.array([self.kv, self.work, self.context, self.decode]) / UNITS
        return times


def demand_of(**chosen: float) -> Demand:
    demand = Demand()
    asked = {"rate": 2.0, "prompt": 500.0, "prompt_square": 400_000.0, "output": 200.0, "context": 650.0, "extra": 20.0}
    for name, value in {**asked, "capacity": 100_000.0, "seats": 256.0, **chosen}.items():
        setattr(demand, name, value)
    return demand


class Reference:
    """The formulas of the module's docstring."""

    def __init__(self, tau: Times, d: Demand, budget: float) -> None:
        self.tau, self.d, self.budget = tau, d, budget

    def share(self, n: float) -> float:
        return n * self.d.prompt / self.d.output / (self.budget - n)

    def whole(self, n: float) -> float:
        work = self.d.prompt_square / self.d.prompt / 2
        return self.tau(n, self.d.context, self.budget - n, work)

    def seconds(self, n: float) -> float:
        f = self.share(n)
        return f * self.whole(n) + (1 - f) * self.tau(n, self.d.context, 0.0, 0.0)

    def prefill_seconds(self, n: float) -> float:
        return self.d.prompt / (self.budget - n) * self.whole(n)

    def throughput(self, n: float) -> float:
        return n / (self.d.output * self.seconds(n))

    def memory(self, n: float) -> float:
        return n * (self.d.context + self.d.extra) + self.throughput(n) * self.prefill_seconds(n) * self.d.prompt_square / self.d.prompt

    def most(self) -> float:
        """By a fine grid: within memory, seats, and a prefill share of at most 1."""
        grid = np.linspace(1e-6, min(self.d.seats, self.budget - 1.0), 200_001)
        grid = grid[self.share(grid) <= 1.0]  # type: ignore[arg-type]
        lean = [n for n in grid[:: max(1, grid.size // 4_000)] if self.memory(n) <= FILLED * self.d.capacity]
        return float(lean[-1]) if lean else 0.0

    def decodes(self, most: float) -> float:
        """n = rate E[o] tau(n), by repeated substitution from below; the most where that goes beyond it."""
        n = 0.0
        for _ in range(10_000):
            following = self.d.rate * self.d.output * self.seconds(n)
            if following >= most:
                return most
            if abs(following - n) < 1e-12:
                break
            n = following
        return n


MODELS = [Times(), Times(at=(0, 128, 256, 512, 2_048), value=(0.02, 0.02, 0.03, 0.05, 0.16)), Times(decode=1e-4, kv=0.0)]
DEMANDS: list[dict[str, float]] = [
    {},
    {"rate": 0.3},
    {"seats": 20.0, "rate": 0.4},
    {"capacity": 20_000.0, "rate": 0.5},
    {"prompt": 2_000.0, "prompt_square": 6e6, "context": 2_100.0, "rate": 0.2},
    {"prompt": 20.0, "prompt_square": 500.0, "context": 120.0, "rate": 5.0},
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("tau", "chosen"), list(itertools.product(MODELS, DEMANDS)))
def test_the_flow_is_that_of_the_formulas(tau: Times, chosen: dict[str, float], budget: int) -> None:
    demand, flow = demand_of(**chosen), Flow()
    by_hand = Reference(tau, demand, budget)
    solve(tau.record(), demand, float(budget), flow)
    most = by_hand.most()
    assert most_decodes(tau.record(), demand, float(budget), Flow()) == pytest.approx(most, rel=2e-3, abs=0.05)
    best = max(by_hand.throughput(most * i / 10) for i in range(3, 11))
    assert flow.throughput == pytest.approx(best, rel=2e-3)
    assert flow.throughput == pytest.approx(by_hand.throughput(flow.busiest), rel=1e-9)
    solve(tau.record(), demand, float(budget), flow)
    n = by_hand.decodes(flow.busiest)
    assert flow.decodes == pytest.approx(n, rel=1e-3, abs=2e-4)
    assert flow.prefill_share == pytest.approx(by_hand.share(flow.decodes), rel=1e-9)
    assert flow.seconds == pytest.approx(by_hand.seconds(flow.decodes), rel=1e-9)
    assert flow.prefill_seconds == pytest.approx(by_hand.prefill_seconds(flow.decodes), rel=1e-9)
    served = min(demand.rate, flow.throughput)
    assert flow.latency == pytest.approx(flow.decodes / served, rel=1e-3)  # Little


def test_prompts_that_cannot_be_prefilled_have_no_throughput() -> None:
    demand, flow = demand_of(), Flow()
    assert visit(Times().record(), demand, 128.0, 100.0, flow) == 0.0 and flow.prefill_share > 1.0
    assert visit(Times().record(), demand, 128.0, 128.0, flow) == 0.0


@pytest.mark.parametrize("rate", [1e-5, 1e-3, 0.1])
def test_little_load_costs_no_precision(rate: float) -> None:
    """A request alone takes E[o] tau(0), however seldom it comes."""
    tau, demand, flow = Times(), demand_of(rate=rate), Flow()
    solve(tau.record(), demand, 512.0, flow)
    by_hand = Reference(tau, demand, 512)
    assert flow.latency == pytest.approx(demand.output * by_hand.seconds(by_hand.decodes(flow.busiest)), rel=1e-4)


def chosen(tau: Times, kept: int = len(BUDGETS) - 1, **asked: float) -> tuple[int, float, Flow]:
    """(budget, most residents, flow)."""
    flow = Flow()
    budgets, costs = np.array(BUDGETS, dtype=np.float64), np.zeros(2 * len(BUDGETS))
    best = choose_budget(tau.record(), demand_of(**asked), budgets, costs, flow, kept)
    assert np.isfinite(costs[: len(BUDGETS)]).all() and not np.isnan(costs).any()
    return BUDGETS[best], flow.most, flow


CHEAP_TILE = Times(at=(0, 128, 192, 256, 512, 2_048), value=(0.02, 0.02, 0.08, 0.12, 0.2, 0.7))
"""One tile costs what a decode costs; every further one much."""


def test_a_cheap_tile_is_taken_at_low_load() -> None:
    for kept in range(len(BUDGETS)):
        budget, most, _ = chosen(CHEAP_TILE, kept=kept, rate=0.05)
        assert budget == 128 and most == math.inf


def test_large_batches_are_taken_where_they_cost_no_more() -> None:
    flat = Times(at=(0, 2_048), value=(0.03, 0.03), kv=0.0, work=0.0)
    for rate in (0.05, 1.0, 5.0):
        budget, most, _ = chosen(flat, kept=0, rate=rate)
        assert budget == 2_048
        assert most == math.inf or rate >= 5.0


def test_load_asks_for_the_budget_that_bears_it() -> None:
    """Where the cheap tile cannot bear the rate and a larger one can."""
    steep = Times(at=(0, 128, 512, 2_048), value=(0.02, 0.02, 0.05, 0.2))
    small, large = Flow(), Flow()
    solve(steep.record(), demand_of(), 128.0, small)
    solve(steep.record(), demand_of(), 512.0, large)
    assert large.throughput > 1.3 * small.throughput
    assert chosen(steep, kept=0, rate=1.2 * small.throughput)[0] > 128


def test_fewer_residents_in_an_overload_that_more_do_not_help() -> None:
    """Decodes cost in proportion to their number, so that half as many end nearly as often, each in half the time."""
    tau = Times(at=(0, 2_048), value=(0.002, 0.004), kv=0.0, work=0.0, decode=1e-3)
    flow = Flow()
    solve(tau.record(), demand_of(), 2_048.0, flow)
    _, most, found = chosen(tau, rate=1.02 * flow.throughput)
    assert most <= 0.9 * flow.busiest
    assert visit(tau.record(), demand_of(), 2_048.0, most, found) > 0.8 * flow.throughput
    assert chosen(tau, rate=0.9 * flow.throughput)[1] == math.inf


def test_a_budget_in_force_stays_unless_another_is_clearly_better() -> None:
    near = Times(at=(0, 2_048), value=(0.03, 0.0301), kv=0.0, work=0.0)
    budgets = {chosen(near, kept=kept, rate=0.05, prompt=20.0, prompt_square=400.0)[0] for kept in range(2, 5)}
    assert budgets == {512, 1_024, 2_048}


def test_cost_is_time_in_the_engine_and_the_queue_that_grows() -> None:
    tau, demand, flow = Times(), demand_of(rate=20.0), Flow()
    solve(tau.record(), demand, 512.0, flow)
    assert flow.throughput < 20.0
    by_hand = Reference(tau, demand, 512)
    n, throughput = flow.decodes, flow.throughput
    expected = n / throughput + (1 + 3 * by_hand.share(n)) * by_hand.prefill_seconds(n) + 16 * 7.0 * (20.0 / throughput - 1)
    assert cost_of(tau.record(), demand, 512.0, n, throughput, 7.0, flow) == pytest.approx(expected, rel=1e-6)


EXTREMES: list[dict[str, Any]] = [
    {"seats": 1.0},
    {"seats": 1.0, "rate": 100.0},
    {"prompt": 200_000.0, "prompt_square": 5e10, "context": 200_000.0},
    {"prompt": 200_000.0, "prompt_square": 5e10, "context": 200_000.0, "rate": 0.0},
    {"rate": 0.0},
    {"rate": 1e9},
    {"output": 1.0, "context": 500.0},
    {"output": 60_000.0, "context": 30_000.0},
    {"prompt": 1.0, "prompt_square": 1.0, "output": 1.0, "context": 1.0},
    {"capacity": 1.0},
    {"extra": 0.0, "capacity": 1e9, "seats": 1e6},
]


@pytest.mark.parametrize("asked", EXTREMES)
@pytest.mark.parametrize("tau", [Times(), CHEAP_TILE, Times(value=(0.0, 0.0), kv=0.0, work=0.0)])
def test_extremes_give_finite_answers(tau: Times, asked: dict[str, Any]) -> None:
    for kept in range(len(BUDGETS)):
        budget, most, flow = chosen(tau, kept=kept, **asked)
        assert budget in BUDGETS and most > 0
    for name in ("throughput", "busiest", "decodes", "prefill_share", "prefill_seconds", "seconds", "latency"):
        value = getattr(flow, name)
        assert math.isfinite(value) and value >= 0, name


@pytest.mark.parametrize("budget", [1.0, 2.0])
def test_a_budget_of_a_token_or_two(budget: float) -> None:
    flow = Flow()
    times = times_record(int(budget))
    times.found[:2] = 0.01, 0.02
    assert choose_budget(times, demand_of(seats=1.0), np.array([budget]), np.zeros(2), flow, 0) == 0
    assert math.isfinite(flow.latency) and math.isfinite(flow.throughput)


number = st.floats(1.0, 1e5)


@settings(max_examples=150)
@given(prompt=number, spread=st.floats(1.0, 20.0), output=number, rate=st.floats(0.0, 1e4), capacity=st.floats(1.0, 1e6), seats=number)
def test_nothing_is_ever_not_a_number(prompt: float, spread: float, output: float, rate: float, capacity: float, seats: float) -> None:
    asked = {"prompt": prompt, "prompt_square": spread * prompt**2, "output": output, "context": prompt + output / 2}
    _, most, flow = chosen(CHEAP_TILE, rate=rate, capacity=capacity, seats=seats, **asked)
    assert most > 0 and math.isfinite(flow.throughput) and math.isfinite(flow.latency)
