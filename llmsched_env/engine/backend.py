"""The fast simulator as a backend: the compiled step over the arrays."""

from __future__ import annotations

from llmsched_env.engine import kernel
from llmsched_env.engine import state as st
from llmsched_env.engine.arrays import ArrayBackend
from llmsched_env.types import Decision


class SimBackend(ArrayBackend):
    """The fast simulator (``llmsched_env.backend.Backend``)."""

    def advance(self, decision: Decision) -> None:
        """One step without a report.

        Raises:
            RuntimeError: called after the episode has ended, or the engine can make no progress.
        """
        if self.scalars[st.I_DONE] != st.END_NOT:
            raise RuntimeError("the episode has ended; call reset() first")
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
        if self.scalars[st.I_DONE] == st.END_STUCK:
            raise RuntimeError(
                f"the engine can schedule nothing at {self.clocks[st.F_CLOCK]:.6f} s with "
                f"{self.scalars[st.I_WAITING]} waiting and {self.scalars[st.I_RESIDENTS]} resident requests"
            )
