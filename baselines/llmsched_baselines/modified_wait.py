"""Modified WAIT: WAIT whose thresholds follow the arrival rates it sees."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from llmsched_baselines.policy import RulePolicy, Setting, output_classes
from llmsched_baselines.wait import free_a_full_memory
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.state import RATE_WINDOW_SECONDS, Engine
from llmsched_env.errors import ConfigError
from llmsched_env.fluid import class_profiles
from llmsched_env.fluid.equilibrium import KV_CHARGED, Fluid
from llmsched_env.records import Counts, Record, Vector
from llmsched_env.types import Decision, FloatArray

GRID = 64
CREDIT = 1_000_000
"""Thresholds are whole requests in the long run: fractions add up in units of one in a million."""


@compiled
def cycle_of(work, cycles, grid):  # type: ignore[no-untyped-def]
    """Cycle length (s) for ``work`` KV tokens per second, linear between the points of the grid, held at its ends."""
    if work <= grid[0]:
        return cycles[0]
    last = grid.shape[0] - 1
    if work >= grid[last]:
        return cycles[last]
    i = np.searchsorted(grid, work)
    share = (work - grid[i - 1]) / (grid[i] - grid[i - 1])
    return cycles[i - 1] + share * (cycles[i] - cycles[i - 1])


class RatesRecord(Record):
    """What ``follow_rates`` reads and remembers."""

    expected: Vector  # (J,) rates, requests/s
    work: Vector  # (J,) KV work of a request, token seconds per second of rate
    limit: float  # longest cycle x work
    grid: Vector  # (GRID,) work
    cycles: Vector  # (GRID,) cycle for it, seconds
    credit: Counts  # (J,) fractions of a request carried over, in units of 1 / CREDIT


@compiled
def follow_rates(engine: Engine, policy: RatesRecord, decision: Decision) -> None:
    """WAIT with n_j = (rate seen of class j) x (cycle for the work seen)."""
    queues, num_classes = engine.queues, engine.settings.num_queues
    # The part of the window that has not been seen yet counts at the expected rate.
    unseen = RATE_WINDOW_SECONDS - engine.rate_seconds
    total = 0.0
    for j in range(num_classes):
        total += (queues.arrivals[j] + unseen * policy.expected[j]) / RATE_WINDOW_SECONDS * policy.work[j]
    cycle = cycle_of(total, policy.cycles, policy.grid)
    if total > 0.0:
        cycle = min(cycle, policy.limit / total)
    launched = False
    advances = False
    for j in range(num_classes):
        rate = (queues.arrivals[j] + unseen * policy.expected[j]) / RATE_WINDOW_SECONDS
        credit = policy.credit[j] + int(rate * cycle * CREDIT)
        need = credit // CREDIT
        if queues.residents[j] == 0:
            need = max(need, 1)
        ready = queues.waiting[j] >= need
        decision.run[j] = ready
        decision.admit[j] = need if ready else 0
        decision.evict[j] = 0
        if ready:
            policy.credit[j] = max(credit - need * CREDIT, 0)
            launched = True
            advances = advances or queues.residents[j] > 0
    free_a_full_memory(engine, launched, advances, decision)


class ModifiedWait(RulePolicy):
    """WAIT with on-line rate estimates, after arXiv 2608.06135 (output lengths known).

    Before each iteration the rates of the classes are estimated and the thresholds recomputed as ``wait`` would:
    n_j = lam_j x with x = min(slack DT*, C / a), a = sum_j lam_j S_j. The estimate is the exponential window of
    the view (30 s; before it is full, the expected rate stands in for the rest); the cited work smooths
    a sliding window in two further steps. DT* comes from a table over a made for the nominal mix, which is exact where
    iteration time is linear in KV tokens. Fractions of a threshold are carried over to the next iteration.

    Thresholds that move can leave more residents of a stage than the new threshold, so evictions are not ruled out.

    Args:
        num_classes: buckets of equal probability by output length (types where the workload has types).
        slack: cycle length over the fluid equilibrium's.
    """

    name: ClassVar[str] = "modified-wait"
    known_lengths: ClassVar[bool] = True

    def __init__(self, setting: Setting, num_classes: int = 4, slack: float = 1.25) -> None:
        if not 1 <= slack < np.inf:
            raise ConfigError(f"policy.slack: {slack}, must be >= 1")
        self.layout = output_classes(setting.statistics, num_classes)
        self.engine = setting.engine_for()
        points = class_profiles(setting.statistics, self.layout)
        fluid = Fluid.of(
            points.prompt, points.output, setting.rate * points.weight, self.engine, points.class_id, points.num_classes
        )  # fmt: skip
        load = fluid.load
        work = load.kv_tokens
        longest = load.longest_cycle()[0]  # x at the limits of the engine, for the nominal rate
        shares: FloatArray = np.geomspace(1e-3, 1.0, GRID) * longest / load.times(longest).seconds
        at = [load.times(float(share)) for share in shares]
        cycles = [min(slack * one.equilibrium_seconds(), one.longest_cycle()[0]) for one in at]
        record = RatesRecord(
            expected=np.array(fluid.class_rate, dtype=np.float64),
            work=np.array(fluid.class_sums[:, KV_CHARGED], dtype=np.float64),
            grid=shares * work,
            cycles=np.array(cycles),
            credit=np.zeros(self.layout.num_classes, dtype=np.int64),
        )
        record.limit = longest * work
        self.rule = Rule(follow_rates, self.layout.num_queues, record, known_lengths=True)
