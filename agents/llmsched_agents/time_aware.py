"""Buffers of stable-baselines3 whose discounting follows the clock: engine iterations take from milliseconds to seconds.

A step that moves the clock by dt is discounted by gamma = exp(-dt / discount_seconds) and, in GAE
(arXiv 1506.02438), traced by lambda = exp(-dt / trace_seconds); a fixed gamma per step would make a
policy prefer many short iterations to few long ones. ``StepRecord`` of ``SB3VecEnv`` tells dt and
which episodes were cut.

Returns under light and heavy load differ by orders of magnitude. With ``normalize`` the value
network predicts (return - mean) / sd with the running mean and sd of each group of equal settings,
and advantages are centred and divided by the sd of their group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch as th
from sb3_contrib.common.maskable.buffers import MaskableRolloutBuffer
from stable_baselines3.common.buffers import ReplayBuffer, RolloutBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples

from llmsched_agents.sb3_vec import StepRecord

FloatArray = npt.NDArray[np.float64]


@dataclass(slots=True)
class GroupScale:
    """Running moments of the returns of each group; what a value network's outputs are scaled by.

    Attributes:
        mean, spread: (groups,).
        count: rollouts seen.
    """

    mean: FloatArray
    spread: FloatArray
    count: int = 0

    @classmethod
    def of(cls, groups: int) -> GroupScale:
        return cls(np.zeros(groups), np.ones(groups))

    def update(self, mean: FloatArray, spread: FloatArray, rate: float) -> None:
        """Move towards a rollout's moments; the first counts in full."""
        step = 1.0 if self.count == 0 else rate
        self.mean += step * (mean - self.mean)
        self.spread += step * (spread - self.spread)
        np.maximum(self.spread, 1e-6, out=self.spread)
        self.count += 1

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean.tolist(), "spread": self.spread.tolist(), "count": self.count}

    def load(self, state: dict[str, Any]) -> None:
        self.mean[:], self.spread[:], self.count = state["mean"], state["spread"], int(state["count"])


def time_aware_gae(
    rewards: FloatArray,
    values: FloatArray,
    last_values: FloatArray,
    durations: FloatArray,
    ends: npt.NDArray[np.bool_],
    truncated: npt.NDArray[np.bool_],
    discount_seconds: float,
    trace_seconds: float,
) -> FloatArray:
    """(T, N) advantages.

    A = sum_k (prod_{i<k} gamma_i lambda_i) delta_k with delta_t = r_t + gamma_t V_{t+1} - V_t. A
    finished episode ends with value 0. A truncated one would go on: its last state is taken to be
    worth as much as the one before it, a step apart.

    Args:
        rewards, values: (T, N); values of the states in which the steps began.
        last_values: (N,) of the states after the last step.
        durations: (T, N) seconds of each step.
        ends, truncated: (T, N) bool, the episode ended with the step, and was cut rather than finished.
    """
    gamma = np.exp(-durations / discount_seconds)
    trace = gamma * np.exp(-durations / trace_seconds)
    advantages = np.empty_like(values)
    following = np.zeros_like(last_values)
    for t in reversed(range(rewards.shape[0])):
        after = last_values if t == rewards.shape[0] - 1 else values[t + 1]
        after = np.where(truncated[t], values[t], np.where(ends[t], 0.0, after))
        delta = rewards[t] + gamma[t] * after - values[t]
        following = delta + np.where(ends[t], 0.0, trace[t] * following)
        advantages[t] = following
    return advantages


class _TimeAware:
    """What both rollout buffers add; comes before one of stable-baselines3's in the bases.

    Args (as ``rollout_buffer_kwargs``):
        record: of the environments.
        discount_seconds, trace_seconds: time constants of gamma and lambda; both over the record's ``time_scale``.
        normalize: scale by group.
        rate: weight of the latest rollout in the running moments.
        value_warmup: rollouts at the start in which advantages are zero, so that the value network alone learns.
    """

    def __init__(
        self,
        *args: Any,
        record: StepRecord,
        discount_seconds: float = 250.0,
        trace_seconds: float = 30.0,
        normalize: bool = True,
        rate: float = 0.1,
        value_warmup: int = 0,
        **kwargs: Any,
    ) -> None:
        self.record = record
        self.discount_seconds, self.trace_seconds = discount_seconds, trace_seconds
        self.normalize, self.rate, self.value_warmup = normalize, rate, value_warmup
        self.scale = GroupScale.of(int(record.group.max()) + 1)
        super().__init__(*args, **kwargs)

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        shape = (self.buffer_size, self.n_envs)  # type: ignore[attr-defined]
        self.durations = np.zeros(shape)
        self.cut = np.zeros(shape, dtype=np.bool_)

    def add(self, *args: Any, **kwargs: Any) -> None:
        self.durations[self.pos] = self.record.durations  # type: ignore[attr-defined]
        self.cut[self.pos] = self.record.truncated  # type: ignore[attr-defined]
        super().add(*args, **kwargs)  # type: ignore[misc]

    def compute_returns_and_advantage(self, last_values: th.Tensor, dones: npt.NDArray[np.bool_]) -> None:
        buffer: Any = self
        rewards = buffer.rewards.astype(np.float64)
        ends = np.concatenate([buffer.episode_starts[1:] != 0, dones[None].astype(np.bool_)])
        group, scale = self.record.group, self.scale
        if self.normalize and scale.count == 0:
            self._first_guess(rewards)
        mean, spread = (scale.mean[group], scale.spread[group]) if self.normalize else (0.0, 1.0)
        values = mean + spread * buffer.values.astype(np.float64)
        last = mean + spread * last_values.clone().cpu().numpy().flatten().astype(np.float64)
        advantages = time_aware_gae(
            rewards, values, last, self.durations, ends, self.cut, self.discount_seconds, self.trace_seconds
        )
        returns = advantages + values
        if self.normalize:
            buffer.returns = ((returns - mean) / spread).astype(np.float32)
            scale.update(*self._moments(returns), self.rate)
            centre, deviation = self._moments(advantages)
            advantages = (advantages - centre[group]) / np.maximum(deviation, 1e-8)[group]
        else:
            buffer.returns = returns.astype(np.float32)
        if self.value_warmup > 0:
            self.value_warmup -= 1
            advantages = np.zeros_like(advantages)
        buffer.advantages = advantages.astype(np.float32)

    def _first_guess(self, rewards: FloatArray) -> None:
        """Before any return is known: the reward per second of each group, kept up for ever."""
        groups = self.scale.mean.size
        total = np.bincount(self.record.group, weights=rewards.sum(axis=0), minlength=groups)
        seconds = np.maximum(np.bincount(self.record.group, weights=self.durations.sum(axis=0), minlength=groups), 1e-9)
        mean = total / seconds * self.discount_seconds
        spread = np.maximum(np.abs(mean) / 2, 1e-6)
        self.scale.mean[:], self.scale.spread[:] = mean, spread
        self.scale.count = 1

    def _moments(self, values: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(groups,) mean and standard deviation over a rollout."""
        group, groups = self.record.group, self.scale.mean.size
        count = np.bincount(group, minlength=groups) * values.shape[0]
        mean = np.bincount(group, weights=values.sum(axis=0), minlength=groups) / count
        square = np.bincount(group, weights=((values - mean[group]) ** 2).sum(axis=0), minlength=groups) / count
        return mean, np.sqrt(square)


class TimeAwareRolloutBuffer(_TimeAware, RolloutBuffer):
    """For ``PPO`` and ``A2C``."""


class TimeAwareMaskableRolloutBuffer(_TimeAware, MaskableRolloutBuffer):
    """For ``MaskablePPO``."""


class TimeAwareReplayBuffer(ReplayBuffer):
    """For ``DQN``: each transition has its own discount, and a truncated episode is not taken for a finished one.

    Args (as ``replay_buffer_kwargs``): ``record`` and ``discount_seconds`` as above.
    """

    def __init__(self, *args: Any, record: StepRecord, discount_seconds: float = 250.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record, self.discount_seconds = record, discount_seconds
        self.discounts = np.ones((self.buffer_size, self.n_envs), dtype=np.float32)

    def add(
        self,
        obs: npt.NDArray[Any],
        next_obs: npt.NDArray[Any],
        action: npt.NDArray[Any],
        reward: npt.NDArray[Any],
        done: npt.NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        self.discounts[self.pos] = np.exp(-self.record.durations / self.discount_seconds)
        cut = self.record.truncated
        if cut.any():  # the state after it belongs to the next episode: bootstrap from the one before, a step apart
            next_obs = np.where(cut[:, None], obs, next_obs)
            done = np.where(cut, False, done)
        super().add(obs, next_obs, action, reward, done, infos)

    def _get_samples(self, batch_inds: npt.NDArray[Any], env: Any = None) -> ReplayBufferSamples:
        chosen = np.random.randint(0, high=self.n_envs, size=(len(batch_inds),))
        parts = (
            self.observations[batch_inds, chosen, :],
            self.actions[batch_inds, chosen, :],
            self.next_observations[batch_inds, chosen, :],
            self.dones[batch_inds, chosen].reshape(-1, 1),
            self.rewards[batch_inds, chosen].reshape(-1, 1),
            self.discounts[batch_inds, chosen].reshape(-1, 1),
        )
        return ReplayBufferSamples(*(self.to_torch(part) for part in parts))
