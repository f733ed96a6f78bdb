"""Theory, part 1: stability regions against the fluid boundary, and how gap and latency scale with the horizon."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import require
from llmsched_env.fluid import stability_boundary
from llmsched_env.markdown import table
from llmsched_env.metrics import Interval, mean_interval
from llmsched_env.pages.reproduction.cases import Case, Group
from llmsched_env.pages.reproduction.figures import Curve, draw, figure, finish
from llmsched_env.pages.reproduction.lab import Claim, Lab, Section, StableRate, number, picture, show
from llmsched_env.types import LengthStatistics

D0, D1 = 1.0, 1e-3
TWO = ((10, 10, 2.0), (10, 20, 1.0))
CAPACITY = 3750
STYLE = {"wait": 0, "fcfs": 1, "nested-wait": 2, "modified-wait": 3}
LABEL = {"wait": "WAIT", "fcfs": "FCFS", "nested-wait": "Nested WAIT", "modified-wait": "Modified WAIT"}


def paper_engine(capacity: int, **more: float) -> tuple[tuple[str, float], ...]:
    return (("capacity_tokens", capacity), ("d0", D0), ("d1", D1), *more.items())


def fluid_rate(types: Sequence[tuple[int, int, float]], capacity: int) -> float:
    """Largest total rate of the fluid model for this mix."""
    prompt, output, weight = zip(*types, strict=True)
    return stability_boundary(LengthStatistics.of(prompt, output, weight, range(len(types))), EngineConfig.paper(capacity, D0, D1))


def section(lab: Lab) -> Section:
    region_claims, region_body, region_facts = region(lab)
    scale_claims, scale_body, scale_facts = scaling(lab)
    return Section(
        "Stability regions and scaling (`paper` preset)",
        region_claims + scale_claims,
        region_body + scale_body,
        {**region_facts, **scale_facts},
    )


def search_case(lab: Lab, policy: str, types: tuple[tuple[int, int, float], ...], capacity: int) -> Case:
    options = (("segment_ends", (10,)),) if policy == "nested-wait" and len(types) > 1 else ()
    return Case(policy, 1.0, options, paper_engine(capacity), types=types, horizon=lab.pick(20000.0, 6000.0), seeds=lab.pick(10, 4))


def region(lab: Lab) -> tuple[list[Claim], list[str], dict[str, float]]:
    """Largest stable rates of one type over the capacity, and of two types over the mix."""
    capacities = lab.pick((1000, 2000, 3750, 7500), (1000, 3750))
    shares = lab.pick((0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.5, 1.0))
    one = [(p, c) for c in capacities for p in ("wait", "fcfs")]
    two = [(p, s) for s in shares for p in ("wait", "fcfs", "nested-wait")]
    searches = []
    for policy, capacity in one:
        edge = fluid_rate(((10, 20, 1.0),), capacity)
        searches.append((search_case(lab, policy, ((10, 20, 1.0),), capacity), 0.5 * edge, 1.1 * edge))
    for policy, share in two:
        types = mix(share)
        edge = fluid_rate(types, CAPACITY)
        searches.append((search_case(lab, policy, types, CAPACITY), 0.5 * edge, 1.1 * edge))
    found = lab.largest_stable("stability region", searches, lab.pick(7, 4))
    single, plane = dict(zip(one, found[: len(one)], strict=True)), dict(zip(two, found[len(one) :], strict=True))
    draw_region(lab, capacities, shares, single, plane)

    rows = []
    for capacity in capacities:
        edge = fluid_rate(((10, 20, 1.0),), capacity)
        rows.append([f"(10, 20), C = {capacity:,}", number(edge), *(_share(single[p, capacity], edge) for p in ("wait", "fcfs")), "-"])
    for share in shares:
        edge = fluid_rate(mix(share), CAPACITY)
        names = ("wait", "fcfs", "nested-wait")
        rows.append([f"mix {1 - share:.2f} : {share:.2f}, C = {CAPACITY:,}", number(edge), *(_share(plane[p, share], edge) for p in names)])
    worst_wait = min([s.rate / fluid_rate(((10, 20, 1.0),), c) for (p, c), s in single.items() if p == "wait"])
    worst_wait = min(worst_wait, *(s.rate / fluid_rate(mix(x), CAPACITY) for (p, x), s in plane.items() if p == "wait"))
    fcfs = [s.rate / fluid_rate(((10, 20, 1.0),), c) for (p, c), s in single.items() if p == "fcfs"]
    fcfs += [s.rate / fluid_rate(mix(x), CAPACITY) for (p, x), s in plane.items() if p == "fcfs"]
    nested = [s.rate / fluid_rate(mix(x), CAPACITY) for (p, x), s in plane.items() if p == "nested-wait"]
    body = [
        "### Largest stable rate against the fluid boundary a = C / (d0 + d1 C)",
        "",
        f"d0 = {D0:g} s, d1 = {1000 * D1:g} ms per KV token; thresholds of the fluid model at each rate, types (10, 10) and (10, 20). "
        f"**Rule:** the slope of the number in system over the last 70 % of {lab.pick('20,000', '6,000')} s, least squares, as a share of "
        f"the arrival rate; a rate is stable while its mean over the seeds is below {lab.bar:.0%} (more do not pile up). Bisection on "
        "that rule; the brackets are the largest rate whose 95 % interval lies below the bar and the smallest one whose interval lies "
        "above it.",
        "",
        *table(["workload", "fluid boundary (req/s)", "WAIT", "FCFS", "Nested WAIT"], rows, "lr"),
        "",
        "Rates as shares of the boundary, with bracket. A policy above 1 would refute the fluid bound.",
        "",
        *picture(
            "stability.png", "Left: one type over the capacity. Right: the plane of two types at C = 3,750. Bars: brackets of the search."
        ),
    ]
    claims = region_claims(lab, worst_wait, fcfs, nested)
    return claims, body, {"wait_region": worst_wait, "fcfs_low": min(fcfs), "fcfs_high": max(fcfs), "nested_low": min(nested)}


def region_claims(lab: Lab, worst_wait: float, fcfs: Sequence[float], nested: Sequence[float]) -> list[Claim]:
    """What the largest stable rates say; all are shares of the fluid boundary."""
    over = max([*fcfs, *nested, worst_wait])
    return [
        Claim(
            "WAIT is stable up to the fluid boundary",
            "stability region { M* <= C, rho < 1 } (proposition)",
            f"largest stable rate of WAIT at least {worst_wait:.3f} of the boundary on every workload",
            "agrees" if worst_wait >= 0.95 and over < 1.03 else "differs",
            "whole thresholds and the search's resolution account for the rest" if worst_wait >= 0.95 else "see the table",
        ),
        Claim(
            "no policy is stable beyond the fluid boundary",
            "no throughput above the fluid's",
            f"largest share over all policies and workloads {over:.3f}",
            "agrees" if over <= 1.03 else "differs",
            f"the rule tolerates {lab.bar:.0%} of the arrivals piling up" if over > 1 else "",
        ),
        Claim(
            "greedy FCFS is not stable up to the boundary",
            "some instance at C = M* loses a constant share",
            f"FCFS stable up to {min(fcfs):.3f} to {max(fcfs):.3f} of the boundary",
            "agrees" if max(fcfs) < worst_wait else "differs",
        ),
        Claim(
            "Nested WAIT pays for unknown lengths with memory",
            "needs M_req > M* (safety buffer)",
            f"Nested WAIT stable up to {min(nested):.3f} to {max(nested):.3f} of the known-length boundary",
            "agrees" if min(nested) < worst_wait else "differs",
            "at the ends of the mix there is only one type and no boundary queue",
        ),
    ]


def mix(share: float) -> tuple[tuple[int, int, float], ...]:
    """Share ``share`` of type (10, 20); a pure type stands alone."""
    both = ((10, 10, 1 - share), (10, 20, share))
    return tuple(t for t in both if t[2] > 0)


def _share(found: StableRate, edge: float) -> str:
    high = f"{found.high / edge:.3f}" if np.isfinite(found.high) else "-"
    return f"{found.rate / edge:.3f} [{found.low / edge:.3f}, {high}]"


def _bracket(found: StableRate) -> Interval:
    high = found.high if np.isfinite(found.high) else found.rate
    half = max(found.rate - found.low, high - found.rate, 0.0)
    return Interval(found.rate, found.rate - half, found.rate + half, 2)


def draw_region(
    lab: Lab,
    capacities: Sequence[int],
    shares: Sequence[float],
    single: dict[tuple[str, int], StableRate],
    plane: dict[tuple[str, float], StableRate],
) -> None:
    with figure(lab.figures / "stability.png", 1, 2) as axes:
        left, right = axes[0]
        grid = np.linspace(capacities[0] * 0.8, capacities[-1] * 1.05, 60)
        left.plot(grid, [fluid_rate(((10, 20, 1.0),), int(c)) for c in grid], color="black", linewidth=1, label="fluid boundary")
        for policy in ("wait", "fcfs"):
            y = [_bracket(single[policy, c]) for c in capacities]
            draw(left, [Curve(LABEL[policy], [float(c) for c in capacities], y, STYLE[policy])])
        finish(left, "one type (10, 20)", "KV capacity C (tokens)", "largest stable rate (requests/s)")
        edges = [fluid_rate(mix(float(s)), CAPACITY) for s in np.linspace(0, 1, 41)]
        s = np.linspace(0, 1, 41)
        right.plot((1 - s) * edges, s * edges, color="black", linewidth=1, label="fluid boundary")
        for policy in ("wait", "fcfs", "nested-wait"):
            rate = [plane[policy, x].rate for x in shares]
            across = [(1 - a) * r for a, r in zip(shares, rate, strict=True)]
            up = [Interval(a * r, a * r, a * r, 1) for a, r in zip(shares, rate, strict=True)]
            draw(right, [Curve(LABEL[policy], across, up, STYLE[policy])])
        finish(right, f"two types, C = {CAPACITY:,}", "rate of (10, 10) (requests/s)", "rate of (10, 20) (requests/s)")


def fit(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Slope of log y on log x with its 95 % interval (ordinary least squares, Student's t)."""
    stats = require("scipy.stats", "cli")
    line = stats.linregress(np.log(x), np.log(y))
    half = float(stats.t.ppf(0.975, len(x) - 2)) * float(line.stderr)
    return Interval(float(line.slope), float(line.slope) - half, float(line.slope) + half, len(x))


def gap_of(group: Group) -> npt.NDArray[np.float64]:
    """(seeds,) fluid throughput minus measured throughput, tokens/s, free of the noise of the arrivals.

    The expectation of (tokens of all arrivals) / T is the fluid throughput, so the expected gap is that of the
    tokens that arrived and did not complete, over T; the difference of the two rates itself would drown in the
    fluctuation of the arrivals, which decays like T^-1/2 whatever the policy.
    """
    return group.values("gap") / group.case.horizon


def scaling(lab: Lab) -> tuple[list[Claim], list[str], dict[str, float]]:
    """Throughput gap and mean latency against the horizon: WAIT at the boundary, WAIT with slack, FCFS at C = M*."""
    horizons = lab.pick((1000, 2000, 4000, 8000, 16000, 32000, 64000, 128000, 256000), (500, 1000, 2000, 4000, 8000, 16000))
    wait = (("thresholds", (8, 4)),), (("thresholds", (10, 5)),)
    kinds = {
        "WAIT at the boundary, C = M*": ("wait", wait[0], 3000, 0),
        "WAIT with slack, C = 1.25 M*": ("wait", wait[1], 3750, 2),
        "FCFS, C = M*": ("fcfs", (), 3000, 1),
    }
    cases = [
        Case(policy, 3.0, options, paper_engine(c), types=TWO, horizon=float(t), seeds=lab.pick(20, 10))
        for policy, options, c, _ in kinds.values()
        for t in horizons
    ]
    groups = lab.run("scaling with the horizon", cases)
    rows, gaps, lats, growths, curves = [], {}, {}, {}, []
    for i, (label, (_, _, _, style)) in enumerate(kinds.items()):
        own = groups[i * len(horizons) : (i + 1) * len(horizons)]
        gap = [float(gap_of(g).mean()) for g in own]
        latency = [g.mean("latency") for g in own]
        gaps[label], lats[label] = fit(horizons, gap), fit(horizons, latency)
        growths[label] = growth(horizons, [g.mean("gap") for g in own]), growth(horizons, latency)
        rows.append(
            [label, _slope(gaps[label]), _slope(lats[label]), *(_slope(g) for g in growths[label]), show(own[-1].interval("latency"))]
        )
        curves.append((label, style, own))
    with figure(lab.figures / "scaling.png", 1, 2) as axes:
        for label, style, own in curves:
            x = [float(t) for t in horizons]
            draw(axes[0][0], [Curve(label, x, [mean_interval(gap_of(g)) for g in own], style)], scale="xy")
            draw(axes[0][1], [Curve(label, x, [g.interval("latency") for g in own], style)], scale="xy")
        finish(axes[0][0], "throughput gap", "horizon T (s)", "fluid minus measured throughput (tokens/s)")
        finish(axes[0][1], "mean latency", "horizon T (s)", "mean latency (s)", legend=False)
    slack = list(kinds)[1]
    body = [
        "### Throughput gap and latency against the horizon",
        "",
        f"Types (10, 10) at 2/s and (10, 20) at 1/s: M* = 3,000. Slopes of log-log fits over {len(horizons)} horizons from "
        f"{horizons[0]:,} to {horizons[-1]:,} s, each point a mean over {cases[0].seeds} seeds, 95 % intervals. The gap counts the tokens "
        "of requests that arrived and did not complete, which has the same mean as fluid minus measured throughput without the noise of "
        "the arrivals themselves (that decays like T^-1/2 under every policy).",
        "",
        "A mean that starts from a constant (the pipeline itself: tokens in service, seconds of service) and then grows shows its power "
        "only at the far end of such a fit; p is the power in A + B T^p, fitted to the unfinished tokens (gap times T) and to the "
        "latency. Theory at the boundary: p = 1/2 for both. Where nothing grows p is not determined.",
        "",
        *table(
            ["", "slope of the gap", "slope of the latency", "p, unfinished tokens", "p, latency", f"latency at T = {horizons[-1]:,} s"],
            rows,
            "lr",
        ),
        "",
        *picture("scaling.png", "Gap and mean latency over the horizon, log-log, with 95 % intervals."),
    ]
    return scaling_claims(gaps, lats, growths), body, {"slack_latency": lats[slack].mean}


def scaling_claims(
    gaps: Mapping[str, Interval], lats: Mapping[str, Interval], growths: Mapping[str, tuple[Interval, Interval]]
) -> list[Claim]:
    """What the slopes say of WAIT at the boundary, WAIT with slack and FCFS, in this order."""
    edge, slack, fcfs = gaps
    return [
        _growth_claim("throughput gap of WAIT at the boundary", "O(T^-1/2)", gaps[edge], -0.5, growths[edge][0]),
        _growth_claim("latency of WAIT at the boundary", "O(T^1/2)", lats[edge], 0.5, growths[edge][1]),
        _slope_claim("throughput gap of WAIT with slack", "O(1/T): slope -1", gaps[slack], -1.0),
        _slope_claim("latency of WAIT with slack is bounded", "O(1): slope 0", lats[slack], 0.0),
        Claim(
            "throughput gap of FCFS at C = M* does not vanish",
            "Omega(1) on some instance",
            f"slope {_slope(gaps[fcfs])}",
            "agrees" if gaps[fcfs].mean > -0.1 else "differs",
            "it starts below its limit: an empty system does not evict yet" if gaps[fcfs].low > 0 else "",
        ),
    ]


def _slope(interval: Interval) -> str:
    if math.isnan(interval.mean):
        return "-"
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _slope_claim(what: str, paper: str, measured: Interval, expected: float) -> Claim:
    """Agrees where the expected slope is in the interval or within 0.1 of the estimate: theory is about the limit, not about these "
    "horizons."""
    inside = measured.low <= expected <= measured.high
    near = abs(measured.mean - expected) <= 0.1
    why = "" if inside else "outside the interval of the fit but within 0.1: finite horizons" if near else "outside the interval of the fit"
    return Claim(what, paper, f"slope {_slope(measured)}", "agrees" if inside or near else "differs", why)


def growth(x: Sequence[float], y: Sequence[float]) -> Interval:
    """Power p of A + B x^p with its 95 % interval (least squares on relative errors); NaN where it is not determined."""
    scale, value = np.asarray(x, dtype=np.float64) / x[-1], np.asarray(y, dtype=np.float64)
    stats = require("scipy.stats", "cli")
    optimize = require("scipy.optimize", "cli")

    def curve(t: npt.NDArray[np.float64], a: float, b: float, p: float) -> npt.NDArray[np.float64]:
        return a + b * t**p

    try:
        with np.errstate(all="ignore"), warnings.catch_warnings(action="ignore", category=optimize.OptimizeWarning):
            found, covariance = optimize.curve_fit(curve, scale, value, (value[0], value[-1] - value[0], 0.5), sigma=value, maxfev=20000)
    except RuntimeError:
        return Interval(math.nan, math.nan, math.nan, len(x))
    half = float(stats.t.ppf(0.975, len(x) - 3)) * math.sqrt(float(covariance[2, 2]))
    if not half < 1:
        return Interval(math.nan, math.nan, math.nan, len(x))
    return Interval(float(found[2]), float(found[2]) - half, float(found[2]) + half, len(x))


def _growth_claim(what: str, paper: str, slope: Interval, bound: float, power: Interval) -> Claim:
    """The bound holds if the slope is not above it; the power of the growing part is shown beside it."""
    ours = f"slope {_slope(slope)}; power of the growing part {_slope(power)}"
    within = slope.low <= bound
    tight = power.low - 0.1 <= 0.5 <= power.high + 0.1
    why = "the bound holds and the growing part has its power" if within and tight else "the bound holds, the power is not resolved here"
    return Claim(what, paper, ours, "agrees" if within else "differs", why if within else "steeper than the bound")
