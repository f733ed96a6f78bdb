"""Theory, part 3: arrivals that change, and the variants of WAIT and Nested WAIT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmsched_env.bench.plots import COLOURS, MARKERS
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import require
from llmsched_env.fluid import fluid_equilibrium, window_rates
from llmsched_env.markdown import table
from llmsched_env.pages.reproduction.cases import Case, Group
from llmsched_env.pages.reproduction.figures import Curve, bars_of, draw, figure, finish
from llmsched_env.pages.reproduction.lab import Claim, Lab, Section, picture, show
from llmsched_env.pages.reproduction.stability import CAPACITY, STYLE, TWO, fluid_rate, paper_engine

CYCLE, SWING = 400.0, 0.5
"""Seconds of a period of the time-varying rate, half of it above the mean by this share and half below."""


PAPER_GATE = (
    (8, 4, 128, 0.507, 0.554),
    (10, 6, 160, 0.514, 0.590),
    (12, 6, 224, 0.563, 0.618),
    (14, 7, 352, 0.612, 0.653),
    (15, 9, 160, 0.630, 0.681),
    (16, 10, 224, 0.883, 0.866),
    (18, 10, 224, 1.630, 1.539),
    (19, 11, 224, 1.717, 1.594),
    (20, 14, 224, 2.049, 1.959),
    (21, 12, 320, 2.276, 2.257),
    (22, 14, 192, 2.654, 2.654),
    (23, 14, 192, 3.843, 3.843),
)
"""Wait-gate ablation of the paper (v4, appendix B, p512d20): rate, cap, chunk, mean latency (s) without and with the wait."""


def section(lab: Lab) -> Section:
    varying_claims, varying_body = varying(lab)
    variant_claims, variant_body, facts = variants(lab)
    gate_claims, gate_body = gate(lab)
    return Section(
        "Changing rates, bursts and variants (`paper` preset; the wait gate on `vllm`)",
        varying_claims + variant_claims + gate_claims,
        varying_body + variant_body + gate_body,
        facts,
    )


Groups = Mapping[tuple[str, Any], Group]
"""By arrival process and plan, or by plan and share of the boundary."""


def significant(better: Group, worse: Group, metric: str) -> float:
    """P value of a paired t test that ``metric`` is the same: the seeds give both the same requests."""
    result = require("scipy.stats", "cli").ttest_rel(better.values(metric), worse.values(metric))
    return float(result.pvalue)


def varying(lab: Lab) -> tuple[list[Claim], list[str]]:
    """WAIT planned for the mean and for the busiest window, Modified WAIT and FCFS under steps and MMPP-2."""
    horizon, seeds = lab.pick(20000.0, 6000.0), lab.pick(10, 4)
    edge = fluid_rate(TWO, CAPACITY)
    mean = 0.7 * edge
    low, high = mean * (1 - SWING), mean * (1 + SWING)
    durations, rates = (CYCLE / 2, CYCLE / 2), (low, high)
    model = EngineConfig.paper(CAPACITY, 1.0, 1e-3)
    cycle = fluid_equilibrium((10, 10), (10, 20), (mean * 2 / 3, mean / 3), model).iteration_seconds
    busiest = float(window_rates(durations, rates, cycle, periodic=True))
    planned = min(busiest, 0.999 * edge)
    arrivals: dict[str, tuple[Any, ...]] = {
        "Poisson": ("poisson",),
        f"steps of {CYCLE / 2:g} s at {1 - SWING:g} and {1 + SWING:g} times the mean": ("steps", durations, rates),
        "MMPP-2 bursts, 0.2 and 3.4 times the mean": ("mmpp", 0.2, 3.4, 60.0, 20.0),
    }
    plans = {
        "WAIT, mean rate": ("wait", 0.0, 0),
        "WAIT, busiest window": ("wait", planned, 5),
        "Modified WAIT": ("modified-wait", 0.0, STYLE["modified-wait"]),
        "FCFS": ("fcfs", 0.0, STYLE["fcfs"]),
    }
    cases = {
        (a, p): Case(name, mean, (), paper_engine(CAPACITY), types=TWO, arrivals=process, planned_rate=rate, horizon=horizon, seeds=seeds)
        for a, process in arrivals.items()
        for p, (name, rate, _) in plans.items()
    }
    groups = dict(zip(cases, lab.run("changing rates", list(cases.values())), strict=True))
    rows = [
        [f"{a}: {p}", show(g.interval("tokens"), 4), show(g.interval("latency")), show(g.interval("ttft")), show(g.interval("evictions"))]
        for (a, p), g in groups.items()
    ]
    draw_varying(lab, groups, {p: style for p, (_, _, style) in plans.items()}, mean)
    body = [
        "### Rates that change, and bursts",
        "",
        f"The two types at a mean of {mean:.3g} requests/s (0.7 of the boundary), C = {CAPACITY:,}, T = {horizon:,.0f} s, {seeds} seeds. "
        "*Busiest window* "
        f"is the window form of the thresholds: the highest mean rate over any window of one iteration ({busiest:.3g} requests/s"
        + (f", above the boundary, so the thresholds are those of {planned:.3g})" if busiest > planned else ")")
        + ". *Modified WAIT* (arXiv 2608.06135) estimates the rates on line and recomputes the thresholds before each iteration. "
        "MMPP-2: phases of 60 and 20 s on average.",
        "",
        *table(["arrivals: policy", "throughput (tok/s)", "mean latency (s)", "mean TTFT (s)", "evictions"], rows, "lr"),
        "",
        *picture("changing_rates.png", "Mean latency and evictions by arrival process, 95 % intervals."),
    ]
    return varying_claims(groups, above=busiest > edge), body


def varying_claims(groups: Groups, *, above: bool) -> list[Claim]:
    """What the runs under steps and bursts say; ``above``: whether the busiest window exceeds the stability boundary."""
    names = list(dict.fromkeys(process for process, _ in groups))
    steps, bursts = names[1], names[2]
    window_evictions = int(max(groups[a, "WAIT, busiest window"].values("evictions").max() for a in names))
    modified, plain = groups[bursts, "Modified WAIT"], groups[bursts, "WAIT, mean rate"]
    better = modified.mean("latency") < plain.mean("latency")
    p_value = significant(modified, plain, "latency")
    stepped, stepped_plain = groups[steps, "WAIT, busiest window"], groups[steps, "WAIT, mean rate"]
    return [
        Claim(
            "WAIT with window thresholds keeps memory under time-varying rates",
            "the theorem holds with A_j(t, h) in place of lam_j h",
            f"at most {window_evictions} evictions on any seed; under steps mean latency {show(stepped.interval('latency'))} s "
            f"(thresholds of the mean rate: {show(stepped_plain.interval('latency'))} s)",
            "agrees" if window_evictions == 0 else "differs",
            "the busiest windows of these arrivals exceed the stability boundary" if above else "",
        ),
        Claim(
            "Modified WAIT improves on WAIT under MMPP-2 bursts",
            "on-line estimates help under bursty arrivals (arXiv 2608.06135)",
            f"mean latency {show(modified.interval('latency'))} s against {show(plain.interval('latency'))} s (paired t test, p = "
            f"{p_value:.2g})",
            "agrees" if better and p_value < 0.05 else "differs",
            "their workload and smoothing are not ours" if not (better and p_value < 0.05) else "",
        ),
    ]


def draw_varying(lab: Lab, groups: Groups, styles: Mapping[str, int], mean: float) -> None:
    """Latency and evictions by arrival process; ``mean``: rate in requests/s."""
    names = list(dict.fromkeys(process for process, _ in groups))
    with figure(lab.figures / "changing_rates.png", 1, 2, width=4.9) as axes:
        for column, (metric, title) in enumerate((("latency", "mean latency (s)"), ("evictions", "evictions in [0, T]"))):
            ax = axes[0][column]
            for i, (p, style) in enumerate(styles.items()):
                own = [groups[a, p].interval(metric) for a in names]
                if metric == "evictions":
                    own = [v.on_log_axis() for v in own]
                x = [j + 0.12 * (i - 1.5) for j in range(len(names))]
                ax.errorbar(x, [v.mean for v in own], bars_of(own), fmt=MARKERS[style], color=COLOURS[style], capsize=3, label=p)
            ax.set_xticks(range(len(names)), ["Poisson", "steps", "MMPP-2"])
            ax.set_ylim(bottom=0)
            if metric == "evictions":
                ax.set_yscale("symlog", linthresh=1)
                ax.set_ylim(bottom=-0.2)
            finish(ax, f"mean rate {mean:.2f} requests/s", "arrivals", title, legend=column == 0)


def variants(lab: Lab) -> tuple[list[Claim], list[str], dict[str, float]]:
    """Latency over the load: waiting on and off, and the rules that the authors' code ran."""
    edge = fluid_rate(TWO, CAPACITY)
    loads = lab.pick((0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05), (0.5, 0.8, 1.0, 1.05))
    horizon, seeds = lab.pick(20000.0, 6000.0), lab.pick(10, 4)
    ends = ("segment_ends", (10,))
    plans: dict[str, tuple[str, tuple[tuple[str, Any], ...], str]] = {
        "WAIT": ("wait", (), "wait"),
        "WAIT, any type triggers": ("wait", (("variant", "any-trigger"),), "wait"),
        "WAIT, caps release": ("wait", (("variant", "cap-releases"),), "wait"),
        "WAIT as implemented (both)": ("wait", (("variant", "implemented"),), "wait"),
        "WAIT, cap without the wait": ("wait", (("variant", "no-wait"),), "wait"),
        "FCFS": ("fcfs", (), "wait"),
        "Nested B": ("nested-wait", (ends,), "nested"),
        "Nested A": ("nested-wait", (ends, ("variant", "A")), "nested"),
        "Nested as implemented": ("nested-wait", (ends, ("rule", "implemented")), "nested"),
        "Nested, caps without the wait": ("nested-wait", (ends, ("rule", "no-wait")), "nested"),
    }
    capacity = {"wait": CAPACITY, "nested": 5003}
    cases = {
        (label, f): Case(name, round(f * edge, 6), options, paper_engine(capacity[kind]), types=TWO, horizon=horizon, seeds=seeds)
        for label, (name, options, kind) in plans.items()
        for f in loads
    }
    groups = dict(zip(cases, lab.run("variants", list(cases.values())), strict=True))
    draw_variants(lab, groups, {label: kind for label, (_, _, kind) in plans.items()}, loads)
    rows = [
        [
            label,
            *(show(groups[label, f].interval("latency")) for f in loads),
            f"{max(groups[label, f].values('evictions').max() for f in loads):,.0f}",
        ]
        for label in plans
    ]
    body = [
        "### Waiting on and off, variants A and B, and the implemented rules",
        "",
        f"Mean latency (s) over the load on the two types, {seeds} seeds, T = {horizon:,.0f} s. *Any type triggers*, *caps release* and "
        "*cap without the wait* change one rule of WAIT each (options `variant` of `wait`, `rule` of `nested-wait`); *as implemented* is "
        "what the authors' code ran behind the curves of the first version (WAIT) and of 2026 (Nested WAIT). Thresholds are the same in "
        "all.",
        "",
        *table(["", *(f"{f:g}" for f in loads), "most evictions"], rows, "lr"),
        "",
        *picture("variants.png", "Mean latency over the load, 95 % intervals."),
    ]
    return variant_claims(groups, loads), body, variant_facts(groups, loads)


def variant_facts(groups: Groups, loads: Sequence[float]) -> dict[str, float]:
    """Ratios of mean latencies: what waiting costs below 0.8 of the boundary, and what it and FCFS cost near it."""
    below = [f for f in loads if f <= 0.8]
    wait, off = ([groups[name, f].mean("latency") for f in below] for name in ("WAIT", "WAIT, cap without the wait"))
    cost = max(w / o for w, o in zip(wait, off, strict=True))
    near = max(f for f in loads if f <= 1.0)
    near_off = groups["WAIT, cap without the wait", near].mean("latency")
    return {
        "wait_cost": cost,
        "near_load": near,
        "near_ratio": groups["WAIT", near].mean("latency") / near_off,
        "fcfs_collapse": groups["FCFS", near].mean("latency") / near_off,
    }


def variant_claims(groups: Groups, loads: Sequence[float]) -> list[Claim]:
    """What the runs say of waiting, of the variants of Nested WAIT and of FCFS."""
    facts = variant_facts(groups, loads)
    cost, near, collapse = facts["wait_cost"], facts["near_load"], facts["fcfs_collapse"]
    near_on, near_off = groups["WAIT", near], groups["WAIT, cap without the wait", near]
    helps = near_on.mean("latency") < near_off.mean("latency")
    ratio = [groups["Nested A", f].mean("latency") / groups["Nested B", f].mean("latency") - 1 for f in loads if f < 0.95]
    return [
        Claim(
            "waiting costs a little at low load",
            "small cost at low load (wait-gate ablation)",
            f"up to {cost:.2f} times the latency of the same cap without the wait at loads up to 0.8",
            "agrees" if cost > 1 else "differs",
            "not so little here: an iteration takes 1 s and more before the first token counts" if cost > 1.15 else "",
        ),
        Claim(
            "waiting helps near the boundary",
            "WAIT below no-wait at 16 to 21 requests/s (p512d20)",
            f"at {near:g} of the boundary: WAIT {show(near_on.interval('latency'))} s, no-wait {show(near_off.interval('latency'))} s "
            f"(paired t test, p = {significant(near_on, near_off, 'latency'):.2g})",
            "agrees" if helps and significant(near_on, near_off, "latency") < 0.05 else "differs",
            "" if helps else "in this model the cap alone does the work: it prevents the cascade and never idles",
        ),
        Claim(
            "variant A of Nested WAIT costs 3 to 4 % of latency against B",
            "no statement in the paper (3 to 4 % in an independent simulation of it)",
            f"{min(ratio):+.1%} to {max(ratio):+.1%} at loads below 0.95",
            "not comparable",
            "the paper does not tell the variants apart",
        ),
        Claim(
            "the advantage over FCFS",
            "eviction-free batches keep the throughput",
            f"at {near:g} of the boundary FCFS has {collapse:.1f} times the latency of the cap without the wait",
            "agrees" if collapse > 1.5 else "differs",
        ),
    ]


def draw_variants(lab: Lab, groups: Groups, kinds: Mapping[str, str], loads: Sequence[float]) -> None:
    """Latency over the load: left what is told the lengths (kind ``wait``), right what is not (``nested``)."""
    with figure(lab.figures / "variants.png", 1, 2) as axes:
        for column, kind in enumerate(("wait", "nested")):
            for i, label in enumerate(lbl for lbl, k in kinds.items() if k == kind):
                draw(axes[0][column], [Curve(label, list(loads), [groups[label, f].interval("latency") for f in loads], i)], scale="y")
            title = f"known lengths, C = {CAPACITY:,}" if kind == "wait" else "hidden lengths, C = 5,003"
            finish(axes[0][column], title, "arrival rate / fluid boundary at C = 3,750", "mean latency (s)")


def gate(lab: Lab) -> tuple[list[Claim], list[str]]:
    """The wait-gate ablation with the paper's own caps and chunks, and the variants of WAIT where thresholds are below one."""
    table_rows = lab.pick(PAPER_GATE, PAPER_GATE[::3])
    base = Case("wait-cp", 1.0, preset="vllm", types=((512, 20, 1.0),), requests=lab.pick(10000, 2000), seeds=lab.pick(10, 3))
    cases = {
        (rate, wait): base.but(rate=float(rate), options=(("cap", cap), ("chunk", chunk), ("wait", wait)))
        for rate, cap, chunk, _, _ in table_rows
        for wait in (False, True)
    }
    rates = lab.pick((12.0, 16.0, 20.0, 23.0), (12.0, 20.0))
    names = ("paper", "any-trigger", "cap-releases", "implemented", "no-wait")
    own = {(v, r): base.but(policy="wait", rate=r, options=(("variant", v),)) for v in names for r in rates}
    groups = dict(zip((*cases, *own), lab.run("wait gate", [*cases.values(), *own.values()]), strict=True))
    rows, cost = [], []
    for rate, cap, chunk, paper_off, paper_on in table_rows:
        off, on = groups[rate, False], groups[rate, True]
        cost.append((rate, on.mean("latency") / off.mean("latency") - 1, paper_on / paper_off - 1))
        latencies = [show(g.interval("latency")) for g in (off, on)]
        rows.append(
            [
                f"{rate}/s, cap {cap}, chunk {chunk}",
                *latencies,
                f"{cost[-1][1]:+.1%}",
                f"{paper_off:g}",
                f"{paper_on:g}",
                f"{cost[-1][2]:+.1%}",
            ]
        )
    draw_gate(lab, table_rows, groups)
    body = [
        "### The wait gate on the calibrated engine (p512d20)",
        "",
        f"WAIT-CP with the caps and chunks of the paper's ablation, with the wait and without it; {base.seeds} seeds. The paper's engine "
        "differs (Vidur's Llama-3-8B), so absolute latencies are not expected to agree. Mean latency (s):",
        "",
        *table(["", "cap alone", "cap and wait", "change", "paper: cap alone", "paper: and wait", "paper: change"], rows, "lr"),
        "",
        *picture("wait_gate.png", "Mean latency with and without the wait, ours with 95 % intervals."),
        "The variants of WAIT with fluid thresholds on the same workload. Here n_j is at most one, and the cap of a class can be used up "
        "(with whole thresholds above one it never is, and *caps release* is the paper's rule):",
        "",
        *table(
            ["variant of `wait`", *(f"{r:g}/s" for r in rates)],
            [[v, *(show(groups[v, r].interval("latency")) for r in rates)] for v in names],
            "lr",
        ),
        "",
    ]
    return gate_claims(cost), body


def gate_claims(cost: Sequence[tuple[int, float, float]]) -> list[Claim]:
    """What the wait changes; ``cost``: rate, change of the mean latency here and in the paper."""
    light = [c for c in cost if c[0] <= 15]
    agrees = all(ours > 0 for _, ours, _ in light)
    near = [c for c in cost if 16 <= c[0] <= 21]
    helps = [ours < 0 for _, ours, _ in near]
    return [
        Claim(
            "wait gate at low load, p512d20",
            ", ".join(f"{paper:+.0%} at {rate}/s" for rate, _, paper in light),
            ", ".join(f"{ours:+.0%} at {rate}/s" for rate, ours, _ in light),
            "agrees" if agrees else "differs",
            "the sign; their wait is released by token budgets, ours by the rotation of P" if agrees else "",
        ),
        Claim(
            "wait gate near the boundary, p512d20",
            ", ".join(f"{paper:+.0%} at {rate}/s" for rate, _, paper in near),
            ", ".join(f"{ours:+.0%} at {rate}/s" for rate, ours, _ in near),
            "agrees" if helps and all(helps) else "differs",
            ""
            if helps and all(helps)
            else "the sign is not the same at all rates"
            if any(helps)
            else "waiting never lowers the mean here: an idle engine loses time that no later batch returns",
        ),
    ]


def draw_gate(lab: Lab, rows: Sequence[tuple[int, int, int, float, float]], groups: Mapping[tuple[Any, Any], Group]) -> None:
    """Latency with the wait and without it, ours and the paper's; ``rows`` of ``PAPER_GATE``."""
    with figure(lab.figures / "wait_gate.png", 1, 1, width=5.2) as axes:
        x = [float(rate) for rate, *_ in rows]
        draw(axes[0][0], [Curve("cap alone, ours", x, [groups[r, False].interval("latency") for r, *_ in rows], 7)], scale="y")
        draw(axes[0][0], [Curve("cap and wait, ours", x, [groups[r, True].interval("latency") for r, *_ in rows], 6)], scale="y")
        axes[0][0].plot(x, [off for *_, off, _ in rows], color="black", linestyle=":", marker="x", label="cap alone, paper")
        axes[0][0].plot(x, [on for *_, on in rows], color="black", linestyle="--", marker="+", label="cap and wait, paper")
        finish(axes[0][0], "p512d20, the paper's caps and chunks", "arrival rate (requests/s)", "mean latency (s)")
