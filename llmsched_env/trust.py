"""Admission of the least expected work first, where predictions of output lengths are trusted in part.

As ``llmsched_env.operate``: residents are predicted as in ``llmsched_env.peak``, requests enter while the peak stays within
level * C, and the walk asks for no more than can begin in this iteration, so that the engine's own order decides nothing. What a
request costs is its own, not its class's: ``llmsched_env.shrinkage`` expects it from prompt, prediction and trust. Candidates are the heads
of the outside queues, so the finer the queues are by prompt and prediction, the nearer is this to the order of all
requests. A preempted request, whose prompt has been computed once, comes before all others.
"""

from __future__ import annotations

import math

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import start_of_queues
from llmsched_env.engine.state import Engine
from llmsched_env.operate import begin_entry, enter
from llmsched_env.peak import PeakRecord, kv_unit, predict
from llmsched_env.shrinkage import shrunk_work
from llmsched_env.types import Decision

_PREEMPTED = -1e12  # seconds of work; queue keys of preempted requests are added, which keeps their order


@compiled
def score_next(engine: Engine, peak: PeakRecord, q: int) -> None:
    """Write the work of the next request of outside queue q's walk into ``scores``; infinity at its end."""
    requests, j = engine.requests, q // engine.settings.num_segments
    r = engine.queues.left[q]
    if r >= 0 and peak.scored[j] == r + 1 and (peak.scores[j] < 0.0) == (requests.base_generated[r] > 0):
        return
    peak.scored[j] = r + 1
    if r < 0:
        peak.scores[j] = math.inf
    elif requests.base_generated[r] > 0:
        peak.scores[j] = float(requests.key[r]) + _PREEMPTED
    else:
        peak.scores[j] = shrunk_work(peak.prior, requests.prompt[r], engine.arrived.predicted[r])


@compiled
def check_belief(peak: PeakRecord) -> None:
    """Forget scores of another belief."""
    now, then = peak.prior.belief, peak.scored_with
    if now.trust != then.trust or now.error != then.error or now.offset != then.offset or now.scale != then.scale:
        then.trust = now.trust
        then.error = now.error
        then.offset = now.offset
        then.scale = now.scale
        for j in range(peak.scored.shape[0]):
            peak.scored[j] = 0


@compiled
def least_work(peak: PeakRecord) -> int:
    """The class whose next request has the least work, the first of equals; -1: nobody is left."""
    best = 0
    for j in range(1, peak.scores.shape[0]):
        if peak.scores[j] < peak.scores[best]:
            best = j
    return best if peak.scores[best] < math.inf else -1


@compiled
def decode_peak_by_trust(engine: Engine, peak: PeakRecord, level: float, decision: Decision) -> None:
    """Write the decision of this level, requests entering least work first. ``decision.token_budget`` is read: it is set before.

    So is ``peak.prior.belief``.

    Args:
        level: share of the KV capacity that the predicted peak may reach; infinite: only the memory of now counts.
    """
    seats, tokens = begin_entry(engine, decision)
    if seats <= 0 or tokens <= 0:
        return
    settings = engine.settings
    predict(engine, peak)
    if engine.num_residents > 0:
        limit = level * settings.capacity * kv_unit(engine)
        for t in range(peak.total.shape[0]):
            if peak.total[t] > limit:
                return
    start_of_queues(engine)
    check_belief(peak)
    for j in range(settings.num_classes):
        score_next(engine, peak, j * settings.num_segments)
    best = least_work(peak)
    entered = 0
    while best >= 0 and entered < seats and tokens > 0:
        q = best * settings.num_segments
        prompt = enter(engine, peak, level, q, entered, decision)
        if prompt < 0:
            return
        entered += 1
        tokens -= prompt
        score_next(engine, peak, q)
        best = least_work(peak)
