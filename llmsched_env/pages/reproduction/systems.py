"""Systems, part 1: latency, TTFT and completed rate over the arrival rate on the calibrated engines, baselines and WAIT tuned alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from llmsched_env.fluid import find_boundary
from llmsched_env.markdown import table
from llmsched_env.pages.reproduction.cases import Case, Group, Pairs
from llmsched_env.pages.reproduction.figures import Curve, Scale, draw, figure, finish, limit_to_means
from llmsched_env.pages.reproduction.lab import Claim, Lab, Section, number, picture, show

TUNING_SEED = 1000
"""Seeds of the tuning runs start here: none of them is among those that are reported."""


@dataclass(frozen=True, slots=True)
class Load:
    """A workload of section 6 of the paper.

    Attributes:
        paper: its largest rates with controlled latency, as text.
        published: mean latency (s) by rate, for ``vLLM``, ``Sarathi`` and ``WAIT-CP``; ``source`` says where from.
    """

    name: str
    rates: tuple[float, ...]
    quick: tuple[float, ...]
    paper: str
    types: tuple[tuple[int, int, float], ...] = ()
    lengths: str = ""
    engine: Pairs = ()
    requests: tuple[int, int] = (10000, 2000)
    published: Mapping[str, Mapping[float, float]] = field(default_factory=dict)
    source: str = ""


LLAMA3 = (("time_model", "a100-llama3-8b-vllm"), ("num_blocks", 29_952))
"""Llama-3-8B with the authors' 29,952 blocks of 16 tokens (their repository's runs)."""

LOADS = (
    Load(
        "p512d20",
        (12, 16, 18, 20, 21, 22, 23, 24, 25, 26),
        (12, 20, 23, 25),
        "vLLM 19, Sarathi 22, WAIT 23",
        ((512, 20, 1.0),),
        published={
            "vLLM": {12: 0.599, 16: 1.180, 20: 3.693, 22: 15.690, 23: 23.264, 24: 32.274, 26: 48.298},
            "Sarathi": {12: 0.470, 16: 0.633, 20: 0.963, 22: 1.984, 23: 8.937, 24: 17.563, 26: 33.558},
            "WAIT-CP": {12: 0.462, 16: 0.590, 20: 0.799, 22: 1.008, 23: 1.253, 24: 4.072, 26: 18.531},
        },
        source="the authors' repository, 10,000 requests on Vidur's Llama-3-8B",
    ),
    Load(
        "0.7 p512d20 + 0.3 p512d50",
        (12, 16, 18, 20, 21, 22, 23, 24, 26),
        (12, 18, 21, 23),
        "vLLM 18, Sarathi 21, WAIT 22",
        ((512, 20, 0.7), (512, 50, 0.3)),
        published={
            "vLLM": {12: 0.824, 16: 1.585, 20: 6.160, 22: 25.661, 23: 34.960, 24: 43.969, 26: 59.993},
            "Sarathi": {12: 0.645, 16: 0.875, 20: 1.376, 22: 6.227, 23: 14.848, 24: 23.803, 26: 39.798},
            "WAIT-CP": {12: 0.608, 16: 0.789, 20: 1.356, 22: 2.838, 23: 10.377, 24: 19.099, 26: 35.088},
        },
        source="the authors' repository, 10,000 requests on Vidur's Llama-3-8B",
    ),
    Load(
        "p512d1000",
        (0.5, 1, 1.5, 2, 2.25, 2.5, 2.75, 3),
        (1, 2, 2.5),
        "not stated for this KV capacity",
        ((512, 1000, 1.0),),
        requests=(2500, 800),
    ),
    Load(
        "p512d1000, Llama-3-8B",
        (2, 3, 4, 4.5, 5, 5.5, 6),
        (4, 5),
        "vLLM below 4.5, Sarathi and WAIT about 5",
        ((512, 1000, 1.0),),
        engine=LLAMA3,
        requests=(3000, 800),
        published={
            "vLLM": {4.5: 53.8},
            "Sarathi": {4: 30.2, 4.5: 41.7, 5: 59.9},
            "WAIT-CP": {4: 26.4, 4.5: 32.3, 5: 50.5},
        },
        source="the paper's section 6; 5.0/s from the authors' plot script",
    ),
    Load(
        "lmsys",
        (10, 20, 30, 40, 50, 60, 80, 100, 150),
        (10, 30, 50),
        "crossing M* = C at 74.1",
        lengths="lmsys",
        requests=(6000, 1500),
        published={
            "vLLM": {10: 1.9, 20: 2.3, 30: 3.2, 40: 15.4, 50: 30.1, 60: 40.0, 80: 52.9, 100: 60.2, 150: 70.3},
            "Sarathi": {10: 1.7, 20: 1.9, 30: 2.2, 40: 2.9, 50: 4.5, 60: 7.5, 80: 18.0, 100: 25.3},
            "WAIT-CP": {10: 1.6, 20: 1.8, 30: 2.2, 40: 2.9, 50: 4.4, 60: 8.5, 80: 19.8, 100: 27.1, 150: 37.7},
        },
        source="the authors' raw grid, 5,000 requests; Sarathi with chunk 512",
    ),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A policy as it is run: fixed, or the best of several trials at each rate.

    Attributes:
        trials: (options, engine) of each trial; one trial is a fixed setting.
        kind: ``baseline`` or ``wait``.
    """

    label: str
    policy: str
    style: int
    kind: str
    trials: tuple[tuple[Pairs, Pairs], ...] = field(default=(((), ()),))

    @property
    def tuned(self) -> bool:
        return len(self.trials) > 1


def _vllm(budget: int, seqs: int) -> tuple[Pairs, Pairs]:
    return (), (("max_num_batched_tokens", budget), ("max_num_seqs", seqs))


def _budget(budget: int, seqs: int) -> tuple[Pairs, Pairs]:
    return (("budget", budget), ("max_num_seqs", seqs)), ()


CAPS = (6, 10, 14, 20, 30, 60, 120, 240)
"""The paper tunes its cap over 20, 30, ..., 300; smaller ones stand for its wait-gate table (4 to 14)."""

PLANS = (
    Plan("vLLM v0", "vllm-v0", 1, "baseline"),
    Plan("vLLM", "vllm", 3, "baseline"),
    Plan("Sarathi 512", "sarathi", 4, "baseline", (_budget(512, 128),)),
    Plan("Sarathi 256", "sarathi", 5, "baseline", (_budget(256, 128),)),
    Plan("WAIT, fluid", "wait", 0, "wait"),
    Plan("Nested WAIT, fluid", "nested-wait", 2, "wait"),
    Plan("WAIT-CP, fluid", "wait-cp", 6, "wait"),
    Plan("vLLM v0, tuned", "vllm-v0", 1, "baseline", tuple(_budget(b, s) for b in (4096, 8192) for s in (32, 64, 128, 256))),
    Plan(
        "vLLM, tuned",
        "vllm",
        3,
        "baseline",
        tuple(_vllm(*x) for x in ((512, 128), (512, 256), (1024, 64), (1024, 128), (1024, 256), (2048, 64), (2048, 256), (4096, 256))),
    ),
    Plan(
        "Sarathi, tuned",
        "sarathi",
        4,
        "baseline",
        tuple(_budget(*x) for x in ((128, 64), (256, 64), (256, 128), (384, 128), (512, 64), (512, 256), (768, 128), (768, 256))),
    ),
    Plan("WAIT, tuned", "wait", 0, "wait", tuple(((("slack", s),), ()) for s in (1.05, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0))),
    Plan("WAIT-CP, tuned", "wait-cp", 6, "wait", tuple(((("cap", c),), ()) for c in CAPS)),
    Plan("cap without the wait, tuned", "wait-cp", 7, "wait", tuple(((("cap", c), ("wait", False)), ()) for c in CAPS)),
)

Results = dict[tuple[str, float], Group]


def base_case(load: Load, rate: float, lab: Lab) -> Case:
    """The workload at a rate, without a policy; as many seconds at every rate."""
    seeds = lab.pick(10, 2)
    return Case(
        "",
        float(rate),
        engine=load.engine,
        preset="vllm",
        types=load.types,
        lengths=load.lengths,
        requests=lab.pick(*load.requests),
        seeds=seeds,
    )


def of_plan(base: Case, plan: Plan, trial: int) -> Case:
    options, engine = plan.trials[trial]
    return base.but(policy=plan.policy, options=options, engine=base.engine + engine)


def evaluate(lab: Lab, label: str, bases: Mapping[float, Case], plans: Sequence[Plan]) -> tuple[Results, dict[tuple[str, float], int]]:
    """Every plan at every rate; tuned plans take the trial with the lowest mean latency on seeds of their own.

    Returns:
        groups by (label of the plan, rate), and the trial taken by each tuned plan.
    """
    trials = {
        (plan.label, rate, i): of_plan(base, plan, i).but(seeds=lab.pick(2, 1), first_seed=TUNING_SEED)
        for rate, base in bases.items()
        for plan in plans
        if plan.tuned
        for i in range(len(plan.trials))
    }
    tried = dict(zip(trials, lab.run(f"{label}, tuning", list(trials.values())), strict=True))
    chosen = {
        (plan.label, rate): min(range(len(plan.trials)), key=lambda i: (tried[plan.label, rate, i].mean("latency"), i))
        for rate in bases
        for plan in plans
        if plan.tuned
    }
    cases = {(plan.label, rate): of_plan(base, plan, chosen.get((plan.label, rate), 0)) for rate, base in bases.items() for plan in plans}
    return dict(zip(cases, lab.run(label, list(cases.values())), strict=True)), chosen


def stable_on_grid(results: Results, label: str, rates: Sequence[float], bar: float) -> tuple[float, float]:
    """Largest tested rate up to which the mean drift stays below the bar (0 if none), and the next rate above it (infinity if none)."""
    low = 0.0
    for rate in sorted(rates):
        if results[label, rate].mean("drift") >= bar:
            return low, rate
        low = rate
    return low, float("inf")


def sweep(lab: Lab) -> dict[str, Results]:
    """All workloads of the systems section."""
    return {load.name: evaluate(lab, load.name, _bases(load, lab), PLANS)[0] for load in LOADS}


def _bases(load: Load, lab: Lab) -> dict[float, Case]:
    return {float(rate): base_case(load, rate, lab) for rate in lab.pick(load.rates, load.quick)}


def section(lab: Lab) -> Section:
    claims: list[Claim] = []
    body = [
        "Engine: vLLM's rules with the calibrated A100 (Llama-2-7B, 7,424 blocks, unless a name says Llama-3-8B). Mean over "
        f"{lab.pick(10, 2)} seeds, 95 % intervals; requests that arrive between 20 % and 90 % of a run count. *Stable* up to the largest "
        f"tested rate at which fewer than {lab.bar:.0%} of the arrivals pile up (in brackets the next tested rate). *Fluid*: thresholds "
        "and caps from the fluid model alone. *Tuned*: the best mean latency of 8 trials at each rate, on seeds that are not reported; "
        f"each tuned policy, baselines included, costs {8 * lab.pick(2, 1)} extra runs a rate, and the operator must know the rate.",
        "",
    ]
    facts: dict[str, float] = {}
    for load in LOADS:
        bases = _bases(load, lab)
        results, chosen = evaluate(lab, load.name, bases, PLANS)
        rates = sorted(bases)
        stable = {plan.label: stable_on_grid(results, plan.label, rates, lab.bar) for plan in PLANS}
        boundary = find_boundary(next(iter(bases.values())).statistics(), of_plan(bases[rates[0]], PLANS[1], 0).policy_engine())
        body += report(lab, load, results, rates, stable, chosen, f"{boundary.rate:.3g} ({boundary.binding} binds)")
        claims += claims_of(load, results, rates, stable)
        facts |= facts_of(load, results, rates, stable)
    return Section("Systems: latency over the arrival rate (`vllm` preset)", claims, body, facts)


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")


def report(
    lab: Lab,
    load: Load,
    results: Results,
    rates: Sequence[float],
    stable: Mapping[str, tuple[float, float]],
    chosen: Mapping[tuple[str, float], int],
    boundary: str,
) -> list[str]:
    """The lines of one workload; ``chosen``: the best trial of each tuned plan at each rate."""
    name = f"systems_{slug(load.name)}.png"
    draw_report(lab, name, results, rates, stable)
    rows = []
    for plan in PLANS:
        low, high = stable[plan.label]
        setting = ""
        if plan.tuned:
            at = max((r for r in rates if r <= low), default=rates[0])
            options, engine = plan.trials[chosen[plan.label, at]]
            setting = f" ({', '.join(f'{k} {v}' for k, v in (*options, *engine))} at {at:g})"
        cells = [show(results[plan.label, r].interval("latency")) for r in rates]
        rows.append([plan.label + setting, f"{low:g} ({high:g})" if high < float("inf") else f"{low:g} (-)", *cells])
    for label, values in load.published.items():
        rows.append([f"*paper: {label}*", "", *(f"{values[r]:g}" if r in values else "" for r in rates)])
    ttft = [
        [p.label, *(f"{number(results[p.label, r].mean('ttft'))} / {number(results[p.label, r].mean('ttft_p99'))}" for r in rates)]
        for p in PLANS
    ]
    heading = [f"{r:g}/s" for r in rates]
    evicted = [
        f"{p.label} {max(results[p.label, r].mean('evicted_share') for r in rates):.1%}"
        for p in PLANS
        if max(results[p.label, r].mean("evicted_share") for r in rates) > 0
    ]
    return [
        f"### {load.name}",
        "",
        f"Fluid boundary of the `vllm` engine {boundary}. Mean latency (s)"
        + (f"; the paper's numbers are from {load.source}:" if load.published else ":"),
        "",
        *table(["policy", "stable (next)", *heading], rows, "lr"),
        "",
        "TTFT, mean / P99 (s):",
        "",
        *table(["policy", *heading], ttft, "lr"),
        "",
        f"Highest share of requests evicted at any rate: {', '.join(evicted) or 'none'}.",
        "",
        *picture(name, f"{load.name}: top fixed or fluid settings, bottom the best of 8 trials a rate; stars: largest stable rate."),
    ]


def draw_report(lab: Lab, name: str, results: Results, rates: Sequence[float], stable: Mapping[str, tuple[float, float]]) -> None:
    """Latency, TTFT and completed rate over the rate: above fixed or fluid settings, below the best of the trials."""
    fixed, tuned = [p for p in PLANS if not p.tuned], [p for p in PLANS if p.tuned]
    with figure(lab.figures / name, 2, 4, width=3.4, height=2.8) as axes:
        for row, (plans, title) in enumerate(((fixed, "fixed or fluid"), (tuned, "best of 8 trials"))):
            metrics: tuple[tuple[str, str, Scale], ...] = (
                ("latency", "mean latency (s)", "y"),
                ("ttft", "mean TTFT (s)", "y"),
                ("ttft_p99", "P99 TTFT (s)", "y"),
                ("completed", "completed (requests/s)", ""),
            )
            for column, (metric, text, scale) in enumerate(metrics):
                curves = [Curve(plan.label, rates, [results[plan.label, r].interval(metric) for r in rates], plan.style) for plan in plans]
                draw(axes[row][column], curves, scale=scale)
                if scale:
                    limit_to_means(axes[row][column], curves)
                if metric == "completed":
                    axes[row][column].plot(rates, rates, color="black", linewidth=0.8, linestyle=":", label="offered")
                else:
                    for plan in plans:  # the largest stable rate, marked
                        low = stable[plan.label][0]
                        if low > 0:
                            axes[row][column].plot(
                                [low], [results[plan.label, low].mean(metric)], "*", color="black", markersize=6, zorder=5
                            )
                finish(axes[row][column], title, "arrival rate (requests/s)", text, legend=False)
            axes[row][3].legend(frameon=False, fontsize=7.5, loc="upper left", bbox_to_anchor=(1.02, 1.0))


def best(results: Results, rate: float, labels: Sequence[str], metric: str = "latency") -> str:
    return min(labels, key=lambda label: results[label, rate].mean(metric))


FIXED_BASELINES = tuple(p.label for p in PLANS if p.kind == "baseline" and not p.tuned)
TUNED_BASELINES = tuple(p.label for p in PLANS if p.kind == "baseline" and p.tuned)
FLUID_WAIT = tuple(p.label for p in PLANS if p.kind == "wait" and not p.tuned)
TUNED_WAIT = tuple(p.label for p in PLANS if p.kind == "wait" and p.tuned)


def claims_of(load: Load, results: Results, rates: Sequence[float], stable: Mapping[str, tuple[float, float]]) -> list[Claim]:
    def top(labels: Sequence[str]) -> float:
        return max(stable[label][0] for label in labels)

    fluid, tuned, sarathi, vllm = top(FLUID_WAIT), top(TUNED_WAIT), stable["Sarathi 512"][0], stable["vLLM v0"][0]
    order = vllm < sarathi < tuned
    ours = (
        f"vLLM v0 {vllm:g}, vLLM {stable['vLLM'][0]:g}, Sarathi 512 {sarathi:g}; WAIT family fluid {fluid:g}, tuned {tuned:g}; "
        f"baselines tuned {top(TUNED_BASELINES):g}"
    )
    comparable = load.paper.startswith("vLLM")
    return [
        Claim(
            f"largest stable rate, {load.name}",
            load.paper,
            ours,
            ("agrees" if order else "differs") if comparable else "not comparable",
            ("" if order else "the order vLLM < Sarathi < WAIT does not appear at this resolution")
            if comparable
            else "the paper gives no stable rates for this engine",
        ),
        *([latency_claim(load, results, rates)] if load.published else []),
    ]


def latency_claim(load: Load, results: Results, rates: Sequence[float]) -> Claim:
    """WAIT-CP against Sarathi at the rates the paper publishes; agrees where two thirds of the rates have the same sign.

    A difference below 3 % counts as none.
    """
    both = [r for r in rates if r in load.published["Sarathi"] and r in load.published["WAIT-CP"]]

    def change(baselines: Sequence[str], rate: float) -> float:
        wait, other = best(results, rate, TUNED_WAIT), best(results, rate, baselines)
        return results[wait, rate].mean("latency") / results[other, rate].mean("latency") - 1

    paper = {r: load.published["WAIT-CP"][r] / load.published["Sarathi"][r] - 1 for r in both}
    ours = {r: change(("Sarathi 512",), r) for r in both}
    fair = {r: change(TUNED_BASELINES, r) for r in both}
    same = sum(_sign(paper[r]) == _sign(ours[r]) for r in both)
    return Claim(
        f"mean latency of tuned WAIT over Sarathi, {load.name}",
        _changes(paper),
        _changes(ours),
        "agrees" if 3 * same >= 2 * len(both) else "differs",
        f"same sign at {same} of {len(both)} rates, less than 3% counting as none; against equally tuned baselines {_changes(fair)}",
    )


def _sign(value: float) -> int:
    return 0 if abs(value) < 0.03 else 1 if value > 0 else -1


def _changes(values: Mapping[float, float]) -> str:
    return ", ".join(f"{value:+.0%} at {rate:g}/s" for rate, value in values.items())


def facts_of(load: Load, results: Results, rates: Sequence[float], stable: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Largest stable rates and latency ratios that the closing section quotes."""
    at = max((r for r in rates if r <= max(stable[b][0] for b in TUNED_BASELINES)), default=rates[0])
    low = rates[0]

    def ratio(labels: Sequence[str], others: Sequence[str], rate: float) -> float:
        return results[best(results, rate, labels), rate].mean("latency") / results[best(results, rate, others), rate].mean("latency")

    key = slug(load.name)
    return {
        f"{key}:edge": at,
        f"{key}:low": low,
        f"{key}:tuned_tuned": ratio(TUNED_WAIT, TUNED_BASELINES, at),
        f"{key}:tuned_fixed": ratio(TUNED_WAIT, FIXED_BASELINES, at),
        f"{key}:fluid_fixed": ratio(FLUID_WAIT, FIXED_BASELINES, at),
        f"{key}:fluid_fixed_low": ratio(FLUID_WAIT, FIXED_BASELINES, low),
        f"{key}:wait_cap": ratio(("WAIT-CP, tuned",), ("cap without the wait, tuned",), at),
    }
