"""The routing environment: the checkers, spaces, rewards, masks, seeds, copies; the vector form equal to it."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.utils.env_match import check_environments_match
from gymnasium.vector import AutoresetMode

import llmsched_env
from llmsched_agents.lookup import replica_policy
from llmsched_baselines.routers import Door, make_router
from llmsched_env.cluster.calls import CallChunk
from llmsched_env.cluster.env import LLMSchedCluster
from llmsched_env.cluster.reward import Outcome
from llmsched_env.cluster.routing import run_cluster
from llmsched_env.cluster.simulator import ClusterSim
from llmsched_env.cluster.spec import ClusterSpec, ReplicaEvent, ReplicaSpec
from llmsched_env.cluster.vector import LLMSchedClusterVectorEnv
from llmsched_env.errors import ConfigError
from llmsched_env.workload.sessions import load_source

ID = f"llmsched_env:{llmsched_env.CLUSTER_ID}"
LEVELS = (0.8, 0.95, math.inf)


def play(env: Any, seed: int | None, choose: Any = None) -> tuple[list[Any], list[float], dict[str, Any]]:
    """An episode; (observations, rewards, last info)."""
    observation, info = env.reset(seed=seed)
    g = np.random.default_rng(0)
    seen, rewards = [observation], []
    while True:
        legal = info["action_mask"]
        replicas = env.unwrapped.num_replicas
        action: Any = int(g.choice(np.flatnonzero(legal[:replicas]))) if choose is None else choose(observation, legal)
        if env.unwrapped.levels:
            action = np.array([action, g.integers(len(env.unwrapped.levels))])
        observation, reward, terminated, truncated, info = env.step(action)
        seen.append(observation)
        rewards.append(reward)
        if terminated or truncated:
            return seen, rewards, info


@pytest.mark.parametrize("settings", [{}, {"levels": LEVELS}, {"scenario": "failing"}])
def test_gymnasium_finds_nothing_wrong(settings: dict[str, Any]) -> None:
    env = gym.make(ID, num_calls=60, **settings)
    check_env(env.unwrapped, skip_render_check=True)
    assert env.observation_space.contains(env.reset(seed=1)[0])


def test_the_return_is_minus_the_mean_latency() -> None:
    env = gym.make(ID, num_calls=300, disable_env_checker=True)
    _, rewards, info = play(env, 3)
    assert info["summary"]["requests"] >= 300
    assert sum(rewards) == pytest.approx(-info["summary"]["latency_mean"], rel=1e-9)


def test_other_rewards_add_up_too() -> None:
    limits = {"ttft": 0.2, "tpot": 0.02}
    _, rewards, info = play(gym.make(ID, num_calls=200, reward={"name": "slo_goodput", **limits}, disable_env_checker=True), 3)
    assert 0.0 < sum(rewards) < 1.0
    assert sum(rewards) == pytest.approx(info["summary"]["slo_goodput"])
    _, tokens, _ = play(gym.make(ID, num_calls=200, reward="throughput", disable_env_checker=True), 3)
    own: list[Outcome] = []

    def keep(outcome: Outcome) -> float:
        own.append(outcome)
        return float(outcome.completed_tokens)

    _, again, _ = play(gym.make(ID, num_calls=200, reward=keep, disable_env_checker=True), 3)
    assert tokens == again and sum(tokens) > 0
    assert sum(outcome.completed for outcome in own) == info["summary"]["completed"]


def test_the_same_seed_gives_the_same_episode() -> None:
    a, b = (gym.make(ID, num_calls=80, scenario="drifting").unwrapped for _ in range(2))
    check_environments_match(a, b, num_steps=60, seed=5)
    first, second = play(a, 7), play(b, 7)
    assert first[1] == second[1] and first[2]["summary"] == second[2]["summary"]
    assert play(a, None)[1] != first[1]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_as_the_original_does(duplicate: Any) -> None:
    env = LLMSchedCluster(num_calls=150, levels=LEVELS, scenario="failing")
    env.reset(seed=2)
    for k in range(60):
        env.step([int(np.flatnonzero(env.action_masks()[: env.num_replicas])[k % 2]), k % 3])
    twin = duplicate(env)
    ended = False
    while not ended:
        action = [int(np.flatnonzero(env.action_masks()[: env.num_replicas])[0]), 1]
        one, other = env.step(action), twin.step(action)
        np.testing.assert_equal(one, other)
        ended = one[2]


def test_masks_say_who_takes_the_call() -> None:
    events = (ReplicaEvent(0.0, 0, "drain"), ReplicaEvent(5.0, 1, "fail"), ReplicaEvent(8.0, 1, "come_back"))
    env = LLMSchedCluster(replicas=ClusterSpec.equal(3, events=events), source="azure-conv-40gb", num_calls=200, rate=10.0)
    _, info = env.reset(seed=0)
    closed = []
    while True:
        legal = info["action_mask"]
        assert not legal[0] and legal[2] and env.action_space.contains(env.action_space.sample(mask=env.sample_mask()))
        if not legal[1]:
            closed.append(info["clock"])
            assert 5.0 <= info["clock"] < 8.0
        chosen = 0 if len(closed) % 2 else 1 + int(info["action_mask"][1:].argmax())
        expected = chosen if legal[chosen] else 1 if legal[1] else 2
        before = env.sim.record.machines.handed.copy()
        _, _, ended, _, info = env.step(chosen)
        assert info["redirected"] == (chosen == 0) and (before[0] == 0 or expected != 0)
        if ended:
            break
    assert closed and info["summary"]["completed"] == info["summary"]["requests"] >= 200


@pytest.mark.parametrize("action", [-1, 4, 1.5, [0, 1], "0", None, np.array([2**40])])
def test_an_action_outside_the_space_is_refused_before_anything_happens(action: Any) -> None:
    env = LLMSchedCluster(num_calls=50)
    before, _ = env.reset(seed=1)
    with pytest.raises(ConfigError, match="action"):
        env.step(action)
    np.testing.assert_equal(env._observe(0.0)[0], before)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"replicas": 0}, "replicas: 0"),
        ({"replicas": 2.5}, "replicas: 2.5"),
        ({"scenario": "equall"}, "did you mean 'equal'"),
        ({"source": "chatt"}, "did you mean 'chat'"),
        ({"rate": 0.0}, "rate: 0"),
        ({"num_calls": 0}, "num_calls: 0"),
        ({"levels": 0.9}, "levels"),
        ({"levels": (-1.0,)}, "levels: -1"),
        ({"policy": "vllm"}, "replica_policy"),
        ({"reward": "latencyy"}, "did you mean 'latency'"),
        ({"reward": {"name": "latency", "ttft": 1.0}}, r"reward\.ttft"),
        ({"num_call": 3}, "did you mean 'num_calls'"),
        ({"horizon": -1.0}, "horizon"),
        ({"render_mode": "human"}, "render_mode"),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LLMSchedCluster(**settings)


def test_options_of_one_episode() -> None:
    env = LLMSchedCluster(num_calls=50)
    env.reset(seed=1, options={"num_calls": 20, "rate": 1.0})
    assert env._num_calls < 40
    chunk = CallChunk.single([0.0, 0.0, 3.0], [10, 20, 30], [5, 5, 5])
    _, info = env.reset(options={"chunks": [chunk]})
    assert info["clock"] == 0.0
    for _ in range(3):
        _, _, ended, cut, info = env.step(0)
    assert ended and not cut and info["summary"]["completed"] == 3
    for options, match in (
        ({"rates": 1}, "rates"),
        ({"chunks": []}, "no call"),
        ({"chunks": [1]}, "CallChunk"),
        ({"num_calls": 0}, "num_calls"),
    ):
        with pytest.raises(ConfigError, match=match):
            env.reset(options=options)


def test_a_horizon_cuts_the_episode_off() -> None:
    env = LLMSchedCluster(num_calls=400, horizon=10.0)
    env.reset(seed=1)
    while True:
        _, _, ended, cut, info = env.step(0)
        if ended or cut:
            break
    assert cut and not ended and info["clock"] <= 10.0


def test_before_reset_and_after_the_end() -> None:
    env = LLMSchedCluster(num_calls=5)
    for method in (lambda: env.step(0), env.action_masks, env.summary):
        with pytest.raises(gym.error.ResetNeeded):
            method()
    play(env, 1)
    with pytest.raises(RuntimeError, match="the episode has ended"):
        env.step(0)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
@pytest.mark.parametrize("settings", [{"scenario": "failing"}, {"levels": LEVELS}, {"reward": "throughput", "discount_seconds": 60.0}])
def test_the_vector_form_is_equal_step_by_step(mode: AutoresetMode, settings: dict[str, Any]) -> None:
    count = 3
    vector = LLMSchedClusterVectorEnv(count, num_calls=50, autoreset_mode=mode, **settings)
    envs = [LLMSchedCluster(num_calls=50, **settings) for _ in range(count)]
    seen, _ = vector.reset(seed=4)
    own = [env.reset(seed=4 + k)[0] for k, env in enumerate(envs)]
    g, waits = np.random.default_rng(1), [False] * count
    for _ in range(170):
        for k in range(count):
            np.testing.assert_equal({name: rows[k] for name, rows in seen.items()}, own[k])
        replicas = vector.num_replicas
        actions = g.integers(replicas, size=(count, 1))  # some of them masked out
        if vector.levels:
            actions = np.hstack([actions, g.integers(len(LEVELS), size=(count, 1))])
        seen, rewards, ended, _, infos = vector.step(actions if vector.levels else actions[:, 0])
        for k, env in enumerate(envs):
            if waits[k]:
                own[k], waits[k] = env.reset()[0], False
                assert rewards[k] == 0.0 and not ended[k]
                continue
            own[k], reward, over, _, info = env.step(actions[k] if vector.levels else actions[k, 0])
            assert reward == rewards[k] and over == ended[k]
            if over and mode == AutoresetMode.SAME_STEP:
                np.testing.assert_equal({name: infos["final_obs"][k][name] for name in own[k]}, own[k])
                assert infos["final_info"]["clock"][k] == info["clock"] and infos["final_info"]["seconds"][k] == info["seconds"]
                own[k] = env.reset()[0]
            elif over:
                waits[k] = True
            else:
                assert infos["seconds"][k] == info["seconds"] and infos["discount"][k] == info["discount"]
                np.testing.assert_array_equal(infos["action_mask"][k], info["action_mask"])
                assert infos["redirected"][k] == info["redirected"]
    vector.close()


@pytest.mark.parametrize("name", ["sarathi", "adaptive", "nested-wait", "generalist"])
def test_replicas_run_under_policies_of_the_house(name: str) -> None:
    env = LLMSchedCluster(num_calls=120, policy=replica_policy(name))
    env.reset(seed=1)
    twin = LLMSchedCluster(num_calls=120)
    twin.reset(seed=1)
    ended, differ = False, False
    k = 0
    while not ended:
        action = k % 4
        k += 1
        observation, _, ended, _, info = env.step(action)
        if not twin._row:
            differ = True
        else:
            differ |= not np.array_equal(observation["replicas"], twin.step(action)[0]["replicas"])
    assert info["summary"]["completed"] == info["summary"]["requests"] and differ


def test_policies_that_a_cluster_cannot_have_are_refused() -> None:
    for name, match in (("wait", "output lengths"), ("vtc", "tenant")):
        with pytest.raises(ConfigError, match=match):
            LLMSchedCluster(num_calls=20, policy=replica_policy(name))
    with pytest.raises(ConfigError, match="did you mean 'sarathi'"):
        replica_policy("saratti")
    with pytest.raises(ConfigError, match="both decide"):
        LLMSchedCluster(policy=replica_policy("sarathi"), levels=LEVELS)


def test_make_vec_and_its_errors() -> None:
    vector = gym.make_vec(ID, num_envs=2, num_calls=20, rate=[10.0, 20.0])
    vector.reset(seed=1)
    with pytest.raises(ConfigError, match="environment 1, replica 9, must be from 0 to 3"):
        vector.step(np.array([0, 9]))
    with pytest.raises(ConfigError, match="replicas"):
        gym.make_vec(ID, num_envs=2, replicas=0)
    with pytest.raises(ConfigError, match="takes none"):
        vector.reset(options={"rate": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'drifting'"):
        gym.make_vec(ID, num_envs=1, scenario=["equal", "drfting"])
    one = ReplicaSpec()
    with pytest.raises(ConfigError, match="block sizes"):
        ClusterSpec((one, ReplicaSpec(one.engine.replace(block_size=32, num_blocks=2_000))))


@pytest.mark.parametrize("make", [lambda **s: LLMSchedCluster(**s), lambda **s: LLMSchedClusterVectorEnv(2, **s)], ids=["scalar", "vector"])
def test_an_episode_without_a_call_to_route_is_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"episode: no call in it can be routed.*horizon of 0\.01 s"):
        make(num_calls=20, horizon=0.01).reset(seed=0)
    gone = ClusterSpec.equal(1, events=(ReplicaEvent(0.0, 0, "fail"),))
    with pytest.raises(ConfigError, match=r"episode: no call in it can be routed.*rejected"):
        make(replicas=gone, source="chat", num_calls=20).reset(seed=0)


def test_calls_too_long_for_all_replicas_are_refused_or_rejected() -> None:
    short = ReplicaSpec(ReplicaSpec().engine.replace(max_model_len=100, max_num_batched_tokens=2048))
    chunk = CallChunk.single([0.0, 1.0], [90, 50], [20, 20])
    with pytest.raises(ConfigError, match=r"calls: row 0 needs 90 prompt \+ 20 output tokens, more than engine.max_model_len = 100"):
        LLMSchedCluster(replicas=ClusterSpec((short,)), source="chat").reset(options={"chunks": [chunk]})
    rejects = ReplicaSpec(short.engine.replace(oversize="reject"))
    env = LLMSchedCluster(replicas=ClusterSpec((rejects,)), source="chat")
    env.reset(options={"chunks": [chunk]})
    _, reward, ended, _, info = env.step(0)
    assert ended and (info["summary"]["rejected"], info["summary"]["completed"]) == (1, 1)
    assert reward == pytest.approx(-info["summary"]["latency_mean"] / 2)


def test_chunks_are_checked_before_the_episode_begins() -> None:
    good, corrupt = CallChunk.single([0.0, 1.0], [5, 5], [5, 5]), CallChunk.single([3.0, 4.0], [5, 0], [5, 5])
    env = LLMSchedCluster(source="chat")
    with pytest.raises(ConfigError, match=r"calls\.prompt_tokens: 0 in row 1"):
        env.reset(options={"chunks": [good, corrupt]})
    with pytest.raises(ConfigError, match=r"options\.chunks: 3"):
        env.reset(options={"chunks": 3})


def test_after_a_step_that_failed_only_a_reset_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    good = [True]

    def reward(outcome: Outcome) -> float:
        return 0.0 if good[0] else math.nan

    for make in (lambda: LLMSchedCluster(num_calls=60, reward=reward), lambda: LLMSchedClusterVectorEnv(2, num_calls=60, reward=reward)):
        env: Any = make()
        zero: Any = 0 if isinstance(env, LLMSchedCluster) else [0, 0]
        good[0] = True
        env.reset(seed=1)
        env.step(zero)
        good[0] = False
        with pytest.raises(ConfigError, match="reward: nan, must be a finite number"):
            env.step(zero)
        good[0] = True
        with pytest.raises(RuntimeError, match=r"interrupted or failed.*call reset\(\)"):
            env.step(zero)
        env.reset(seed=1)
        env.step(zero)
    single = LLMSchedCluster(num_calls=60)
    single.reset(seed=1)

    def interrupted(*_: Any) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(single.sim), "go_on", interrupted)
        single.step(0)
    with pytest.raises(RuntimeError, match="interrupted"):
        single.step(0)
    assert play(single, 1)[2]["summary"]["completed"] >= 60


def test_a_router_of_another_size_is_refused() -> None:
    source = load_source("chat")
    one, many = ClusterSpec.equal(1), ClusterSpec.equal(64)
    for name in ("cost", "dynamo", "prefix-affinity"):
        router = make_router(name, Door.of(one, source, 20.0))
        with pytest.raises(ConfigError, match="router: made for 1 replicas, the cluster has 64"):
            run_cluster(ClusterSim(many), router.rule, source.chunks(0, num_calls=20), source.app_tokens)


def test_a_stream_that_breaks_off_stays_broken() -> None:
    sim = ClusterSim(ClusterSpec.equal(2))
    sim.reset([CallChunk.single([0.0], [5], [5]), CallChunk.single([3.0, 1.0], [5, 5], [5, 5])])
    with pytest.raises(ConfigError, match=r"calls\.start"):
        sim.advance()
    for go_on in (sim.advance, lambda: sim.give(0)):
        with pytest.raises(RuntimeError, match="could not be read"):
            go_on()


def test_the_vector_form_has_the_summary_of_an_episode() -> None:
    vector = LLMSchedClusterVectorEnv(1, num_calls=30, autoreset_mode="SameStep")
    vector.reset(seed=5)
    while True:
        _, _, ended, _, infos = vector.step([0])
        if ended[0]:
            break
    env = LLMSchedCluster(num_calls=30)
    summary = play(env, 5, lambda observation, legal: 0)[2]["summary"]
    assert {name: values[0] for name, values in infos["final_info"]["summary"].items() if not name.startswith("_")} == summary
