"""Action sets and observation of agents, and their step, compiled. What ``peak`` means is told in ``llmsched_env.peak``."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np

from llmsched_env.action import decode_action, decode_reserve, fill_mask
from llmsched_env.compiled import compiled
from llmsched_env.engine.residents import generated
from llmsched_env.engine.state import RUNNING, Engine
from llmsched_env.engine.step import decision_at, engine_at
from llmsched_env.env_step import env_at
from llmsched_env.forecast import Forecast
from llmsched_env.observation import encode
from llmsched_env.peak import GRID, PeakRecord, decode_peak, kv_unit, predict, run_everything
from llmsched_env.pointers import call, call_float
from llmsched_env.records import Counts, Cube, Indices, Level, Memory, Record, Vector, reader
from llmsched_env.types import ADMIT_ALL, Decision

STATICS = 7
FEATURES = len(GRID) + 6 + STATICS
HIDDEN = 5

_LOG_SCALE = 1.0 / math.log(1.0 + 1e6)
_COUNT_SCALE = 1.0 / math.log(1.0 + 1e4)
_HORIZONS = (10.0, 30.0, 100.0)

KINDS = {"admit": 0, "admit-only": 1, "reserve": 2, "peak": 3}
_ADMIT, _ADMIT_ONLY, _RESERVE, _PEAK = range(4)

HELD_ITERATIONS = 200
IDLE_ITERATIONS = 20


class AgentRecord(Record):
    """An agent in one setting: what it sees, what its actions mean, its network, and what it remembers.

    J classes, G lengths of the tables, T steps of the forecast, D numbers of an observation.
    """

    # actions
    kind: int  # of ``KINDS``
    max_admit: int
    levels: Vector  # thetas of ``reserve``, levels of ``peak``
    hold: int  # iterations for which an action stays in force
    forecast: Forecast
    # observation
    whole: int  # numbers of the environment's observation
    columns: Indices  # which of them are read
    extended: bool  # the features of ``llmsched_agents.peak`` follow
    peak: PeakRecord  # of the predictions
    boundary_rate: float  # stability boundary, requests/s
    remaining: Cube  # (J, G, 2)
    statics: Vector  # (STATICS,)
    # training
    discount: float  # seconds
    # network
    width: int  # D
    mean: Vector  # (D,)
    scale: Vector  # (D,)
    components: Indices  # sizes of the action's components
    layers: Indices  # outputs of each layer, the head's last
    weights: Vector  # weights (outputs, inputs) and biases, layer by layer
    drawn: bool  # actions are drawn rather than the likeliest
    guarded: bool
    seed: int
    # memory
    action: Counts  # the action in force
    held: Counts  # (Q,) iterations for which a queue has been held
    left: Annotated[int, Memory]  # iterations for which the action stays in force
    draws: Annotated[int, Memory]  # numbers drawn so far
    idle: Annotated[int, Memory]
    interventions: Annotated[int, Memory]


agent_at = reader(AgentRecord)
visible_at = reader(Engine, Level.VISIBLE)


# --- observation ----------------------------------------------------------------------------------------
@compiled
def _log(x: float) -> float:
    return min(math.log(1.0 + max(x, 0.0)) * _LOG_SCALE, 1.0)


@compiled
def features(engine: Engine, agent: AgentRecord, out):  # type: ignore[no-untyped-def]
    """Write the features of ``llmsched_agents.peak`` into ``out`` (FEATURES,) float32."""
    requests, queues, num_segments = engine.requests, engine.queues, engine.settings.num_segments
    remaining = agent.remaining
    capacity = engine.settings.capacity * kv_unit(engine)
    predict(engine, agent.peak)
    at = agent.peak.total.shape[0]
    for t in range(at):
        out[t] = min(agent.peak.total[t] / capacity / 2.0, 1.0)
    work = 0.0
    oldest = 0.0
    arrivals = 0.0
    for q in range(0, engine.settings.num_queues, num_segments):
        arrivals += queues.arrivals[q]
        waiting = queues.waiting[q]
        if waiting == 0:
            continue
        # The head stands for the prompts of its queue: classes are buckets by prompt length.
        j = q // num_segments
        work += waiting * (remaining[j, 0, 0] * queues.head_tokens[q] + remaining[j, 0, 1])
        oldest = max(oldest, engine.clock - queues.head_arrival[q])
    left = 0.0
    r = engine.oldest
    while r >= 0:
        j, g = requests.queue[r] // num_segments, min(generated(engine, r), remaining.shape[1] - 1)
        left += remaining[j, g, 0] * requests.prompt[r] + remaining[j, g, 1]
        r = requests.next[r]
    out[at] = _log(work / capacity)
    out[at + 1] = _log(left / capacity)
    out[at + 2] = _log(oldest / 0.01)
    out[at + 3] = min(math.log(1.0 + engine.num_residents) * _COUNT_SCALE, 1.0)
    out[at + 4] = min(math.log(1.0 + engine.num_waiting) * _COUNT_SCALE, 1.0)
    seconds = engine.rate_seconds
    out[at + 5] = min(arrivals / seconds / (2.0 * agent.boundary_rate), 1.0) if seconds > 0.0 else 0.0
    for i in range(agent.statics.shape[0]):
        out[at + 6 + i] = agent.statics[i]


@compiled
def _work(prompt: int, tokens: int, output: int) -> float:
    return (output - tokens) * prompt + (output * (output + 1.0) - tokens * (tokens + 1.0)) / 2.0


@compiled
def hidden_features(engine: Engine, agent: AgentRecord, out):  # type: ignore[no-untyped-def]
    """Write what a critic may know in training into ``out`` (HIDDEN,) float32."""
    requests, hidden = engine.requests, engine.hidden
    capacity = engine.settings.capacity * kv_unit(engine)
    resident = 0.0
    r = engine.oldest
    while r >= 0:
        resident += _work(requests.prompt[r], generated(engine, r), hidden.output[r])
        r = requests.next[r]
    outside = 0.0
    for q in range(0, engine.settings.num_queues, engine.settings.num_segments):
        r = engine.queues.head[q]
        while r >= 0:
            outside += _work(requests.prompt[r], requests.base_generated[r], hidden.output[r])
            r = requests.next[r]
    out[0] = _log(resident / capacity)
    out[1] = _log(outside / capacity)
    first = engine.next_arrival
    i = first
    for h in range(3):
        while i < engine.num_requests and hidden.arrival[i] <= engine.clock + _HORIZONS[h]:
            i += 1
        out[2 + h] = min((i - first) / (3.0 * agent.boundary_rate * _HORIZONS[h]), 1.0)


@compiled
def observe(engine: Engine, agent: AgentRecord, out, legal):  # type: ignore[no-untyped-def]
    """Write the observation and the mask: columns of the environment's numbers, then the features. Returns how many."""
    columns, forecast = agent.columns, agent.forecast
    width = columns.shape[0]
    everything = np.empty(agent.whole, dtype=np.float32)
    encode(engine, forecast, everything)
    for i in range(width):
        out[i] = everything[columns[i]]
    if agent.extended != 0:
        features(engine, agent, out[width:])
        width += FEATURES
    if agent.kind == _ADMIT:
        fill_mask(engine, agent.max_admit, legal)
    elif agent.kind == _ADMIT_ONLY:
        longest = 0
        for q in range(0, engine.settings.num_queues, engine.settings.num_segments):
            longest = max(longest, engine.queues.waiting[q])
        for n in range(agent.max_admit):
            legal[n] = n <= longest
        legal[agent.max_admit] = longest > 0
    else:
        for n in range(legal.shape[0]):
            legal[n] = True
    return width


@compiled
def observe_all(engine: Engine, agent: AgentRecord, out, legal):  # type: ignore[no-untyped-def]
    """``observe``, then hidden numbers where ``out`` has room: training alone."""
    width = observe(engine, agent, out, legal)
    if out.shape[0] > width:
        hidden_features(engine, agent, out[width:])


@compiled
def decode_agent(engine: Engine, agent: AgentRecord, action, decision: Decision):  # type: ignore[no-untyped-def]
    """Write the decision of an action (W,) int64 of any action set."""
    if agent.kind == _ADMIT:
        decode_action(action, engine.settings.num_queues, agent.max_admit, decision)
    elif agent.kind == _ADMIT_ONLY:
        for q in range(engine.settings.num_queues):
            outside = q % engine.settings.num_segments == 0
            decision.run[q] = 1
            decision.admit[q] = action[0] if outside and action[0] < agent.max_admit else ADMIT_ALL
    elif agent.kind == _RESERVE:
        decode_reserve(engine, agent.levels[action[0]], agent.forecast, decision)
    else:
        decode_peak(engine, agent.peak, agent.levels[action[0]], decision)


# --- entries -------------------------------------------------------------------------------------------
@compiled
def observe_at(engine: Any, agent: Any, out, legal):  # type: ignore[no-untyped-def]
    """``observe`` of handles."""
    observe(visible_at(engine), agent_at(agent), out, legal)


@compiled
def observe_all_at(engine: Any, agent: Any, out, legal):  # type: ignore[no-untyped-def]
    """``observe_all`` of handles."""
    observe_all(engine_at(engine), agent_at(agent), out, legal)


@compiled
def decode_at(engine: Any, agent: Any, action, decision: Any):  # type: ignore[no-untyped-def]
    """``decode_agent`` of handles."""
    decode_agent(visible_at(engine), agent_at(agent), action, decision_at(decision))


@compiled
def advance_range(first, last, handles, actions, observations, masks, results, ends):  # type: ignore[no-untyped-def]
    """``hold`` iterations of engines ``first`` .. ``last`` - 1 under their actions, fewer where the episode ends.

    Args:
        handles: (N, 4): engine, environment, decision, agent.
        actions: (N, W) int64.
        observations, masks: (N, ..), written.
        results: (N, 2) float64, written: reward discounted to the start of the step, exp(-t / discount) for an iteration that
            starts t seconds after it; seconds of the step.
        ends: (N,) int64 END_*, written.
    """
    for i in range(first, last):
        engine, env = engine_at(handles[i, 0]), env_at(handles[i, 1])
        decision, agent = decision_at(handles[i, 2]), agent_at(handles[i, 3])
        total = 0.0
        elapsed = 0.0
        for _ in range(agent.hold):
            decode_agent(engine, agent, actions[i], decision)
            call(engine.code.step, engine, decision)
            reward = call_float(env.reward, engine, env.reward_numbers)
            total += reward if elapsed == 0.0 else reward * np.exp(-elapsed / agent.discount)
            elapsed += engine.report.duration
            env.episode_return += reward
            env.episode_length += 1
            if engine.end != RUNNING:
                break
        results[i, 0] = total
        results[i, 1] = elapsed
        ends[i] = engine.end
        observe_all(engine, agent, observations[i], masks[i])


@compiled
def carry_on(handles, tried, follow, deviate, horizon):  # type: ignore[no-untyped-def]
    """What an action costs from here: minus the reward. The engine is left where this ends.

    Action ``tried`` (1,) for ``deviate`` seconds, then ``follow`` (1,). After ``horizon`` seconds nothing
    arrives any more and the engine works off what it has: a policy that leaves work behind pays for it.
    ``handles``: (4,) as in ``advance_range``.
    """
    engine, env = engine_at(handles[0]), env_at(handles[1])
    decision, agent = decision_at(handles[2]), agent_at(handles[3])
    start = engine.clock
    total = 0.0
    elapsed = 0.0
    while engine.end == RUNNING:
        if elapsed >= horizon:
            engine.next_arrival = engine.num_requests
            if engine.num_waiting + engine.num_residents == 0:
                break
        decode_agent(engine, agent, tried if elapsed < deviate else follow, decision)
        call(engine.code.step, engine, decision)
        total -= call_float(env.reward, engine, env.reward_numbers)
        elapsed = engine.clock - start
    return total


# --- an agent as a rule (``llmsched_env.engine.rules``) -------------------------------------------------
@compiled
def _uniform(agent: AgentRecord) -> float:
    """The next number in [0, 1) of SplitMix64 (Steele, Lea, Flood 2014), whose state is seed + draws x golden ratio."""
    agent.draws += 1
    z = np.uint64(agent.seed) + np.uint64(agent.draws) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) / 9007199254740992.0


@compiled
def network_logits(agent: AgentRecord, observed):  # type: ignore[no-untyped-def]
    """``llmsched_agents.network.Network.logits`` of one observation."""
    weights, layers = agent.weights, agent.layers
    values = np.empty(agent.width)
    for i in range(agent.width):
        scaled = (observed[i] - agent.mean[i]) * agent.scale[i]
        values[i] = min(max(scaled, -5.0), 5.0)
    at = 0
    for k in range(layers.shape[0]):
        outputs = layers[k]
        following = np.empty(outputs)
        for o in range(outputs):
            total = weights[at + outputs * values.shape[0] + o]
            for i in range(values.shape[0]):
                total += weights[at + o * values.shape[0] + i] * values[i]
            following[o] = total if k == layers.shape[0] - 1 else math.tanh(total)
        at += outputs * (values.shape[0] + 1)
        values = following
    return values


@compiled
def choose_action(agent: AgentRecord, values, legal):  # type: ignore[no-untyped-def]
    """The action of these logits into ``agent.action``: the likeliest legal one, or a draw from their softmax."""
    first = 0
    for c in range(agent.components.shape[0]):
        size = agent.components[c]
        best = -1
        for n in range(size):
            if legal[first + n] and (best < 0 or values[first + n] > values[first + best]):
                best = n
        if agent.drawn != 0:
            top = values[first + best]
            total = 0.0
            for n in range(size):
                if legal[first + n]:
                    total += math.exp(values[first + n] - top)
            left = _uniform(agent) * total
            for n in range(size):
                if legal[first + n]:
                    best = n
                    left -= math.exp(values[first + n] - top)
                    if left < 0.0:
                        break
        agent.action[c] = best
        first += size


@compiled
def _guard(engine: Engine, agent: AgentRecord, decision: Decision) -> None:
    """No likeliest choice holds for ever (``llmsched_agents.agent.Agent``)."""
    queues, num_segments = engine.queues, engine.settings.num_segments
    held = agent.held
    active = False
    present = False
    freed = False
    for q in range(engine.settings.num_queues):
        residents, waiting = queues.residents[q], queues.waiting[q]
        boundary = q % num_segments != 0
        stuck = (decision.run[q] == 0 and residents > 0) or (boundary and decision.admit[q] == 0 and waiting > 0)
        held[q] = held[q] + 1 if stuck else 0
        if held[q] > HELD_ITERATIONS:
            held[q] = 0
            freed = True
            decision.run[q] = 1
            if boundary:
                decision.admit[q] = ADMIT_ALL
        active = active or (decision.run[q] != 0 and residents > 0) or (decision.admit[q] > 0 and waiting > 0)
        present = present or residents > 0 or waiting > 0
    agent.idle = agent.idle + 1 if present and not active else 0
    if agent.idle > IDLE_ITERATIONS:
        agent.idle = 0
        freed = True
        run_everything(engine, True, decision)
    if freed:
        agent.interventions += 1


@compiled
def agent_rule(engine: Engine, agent: AgentRecord, decision: Decision) -> None:
    """One decision of an agent: a look at the engine and a choice every ``hold`` iterations, and what it means now."""
    if agent.left == 0:
        total = 0
        for c in range(agent.components.shape[0]):
            total += agent.components[c]
        observed = np.empty(agent.width, dtype=np.float32)
        legal = np.empty(total, dtype=np.bool_)
        observe(engine, agent, observed, legal)
        choose_action(agent, network_logits(agent, observed), legal)
        agent.left = agent.hold
    agent.left -= 1
    decode_agent(engine, agent, agent.action, decision)
    for q in range(engine.settings.num_queues):
        decision.evict[q] = 0
    if agent.guarded != 0:
        _guard(engine, agent, decision)
