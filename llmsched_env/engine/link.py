"""Which functions an engine calls: those of its preset, its options and its time model, and no other is compiled."""

from __future__ import annotations

from typing import Any

from llmsched_env.engine import prefix_cache, segments
from llmsched_env.engine.schedule_paper import schedule_paper
from llmsched_env.engine.schedule_vllm import schedule_vllm
from llmsched_env.engine.state import Code, Engine, Pool
from llmsched_env.engine.step import step
from llmsched_env.pointers import Argument, address_of
from llmsched_env.types import Decision, EngineConfig, QueueLayout

_Functions = dict[str, tuple[Any, tuple[Argument, ...]]]

_BOUNDARIES: _Functions = {
    "enter_boundaries": (segments.enter_boundaries, (Engine, Decision)),
    "evict_boundaries": (segments.evict_boundaries, (Engine, Decision)),
    "place": (segments.place, (Engine, int, int)),
}
_POOL: _Functions = {
    "open_seat": (prefix_cache.open_seat, (Pool, int, int)),
    "grow": (prefix_cache.grow, (Pool, int, int, int)),
    "close_seat": (prefix_cache.close_seat, (Pool, int)),
}
_POOL_COUNTS: _Functions = {
    "cached_blocks": (prefix_cache.cached_blocks, (Pool, int, int)),
    "free_among": (prefix_cache.free_among, (Pool, int, int)),
}


def link(code: Code, engine: EngineConfig, layout: QueueLayout, schedule: int | None = None) -> None:
    """Write the addresses of an engine's functions; they are good in this process only.

    Args:
        schedule: address of another engine's ``schedule(engine)``; default the preset's own.
    """
    code.step = address_of(step, (Engine, Decision))
    if schedule is None:
        schedule = address_of(schedule_paper if engine.preset == "paper" else schedule_vllm, (Engine,))
    code.schedule = schedule
    code.seconds = engine.time_model.address()
    if layout.num_segments > 1:
        for name, (function, arguments) in _BOUNDARIES.items():
            setattr(code, name, address_of(function, arguments))
    if engine.enable_prefix_caching:
        for name, (function, arguments) in _POOL.items():
            setattr(code, name, address_of(function, arguments))
        for name, (function, arguments) in _POOL_COUNTS.items():
            setattr(code, name, address_of(function, arguments, int))
