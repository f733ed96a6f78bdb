"""The compiled loop alone, with nothing around it."""

from __future__ import annotations

import statistics
import time

import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine.state import Engine
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.pages.performance.figure import Figure
from llmsched_env.perf import load_calibration
from llmsched_env.records import Numbers
from llmsched_env.types import Decision, QueueLayout, Workload

# Simulated over real time, published: BLIS (inference-sim) and Vidur (arXiv 2405.05465).
BLIS_REAL_TIME, VIDUR_REAL_TIME = 212, 141

CALIBRATION = "a100-llama2-7b-c10"
"""Iteration times of the page's episodes: the figures of one version compare with those of another."""


@compiled
def everybody(engine: Engine, policy: Numbers, decision: Decision) -> None:
    """A rule that looks at every queue before every iteration."""
    for q in range(engine.settings.num_queues):
        decision.run[q] = 1
        decision.admit[q] = engine.queues.waiting[q]
        decision.evict[q] = 0


def kernel_rate(running: int, repeats: int, *, constant: bool) -> tuple[float, float]:
    """(iterations per second, simulated over real time) with the batch kept at ``running``."""
    rng = np.random.default_rng(0)
    n = 2000 + 20 * running
    workload = Workload.of(np.zeros(n), rng.integers(50, 200, n), rng.integers(100, 500, n))
    sizes = {"max_num_seqs": running, "max_num_batched_tokens": max(2048, running), "num_blocks": 200_000}
    engine = EngineConfig.vllm(time_model=load_calibration(CALIBRATION), **sizes)
    rule = Rule.constant(Decision.greedy(1)) if constant else Rule(everybody, 1)
    backend, rates, ratios = SimBackend(), [], []
    for _ in range(repeats + 1):
        backend.reset(workload, QueueLayout(), engine, EpisodeLimits())
        start = time.perf_counter()
        rule.play(backend)
        seconds = time.perf_counter() - start
        rates.append(backend.record.iterations / seconds)
        ratios.append(backend.record.clock / seconds)
    return statistics.median(rates[1:]), statistics.median(ratios[1:])


def kernel_figures(repeats: int) -> list[Figure]:
    """Iterations/s by the size of the batch, how their cost grows with it, and simulated over real time."""
    sizes = (32, 128, 256, 512, 1024)
    measured = {size: kernel_rate(size, repeats, constant=True) for size in sizes}
    asked = {size: kernel_rate(size, repeats, constant=False) for size in (128, 1024)}
    costs = {size: 1e9 / rate for size, (rate, _) in measured.items()}
    # Whoever leaves after 300 iterations on average is replaced: events in proportion to the batch.
    pair = (costs[1024] - costs[32]) / ((1024 - 32) / 300)
    fixed = costs[32] - pair * 32 / 300
    reason = f"{fixed:.0f} ns whatever runs and {pair:.0f} ns for each request that leaves and the one that takes its place"
    found = []
    for size in (128, 1024):
        rate = measured[size][0]
        what = f"kernel alone, constant decision, {size:,} running: iterations/s on one core"
        found.append(Figure(what, f"{rate:,.0f}", bar=5_000_000, rate=rate, reason=f"an iteration takes {costs[size]:.0f} ns: {reason}"))
    for size in (128, 1024):
        rate = asked[size][0]
        what = f"kernel alone, rule asked before every iteration, {size:,} running: iterations/s on one core"
        found.append(Figure(what, f"{rate:,.0f}", bar=3_000_000, rate=rate, reason=f"an iteration takes {1e9 / rate:.0f} ns: {reason}"))
    for small, large in ((32, 128), (128, 512), (512, 1024)):
        growth = costs[large] / costs[small] / (large / small)
        what = f"kernel, growth of an iteration's cost from {small} to {large} running over the growth of the batch"
        value = f"{costs[small]:.0f} -> {costs[large]:.0f} ns"
        found.append(Figure(what, value, f"batch x {large / small:.0f}", growth, 1.0, higher_is_better=False))
    yardstick = f"BLIS {BLIS_REAL_TIME}, Vidur {VIDUR_REAL_TIME} (published)"
    speed = measured[256][1]
    found.append(Figure("simulated over real time, 256 running", f"{speed:,.0f}", yardstick, speed / BLIS_REAL_TIME, 10_000, rate=speed))
    return found
