"""Learning from paired roll-outs: in a simulator every action can be tried from the same state under the same future.

The return of one decision among thousands drowns in the randomness of arrivals and lengths, which is
the same for every action. So at states that the policy itself visits, each action is carried on for
a while, arrivals then stop, the rest is worked off, and the costs are compared (``AgentVecEnv.branch``).
The network learns the cost of each action relative to the one it would have taken; the least is its
choice. Rounds repeat this on the states of the improved policy, all data kept: aggregation as in
AggreVaTe (arXiv 1406.5979), with the simulator's roll-outs in place of an expert's.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from torch.nn import functional as F

from llmsched_agents.network import Network, network_of
from llmsched_agents.policy import AgentPolicy
from llmsched_agents.training_env import AgentVecEnv
from llmsched_env.errors import ConfigError

Choice = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.int64]]
"""(N,) actions for (N, D) observations."""


@dataclass(frozen=True, slots=True)
class RolloutPlan:
    """How much is tried.

    Attributes:
        rounds: of collecting and fitting.
        states: of each environment in a round.
        spacing: decisions between two of them.
        deviate_seconds, horizon_seconds: see ``AgentVecEnv.branch``; over each environment's ``time_scale``.
        short_rounds: of the rounds, the last ones that deviate for ``short_seconds`` alone and then follow the policy.
        short_seconds: the same unit.
        explore: share of environments that act at random for a stretch between two states.
        epochs, batch_size, learning_rate: of the fits.
        sharpness: logit units of a relative cost of one; a choice that costs 1 % more is exp(-sharpness / 100) as likely.
        caution: what a choice other than the first must gain, as a share of the cost: predictions have errors, more so
            where training has not been, and the best of many is the most overestimated.
        held_out: share of the environments whose states are not learned from.
    """

    rounds: int = 3
    states: int = 16
    spacing: int = 15
    deviate_seconds: float = 100.0
    horizon_seconds: float = 100.0
    short_rounds: int = 0
    short_seconds: float = 10.0
    explore: float = 0.3
    epochs: int = 40
    batch_size: int = 512
    learning_rate: float = 1e-3
    sharpness: float = 100.0
    caution: float = 0.0
    held_out: float = 0.125

    def __post_init__(self) -> None:
        for name in ("rounds", "states", "spacing", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollouts.{name}: {getattr(self, name)}, must be >= 1")
        for name in ("deviate_seconds", "horizon_seconds", "short_seconds", "learning_rate", "sharpness"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"rollouts.{name}: {getattr(self, name)}, must be > 0")
        if not 0 <= self.caution < 1:
            raise ConfigError(f"rollouts.caution: {self.caution}, must be in [0, 1)")
        if not 0 <= self.short_rounds < self.rounds:
            raise ConfigError(f"rollouts.short_rounds: {self.short_rounds}, must be from 0 to rounds - 1 = {self.rounds - 1}")


@dataclass(slots=True)
class RolloutData:
    """States and what each action costs there.

    Attributes:
        observations: (n, D) float32.
        costs: (n, A) float64, relative to ``chosen``: (cost - cost of the chosen action) / its absolute value.
        chosen: (n,) int64.
        environment: (n,) int64.
    """

    observations: npt.NDArray[np.float32]
    costs: npt.NDArray[np.float64]
    chosen: npt.NDArray[np.int64]
    environment: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.observations.shape[0])

    def joined(self, other: RolloutData) -> RolloutData:
        return RolloutData(
            np.concatenate([self.observations, other.observations]),
            np.concatenate([self.costs, other.costs]),
            np.concatenate([self.chosen, other.chosen]),
            np.concatenate([self.environment, other.environment]),
        )


def collect_states(env: AgentVecEnv, choose: Choice, plan: RolloutPlan, short: bool, rng: np.random.Generator) -> RolloutData:
    """``plan.states`` states of every environment on the policy's way, and the cost of each action there."""
    observed: Any = env.reset()
    actions = env.components[0]
    seen: list[RolloutData] = []
    deviate = plan.short_seconds if short else plan.deviate_seconds
    for _ in range(plan.states):
        wandering = rng.random(env.num_envs) < plan.explore
        level = rng.integers(0, actions, env.num_envs)
        for _ in range(int(rng.integers(1, 2 * plan.spacing))):
            observed, _, _, _ = env.step(np.where(wandering, level, choose(observed)))
        chosen = choose(observed)
        costs = env.branch(chosen, deviate, plan.horizon_seconds)
        base = np.take_along_axis(costs, chosen[:, None], axis=1)
        # Where nothing is in the system and nothing comes, there is no cost to compare. A gain is a cost below 0.
        valid = base[:, 0] != 0
        relative = (costs[valid] - base[valid]) / np.abs(base[valid])
        seen.append(RolloutData(observed[valid, : env.public].copy(), relative, chosen[valid], np.flatnonzero(valid)))
    data = seen[0]
    for more in seen[1:]:
        data = data.joined(more)
    return data


def fit_costs(
    policy: AgentPolicy, data: RolloutData, plan: RolloutPlan, bonus: npt.NDArray[np.float32], rng: np.random.Generator
) -> dict[str, float]:
    """The policy's logits become -sharpness * relative cost. Returns figures on the environments held out.

    The loss is linear from 1 % off on: an action that costs half as much again need not be known exactly.
    """
    outside = np.flatnonzero(rng.permutation(int(data.environment.max()) + 1) < plan.held_out * (data.environment.max() + 1))
    test = np.isin(data.environment, outside)
    size = int(policy.features_dim)
    padded = np.zeros((len(data), size), dtype=np.float32)
    padded[:, : data.observations.shape[1]] = data.observations
    x = th.as_tensor(padded)
    target = th.as_tensor(-plan.sharpness * np.clip(data.costs, -0.5, 0.5), dtype=th.float32)
    train = th.as_tensor(np.flatnonzero(~test))
    parameters = [*policy.mlp_extractor.policy_net.parameters(), *policy.action_net.parameters()]
    optimizer = th.optim.Adam(parameters, lr=plan.learning_rate)
    steps = plan.epochs * -(-int(train.shape[0]) // plan.batch_size)
    schedule = th.optim.lr_scheduler.OneCycleLR(optimizer, plan.learning_rate, total_steps=max(steps, 2))
    generator = th.Generator().manual_seed(int(rng.integers(2**31)))
    for _ in range(plan.epochs):
        order = train[th.randperm(train.shape[0], generator=generator)]
        for rows in order.split(plan.batch_size):
            loss = F.smooth_l1_loss(policy.logits(x[rows]), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    figures = {"states": float(len(data)), "loss": float(loss.detach())}
    if test.any():
        with th.no_grad():
            choice = (policy.logits(x[th.as_tensor(test)]) + th.as_tensor(bonus)).argmax(dim=1).numpy()
        costs = data.costs[test]
        figures["chosen_percent"] = 100 * float(np.take_along_axis(costs, choice[:, None], axis=1).mean())
        figures["best_fixed_percent"] = 100 * float(costs.mean(axis=0).min())
        figures["best_percent"] = 100 * float(costs.min(axis=1).mean())
    return figures


class PairedRollouts:
    """A training by roll-outs; what it needs to go on is kept in a folder after every round.

    Args:
        env: the action set must have one component.
        policy: its actor is trained, its critic is not used.
        first: the action that the first round follows everywhere.
        folder: of the rounds' states (``round-K.npz``).

    Raises:
        ConfigError: an action of several components.
    """

    def __init__(self, env: AgentVecEnv, policy: AgentPolicy, plan: RolloutPlan, *, first: int, folder: Path, seed: int = 0) -> None:
        if len(env.components) != 1:
            raise ConfigError(f"rollouts: action set {env.recipe.action_set!r} has {len(env.components)} components, must have one")
        self.env, self.policy, self.plan = env, policy, plan
        self.first, self.folder, self.seed = first, folder, seed
        self.data: RolloutData | None = None
        self.done = 0

    def choose(self, observed: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        """The policy's likeliest action; ``first`` until it has learned anything."""
        if self.data is None:
            return np.full(self.env.num_envs, self.first, dtype=np.int64)
        with th.no_grad():
            logits = self.policy.logits(th.as_tensor(observed)) + th.as_tensor(self.bonus)
        chosen: npt.NDArray[np.int64] = logits.argmax(dim=1).numpy()
        return chosen

    @property
    def bonus(self) -> npt.NDArray[np.float32]:
        """(A,) what ``caution`` adds to the logits."""
        bonus = np.zeros(self.env.components[0], dtype=np.float32)
        bonus[self.first] = self.plan.sharpness * self.plan.caution
        return bonus

    def network(self) -> Network:
        """The actor with its caution."""
        network = network_of(self.policy)
        weight, bias = network.head
        return dataclasses.replace(network, head=(weight, bias + self.bonus))

    def round(self) -> dict[str, float]:
        """One round: states of the policy's way, all actions tried there, a fit to all data so far. Returns its figures."""
        start = time.perf_counter()
        rng = np.random.default_rng((self.seed, self.done))
        self.env.seed(int(rng.integers(2**31)))
        short = self.done >= self.plan.rounds - self.plan.short_rounds
        self._add(collect_states(self.env, self.choose, self.plan, short, rng))
        assert self.data is not None
        collected = time.perf_counter() - start
        figures = fit_costs(self.policy, self.data, self.plan, self.bonus, np.random.default_rng((self.seed, self.done, 1)))
        self.done += 1
        figures.update(round=self.done, collect_seconds=round(collected, 1), seconds=round(time.perf_counter() - start, 1))
        return figures

    def _add(self, more: RolloutData) -> None:
        if self.data is None:
            extractor: Any = self.policy.features_extractor
            extractor.set_scale(more.observations)
        self.data = more if self.data is None else self.data.joined(more)
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".round-{self.done}.npz"
        np.savez(temporary, observations=more.observations, costs=more.costs, chosen=more.chosen, environment=more.environment)
        temporary.replace(self.folder / f"round-{self.done}.npz")

    def restore(self, rounds: int) -> None:
        """Take the data of that many rounds from the folder; the policy's weights are the caller's to restore.

        Raises:
            ConfigError: a file is missing or corrupt.
        """
        for k in range(rounds):
            path = self.folder / f"round-{k}.npz"
            try:
                with np.load(path, allow_pickle=False) as file:
                    part = RolloutData(file["observations"], file["costs"], file["chosen"], file["environment"])
            except (OSError, ValueError, KeyError, EOFError) as error:
                raise ConfigError(f"--resume: {path} cannot be read ({error})") from error
            self.data = part if self.data is None else self.data.joined(part)
        self.done = rounds
