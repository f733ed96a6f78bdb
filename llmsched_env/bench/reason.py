"""Who wins a comparison at one rate, and why, in one sentence made of what was measured.

Nothing in the sentence is known beforehand. A policy is ahead only where the paired interval of its mean latency against the greedy
one excludes zero; a cause is named only where its figure differs too, and a price only where the winner pays it beyond the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_agents.statistics import Estimate, relative_difference
from llmsched_env.bench.comparison import Row
from llmsched_env.types import FloatArray

WORTH_NAMING = 0.05
"""Relative difference of a metric below which it is neither a cause nor a price."""
EVICTIONS_MATTER = 0.01
"""Evictions per request below which they explain nothing."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Who has the least mean latency at one rate, against the greedy policy on the same seeds.

    Attributes:
        winner: its name; that of the greedy policy where none is ahead of it.
        difference: of mean latency, relative to the greedy policy's; -0.1 is 10 % less.
        sentence: says so, and why.
    """

    rate: float
    winner: str
    greedy: str
    difference: Estimate
    sentence: str


@dataclass(frozen=True, slots=True)
class _Side:
    """One policy's runs at the rate: (S,) arrays by seed."""

    name: str
    known_lengths: bool
    latency: FloatArray
    waiting: FloatArray
    latency_p99: FloatArray
    evictions: FloatArray
    requests: int
    unfinished: int

    @property
    def evictions_per_request(self) -> float:
        return float(self.evictions.mean()) / self.requests

    @property
    def shown(self) -> str:
        return f"{self.name} (known lengths)" if self.known_lengths else self.name


def _sides(rows: Sequence[Row]) -> dict[str, _Side]:
    seeds = set.intersection(*({row.seed for row in rows if row.policy == p} for p in {row.policy for row in rows}))
    sides = {}
    for policy in dict.fromkeys(row.policy for row in rows):
        own = sorted((row for row in rows if row.policy == policy and row.seed in seeds), key=lambda row: row.seed)

        def values(name: str, own: Sequence[Row] = own) -> FloatArray:
            return np.array([float(getattr(row.figures, name)) for row in own])

        if own and np.isfinite(values("latency_mean")).all():
            sides[policy] = _Side(
                name=policy,
                known_lengths=own[0].known_lengths,
                latency=values("latency_mean"),
                waiting=values("ttft_mean"),
                latency_p99=values("latency_p99"),
                evictions=values("evictions"),
                requests=own[0].figures.requests,
                unfinished=sum(row.figures.requests - row.figures.completed for row in own),
            )
    return sides


def reason(rows: Sequence[Row], greedy: str, *, loses: str) -> Reason | None:
    """Who wins at the highest rate of the rows and why.

    Args:
        rows: of one scenario.
        greedy: the policy that all are held against.
        loses: what an evicted request loses on this engine, as the end of "the request ...".

    Returns:
        None without rows of the greedy policy, or of any other, that completed requests on a seed that all policies share.
    """
    if not rows:
        return None
    rate = max(row.rate for row in rows)
    sides = _sides([row for row in rows if row.rate == rate])
    if greedy not in sides or len(sides) < 2:
        return None
    base = sides[greedy]
    found = {name: relative_difference(side.latency, base.latency) for name, side in sides.items() if name != greedy}
    best = min(found, key=lambda name: found[name].value)
    ahead = found[best].value < 0 if base.latency.size == 1 else found[best].high < 0
    if not ahead:
        return Reason(rate, greedy, greedy, found[best], _nobody(rate, base, sides[best], found[best], sides))
    sentence = (
        f"At {rate:g} requests/s {sides[best].shown} has the least mean latency, {_seconds(sides[best].latency)} against "
        f"{_seconds(base.latency)} of greedy {base.name} ({_percent(found[best])}): {_cause(base, sides[best], loses)}"
    )
    return Reason(rate, best, greedy, found[best], sentence + _price(base, sides[best]) + _others(base, sides, best, found) + ".")


def _nobody(rate: float, base: _Side, best: _Side, difference: Estimate, sides: dict[str, _Side]) -> str:
    text = f"At {rate:g} requests/s no policy has a lower mean latency than greedy {base.name} ({_seconds(base.latency)})"
    if difference.value < 0:
        text += f" beyond the noise of {base.latency.size} seeds: the next, {best.shown}, differs by {_percent(difference)}"
    else:
        text += f": the next, {best.shown}, has {_seconds(best.latency)} ({_percent(difference)})"
    if base.evictions_per_request < EVICTIONS_MATTER:
        text += f"; {base.name} evicts {_count(base)}, so there is next to nothing that holding requests back could save"
    return text + "."


def _cause(base: _Side, best: _Side, loses: str) -> str:
    """What differs between the two beside the latency: evictions, waiting, time in service."""
    parts = []
    more = base.evictions_per_request - best.evictions_per_request
    if base.evictions_per_request >= EVICTIONS_MATTER and more >= base.evictions_per_request / 2:
        parts.append(f"{base.name} evicts {_count(base)}, after which the request {loses}, and {best.name} evicts {_count(best)}")
    gain = float((base.latency - best.latency).mean())
    waiting = float((base.waiting - best.waiting).mean())
    share = waiting / gain
    if share >= 0.5:
        waited = f"{_seconds(best.waiting)} for {_seconds(base.waiting)}"
        parts.append(f"{100 * min(share, 1):.0f} % of the difference is time before the first token ({waited})")
    else:
        service = f"{_seconds(best.latency - best.waiting)} for {_seconds(base.latency - base.waiting)}"
        parts.append(f"{100 * min(1 - share, 1):.0f} % of the difference is time after the first token ({service})")
        if waiting < 0 and -waiting >= WORTH_NAMING * float(base.waiting.mean()):
            parts[-1] += f", though requests wait longer for it ({_seconds(best.waiting)} for {_seconds(base.waiting)})"
    return "; ".join(parts)


def _price(base: _Side, best: _Side) -> str:
    """The tail of the latency where it is longer, and what is left undone."""
    tail = relative_difference(best.latency_p99, base.latency_p99)
    text = ""
    if tail.value > WORTH_NAMING and (tail.seeds == 1 or tail.low > 0):
        text += f"; the price is the tail, a P99 latency of {_seconds(best.latency_p99)} for {_seconds(base.latency_p99)}"
    if best.unfinished:
        text += f"; {best.name} leaves {best.unfinished:,} requests unfinished"
    return text


def _others(base: _Side, sides: dict[str, _Side], best: str, found: dict[str, Estimate]) -> str:
    """The best of those not told lengths, where the winner is told them."""
    if not sides[best].known_lengths:
        return ""
    blind = [name for name in found if not sides[name].known_lengths]
    if not blind:
        return ""
    next_best = min(blind, key=lambda name: found[name].value)
    side = sides[next_best]
    return f"; of the policies not told lengths, {side.name} has {_seconds(side.latency)} and evicts {_count(side)}"


def _seconds(values: FloatArray) -> str:
    mean = float(values.mean())
    return f"{mean:,.0f} s" if abs(mean) >= 100 else f"{mean:.3g} s"


def _count(side: _Side) -> str:
    per = 100 * side.evictions_per_request
    return "nothing" if per == 0 else f"{per:.2g} times per 100 requests" if per < 100 else f"{per:,.0f} times per 100 requests"


def _percent(estimate: Estimate) -> str:
    if not np.isfinite(estimate.low):
        return f"{100 * estimate.value:+.1f} %, one seed"
    return f"{100 * estimate.value:+.1f} % [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"
