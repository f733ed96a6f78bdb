"""What agents are held to in an evaluation, and what was found."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmsched_agents.statistics import Estimate, share_of_gap
from llmsched_env.bench.evaluation import lengths_known
from llmsched_env.bench.results import OVERLOADED, Results, interval, matrix, percent, pooled_difference
from llmsched_env.bench.suite import MOVING, Cell
from llmsched_env.bench.variants import greedy_of


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar, what was found, and whether it is reached: ``reached``, ``not reached`` or why there is no answer."""

    number: int
    text: str
    found: str
    answer: str


NOT_TUNED = "no tuned baseline"
NOT_TOGETHER = "no baseline tuned together"
NO_AGENT = "no agent given"
STATIC = "operate (tuned)"
"""The static setting in hindsight: what a search found best for that very cell."""

BAR_TEXTS = {
    1: "told nothing: mean latency within 3 % of the best static setting in hindsight (`operate`, tuned in that cell), in every cell",
    2: "never above greedy FIFO's mean latency, in any cell",
    3: "where adapting pays: on the non-stationary part at least 5 % below the best baseline tuned on average for it",
    4: "tails: an agent with P99 not above greedy FIFO's in every cell at loads up to 1.0 and in bursts, its mean there at most 6 % "
    "above the best of all that know no lengths",
    5: "SLO goodput at loads 1.0 and 1.1: at least 1 % above tuned late-last with an interval excluding zero, and 1.3 times the best "
    "default that does not look at limits",
    6: "share of the gap between the best tuned baseline and the reference with known lengths closed at loads 1.0 and 1.1: above 0",
}


def bars(results: Results, agents: Sequence[str], slo_agent: str) -> list[Bar]:
    """All bars.

    Args:
        agents: for mean latency; the first is held to bars 1 to 3 and 6, and the best of all to bar 4.
        slo_agent: for bar 5; empty: none.
    """
    found = []
    tests = {1: _static, 2: _greedy, 3: _adapting, 5: _slo, 6: _gap}
    for number, text in BAR_TEXTS.items():
        names = ([slo_agent] if slo_agent else []) if number == 5 else list(agents)
        if not names:
            found.append(Bar(number, text, "", NO_AGENT))
            continue
        said, answer = _tails(results, names) if number == 4 else tests[number](results, names[0])
        found.append(Bar(number, text, said, answer))
    return found


def _answer(reached: bool) -> str:
    return "reached" if reached else "not reached"


def _stationary(results: Results, loads: Sequence[float] = ()) -> list[Cell]:
    return [c for c in results.cells if c.part == "stationary" and (not loads or c.load in loads)]


def _named(cell: Cell) -> str:
    return f"{cell.title}, load {cell.load:g}" if cell.part == "stationary" else f"{cell.part}: {cell.title}"


def _below(difference: Estimate, share: float) -> bool:
    return difference.value <= -share and difference.high < 0


def _worst(found: Sequence[tuple[float, Cell]]) -> str:
    value, cell = max(found, key=lambda item: -math.inf if math.isnan(item[0]) else item[0])
    return f"{percent(value)} ({_named(cell)})"


def _static(results: Results, agent: str) -> tuple[str, str]:
    chosen = [cell for cell in results.cells if STATIC in results.labels(cell)]
    if not chosen:
        return "", NOT_TUNED
    found = [(results.against(cell, agent, STATIC).value, cell) for cell in chosen]
    within = sum(value <= 0.03 for value, _ in found)
    pooled = pooled_difference(results, chosen, lambda _: agent, lambda _: STATIC)
    text = f"within 3 % in {within} of {len(found)} cells, worst {_worst(found)}; over all cells {interval(pooled)}"
    return text, _answer(within == len(found))


def _greedy(results: Results, agent: str) -> tuple[str, str]:
    found = [(results.against(cell, agent, f"{greedy_of(cell)} (default)").value, cell) for cell in results.cells]
    within = sum(value <= 0.0 for value, _ in found)
    return f"not above in {within} of {len(found)} cells, worst {_worst(found)}", _answer(within == len(found))


def _tails(results: Results, agents: Sequence[str]) -> tuple[str, str]:
    """Of the agents, the one that holds in most cells decides; all are told."""
    chosen = [c for c in results.cells if (c.part == "stationary" and c.load <= 1.0) or c.part == "bursts"]
    if not chosen:
        return "", "no cell at loads up to 1.0 and none with bursts"
    told, best = [], 0
    for agent in agents:
        tail = near = both = 0
        for cell in chosen:
            fair = [label for label in results.labels(cell) if not lengths_known(label)]
            mean = results.mean(cell, agent)
            held = not results.tail_exceeds(cell, agent)
            close = mean <= 1.06 * results.mean(cell, results.best(cell, fair))
            tail, near, both = tail + held, near + close, both + (held and close)
        best = max(best, both)
        told.append(f"{agent}: P99 held in {tail}, mean within 6 % in {near}, both in {both} of {len(chosen)} cells")
    return "; ".join(told), _answer(best == len(chosen))


def _adapting(results: Results, agent: str) -> tuple[str, str]:
    """Decided by the best single baseline with one set of parameters for the part; that of each cell is told beside it."""
    moving = [cell for cell in results.cells if cell.part in MOVING]
    shared = [cell for cell in moving if results.labels(cell, ("together",))]
    single = [cell for cell in moving if results.best_tuned(cell)]
    best = results.best_together(shared)
    found, answer = [], NOT_TOGETHER if single else NOT_TUNED
    if best:
        pooled = pooled_difference(results, shared, lambda _: agent, lambda _: best)
        found.append(f"{interval(pooled)} against {best}, the best with one set of parameters for all {len(shared)} cells")
        answer = _answer(_below(pooled, 0.05))
    if single:
        pooled = pooled_difference(results, single, lambda _: agent, results.best_tuned)
        found.append(f"{interval(pooled)} against the best tuned in each of {len(single)} cells separately, more than the bar asks")
    return "; ".join(found), answer


def _gap(results: Results, agent: str) -> tuple[str, str]:
    tuned = [cell for cell in _stationary(results, OVERLOADED) if results.best_tuned(cell)]
    if not tuned:
        return "", NOT_TUNED
    chosen = results.with_gap(tuned, results.best_tuned)
    if not chosen:
        return f"the bound is nowhere 1 % below the best tuned baseline ({len(tuned)} cells)", "no gap"
    matrices = [matrix(results, chosen, of) for of in (lambda _: agent, results.best_tuned, results.oracle)]
    share = share_of_gap(*matrices)
    return f"{interval(share)} over the {len(chosen)} of {len(tuned)} cells with a gap", _answer(share.value > 0 and share.low > 0)


def _slo(results: Results, agent: str) -> tuple[str, str]:
    def blind(cell: Cell) -> str:
        labels = [x for x in results.labels(cell, ("default",)) if not lengths_known(x) and not x.startswith("late-last")]
        return results.best(cell, labels, "slo_goodput", lowest=False)

    chosen = [c for c in _stationary(results, OVERLOADED) if "late-last (tuned)" in results.labels(c) and blind(c)]
    if not chosen:
        return "", "no tuned late-last beside a default"
    late = pooled_difference(results, chosen, lambda _: agent, lambda _: "late-last (tuned)", "slo_goodput")
    defaults = pooled_difference(results, chosen, lambda _: agent, blind, "slo_goodput")
    text = f"{interval(late)} against tuned late-last; {1 + defaults.value:.2f} times the best blind default, over {len(chosen)} cells"
    return text, _answer(late.value >= 0.01 and late.low > 0 and 1 + defaults.value >= 1.3)


