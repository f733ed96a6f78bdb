"""Macro-steps: an action held for some iterations is those iterations, and ``info`` tells the right discount."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from llmsched_env import ConfigError, LLMSchedEnv
from llmsched_env.action import ADMIT, PEAK, RESERVE
from llmsched_env.compiled import compiled
from llmsched_env.reward import CompiledReward, Outcome
from llmsched_env.spec import HOLD_SECONDS, EnvSpec
from llmsched_env.types import Decision
from llmsched_env.vector import LLMSchedVectorEnv

BUSY: dict[str, Any] = {"num_requests": 40, "backlog": 20, "engine": {"num_blocks": 400}}
SETS: list[dict[str, Any]] = [
    {},
    {"orders": ()},
    {"token_budgets": (0, 256, 512)},
    {"action_set": "reserve"},
    {"action_set": "reserve", "token_budgets": (0, 128)},
    {"action_set": "admit", "token_budgets": (512, 0)},
    {"action_set": "operate"},
    {"action_set": "operate", "ageing": (), "token_budgets": (0,)},
]


def evicted(outcome: Outcome) -> float:
    """A reward in Python."""
    return -float(outcome.evictions) - outcome.system_seconds


def actions(env: LLMSchedEnv, seed: int, count: int) -> list[Any]:
    env.action_space.seed(seed)
    return [env.action_space.sample() for _ in range(count)]


@pytest.mark.parametrize("reward", ["latency", "throughput", evicted])
@pytest.mark.parametrize("chosen", SETS)
def test_a_held_action_is_as_many_single_steps(chosen: dict[str, Any], reward: Any) -> None:
    held = LLMSchedEnv(**BUSY, **chosen, hold=7, reward=reward)
    single = LLMSchedEnv(**BUSY, **chosen, hold=1, reward=reward)
    held.reset(seed=3), single.reset(seed=3)
    for action in actions(held, 5, 10_000):
        observation, value, terminated, truncated, info = held.step(action)
        total, seconds, over = 0.0, 0.0, False
        for _ in range(7):
            last = single.step(action)
            total, seconds, over = total + last[1], seconds + last[4]["seconds"], last[2] or last[3]
            if over:
                break
        assert value == pytest.approx(total, rel=1e-12) and info["seconds"] == pytest.approx(seconds, rel=1e-9)
        assert (terminated or truncated) == over and info["clock"] == last[4]["clock"]
        for name, array in observation.items():
            np.testing.assert_array_equal(array, last[0][name])
        np.testing.assert_array_equal(info["action_mask"], last[4]["action_mask"])
        if over:
            break
    assert over and info["summary"] == last[4]["summary"]


@pytest.mark.parametrize("reward", ["latency", evicted])
@pytest.mark.parametrize("chosen", SETS)
def test_the_vector_environment_holds_alike(chosen: dict[str, Any], reward: Any) -> None:
    settings = {**BUSY, **chosen, "hold": 5, "hold_seconds": 0.3, "discount_seconds": 4.0, "reward": reward}
    vector = LLMSchedVectorEnv(3, **settings, threads=1)
    scalars = [LLMSchedEnv(**settings) for _ in range(3)]
    observed, infos = vector.reset(seed=8)
    firsts = [env.reset(seed=8 + i) for i, env in enumerate(scalars)]
    assert infos["seconds"].tolist() == [0.0] * 3 and infos["discount"].tolist() == [1.0] * 3
    over = np.zeros(3, dtype=bool)
    for action in actions(scalars[0], 1, 10_000):
        together = np.stack([np.atleast_1d(action)] * 3).reshape(vector.action_space.shape)
        observed, rewards, terminated, truncated, infos = vector.step(together)
        for i, env in enumerate(scalars):
            if over[i]:
                continue
            seen, value, ended, cut, info = env.step(action)
            assert (rewards[i], terminated[i], truncated[i]) == (value, ended, cut)
            assert all(infos[name][i] == info[name] for name in ("clock", "seconds", "discount"))
            for name in seen:
                np.testing.assert_array_equal(observed[name][i], seen[name])
            over[i] = ended or cut
        if over.any():  # the next step of that environment is a reset
            break
    assert len(firsts) == 3 and over.any()


def test_an_action_is_held_for_seconds() -> None:
    env = LLMSchedEnv(**BUSY, hold=1, hold_seconds=0.5)
    env.reset(seed=0)
    over = False
    while not over:
        _, _, terminated, truncated, info = env.step(env.action_space.sample())
        over = terminated or truncated
        assert over or info["seconds"] >= 0.5


def test_the_discount_is_that_of_the_clock() -> None:
    """Discounted by ``info``, returns of macro-steps are those of single steps discounted by the clock."""
    found = []
    for hold in (1, 4, 50):
        env = LLMSchedEnv(**BUSY, hold=hold, discount_seconds=3.0, orders=())
        env.reset(seed=2)
        total, factor, over = 0.0, 1.0, False
        while not over:
            _, value, terminated, truncated, info = env.step(4)
            total, factor, over = total + factor * value, factor * info["discount"], terminated or truncated
            assert info["discount"] == pytest.approx(math.exp(-info["seconds"] / 3.0))
        found.append(total)
    assert found[0] == pytest.approx(found[1], rel=1e-9) == pytest.approx(found[2], rel=1e-9)


def test_without_discount_the_return_is_minus_the_mean_latency() -> None:
    env = LLMSchedEnv(**BUSY)
    env.reset(seed=2)
    total, over = 0.0, False
    while not over:
        _, value, terminated, truncated, info = env.step(env.action_space.sample())
        total, over = total + value, terminated or truncated
        assert info["discount"] == 1.0
    assert -total == pytest.approx(info["summary"]["latency_mean"])


def test_every_iteration_of_a_macro_step_decides_anew() -> None:
    env = LLMSchedEnv(**BUSY, hold=1000, orders=())
    env.reset(seed=2)
    env.step(3)
    assert env.summary()["latency_mean"] > 0  # many iterations, many admissions, under one action
    assert env.view().num_residents + env.view().num_waiting < 40


@pytest.mark.parametrize(("action_set", "seconds"), [("admit", 0.0), ("peak", HOLD_SECONDS), ("reserve", HOLD_SECONDS)])
def test_levels_are_held_by_default_and_counts_are_not(action_set: str, seconds: float) -> None:
    spec = EnvSpec.of(action_set=action_set)
    assert (spec.hold, spec.hold_seconds) == (1, seconds)
    assert spec.codec.kind == {"admit": ADMIT, "peak": PEAK, "reserve": RESERVE}[action_set]
    held = EnvSpec.of(action_set=action_set, hold=7)
    assert (held.hold, held.hold_seconds) == (7, 0.0)


def test_an_expert_decides_every_iteration() -> None:
    env = LLMSchedEnv(**BUSY)
    env.reset(seed=0)
    before = env.backend.record.iterations
    *_, info = env.step_decision(Decision.greedy(env.layout.num_queues))
    assert env.backend.record.iterations == before + 1 and info["seconds"] > 0


def test_limits_on_steps_count_macro_steps() -> None:
    env = gym.make_vec("LLMSched-v1", num_envs=1, max_episode_steps=3, hold=5, num_requests=400)
    env.reset(seed=0)
    ends = [bool(env.step(env.action_space.sample())[3][0]) for _ in range(3)]
    assert ends == [False, False, True]
    with pytest.raises(ConfigError, match="max_episode_steps: 3"):
        gym.make_vec("LLMSched-v1", num_envs=1, max_episode_steps=3)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"hold": 0}, "hold: 0"),
        ({"hold": 1.5}, "hold: 1.5"),
        ({"hold_seconds": -1.0}, "hold_seconds: -1"),
        ({"hold_seconds": math.inf}, "hold_seconds: inf"),
        ({"discount_seconds": 0.0}, "discount_seconds: 0"),
        ({"discount_seconds": "slow"}, "discount_seconds: 'slow'"),
        ({"levels": ()}, "levels: "),
        ({"levels": (-0.1,)}, "levels: -0.1"),
        ({"levels": "high"}, "levels: 'high'"),
        ({"orders": "work"}, "orders: 'work'"),
        ({"orders": ("fifo",)}, "orders: 'fifo'"),
        ({"token_budgets": (64,)}, "token_budgets: 64"),
        ({"token_budgets": (-1,)}, r"token_budgets\[0\]: -1"),
        ({"token_budgets": 256}, "token_budgets: 256"),
        ({"scenario": "two-type", "token_budgets": (256,)}, "token_budgets: .*paper preset"),
        ({"action_set": "levels"}, "action_set: 'levels'"),
        ({"max_admit": 8}, "max_admit: 8, is for action_set='admit', not 'peak'"),
        ({"thetas": (-1.0,)}, "thetas: .* is for action_set='reserve', not 'peak'"),
        ({"action_set": "admit", "levels": (0.9,)}, "levels: .* is for action_set='peak', not 'admit'"),
        ({"action_set": "reserve", "orders": ("work",)}, "orders: .* is for action_set='peak', not 'reserve'"),
    ],
)
@pytest.mark.parametrize("kind", [LLMSchedEnv, LLMSchedVectorEnv])
def test_what_is_no_setting_is_refused_by_name(kind: Any, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        kind(**wrong)


@compiled
def waiting(engine, reward):  # type: ignore[no-untyped-def]
    return -float(engine.num_waiting)


def test_a_reward_compiled_by_the_user_is_held_too() -> None:
    held = LLMSchedEnv(**BUSY, hold=3, reward=CompiledReward(waiting))
    held.reset(seed=1)
    single = LLMSchedEnv(**BUSY, hold=1, reward=CompiledReward(waiting))
    single.reset(seed=1)
    action = held.action_space.sample()
    assert held.step(action)[1] == sum(single.step(action)[1] for _ in range(3)) < 0.0
