"""The environments by name: registered alike for one and for many, and with something to learn."""

from __future__ import annotations

import gymnasium as gym
import pytest
from gymnasium.utils.env_checker import check_env

from llmsched_env import ENVIRONMENTS
from llmsched_env.bench.headroom import MEASURED, Headroom, headroom

SIMULATED = [environment.id for environment in ENVIRONMENTS if environment.simulated]


@pytest.mark.parametrize("name", SIMULATED)
def test_one_and_many_begin_alike(name: str) -> None:
    one, many = gym.make(f"llmsched_env:{name}"), gym.make_vec(f"llmsched_env:{name}", num_envs=2)
    observed, _ = one.reset(seed=5)
    together, _ = many.reset(seed=5)
    assert all((together[field][0] == observed[field]).all() for field in observed)
    assert one.action_space == many.single_action_space


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.filterwarnings("error")
def test_the_checker_of_gymnasium_finds_nothing(name: str) -> None:
    check_env(gym.make(f"llmsched_env:{name}", num_requests=40).unwrapped, skip_render_check=True)


@pytest.mark.parametrize("environment", ENVIRONMENTS, ids=lambda e: e.id)
def test_each_says_what_it_is(environment: object) -> None:
    assert "## Description" in environment.kind.__doc__  # type: ignore[attr-defined]
    assert gym.spec(environment.id).reward_threshold == environment.reward_threshold  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("environment", MEASURED, ids=lambda e: e.id)
def test_there_is_something_to_learn(environment: object) -> None:
    found: Headroom = headroom(environment, 24)  # type: ignore[arg-type]
    assert found.gap >= 0.25
    assert -found.greedy.latency.mean < found.threshold < -found.constant.latency.mean
    if found.id == "LLMSchedEasy-v0":  # greedy admission evicts every request once and more, WAIT none
        wait = next(score for score in found.knowing if score.name == "wait")
        assert found.greedy.evictions > 1000 and wait.evictions == 0
        assert wait.latency.mean < 0.75 * found.greedy.latency.mean
