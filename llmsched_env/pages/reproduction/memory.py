"""Theory, part 2: the eviction cascade and the safety buffer; the number of segments is part of its section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from llmsched_env.bench.plots import COLOURS
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import require
from llmsched_env.fluid import required_memory
from llmsched_env.markdown import table
from llmsched_env.pages.reproduction.cases import Case, Group
from llmsched_env.pages.reproduction.figures import Curve, draw, figure, finish, thin
from llmsched_env.pages.reproduction.lab import Claim, Lab, Section, number, picture, show
from llmsched_env.pages.reproduction.segments import segments
from llmsched_env.pages.reproduction.stability import LABEL, STYLE, TWO, paper_engine
from llmsched_env.runner import Policy
from llmsched_env.types import Workload

NESTED = (("thresholds", (16, 6)), ("segment_ends", (10,)))
BASE, M_STAR = 4170, 3000
HORIZON = 20000.0
DELTAS = (0.5, 0.2, 0.1, 0.05, 0.01)


def section(lab: Lab) -> Section:
    parts = [cascade(lab), buffer(lab), segments(lab)]
    return Section(
        "Eviction cascade, safety buffer, segments (`paper` preset)",
        [claim for claims, _ in parts for claim in claims],
        [line for _, body in parts for line in body],
    )


@dataclass(frozen=True, slots=True)
class Course:
    """One run step by step: (T,) end of the step, KV tokens charged, evictions in it, requests completed in it."""

    time: npt.NDArray[np.float64]
    kv: npt.NDArray[np.float64]
    evictions: npt.NDArray[np.float64]
    completed: npt.NDArray[np.float64]


def course(policy: Policy, workload: Workload, horizon: float) -> Course:
    backend = SimBackend()
    policy.reset()
    limits = EpisodeLimits(drain=False, horizon=horizon)
    view = backend.reset(workload, policy.layout, policy.engine, limits, reveal_output_length=policy.known_lengths)
    steps = []
    now, last = backend.record, backend.record.report
    while not backend.done:
        backend.advance(policy.decide(view))
        steps.append((now.clock, last.kv_reserved, last.evicted + last.preempted, last.completed))
    columns = np.array(steps, dtype=np.float64).T
    return Course(*columns)


def toy(start: tuple[int, int], arrivals: str, iterations: int) -> Course:
    """FCFS with C = 12 and l = l' = 1, one second an iteration, from [being prefilled, in decode] = ``start``.

    ``arrivals``: ``backlog`` (always more than fits) or ``4`` (four an iteration).
    """
    first = [0.0] * start[1] + [1.0] * start[0]
    rest = [1.0] * (12 * iterations) if arrivals == "backlog" else [float(t) for t in range(2, iterations) for _ in range(4)]
    times = first + rest
    policy = Case("fcfs", 4.0, (), (("capacity_tokens", 12), ("d0", 1.0), ("d1", 0.0)), types=((1, 1, 1.0),), horizon=1.0).build()
    return course(policy, Workload.of(times, [1] * len(times), [1] * len(times)), float(iterations) + 0.5)


ToyRuns = Mapping[tuple[tuple[int, int], str], Course]
"""By start and kind of arrivals."""


def cascade(lab: Lab) -> tuple[list[Claim], list[str]]:
    """The toy system from a balanced and an unbalanced start, and the two types at three capacities."""
    long = 400
    runs = {(s, a): toy(s, a, long + 2) for s in ((4, 4), (6, 3)) for a in ("backlog", "4")}
    # The first iteration only prepares the start state; the second completes its decodes.
    done = {key: run.completed[1 : long + 1] for key, run in runs.items()}
    rows = toy_rows(runs, done)
    bad, good = float(done[(6, 3), "backlog"].mean()), float(done[(4, 4), "backlog"].mean())

    capacities = {f"M* = {M_STAR:,}": M_STAR, "1.125 M* = 3,375": 3375, "M_req = 5,003": 5003}
    policies: dict[str, tuple[tuple[str, Any], ...]] = {"fcfs": (), "wait": (), "nested-wait": NESTED}
    cases = {
        (p, c): Case(p, 3.0, o, paper_engine(c), types=TWO, horizon=lab.pick(HORIZON, 6000.0), seeds=lab.pick(10, 3))
        for c in capacities.values()
        for p, o in policies.items()
    }
    groups = dict(zip(cases, lab.run("eviction cascade", list(cases.values())), strict=True))
    draw_cascade(lab, runs, cases, capacities)
    summary = [
        [f"{LABEL[p]}, C = {c:,}", show(g.interval("tokens"), 4), show(g.interval("latency")), show(g.interval("evictions"))]
        for (p, c), g in groups.items()
    ]
    wait_evictions = max(int(groups["wait", c].values("evictions").max()) for c in capacities.values())
    body = [
        "### The eviction cascade",
        "",
        "Greedy FCFS with C = 12 and l = l' = 1 (d0 = 1, d1 = 0): the balanced state [4, 4] (requests in prefill, in decode) and [6, 3].",
        "",
        *table(["start, arrivals", "completions, first 12 iterations", f"mean of {long}", "evictions"], rows, "lr"),
        "",
        *table(
            ["types (10, 10, 2/s), (10, 20, 1/s)", "throughput (tok/s), fluid 40", "mean latency (s)", "evictions"],
            summary,
            "lr",
        ),
        "",
        f"T = {cases['fcfs', 3000].horizon:,.0f} s, {cases['fcfs', 3000].seeds} seeds. Below M_req Nested WAIT runs outside its "
        "conditions.",
        "",
        *picture(
            "cascade.png",
            "Top: the toy system. Below: KV charged (dotted: C) and evictions over time, one seed.",
        ),
    ]
    claims = [
        Claim(
            "FCFS from [6, 3] falls into an eviction cycle",
            "about 3 to 3.5 completions an iteration against 4 from [4, 4]",
            f"{bad:.2f} against {good:.2f} with a backlog, {done[(6, 3), '4'].mean():.3f} with four arrivals an iteration",
            "agrees" if bad < 3.5 and good == 4.0 else "differs",
            "the paper's narrative is no deterministic rule; ours is greedy fill, eviction of the newest, no admission beside an eviction",
        ),
        Claim(
            "WAIT from an empty start never evicts (M^pi <= C)",
            "0 evictions",
            f"at most {wait_evictions} on any seed and capacity",
            "agrees" if wait_evictions == 0 else "differs",
        ),
    ]
    return claims, body


def toy_rows(runs: ToyRuns, done: Mapping[tuple[tuple[int, int], str], npt.NDArray[np.float64]]) -> list[list[str]]:
    """A line for each start and kind of arrivals; ``done``: completions of each iteration."""
    return [
        [
            f"[{s[0]}, {s[1]}], {'backlog' if a == 'backlog' else '4 arrivals an iteration'}",
            ", ".join(f"{int(c)}" for c in d[:12]),
            number(float(d.mean()), 5),
            f"{int(runs[s, a].evictions.sum()):,}",
        ]
        for (s, a), d in done.items()
    ]


def draw_cascade(lab: Lab, runs: ToyRuns, cases: Mapping[tuple[str, int], Case], capacities: Mapping[str, int]) -> None:
    """The toy system above; below one seed of each policy at each capacity."""
    span = lab.pick(3000.0, 1500.0)
    with figure(lab.figures / "cascade.png", 3, 3, width=3.6, height=2.3) as axes:
        draw_toy(axes[0], runs)
        for column, (label, capacity) in enumerate(capacities.items()):
            for p in dict.fromkeys(policy for policy, _ in cases):
                case = cases[p, capacity].but(horizon=span)
                run = course(case.build(), case.workload(0), span)
                time, kv = thin(run.time, run.kv, 400)
                axes[1][column].plot(time, kv, color=COLOURS[STYLE[p]], linewidth=0.7, label=LABEL[p])
                axes[2][column].plot(run.time, np.cumsum(run.evictions), color=COLOURS[STYLE[p]], linewidth=1.2, label=LABEL[p])
            axes[1][column].axhline(capacity, color="black", linestyle=":", linewidth=1)
            axes[1][column].set_ylim(0, 5300)
            finish(axes[1][column], f"C = {label}", "time (s)", "KV (tokens)", legend=False)
            finish(axes[2][column], f"C = {label}", "time (s)", "evictions so far", legend=column == 0)
            axes[2][column].set_ylim(bottom=0, top=max(axes[2][column].get_ylim()[1], 10))


def draw_toy(axes: Any, runs: ToyRuns) -> None:
    """Completions and evictions of the toy system, an axes each."""
    names = {"backlog": "always a backlog", "4": "4 arrivals an iteration"}
    for column, kind in enumerate(("backlog", "4")):
        for start, style in (((4, 4), 0), ((6, 3), 1)):
            run = runs[start, kind]
            axes[column].plot(
                run.time[1:26], run.completed[1:26], color=COLOURS[style], marker=".", linewidth=0.9, label=f"from {list(start)}"
            )
        finish(axes[column], f"C = 12, {names[kind]}", "iteration", "completions", legend=column == 0)
        axes[column].set_ylim(-0.5, 9.5)
    for start, style in (((4, 4), 0), ((6, 3), 1)):
        run = runs[start, "4"]
        axes[2].plot(run.time[1:100], np.cumsum(run.evictions)[1:100], color=COLOURS[style], label=f"from {list(start)}")
    finish(axes[2], "C = 12, 4 arrivals an iteration", "iteration", "evictions so far", legend=False)


def buffer(lab: Lab) -> tuple[list[Claim], list[str]]:
    """Overflow against C between M^pi and M_req, and against delta."""
    horizon = lab.pick(HORIZON, 6000.0)
    engine = EngineConfig.paper(100_000, 1.0, 1e-3)

    def m_req(delta: float) -> float:
        return required_memory((16, 6), (10, 20), (1 / 3,), 10, engine, num_types=2, horizon_seconds=horizon, delta=delta)

    capacities = (4170, 4250, 4300, 4400, 4500, 4600, 4700, 4850, 5003)
    case = Case("nested-wait", 3.0, NESTED, (), types=TWO, horizon=horizon)
    tight = [case.but(engine=paper_engine(c), seeds=lab.pick(10, 3)) for c in capacities]
    loose = case.but(engine=paper_engine(100_000), seeds=lab.pick(1000, 100))
    *groups, free = lab.run("safety buffer", [*tight, loose])
    peaks = np.sort(free.values("kv_peak"))
    n = peaks.size

    def overflow(capacity: float) -> tuple[float, float, float]:
        """P(peak > capacity) with its 95 % interval (Clopper and Pearson)."""
        count = int(np.count_nonzero(peaks > capacity))
        interval = require("scipy.stats", "cli").binomtest(count, n).proportion_ci(method="exact")
        return count / n, float(interval.low), float(interval.high)

    rows, within, shares = [], True, []
    for delta in DELTAS:
        p, low, high = overflow(m_req(delta))
        within = within and low <= delta
        needed = float(np.quantile(peaks, 1 - delta, method="inverted_cdf"))
        shares.append((needed - BASE) / (m_req(delta) - BASE))
        rows.append([f"{delta:g}", f"{m_req(delta):,.0f}", f"{p:.4f} [{low:.4f}, {high:.4f}]", f"{needed:,.0f}", f"{shares[-1]:.2f}"])
    sizes = [
        [f"{c:,}", show(g.interval("evictions")), f"{overflow(c)[0]:.3f}", show(g.interval("latency"))]
        for c, g in zip(capacities, groups, strict=True)
    ]
    draw_buffer(lab, dict(zip(capacities, groups, strict=True)), peaks, m_req)
    body = [
        "### The safety buffer",
        "",
        f"Nested WAIT (16, 6) on the two types with hidden lengths, d0 = 1 s, T = {horizon:,.0f} s: M^pi = {BASE:,}. Overflow is measured "
        f"as the peak of the KV charged over {n} seeds without a memory limit, so that one set of runs serves every C.",
        "",
        *table(["C", "evictions in [0, T]", "P(overflow), no limit", "mean latency (s)"], sizes, "lr"),
        "",
        *table(["delta", "M_req", "P(peak > M_req)", "C needed", "share of the buffer needed"], rows, "lr"),
        "",
        "*C needed* is the (1 - delta) quantile of the peak.",
        "",
        *picture("buffer.png", "Left: evictions against the capacity. Right: measured overflow probability and the bound."),
    ]
    return buffer_claims(groups, shares, n, within=within), body


def buffer_claims(groups: Sequence[Group], shares: Sequence[float], seeds: int, *, within: bool) -> list[Claim]:
    """What the overflow says.

    Args:
        groups: by capacity, from M^pi to M_req.
        shares: of the buffer that each delta needed.
        within: whether every delta was kept.
    """
    return [
        Claim(
            "C >= M_req(delta) overflows with probability at most delta",
            "P(overflow) <= delta",
            f"holds at delta = {', '.join(f'{d:g}' for d in DELTAS)} over {seeds} seeds" if within else "exceeded, see the table",
            "agrees" if within else "differs",
        ),
        Claim(
            "the buffer is not an artefact",
            "at C = M^pi (and M*) evictions persist",
            f"{groups[0].mean('evictions'):,.0f} evictions at M^pi, {groups[-1].mean('evictions'):,.0f} at C = 5,003",
            "agrees" if groups[0].mean("evictions") > 100 and groups[-1].mean("evictions") < 1 else "differs",
        ),
        Claim(
            "tightness of the buffer",
            "no statement",
            f"measured need is {min(shares):.0%} to {max(shares):.0%} of the buffer M_req - M^pi",
            "not comparable",
            "the paper bounds, it does not claim tightness",
        ),
    ]


def draw_buffer(lab: Lab, groups: Mapping[int, Group], peaks: npt.NDArray[np.float64], m_req: Callable[[float], float]) -> None:
    """Evictions against the capacity, and the measured overflow beside the bound; ``m_req``: memory for a delta."""
    with figure(lab.figures / "buffer.png", 1, 2) as axes:
        left, right = axes[0]
        evictions = [g.interval("evictions") for g in groups.values()]
        draw(left, [Curve("evictions in [0, T]", [float(c) for c in groups], evictions, 2)], scale="symlog")
        left.axvline(BASE, color="black", linestyle="--", linewidth=1, label="M^pi")
        left.axvline(m_req(0.1), color="black", linestyle=":", linewidth=1, label="M_req, delta = 0.1")
        left.set_ylim(bottom=0)
        finish(left, "Nested WAIT (16, 6)", "KV capacity C (tokens)", "evictions")
        grid = np.arange(BASE, m_req(0.001), 5.0)
        right.step(grid, [np.mean(peaks > c) for c in grid], color=COLOURS[2], where="post", label=f"measured, {peaks.size} seeds")
        deltas = np.geomspace(1e-3, 0.99, 60)
        right.plot([m_req(d) for d in deltas], deltas, color="black", linestyle=":", label="bound: delta at C = M_req(delta)")
        right.set_yscale("log")
        finish(right, "overflow in [0, T]", "KV capacity C (tokens)", "probability")
