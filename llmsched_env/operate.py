"""Admission of the most urgent first: predicted memory, token budget and ageing.

Residents are predicted as in ``llmsched_env.peak``, and requests enter from outside while the peak stays within level * C. Who enters
first is decided by one number: with w_j the work to expect of a request of class j, a request that has waited t seconds has the priority

    (t + tau0) / w_j,    the highest first.

An infinite tau0 is least expected work first, whatever anybody has waited. At tau0 = 0 the one enters that has waited longest for
its work. Between the two, tau0 says after how many seconds waiting counts as much as being short: of two classes whose works
are as 1 to r, a request of the longer one overtakes a newcomer of the shorter once it has waited (r - 1) tau0.

Within a class requests enter in the order of its queue, so the candidates are the heads of the outside queues; once a head has
entered the next one counts, with its own wait. A preempted request counts as one of its class, from its arrival on.

The walk asks for no more than can begin in this iteration: as many requests as the token budget has tokens, residents included, and not
beyond ``max_num_seqs`` or the tokens that the residents leave of the budget. More would not enter, and which of them did would be
decided by the engine's own order of admission. An empty engine takes the first request whatever it is expected to need.
"""

from __future__ import annotations

import math

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import start_of_queues
from llmsched_env.engine.state import NO_END, PREFILL, Engine
from llmsched_env.engine.step import budget_of
from llmsched_env.peak import PeakRecord, adds_within, kv_unit, predict, run_everything, take_over
from llmsched_env.records import Vector
from llmsched_env.types import Decision


@compiled
def most_urgent(engine: Engine, cost: Vector, tau0: float) -> int:
    """The outside queue whose next request of the walk (``queues.left``) has the highest priority, the first of equals; -1: nobody is left.

    Args:
        cost: (J,) work of a request of each class, > 0, in any unit.
        tau0: seconds, >= 0.
    """
    queues, num_segments = engine.queues, engine.settings.num_segments
    best = -1
    highest = -math.inf
    for q in range(0, engine.settings.num_queues, num_segments):
        r = queues.left[q]
        if r < 0:
            continue
        work = cost[q // num_segments]
        priority = -work if tau0 == math.inf else (engine.clock - engine.arrived.time[r] + tau0) / work
        if best < 0 or priority > highest:
            best, highest = q, priority
    return best


@compiled
def seats_left(engine: Engine, budget: int) -> int:
    """Requests that may still become residents: each has a token of the budget, and the engine has a cap (none in the ``paper`` preset)."""
    if engine.settings.paper != 0:
        return NO_END
    return min(budget, engine.settings.most_active) - engine.num_residents


@compiled
def tokens_left(engine: Engine, budget: int) -> int:
    """Tokens that residents leave of the budget if all of them run; all there are where something else decides who begins."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    if settings.paper != 0 or settings.padded_prefill != 0 or settings.prefix_caching != 0:
        return NO_END
    left = budget - engine.num_boundary
    for q in range(settings.num_queues):
        left -= queues.members[q]
    r = queues.first_peer[settings.num_queues]
    while r >= 0:
        prompt = requests.target[r] - requests.base_computed[r] if requests.status[r] == PREFILL else 1
        left -= min(prompt, settings.long_prefill) if settings.long_prefill > 0 else prompt
        r = requests.next_peer[r]
    return left


@compiled
def decode_operate(engine: Engine, peak: PeakRecord, level: float, cost: Vector, tau0: float, decision: Decision) -> None:
    """Write the decision of this level, requests entering by priority. ``decision.token_budget`` is read: it is set before.

    Args:
        level: share of the KV capacity that the predicted peak may reach; infinite: only the memory of now counts.
        cost: (J,) work of a request of each class, > 0, in any unit.
        tau0: seconds, >= 0; infinite: least work first.
    """
    decode_operate_up_to(engine, peak, level, cost, tau0, math.inf, decision)


@compiled
def decode_operate_up_to(
    engine: Engine, peak: PeakRecord, level: float, cost: Vector, tau0: float, most: float, decision: Decision
) -> None:
    """``decode_operate`` with at most so many residents; an empty engine takes a request all the same."""
    seats, tokens = begin_entry(engine, decision)
    if most < math.inf:
        seats = min(seats, int(max(most, 1.0)) - engine.num_residents)
    if seats <= 0 or tokens <= 0:
        return
    predict(engine, peak)
    start_of_queues(engine)
    q = most_urgent(engine, cost, tau0)
    entered = 0
    while q >= 0 and entered < seats and tokens > 0:
        prompt = enter(engine, peak, level, q, entered, decision)
        if prompt < 0:
            return
        entered += 1
        tokens -= prompt
        q = most_urgent(engine, cost, tau0)


# --- for every walk that asks for no more than can begin now -------------------------------------------
@compiled
def begin_entry(engine: Engine, decision: Decision) -> tuple[int, int]:
    """Everything runs, nobody enters yet. Returns the seats and the tokens that are left; none where nobody waits."""
    run_everything(engine, False, decision)
    if engine.num_waiting == 0:
        return 0, 0
    budget = budget_of(engine, decision)
    return seats_left(engine, budget), tokens_left(engine, budget)


@compiled
def enter(engine: Engine, peak: PeakRecord, level: float, q: int, entered: int, decision: Decision) -> int:
    """The next request of outside queue q's walk enters, if it fits. Returns the tokens that it can compute now, -1 where it does not fit.

    Args:
        level: as of ``decode_operate``.
        entered: requests that have entered before in this walk; the first of an empty engine always fits.
    """
    requests, settings = engine.requests, engine.settings
    capacity = settings.capacity * kv_unit(engine)
    r = engine.queues.left[q]
    fits = adds_within(engine, peak, r, q, level * capacity) and (level < math.inf or peak.own[0] <= capacity)
    if not fits and engine.num_residents + entered > 0:
        return -1
    take_over(peak)
    decision.admit[q] += 1
    engine.queues.left[q] = requests.next[r]
    prompt = int(requests.prompt[r] + requests.base_generated[r])
    return min(prompt, settings.long_prefill) if settings.long_prefill > 0 else prompt
