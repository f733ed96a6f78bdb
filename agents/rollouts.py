"""Learning from paired roll-outs: in a simulator every action can be tried from the same state under the same future.

The return of one decision among thousands drowns in the randomness of arrivals and lengths, which is
the same for every action. So at states that the policy itself visits, each action is carried on for
a while, arrivals then stop, the rest is worked off, and the costs are compared (``AgentVecEnv.branch``).
The network learns the cost of each action relative to the one it would have taken; the least is its
choice. Rounds repeat this on the states of the improved policy, all data kept: aggregation as in
AggreVaTe (arXiv 1406.5979), with the simulator's roll-outs in place of an expert's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from torch.nn import functional as F

from agents.policy import AgentPolicy
from agents.training_env import AgentVecEnv
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
    held_out: float = 0.125

    def __post_init__(self) -> None:
        for name in ("rounds", "states", "spacing", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollouts.{name}: {getattr(self, name)}, must be >= 1")
        for name in ("deviate_seconds", "horizon_seconds", "short_seconds", "learning_rate", "sharpness"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"rollouts.{name}: {getattr(self, name)}, must be > 0")
        if not 0 <= self.short_rounds < self.rounds:
            raise ConfigError(f"rollouts.short_rounds: {self.short_rounds}, must be from 0 to rounds - 1 = {self.rounds - 1}")


@dataclass(slots=True)
class RolloutData:
    """States and what each action costs there.

    Attributes:
        observations: (n, D) float32.
        costs: (n, A) float64, relative to ``chosen``: cost / cost of the chosen action - 1.
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
        # Where nothing is in the system and nothing comes, there is no cost to compare.
        valid = base[:, 0] > 0
        relative = costs[valid] / base[valid] - 1.0
        seen.append(RolloutData(observed[valid, : env.public].copy(), relative, chosen[valid], np.flatnonzero(valid)))
    data = seen[0]
    for more in seen[1:]:
        data = data.joined(more)
    return data


def fit_costs(policy: AgentPolicy, data: RolloutData, plan: RolloutPlan, rng: np.random.Generator) -> dict[str, float]:
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
            choice = policy.logits(x[th.as_tensor(test)]).argmax(dim=1).numpy()
        costs = data.costs[test]
        figures["chosen_percent"] = 100 * float(np.take_along_axis(costs, choice[:, None], axis=1).mean())
        figures["best_fixed_percent"] = 100 * float(costs.mean(axis=0).min())
        figures["best_percent"] = 100 * float(costs.min(axis=1).mean())
    return figures


def learn(
    policy: AgentPolicy,
    env: AgentVecEnv,
    plan: RolloutPlan,
    *,
    first: int,
    seed: int = 0,
    report: Callable[[str], None] | None = None,
    after_round: Callable[[int, dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Rounds of roll-outs and fits; the policy is changed in place.

    Args:
        first: the action that the first round follows everywhere.
        after_round: called with the number of rounds done and the figures of the last.
    """
    if len(env.components) != 1:
        raise ConfigError(f"rollouts: action set {env.recipe.action_set!r} has {len(env.components)} components, must have one")
    rng = np.random.default_rng(seed)
    data: RolloutData | None = None
    history = []

    def follow(observed: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
        if data is None:
            return np.full(env.num_envs, first, dtype=np.int64)
        with th.no_grad():
            chosen: npt.NDArray[np.int64] = policy.logits(th.as_tensor(observed)).argmax(dim=1).numpy()
        return chosen

    for k in range(plan.rounds):
        start = time.perf_counter()
        env.seed(int(rng.integers(2**31)))
        short = k >= plan.rounds - plan.short_rounds
        more = collect_states(env, follow, plan, short, rng)
        if data is None:
            extractor: Any = policy.features_extractor
            extractor.set_scale(more.observations)
        data = more if data is None else data.joined(more)
        collected = time.perf_counter() - start
        figures = fit_costs(policy, data, plan, rng)
        figures.update(round=k + 1, collect_seconds=round(collected, 1), seconds=round(time.perf_counter() - start, 1))
        history.append(figures)
        if report is not None:
            named = (("choice", "chosen_percent"), ("best fixed", "best_fixed_percent"), ("best of each state", "best_percent"))
            held = ", ".join(f"{word} {figures[name]:+.2f} %" for word, name in named if name in figures)
            report(f"round {k + 1} of {plan.rounds}: {len(data):,} states, {figures['seconds']:.0f} s; against what was followed: {held}")
        if after_round is not None:
            after_round(k + 1, figures)
    return history
