"""Speed of the simulator, each figure beside its yardstick in the same run.

    python scripts/benchmark.py --json out.json [--out docs/performance.md]

A figure is the median of repeated measurements; batch sizes stand beside it. No test asserts any of them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

if not __package__:  # run as a program: imports go from the project's root, not from scripts/
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import gymnasium as gym
import numba
import numpy as np
from llmsched_env.engine.constant import run_constant
from numba import prange

import llmsched_env
from baselines import Setting, make_policy
from llmsched_env import EngineConfig, EpisodeLimits, QueueLayout, Workload
from llmsched_env.compiled import parallel
from llmsched_env.engine import state as st
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.perf import load_calibration
from llmsched_env.runner import run_episode
from llmsched_env.types import Decision
from llmsched_env.vector import LLMSchedVectorEnv
from llmsched_env.workload import load_scenario

# Simulated over real time, published: BLIS (inference-sim) and Vidur (arXiv 2405.05465).
BLIS_REAL_TIME, VIDUR_REAL_TIME = 212, 141
# Requests a second of Vidur's own event loop, sarathi scheduler, Azure conversation lengths at 5 and 7 requests/s:
# microsoft/vidur @ 7d47513, measured on another machine of two cores (start-up of 8 to 10 s a process not counted).
VIDUR_REQUESTS = {5.0: 698, 7.0: 1059}
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Figure:
    """One line of the table; ``ratio`` is what the bar is about, ``reason`` where the time goes."""

    what: str
    value: str
    yardstick: str
    ratio: float
    bar: float
    higher_is_better: bool = True
    reason: str = ""

    @property
    def holds(self) -> bool:
        return self.ratio >= self.bar if self.higher_is_better else self.ratio <= self.bar


def median_and_best(measure: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Of rates: on a machine that others use too, the best tells what it does undisturbed."""
    rates = [measure() for _ in range(repeats)]
    return statistics.median(rates), max(rates)


def median(measure: Callable[[], float], repeats: int) -> float:
    return median_and_best(measure, repeats)[0]


def scalar_steps(env: gym.Env[Any, Any], action: Any, steps: int) -> float:
    """Steps per second through the public API, resets included."""
    start = time.perf_counter()
    for _ in range(steps):
        _, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            env.reset()
    return steps / (time.perf_counter() - start)


def scalar_figure(repeats: int) -> Figure:
    ours = gym.make("LLMSched-v0", num_requests=4000, rate=30.0, engine={"max_num_seqs": 64})
    ours.reset(seed=0)
    greedy = np.array([1] * 4 + [16] * 4)
    scalar_steps(ours, greedy, 2000)
    cartpole = gym.make("CartPole-v1")
    cartpole.reset(seed=0)
    pairs = [(scalar_steps(ours, greedy, 20_000), scalar_steps(cartpole, 1, 20_000)) for _ in range(repeats)]
    a, b = (statistics.median(x) for x in zip(*pairs, strict=True))
    running = ours.unwrapped.view().num_residents  # type: ignore[attr-defined]
    bare = median(lambda: scalar_steps(ours.unwrapped, greedy, 20_000), repeats)
    what = f"scalar `gym.make` environment, {running} running: steps/s"
    reason = (
        f"a step takes {1e6 / a:.2f} us, CartPole's {1e6 / b:.2f} us; without the wrappers that `gym.make` puts around both ours takes "
        f"{1e6 / bare:.2f} us"
    )
    return Figure(what, f"{a:,.0f}", f"`CartPole-v1`: {b:,.0f}", a / b, 1.0, reason=reason)


def cartpole_speed(repeats: int) -> float:
    env = gym.make("CartPole-v1")
    env.reset(seed=0)
    return median(lambda: scalar_steps(env, 1, 20_000), repeats)


def vector_figures(repeats: int) -> list[Figure]:
    num, found, rates, best = 256, [], {}, 0.0
    for threads in (1, 2):
        if threads > numba.config.NUMBA_NUM_THREADS:
            continue
        settings = {"max_num_seqs": 128, "num_blocks": 20_000}
        env = gym.make_vec("LLMSched-v0", num_envs=num, num_requests=4096, rate=30.0, engine=settings, threads=threads)
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
            running = float(env.unwrapped._scalars[:, st.I_RESIDENTS].mean())  # type: ignore[attr-defined]
            megabytes = env.unwrapped.nbytes / num / 1e6  # type: ignore[attr-defined]
    cartpole = gym.make_vec("CartPole-v1", num_envs=num, vectorization_mode="vector_entry_point")
    cartpole.reset(seed=0)
    ones = np.ones(num, dtype=np.int64)
    start = time.perf_counter()
    for _ in range(500):
        cartpole.step(ones)
    yardstick = 500 * num / (time.perf_counter() - start)
    what = f"vector environment, {num} environments, {running:.0f} running each: decisions/s on one core, observations included"
    iteration = 1e9 / kernel_rate(round(running), repeats)[0]
    reason = (
        f"a decision takes {1e9 / rates[1]:.0f} ns; an iteration of the kernel alone takes {iteration:.0f} ns with one engine, which stays "
        f"in the processor's cache; the rest is observation, mask, reward and {num} engines of {megabytes:.2f} MB in turn; "
        f"fastest of {repeats} repeats: {best:,.0f}"
    )
    found.append(Figure(what, f"{rates[1]:,.0f}", f"`CartPoleVectorEnv`: {yardstick:,.0f}", rates[1], 500_000, reason=reason))
    if 2 in rates:
        reason = f"plain arithmetic without memory gains {second_thread(repeats):.2f} times from the second thread on this machine"
        what = "two threads against one, the same"
        found.append(Figure(what, f"{rates[2]:,.0f}", f"{rates[1]:,.0f}", rates[2] / rates[1], 1.7, reason=reason))
    found.append(Figure("memory per environment, 4,096-request episodes", f"{megabytes:.2f} MB", "-", megabytes, 1.0, False))
    return found


@parallel
def arithmetic(loops, sums):  # type: ignore[no-untyped-def]
    for thread in prange(sums.shape[0]):
        x = 1.0 + thread
        for _ in range(loops):
            x = x * 0.999999 + 1e-6
        sums[thread] = x


def second_thread(repeats: int) -> float:
    """What the machine itself gains from a second thread: two loops at once against one after the other."""
    sums, loops = np.zeros(2), 20_000_000

    def seconds(threads: int) -> float:
        numba.set_num_threads(threads)
        start = time.perf_counter()
        arithmetic(loops, sums)
        return time.perf_counter() - start

    seconds(2)
    return statistics.median(seconds(1) / seconds(2) for _ in range(repeats))


def kernel_rate(running: int, repeats: int) -> tuple[float, float]:
    """(iterations per second, simulated over real time) with the batch kept at ``running``."""
    rng = np.random.default_rng(0)
    n = 2000 + 20 * running
    workload = Workload.of(np.zeros(n), rng.integers(50, 200, n), rng.integers(100, 500, n))
    engine = EngineConfig.vllm(max_num_seqs=running, max_num_batched_tokens=max(2048, running), num_blocks=200_000)
    backend, rates, ratios = SimBackend(), [], []
    for _ in range(repeats + 1):
        backend.reset(workload, QueueLayout(), engine, EpisodeLimits())
        start = time.perf_counter()
        run_constant(backend, Decision.greedy(1))
        seconds = time.perf_counter() - start
        rates.append(int(backend.scalars[st.I_ITERATIONS]) / seconds)
        ratios.append(float(backend.clocks[st.F_CLOCK]) / seconds)
    return statistics.median(rates[1:]), statistics.median(ratios[1:])


def kernel_figures(repeats: int) -> list[Figure]:
    sizes = (32, 128, 256, 512, 1024)
    measured = {size: kernel_rate(size, repeats) for size in sizes}
    costs = {size: 1e9 / rate for size, (rate, _) in measured.items()}
    slope = (costs[128] - costs[32]) / 96
    fixed = costs[32] - 32 * slope
    reason = f"an iteration takes {costs[128]:.0f} ns: {fixed:.0f} ns whatever runs and {slope:.1f} ns for each running request"
    what = "kernel alone, 128 running: iterations/s on one core"
    found = [Figure(what, f"{measured[128][0]:,.0f}", "-", measured[128][0], 1_500_000, reason=reason)]
    for small, large in ((32, 128), (128, 512), (512, 1024)):
        growth = measured[small][0] / measured[large][0]
        value = f"{1e9 / measured[small][0]:.0f} -> {1e9 / measured[large][0]:.0f} ns"
        what = f"kernel, cost of an iteration from {small} to {large} running, over the growth of the batch"
        found.append(Figure(what, value, f"batch x {large / small:.0f}", growth / (large / small), 1.0, False))
    yardstick = f"BLIS {BLIS_REAL_TIME}, Vidur {VIDUR_REAL_TIME} (published)"
    found.append(Figure("simulated over real time, 256 running", f"{measured[256][1]:,.0f}", yardstick, measured[256][1], 10_000))
    return found


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
        found.append(Figure(what, f"{ours:,.0f}", f"Vidur's event loop: {theirs:,} (another machine)", ours / theirs, 300, reason=reason))
    return found


def ppo_figure() -> Figure:
    """The figure of ``ppo_share`` from a process of its own.

    OpenMP reads its wait policy at the start: threads that spin while they wait make the vector environment
    fast on two cores, and PyTorch's and numba's threads slow each other down where both spin.
    """
    program = "import json; from scripts.benchmark import ppo_share; print(json.dumps(ppo_share()))"
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True).stdout
    share, speed = json.loads(output.splitlines()[-1])
    what = "PPO (stable-baselines3, 256 environments, 64 steps, 4 epochs): share of wall time inside the environment"
    return Figure(what, f"{share:.1%}", f"{speed:,.0f} steps/s end to end", share, 0.2, False)


def ppo_share() -> tuple[float, float]:
    """Share of the environment in the wall time of stable-baselines3's PPO with 256 environments, and its steps per second."""
    import torch
    from stable_baselines3 import PPO

    from agents.sb3_vec import SB3VecEnv

    class Timed(SB3VecEnv):
        seconds = 0.0

        def step_wait(self) -> Any:
            start = time.perf_counter()
            result = super().step_wait()
            self.seconds += time.perf_counter() - start
            return result

    threads = torch.get_num_threads()
    inner = gym.make_vec("LLMSched-v0", num_envs=256, num_requests=2000, rate=7.0, engine={"num_blocks": 2816}, backlog=(0, 200))
    env = Timed(cast("LLMSchedVectorEnv", inner.unwrapped))
    model = PPO("MultiInputPolicy", env, n_steps=64, batch_size=4096, n_epochs=4, device="cpu", seed=0)
    model.learn(256 * 64)  # compiles, and numba's threads start: they change torch's count
    torch.set_num_threads(threads)
    env.seconds, start, steps = 0.0, time.perf_counter(), 256 * 64 * 8
    model.learn(steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    return env.seconds / seconds, steps / seconds


def reset_figure(repeats: int) -> Figure:
    """What drawing and queueing the requests of an episode costs beside stepping it."""
    env = gym.make_vec("LLMSched-v0", num_envs=64, num_requests=4096, rate=6.0, threads=1).unwrapped
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
    return Figure(what, f"{1e3 * seconds / 64:.2f} ms", f"{1e3 * episode / 64:.0f} ms", seconds / episode, 0.05, False)


def start_figures() -> list[Figure]:
    """First make and step in a fresh process, with an empty compilation cache and with a full one."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        for name, bar in (("cold", 20.0), ("warm", 2.0)):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", FIRST_STEP], env=environment, check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            imports, functions, compiling = json.loads(done.stdout)
            compiled = f"numba and LLVM {compiling:.1f} s for {functions} functions, on one core"
            reason = f"imports take {imports:.1f} s, {compiled if functions else 'the rest is loading compiled code'}"
            what = f"first `gym.make` and step in a fresh process, {name} cache"
            found.append(Figure(what, f"{seconds:.1f} s", "-", seconds, bar, False, reason))
    return found


FIRST_STEP = """
import json, time
start = time.perf_counter()
import gymnasium as gym
import llmsched_env
imports = time.perf_counter() - start
from numba.core import event
recorder = event.RecordingListener()
with event.install_listener("numba:compile", recorder):
    env = gym.make("LLMSched-v0")
    env.reset(seed=0)
    env.step(env.action_space.sample())
depth, began, compiling, functions = 0, 0.0, 0.0, 0
for when, what in recorder.buffer:
    began = when if what.is_start and depth == 0 else began
    depth += 1 if what.is_start else -1
    functions += what.is_end
    compiling += when - began if depth == 0 else 0.0
print(json.dumps([imports, functions, compiling]))
"""


def machine() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        model = f"{names[0]}, {len(names)} cores" if names else model
    return f"{model}; Python {platform.python_version()}, numba {numba.__version__}, llmsched_env {llmsched_env.__version__}"


def page(figures: list[Figure], speeds: tuple[float, float]) -> str:
    lines = ["# Performance", "", "Generated by `python scripts/benchmark.py`: medians of repeated measurements in one run, each beside"]
    lines += [f"its yardstick. Machine: {machine()}.", "", "| what | ours | yardstick | ratio | bar | verdict |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | --- |"]
    for f in figures:
        sign = ">=" if f.higher_is_better else "<="
        verdict = "holds" if f.holds else "**missed**"
        ratio = f"{f.ratio:,.0f}" if f.ratio >= 1000 else f"{f.ratio:.2f}"
        lines.append(f"| {f.what} | {f.value} | {f.yardstick} | {ratio} | {sign} {f.bar:,g} | {verdict} |")
    before, after = speeds
    lines += ["", f"How steady the machine was: `CartPole-v1` ran {before:,.0f} steps/s at the start of this run, {after:,.0f} at its end."]
    missed = [f for f in figures if not f.holds]
    if missed:
        lines += ["", "## Bars missed in this run", "", "| what | by how much | where the time goes |", "| --- | ---: | --- |"]
        for f in missed:
            lines.append(f"| {f.what} | {abs(f.ratio / f.bar - 1):.0%} | {f.reason or '-'} |")
    return "\n".join([*lines, ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--out", type=Path, help="write the page here")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats}: must be >= 1")
    before = cartpole_speed(args.repeats)
    figures = [
        scalar_figure(args.repeats),
        *vector_figures(args.repeats),
        reset_figure(args.repeats),
        *kernel_figures(args.repeats),
        *trace_figures(args.repeats),
        ppo_figure(),
        *start_figures(),
    ]
    text = page(figures, (before, cartpole_speed(args.repeats)))
    for path in (args.json, args.out):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.json:
        record = {"machine": machine(), "figures": [{**asdict(f), "holds": f.holds} for f in figures]}
        args.json.write_text(json.dumps(record, indent=1), encoding="utf-8")
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
