"""The vector environment equals N scalar environments, step by step."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numba
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from llmsched_env import ConfigError, LLMSchedEnv
from llmsched_env.vector import LLMSchedVectorEnv


def masked(mask: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out, at = [], 0
    for size in sizes:
        out.append(rng.choice(np.flatnonzero(mask[at : at + size])))
        at += size
    return np.array(out)


CASES: list[dict[str, Any]] = [
    {"scenario": "azure-conv", "rate": 9.0, "engine": {"num_blocks": 700}},
    {"scenario": "azure-conv", "rate": [4.0, 8.0, 12.0], "class_by": "prompt", "class_edges": (300, 900), "reward": "slo_goodput"},
    {"scenario": ["lmsys", "sharegpt"], "rate": 20.0, "segment_ends": (20, 80), "reward": "throughput", "horizon": 6.0},
    {"scenario": "nested-two-type", "engine": [{"capacity_tokens": 90}, {"capacity_tokens": 5003}]},
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
            if term or trunc:
                episodes += 1
                if mode == AutoresetMode.SAME_STEP:
                    assert infos["_final_obs"][i]
                    for name in obs:
                        assert np.array_equal(infos["final_obs"][i][name], obs[name])
                    obs, info = env.reset()
                else:
                    restart[i] = True
            current[i] = (obs, info)
    assert episodes >= 3
    vector.close()


def test_make_vec_and_batched_spaces() -> None:
    env = gym.make_vec("llmsched_env:LLMSched-v0", num_envs=6, num_requests=20, rate=10.0)
    assert isinstance(env.unwrapped, LLMSchedVectorEnv)
    observed, _ = env.reset(seed=0)
    assert env.observation_space.contains(observed)
    for _ in range(50):
        observed, rewards, *_ = env.step(env.action_space.sample())
        assert env.observation_space.contains(observed)
        assert rewards.shape == (6,)
    known = gym.make_vec("LLMSchedKnown-v0", num_envs=2, num_requests=20)
    known.reset(seed=0)
    env.close()


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="numba has one thread here, and two are refused")
def test_threads_do_not_change_a_byte() -> None:
    runs = []
    for threads in (1, 2):
        env = LLMSchedVectorEnv(9, num_requests=30, rate=9.0, threads=threads)
        observed, _ = env.reset(seed=1)
        rng = np.random.default_rng(0)
        trail = [observed["kv"].tobytes()]
        for _ in range(300):
            action = rng.integers(0, env.single_action_space.nvec, (9, 8))  # type: ignore[attr-defined]
            observed, rewards, *_ = env.step(action)
            trail.append(observed["queue_length"].tobytes() + rewards.tobytes())
        runs.append(trail)
    assert runs[0] == runs[1]


def test_seeds_and_streams() -> None:
    env = LLMSchedVectorEnv(3, num_requests=10)
    env.reset(seed=5)
    first = env._times.copy()
    env.reset()
    assert not np.array_equal(first, env._times, equal_nan=True)
    env.reset(seed=[5, 6, 7])
    assert np.array_equal(first, env._times, equal_nan=True)
    with pytest.raises(ConfigError, match="2 seeds for 3"):
        env.reset(seed=[1, 2])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_envs": 0}, "num_envs: 0"),
        ({"num_envs": 2, "threads": 0}, "threads: 0"),
        ({"num_envs": 2, "reward": lambda outcome: 0.0}, "built-in"),
        ({"num_envs": 2, "backend": "vllm-scheduler"}, "must be 'sim'"),
        ({"num_envs": 2, "rate": [1.0, -1.0]}, "rate: -1.0"),
        ({"num_envs": 2, "scenario": ["azure-conv", "two-type"]}, "layout"),
    ],
)
def test_refusals(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LLMSchedVectorEnv(**kwargs)
