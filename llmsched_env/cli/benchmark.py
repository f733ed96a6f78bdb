"""Speed of the simulator, each figure beside its yardstick in the same run.

    python scripts/benchmark.py --json out.json [--out docs/performance.md]

A figure is the median of repeated measurements; batch sizes stand beside it. No test asserts any of them.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numba
import numpy as np

import llmsched_env
from llmsched_baselines import Setting, make_policy
from llmsched_env import EngineConfig, EpisodeLimits, QueueLayout, Workload
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine.state import Engine
from llmsched_env.fluid import stability_boundary
from llmsched_env.perf import load_calibration
from llmsched_env.records import Numbers
from llmsched_env.runner import run_episode
from llmsched_env.threads import Workers, available_threads
from llmsched_env.types import Decision
from llmsched_env.vector import LLMSchedVectorEnv
from llmsched_env.workload import load_scenario

# Simulated over real time, published: BLIS (inference-sim) and Vidur (arXiv 2405.05465).
BLIS_REAL_TIME, VIDUR_REAL_TIME = 212, 141
# Requests a second of Vidur's own event loop, sarathi scheduler, Azure conversation lengths at 5 and 7 requests/s:
# microsoft/vidur @ 7d47513, measured on another machine of two cores (start-up of 8 to 10 s a process not counted).
VIDUR_REQUESTS = {5.0: 698, 7.0: 1059}
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Figure:
    """One line of the table.

    Attributes:
        ours, yardstick: with their units.
        ratio: ours over the yardstick; None where there is none.
        bar: what ``ratio``, or ``rate`` where there is one, is held against.
        rate: the figure that the bar is about, where it is not the ratio.
        reason: where the time goes.
    """

    what: str
    ours: str
    yardstick: str = "-"
    ratio: float | None = None
    bar: float = 1.0
    rate: float | None = None
    higher_is_better: bool = True
    reason: str = ""

    @property
    def holds(self) -> bool:
        measured = self.rate if self.rate is not None else self.ratio
        assert measured is not None
        return measured >= self.bar if self.higher_is_better else measured <= self.bar


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
    return Figure(what, f"{a:,.0f}", f"`CartPole-v1`: {b:,.0f}", a / b, 1.4, reason=reason)


def cartpole_speed(repeats: int) -> float:
    env = gym.make("CartPole-v1")
    env.reset(seed=0)
    return median(lambda: scalar_steps(env, 1, 20_000), repeats)


def vector_figures(repeats: int) -> list[Figure]:
    num, found, rates, best = 256, [], {}, 0.0
    for threads in (1, 2):
        if threads > available_threads():
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
            fleet = env.unwrapped.fleet  # type: ignore[attr-defined]
            running = float(np.mean([record.num_residents for record in fleet.records]))
            megabytes = env.unwrapped.nbytes / num / 1e6  # type: ignore[attr-defined]
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
    engine = EngineConfig.vllm(max_num_seqs=running, max_num_batched_tokens=max(2048, running), num_blocks=200_000)
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


def replica_day(seed: int, share: float) -> tuple[int, int, float]:
    """(requests, iterations, CPU seconds) of one replica under ``vllm`` for a share of a day at 0.8 of the boundary."""
    scenario = load_scenario("azure-conv")
    rate = 0.8 * stability_boundary(scenario.statistics, scenario.engine)
    count = round(rate * 86_400 * share)
    start = time.process_time()
    policy = make_policy("vllm", Setting(scenario.statistics, rate, scenario.engine))
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


def ppo_figure() -> Figure:
    """The figure of ``ppo_share`` from a process of its own.

    OpenMP reads its wait policy at the start: PyTorch's threads that spin while they wait slow the environment's down.
    """
    program = "import json; from llmsched_env.cli.benchmark import ppo_share; print(json.dumps(ppo_share()))"
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    output = subprocess.run([sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True).stdout
    share, speed = json.loads(output.splitlines()[-1])
    what = "PPO (stable-baselines3, 256 environments, 64 steps, 4 epochs): share of wall time inside the environment"
    return Figure(what, f"{share:.1%}", f"end to end: {speed:,.0f} steps/s", share, 0.2, higher_is_better=False)


def ppo_share() -> tuple[float, float]:
    """Share of the environment in the wall time of stable-baselines3's PPO with 256 environments, and its steps per second."""
    from stable_baselines3 import PPO

    from llmsched_agents.sb3_vec import SB3VecEnv

    class Timed(SB3VecEnv):
        seconds = 0.0

        def step_wait(self) -> Any:
            start = time.perf_counter()
            result = super().step_wait()
            self.seconds += time.perf_counter() - start
            return result

    inner = gym.make_vec("LLMSched-v0", num_envs=256, num_requests=2000, rate=7.0, engine={"num_blocks": 2816}, backlog=(0, 200))
    env = Timed(cast("LLMSchedVectorEnv", inner.unwrapped))
    model = PPO("MultiInputPolicy", env, n_steps=64, batch_size=4096, n_epochs=4, device="cpu", seed=0)
    model.learn(256 * 64)  # compiles
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
    return Figure(what, f"{1e3 * seconds / 64:.2f} ms", f"{1e3 * episode / 64:.1f} ms", seconds / episode, 0.05, higher_is_better=False)


def start_figures() -> list[Figure]:
    """First make and step in a fresh process, with an empty compilation cache and with a full one."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder, "PYTHONPATH": str(ROOT)}
        for name, bar in (("cold", 6.0), ("warm", 2.0)):
            start = time.perf_counter()
            done = subprocess.run([sys.executable, "-c", FIRST_STEP], env=environment, check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - start
            imports, functions, compiling = json.loads(done.stdout)
            compiled = f"numba and LLVM {compiling:.1f} s for {functions} functions, on one core"
            reason = f"imports take {imports:.1f} s, {compiled if functions else 'the rest is loading compiled code'}"
            what = f"first `gym.make` and step in a fresh process, {name} cache"
            found.append(Figure(what, f"{seconds:.1f} s", bar=bar, rate=seconds, higher_is_better=False, reason=reason))
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
        ratio = "-" if f.ratio is None else f"{f.ratio:,.0f}" if f.ratio >= 1000 else f"{f.ratio:.2f}"
        on = "" if f.rate is not None else "ratio "
        lines.append(f"| {f.what} | {f.ours} | {f.yardstick} | {ratio} | {on}{sign} {f.bar:,g} | {verdict} |")
    before, after = speeds
    lines += ["", f"How steady the machine was: `CartPole-v1` ran {before:,.0f} steps/s at the start of this run, {after:,.0f} at its end."]
    missed = [f for f in figures if not f.holds]
    if missed:
        lines += ["", "## Bars missed in this run", "", "| what | by how much | where the time goes |", "| --- | ---: | --- |"]
        for f in missed:
            measured = f.rate if f.rate is not None else f.ratio
            assert measured is not None
            lines.append(f"| {f.what} | {abs(measured / f.bar - 1):.0%} | {f.reason or '-'} |")
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
        fleet_figure(),
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
