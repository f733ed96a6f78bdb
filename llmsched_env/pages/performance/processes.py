"""Figures that need a process of their own: training with PyTorch, and the first step after a start."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from typing import Any, cast

import gymnasium as gym

from llmsched_env.pages.performance.environments import ADMIT
from llmsched_env.pages.performance.figure import Figure, same_imports
from llmsched_env.vector import LLMSchedVectorEnv


def ppo_figure() -> Figure:
    """The figure of ``ppo_share`` from a process of its own.

    OpenMP reads its wait policy at the start: PyTorch's threads that spin while they wait slow the environment's down.
    """
    program = "import json; from llmsched_env.pages.performance.processes import ppo_share; print(json.dumps(ppo_share()))"
    environment = same_imports(OMP_WAIT_POLICY="passive")
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

    inner = gym.make_vec("LLMSched-v1", **ADMIT, num_envs=256, num_requests=2000, rate=7.0, engine={"num_blocks": 2816}, backlog=(0, 200))
    env = Timed(cast("LLMSchedVectorEnv", inner.unwrapped))
    model = PPO("MultiInputPolicy", env, n_steps=64, batch_size=4096, n_epochs=4, device="cpu", seed=0)
    model.learn(256 * 64)  # compiles
    env.seconds, start, steps = 0.0, time.perf_counter(), 256 * 64 * 8
    model.learn(steps, reset_num_timesteps=False)
    seconds = time.perf_counter() - start
    return env.seconds / seconds, steps / seconds


def start_figures() -> list[Figure]:
    """First make and step in a fresh process, with an empty compilation cache and with a full one."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environment = same_imports(NUMBA_CACHE_DIR=folder)
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
    env = gym.make("LLMSched-v1")
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
