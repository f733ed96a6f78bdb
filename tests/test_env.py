"""The environment's contract: Gymnasium's and SB3's checkers, determinism, spaces, masks, rewards, errors."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence

import llmsched_env
from llmsched_env import AdmitOnly, ConfigError, Decision, LLMSchedEnv, Workload
from llmsched_env.environments import FORMER_ENVIRONMENTS
from llmsched_env.observation import ObservationLayout
from llmsched_env.workload import scenario_names
from tests.env_settings import ADMIT, RESERVE

IDS = ["LLMSched-v1", "LLMSchedKnown-v1"]


def make(env_id: str = "LLMSched-v1", **kwargs: Any) -> gym.Env[Any, Any]:
    return gym.make(env_id, **{**ADMIT, "num_requests": 40, **kwargs})


def arrivals(env: gym.Env[Any, Any]) -> np.ndarray:
    """Arrival times of the episode, those to come included."""
    return env.unwrapped.backend.record.hidden.arrival.copy()  # type: ignore[attr-defined]


@pytest.mark.parametrize("env_id", IDS)
@pytest.mark.parametrize("scenario", scenario_names())
@pytest.mark.parametrize("action_set", ["peak", "admit"])
def test_gymnasium_checker(env_id: str, scenario: str, action_set: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = make(env_id, scenario=scenario, action_set=action_set).unwrapped
        check_env(env, skip_render_check=True)
        env.close()


def test_gymnasium_checker_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(make(render_mode="rgb_array").unwrapped)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("env_id", IDS)
def test_sb3_checker(env_id: str, wrap: bool) -> None:
    checker = pytest.importorskip("stable_baselines3.common.env_checker")
    env = make(env_id)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checker.check_env(AdmitOnly(env) if wrap else env.unwrapped)


def test_make_imports_the_module_by_prefix() -> None:
    env = gym.make("llmsched_env:LLMSched-v1", scenario="azure-conv", rate=6.0)
    assert isinstance(env.unwrapped, LLMSchedEnv)
    assert env.unwrapped.rate == 6.0


@pytest.mark.parametrize("env_id", IDS)
def test_same_seed_gives_the_same_bytes(env_id: str) -> None:
    envs = [make(env_id, rate=8.0) for _ in range(2)]
    first = [env.reset(seed=5) for env in envs]
    assert data_equivalence(first[0], first[1], exact=True)
    rng = np.random.default_rng(0)
    done = False
    while not done:
        mask = envs[0].unwrapped.action_masks()
        action = sample_masked(envs[0].unwrapped, mask, rng)
        a, b = (env.step(action) for env in envs)
        assert data_equivalence(a, b, exact=True)
        done = a[2] or a[3]
    again, other = envs[0].reset(seed=5), envs[1].reset(seed=6)
    assert data_equivalence(again, first[0], exact=True)
    assert arrivals(envs[1]).tobytes() != arrivals(envs[0]).tobytes()
    assert not math.isnan(float(other[0]["kv"][0]))


def sample_masked(env: LLMSchedEnv, mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A uniformly random legal action."""
    out, at = [], 0
    for size in env.action_space.nvec:  # type: ignore[attr-defined]
        out.append(rng.choice(np.flatnonzero(mask[at : at + size])))
        at += size
    return np.array(out)


def test_reset_without_a_seed_continues_the_stream() -> None:
    env = make()
    env.reset(seed=1)
    first = arrivals(env)
    env.reset()
    second = arrivals(env)
    env.reset(seed=1)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, arrivals(env))


@pytest.mark.parametrize("env_id", IDS)
def test_spec_rebuilds_the_environment(env_id: str) -> None:
    env = make(env_id, scenario="lmsys", rate=11.0, engine={"num_blocks": 2816}, reward={"name": "slo_goodput", "ttft": 2.0})
    assert env.spec is not None
    rebuilt = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    assert rebuilt.unwrapped.engine == env.unwrapped.engine
    assert data_equivalence(env.reset(seed=3), rebuilt.reset(seed=3), exact=True)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_keeps_the_state_and_goes_its_own_way(copied: Callable[[Any], Any]) -> None:
    env = make().unwrapped
    env.reset(seed=2)
    greedy, idle = np.array([1] * 4 + [16] * 4), np.array([0] * 4 + [0] * 4)
    for _ in range(20):
        env.step(greedy)
    other = copied(env)
    for _ in range(20):
        assert data_equivalence(env.step(greedy), other.step(greedy), exact=True)
        assert np.array_equal(env.view().residents, other.view().residents)
        assert env.view().clock == other.view().clock > 0
    clock, residents = other.view().clock, other.view().residents.copy()
    for _ in range(20):
        env.step(greedy)
    assert other.view().clock == clock < env.view().clock
    assert np.array_equal(other.view().residents, residents)
    del env  # a copy must not lean on arrays of the original
    gc.collect()
    assert other.step(idle)[4]["clock"] > clock


def test_observations_stay_in_their_space_and_masks_are_legal() -> None:
    env = make(rate=20.0, engine={"num_blocks": 400, "max_num_seqs": 32}).unwrapped
    rng = np.random.default_rng(3)
    observation, info = env.reset(seed=0)
    assert list(observation) == [name for name, _ in ObservationLayout.of(env.layout).fields]
    done = False
    while not done:
        assert env.observation_space.contains(observation)
        mask = info["action_mask"]
        assert mask.shape == (int(env.action_space.nvec.sum()),)
        view = env.view()
        n, q = env.codec.max_admit, env.layout.num_queues
        for i in range(q):
            assert mask[2 * i] == (view.residents.flat[i] > 0)
            waiting = int(view.waiting.flat[i])
            legal = mask[2 * q + i * (n + 1) : 2 * q + (i + 1) * (n + 1)]
            assert legal[:-1].sum() == min(waiting, n - 1) + 1
            assert legal[-1] == (waiting > 0)
        assert info["summary"] == {}
        observation, _, terminated, truncated, info = env.step(sample_masked(env, mask, rng))
        done = terminated or truncated
    assert terminated
    assert info["summary"]["completed"] == 40


@pytest.mark.parametrize("rate", [2.0, 30.0])
def test_return_is_minus_the_mean_latency(rate: float) -> None:
    env = make(rate=rate, num_requests=120).unwrapped
    env.reset(seed=7)
    total, done = 0.0, False
    rng = np.random.default_rng(1)
    while not done:
        _, reward, terminated, truncated, _ = env.step(sample_masked(env, env.action_masks(), rng))
        total += reward
        done = terminated or truncated
    log = env.backend.log()
    assert total == pytest.approx(-float(np.mean(log.completed - log.arrival)), rel=1e-9)


def test_goodput_and_throughput_returns_match_the_log() -> None:
    for spec in ({"name": "slo_goodput", "ttft": 0.2, "tpot": 0.04}, "throughput"):
        env = make(rate=5.0, num_requests=150, reward=spec).unwrapped
        env.reset(seed=4)
        total, done = 0.0, False
        while not done:
            _, reward, terminated, truncated, _ = env.step_decision(Decision.greedy(env.layout.num_queues))
            total += reward
            done = terminated or truncated
        log = env.backend.log()
        if spec == "throughput":
            assert total == log.output_tokens.sum()
        else:
            first, rest = log.first_token - log.arrival, np.maximum(log.output_tokens - 1, 1)
            tpot = np.where(log.output_tokens > 1, (log.completed - log.first_token) / rest, 0.0)
            met = (first <= 0.2) & (tpot <= 0.04)
            assert 0 < met.sum() < 150
            assert total == pytest.approx(met.mean())


def test_a_callable_reward_and_the_outcome_it_reads() -> None:
    seen: list[tuple[float, int]] = []

    def reward(outcome: Any) -> float:
        seen.append((outcome.duration, outcome.generated_tokens))
        assert outcome.finished().latency.shape == (outcome.completed,)
        return -1.0 * outcome.evictions

    env = make(reward=reward).unwrapped
    env.reset(seed=0)
    done = False
    while not done:
        _, _, terminated, truncated, _ = env.step(np.array([1] * 4 + [16] * 4))
        done = terminated or truncated
    assert sum(tokens for _, tokens in seen) == env.backend.log().output_tokens.sum()
    assert sum(seconds for seconds, _ in seen) == pytest.approx(env.backend.counters().clock)


def test_episode_ends() -> None:
    greedy = np.array([1] * 4 + [16] * 4)
    hold = np.array([1] * 4 + [0] * 4)

    def run(env: LLMSchedEnv, action: np.ndarray) -> tuple[bool, bool]:
        env.reset(seed=0)
        while True:
            _, _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                with pytest.raises(RuntimeError, match="ended"):
                    env.step(action)
                return terminated, truncated

    assert run(make().unwrapped, greedy) == (True, False)
    assert run(make().unwrapped, hold) == (True, False)  # drained greedily
    assert run(make(drain=False).unwrapped, hold) == (False, True)
    assert run(make(horizon=1.5).unwrapped, greedy) == (False, True)
    assert run(make(max_iterations=10).unwrapped, greedy) == (False, True)


def test_options_of_reset() -> None:
    env = make().unwrapped
    env.reset(seed=0, options={"rate": 50.0, "num_requests": 9})
    assert len(env.backend.record.hidden) == env.backend.record.num_requests == 9
    w = Workload.of([0.0, 1.0], [5, 6], [7, 8])
    env.reset(seed=0, options={"workload": w})
    assert env.backend.log().output_tokens.tolist() == [7, 8]
    with pytest.raises(ConfigError, match="rates"):
        env.reset(options={"rates": 1.0})


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rate": -1.0}, "rate: -1.0"),
        ({"rate": math.nan}, "rate: nan"),
        ({"num_requests": 0}, "num_requests: 0"),
        ({"scenario": "azure-con"}, "azure-conv"),
        ({"reward": "latncy"}, "did you mean 'latency'"),
        ({"reward": {"name": "slo_goodput", "ttft": -1.0}}, "reward.ttft"),
        ({"engine": {"num_block": 3}}, "engine.num_block"),
        ({"engine": {"max_num_seqs": 4096}}, "max_num_batched_tokens: 2048"),
        ({"backend": "simm"}, "did you mean 'sim'"),
        ({"action_set": "admit", "max_admit": 0}, "max_admit: 0"),
        ({"action_set": "admits"}, "action_set: 'admits', must be 'peak', 'admit', 'reserve' or 'operate'"),
        ({"hold": 0}, "hold: 0"),
        ({"segment_ends": (5, 5)}, "segment_ends"),
        ({"class_by": "output", "class_edges": (10,)}, "reveal_output_length"),
        ({"render_mode": "ansi"}, "render_mode"),
        ({"horizon": 0.0}, "horizon"),
    ],
)
def test_bad_arguments_are_refused(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LLMSchedEnv(**kwargs)


def test_action_of_the_wrong_shape_is_refused() -> None:
    env = make().unwrapped
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(8))
    env.reset(seed=0)
    with pytest.raises(ConfigError, match=r"action: shape \(3,\)"):
        env.step(np.zeros(3))


@pytest.mark.parametrize(
    ("action", "match"),
    [
        ([1] * 4 + [17] + [0] * 3, "component 4 is 17, must be from 0 to 16"),
        ([1] * 4 + [0] * 3 + [-1], "component 7 is -1, must be from 0 to 16"),
        ([1, 1, 2, 1] + [0] * 4, "component 2 is 2, must be from 0 to 1"),
        ([-1, 1, 1, 1] + [0] * 4, "component 0 is -1, must be from 0 to 1"),
        ([1] * 4 + [0.5] + [0] * 3, "whole numbers"),
        ([1] * 4 + [math.nan] + [0] * 3, "whole numbers"),
    ],
)
@pytest.mark.parametrize("reward", ["latency", lambda outcome: 0.0])
def test_an_action_outside_the_space_is_refused_and_changes_nothing(action: list[float], match: str, reward: Any) -> None:
    env, other = make(reward=reward).unwrapped, make(reward=reward).unwrapped
    env.reset(seed=0)
    other.reset(seed=0)
    with pytest.raises(ConfigError, match=match):
        env.step(np.array(action))
    legal = np.array([1] * 4 + [16] * 4)
    assert data_equivalence(env.step(legal), other.step(legal), exact=True)


@pytest.mark.parametrize("action", [-1, 10, 0.5, [1, 2]])
def test_an_action_outside_the_reserve_set_is_refused(action: Any) -> None:
    env = make(**RESERVE).unwrapped
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="action"):
        env.step(action)


def test_codec_round_trip() -> None:
    env = make().unwrapped
    rng = np.random.default_rng(0)
    for _ in range(50):
        action = np.array([rng.integers(n) for n in env.action_space.nvec])
        decision = env.codec.decode(action, Decision(env.layout.num_queues))
        assert np.array_equal(env.codec.encode(decision), action)


def test_admit_only_equals_the_full_action() -> None:
    full, simple = make(rate=10.0), AdmitOnly(make(rate=10.0))
    full.reset(seed=0)
    _, info = simple.reset(seed=0)
    assert isinstance(simple.action_space, gym.spaces.Discrete)
    rng, done = np.random.default_rng(0), False
    while not done:
        n = int(rng.choice(np.flatnonzero(info["action_mask"])))
        a = full.step(np.array([1] * 4 + [n] + [16] * 3))
        b = simple.step(n)
        assert data_equivalence(a[:4], b[:4], exact=True)
        info, done = b[4], b[2]


def test_version_and_registration_are_idempotent() -> None:
    before = dict(gym.registry)
    for environment in (*llmsched_env.ENVIRONMENTS, *FORMER_ENVIRONMENTS):
        assert environment.id in before
        environment.register()
    assert gym.registry == before
    assert llmsched_env.__version__ == "0.1.0"
