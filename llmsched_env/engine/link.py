"""Which functions an engine calls: those of its preset, its options and its time model, and no other is compiled."""

from __future__ import annotations

import os
from typing import Any, cast

import numba

from llmsched_env.compiled import compile_elsewhere
from llmsched_env.engine import parts, prefix_cache, priority, segments
from llmsched_env.engine.async_step import async_step
from llmsched_env.engine.contexts import describe_contexts
from llmsched_env.engine.schedule_paper import schedule_paper
from llmsched_env.engine.schedule_vllm import schedule_vllm
from llmsched_env.engine.state import Code, Engine, Pool
from llmsched_env.engine.step import schedule_elsewhere, step
from llmsched_env.engine_config import EngineConfig
from llmsched_env.pointers import Argument, address_of
from llmsched_env.threads import available_threads
from llmsched_env.types import Decision, QueueLayout

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


_shared: set[str] = set()


def _share_compiling(engine: EngineConfig) -> None:
    """At the first use on a machine with a second processor: the schedule is compiled by another process, the step by this one."""
    if _shared or numba.config.DISABLE_JIT or "LLMSCHED_COMPILE_ALONE" in os.environ or available_threads() < 2:
        return
    _shared.add(engine.preset)
    chosen: Any = schedule_paper if engine.preset == "paper" else schedule_vllm
    if not chosen.dispatcher._cache.holds_any() and not cast(Any, step).dispatcher._cache.holds_any():
        compile_elsewhere([chosen], f"from llmsched_env.engine.link import compile_schedule; compile_schedule({engine.preset == 'paper'})")


def compile_schedule(paper: bool) -> None:
    """Compile the schedule of a preset into the cache."""
    address_of(schedule_paper if paper else schedule_vllm, (Engine,))


def link(code: Code, engine: EngineConfig, layout: QueueLayout, schedule: int | None = None, *, in_parts: bool = False) -> None:
    """Write the addresses of an engine's functions; they are good in this process only.

    Args:
        schedule: address of the ``Callback`` that has another engine schedule; default the preset's own rules.
        in_parts: steps are taken in two parts (``llmsched_env.engine.parts``), not whole.
    """
    if schedule is None:
        _share_compiling(engine)
    code.overlaps = engine.async_scheduling
    if in_parts:
        code.begin = address_of(parts.begin, (Engine, Decision))
        code.finish = address_of(parts.finish_async if engine.async_scheduling else parts.finish, (Engine,))
    else:
        code.step = address_of(async_step if engine.async_scheduling else step, (Engine, Decision))
    code.seconds = engine.time_model.address()
    code.describe_contexts = address_of(describe_contexts, (Engine,)) if engine.time_model.reads_contexts else 0
    if layout.num_segments > 1:
        for name, (function, arguments) in _BOUNDARIES.items():
            setattr(code, name, address_of(function, arguments))
    if engine.enable_prefix_caching:
        for name, (function, arguments) in _POOL.items():
            setattr(code, name, address_of(function, arguments))
        for name, (function, arguments) in _POOL_COUNTS.items():
            setattr(code, name, address_of(function, arguments, int))
    if engine.scheduling_policy == "priority":
        code.queue_in_order = address_of(priority.queue_in_order, (Engine, int))
        if schedule is None:
            code.serve_by_priority = address_of(priority.serve_by_priority, (Engine, int, int), int)
    code.callback = schedule or 0
    if schedule is not None:
        code.schedule = address_of(schedule_elsewhere, (Engine,))
    else:
        code.schedule = address_of(schedule_paper if engine.preset == "paper" else schedule_vllm, (Engine,))
