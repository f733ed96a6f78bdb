"""The fast simulator as a backend: the compiled step over the arrays."""

from __future__ import annotations

from typing import Any

from llmsched_env.engine import kernel
from llmsched_env.engine.arrays import ArrayBackend, ArrayView
from llmsched_env.engine.state import END_NOT, END_STUCK, I_DONE
from llmsched_env.types import Decision, EngineConfig, EpisodeLimits, QueueLayout, Workload


class SimBackend(ArrayBackend):
    """The fast simulator (``llmsched_env.backend.Backend``)."""

    def reset(
        self,
        workload: Workload,
        layout: QueueLayout,
        engine: EngineConfig,
        limits: EpisodeLimits,
        *,
        reveal_output_length: bool = False,
    ) -> ArrayView:
        view = super().reset(workload, layout, engine, limits, reveal_output_length=reveal_output_length)
        # Collected once an episode: looking up thirteen attributes takes as long as a small iteration.
        self.arrays: tuple[Any, ...] = (
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
        return view

    def advance(self, decision: Decision) -> None:
        if self.scalars[I_DONE] != END_NOT:
            self.check_running()
        kernel.step(decision.array, *self.arrays)
        if self.scalars[I_DONE] == END_STUCK:
            self.check_progress()
