"""Environments whose classes are tenants: observation, rewards, one and many environments alike."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from llmsched_env import ConfigError
from llmsched_env.env import LLMSchedEnv
from llmsched_env.observation import ObservationLayout
from llmsched_env.tenant_metrics import summarize_tenants
from llmsched_env.types import QueueLayout
from llmsched_env.vector import LLMSchedVectorEnv

NAME = "LLMSchedTenants-v1"
SMALL = {"num_requests": 60}


def made(**settings: object) -> LLMSchedEnv:
    env = gym.make(f"llmsched_env:{NAME}", **{**SMALL, **settings}).unwrapped
    assert isinstance(env, LLMSchedEnv)
    return env


def played(env: LLMSchedEnv, seed: int) -> float:
    """The return of an episode of random actions."""
    env.reset(seed=seed)
    env.action_space.seed(seed)
    total, over = 0.0, False
    while not over:
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample(env.sample_mask()))
        total += float(reward)
        over = terminated or truncated
    return total


@pytest.mark.filterwarnings("error")
def test_the_checkers_find_nothing() -> None:
    for settings in ({}, {"reward": "weighted_goodput"}, {"action_set": "admit", "segment_ends": (100,)}):
        check_env(made(**settings), skip_render_check=True)


def test_only_layouts_by_tenant_have_the_fields() -> None:
    names = [name for name, _ in ObservationLayout.of(QueueLayout(by="tenant", num_types=3)).fields]
    assert names == sorted(names) and names[-2:] == ["service_gap", "service_share"]
    assert [name for name, _ in ObservationLayout.of(QueueLayout(by="type", num_types=3)).fields] == names[:-2]


def test_the_observation_says_what_each_tenant_received() -> None:
    env = made(segment_ends=(50, 150), action_set="admit")
    env.reset(seed=2)
    queues, weights = env.backend.record.queues.rows, np.array([1.0, 1.0, 2.0, 1.0])
    shown = 0
    for _ in range(4000):
        observation, _, terminated, _, _ = env.step(np.array([1] * 12 + [16] * 12))
        outside = queues[:12:3]
        recent = outside["recent_service"] / weights
        expected = recent / recent.sum() if recent.sum() > 0 else recent
        assert observation["service_share"] == pytest.approx(expected, abs=1e-6)
        present = (queues["waiting"] + queues["residents"])[:12].reshape(4, 3).sum(axis=1) > 0
        gap = np.maximum(outside["counter"] - outside["counter"][present].min(), 0) if present.any() else np.zeros(4)
        assert observation["service_gap"] == pytest.approx(np.minimum(np.log1p(gap) / np.log1p(1e6), 1.0), abs=1e-6)
        shown += int(present.sum() >= 2)
        if terminated:
            break
    assert shown > 20 and terminated


@pytest.mark.parametrize("name", ["fair_latency", "weighted_goodput"])
@pytest.mark.parametrize("settings", [{}, {"engine": {"async_scheduling": True}}, {"segment_ends": (50, 150), "action_set": "admit"}])
def test_the_return_is_the_figure(name: str, settings: dict[str, object]) -> None:
    env = made(reward=name, **settings)
    for seed in range(2):
        total = played(env, seed)
        found = summarize_tenants(env.backend.log(), env.scenario.statistics.tenants)
        assert total == pytest.approx(-found.fair_latency if name == "fair_latency" else found.weighted_goodput, rel=1e-9)


def test_with_one_tenant_they_are_the_rewards_of_one_user() -> None:
    for tenants, single in (("fair_latency", "latency"), ("weighted_goodput", {"name": "slo_goodput", "ttft": 1e9, "tpot": 1e9})):
        returns = [
            played(LLMSchedEnv("azure-conv-40gb", class_by=by, reward=reward, orders=(), **SMALL), 1)
            for by, reward in (("tenant", tenants), ("single", single))
        ]
        assert returns[0] == pytest.approx(returns[1], rel=1e-9)


@pytest.mark.parametrize("name", ["fair_latency", "weighted_goodput"])
def test_one_and_many_are_equal_to_the_last_bit(name: str) -> None:
    many = LLMSchedVectorEnv(3, scenario="tenants", reward=name, **SMALL)
    ones = [made(reward=name) for _ in range(3)]
    observed, _ = many.reset(seed=[4, 5, 6])
    alone = [env.reset(seed=4 + i)[0] for i, env in enumerate(ones)]
    many.action_space.seed(0)
    over = np.zeros(3, dtype=np.bool_)
    for _ in range(300):
        actions = many.action_space.sample()
        observed, rewards, terminated, _, _ = many.step(actions)
        for i, env in enumerate(ones):
            if over[i]:
                continue
            alone[i], reward, ended, _, _ = env.step(actions[i])
            assert reward == rewards[i] and ended == terminated[i]
            over[i] = ended
            if not ended:
                assert all(observed[field][i].tobytes() == alone[i][field].tobytes() for field in observed)
        if over.all():
            break
    assert over.all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scenario": "azure-conv", "reward": "fair_latency"}, "reward: 'fair_latency' with classes by single, needs class_by='tenant'"),
        ({"scenario": "tenants", "class_by": "single", "reward": "weighted_goodput"}, "needs class_by='tenant'"),
        ({"scenario": "tenants", "class_by": "tenants"}, "layout.by: 'tenants'"),
    ],
)
def test_refusals(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLMSchedEnv(**settings)  # type: ignore[arg-type]


def test_other_classes_of_the_same_scenario() -> None:
    plain = LLMSchedEnv("tenants", class_by="prompt", class_edges=(500, 1500), **SMALL)
    assert plain.layout.num_classes == 3 and "service_gap" not in plain.observation_space.spaces
    plain.reset(seed=0)
    assert LLMSchedEnv("tenants", segment_ends=(100,)).layout.tenant_weights == (1.0, 1.0, 2.0, 1.0)
    assert LLMSchedEnv("tenants").layout.num_types == 4 and LLMSchedEnv("azure-conv", class_by="tenant").layout.num_classes == 1
