"""The walk of every policy that reserves memory: admit in the engine's order while what is admitted fits.

``room`` is what is left of a budget, in whatever unit the policy counts; an empty engine takes the first request
whatever it needs, so that nothing is held forever. A rule walks like this::

    q = begin_walk(engine)
    while q >= 0:
        r = engine.queues.left[q]
        ... leave if r does not fit and the engine is not empty ...
        q = admit_and_go_on(engine, q, decision)
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import next_in_order, start_of_queues
from llmsched_env.engine.state import Engine
from llmsched_env.peak import run_everything
from llmsched_env.types import Decision


@compiled
def begin_walk(engine: Engine, decision: Decision) -> int:
    """Everything runs, nobody enters yet. Returns the queue of the first request outside; -1 if nobody waits."""
    run_everything(engine, False, decision)
    if engine.num_waiting == 0:
        return -1
    start_of_queues(engine)
    return next_in_order(engine)


@compiled
def admit_and_go_on(engine: Engine, q: int, decision: Decision) -> int:
    """Queue q's next request enters. Returns the queue of the one after it in the engine's order; -1 at the end."""
    queues = engine.queues
    decision.admit[q] += 1
    queues.left[q] = engine.requests.next[queues.left[q]]
    return next_in_order(engine)
