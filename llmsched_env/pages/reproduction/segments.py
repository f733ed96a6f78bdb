"""Theory, part 2: base memory, safety buffer and latency over the number of segments of Nested WAIT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from llmsched_env.bench.plots import COLOURS
from llmsched_env.engine_config import EngineConfig
from llmsched_env.fluid import continuation, equal_width_ends, nested_memory, required_memory
from llmsched_env.fluid.nested import design_memory
from llmsched_env.markdown import table
from llmsched_env.pages.reproduction.cases import Case, Group
from llmsched_env.pages.reproduction.figures import Curve, draw, figure, finish
from llmsched_env.pages.reproduction.lab import Claim, Lab, picture, show
from llmsched_env.types import LengthStatistics

Memory = tuple[float, float, float]
"""M^pi, that and the boundary thresholds, and M_req, in KV tokens (``design_memory``)."""


def uniform_types(count: int = 20, step: int = 10, prompt: int = 10) -> tuple[tuple[int, int, float], ...]:
    return tuple((prompt, step * (j + 1), 1.0) for j in range(count))


def statistics_of(types: tuple[tuple[int, int, float], ...]) -> LengthStatistics:
    prompt, output, weight = zip(*types, strict=True)
    return LengthStatistics.of(prompt, output, weight)


def segments(lab: Lab) -> tuple[list[Claim], list[str]]:
    """Base memory, buffer and latency against the number of segments."""
    types, rate = uniform_types(), 3.0
    engine = (("capacity_tokens", 10_000_000), ("d0", 1.0), ("d1", 1e-5))
    model = EngineConfig.paper(10_000_000, 1.0, 1e-5)
    statistics = statistics_of(types)
    counts = (1, 2, 3, 4, 5, 7, 10, 20)
    plans = ((200.0, 0.1), (200.0, 1e-5), (20.0, 1e-3), (2000.0, 1e-3))
    ends = {k: equal_width_ends(statistics, k) for k in counts}
    memory = {
        (t, d): [design_memory(statistics, rate, model, ends[k], horizon_seconds=t, slack=1.25, eta=0.1, delta=d) for k in counts]
        for t, d in plans
    }
    seeds, horizon = lab.pick(10, 3), lab.pick(3000.0, 1500.0)
    cases = [
        Case("nested-wait", rate, (("segment_ends", ends[k][:-1]),), engine, types=types, horizon=horizon, seeds=seeds) for k in counts
    ]
    real = (("capacity_tokens", 10_000_000), ("d0", 10.6e-3), ("d1", 0.401e-6))
    lmsys = Case("nested-wait", 30.0, (), real, lengths="lmsys", horizon=lab.pick(120.0, 40.0), seeds=seeds)
    chat = lmsys.statistics()
    chat_counts = (2, 3, 4, 6, 8, 12, 16)
    chat_ends = {k: equal_width_ends(chat, k) for k in chat_counts}
    chat_cases = [lmsys.but(options=(("segment_ends", chat_ends[k][:-1]),)) for k in chat_counts]
    groups = lab.run("number of segments", [*cases, *chat_cases])
    chat_model = EngineConfig.paper(10_000_000, 10.6e-3, 0.401e-6)
    chat_memory = [
        design_memory(chat, 30.0, chat_model, chat_ends[k], horizon_seconds=120.0, slack=1.25, eta=0.1, delta=0.1) for k in chat_counts
    ]
    best = {plan: counts[int(np.argmin([m[2] for m in values]))] for plan, values in memory.items()}
    u_shape = all(1 < k < counts[-1] for k in best.values())
    own = groups[: len(counts)]
    rows, chat_rows = segment_rows(counts, memory[plans[0]], own), segment_rows(chat_counts, chat_memory, groups[len(counts) :])
    draw_segments(lab, memory, dict(zip(counts, own, strict=True)), dict(zip(chat_counts, chat_memory, strict=True)))
    prompts_claim, prompts_body = prompts(lab)
    body = [
        "### The number of segments",
        "",
        "Twenty output lengths 10, 20, ..., 200 with prompt 10 at 3 requests/s in all (d0 = 1 s, d1 = 0.01 ms), cut into L segments of "
        f"equal width; latency with memory to spare, {seeds} seeds. The paper does not state the lengths behind its figures, so only "
        "shapes compare.",
        "",
        *table(["L", "M^pi", "buffer (T = 200 s, delta = 0.1)", "M_req", "mean latency (s)", "mean TTFT (s)"], rows, "lr"),
        "",
        "A dash: no cycle is stable with so few segments. Continuous lengths: the lmsys distribution at 30 requests/s with d0 = 10.6 ms "
        "and d1 = 0.401 us (fractional thresholds, rotated).",
        "",
        *table(["L", "M^pi", "buffer", "M_req", "mean latency (s)", "mean TTFT (s)"], chat_rows, "lr"),
        "",
        *picture("segments.png", "Required memory over the number of segments; latency (bars: 95 % intervals)."),
        *prompts_body,
    ]
    claims = [
        Claim(
            "memory over the number of segments is U-shaped",
            "U shape, the base term dominates",
            "; ".join(f"smallest at L = {best[p]} for T = {p[0]:g} s, delta = {p[1]:g}" for p in plans),
            "agrees" if u_shape else "differs",
            "" if u_shape else "the minimum is at an end of the range for some of the settings",
        ),
        prompts_claim,
    ]
    return claims, body


def segment_rows(counts: Sequence[int], memory: Sequence[Memory], groups: Sequence[Group]) -> list[list[str]]:
    """A line for each number of segments."""
    return [
        [str(k), *memory_cells(m), show(g.interval("latency")), show(g.interval("ttft"))]
        for k, m, g in zip(counts, memory, groups, strict=True)
    ]


def draw_segments(
    lab: Lab, memory: Mapping[tuple[float, float], Sequence[Memory]], groups: Mapping[int, Group], chat: Mapping[int, Memory]
) -> None:
    """Memory by plan (T, delta), latency with memory to spare, and memory of continuous lengths; all over the number of segments."""
    first = next(iter(memory.values()))
    with figure(lab.figures / "segments.png", 1, 3, width=3.6, height=3.2) as axes:
        x = [float(k) for k in groups]
        for style, ((t, d), values) in enumerate(memory.items()):
            axes[0][0].plot(x, [m[2] / 1000 for m in values], marker=".", color=COLOURS[style], label=f"T = {t:g} s, delta = {d:g}")
        axes[0][0].plot(x, [m[0] / 1000 for m in first], color="black", linestyle=":", label="base memory M^pi")
        finish(axes[0][0], "20 lengths, 3 requests/s", "segments L", "M_req (thousand KV tokens)")
        draw(
            axes[0][1],
            [
                Curve("latency", x, [g.interval("latency") for g in groups.values()], 2),
                Curve("TTFT", x, [g.interval("ttft") for g in groups.values()], 0),
            ],
            scale="y",
        )
        finish(axes[0][1], "20 lengths, C large", "segments L", "seconds")
        y, chat_memory = [float(k) for k in chat], list(chat.values())
        axes[0][2].plot(y, [m[2] / 1000 for m in chat_memory], marker=".", color=COLOURS[0], label="M_req, T = 120 s, delta = 0.1")
        axes[0][2].plot(y, [m[0] / 1000 for m in chat_memory], color="black", linestyle=":", label="base memory M^pi")
        finish(axes[0][2], "continuous lengths (lmsys), 30/s", "segments L", "thousand KV tokens")
        axes[0][0].set_ylim(bottom=0)
        axes[0][2].set_ylim(bottom=0)


def memory_cells(memory: Memory) -> list[str]:
    """M^pi, buffer and M_req; a dash where no cycle is stable."""
    base, _, required = memory
    return [f"{v:,.0f}" if np.isfinite(v) else "-" for v in (base, required - base if np.isfinite(base) else np.nan, required)]


def prompts(lab: Lab) -> tuple[Claim, list[str]]:
    """Prompts that differ with the output length: memory by the longest prompt of each segment."""
    types = ((100, 50, 1.0), (40, 100, 1.0), (10, 200, 1.0))
    statistics, ends = statistics_of(types), (50, 100, 200)
    case = Case(
        "nested-wait",
        1.0,
        (("segment_ends", ends[:-1]),),
        (("capacity_tokens", 1_000_000), ("d0", 1.0), ("d1", 2e-5)),
        types=types,
        horizon=lab.pick(10000.0, 3000.0),
        seeds=lab.pick(20, 4),
    )
    policy: Any = case.build()
    n = policy.parameters.thresholds
    model = case.base_engine()
    p = continuation(statistics, list(ends))
    peak = lab.run("prompts by segment", [case])[0].values("kv_peak").max()

    def need(prompt: Any) -> tuple[float, float]:
        whole = required_memory(n, ends, p, prompt, model, num_types=3, horizon_seconds=case.horizon, delta=0.1)
        return nested_memory(n, ends, prompt, model), whole

    by_segment, everywhere = need([100.0, 40.0, 10.0]), need([100.0, 100.0, 100.0])
    fits = peak <= by_segment[1]
    body = [
        "**Prompts that differ by segment.** Types (100, 50), (40, 100), (10, 200) at 1 request/s, segments ending at the three lengths: "
        f"with the longest prompt of each segment M^pi = {by_segment[0]:,.0f} and M_req = {by_segment[1]:,.0f}; with the longest of all "
        f"in every segment {everywhere[0]:,.0f} and {everywhere[1]:,.0f}. Highest peak over {case.seeds} seeds: {peak:,.0f} tokens.",
        "",
    ]
    claim = Claim(
        "prompts that differ: the longest of each segment suffices",
        "memory terms with the per-segment maximum",
        f"peak {peak:,.0f} <= M_req {by_segment[1]:,.0f}" if fits else f"peak {peak:,.0f} > M_req {by_segment[1]:,.0f}",
        "agrees" if fits else "differs",
    )
    return claim, body
