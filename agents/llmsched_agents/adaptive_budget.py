"""The token budget that a fluid model of the engine recommends, compiled.

n requests decode, and at the rate at which they end others must be prefilled: n E[p] / E[o] prompt tokens an iteration. Of all iterations
a share f computes prompts, with a batch as large as the budget B, and the others only decode:

    f = (n E[p] / E[o]) / (B - n),   tau = f tau(B) + (1 - f) tau(n),   throughput X = n / (E[o] tau).

Memory, the engine's seats and f <= 1 bound n; the largest throughput within them is X(B). At a rate of lambda requests/s below it, n is
the smallest number with that throughput, and the latency to expect is, by Little's law and with the time T that a prompt takes,

    J(B) = n / lambda + (1 + CROWDED f) T + STEEP S max(0, lambda / X(B) - FULL),

whose last term stands for a queue that grows; S is the least n / lambda of all budgets. The smallest J is taken. Where no budget has
the throughput, fewer residents than there is room for are looked at, too: each is served sooner, the queue grows faster, and as the
longest wait, that may cost less; once somebody has waited for too long, OVERDUE stands in place of STEEP. What waits counts as a rate: it
is to be worked off within a time of its own. The constants were chosen on seeds of the tuning stream, with three calibrations.
"""

from __future__ import annotations

import math

from llmsched_agents.adaptive_times import TimesRecord, seconds_of
from llmsched_env.compiled import compiled
from llmsched_env.records import Record, Vector

FULL = 1.0
STEEP = 16.0
CROWDED = 3.0
OVERDUE = 400.0
"""In place of STEEP once somebody has waited for longer than ``patience``."""
FILLED = 0.97
"""Share of the KV capacity that can be filled."""
STAYS = 0.99
"""A budget gives way to another whose J is below this share of its own."""
HALVINGS = 20


class Demand(Record):
    """What arrives, and what bounds the engine."""

    rate: float  # requests/s, what waits included
    prompt: float  # E[p], tokens
    prompt_square: float
    output: float  # E[o]
    context: float  # mean context of a decode, tokens
    extra: float  # tokens that a resident takes beyond its own
    capacity: float  # tokens
    seats: float
    overdue: bool  # somebody has waited so long that the queue must not grow any further


class Flow(Record):
    """What the model says of one budget."""

    throughput: float  # X(B), requests/s
    busiest: float  # n at X(B)
    decodes: float  # n at the rate asked for
    prefill_share: float  # f there
    prefill_seconds: float  # T there
    seconds: float  # tau there
    latency: float  # n / rate
    most: float  # residents at most


@compiled
def visit(times: TimesRecord, demand: Demand, budget: float, n: float, flow: Flow) -> float:
    """Throughput with n decodes, 0 where prompts could not be prefilled so fast; f, T and tau go into ``flow``."""
    work = demand.prompt_square / (2.0 * demand.prompt)
    room = budget - n
    share = n * demand.prompt / demand.output / room if room > 0.0 else 2.0
    flow.prefill_share = share
    if share > 1.0:
        flow.prefill_seconds = 0.0
        flow.seconds = 0.0
        return 0.0
    whole = seconds_of(times, n, demand.context, room, work)
    flow.seconds = share * whole + (1.0 - share) * seconds_of(times, n, demand.context, 0.0, 0.0)
    flow.prefill_seconds = demand.prompt / room * whole
    return n / demand.output / flow.seconds


@compiled
def memory_of(times: TimesRecord, demand: Demand, budget: float, n: float, flow: Flow) -> float:
    """Tokens of KV memory that n decodes take, and the prompts that are being prefilled meanwhile."""
    throughput = visit(times, demand, budget, n, flow)
    prefilling = throughput * flow.prefill_seconds * demand.prompt_square / demand.prompt
    return n * (demand.context + demand.extra) + prefilling


@compiled
def most_decodes(times: TimesRecord, demand: Demand, budget: float, flow: Flow) -> float:
    """The largest n within memory, seats and budget."""
    most = min(budget / (1.0 + demand.prompt / demand.output) * 0.999, demand.seats, budget - 1.0)
    limit = FILLED * demand.capacity
    if memory_of(times, demand, budget, most, flow) <= limit:
        return most
    low = 0.0
    for _ in range(HALVINGS):
        middle = 0.5 * (low + most)
        if memory_of(times, demand, budget, middle, flow) > limit:
            most = middle
        else:
            low = middle
    return most


@compiled
def solve(times: TimesRecord, demand: Demand, budget: float, flow: Flow) -> None:
    """What the model says of a budget at the residents that ``flow.busiest`` allows, into ``flow``."""
    most = most_decodes(times, demand, budget, flow)
    flow.busiest = most
    flow.throughput = visit(times, demand, budget, most, flow)
    for i in range(3, 10):  # more residents are not always more throughput
        n = most * i / 10.0
        throughput = visit(times, demand, budget, n, flow)
        if throughput > flow.throughput:
            flow.throughput, flow.busiest = throughput, n
    high = flow.busiest
    if demand.rate < flow.throughput:
        low = 0.0
        for _ in range(HALVINGS):
            middle = 0.5 * (low + high)
            if visit(times, demand, budget, middle, flow) < demand.rate:
                low = middle
            else:
                high = middle
    flow.decodes = high
    visit(times, demand, budget, high, flow)
    flow.latency = demand.output * flow.seconds  # n / X, at any rate


@compiled
def cost_of(times: TimesRecord, demand: Demand, budget: float, n: float, throughput: float, least: float, flow: Flow) -> float:
    """J with n decodes, whose throughput is at most the rate; ``throughput`` is the largest of the budget, or that of n below the rate."""
    visit(times, demand, budget, n, flow)
    overload = max(demand.rate / max(throughput, 1e-9) - FULL, 0.0)
    steep = OVERDUE if demand.overdue != 0 else STEEP
    return demand.output * flow.seconds + (1.0 + CROWDED * flow.prefill_share) * flow.prefill_seconds + steep * least * overload


@compiled
def choose_budget(times: TimesRecord, demand: Demand, budgets: Vector, costs: Vector, flow: Flow, kept: int) -> int:
    """Index of the budget to take, and the residents at most in ``flow.most``; ``kept`` is the one in force.

    Args:
        budgets: (B,) tokens, increasing.
        costs: (2 B,) scratch.
    """
    count = budgets.shape[0]
    least = math.inf
    for i in range(count):
        solve(times, demand, budgets[i], flow)
        least = min(least, flow.latency)
    for i in range(count):
        solve(times, demand, budgets[i], flow)
        whole, n = flow.busiest, flow.decodes
        costs[i] = cost_of(times, demand, budgets[i], n, flow.throughput, least, flow)
        costs[count + i] = math.inf
        if demand.rate >= flow.throughput:  # fewer residents are served sooner, and a little fewer of them
            for k in range(4, 10):
                fewer = whole * k / 10.0
                throughput = visit(times, demand, budgets[i], fewer, flow)
                cost = cost_of(times, demand, budgets[i], fewer, throughput, least, flow)
                if cost < costs[i]:
                    costs[i] = cost
                    costs[count + i] = fewer
    best = kept
    for i in range(count):
        if costs[i] < costs[best]:
            best = i
    if costs[best] > STAYS * costs[kept]:
        best = kept
    flow.most = costs[count + best]
    return best
