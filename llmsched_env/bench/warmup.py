"""What is compiled for a machine, done ahead: one short run of everything that ships, in parts with a name and their seconds."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np

from llmsched_agents.checkpoint import shipped_agents
from llmsched_agents.lookup import LEARNERS, named_policies
from llmsched_baselines import SHIPPED
from llmsched_baselines.routers import router_names
from llmsched_env import compiled
from llmsched_env.bench.cluster import run_router
from llmsched_env.bench.cluster_course import record_course
from llmsched_env.bench.comparison import Comparison, Task, extrapolation_reported, finished_rows, record
from llmsched_env.cluster.scenarios import load_cluster_scenario
from llmsched_env.engine_config import EngineConfig
from llmsched_env.environments import CLUSTER_ID, ENVIRONMENTS
from llmsched_env.errors import ConfigError
from llmsched_env.perf import calibration_names, load_calibration
from llmsched_env.perf.base import IterationTimeModel
from llmsched_env.spec import ACTION_SETS, DEFAULT_SCENARIO
from llmsched_env.workload import load_scenario

PAPER_SCENARIO = "two-type"
"""A scenario of the ``paper`` preset; the default one is of ``vllm``."""
REQUESTS = 20
REWARDS = ("latency", "throughput", "slo_goodput")


@dataclass(frozen=True, slots=True)
class Part:
    """Something that is used and so compiled: ``run`` does it once on ``REQUESTS`` requests."""

    name: str
    run: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Warmed:
    """A part that was run.

    Attributes:
        seconds: wall time, of which next to nothing where all was there.
        compiled: functions that were compiled and kept for it.
    """

    name: str
    seconds: float
    compiled: int


def environments() -> list[str]:
    """Ids of the environments that run on the simulator, in their newest versions: the former ones compile nothing else."""
    return sorted(environment.id for environment in ENVIRONMENTS if environment.simulated)


def parts() -> list[Part]:
    """All of it: environments, action sets and rewards, one by one and many at once; policies on both presets; agents; calibrations."""
    found = [Part(f"{name}", partial(_environment, name)) for name in environments()]
    for scenario in (DEFAULT_SCENARIO, PAPER_SCENARIO):
        preset = load_scenario(scenario).engine.preset
        found += [Part(f"actions {actions}, preset {preset}", partial(_actions, actions, scenario)) for actions in ACTION_SETS]
    found.append(Part("rewards", _rewards))
    found.append(Part("prefix cache", partial(_environment, "LLMSched-v1", backend="sim-prefix-cache")))
    for scenario in (DEFAULT_SCENARIO, PAPER_SCENARIO):
        preset = load_scenario(scenario).engine.preset
        found += [Part(f"policy {cls.name}, preset {preset}", partial(_policy, cls.name, scenario)) for cls in SHIPPED]
    agents = [*(cls.name for cls in LEARNERS), *shipped_agents()]
    found += [Part(f"agent {name}", partial(_policy, name, DEFAULT_SCENARIO)) for name in agents]
    found += [Part(f"calibration {name}", partial(_calibration, name)) for name in calibration_names()]
    found += [Part(CLUSTER_ID, partial(_cluster)), Part(f"{CLUSTER_ID}, levels", partial(_cluster, levels=(0.9, math.inf)))]
    found += [Part(f"router {name}", partial(_router, name)) for name in router_names()]
    return found


def warm(chosen: list[Part]) -> Iterator[Warmed]:
    """Run parts in order, each result as it is there."""
    before = _kept()
    for part in chosen:
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nobody reads what so short a run warns of
            part.run()
        now = _kept()
        yield Warmed(part.name, time.perf_counter() - start, len(now - before))
        before = now


def _kept() -> set[str]:
    """Names of the files of compiled functions."""
    try:
        return {path.name for path in compiled.CACHE_FOLDER.glob("*.nbc")}
    except OSError:
        return set()


def _walk(env: Any) -> None:
    """A reset and some steps; with several environments an episode ends in them and the next begins."""
    env.reset(seed=0)
    for _ in range(3):
        ended = np.logical_or(*env.step(env.action_space.sample())[2:4])
        if ended.ndim == 0 and ended:
            break
    env.close()


def _environment(name: str, **settings: Any) -> None:
    """An environment alone and its vector form."""
    _walk(gym.make(name, num_requests=REQUESTS, disable_env_checker=True, **settings))
    _walk(gym.make_vec(name, num_envs=2, num_requests=1, **settings))


def _actions(actions: str, scenario: str) -> None:
    _environment("LLMSched-v1", scenario=scenario, action_set=actions)


def _rewards() -> None:
    for reward in REWARDS:
        _environment("LLMSched-v1", reward=reward)


def _policy(name: str, scenario: str) -> None:
    """An episode in one compiled call and one iteration by iteration; nothing where the policy is not of this preset."""
    own = load_scenario(scenario)
    comparison = Comparison(own, named_policies("policies", [name]), (0.5 * own.rate,), (0,), REQUESTS)
    task = Task(name, comparison.rates[0], 0)
    try:
        comparison.policy(name, task.rate)
    except ConfigError:  # of the other preset
        return
    finished_rows(comparison, [task])
    record(comparison, task)


def _cluster(**settings: Any) -> None:
    """The routing environment alone and its vector form."""
    _walk(gym.make(CLUSTER_ID, num_calls=REQUESTS, disable_env_checker=True, **settings))
    _walk(gym.make_vec(CLUSTER_ID, num_envs=2, num_calls=1, **settings))


def _router(name: str) -> None:
    """An episode in one compiled call and one call by call."""
    run_router(load_cluster_scenario("failing"), name, {}, 0, num_calls=REQUESTS)
    record_course("failing", name, {}, 0, num_calls=REQUESTS)


def _calibration(name: str) -> None:
    """The time model of a calibration under greedy admission."""
    model: IterationTimeModel = load_calibration(name)
    base = load_scenario(DEFAULT_SCENARIO)
    engine: EngineConfig = base.engine.replace(time_model=model)
    comparison = Comparison(replace(base, engine=engine), named_policies("policies", ["vllm"]), (base.rate,), (0,), REQUESTS)
    with extrapolation_reported():
        finished_rows(comparison, comparison.tasks())
