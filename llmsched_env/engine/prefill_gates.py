"""Settings of vLLM that keep prefill back: an interval between prefills, and a limit on one request's (rules 20 and 21; compiled).

vLLM 0.33.0, ``v1/core/sched/scheduler.py`` ``schedule``: ``local_prefill_interval`` and ``defer_prefills``, the release by
``prefill_capacity_bound``, ``long_prefill_token_threshold``. *May enter* and *run* are what a decision says of them: vLLM's own queues are
those of a decision that admits and runs everything.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import next_outside
from llmsched_env.engine.residents import is_running, num_running
from llmsched_env.engine.state import NO_END, PREFILL, Engine


@compiled
def decodes_run(engine: Engine) -> bool:
    """Whether a resident that runs has all of its prefill computed."""
    requests, queues, settings = engine.requests, engine.queues, engine.settings
    for q in range(settings.num_queues):
        if queues.members[q] > 0 and queues.runs[q] != 0:
            return True
    r = queues.first_peer[settings.num_queues]
    while r >= 0:
        if requests.status[r] != PREFILL and is_running(engine, r):
            return True
        r = requests.next_peer[r]
    return False


@compiled
def defers_prefill(engine: Engine) -> bool:
    """Whether prefill waits in this iteration, whose settings have an interval.

    It does until as many iterations as the interval have passed since the last that carried prefill, as long as somebody decodes,
    and unless the last release was bound by capacity.
    """
    settings, cadence = engine.settings, engine.cadence
    if cadence.capacity_bound != 0 and settings.interval_release != 0:
        return False
    return cadence.since_prefill + 1 < settings.prefill_interval and decodes_run(engine)


@compiled
def note_release(engine: Engine) -> None:
    """Prefill was free to enter: note whether somebody who might have entered is left outside."""
    engine.cadence.capacity_bound = 1 if next_outside(engine) >= 0 else 0


@compiled
def note_prefill(engine: Engine, first_new: int) -> None:
    """Count an iteration that computes something; one that carries prefill begins the interval anew.

    Args:
        first_new: number of the first admission of this iteration. Who enters with one token left to compute carries no prefill.
    """
    requests, settings, cadence = engine.requests, engine.settings, engine.cadence
    cadence.since_prefill += 1
    r = engine.queues.first_peer[settings.num_queues]
    while r >= 0:
        computes = requests.status[r] == PREFILL and requests.tokens[r] > 0
        if computes and (requests.sequence[r] < first_new or requests.target[r] - requests.base_computed[r] > 1):
            cadence.since_prefill = 0
            return
        r = requests.next_peer[r]


@compiled
def most_prefill(engine: Engine) -> int:
    """Prompt tokens that one request may compute in this iteration: the limit counts while more than one request runs or may enter."""
    queues, settings = engine.queues, engine.settings
    if settings.long_prefill == 0:
        return NO_END
    eligible = num_running(engine)
    for q in range(0, settings.num_queues, settings.num_segments):
        eligible += min(queues.left[q], queues.waiting[q])
    return settings.long_prefill if eligible > 1 else NO_END
