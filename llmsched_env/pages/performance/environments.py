"""The environments through their public interface: steps, decisions and resets."""

from __future__ import annotations

import statistics
import time
from typing import Any

import gymnasium as gym
import numpy as np

from llmsched_env.compiled import compiled
from llmsched_env.pages.performance.figure import Figure, median, median_and_best
from llmsched_env.pages.performance.kernel import CALIBRATION, kernel_rate
from llmsched_env.threads import Workers, available_threads

ADMIT: dict[str, Any] = {"scenario": "azure-conv", "action_set": "admit", "calibration": CALIBRATION}
"""What is stepped: one engine iteration a step."""


def scalar_steps(env: gym.Env[Any, Any], action: Any, steps: int) -> float:
    """Steps per second through the public API, resets included."""
    start = time.perf_counter()
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - start)


def scalar_figure(repeats: int) -> Figure:
    """One environment against ``CartPole-v1``, in turn."""
    ours = gym.make("LLMSched-v1", **ADMIT, num_requests=4000, rate=30.0, engine={"max_num_seqs": 64})
    ours.reset(seed=0)
    greedy = np.array([1] * 4 + [16] * 4)
    scalar_steps(ours, greedy, 2000)
    cartpole = gym.make("CartPole-v1")
    cartpole.reset(seed=0)
    pairs = [(scalar_steps(ours, greedy, 20_000), scalar_steps(cartpole, 1, 20_000)) for _ in range(repeats)]
    a, b = (statistics.median(x) for x in zip(*pairs, strict=True))
    running = ours.unwrapped.view().num_residents  # type: ignore[attr-defined, unused-ignore]
    bare = median(lambda: scalar_steps(ours.unwrapped, greedy, 20_000), repeats)
    what = f"scalar `gym.make` environment, {running} running: steps/s"
    reason = (
        f"a step takes {1e6 / a:.2f} us, CartPole's {1e6 / b:.2f} us; without the wrappers that `gym.make` puts around both ours takes "
        f"{1e6 / bare:.2f} us"
    )
    return Figure(what, f"{a:,.0f}", f"`CartPole-v1`: {b:,.0f}", a / b, 1.4, reason=reason)


def cartpole_speed(repeats: int) -> float:
    """Steps/s of ``CartPole-v1``: how fast the machine is just now."""
    env = gym.make("CartPole-v1")
    env.reset(seed=0)
    return median(lambda: scalar_steps(env, 1, 20_000), repeats)


def vector_figures(repeats: int) -> list[Figure]:
    """256 environments on one thread and on two, and what one of them takes of memory."""
    num, found, rates, best = 256, [], {}, 0.0
    for threads in (1, 2):
        if threads > available_threads():
            continue
        settings = {"max_num_seqs": 128, "num_blocks": 20_000}
        env = gym.make_vec("LLMSched-v1", **ADMIT, num_envs=num, num_requests=4096, rate=30.0, engine=settings, threads=threads)
        env.reset(seed=0)
        action = np.tile(np.array([1] * 4 + [16] * 4), (num, 1))
        for _ in range(500):
            env.step(action)

        def decisions(env: Any = env, action: Any = action) -> float:
            start = time.perf_counter()
            for _ in range(100):
                env.step(action)
            return 100 * num / (time.perf_counter() - start)

        rates[threads], fastest = median_and_best(decisions, repeats)
        if threads == 1:
            best = fastest
            fleet = env.unwrapped.fleet  # type: ignore[attr-defined, unused-ignore]
            running = float(np.mean([record.num_residents for record in fleet.records]))
            megabytes = env.unwrapped.nbytes / num / 1e6  # type: ignore[attr-defined, unused-ignore]
    cartpole = gym.make_vec("CartPole-v1", num_envs=num, vectorization_mode="vector_entry_point")
    cartpole.reset(seed=0)
    ones = np.ones(num, dtype=np.int64)
    start = time.perf_counter()
    for _ in range(500):
        cartpole.step(ones)
    yardstick = 500 * num / (time.perf_counter() - start)
    what = f"vector environment, {num} environments, {running:.0f} running each: decisions/s on one core, observations included"
    iteration = 1e9 / kernel_rate(round(running), repeats, constant=True)[0]
    reason = (
        f"a decision takes {1e9 / rates[1]:.0f} ns; an iteration of the kernel alone takes {iteration:.0f} ns with one engine, which stays "
        f"in the processor's cache; the rest is observation, mask, reward and {num} engines of {megabytes:.2f} MB in turn; "
        f"fastest of {repeats} repeats: {best:,.0f}"
    )
    ours, theirs = f"{rates[1]:,.0f}", f"`CartPoleVectorEnv`: {yardstick:,.0f}"
    found.append(Figure(what, ours, theirs, rates[1] / yardstick, 1_500_000, rate=rates[1], reason=reason))
    if 2 in rates:
        reason = f"plain arithmetic without memory gains {second_thread(repeats):.2f} times from the second thread on this machine"
        what = "two threads against one, the same"
        found.append(Figure(what, f"{rates[2]:,.0f}", f"one thread: {rates[1]:,.0f}", rates[2] / rates[1], 1.7, reason=reason))
    what = "memory per environment, 4,096-request episodes"
    return [*found, Figure(what, f"{megabytes:.2f} MB", bar=1.0, rate=megabytes, higher_is_better=False)]


@compiled
def arithmetic(first: int, last: int, loops: int, sums: Any) -> None:
    """Work that touches no memory."""
    for thread in range(first, last):
        x = 1.0 + thread
        for _ in range(loops):
            x = x * 0.999999 + 1e-6
        sums[thread] = x


def second_thread(repeats: int) -> float:
    """What the machine itself gains from a second thread: two loops at once against one after the other."""
    sums, loops = np.zeros(2), 20_000_000

    def seconds(threads: int) -> float:
        workers = Workers(2, threads)
        start = time.perf_counter()
        workers.run(arithmetic, loops, sums)
        return time.perf_counter() - start

    seconds(2)
    return statistics.median(seconds(1) / seconds(2) for _ in range(repeats))


def reset_figure(repeats: int) -> Figure:
    """What drawing and queueing the requests of an episode costs beside stepping it."""
    env = gym.make_vec("LLMSched-v1", **ADMIT, num_envs=64, num_requests=4096, rate=6.0, threads=1).unwrapped
    greedy = np.tile(np.array([1] * 4 + [16] * 4), (64, 1))
    env.reset(seed=0)

    def reset() -> float:
        start = time.perf_counter()
        env.reset(seed=0)
        return time.perf_counter() - start

    seconds = median(reset, repeats)
    start, steps = time.perf_counter(), 0
    ended = False
    while not ended:
        _, _, terminated, _, _ = env.step(greedy)
        ended = bool(terminated.all())
        steps += 1
        if terminated.any() and not ended:
            break
    episode = time.perf_counter() - start
    what = f"reset of an episode of 4,096 requests over its {steps:,} steps, 64 environments, one thread"
    return Figure(what, f"{1e3 * seconds / 64:.2f} ms", f"{1e3 * episode / 64:.1f} ms", seconds / episode, 0.05, higher_is_better=False)
