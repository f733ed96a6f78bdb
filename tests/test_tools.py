"""What Gymnasium's own tools do with these environments: infos, wrappers, masks, the order of an observation, threads, forks."""

from __future__ import annotations

import multiprocessing
import os
import threading
from typing import Any

import gymnasium as gym
import gymnasium.wrappers.vector as wrappers
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from llmsched_env import AdmitOnly
from llmsched_env.errors import ConfigError
from llmsched_env.threads import Workers, available_threads
from llmsched_env.vector import LLMSchedVectorEnv
from tests.env_settings import ADMIT, RESERVE

SMALL: dict[str, Any] = {**ADMIT, "rate": 6.0, "num_requests": 8}
GREEDY = np.array([1] * 4 + [16] * 4)


def to_the_ends(envs: Any, count: int = 2) -> list[dict[str, Any]]:
    """Step until two episodes of each environment have ended; the infos of every step."""
    envs.reset(seed=0)
    seen, ends = [], np.zeros(count, dtype=int)
    while ends.min() < 2:
        *_, terminated, truncated, infos = envs.step(np.tile(GREEDY, (count, 1)))
        ends += terminated | truncated
        seen.append(infos)
    return seen


@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_statistics_of_the_vector_environment_are_those_of_the_scalar_one(mode: str) -> None:
    envs = wrappers.RecordEpisodeStatistics(gym.make_vec("LLMSched-v1", num_envs=2, autoreset_mode=mode, **SMALL))
    infos = [info for info in to_the_ends(envs) if "episode" in info]
    for i in range(2):
        env = gym.wrappers.RecordEpisodeStatistics(gym.make("LLMSched-v1", **SMALL))
        env.reset(seed=i)
        over = False
        while not over:
            *_, terminated, truncated, info = env.step(GREEDY)
            over = terminated or truncated
        first = next(found for found in infos if found["_episode"][i])
        assert first["episode"]["r"][i] == pytest.approx(float(info["episode"]["r"]))
        assert first["episode"]["l"][i] == info["episode"]["l"]


def test_every_observation_wrapper_of_gymnasium_takes_the_default_mode() -> None:
    def flat() -> Any:
        return wrappers.FlattenObservation(gym.make_vec("LLMSched-v1", num_envs=2, **SMALL))

    for wrapped in (
        flat(),
        wrappers.NormalizeObservation(flat()),
        wrappers.NormalizeReward(flat()),
        wrappers.ClipReward(flat(), -1.0, 1.0),
    ):
        to_the_ends(wrapped)
        assert wrapped.unwrapped.autoreset_mode == wrapped.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP


def test_infos_have_the_same_keys_at_every_step() -> None:
    env = gym.make("LLMSched-v1", **SMALL)
    _, info = env.reset(seed=0)
    keys, over = {frozenset(info)}, False
    while not over:
        *_, terminated, truncated, info = env.step(GREEDY)
        over = terminated or truncated
        keys.add(frozenset(info))
    assert keys == {frozenset({"clock", "seconds", "discount", "action_mask", "summary"})}
    assert info["summary"]["completed"] == 8
    envs = gym.make_vec("LLMSched-v1", num_envs=2, **SMALL)
    assert {frozenset(infos) for infos in to_the_ends(envs)} == {frozenset({"clock", "seconds", "discount", "action_mask"})}
    for kind in ("sync", "async"):
        made = gym.make_vec("LLMSched-v1", num_envs=2, vectorization_mode=kind, **SMALL)
        assert to_the_ends(made)
        made.close()


def test_masks_in_the_form_that_sampling_takes() -> None:
    for env in (gym.make("LLMSched-v1", **SMALL), gym.make("LLMSched-v1", **{**SMALL, **RESERVE})):
        _, info = env.reset(seed=0)
        env.action_space.seed(0)
        for _ in range(60):
            action = env.action_space.sample(mask=env.unwrapped.sample_mask())  # type: ignore[attr-defined]
            assert info["action_mask"].dtype == np.bool_
            *_, terminated, truncated, info = env.step(action)
            if terminated or truncated:
                break
    only = AdmitOnly(gym.make("LLMSched-v1", **SMALL))
    only.reset(seed=0)
    only.step(only.action_space.sample(mask=only.sample_mask()))
    envs = LLMSchedVectorEnv(3, **SMALL)
    envs.reset(seed=0)
    assert [envs.single_action_space.sample(mask=mask).shape for mask in envs.sample_mask()] == [(8,)] * 3


def test_a_flat_observation_means_the_same_to_every_tool() -> None:
    env = gym.make("LLMSched-v1", **SMALL)
    observation, _ = env.reset(seed=0)
    space = env.observation_space
    assert isinstance(space, gym.spaces.Dict)
    assert list(space.spaces) == sorted(space.spaces) == list(observation)
    rebuilt = gym.spaces.Dict(dict(reversed(list(space.spaces.items()))))  # as a tool makes it from a dictionary, sorted
    assert rebuilt == space
    flat = gym.spaces.flatten(space, observation)
    np.testing.assert_array_equal(gym.spaces.flatten(rebuilt, observation), flat)
    np.testing.assert_array_equal(np.concatenate(list(observation.values())), flat)


@pytest.mark.parametrize("mode", ["Disabled", "nonsense", None, 3])
def test_other_autoreset_modes_are_refused(mode: Any) -> None:
    with pytest.raises(ConfigError, match="autoreset_mode"):
        LLMSchedVectorEnv(2, autoreset_mode=mode)


# --- threads and processes ------------------------------------------------------------------------------
def test_the_default_follows_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert available_threads() == 1 and len(Workers(4096).parts) == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "nonsense")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("NUMBA_NUM_THREADS", raising=False)
    assert available_threads() == 4
    assert len(Workers(4).parts) == 1, "a few environments are stepped sooner than handed over"
    assert Workers(4096).parts[0][0] == 0 and Workers(4096).parts[-1][1] == 4096


@pytest.mark.parametrize("threads", [0, -1, 2.0, True, "2", 100_000])
def test_threads_out_of_range(threads: Any) -> None:
    with pytest.raises(ConfigError, match="threads"):
        LLMSchedVectorEnv(4, threads=threads)


def course(threads: int | None, steps: int = 60) -> bytes:
    envs = LLMSchedVectorEnv(6, threads=threads, **SMALL)
    envs.reset(seed=0)
    found = [np.concatenate([*(o.ravel() for o in envs.step(np.tile(GREEDY, (6, 1)))[0].values())]).tobytes() for _ in range(steps)]
    return b"".join(found)


def test_threads_change_nothing_but_the_speed() -> None:
    assert course(1) == course(2) == course(5) == course(None)


def _in_a_fork(envs: LLMSchedVectorEnv, queue: Any) -> None:
    queue.put(envs.step(np.tile(GREEDY, (6, 1)))[1].tolist())


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    envs = LLMSchedVectorEnv(6, threads=2, **SMALL)
    envs.reset(seed=0)
    envs.step(np.tile(GREEDY, (6, 1)))  # the parent's threads run
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_fork, args=(envs, queue))
    child.start()
    theirs = queue.get(timeout=60)
    child.join(60)
    assert theirs == envs.step(np.tile(GREEDY, (6, 1)))[1].tolist()


def test_two_python_threads_at_once() -> None:
    found: dict[int, bytes] = {}
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, course(2))) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == course(1)
