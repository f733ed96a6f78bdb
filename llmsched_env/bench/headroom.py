"""What there is to learn in an environment: admitting everything, playing at random, the best constant action, the policies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_agents.lookup import named_policy
from llmsched_baselines import Setting
from llmsched_env.environments import ENVIRONMENTS, NamedEnvironment
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import Interval, mean_interval
from llmsched_env.runner import EpisodeResult, run_episode
from llmsched_env.spec import EnvSpec
from llmsched_env.tenant_metrics import summarize_tenants
from llmsched_env.types import Workload
from llmsched_env.vector import LLMSchedVectorEnv

FIRST_SEED = 10_000
"""Episodes of the table have seeds from here on; nothing is tuned on them."""

GREEDY = {"vllm": "vllm", "paper": "fcfs"}
"""The policy that admits everything that fits, by the engine's preset."""

POLICIES = {
    "vllm": ("sarathi", "wait-cp", "reserve", "expected-work", "late-last", "shortest-prompt", "nested-wait", "generalist"),
    "paper": ("reserve", "expected-work", "late-last", "nested-wait", "generalist"),
}
"""What is tried beside it, hidden lengths."""

TENANT_POLICIES = ("vtc", "wfq", "tenant-priority")
"""What is tried beside these where the scenario has tenants."""

PREDICTED = ("predicted-work", "learned-shrinkage")
"""What is tried besides where output lengths are predicted."""

KNOWING = ("wait", "mc-sf", "oracle-sjf", "pooled-work")
"""Policies that are told output lengths."""

MEASURED = tuple(e for e in ENVIRONMENTS if e.reward_threshold is not None)
"""Environments of the table."""


@dataclass(frozen=True, slots=True)
class Score:
    """How somebody did on the episodes of the table.

    Attributes:
        name: of the policy, or what the actions are.
        latency: mean latency in seconds, mean over the episodes; with tenants the mean of theirs by weight.
        evictions: an episode, on average; NaN where it was not counted.
    """

    name: str
    latency: Interval
    evictions: float = float("nan")


@dataclass(frozen=True, slots=True)
class Headroom:
    """One environment.

    Attributes:
        id, threshold: of the environment; the threshold is a return.
        greedy: admits everything that fits.
        random: actions drawn from the space.
        constant: the best action of the space, always.
        policies: that are not told lengths, best first; knowing: that are.
        learned: a plain PPO, where one was trained.
        steps, seconds: decisions it was trained on, and the processor seconds that took.
    """

    id: str
    threshold: float
    greedy: Score
    random: Score
    constant: Score
    policies: tuple[Score, ...]
    knowing: tuple[Score, ...]
    learned: Score | None = None
    steps: int = 0
    seconds: float = 0.0

    @property
    def best(self) -> Score:
        """The best that does not know lengths, the best constant action among them."""
        return min((*self.policies, self.constant), key=lambda score: score.latency.mean)

    @property
    def gap(self) -> float:
        """Share of greedy admission's mean latency that the best policy saves."""
        return 1.0 - self.best.latency.mean / self.greedy.latency.mean

    @property
    def suggested_threshold(self) -> float:
        """Nine tenths of the way from admitting everything to the best constant action."""
        return -(0.1 * self.greedy.latency.mean + 0.9 * self.constant.latency.mean)


def chosen(ids: Sequence[str]) -> list[NamedEnvironment]:
    """The environments of these ids, all of the table for none.

    Raises:
        ConfigError: an id that is not in the table.
    """
    known = {environment.id: environment for environment in MEASURED}
    for name in ids:
        if name not in known:
            raise ConfigError(f"environments: {name!r}, must be among {', '.join(known)}")
    return [known[name] for name in ids] or list(MEASURED)


def headroom(environment: NamedEnvironment, episodes: int) -> Headroom:
    """Measure one environment on ``episodes`` episodes, the same for everybody.

    Raises:
        ConfigError: no reward threshold is stated.
    """
    if environment.reward_threshold is None:
        raise ConfigError(f"environments: {environment.id!r} states no reward threshold")
    spec = EnvSpec.of(**environment.settings)
    workloads = [spec.workload(np.random.default_rng(FIRST_SEED + i)) for i in range(episodes)]
    setting = Setting(spec.scenario.statistics, spec.rate, spec.engine)
    preset = spec.engine.preset

    def tried(names: Sequence[str]) -> Iterator[Score]:
        for name in names:
            try:
                yield scored(name, setting, workloads)
            except ConfigError:  # not for this engine or these lengths
                continue

    greedy = scored(GREEDY[preset], setting, workloads)
    envs = cast(LLMSchedVectorEnv, gym.make_vec(environment.id, num_envs=episodes, autoreset_mode="SameStep"))
    space = envs.single_action_space
    envs.action_space.seed(0)
    random = Score("random actions", mean_interval(-returns(envs, None)))
    constants = [Score(described(spec, action), mean_interval(-returns(envs, action))) for action in every_action(space)]
    envs.close()
    names = [*POLICIES[preset]]
    names += TENANT_POLICIES if spec.scenario.tenants is not None else ()
    names += PREDICTED if spec.layout.by == "predicted" else ()
    by_latency = sorted(tried(names), key=lambda score: score.latency.mean)
    knowing = sorted(tried(KNOWING), key=lambda score: score.latency.mean)
    best = min(constants, key=lambda score: score.latency.mean)
    return Headroom(environment.id, environment.reward_threshold, greedy, random, best, tuple(by_latency), tuple(knowing))


def scored(name: str, setting: Setting, workloads: Sequence[Workload]) -> Score:
    """A policy on the episodes.

    Raises:
        ConfigError: the policy refuses the setting.
    """
    policy = named_policy(name).build(setting)
    results = [run_episode(policy, workload) for workload in workloads]
    seconds = [mean_latency(result, setting) for result in results]
    return Score(name, mean_interval(seconds), float(np.mean([result.summary.evictions for result in results])))


def mean_latency(result: EpisodeResult, setting: Setting) -> float:
    """What the reward of the environment is minus the sum of: the mean latency, of tenants the mean of theirs by weight; seconds."""
    tenants = setting.statistics.tenants
    return summarize_tenants(result.log, tenants).fair_latency if tenants else result.summary.latency_mean


def returns(envs: LLMSchedVectorEnv, action: npt.NDArray[np.int64] | None, first_seed: int = FIRST_SEED) -> npt.NDArray[np.float64]:
    """(num_envs,) returns of the first episodes, with seeds from ``first_seed`` on, under one action, or random ones."""
    count = envs.num_envs
    envs.reset(seed=first_seed)
    total, over = np.zeros(count), np.zeros(count, dtype=np.bool_)
    constant = None if action is None else np.broadcast_to(action, (count, action.size)).reshape(envs.action_space.shape)
    while not over.all():
        _, rewards, terminated, truncated, _ = envs.step(envs.action_space.sample() if constant is None else constant)
        total += np.where(over, 0.0, rewards)
        over |= terminated | truncated
    return total


def every_action(space: gym.Space[Any]) -> list[npt.NDArray[np.int64]]:
    """All actions of a small space, (W,) each."""
    sizes = [int(space.n)] if isinstance(space, gym.spaces.Discrete) else cast(gym.spaces.MultiDiscrete, space).nvec.tolist()
    return [np.array(action) for action in itertools.product(*(range(size) for size in sizes))]


def described(spec: EnvSpec, action: npt.NDArray[np.int64]) -> str:
    """An action of levels in words."""
    codec: Any = spec.codec
    words = f"level {codec.levels[action[0]]:g}"
    orders, ageing = getattr(codec, "orders", ()), getattr(codec, "ageing", ())
    if orders:
        words += f", by {orders[action[1]]}"
    if ageing:
        words += ", least work first" if ageing[action[1]] == math.inf else f", ageing {ageing[action[1]]:g} s"
    if codec.token_budgets:
        budget = codec.token_budgets[action[-1]]
        words += f", {budget} tokens" if budget else ", the engine's token budget"
    return words
