"""The vector environment equals N scalar environments, step by step."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode

from llmsched_env import ConfigError, LLMSchedEnv
from llmsched_env.vector import LLMSchedVectorEnv
from tests.env_settings import ADMIT


def masked(mask: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out, at = [], 0
    for size in sizes:
        out.append(rng.choice(np.flatnonzero(mask[at : at + size])))
        at += size
    return np.array(out)


CASES: list[dict[str, Any]] = [
    {**ADMIT, "rate": 9.0, "engine": {"num_blocks": 700}},
    {**ADMIT, "rate": [4.0, 8.0, 12.0], "class_by": "prompt", "class_edges": (300, 900), "reward": "slo_goodput"},
    {**ADMIT, "scenario": ["lmsys", "sharegpt"], "rate": 20.0, "segment_ends": (20, 80), "reward": "throughput", "horizon": 6.0},
    {**ADMIT, "scenario": "nested-two-type", "engine": [{"capacity_tokens": 90}, {"capacity_tokens": 5003}]},
    {**ADMIT, "rate": 9.0, "engine": [{"num_blocks": 300, "enable_prefix_caching": True}, {"num_blocks": 500}]},
    {**ADMIT, "rate": 9.0, "engine": [{"num_blocks": 300, "async_scheduling": True}, {"num_blocks": 300}]},
    {**ADMIT, "rate": 9.0, "engine": [{"num_blocks": 300, "scheduling_policy": "priority"}, {"num_blocks": 300}]},
    {**ADMIT, "rate": 9.0, "reward": lambda outcome: outcome.duration - 0.01 * outcome.evictions},
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_equal_to_scalar_environments(case: dict[str, Any], mode: AutoresetMode) -> None:
    n, requests = 4, 4
    vector = LLMSchedVectorEnv(n, num_requests=requests, autoreset_mode=mode, **case)

    def entry(key: str, i: int) -> Any:
        value = case[key]
        return value[i % len(value)] if isinstance(value, list) else value

    scalars = [
        LLMSchedEnv(**{k: entry(k, i) for k in case if k not in ("class_edges", "segment_ends")}, num_requests=requests,
                    **{k: case[k] for k in ("class_edges", "segment_ends") if k in case})
        for i in range(n)
    ]  # fmt: skip
    observed, infos = vector.reset(seed=7)
    current = [env.reset(seed=7 + i) for i, env in enumerate(scalars)]
    sizes = np.asarray(scalars[0].action_space.nvec)  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    restart = [False] * n
    returns, lengths = np.zeros(n), np.zeros(n, dtype=int)
    episodes = 0
    for _ in range(1000):
        for i, (obs, info) in enumerate(current):
            for name in obs:
                assert np.array_equal(observed[name][i], obs[name]), (i, name)
            assert np.array_equal(infos["action_mask"][i], info["action_mask"])
            assert infos["clock"][i] == info["clock"]
        actions = np.stack([masked(infos["action_mask"][i], sizes, rng) for i in range(n)])
        observed, rewards, terminated, truncated, infos = vector.step(actions)
        assert np.array_equal(vector.action_masks(), infos["action_mask"])
        for i, env in enumerate(scalars):
            if restart[i]:
                current[i], restart[i] = env.reset(), False
                assert (rewards[i], terminated[i], truncated[i]) == (0.0, False, False)
                continue
            obs, reward, term, trunc, info = env.step(actions[i])
            assert (rewards[i], terminated[i], truncated[i]) == (reward, term, trunc)
            assert (infos["seconds"][i], infos["discount"][i]) == (info["seconds"], info["discount"])
            returns[i] += reward
            lengths[i] += 1
            if term or trunc:
                episodes += 1
                if mode == AutoresetMode.SAME_STEP:
                    assert infos["_final_obs"][i]
                    for name in obs:
                        assert np.array_equal(infos["final_obs"][i][name], obs[name])
                    final = {key: value[i] for key, value in infos["final_info"].items() if not key.startswith("_")}
                    assert final["clock"] == info["clock"]
                    assert np.array_equal(final["action_mask"], info["action_mask"])
                    assert final["episode_return"] == pytest.approx(returns[i], rel=1e-12, abs=1e-12)
                    assert final["episode_length"] == lengths[i]
                    obs, info = env.reset()
                else:
                    restart[i] = True
                returns[i], lengths[i] = 0.0, 0
            current[i] = (obs, info)
    assert episodes >= 3
    vector.close()


def test_make_vec_and_batched_spaces() -> None:
    env = gym.make_vec("llmsched_env:LLMSched-v1", num_envs=6, num_requests=20, rate=10.0)
    assert isinstance(env.unwrapped, LLMSchedVectorEnv)
    observed, _ = env.reset(seed=0)
    assert env.observation_space.contains(observed)
    for _ in range(50):
        observed, rewards, *_ = env.step(env.action_space.sample())
        assert env.observation_space.contains(observed)
        assert rewards.shape == (6,)
    known = gym.make_vec("LLMSchedKnown-v1", num_envs=2, num_requests=20)
    known.reset(seed=0)
    env.close()


def test_threads_do_not_change_a_byte() -> None:
    runs = []
    for threads in (1, 2, 4):
        env = LLMSchedVectorEnv(9, **ADMIT, num_requests=30, rate=9.0, threads=threads)
        observed, _ = env.reset(seed=1)
        rng = np.random.default_rng(0)
        trail = [observed["kv"].tobytes()]
        for _ in range(300):
            action = rng.integers(0, env.single_action_space.nvec, (9, 8))  # type: ignore[attr-defined]
            observed, rewards, *_ = env.step(action)
            trail.append(observed["queue_length"].tobytes() + rewards.tobytes())
        runs.append(trail)
    assert runs[0] == runs[1] == runs[2]


def arrivals(env: LLMSchedVectorEnv) -> np.ndarray:
    """(E, N) arrival times, those to come included."""
    return np.stack([record.hidden.arrival for record in env.fleet.records])


def test_seeds_and_streams() -> None:
    env = LLMSchedVectorEnv(3, num_requests=10)
    env.reset(seed=5)
    first = arrivals(env)
    env.reset()
    assert not np.array_equal(first, arrivals(env))
    env.reset(seed=[5, 6, 7])
    assert np.array_equal(first, arrivals(env))
    with pytest.raises(ConfigError, match="2 seeds for 3"):
        env.reset(seed=[1, 2])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_envs": 0}, "num_envs: 0"),
        ({"num_envs": 2, "threads": 0}, "threads: 0"),
        ({"num_envs": 2, "threads": True}, "threads: True"),
        ({"num_envs": 2, "reward": "latncy"}, "did you mean 'latency'"),
        ({"num_envs": 2, "backend_config": {"trace": True}}, "backend_config"),
        ({"num_envs": 2, "backend": "vllm-scheduler"}, "must be 'sim'"),
        ({"num_envs": 2, "rate": [1.0, -1.0]}, "rate: -1.0"),
        ({"num_envs": 2, "scenario": ["azure-conv", "two-type"]}, "layout"),
    ],
)
def test_refusals(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LLMSchedVectorEnv(**kwargs)


def test_what_was_refused_can_be_closed() -> None:
    LLMSchedVectorEnv.__new__(LLMSchedVectorEnv).close()  # Gymnasium before 1.3 does so when it is collected


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
@pytest.mark.parametrize(
    "engine",
    [
        {"num_blocks": 700},
        {"num_blocks": 700, "enable_prefix_caching": True},
        {"num_blocks": 700, "async_scheduling": True},
        {"num_blocks": 700, "scheduling_policy": "priority"},
    ],
)
def test_a_copy_keeps_the_state_and_goes_its_own_way(copied: Callable[[Any], Any], engine: dict[str, Any]) -> None:
    env = LLMSchedVectorEnv(3, **ADMIT, num_requests=30, rate=9.0, engine=engine)
    env.reset(seed=2)
    greedy, idle = np.array([[1] * 4 + [16] * 4] * 3), np.array([[0] * 8] * 3)
    for _ in range(20):
        env.step(greedy)
    other = copied(env)
    for _ in range(20):
        assert data_equivalence(env.step(greedy), other.step(greedy), exact=True)
        assert np.array_equal(env.fleet.clocks, other.fleet.clocks) and (env.fleet.clocks > 0).all()
    clocks = other.fleet.clocks.copy()
    for _ in range(20):
        env.step(greedy)
    assert np.array_equal(other.fleet.clocks, clocks) and (env.fleet.clocks > clocks).all()
    del env  # a copy must not lean on memory of the original
    gc.collect()
    assert (other.step(idle)[4]["clock"] > clocks).all()


def test_the_prefix_caching_backend_is_the_engine_option() -> None:
    settings: dict[str, Any] = {**ADMIT, "num_requests": 20, "rate": 9.0}
    named = LLMSchedVectorEnv(2, **settings, engine={"num_blocks": 300}, backend="sim-prefix-cache")
    option = LLMSchedVectorEnv(2, **settings, engine={"num_blocks": 300, "enable_prefix_caching": True})
    assert named.spec_of(1).engine == option.spec_of(1).engine
    assert data_equivalence(named.reset(seed=0), option.reset(seed=0), exact=True)
    for _ in range(200):
        assert data_equivalence(named.step(np.array([[1] * 4 + [16] * 4] * 2)), option.step(np.array([[1] * 4 + [16] * 4] * 2)), exact=True)


def test_an_action_outside_the_space_is_refused_and_changes_nothing() -> None:
    env, other = (LLMSchedVectorEnv(3, **ADMIT, num_requests=20) for _ in range(2))
    env.reset(seed=0)
    other.reset(seed=0)
    legal = np.array([[1] * 4 + [16] * 4] * 3)
    for component, value in ((0, 2), (3, -1), (4, 17), (7, -1)):
        wrong = legal.copy()
        wrong[1, component] = value
        with pytest.raises(ConfigError, match=f"environment 1, component {component} is {value}"):
            env.step(wrong)
    for shape in ((2, 8), (3, 7), (24,)):
        with pytest.raises(ConfigError, match="shape"):
            env.step(np.zeros(shape, dtype=float))
    assert data_equivalence(env.step(legal), other.step(legal), exact=True)
