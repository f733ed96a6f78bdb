"""Output lengths learned from completed requests, compiled.

Lengths are told apart by geometric bins and prompts by groups of half an octave. In bin b the hazard is the share of those that
reached the bin and ended in it. Residents count as having reached the bins that they have passed (the product-limit estimate of
Kaplan and Meier 1958), so long requests, which complete late, are not missed at the start. A group's hazard is drawn towards
that of all requests, that of all towards a prior, each as if it were a number of requests more; the prior fades as requests complete.
Old completions count less by and by, and much less at once after a change. A change is seen by counting: by the learned hazards every
bin that a request reaches ends it with a known probability, so the number of completions less the sum of these probabilities has mean 0,
whoever is resident and however long already; where the two differ by several standard deviations lengths have changed.
"""

from __future__ import annotations

import math

import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.engine.residents import generated
from llmsched_env.engine.state import Engine
from llmsched_env.records import Cube32, Indices, Record, Vector

PER_OCTAVE = 4
"""Bins of an octave of output lengths."""
PRIOR_REQUESTS = 2.0
"""The prior counts as so many requests."""
POOL_REQUESTS = 10.0
"""All requests count as so many of a group."""
PRIOR_MEAN = 250.0
"""Tokens; the prior is exponential: where nothing has been seen, a request ends soon."""
REMEMBERED = 2_000.0
"""Completions after which one counts 1 / e."""
WATCHED = 80.0
"""Completions over which their number is compared with what was expected."""
SURPRISE = 5.0
"""Standard deviations by which it must differ for a change."""
SETTLED = 300.0
"""Completions before anything is taken for a change: expectations are still moving."""
RARE = 0.02
"""Share of outputs that may be longer than the longest to expect."""
AFTER_CHANGE = 0.05
"""Share that counts of what was learned before a change."""


class LengthsRecord(Record):
    """What has been learned. B bins, N groups, J classes, G lengths told apart, T steps of a forecast."""

    edges: Vector  # (B + 1,) tokens: bin b holds outputs above edges[b] and up to edges[b + 1]
    place: Indices  # (G,) bin of a resident that has generated g tokens
    group: Indices  # (J,) group of a class
    prior: Vector  # (B,) hazards
    ended: Vector  # (N * B,) weight of the completions in each bin
    reached: Vector  # (N * B,) scratch
    survival: Vector  # (N * (B + 1),) P(output > edges[b])
    before: Vector  # (N * (B + 1),) sum of the hazards of the bins before b
    mean: Vector  # (N,) E[output], tokens
    square: Vector  # (N,) E[output^2]
    num_groups: int
    weight: float  # of the next completion
    finished: float  # completions, since the last change
    events: float  # of these, the recent ones
    expected: float  # of these, by the hazards
    variance: float  # of the difference
    passed: float  # sum of the hazards that those met who completed since the lengths were learned last
    held: float  # the same of the residents then
    fresh: float  # completions since then
    changes: int  # seen in this episode


def bin_edges(longest: int) -> list[int]:
    """Edges of the bins for outputs of up to ``longest`` tokens: every length as far as they can be told apart, then geometric."""
    edges = [0]
    k = 0
    while edges[-1] < longest:
        edge = math.floor(2.0 ** (k / PER_OCTAVE))
        if edge > edges[-1]:
            edges.append(edge)
        k += 1
    return edges


def lengths_record(groups: list[int], longest: int) -> LengthsRecord:
    """A record that knows nothing yet.

    Args:
        groups: of each class.
        longest: output, tokens.
    """
    edges = np.array(bin_edges(longest), dtype=np.float64)
    bins, num_groups = edges.size - 1, max(groups) + 1
    record = LengthsRecord(
        edges=edges,
        place=np.clip(np.searchsorted(edges, np.arange(longest + 1), side="right") - 1, 0, bins - 1).astype(np.int64),
        group=np.array(groups, dtype=np.int64),
        prior=1.0 - np.exp(-np.diff(edges) / PRIOR_MEAN),
        ended=np.zeros(num_groups * bins),
        reached=np.zeros(num_groups * bins),
        survival=np.zeros(num_groups * (bins + 1)),
        before=np.zeros(num_groups * (bins + 1)),
        mean=np.zeros(num_groups),
        square=np.zeros(num_groups),
    )
    record.num_groups = num_groups
    return record


@compiled
def forget_lengths(lengths: LengthsRecord) -> None:
    """Know nothing again."""
    for i in range(lengths.ended.shape[0]):
        lengths.ended[i] = 0.0
    for g in range(lengths.num_groups):
        lengths.mean[g] = 0.0
    lengths.weight = 1.0
    lengths.finished = 0.0
    lengths.events = 0.0
    lengths.expected = 0.0
    lengths.variance = 0.0
    lengths.passed = 0.0
    lengths.held = 0.0
    lengths.fresh = 0.0
    lengths.changes = 0


@compiled
def place_of(lengths: LengthsRecord, tokens: int) -> int:
    """Bin of a request that has generated ``tokens``."""
    return int(lengths.place[min(tokens, lengths.place.shape[0] - 1)])


@compiled
def note_completions(engine: Engine, lengths: LengthsRecord) -> None:
    """Learn from the requests that completed in the last step."""
    requests, bins = engine.requests, lengths.edges.shape[0] - 1
    for i in range(engine.report.completed):
        r = engine.events.finished[i]
        output = max(generated(engine, r), 1)
        g = lengths.group[requests.outside[r] // engine.settings.num_segments]
        b = place_of(lengths, output - 1)
        lengths.ended[g * bins + b] += lengths.weight
        lengths.weight *= 1.0 + 1.0 / REMEMBERED
        lengths.passed += lengths.before[g * (bins + 1) + b + 1]
        lengths.fresh += 1.0


@compiled
def met_hazard(lengths: LengthsRecord, g: int, tokens: int) -> float:
    """What counts against a resident of a group that has generated ``tokens``: the hazards of the bins behind it, and a part of its bin's.

    One that completes counts with the whole hazard h of its last bin, wherever in it it ends. Where lengths are even within a bin, a
    share s of it ends a request with probability h s; with h s (1 - h) / (1 - h s) for those still there the mean of completions less
    hazards is 0 at every s, and within a bin that nobody leaves (h = 1) they are equal.
    """
    edges, bins = lengths.edges, lengths.edges.shape[0] - 1
    b = place_of(lengths, tokens)
    i = g * (bins + 1) + b
    hazard = lengths.before[i + 1] - lengths.before[i]
    share = min((tokens - edges[b]) / (edges[b + 1] - edges[b]), 1.0)
    if hazard >= 1.0:
        return float(lengths.before[i])
    return float(lengths.before[i] + hazard * share * (1.0 - hazard) / (1.0 - hazard * share))


@compiled
def held_hazard(engine: Engine, lengths: LengthsRecord) -> float:
    """The sum of ``met_hazard`` of all residents."""
    requests = engine.requests
    total = 0.0
    r = engine.oldest
    while r >= 0:
        g = lengths.group[requests.queue[r] // engine.settings.num_segments]
        total += met_hazard(lengths, g, generated(engine, r))
        r = requests.next[r]
    return total


@compiled
def look_for_change(engine: Engine, lengths: LengthsRecord) -> None:
    """Compare completions with what the hazards said; after a change what was learned hardly counts any more."""
    settled = lengths.finished >= SETTLED  # before the last step: what was expected since then rests on these
    known = max(min(lengths.finished, REMEMBERED), 1.0)
    fresh, expected = lengths.fresh, held_hazard(engine, lengths) - lengths.held + lengths.passed
    keep = math.exp(-fresh / WATCHED)
    lengths.events = lengths.events * keep + fresh
    lengths.expected = lengths.expected * keep + expected
    lengths.variance = lengths.variance * keep * keep + max(fresh, expected)
    lengths.finished += fresh
    lengths.passed = 0.0
    lengths.fresh = 0.0
    # What was expected is itself known from so many completions only.
    error = math.sqrt(max(lengths.variance, 1.0) + lengths.expected * lengths.expected / known)
    changed = settled and abs(lengths.events - lengths.expected) > SURPRISE * error
    if changed:
        for i in range(lengths.ended.shape[0]):
            lengths.ended[i] *= AFTER_CHANGE
        lengths.finished = 0.0
        lengths.changes += 1
    if changed or not settled:
        lengths.events = 0.0
        lengths.expected = 0.0
        lengths.variance = 0.0


@compiled
def count_reached(engine: Engine, lengths: LengthsRecord) -> None:
    """Write into ``reached`` the weight of those that reached each bin and either ended in it or left it behind."""
    requests, reached, bins = engine.requests, lengths.reached, lengths.edges.shape[0] - 1
    for i in range(lengths.ended.shape[0]):
        lengths.ended[i] /= lengths.weight
        reached[i] = 0.0
    lengths.weight = 1.0
    r = engine.oldest
    while r >= 0:
        b = place_of(lengths, generated(engine, r))
        if b > 0:  # it has left the bin before behind
            reached[lengths.group[requests.queue[r] // engine.settings.num_segments] * bins + b - 1] += 1.0
        r = requests.next[r]
    for g in range(lengths.num_groups):
        passed = 0.0
        for b in range(bins - 1, -1, -1):
            passed += reached[g * bins + b] + lengths.ended[g * bins + b]
            reached[g * bins + b] = passed


@compiled
def learn_lengths(engine: Engine, lengths: LengthsRecord) -> None:
    """Survival and moments of every group from what has been seen so far."""
    if lengths.mean[0] > 0.0:
        look_for_change(engine, lengths)
    count_reached(engine, lengths)
    bins, survival, before = lengths.edges.shape[0] - 1, lengths.survival, lengths.before
    for g in range(lengths.num_groups):
        survival[g * (bins + 1)] = 1.0
        before[g * (bins + 1)] = 0.0
    for b in range(bins):
        ended = 0.0
        reached = 0.0
        for g in range(lengths.num_groups):
            ended += lengths.ended[g * bins + b]
            reached += lengths.reached[g * bins + b]
        pooled = (ended + PRIOR_REQUESTS * lengths.prior[b]) / (reached + PRIOR_REQUESTS)
        for g in range(lengths.num_groups):
            i = g * bins + b
            hazard = min((lengths.ended[i] + POOL_REQUESTS * pooled) / (lengths.reached[i] + POOL_REQUESTS), 1.0)
            survival[g * (bins + 1) + b + 1] = survival[g * (bins + 1) + b] * (1.0 - hazard)
            before[g * (bins + 1) + b + 1] = before[g * (bins + 1) + b] + hazard
    for g in range(lengths.num_groups):
        moments_of(lengths, g)
    lengths.held = held_hazard(engine, lengths)


@compiled
def moments_of(lengths: LengthsRecord, g: int) -> None:
    """E[output] and E[output^2] of a group: sums of P(output > k) and of (2 k + 1) P(output > k), lengths even within a bin.

    What is left beyond the last edge counts as that long.
    """
    edges, bins = lengths.edges, lengths.edges.shape[0] - 1
    mean = 0.0
    square = 0.0
    for b in range(bins):
        low, high = edges[b], edges[b + 1]
        after = lengths.survival[g * (bins + 1) + b + 1]
        ends = lengths.survival[g * (bins + 1) + b] - after
        # Of whole numbers from low + 1 to high, less low and less its square.
        mean += after * (high - low) + ends * 0.5 * (high - low + 1.0)
        squares = (high * (high + 1.0) * (2.0 * high + 1.0) - low * (low + 1.0) * (2.0 * low + 1.0)) / 6.0
        square += after * (high * high - low * low) + ends * (squares / (high - low) - low * low)
    lengths.mean[g] = mean
    lengths.square[g] = square


@compiled
def survival_at(lengths: LengthsRecord, g: int, tokens: float) -> float:
    """P(output > tokens) of a group."""
    edges, bins = lengths.edges, lengths.edges.shape[0] - 1
    if tokens >= edges[bins]:
        return float(lengths.survival[g * (bins + 1) + bins])
    b = place_of(lengths, int(tokens))
    share = (tokens - edges[b]) / (edges[b + 1] - edges[b])
    i = g * (bins + 1) + b
    return float(lengths.survival[i] + share * (lengths.survival[i + 1] - lengths.survival[i]))


@compiled
def longest_expected(lengths: LengthsRecord) -> float:
    """Tokens that hardly any output exceeds (RARE), in whatever group."""
    edges, bins = lengths.edges, lengths.edges.shape[0] - 1
    for b in range(1, bins + 1):
        above = 0.0
        for g in range(lengths.num_groups):
            above = max(above, lengths.survival[g * (bins + 1) + b])
        if above < RARE:
            return float(edges[b])
    return float(edges[bins])


@compiled
def refine_steps(lengths: LengthsRecord, steps: Vector) -> None:
    """Set the steps of a forecast so that the last is the longest output to expect, and the first stand closer than the last."""
    last = steps.shape[0] - 1
    longest = longest_expected(lengths)
    for t in range(last + 1):
        steps[t] = float(int(longest * (t / last) ** 1.5 + 0.5))


@compiled
def fill_forecast(lengths: LengthsRecord, steps: Vector, table: Cube32) -> None:
    """Write P(output > g + steps[t] | output > g) into ``table`` (N, B, T), g in the middle of each bin."""
    edges, bins = lengths.edges, lengths.edges.shape[0] - 1
    for g in range(lengths.num_groups):
        for b in range(bins):
            at = float(int(0.5 * (edges[b] + edges[b + 1])))
            now = max(survival_at(lengths, g, at), 1e-12)
            for t in range(steps.shape[0]):
                table[g, b, t] = survival_at(lengths, g, at + steps[t]) / now
