"""Whole episodes of policies: a fleet for a day, and the requests of another simulator's runs."""

from __future__ import annotations

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from llmsched_baselines import Setting, make_policy
from llmsched_env.engine_config import EpisodeLimits
from llmsched_env.fluid import stability_boundary
from llmsched_env.pages.performance.figure import Figure, median_and_best
from llmsched_env.pages.performance.kernel import CALIBRATION
from llmsched_env.perf import load_calibration
from llmsched_env.runner import run_episode
from llmsched_env.types import Workload
from llmsched_env.workload import load_scenario

# Requests a second of Vidur's own event loop, sarathi scheduler, Azure conversation lengths at 5 and 7 requests/s:
# microsoft/vidur @ 7d47513, measured on another machine of two cores (start-up of 8 to 10 s a process not counted).
VIDUR_REQUESTS = {5.0: 698, 7.0: 1059}


def replica_day(seed: int, share: float) -> tuple[int, int, float]:
    """(requests, iterations, CPU seconds) of one replica under ``vllm`` for a share of a day at 0.8 of the boundary."""
    scenario = load_scenario("azure-conv")
    engine = scenario.engine.replace(time_model=load_calibration(CALIBRATION))
    rate = 0.8 * stability_boundary(scenario.statistics, engine)
    count = round(rate * 86_400 * share)
    start = time.process_time()
    policy = make_policy("vllm", Setting(scenario.statistics, rate, engine))
    result = run_episode(policy, scenario.generate(seed, rate=rate, num_requests=count), limits=EpisodeLimits(max_iterations=100_000_000))
    assert result.summary.completed == count
    return count, result.summary.iterations, time.process_time() - start


def fleet_figure(share: float = 1.0, replicas: int = 100) -> Figure:
    """1,000 replicas for one simulated day on two cores, from a part of it: replicas are independent, so time goes in proportion."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(replica_day, range(2), [0.001] * 2))
        start = time.perf_counter()
        parts = list(pool.map(replica_day, range(replicas), [share] * replicas))
        seconds = time.perf_counter() - start
        memory = 2 * max(pool.map(_peak_megabytes, range(2))) / 1e3
    minutes = seconds / (replicas * share) * 1000 / 60
    requests, iterations = sum(part[0] for part in parts), sum(part[1] for part in parts)
    what = "a fleet: 1,000 replicas under `vllm`, one simulated day at 0.8 of the boundary, 2 cores: minutes"
    run = (
        f"scaled from {replicas} replicas for {share:g} day: {requests:,} requests, {iterations:,} iterations in {seconds:.0f} s, "
        f"two processes, {memory:.1f} GB in both (bar 4)"
    )
    each = 1e9 * sum(part[2] for part in parts) / iterations
    reason = f"{each:.0f} ns of processor time an iteration, requests drawn and metrics included"
    return Figure(what, f"{minutes:.1f}", run, bar=15.0, rate=max(minutes, 15.0 * memory / 4), higher_is_better=False, reason=reason)


def _peak_megabytes(_: int) -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def trace_figures(repeats: int) -> list[Figure]:
    """20,000 requests under ``sarathi``, KV and iteration times as in Vidur's runs; generating the requests not counted."""
    scenario = load_scenario("azure-conv")
    engine = scenario.engine.replace(time_model=load_calibration("a100-llama2-7b-vidur"))
    found = []
    for rate, theirs in VIDUR_REQUESTS.items():
        policy = make_policy("sarathi", Setting(scenario.statistics, rate, engine))
        workload = scenario.generate(0, rate=rate, num_requests=20_000)
        run_episode(policy, scenario.generate(0, rate=rate, num_requests=100))

        def speed(policy: Any = policy, workload: Workload = workload) -> float:
            start = time.perf_counter()
            result = run_episode(policy, workload)
            assert result.summary.completed == len(workload)
            return len(workload) / (time.perf_counter() - start)

        ours, best = median_and_best(speed, repeats)
        iterations = run_episode(policy, workload).summary.iterations / len(workload)
        each = f"{iterations:.2f} iterations a request, {1e9 / ours / iterations:.0f} ns each, metrics included"
        reason = f"{each}; fastest of {repeats} repeats: {best:,.0f}"
        what = f"20,000 requests under `sarathi` at {rate:g} requests/s: requests/s, metrics included"
        found.append(Figure(what, f"{ours:,.0f}", f"Vidur's event loop: {theirs:,} (another machine)", ours / theirs, 1500, reason=reason))
    return found
