"""Levels of predicted KV memory: the action set ``peak``.

Residents end at random and the others grow. With S_j(g) = P(output > g) of class j, a resident of prompt l that
has generated g tokens still runs t iterations from now with probability S_j(g + t) / S_j(g) and then holds
l + g + t tokens (and half a block on average, rounded up). The sum over the residents is the expected KV t iterations
ahead, and its largest value over ``forecast_steps`` the predicted peak. An action is a level: requests enter from
outside while the peak stays within level * C. ``reserve`` (``llmsched_env.action``) adds up final lengths, which are
never reached all at once; how much of that sum a memory bears depends on the workload, how high a peak much less.

An empty engine takes the first request whatever it is expected to need, so nothing is held forever.

Requests enter in the engine's admission order (``arrival``), or least work first (``work``): class by class by the
mean KV x iterations of its requests, l'(l + l'/2), oldest first within a class. The decision says how many of each
class may enter; the engine lets those in, in its own order, as far as they really fit.

Where output lengths are predicted there are orders ``trust-W`` besides: the oldest requests of the classes by their expected work
when predictions are trusted to the share W (``llmsched_env.shrinkage``). No more requests are let in than the iteration's token
budget can begin, so that the engine's own order does not come between.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from llmsched_env.compiled import compiled
from llmsched_env.engine.queues import next_in_order, start_of_queues
from llmsched_env.engine.residents import generated
from llmsched_env.engine.state import Engine
from llmsched_env.engine_config import EngineConfig
from llmsched_env.forecast import class_weights, class_work
from llmsched_env.records import Counts, Cube32, Indices, Record, Vector
from llmsched_env.shrinkage import NO_PRIOR, Belief, Prior, PriorRecord
from llmsched_env.types import ADMIT_ALL, Decision, FloatArray, LengthStatistics, QueueLayout

GRID = (0, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Iterations ahead at which the KV is predicted, where outputs are long enough (``forecast_steps``)."""

LEVELS = (0.5, 0.7, 0.8, 0.85, 0.9, 0.95, math.inf)
"""Levels that the environment offers; ``inf`` admits as many as fit now. A level of 1 is left out: forecasts err, so that half the time
the memory would not do, and it is little better than infinity."""

WORK_ORDERS = ("arrival", "work")
"""Orders in which requests may enter from outside where nothing is predicted."""

TRUSTS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares to which predictions are trusted."""

PREDICTED_ORDERS = ("arrival", *(f"trust-{trust:g}" for trust in TRUSTS))
"""Orders where output lengths are predicted."""

ORDERS = (*WORK_ORDERS, *PREDICTED_ORDERS[1:])
"""All orders."""

_LONGEST = 4096  # tokens; beyond, a length is as likely as at the end of the table


class PeakRecord(Record):
    """What predictions of one workload on one engine read. T steps of the forecast, J classes, G lengths told apart."""

    headroom: float  # tokens counted for each resident beyond those it holds
    steps: Vector  # (T,) iterations ahead
    survival: Cube32  # (N, B, T), P(output > g + steps[t] | output > g) of a group of classes, in a range of g
    group: Indices  # (J,) of each class
    place: Indices  # (G,) range of g = 0 .. G - 1; beyond, a length is as likely as at the end
    by_work: Indices  # (J,) classes, least work first
    prior: PriorRecord  # of the orders by predicted work
    scores: Vector  # (J,) work of the next request of each class
    scored: Counts  # (J,) which request that is, plus 1; scores are kept while it and the belief stay the same
    scored_with: Belief
    total: Vector  # (T,) scratch
    own: Vector  # (T,) scratch


@dataclass(frozen=True, slots=True)
class PeakTables:
    """The tables of a ``PeakRecord``; many records may share them.

    Attributes:
        survival: (J, G, T) float32, P(output > g + steps[t] | output > g, class j).
        steps: (T,) float64, ``forecast_steps``.
        headroom: tokens counted for each resident beyond those it holds: what its last block wastes on average, and the spare.
        by_work: (J,) int64, classes in the order of the work to expect of a request, least first.
        work: (J,) float64, seconds of machine work to expect of a request (``llmsched_env.work``); empty where nobody asks for it.
        group: (J,) int64, place of each class in ``survival``; None: each has its own.
        prior: of the orders by predicted work.
    """

    survival: npt.NDArray[np.float32]
    steps: FloatArray
    headroom: float
    by_work: npt.NDArray[np.int64]
    work: FloatArray = field(default_factory=lambda: np.zeros(0))
    group: npt.NDArray[np.int64] | None = None
    prior: Prior = NO_PRIOR

    def record(self) -> PeakRecord:
        """A record with scratch of its own."""
        scratch = {name: np.zeros(self.steps.size) for name in ("total", "own")}
        own, places = (np.arange(size, dtype=np.int64) for size in self.survival.shape[:2])
        groups = own if self.group is None else self.group
        scratch["scores"] = np.zeros(groups.size)
        scored = np.zeros(groups.size, dtype=np.int64)
        tables = {"steps": self.steps, "survival": self.survival, "group": groups, "place": places, "by_work": self.by_work}
        made = PeakRecord(prior=self.prior.record(), scored=scored, **tables, **scratch)
        made.headroom = self.headroom
        return made


NO_TABLES = PeakTables(np.zeros((1, 1, len(GRID)), dtype=np.float32), np.zeros(len(GRID)), 0.0, np.zeros(1, dtype=np.int64))
"""Where nothing is predicted."""


def forecast_steps(max_output: int) -> FloatArray:
    """(T,) iterations ahead at which the KV is predicted: those of ``GRID`` within the longest output, and as many between them.

    Short outputs need a finer forecast: where all end within 20 iterations, the peak lies between two points of ``GRID``.
    """
    if max_output > GRID[-1]:
        return np.array(GRID, dtype=np.float64)
    last = max(max_output - 1, 0)
    points = [*(t for t in GRID if t < last), last]
    while len(points) < len(GRID):
        gaps = [b - a for a, b in itertools.pairwise(points)]
        if max(gaps, default=0) <= 1:
            return np.array(points + [last] * (len(GRID) - len(points)), dtype=np.float64)
        widest = gaps.index(max(gaps))
        points.insert(widest + 1, points[widest] + gaps[widest] // 2)
    return np.array(points, dtype=np.float64)


def peak_tables(statistics: LengthStatistics, layout: QueueLayout, engine: EngineConfig, spare: float = 0.0) -> PeakTables:
    """Tables from what an operator knows of the lengths.

    Args:
        spare: blocks (tokens in the ``paper`` preset) counted for each resident beyond its own.
    """
    steps = forecast_steps(statistics.max_output)
    weights = class_weights(statistics, layout)
    size = table_size(statistics)
    survival = np.empty((layout.num_classes, size, len(GRID)), dtype=np.float32)
    for j in range(layout.num_classes):
        above = tail(statistics.output, weights[j], size + int(steps[-1]))
        now = np.maximum(above[:size], 1e-12)
        for t, ahead in enumerate(steps.astype(int).tolist()):
            survival[j, :, t] = 1.0 if ahead == 0 else above[ahead : size + ahead] / now
    headroom = spare if engine.preset == "paper" else spare * engine.block_size + (engine.block_size - 1) / 2
    by_work = np.argsort(class_work(statistics, layout), kind="stable").astype(np.int64)
    prior = Prior.of(statistics, engine) if layout.by == "predicted" else NO_PRIOR
    return PeakTables(survival, steps, headroom, by_work, prior=prior)


def table_size(statistics: LengthStatistics) -> int:
    """G, lengths that a table tells apart."""
    return min(statistics.max_output + 1, _LONGEST)


def tail(output: FloatArray, weight: FloatArray, size: int) -> FloatArray:
    """(size,) sum of the weights of outputs > g, g = 0 .. size - 1."""
    order = np.argsort(output, kind="stable")
    above = np.concatenate([np.cumsum(weight[order][::-1])[::-1], [0.0]])
    found: FloatArray = above[np.searchsorted(output[order], np.arange(size, dtype=np.float64), side="right")]
    return found


# --- compiled -------------------------------------------------------------------------------------------
@compiled
def run_everything(engine: Engine, greedy: bool, decision: Decision) -> None:
    """Everything runs and boundaries are passed; from outside as many as fit enter (``greedy``) or nobody."""
    num_segments = engine.settings.num_segments
    for q in range(engine.settings.num_queues):
        decision.run[q] = 1
        decision.admit[q] = ADMIT_ALL if greedy or q % num_segments != 0 else 0
        decision.evict[q] = 0


@compiled
def kv_unit(engine: Engine) -> float:
    """Tokens of a KV unit."""
    return 1.0 if engine.settings.paper != 0 else float(engine.settings.block_size)


@compiled
def predict(engine: Engine, peak: PeakRecord) -> None:
    """Write the expected KV (tokens) of the residents at each of ``steps`` into ``total``."""
    requests, num_segments = engine.requests, engine.settings.num_segments
    total, steps, survival = peak.total, peak.steps, peak.survival
    last = peak.place.shape[0] - 1
    for t in range(total.shape[0]):
        total[t] = 0.0
    r = engine.oldest
    while r >= 0:
        tokens = generated(engine, r)
        held = requests.prompt[r] + tokens + peak.headroom
        j, g = peak.group[requests.queue[r] // num_segments], peak.place[min(tokens, last)]
        for t in range(total.shape[0]):
            total[t] += survival[j, g, t] * (held + steps[t])
        r = requests.next[r]


@compiled
def adds_within(engine: Engine, peak: PeakRecord, r: int, q: int, limit: float) -> bool:
    """Write into ``own`` what ``total`` becomes with request r of queue q; whether all of it stays within ``limit`` tokens."""
    total, own, steps, survival = peak.total, peak.own, peak.steps, peak.survival
    tokens = engine.requests.base_generated[r]
    held = engine.requests.prompt[r] + tokens + peak.headroom
    j, g = peak.group[q // engine.settings.num_segments], peak.place[min(tokens, peak.place.shape[0] - 1)]
    fits = True
    for t in range(total.shape[0]):
        own[t] = total[t] + survival[j, g, t] * (held + steps[t])
        if own[t] > limit:
            fits = False
    return fits


@compiled
def take_over(peak: PeakRecord) -> None:
    """The request of the last ``adds_within`` enters."""
    total, own = peak.total, peak.own
    for t in range(total.shape[0]):
        total[t] = own[t]


@compiled
def decode_peak(engine: Engine, peak: PeakRecord, level: float, decision: Decision) -> None:
    """Write the decision of this level, requests entering in the engine's admission order."""
    run_everything(engine, level == math.inf, decision)
    if level == math.inf or engine.num_waiting == 0:
        return
    requests, queues = engine.requests, engine.queues
    limit = level * engine.settings.capacity * kv_unit(engine)
    predict(engine, peak)
    empty = engine.num_residents == 0
    start_of_queues(engine)
    best = next_in_order(engine)
    while best >= 0:
        r = queues.left[best]
        if not adds_within(engine, peak, r, best, limit) and not empty:
            return
        take_over(peak)
        empty = False
        decision.admit[best] += 1
        queues.left[best] = requests.next[r]
        best = next_in_order(engine)


@compiled
def decode_peak_by_work(engine: Engine, peak: PeakRecord, level: float, decision: Decision) -> None:
    """Write the decision of this level, requests entering least work first; at infinity as many as fit now."""
    run_everything(engine, False, decision)
    if engine.num_waiting == 0:
        return
    predict(engine, peak)
    capacity = engine.settings.capacity * kv_unit(engine)
    limit = level * capacity  # infinite: only the memory of now counts
    empty = engine.num_residents == 0
    for i in range(peak.by_work.shape[0]):
        q = peak.by_work[i] * engine.settings.num_segments
        r = engine.queues.head[q]
        while r >= 0:
            fits = adds_within(engine, peak, r, q, limit) and (level < math.inf or peak.own[0] <= capacity)
            if not fits and not empty:
                return
            take_over(peak)
            empty = False
            decision.admit[q] += 1
            r = engine.requests.next[r]
