"""Where to cut decode lengths into segments, and the authors' allocation rule for a given cap.

Segment-wise design (arXiv 2504.11320 v4, extension section): L segments in place of one per length.
Few segments waste base memory, as n_k requests are counted at every stage though many complete inside;
many segments add boundary queues with their buffers. So M_req is U-shaped in L.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from llmsched_env import checks
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, InfeasibleError
from llmsched_env.fluid.buffer import merge_segments
from llmsched_env.fluid.nested import design_memory
from llmsched_env.types import MOST_QUEUES, FloatArray, IntArray, LengthStatistics

MOST_STAGES = 2**24
"""Of all segments together: every one has a cap of its own."""

Cut = Literal["width", "probability"]


def equal_width_ends(statistics: LengthStatistics, num_segments: int) -> tuple[int, ...]:
    """Ends at equal steps over [0, longest output], merged (``merge_segments``)."""
    checks.integer("num_segments", num_segments, 1, MOST_QUEUES)
    longest = statistics.max_output
    ends = sorted({max(1, math.ceil(longest * k / num_segments)) for k in range(1, num_segments + 1)})
    return merge_segments(statistics, ends)


def equal_probability_ends(statistics: LengthStatistics, num_segments: int) -> tuple[int, ...]:
    """Ends at the quantiles k / L of the output length: a request stops in each segment with probability about 1 / L."""
    checks.integer("num_segments", num_segments, 1, MOST_QUEUES)
    order = np.argsort(statistics.output, kind="stable")
    lengths, cumulative = np.ceil(statistics.output[order]), np.cumsum(statistics.weight[order])
    levels = np.arange(1, num_segments) / num_segments
    inner = lengths[np.minimum(np.searchsorted(cumulative, levels - 1e-12), lengths.size - 1)]
    return merge_segments(statistics, sorted({*(int(r) for r in inner), statistics.max_output}))


CANDIDATES = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, slots=True)
class SegmentDesign:
    """One candidate, with its memory at the cycle ``slack`` * (shortest stable cycle).

    Attributes:
        ends: all K ends r_k.
        cut: equal widths or equal probabilities.
        kv_base: M^pi (KV tokens); infinite where no cycle is stable.
        kv_loose: M^pi and boundary queues at their thresholds.
        kv_required: M_req.
    """

    ends: tuple[int, ...]
    cut: Cut
    kv_base: float
    kv_loose: float
    kv_required: float


def segment_designs(
    statistics: LengthStatistics, rate: float, engine: EngineConfig, *, candidates: Sequence[int] = CANDIDATES, **goal: Any
) -> tuple[SegmentDesign, ...]:
    """Every candidate (number of segments x kind of cut, equal ends once) with its memory: the data of the U-shape.

    Args:
        goal: ``horizon_seconds``, ``slack``, ``eta``, ``delta``, ``num_types`` of ``design_memory``.
    """
    if not checks.integers("segment_design.candidates", candidates, 1, MOST_QUEUES, most=1000):
        raise ConfigError("segment_design.candidates: empty, must hold at least one number of segments")
    found: dict[tuple[int, ...], Cut] = {}
    for count in candidates:
        found.setdefault(equal_width_ends(statistics, count), "width")
        found.setdefault(equal_probability_ends(statistics, count), "probability")
    return tuple(SegmentDesign(ends, cut, *design_memory(statistics, rate, engine, ends, **goal)) for ends, cut in found.items())


def segment_design(
    statistics: LengthStatistics,
    rate: float,
    engine: EngineConfig,
    *,
    num_segments: int | None = None,
    candidates: Sequence[int] = CANDIDATES,
    **goal: Any,
) -> tuple[int, ...]:
    """All segment ends r_1 < ... < r_K (K after merging may be below the number asked for).

    Chosen is the smallest M_req. If that is above C for every candidate, no candidate can keep the
    no-overflow guarantee, and the one with the smallest M^pi plus boundary thresholds is chosen, the
    memory that ``nested_thresholds(..., overload=True)`` then works with.

    Args:
        num_segments: only this number of segments instead of ``candidates``.
        goal: as for ``segment_designs``.

    Raises:
        InfeasibleError: no candidate has a stable cycle at this rate.
    """
    designs = segment_designs(statistics, rate, engine, candidates=candidates if num_segments is None else (num_segments,), **goal)
    best = min(designs, key=lambda d: d.kv_required)
    if best.kv_required <= engine.kv_capacity_tokens:
        return best.ends
    best = min(designs, key=lambda d: d.kv_loose)
    if math.isinf(best.kv_loose):
        raise InfeasibleError(f"segment_design: no candidate has a stable cycle at {rate:.6g} requests/s; lower the rate")
    return best.ends


@dataclass(frozen=True, slots=True)
class CapAllocation:
    """A cap on requests in the system, divided among segments.

    Attributes:
        thresholds: (K,) float64 n_k, requests per stage.
        segment_caps: (K,) int32, width_k * n_k rounded.
        stage_caps: for each segment (width_k,) int32, its cap spread as evenly as possible over its stages.
    """

    thresholds: FloatArray
    segment_caps: IntArray
    stage_caps: tuple[IntArray, ...]


def allocate_cap(total_limit: float, continuation: npt.ArrayLike, widths: npt.ArrayLike, eta: float = 0.05) -> CapAllocation:
    """The allocation rule of the paper's experiments (arXiv 2504.11320 v4, section 6).

    q_k = min(p_k + eta, 0.99), where p_k is the probability to continue from segment k to k + 1;
    n_k = n_1 q_1 ... q_{k-1}; sum_k width_k n_k = total_limit.

    Args:
        total_limit: cap on requests, > 0.
        continuation: (K-1,) p_k.
        widths: (K,) decode stages of each segment, integers >= 1.
        eta: margin, >= 0.
    """
    p = np.atleast_1d(checks.numbers("allocate_cap.continuation", continuation))
    width = checks.counts("allocate_cap.widths", widths, 1, single=True)
    total_limit = checks.number("allocate_cap.total_limit", total_limit, high=float(checks.MOST_TOKENS), open_low=True)
    if not width.size or int(width.sum(dtype=np.int64)) > MOST_STAGES:
        raise ConfigError(f"allocate_cap.widths: {checks.shown(widths)}, must be integers >= 1, {MOST_STAGES} stages in all")
    if p.shape != (width.size - 1,) or not np.all((p >= 0) & (p <= 1)):
        raise ConfigError(f"allocate_cap.continuation: {p.tolist()}, must be {width.size - 1} probabilities for {width.size} widths")
    checks.number("allocate_cap.eta", eta)
    shape = np.cumprod([1.0, *np.minimum(p + eta, 0.99)])
    thresholds: FloatArray = total_limit / float(width @ shape) * shape
    caps = np.floor(width * thresholds + 0.5).astype(np.int32)
    steps = [np.arange(int(w) + 1) * int(cap) // int(w) for w, cap in zip(width, caps, strict=True)]
    return CapAllocation(thresholds, caps, tuple(np.diff(step).astype(np.int32) for step in steps))
