"""A small search for PPO's hyper-parameters in each named environment, and what the chosen ones reach on seeds that it never saw.

The search has two rounds for each environment. All ``CANDIDATES`` are trained for a short time; the best ``FINALISTS`` of them are
trained anew for the whole time, and the best of these is chosen. Everyone is trained once with each of ``SEARCH_SEEDS`` and judged by
the mean return of the likeliest actions over the episodes from ``TUNING_SEED`` on. The chosen one is then trained again
with other training seeds, so that nothing of what made it win is counted, and played on the episodes from ``FIRST_SEED`` on. Beside it
stand admitting everything and the best constant action; which one that is, the tuning episodes say, too.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from llmsched_agents.lookup import named_policy
from llmsched_agents.zoo import ZooEntry
from llmsched_baselines import Setting
from llmsched_env.bench.headroom import FIRST_SEED, GREEDY, described, every_action, mean_latency, returns
from llmsched_env.bench.plain_ppo import PLAIN
from llmsched_env.environments import ENVIRONMENTS, NamedEnvironment
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import Interval, mean_interval
from llmsched_env.runner import run_episode
from llmsched_env.spec import EnvSpec
from llmsched_env.vector import LLMSchedVectorEnv

TUNING_SEED = 20_000
"""Tuning episodes have seeds from here on."""
TUNING_EPISODES = 64
SHORT_STEPS, STEPS = 16_384, 61_440
"""Decisions of a training in the first round, and in the second and at the end."""
FINALISTS = 2
SEARCH_SEEDS = (0, 1)
"""Training seeds of the search."""
LAST_SEED = 100
"""The trainings that the table shows have seeds from here on."""
FEW = 16
"""Constant actions that are played on all tuning episodes."""
OPERATED = ("LLMSched-v1", "LLMSchedBursty-v1")
"""Environments that are learned with ``action_set="operate"`` as well."""

_PLAIN: dict[str, Any] = {
    **PLAIN,
    "n_epochs": 10,
    "learning_rate": 3.0e-4,
    "ent_coef": 0.0,
    "policy_kwargs": {"net_arch": [64, 64]},
}
_ENTROPY: dict[str, Any] = {**_PLAIN, "ent_coef": 0.03}
CANDIDATES: dict[str, dict[str, Any]] = {
    "plain": _PLAIN,
    "lambda": {**_PLAIN, "gae_lambda": 0.95},
    "entropy": _ENTROPY,
    "discounted": {**_ENTROPY, "gamma": 0.98},
    "wide": {**_ENTROPY, "n_envs": 64, "n_steps": 64, "batch_size": 1024, "learning_rate": "lin_1.0e-3"},
    "large": {**_ENTROPY, "policy_kwargs": {"net_arch": [128, 128]}},
    "observations": {**_ENTROPY, "normalize": {"norm_obs": True, "norm_reward": True}},
}
"""What is tried everywhere: ``plain`` is the PPO of ``docs/environments.md``, ``lambda`` and ``entropy`` differ from it in what their names
say, and the others so from ``entropy``; ``wide`` has more environments, shorter roll-outs and a faster learning rate that falls to 0."""

SHORT, LONG, LAST = "short", "long", "last"
"""Rounds of a training: the first and the second of the search, and the training that the table shows."""
EVERYTHING, CONSTANT = "everything", "constant"
"""Rounds of what stands beside it."""


@dataclass(frozen=True, slots=True)
class ZooTask:
    """An environment and an action set.

    Attributes:
        environment: as it is registered.
        action_set: empty for the environment's own.
    """

    environment: NamedEnvironment
    action_set: str = ""

    @property
    def name(self) -> str:
        """How tables and options call it: ``ID`` or ``ID:ACTION_SET``."""
        return f"{self.environment.id}:{self.action_set}" if self.action_set else self.environment.id

    @property
    def env_kwargs(self) -> dict[str, Any]:
        return {"action_set": self.action_set} if self.action_set else {}

    def entry(self, candidate: str, steps: int) -> ZooEntry:
        """A candidate as an entry of the zoo's file."""
        values = dict(CANDIDATES[candidate])
        count, normalize = values.pop("n_envs"), values.pop("normalize")
        return ZooEntry(self.environment.id, count, steps, normalize, self.env_kwargs, values)


TASKS = tuple(
    ZooTask(environment, action_set)
    for environment in ENVIRONMENTS
    if environment.simulated
    for action_set in ("", "operate")
    if not action_set or environment.id in OPERATED
)


@dataclass(frozen=True, slots=True)
class ZooRow:
    """One training, or one yardstick, and what it came to.

    Attributes:
        task: name of the ``ZooTask``.
        round: ``short``, ``long``, ``last``, ``everything`` or ``constant``.
        who: name of the candidate, of the policy, or the action in words.
        seed: of the training; -1 where nothing was trained.
        steps: decisions trained on.
        seconds, processor_seconds: of the training, by the wall clock and of all threads of the process; evaluation left out.
        returns: of the episodes played, separated by blanks.
    """

    task: str
    round: str
    who: str
    seed: int
    steps: int
    seconds: float
    processor_seconds: float
    returns: str

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """(episodes,) returns."""
        return np.array([float(word) for word in self.returns.split()])

    @property
    def score(self) -> float:
        """The mean return."""
        return float(self.values.mean())


def tasks_named(names: Sequence[str]) -> list[ZooTask]:
    """The tasks of these names, all for none.

    Raises:
        ConfigError: an unknown name.
    """
    known = {task.name: task for task in TASKS}
    for name in names:
        if name not in known:
            raise ConfigError(f"environments: {name!r}, must be among {', '.join(known)}")
    return [known[name] for name in names] or list(TASKS)


@dataclass(frozen=True, slots=True)
class ZooPlan:
    """How much is done.

    Attributes:
        short_steps, steps: decisions of a training in the first round, and afterwards.
        episodes: of the table.
        trainings: how many times the chosen entry is trained at the end.
        candidates: names of those that are tried; empty for all.
        finalists: how many go on to the second round; with 1 there is none.
    """

    short_steps: int = SHORT_STEPS
    steps: int = STEPS
    episodes: int = 20
    trainings: int = 2
    candidates: tuple[str, ...] = ()
    finalists: int = FINALISTS

    def rows(self, task: ZooTask, kept: Sequence[ZooRow], shipped: ZooEntry | None = None) -> Iterator[ZooRow]:
        """What is missing of a task, each row as it is finished.

        Args:
            kept: rows that an earlier run finished.
            shipped: train this entry; nothing is searched.
        """
        done = {(row.round, row.who, row.seed): row for row in kept if row.task == task.name}
        if not any(round == EVERYTHING for round, _, _ in done):
            yield everything(task, self.episodes)
        if not any(round == CONSTANT for round, _, _ in done):
            yield best_constant(task, self.episodes)
        if shipped is None:
            candidates = list(self.candidates or CANDIDATES)
            rounds = [(SHORT, self.short_steps)] + ([(LONG, self.steps)] if self.finalists > 1 else [])
            for round, steps in rounds:
                for who, seed in itertools.product(candidates, SEARCH_SEEDS):
                    if (round, who, seed) not in done:
                        done[round, who, seed] = trained(task, task.entry(who, steps), round, who, seed)
                        yield done[round, who, seed]
                scores = round_scores(task.name, round, list(done.values()))
                candidates = sorted(candidates, key=lambda who: scores[who], reverse=True)[: self.finalists]
            who = chosen_candidate(task, list(done.values()))
            entry = task.entry(who, self.steps)
        else:
            who, entry = "shipped", shipped
        for seed in range(LAST_SEED, LAST_SEED + self.trainings):
            if (LAST, who, seed) not in done:
                yield trained(task, entry, LAST, who, seed, self.episodes)


def chosen_candidate(task: ZooTask, rows: Sequence[ZooRow]) -> str:
    """The best of the second round, or of the only one, by its mean return on the tuning episodes."""
    scores = round_scores(task.name, LONG, rows) or round_scores(task.name, SHORT, rows)
    return max(scores, key=lambda who: scores[who])


def round_scores(task: str, round: str, rows: Sequence[ZooRow]) -> dict[str, float]:
    """Mean return on the tuning episodes of each candidate of a round of the search, over its trainings."""
    own = [row for row in rows if row.task == task and row.round == round]
    return {who: float(np.mean([row.score for row in own if row.who == who])) for who in dict.fromkeys(row.who for row in own)}


def trained(task: ZooTask, entry: ZooEntry, round: str, who: str, seed: int, episodes: int = 0) -> ZooRow:
    """Train and play: on the first ``episodes`` of the table, or for 0 on the tuning episodes."""
    wall, processor = time.perf_counter(), time.process_time()
    agent = entry.train(seed)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    played = agent.returns(episodes, FIRST_SEED) if episodes else agent.returns(TUNING_EPISODES, TUNING_SEED)
    return ZooRow(task.name, round, who, seed, agent.steps, wall, processor, joined(played))


def everything(task: ZooTask, episodes: int) -> ZooRow:
    """Admitting everything that fits, on the episodes of the table."""
    spec = EnvSpec.of(**{**task.environment.settings, **task.env_kwargs})
    name = GREEDY[spec.engine.preset]
    setting = Setting(spec.scenario.statistics, spec.rate, spec.engine)
    policy = named_policy(name).build(setting)
    workloads = [spec.workload(np.random.default_rng(FIRST_SEED + i)) for i in range(episodes)]
    played = [-mean_latency(run_episode(policy, workload), setting) for workload in workloads]
    return ZooRow(task.name, EVERYTHING, name, -1, 0, 0.0, 0.0, joined(played))


def best_constant(task: ZooTask, episodes: int) -> ZooRow:
    """The action that is best on the tuning episodes, on those of the table.

    A quarter of the tuning episodes says which ``FEW`` are worth playing on all of them.
    """
    spec = EnvSpec.of(**{**task.environment.settings, **task.env_kwargs})
    few, tuning, shown = (
        cast(LLMSchedVectorEnv, gym.make_vec(task.environment.id, num_envs=count, autoreset_mode="SameStep", **task.env_kwargs))
        for count in (TUNING_EPISODES // 4, TUNING_EPISODES, episodes)
    )
    actions = every_action(shown.single_action_space)
    if len(actions) > FEW:
        actions = sorted(actions, key=lambda action: float(returns(few, action, TUNING_SEED).mean()), reverse=True)[:FEW]
    best = max(actions, key=lambda action: float(returns(tuning, action, TUNING_SEED).mean()))
    row = ZooRow(task.name, CONSTANT, described(spec, best), -1, 0, 0.0, 0.0, joined(returns(shown, best)))
    for envs in (few, tuning, shown):
        envs.close()
    return row


def joined(values: Sequence[float] | npt.NDArray[np.float64]) -> str:
    """Returns as the text of a row, to the last bit."""
    return " ".join(repr(float(value)) for value in values)


@dataclass(frozen=True, slots=True)
class ZooResult:
    """One line of the table.

    Attributes:
        task: the environment and action set.
        who: the chosen candidate, or ``shipped``.
        learned: return over the episodes, each the mean of the trainings.
        trainings: (trainings,) mean return of each training.
        difference: learned minus the best constant action, episode by episode.
        everything, constant: returns of the yardsticks; action: the constant one in words.
        steps: decisions of one training; seconds, processor_seconds: of one, the mean of the trainings.
    """

    task: ZooTask
    who: str
    learned: Interval
    trainings: tuple[float, ...]
    difference: Interval
    everything: Interval
    constant: Interval
    action: str
    steps: int
    seconds: float
    processor_seconds: float


def result(task: ZooTask, rows: Sequence[ZooRow]) -> ZooResult | None:
    """What the rows of a task say; None while some are missing."""
    own = [row for row in rows if row.task == task.name]
    last = [row for row in own if row.round == LAST]
    yardsticks = {row.round: row for row in own if row.round in (EVERYTHING, CONSTANT)}
    if not last or len(yardsticks) < 2:
        return None
    played = np.mean([row.values for row in last], axis=0)
    constant = yardsticks[CONSTANT].values
    return ZooResult(
        task,
        last[0].who,
        mean_interval(played),
        tuple(row.score for row in last),
        mean_interval(played - constant),
        mean_interval(yardsticks[EVERYTHING].values),
        mean_interval(constant),
        yardsticks[CONSTANT].who,
        last[0].steps,
        float(np.mean([row.seconds for row in last])),
        float(np.mean([row.processor_seconds for row in last])),
    )
