"""The fast simulator as a backend: the compiled step over the engine's record."""

from __future__ import annotations

from llmsched_env.engine.prefix_cache import SharedPrompts
from llmsched_env.engine.record_backend import RecordBackend, RecordView
from llmsched_env.engine.state import END_STUCK
from llmsched_env.engine.step import step_at
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.types import Decision, QueueLayout, Workload


class SimBackend(RecordBackend):
    """The fast simulator (``llmsched_env.backend.Backend``)."""

    def advance(self, decision: Decision) -> None:
        self.check_running()
        self.check_decision(decision)
        if step_at(self.record.handle, decision.handle) == END_STUCK:
            self.check_progress()


class PrefixCachingBackend(SimBackend):
    """The same with ``engine.enable_prefix_caching`` always on: backend ``sim-prefix-cache``.

    Even where no two prompts are alike this matters: a preempted request finds again those of its
    blocks that nobody has taken meanwhile. In the view and the reports a shared block counts once in
    ``kv_used`` and once for each user in ``resident_kv`` and ``boundary_kv``.
    """

    def __init__(self, shared: SharedPrompts | None = None, *, uncached_first: bool = True, trace: bool = False) -> None:
        super().__init__(trace, shared=shared, uncached_first=uncached_first)

    def reset(
        self,
        workload: Workload,
        layout: QueueLayout,
        engine: EngineConfig,
        limits: EpisodeLimits,
        *,
        reveal_output_length: bool = False,
    ) -> RecordView:
        engine = engine.replace(enable_prefix_caching=True)
        return super().reset(workload, layout, engine, limits, reveal_output_length=reveal_output_length)
