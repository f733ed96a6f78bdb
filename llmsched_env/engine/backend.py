"""The fast simulator as a backend: the compiled step over the arrays."""

from __future__ import annotations

from llmsched_env.engine import kernel
from llmsched_env.engine.arrays import ArrayBackend
from llmsched_env.types import Decision


class SimBackend(ArrayBackend):
    """The fast simulator (``llmsched_env.backend.Backend``)."""

    def advance(self, decision: Decision) -> None:
        self.check_running()
        kernel.step(
            decision.array,
            self.model,
            self.settings,
            self.ends,
            self.requests,
            self.times,
            self.slots,
            self.queues,
            self.queue_f,
            self.scalars,
            self.clocks,
            self.batch,
            self.events,
            self.trace,
        )
        self.check_progress()
