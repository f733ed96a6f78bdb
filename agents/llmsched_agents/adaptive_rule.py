"""The agent ``adaptive`` as one compiled rule: it learns from what the engine shows, and decides how to operate it.

In every iteration requests enter by ``llmsched_env.operate.decode_operate_up_to``; what that reads is set every few seconds from what
has been learned: the lengths (``adaptive_lengths``), the iteration times (``adaptive_times``) and the rate and mix of arrivals.
"""

from __future__ import annotations

import math
from typing import Annotated

from llmsched_agents.adaptive_budget import Demand, Flow, choose_budget
from llmsched_agents.adaptive_lengths import LengthsRecord, fill_forecast, forget_lengths, learn_lengths, note_completions, refine_steps
from llmsched_agents.adaptive_times import UNITS, TimesRecord, forget_times, learn_times, note_iteration, seconds_of
from llmsched_env.compiled import compiled
from llmsched_env.engine.state import RATE_WINDOW_SECONDS, Engine
from llmsched_env.operate import decode_operate_up_to
from llmsched_env.peak import PeakRecord, kv_unit
from llmsched_env.perf.batch import BatchSums
from llmsched_env.records import Memory, Record, Vector
from llmsched_env.types import Decision

EVERY_ITERATIONS = 64
EVERY_SECONDS = 2.0
"""Both must have passed before anything is set again."""
RATE_SECONDS = 60.0
"""Time constant of the rate and of the mix of arrivals."""
TRIALS = 2
"""Iterations with each token budget at the start, so that its time is known."""
PROMPT_WEIGHT = 2.0
"""What a prompt's time counts for in the order of admission, against the memory that a request takes: prefill holds everybody up."""


class AdaptiveRecord(Record):
    """The agent in one engine. J classes, B token budgets."""

    level: float  # share of the KV capacity that the predicted peak may reach
    tau0: float  # seconds, of ageing
    patience: float  # seconds that somebody may wait before the queue must not grow any further
    drain: float  # seconds within which what waits is to be worked off
    chunked: bool  # the token budget is free to choose
    late_times: bool  # the seconds seen are of the batch before the one seen (asynchronous scheduling)
    prompt: Vector  # (J,) tokens of a request of the class
    budgets: Vector  # (B,) tokens, the last the engine's own
    costs: Vector  # (2 B,) scratch
    before: BatchSums  # the last batch seen, where ``late_times``
    steps: Vector  # (T,) of the forecast while nothing is known
    lengths: LengthsRecord
    times: TimesRecord
    demand: Demand
    flow: Flow
    peak: PeakRecord
    cost: Vector  # (J,) work of a request of the class, seconds
    arrivals: Annotated[Vector, Memory]  # (J,) of the class, each decayed with RATE_SECONDS
    window: Annotated[Vector, Memory]  # (J,) ``queues.arrivals`` when last seen
    tried: Annotated[Vector, Memory]  # (B,) iterations with that many tokens
    untried: Annotated[int, Memory]  # 1: the time of some budget is not known yet
    begun: Annotated[int, Memory]
    choice: Annotated[int, Memory]  # index of the budget in force
    since: Annotated[int, Memory]  # iterations since anything was set
    set_at: Annotated[float, Memory]  # clock then
    seen_at: Annotated[float, Memory]  # clock at which arrivals were counted last
    rate_seconds: Annotated[float, Memory]  # length of the window of ``arrivals``


@compiled
def adaptive_rule(engine: Engine, policy: AdaptiveRecord, decision: Decision) -> None:
    """Learn from the last step, set what is due, decide."""
    if policy.begun == 0:
        begin(engine, policy)
    note_completions(engine, policy.lengths)
    note_time(engine, policy)
    policy.since += 1
    if policy.since >= EVERY_ITERATIONS and engine.clock - policy.set_at >= EVERY_SECONDS:
        set_again(engine, policy)
    decision.token_budget = 0 if policy.chunked == 0 else int(policy.budgets[budget_to_try(engine, policy)])
    decode_operate_up_to(engine, policy.peak, policy.level, policy.cost, policy.tau0, policy.flow.most, decision)


@compiled
def note_time(engine: Engine, policy: AdaptiveRecord) -> None:
    """Learn from the iteration that has ended: the batch in the record, or under asynchronous scheduling the one scheduled before it."""
    batch, ended, before = engine.batch, engine.report.idle == 0 and engine.last_iteration > 0.0, policy.before
    if policy.late_times == 0:
        if ended and batch.batch_size > 0.0:
            note_iteration(policy.times, batch, engine.last_iteration)
            note_trial(policy, batch.decodes + batch.prefill_tokens)
        return
    if ended and before.batch_size > 0.0:
        note_iteration(policy.times, before, engine.last_iteration)
        note_trial(policy, before.decodes + before.prefill_tokens)
    before.decodes = batch.decodes
    before.decode_kv = batch.decode_kv
    before.prefill_tokens = batch.prefill_tokens
    before.prefill_work = batch.prefill_work
    before.prefill_context = batch.prefill_context
    before.batch_size = batch.batch_size


@compiled
def begin(engine: Engine, policy: AdaptiveRecord) -> None:
    """The start of an episode: nothing is known."""
    policy.begun = 1
    policy.before.batch_size = 0.0
    policy.untried = 1
    policy.choice = policy.budgets.shape[0] - 1
    policy.set_at = -math.inf
    policy.flow.most = math.inf
    forget_lengths(policy.lengths)
    forget_times(policy.times)
    learn_lengths(engine, policy.lengths)
    for t in range(policy.steps.shape[0]):
        policy.peak.steps[t] = policy.steps[t]
    fill_forecast(policy.lengths, policy.peak.steps, policy.peak.survival)
    for t in range(policy.peak.total.shape[0]):
        policy.peak.total[t] = 0.0
    for j in range(policy.cost.shape[0]):
        policy.cost[j] = policy.prompt[j] + 3.0 * policy.lengths.mean[policy.lengths.group[j]]


@compiled
def note_trial(policy: AdaptiveRecord, tokens: float) -> None:
    """Count an iteration with about as many tokens as a budget that has not been tried often enough."""
    if policy.untried == 0:
        return
    policy.untried = 0
    for i in range(policy.budgets.shape[0]):
        if abs(tokens - policy.budgets[i]) <= 0.02 * policy.budgets[i]:
            policy.tried[i] += 1.0
        if policy.tried[i] < TRIALS:
            policy.untried = 1


@compiled
def budget_to_try(engine: Engine, policy: AdaptiveRecord) -> int:
    """The budget in force, or while there is work for it one whose time is not known yet."""
    if policy.untried == 0 or engine.num_waiting + engine.num_prefilling == 0:
        return policy.choice
    for i in range(policy.budgets.shape[0]):
        if policy.tried[i] < TRIALS and engine.num_residents < policy.budgets[i]:
            return i if pending_tokens(engine, policy) + engine.num_residents >= policy.budgets[i] else policy.choice
    return policy.choice


@compiled
def pending_tokens(engine: Engine, policy: AdaptiveRecord) -> float:
    """Prompt tokens that could be computed now, about: of those being prefilled, and of the heads of the outside queues as far as the
    forecast of the last decision left room. Without the room a budget that memory never fills would be tried for ever in an overload."""
    requests, queues, settings, peak = engine.requests, engine.queues, engine.settings, policy.peak
    room = policy.level * settings.capacity * kv_unit(engine)
    held = 0.0
    for t in range(peak.total.shape[0]):
        held = max(held, peak.total[t])
    tokens = 0.0
    for q in range(0, settings.num_queues, settings.num_segments):
        tokens += queues.head_tokens[q]
    tokens = min(tokens, max(room - held, 0.0))
    r = queues.first_peer[settings.num_queues]
    while r >= 0:
        tokens += max(requests.target[r] - requests.base_computed[r], 0)
        r = requests.next_peer[r]
    return tokens


@compiled
def count_arrivals(engine: Engine, policy: AdaptiveRecord) -> None:
    """Arrivals by class with a longer memory than the engine's own (``queues.arrivals``)."""
    queues, num_segments = engine.queues, engine.settings.num_segments
    seconds = engine.clock - policy.seen_at
    short, long = math.exp(-seconds / RATE_WINDOW_SECONDS), math.exp(-seconds / RATE_SECONDS)
    # What arrived evenly since then has decayed on average to this share.
    share = (1.0 - short) * RATE_WINDOW_SECONDS / seconds if seconds > 0.0 else 1.0
    for j in range(policy.arrivals.shape[0]):
        now = queues.arrivals[j * num_segments]
        new = max(now - policy.window[j] * short, 0.0) / share
        policy.window[j] = now
        policy.arrivals[j] = policy.arrivals[j] * long + new
    policy.rate_seconds = policy.rate_seconds * long + RATE_SECONDS * (1.0 - long)
    policy.seen_at = engine.clock


@compiled
def describe_demand(engine: Engine, policy: AdaptiveRecord) -> None:
    """What arrives, into ``demand``."""
    demand, lengths = policy.demand, policy.lengths
    total = 0.0
    prompt = 0.0
    prompt_square = 0.0
    output = 0.0
    held = 0.0
    for j in range(policy.arrivals.shape[0]):
        count, own, g = policy.arrivals[j], policy.prompt[j], lengths.group[j]
        total += count
        prompt += count * own
        prompt_square += count * own * own
        output += count * lengths.mean[g]
        held += count * (own * lengths.mean[g] + 0.5 * lengths.square[g])
    total = max(total, 1e-9)
    demand.prompt = max(prompt / total, 1.0)
    demand.prompt_square = max(prompt_square / total, 1.0)
    demand.output = max(output / total, 1.0)
    demand.context = held / max(output, 1e-9)
    demand.rate = total / max(policy.rate_seconds, 1.0) + engine.num_waiting / policy.drain
    demand.extra = policy.peak.headroom
    demand.capacity = engine.settings.capacity * kv_unit(engine)
    demand.seats = float(engine.settings.most_active)
    demand.overdue = longest_wait(engine) > policy.patience


@compiled
def longest_wait(engine: Engine) -> float:
    """Seconds that the oldest head of an outside queue has waited."""
    queues, settings = engine.queues, engine.settings
    longest = 0.0
    for q in range(0, settings.num_queues, settings.num_segments):
        if queues.head[q] >= 0:
            longest = max(longest, engine.clock - queues.head_arrival[q])
    return longest


@compiled
def set_again(engine: Engine, policy: AdaptiveRecord) -> None:
    """Forecast, budget and order of admission from what has been learned so far."""
    policy.since = 0
    policy.set_at = engine.clock
    count_arrivals(engine, policy)
    learn_lengths(engine, policy.lengths)
    if engine.settings.lose_progress != 0:  # an eviction costs all that was computed: the peak must not slip between two steps
        refine_steps(policy.lengths, policy.peak.steps)
    fill_forecast(policy.lengths, policy.peak.steps, policy.peak.survival)
    learn_times(policy.times)
    describe_demand(engine, policy)
    if policy.times.iterations < EVERY_ITERATIONS / 2:
        return
    if policy.chunked != 0:
        policy.choice = choose_budget(policy.times, policy.demand, policy.budgets, policy.costs, policy.flow, policy.choice)
    set_costs(engine, policy)


@compiled
def set_costs(engine: Engine, policy: AdaptiveRecord) -> None:
    """What a request of each class costs: the time of its prompt, and its share of the memory for the iterations it stays."""
    times, demand, lengths = policy.times, policy.demand, policy.lengths
    n = min(float(max(engine.num_residents, 1)), demand.seats)
    budget = policy.budgets[policy.choice]
    room = max(budget - n, 0.1 * budget)
    alone = seconds_of(times, n, demand.context, 0.0, 0.0)
    together = seconds_of(times, n, demand.context, room, 0.0)
    prompt = PROMPT_WEIGHT * max((together - alone) / room, 1e-9)
    square = PROMPT_WEIGHT * 0.5 * max(times.found[times.knots.shape[0] + 1] * UNITS[1], 0.0)
    held = 0.5 * (alone + together) / demand.capacity
    for j in range(policy.cost.shape[0]):
        own, g = policy.prompt[j], lengths.group[j]
        policy.cost[j] = (prompt + square * own) * own + held * (own * lengths.mean[g] + 0.5 * lengths.square[g])
