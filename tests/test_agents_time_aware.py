"""Discounting by the clock: GAE against a direct sum, SB3's own as the special case, scaling by group, and the pull towards a clone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra: agents)")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed (extra: agents)")

import gymnasium as gym
import torch as th
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.buffers import RolloutBuffer
from torch import nn

from llmsched_agents.policy import AgentPolicy, MaskableAgentPolicy, greedy_bias, masked_kl
from llmsched_agents.ppo import Decay, Discounting
from llmsched_agents.sb3_vec import SB3VecEnv, StepRecord
from llmsched_agents.time_aware import GroupScale, TimeAwareReplayBuffer, TimeAwareRolloutBuffer, time_aware_gae
from llmsched_env import ConfigError
from llmsched_env.vector import LLMSchedVectorEnv

OBSERVATION = gym.spaces.Box(0.0, 1.0, (3,), np.float32)


def record_of(n: int, groups: int = 1) -> StepRecord:
    return StepRecord(np.zeros(n), np.zeros(n, dtype=np.bool_), np.arange(n) % groups, np.ones(n))


def direct_gae(
    rewards: np.ndarray, values: np.ndarray, last: np.ndarray, dt: np.ndarray, ends: np.ndarray, cut: np.ndarray, a: float, b: float
) -> np.ndarray:
    """The definition: a sum over the steps to the end of the episode, one environment and one step at a time."""
    steps, envs = rewards.shape
    out = np.zeros_like(values)
    for e in range(envs):
        for t in range(steps):
            weight, total = 1.0, 0.0
            for k in range(t, steps):
                following = last[e] if k == steps - 1 else values[k + 1, e]
                if ends[k, e]:
                    following = values[k, e] if cut[k, e] else 0.0
                total += weight * (rewards[k, e] + np.exp(-dt[k, e] / a) * following - values[k, e])
                if ends[k, e]:
                    break
                weight *= np.exp(-dt[k, e] / a) * np.exp(-dt[k, e] / b)
            out[t, e] = total
    return out


@pytest.mark.parametrize("seed", range(4))
def test_gae_is_the_sum_it_stands_for(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (17, 5)
    rewards, values, last = rng.normal(size=shape), rng.normal(size=shape), rng.normal(size=5)
    dt = rng.exponential(3.0, shape)
    ends = rng.random(shape) < 0.15
    cut = ends & (rng.random(shape) < 0.5)
    found = time_aware_gae(rewards, values, last, dt, ends, cut, 20.0, 7.0)
    np.testing.assert_allclose(found, direct_gae(rewards, values, last, dt, ends, cut, 20.0, 7.0), rtol=1e-12, atol=1e-12)


def fill(buffer: Any, record: StepRecord, rng: np.random.Generator, dt: np.ndarray | None = None) -> tuple[th.Tensor, np.ndarray]:
    n = record.durations.size
    for t in range(buffer.buffer_size):
        record.durations[:] = 2.0 if dt is None else dt[t]
        start = np.zeros(n) if t else np.ones(n)
        if t == 3:
            start[1] = 1.0  # an episode of environment 1 ended with the third step
        buffer.add(
            rng.random((n, 3), dtype=np.float32), np.zeros((n, 1)), rng.normal(size=n), start, th.as_tensor(rng.normal(size=n)), th.zeros(n)
        )
    return th.as_tensor(rng.normal(size=n)), np.zeros(n, dtype=np.bool_)


def test_equal_steps_give_stable_baselines3s_own_advantages() -> None:
    record = record_of(3)
    args = (6, OBSERVATION, gym.spaces.Discrete(2), "cpu")
    ours = TimeAwareRolloutBuffer(
        *args, n_envs=3, record=record, discount_seconds=50.0, trace_seconds=10.0, normalize=False, gamma=1.0, gae_lambda=1.0
    )
    theirs = RolloutBuffer(*args, n_envs=3, gamma=float(np.exp(-2.0 / 50.0)), gae_lambda=float(np.exp(-2.0 / 10.0)))
    for buffer in (ours, theirs):
        buffer.compute_returns_and_advantage(*fill(buffer, record, np.random.default_rng(0)))
    np.testing.assert_allclose(ours.advantages, theirs.advantages, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.returns, theirs.returns, rtol=1e-5, atol=1e-6)


def test_groups_are_scaled_apart() -> None:
    record = record_of(4, groups=2)
    buffer = TimeAwareRolloutBuffer(8, OBSERVATION, gym.spaces.Discrete(2), "cpu", n_envs=4, record=record, gamma=1.0, gae_lambda=1.0)
    rng = np.random.default_rng(1)
    for _ in range(3):
        buffer.reset()
        last, dones = fill(buffer, record, rng)
        buffer.rewards[:, 1::2] *= 1000.0  # the second group pays a thousand times as much
        buffer.compute_returns_and_advantage(last, dones)
    for group in (0, 1):
        advantages = buffer.advantages[:, group::2]
        assert advantages.mean() == pytest.approx(0.0, abs=1e-5) and advantages.std() == pytest.approx(1.0, rel=1e-4)
        assert np.abs(buffer.returns[:, group::2]).max() < 20.0
    assert buffer.scale.spread[1] > 100 * buffer.scale.spread[0]


def test_running_moments_move_slowly_and_survive_a_round_trip() -> None:
    scale = GroupScale.of(2)
    scale.update(np.array([1.0, 2.0]), np.array([3.0, 4.0]), 0.1)
    np.testing.assert_array_equal(scale.mean, [1.0, 2.0])
    scale.update(np.array([2.0, 2.0]), np.array([3.0, 0.0]), 0.1)
    np.testing.assert_allclose(scale.mean, [1.1, 2.0])
    other = GroupScale.of(2)
    other.load(scale.state())
    assert other.state() == scale.state()


def test_value_warmup_hides_the_advantages() -> None:
    record = record_of(3)
    buffer = TimeAwareRolloutBuffer(6, OBSERVATION, gym.spaces.Discrete(2), "cpu", n_envs=3, record=record, value_warmup=1)
    rng = np.random.default_rng(2)
    buffer.compute_returns_and_advantage(*fill(buffer, record, rng))
    assert not buffer.advantages.any() and buffer.returns.any()
    buffer.reset()
    buffer.compute_returns_and_advantage(*fill(buffer, record, rng))
    assert buffer.advantages.any()


def test_replayed_transitions_carry_their_own_discount() -> None:
    record = record_of(2)
    buffer = TimeAwareReplayBuffer(8, OBSERVATION, gym.spaces.Discrete(2), "cpu", n_envs=2, record=record, discount_seconds=10.0)
    for t in range(4):
        record.durations[:] = [t, 2.0 * t]
        record.truncated[:] = [False, t == 3]
        observed = np.full((2, 3), t / 10, dtype=np.float32)
        buffer.add(observed, observed + 0.1, np.zeros((2, 1)), np.zeros(2), np.array([t == 3, t == 3]), [{}, {}])
    np.testing.assert_allclose(buffer.discounts, np.exp(-np.outer(np.arange(4), [1.0, 2.0]) / 10.0), rtol=1e-6)
    np.testing.assert_array_equal(buffer.dones[3], [1.0, 0.0])  # cut, not finished
    np.testing.assert_array_equal(buffer.next_observations[3, 1], buffer.observations[3, 1])
    np.random.seed(0)
    sample = buffer.sample(64)
    assert sample.discounts is not None and sample.discounts.shape == (64, 1)
    age = (sample.observations[:, 0] * 10).round()
    assert set(np.round(-10 * np.log(sample.discounts[age == 2].numpy()), 4).ravel()) == {2.0, 4.0}


# --- the pull towards a clone -----------------------------------------------------------------------
def test_decay_halves_and_ends() -> None:
    decay = Decay(0.8, half_life=0.25, end=0.1)
    assert [decay.at(x) for x in (0.0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([0.8, 0.4, 0.2, 0.1, 0.1])
    for bad in ({"start": 0.1, "end": 0.2}, {"start": 1.0, "half_life": 0.0}, {"start": -1.0}):
        with pytest.raises(ConfigError, match="kl"):
            Decay(**bad)
    with pytest.raises(ConfigError, match="trace_seconds"):
        Discounting(trace_seconds=0.0)


def test_masked_kl_is_torchs() -> None:
    th.manual_seed(0)
    p, q = th.randn(9, 7), th.randn(9, 7)
    masks = th.ones(9, 7, dtype=th.bool)
    masks[:, [1, 5]] = False
    expected = th.zeros(9)
    for columns in ([0], [2, 3, 4, 6]):  # what is left of components of 2 and 5
        part = [th.distributions.Categorical(logits=x[:, columns]) for x in (p, q)]
        expected += th.distributions.kl_divergence(*part)
    th.testing.assert_close(masked_kl(p, q, [2, 5], masks), expected)
    th.testing.assert_close(masked_kl(p, p, [2, 5], masks), th.zeros(9))


@pytest.mark.parametrize("masked", [False, True])
def test_the_policy_reports_its_weighted_regulariser(masked: bool) -> None:
    th.manual_seed(1)
    actions = gym.spaces.MultiDiscrete([2, 3])
    cls: Any = MaskableAgentPolicy if masked else AgentPolicy
    make = lambda: cls(OBSERVATION, actions, lambda _: 1e-3, net_arch=[8], activation_fn=nn.Tanh)  # noqa: E731
    policy, other = make(), make()
    with th.no_grad():
        for parameter in other.action_net.parameters():
            parameter.normal_()
    observed, taken = th.rand(5, 3), th.zeros(5, 2)
    policy.entropy_weight = 0.5
    _, _, plain = policy.evaluate_actions(observed, taken)
    policy.follow(other)
    _, _, still = policy.evaluate_actions(observed, taken)
    th.testing.assert_close(plain, still)  # a weight of 0
    policy.kl_weight = 2.0
    _, _, pulled = policy.evaluate_actions(observed, taken)
    divergence = masked_kl(other.logits(observed), policy.logits(observed), [2, 3])
    th.testing.assert_close(pulled, plain - 2.0 * divergence)
    assert (divergence > 0).all()
    policy.follow(policy)
    _, _, itself = policy.evaluate_actions(observed, taken)
    th.testing.assert_close(itself, plain)
    assert not any("reference" in name for name in policy.state_dict())


def test_the_actor_does_not_read_what_is_hidden() -> None:
    th.manual_seed(2)
    policy = AgentPolicy(OBSERVATION, gym.spaces.Discrete(4), lambda _: 1e-3, public=2, net_arch=[8], head_bias=greedy_bias([4], 9.0))
    a, b = th.rand(6, 3), th.rand(6, 3)
    b[:, :2] = a[:, :2]
    th.testing.assert_close(policy.logits(a), policy.logits(b))
    assert not th.allclose(policy.predict_values(a), policy.predict_values(b))
    assert (policy.logits(a).argmax(dim=1) == 3).all()


@pytest.mark.parametrize("kind", [TimeAwareRolloutBuffer, TimeAwareReplayBuffer])
def test_the_buffers_serve_plain_vector_environments(kind: Any) -> None:
    """``SB3VecEnv.record`` tells how long each step took."""
    envs = SB3VecEnv(LLMSchedVectorEnv(2, num_requests=30, hold=8, orders=()), flatten=True)
    if kind is TimeAwareRolloutBuffer:
        model: Any = PPO("MlpPolicy", envs, n_steps=32, rollout_buffer_class=kind, rollout_buffer_kwargs={"record": envs.record})
    else:
        options = {"record": envs.record, "handle_timeout_termination": False}
        model = DQN("MlpPolicy", envs, learning_starts=10, replay_buffer_class=kind, replay_buffer_kwargs=options)
    model.learn(200)
    assert (envs.record.durations >= 0).all() and envs.record.durations.max() > 0
