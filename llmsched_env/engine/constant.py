"""A whole episode under one decision that never changes, in compiled code.

FCFS, vLLM and Sarathi-Serve decide the same at every iteration, so the loop over iterations needs no
Python: it runs several times as fast as asking a policy before every step. The arrays end up exactly
as that loop would leave them.
"""

from __future__ import annotations

from llmsched_env.compiled import compiled
from llmsched_env.engine import kernel
from llmsched_env.engine.backend import SimBackend
from llmsched_env.engine.state import I_DONE
from llmsched_env.types import Decision


@compiled
def _run(decision, model, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batch, events, trace):  # type: ignore[no-untyped-def]
    while scalars[I_DONE] == 0:
        kernel.step(decision, model, settings, ends, requests, times, slots, queues, queue_f, scalars, clocks, batch, events, trace)


def run_constant(backend: SimBackend, decision: Decision) -> None:
    """Step ``backend``, which has been reset, with ``decision`` to the end of the episode.

    Raises:
        RuntimeError: the episode has ended already, or the engine can make no progress.
    """
    backend.check_running()
    _run(
        decision.array,
        backend.model,
        backend.settings,
        backend.ends,
        backend.requests,
        backend.times,
        backend.slots,
        backend.queues,
        backend.queue_f,
        backend.scalars,
        backend.clocks,
        backend.batch,
        backend.events,
        backend.trace,
    )
    backend.check_progress()
