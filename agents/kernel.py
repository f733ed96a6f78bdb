"""Action sets and observation of agents, and their step, compiled.

All in one file: numba notices that a cached function must be compiled again when its own file
changes, not when that of a function it calls does. What ``peak`` means is told in ``agents.peak``.
"""

from __future__ import annotations

import math

import numpy as np
from numba import prange

from llmsched_env.action import decode_action, decode_reserve, fill_mask
from llmsched_env.compiled import compiled, parallel
from llmsched_env.engine import state as st
from llmsched_env.engine.batch import reward_of
from llmsched_env.engine.kernel import step
from llmsched_env.engine.moves import next_in_order, start_of_queues
from llmsched_env.observation import encode
from llmsched_env.types import ADMIT_ALL

GRID = (0, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Iterations ahead at which the KV is predicted, where outputs are long enough (``agents.peak.forecast_steps``)."""

STATICS = 7
FEATURES = len(GRID) + 6 + STATICS
HIDDEN = 5

_LOG_SCALE = 1.0 / math.log(1.0 + 1e6)
_COUNT_SCALE = 1.0 / math.log(1.0 + 1e4)
_HORIZONS = (10.0, 30.0, 100.0)

KINDS = {"admit": 0, "admit-only": 1, "reserve": 2, "peak": 3}
_ADMIT, _ADMIT_ONLY, _RESERVE, _PEAK = range(4)


@compiled
def predict(headroom, steps, survival, size, settings, slots, scalars, out):  # type: ignore[no-untyped-def]
    """Write the expected KV (tokens) of the residents at each of ``steps`` into ``out`` (T,)."""
    num_segments = settings[st.C_SEGMENTS]
    out[:] = 0.0
    for i in range(scalars[st.I_RESIDENTS]):
        generated = slots[st.S_GENERATED, i]
        held = slots[st.S_PROMPT, i] + generated + headroom
        left = survival[slots[st.S_QUEUE, i] // num_segments, min(generated, size - 1)]
        for t in range(out.shape[0]):
            out[t] += left[t] * (held + steps[t])


@compiled
def decode_peak(level, headroom, steps, survival, size, settings, requests, slots, queues, scalars, scratch, decision):  # type: ignore[no-untyped-def]
    """Write the decision of this level; ``scratch`` is (2, T) float64, the queues' scratch row holds the next request to look at."""
    num_queues, num_segments = queues.shape[1], settings[st.C_SEGMENTS]
    for q in range(num_queues):
        decision[0, q] = 1
        decision[1, q] = 0 if q % num_segments == 0 and level < math.inf else ADMIT_ALL
    if level == math.inf or scalars[st.I_WAITING] == 0:
        return
    unit = 1.0 if settings[st.C_PRESET] == st.PRESET_PAPER else float(settings[st.C_BLOCK_SIZE])
    limit = level * settings[st.C_CAPACITY] * unit
    total, own = scratch[0], scratch[1]
    predict(headroom, steps, survival, size, settings, slots, scalars, total)
    empty = scalars[st.I_RESIDENTS] == 0
    start_of_queues(settings, queues)
    best = next_in_order(settings, requests, queues)
    while best >= 0:
        r = queues[st.Q_LEFT, best]
        generated = requests[st.R_GENERATED, r]
        held = requests[st.R_PROMPT, r] + generated + headroom
        left = survival[best // num_segments, min(generated, size - 1)]
        fits = True
        for t in range(total.shape[0]):
            own[t] = total[t] + left[t] * (held + steps[t])
            if own[t] > limit:
                fits = False
        if not fits and not empty:
            return
        total[:] = own
        empty = False
        decision[1, best] += 1
        queues[st.Q_LEFT, best] = requests[st.R_NEXT, r]
        best = next_in_order(settings, requests, queues)


@compiled
def _log(x):  # type: ignore[no-untyped-def]
    return min(math.log(1.0 + max(x, 0.0)) * _LOG_SCALE, 1.0)


@compiled
def features(  # type: ignore[no-untyped-def]
    headroom, boundary_rate, steps, survival, remaining, size, statics, settings, slots, queues, queue_f, scalars, clocks, scratch, out
):
    """Write the features of ``agents.peak`` into ``out`` (FEATURES,) float32."""
    num_queues, num_segments = queues.shape[1], settings[st.C_SEGMENTS]
    unit = 1.0 if settings[st.C_PRESET] == st.PRESET_PAPER else float(settings[st.C_BLOCK_SIZE])
    capacity = settings[st.C_CAPACITY] * unit
    ahead = scratch[0]
    predict(headroom, steps, survival, size, settings, slots, scalars, ahead)
    at = ahead.shape[0]
    for t in range(at):
        out[t] = min(ahead[t] / capacity / 2.0, 1.0)
    work = 0.0
    oldest = 0.0
    arrivals = 0.0
    for q in range(0, num_queues, num_segments):
        arrivals += queue_f[st.QF_ARRIVALS, q]
        waiting = queues[st.Q_WAITING, q]
        if waiting == 0:
            continue
        # The head stands for the prompts of its queue: classes are buckets by prompt length.
        first = remaining[q // num_segments, 0]
        work += waiting * (first[0] * queues[st.Q_HEAD_TOKENS, q] + first[1])
        oldest = max(oldest, clocks[st.F_CLOCK] - queue_f[st.QF_HEAD_ARRIVAL, q])
    left = 0.0
    for i in range(scalars[st.I_RESIDENTS]):
        generated = slots[st.S_GENERATED, i]
        rest = remaining[slots[st.S_QUEUE, i] // num_segments, min(generated, size - 1)]
        left += rest[0] * slots[st.S_PROMPT, i] + rest[1]
    out[at] = _log(work / capacity)
    out[at + 1] = _log(left / capacity)
    out[at + 2] = _log(oldest / 0.01)
    out[at + 3] = min(math.log(1.0 + scalars[st.I_RESIDENTS]) * _COUNT_SCALE, 1.0)
    out[at + 4] = min(math.log(1.0 + scalars[st.I_WAITING]) * _COUNT_SCALE, 1.0)
    seconds = clocks[st.F_RATE_SECONDS]
    out[at + 5] = min(arrivals / seconds / (2.0 * boundary_rate), 1.0) if seconds > 0.0 else 0.0
    for i in range(statics.shape[0]):
        out[at + 6 + i] = statics[i]


@compiled
def hidden(boundary_rate, settings, requests, times, slots, queues, scalars, clocks, out):  # type: ignore[no-untyped-def]
    """Write what a critic may know in training into ``out`` (HIDDEN,) float32."""
    unit = 1.0 if settings[st.C_PRESET] == st.PRESET_PAPER else float(settings[st.C_BLOCK_SIZE])
    capacity = settings[st.C_CAPACITY] * unit
    resident = 0.0
    for i in range(scalars[st.I_RESIDENTS]):
        resident += _work(slots[st.S_PROMPT, i], slots[st.S_GENERATED, i], slots[st.S_OUTPUT, i])
    outside = 0.0
    for q in range(0, queues.shape[1], settings[st.C_SEGMENTS]):
        r = queues[st.Q_HEAD, q]
        while r >= 0:
            outside += _work(requests[st.R_PROMPT, r], requests[st.R_GENERATED, r], requests[st.R_OUTPUT, r])
            r = requests[st.R_NEXT, r]
    out[0] = _log(resident / capacity)
    out[1] = _log(outside / capacity)
    clock = clocks[st.F_CLOCK]
    first = scalars[st.I_NEXT_ARRIVAL]
    i = first
    for h in range(3):
        while i < requests.shape[1] and times[st.T_ARRIVAL, i] <= clock + _HORIZONS[h]:
            i += 1
        out[2 + h] = min((i - first) / (3.0 * boundary_rate * _HORIZONS[h]), 1.0)


@compiled
def _work(prompt, generated, output):  # type: ignore[no-untyped-def]
    return (output - generated) * prompt + (output * (output + 1.0) - generated * (generated + 1.0)) / 2.0


@compiled
def decode_agent(  # type: ignore[no-untyped-def]
    kind, action, levels, max_admit, headroom, steps, survival, size, settings, context, requests, slots, queues, scalars, scratch,
    decision,
):  # fmt: skip
    """Write the decision of an action (W,) int64 of any action set."""
    if kind == _ADMIT:
        decode_action(action, max_admit, decision)
    elif kind == _ADMIT_ONLY:
        for q in range(decision.shape[1]):
            decision[0, q] = 1
            outside = q % settings[st.C_SEGMENTS] == 0
            decision[1, q] = action[0] if outside and action[0] < max_admit else ADMIT_ALL
    elif kind == _RESERVE:
        decode_reserve(levels[action[0]], settings, context, requests, slots, queues, scalars, decision)
    else:
        decode_peak(
            levels[action[0]], headroom, steps, survival, size, settings, requests, slots, queues, scalars, scratch, decision
        )


@compiled
def observe_agent(  # type: ignore[no-untyped-def]
    kind, max_admit, whole, columns, extended, headroom, boundary_rate, steps, survival, remaining, size, statics, settings, context,
    requests, times, slots, queues, queue_f, scalars, clocks, scratch, out, legal,
):  # fmt: skip
    """Write the observation and the mask.

    First ``columns`` of the environment's ``whole`` numbers, then the features, then hidden numbers where ``out`` has room.
    """
    width = columns.shape[0]
    if whole == width:
        encode(settings, context, queues, queue_f, scalars, clocks, out[:width])
    else:
        everything = np.empty(whole, dtype=np.float32)
        encode(settings, context, queues, queue_f, scalars, clocks, everything)
        for i in range(width):
            out[i] = everything[columns[i]]
    if extended:
        at = width + FEATURES
        features(
            headroom, boundary_rate, steps, survival, remaining, size, statics, settings, slots, queues, queue_f, scalars, clocks,
            scratch, out[width:at],
        )  # fmt: skip
        if out.shape[0] > at:
            hidden(boundary_rate, settings, requests, times, slots, queues, scalars, clocks, out[at:])
    if kind == _ADMIT:
        fill_mask(queues, max_admit, legal)
    elif kind == _ADMIT_ONLY:
        longest = 0
        for q in range(0, queues.shape[1], settings[st.C_SEGMENTS]):
            longest = max(longest, queues[st.Q_WAITING, q])
        for n in range(max_admit):
            legal[n] = n <= longest
        legal[max_admit] = longest > 0
    else:
        legal[:] = True


@parallel
def advance_all(  # type: ignore[no-untyped-def]
    actions, kind, levels, max_admit, hold, discount, reward_kind, ttft, tpot, whole, columns, extended, row, headroom, boundary_rate,
    steps, survival, remaining, sizes, statics, decisions, models, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks,
    batches, events, trace, contexts, scratch, observations, masks, rewards, durations, terminated, truncated, returns, lengths,
):  # fmt: skip
    """``hold`` iterations of every engine under its action, fewer where the episode ends. Leading axis: engine.

    Rewards are discounted to the start of the step: exp(-t / discount[e]) for an iteration that starts t seconds after it.
    """
    for e in prange(actions.shape[0]):
        i = row[e]
        total = 0.0
        elapsed = 0.0
        for _ in range(hold):
            decode_agent(
                kind, actions[e], levels, max_admit, headroom[e], steps[i], survival[i], sizes[i], settings[e], contexts[e], requests[e],
                slots[e], queues[e], scalars[e], scratch[e], decisions[e],
            )  # fmt: skip
            step(
                decisions[e], models[e], settings[e], ends[e], requests[e], times[e], slots[e], queues[e], queue_f[e], scalars[e],
                clocks[e], batches[e], events[e], trace[e],
            )  # fmt: skip
            reward = reward_of(reward_kind, ttft, tpot, requests[e], times[e], scalars[e], clocks[e], events[e])
            total += reward if elapsed == 0.0 else reward * np.exp(-elapsed / discount[e])
            elapsed += clocks[e, st.F_DURATION]
            returns[e] += reward
            lengths[e] += 1
            if scalars[e, st.I_DONE] != st.END_NOT:
                break
        rewards[e] = total
        durations[e] = elapsed
        terminated[e] = scalars[e, st.I_DONE] == st.END_FINISHED
        truncated[e] = scalars[e, st.I_DONE] > st.END_FINISHED
        observe_agent(
            kind, max_admit, whole, columns, extended, headroom[e], boundary_rate[e], steps[i], survival[i], remaining[i], sizes[i],
            statics[e],
            settings[e], contexts[e], requests[e], times[e], slots[e], queues[e], queue_f[e], scalars[e], clocks[e], scratch[e],
            observations[e], masks[e],
        )  # fmt: skip


@parallel
def branch_all(  # type: ignore[no-untyped-def]
    tried, follow, kind, levels, max_admit, deviate, horizon, reward_kind, ttft, tpot, row, headroom, steps, survival, sizes,
    decisions, models, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batches, events, trace, contexts,
    scratch, costs,
):  # fmt: skip
    """What each action would cost from here, all of them under the same future; the engines are left as they were.

    Action ``tried[e, a]`` for ``deviate[e]`` seconds, then ``follow[e]``. After ``horizon[e]`` seconds nothing
    arrives any more and the engine works off what it has: a policy that leaves work behind pays for it.
    ``costs`` (N, A) float64 is minus the reward. Leading axis of the others: engine.
    """
    for e in prange(tried.shape[0]):
        i = row[e]
        kept = (
            requests[e].copy(), times[e].copy(), slots[e].copy(), queues[e].copy(), queue_f[e].copy(), scalars[e].copy(), clocks[e].copy(),
        )  # fmt: skip
        for a in range(tried.shape[1]):
            start = clocks[e, st.F_CLOCK]
            total = 0.0
            elapsed = 0.0
            while scalars[e, st.I_DONE] == st.END_NOT:
                if elapsed >= horizon[e]:
                    scalars[e, st.I_NEXT_ARRIVAL] = requests.shape[2]
                    if scalars[e, st.I_WAITING] + scalars[e, st.I_RESIDENTS] == 0:
                        break
                action = tried[e, a : a + 1] if elapsed < deviate[e] else follow[e : e + 1]
                decode_agent(
                    kind, action, levels, max_admit, headroom[e], steps[i], survival[i], sizes[i], settings[e], contexts[e], requests[e],
                    slots[e], queues[e], scalars[e], scratch[e], decisions[e],
                )  # fmt: skip
                step(
                    decisions[e], models[e], settings[e], ends[e], requests[e], times[e], slots[e], queues[e], queue_f[e], scalars[e],
                    clocks[e], batches[e], events[e], trace[e],
                )  # fmt: skip
                total -= reward_of(reward_kind, ttft, tpot, requests[e], times[e], scalars[e], clocks[e], events[e])
                elapsed = clocks[e, st.F_CLOCK] - start
            costs[e, a] = total
            requests[e] = kept[0]
            times[e] = kept[1]
            slots[e] = kept[2]
            queues[e] = kept[3]
            queue_f[e] = kept[4]
            scalars[e] = kept[5]
            clocks[e] = kept[6]


# --- an agent as a rule (``llmsched_env.engine.fleet``) -----------------------------------------------
# Header of the parameters; behind it levels, context, statics, steps, survival, remaining, columns, then mean and scale of the
# observation, the sizes of the action's components, and weights and biases layer by layer.
P_KIND = 0
P_MAX_ADMIT = 1
P_HOLD = 2
P_DRAWN = 3  # 1: actions are drawn, 0: the likeliest
P_HEADROOM = 4
P_WHOLE = 5  # numbers of the environment's observation
P_WIDTH = 6  # D
P_EXTENDED = 7
P_GUARDED = 8
P_LEVELS = 9  # how many
P_CONTEXT = 10
P_STATICS = 11
P_CLASSES = 12  # of the survival table
P_SIZE = 13
P_COMPONENTS = 14
P_LAYERS = 15  # the head among them
P_BOUNDARY_RATE = 16
P_COLUMNS = 17  # how many of them are read
P_SEED = 18
P_LAYER = 19  # outputs of each layer
MAX_LAYERS = 8
P_ROWS = P_LAYER + MAX_LAYERS

M_LEFT = 0  # iterations for which the action stays in force
M_DRAWS = 1  # numbers drawn so far
M_IDLE = 2
M_INTERVENTIONS = 3
M_ACTION = 4  # then the action's components, then how long each queue has been held

HELD_ITERATIONS = 200
IDLE_ITERATIONS = 20


@compiled
def _uniform(parameters, memory):  # type: ignore[no-untyped-def]
    """The next number in [0, 1) of SplitMix64 (Steele, Lea, Flood 2014), whose state is seed + draws x golden ratio."""
    memory[M_DRAWS] += 1
    z = np.uint64(parameters[P_SEED]) + np.uint64(memory[M_DRAWS]) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return np.float64(z >> np.uint64(11)) / 9007199254740992.0


@compiled
def network_logits(parameters, at, observed):  # type: ignore[no-untyped-def]
    """``agents.network.Network.logits`` of one observation; mean and scale begin at ``at``."""
    width = int(parameters[P_WIDTH])
    values = np.empty(width)
    for i in range(width):
        scaled = (observed[i] - parameters[at + i]) * parameters[at + width + i]
        values[i] = min(max(scaled, -5.0), 5.0)
    at += 2 * width + int(parameters[P_COMPONENTS])
    layers = int(parameters[P_LAYERS])
    for k in range(layers):
        outputs = int(parameters[P_LAYER + k])
        following = np.empty(outputs)
        for o in range(outputs):
            total = parameters[at + outputs * values.shape[0] + o]
            for i in range(values.shape[0]):
                total += parameters[at + o * values.shape[0] + i] * values[i]
            following[o] = total if k == layers - 1 else math.tanh(total)
        at += outputs * (values.shape[0] + 1)
        values = following
    return values


@compiled
def choose_action(parameters, at, memory, values, legal):  # type: ignore[no-untyped-def]
    """The action of these logits into ``memory``: the likeliest legal one, or a draw from their softmax."""
    sizes = at + 2 * int(parameters[P_WIDTH])
    first = 0
    for c in range(int(parameters[P_COMPONENTS])):
        size = int(parameters[sizes + c])
        best = -1
        for n in range(size):
            if legal[first + n] and (best < 0 or values[first + n] > values[first + best]):
                best = n
        if parameters[P_DRAWN] != 0.0:
            top = values[first + best]
            total = 0.0
            for n in range(size):
                if legal[first + n]:
                    total += math.exp(values[first + n] - top)
            left = _uniform(parameters, memory) * total
            for n in range(size):
                if legal[first + n]:
                    best = n
                    left -= math.exp(values[first + n] - top)
                    if left < 0.0:
                        break
        memory[M_ACTION + c] = best
        first += size


@compiled
def _guard(held, memory, settings, queues, decision):  # type: ignore[no-untyped-def]
    """No likeliest choice holds for ever (``agents.agent.Agent``)."""
    num_segments = settings[st.C_SEGMENTS]
    active = False
    present = False
    freed = False
    for q in range(queues.shape[1]):
        residents, waiting = queues[st.Q_RESIDENTS, q], queues[st.Q_WAITING, q]
        boundary = q % num_segments != 0
        stuck = (decision[0, q] == 0 and residents > 0) or (boundary and decision[1, q] == 0 and waiting > 0)
        held[q] = held[q] + 1 if stuck else 0
        if held[q] > HELD_ITERATIONS:
            held[q] = 0
            freed = True
            decision[0, q] = 1
            if boundary:
                decision[1, q] = ADMIT_ALL
        active = active or (decision[0, q] != 0 and residents > 0) or (decision[1, q] > 0 and waiting > 0)
        present = present or residents > 0 or waiting > 0
    memory[M_IDLE] = memory[M_IDLE] + 1 if present and not active else 0
    if memory[M_IDLE] > IDLE_ITERATIONS:
        memory[M_IDLE] = 0
        freed = True
        decision[0, :] = 1
        decision[1, :] = ADMIT_ALL
    if freed:
        memory[M_INTERVENTIONS] += 1


@compiled
def agent_rule(parameters, memory, settings, requests, slots, queues, queue_f, scalars, clocks, decision):  # type: ignore[no-untyped-def]
    """One decision of an agent: a look at the engine and a choice every ``hold`` iterations, and what it means now."""
    num_steps = len(GRID)
    kind, max_admit = int(parameters[P_KIND]), int(parameters[P_MAX_ADMIT])
    classes, size = int(parameters[P_CLASSES]), int(parameters[P_SIZE])
    headroom = parameters[P_HEADROOM]
    a = P_ROWS
    b = a + int(parameters[P_LEVELS])
    levels = parameters[a:b]
    a = b
    b += int(parameters[P_CONTEXT])
    context = parameters[a:b]
    a = b
    b += int(parameters[P_STATICS])
    statics = parameters[a:b]
    a = b
    b += num_steps
    steps = parameters[a:b]
    a = b
    b += classes * size * num_steps
    survival = parameters[a:b].reshape((classes, size, num_steps))
    a = b
    b += classes * size * 2
    remaining = parameters[a:b].reshape((classes, size, 2))
    a = b
    b += int(parameters[P_COLUMNS])
    columns = parameters[a:b].astype(np.int64)
    scratch = np.empty((2, num_steps))
    components = int(parameters[P_COMPONENTS])
    if memory[M_LEFT] == 0:
        at = b + 2 * int(parameters[P_WIDTH])
        total = 0
        for c in range(components):
            total += int(parameters[at + c])
        observed = np.empty(int(parameters[P_WIDTH]), dtype=np.float32)
        legal = np.empty(total, dtype=np.bool_)
        nothing = np.empty((st.T_ROWS, 0))
        observe_agent(
            kind, max_admit, int(parameters[P_WHOLE]), columns, parameters[P_EXTENDED] != 0.0, headroom, parameters[P_BOUNDARY_RATE],
            steps, survival, remaining, size, statics, settings, context, requests, nothing, slots, queues, queue_f, scalars, clocks,
            scratch, observed, legal,
        )  # fmt: skip
        choose_action(parameters, b, memory, network_logits(parameters, b, observed), legal)
        memory[M_LEFT] = int(parameters[P_HOLD])
    memory[M_LEFT] -= 1
    action = memory[M_ACTION : M_ACTION + components]
    decode_agent(
        kind, action, levels, max_admit, headroom, steps, survival, size, settings, context, requests, slots, queues, scalars, scratch,
        decision,
    )  # fmt: skip
    decision[2, :] = 0
    if parameters[P_GUARDED] != 0.0:
        _guard(memory[M_ACTION + components :], memory, settings, queues, decision)
