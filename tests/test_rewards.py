"""Rewards that users give: taken in every form and environment alike, or refused where they are given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numba
import numpy as np
import pytest

from llmsched_env import LLMSchedEnv
from llmsched_env.compiled import compiled
from llmsched_env.engine.state import Engine
from llmsched_env.errors import ConfigError
from llmsched_env.records import Numbers
from llmsched_env.reward import CompiledReward, LatencyReward, SloGoodputReward, make_reward
from llmsched_env.types import Decision
from llmsched_env.vector import LLMSchedVectorEnv
from tests.env_settings import ADMIT
from tests.env_walk import drawn, together, walked, walked_together
from tests.test_protocols import gives_text, of_two, reads_too_much, uncompiled


class Counting:
    def __call__(self, outcome: Any) -> float:
        return 1.0

    def of_two(self, outcome: Any, other: Any) -> float:
        return 1.0


class Asynchronous:
    async def __call__(self, outcome: Any) -> float:
        return 1.0


async def later(outcome: Any) -> float:
    return 1.0


def yielding(outcome: Any) -> Any:
    yield 1.0


@pytest.mark.parametrize(
    "reward",
    [lambda o: 1.0, lambda *o: 1.0, lambda o, scale=2.0: 1.0, Counting(), functools.partial(lambda s, o: 1.0, 2.0), LatencyReward(), abs],
)  # fmt: skip
def test_rewards_that_can_be_called(reward: Any) -> None:
    assert make_reward(reward) is reward


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda: 1.0, "must be called with one outcome"),
        (lambda a, b: 1.0, "must be called with one outcome"),
        (lambda *, outcome: 1.0, "must be called with one outcome"),
        (Counting().of_two, "must be called with one outcome"),
        (LatencyReward, "LatencyReward is a class, .* give an instance"),
        (later, "coroutine or generator"),
        (Asynchronous(), "coroutine or generator"),
        (yielding, "coroutine or generator"),
        (3, "reward: 3, must be a name"),
        (None, "reward: None"),
        ([("name", "latency")], "must be a name"),
        ({"name": ["latency"]}, r"reward: \['latency'\] is unknown"),
        ({1: 2}, "must be an object of named fields"),
        ({"name": "slo_goodput", "ttft": "1"}, r"reward\.ttft: '1', must be a number > 0"),
        ({"name": "slo_goodput", "tpot": True}, r"reward\.tpot: True"),
        ({"name": "slo_goodput", "tpot": 10**400}, r"reward\.tpot: 1000"),
        ({"name": "slo_goodput", "other": 1}, "other"),
        ({"name": "latncy"}, "did you mean 'latency'"),
    ],
)
def test_rewards_that_cannot_be_called_are_refused(reward: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_reward(reward)


def test_a_mapping_of_ones_own_is_a_mapping() -> None:
    class Spec(Mapping[str, Any]):
        def __getitem__(self, key: str) -> Any:
            return {"name": "slo_goodput", "ttft": 2.0}[key]

        def __iter__(self) -> Any:
            return iter(("name", "ttft"))

        def __len__(self) -> int:
            return 2

    assert make_reward(Spec()) == SloGoodputReward(ttft=2.0)


# --- compiled and ordinary rewards in both environments ---------------------------------------------
@compiled
def tokens_less_wait(engine, own):  # type: ignore[no-untyped-def]
    return own.parameters[0] * engine.report.generated_tokens - engine.report.system_seconds / engine.num_requests


@compiled
def tokens_less_wait_alone(engine: Engine, own: Numbers) -> float:
    return 0.5 * engine.report.generated_tokens - engine.report.system_seconds / engine.num_requests


def tokens_less_wait_in_python(outcome: Any) -> float:
    return float(0.5 * outcome.generated_tokens - outcome.system_seconds / outcome.num_requests)


SETTINGS: dict[str, Any] = {
    **ADMIT, "rate": 20.0, "num_requests": 30, "max_iterations": 150, "engine": {"num_blocks": 400, "max_num_seqs": 8}
}  # fmt: skip
EQUAL_REWARDS: dict[str, Callable[[], Any]] = {
    "CompiledReward": lambda: CompiledReward(tokens_less_wait, [0.5]),
    "compiled": lambda: tokens_less_wait_alone,
    "callable": lambda: tokens_less_wait_in_python,
    "method": lambda: functools.partial(tokens_less_wait_in_python),
}


@pytest.mark.parametrize("form", EQUAL_REWARDS)
def test_a_reward_is_the_same_in_every_form_and_environment(form: str) -> None:
    reward = EQUAL_REWARDS[form]()
    scalar = walked(LLMSchedEnv(**SETTINGS, reward=reward))
    assert scalar == walked(LLMSchedEnv(**SETTINGS, reward=tokens_less_wait_in_python))
    assert scalar != walked(LLMSchedEnv(**SETTINGS))
    one = walked_together(together(1, **SETTINGS, reward=reward))
    assert one == scalar  # seed and actions are the same, so is every byte
    many = walked_together(together(3, **SETTINGS, reward=reward, threads=2))
    assert many == walked_together(together(3, **SETTINGS, reward=tokens_less_wait_in_python))
    assert many != walked_together(together(3, **SETTINGS))


@pytest.mark.parametrize("form", EQUAL_REWARDS)
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_the_return_of_an_episode_is_the_sum_of_any_reward(form: str, mode: str) -> None:
    env = LLMSchedVectorEnv(2, **{**SETTINGS, "max_iterations": 60}, reward=EQUAL_REWARDS[form](), autoreset_mode=mode)
    _, infos = env.reset(seed=0)
    rng = np.random.default_rng(0)
    total, episodes, over = np.zeros(2), 0, np.zeros(2, dtype=np.bool_)
    for _ in range(400):
        actions = drawn(infos["action_mask"], env.single_action_space.nvec, rng)  # type: ignore[attr-defined]
        _, rewards, terminated, truncated, infos = env.step(actions)
        assert rewards.dtype == np.float64 and not (over & (rewards != 0)).any()  # a step that resets is worth nothing
        total += rewards
        over = terminated | truncated
        for i in np.flatnonzero(over):
            kept = infos["final_info"]["episode_return"][i] if mode == "SameStep" else env._envs[i].episode_return
            assert kept == pytest.approx(total[i], rel=1e-12)
            total[i], episodes = 0.0, episodes + 1
        if mode == "SameStep":
            over[:] = False
    assert episodes > 3


@compiled
def steps_of_the_episode(engine, own):  # type: ignore[no-untyped-def]
    own.memory[1] += 1
    return float(own.memory[1])


def test_what_a_reward_remembers_is_its_environments_own_and_ends_with_the_episode() -> None:
    short = {**SETTINGS, "max_iterations": 40}
    reward = CompiledReward(steps_of_the_episode, memory=2)
    scalar, vector = LLMSchedEnv(**short, reward=reward), together(3, **short, reward=reward, threads=2)
    for env in (scalar, vector):  # the same object in both, and used in turn
        env.reset(seed=0)
    seen, seen_together = [], []
    for _ in range(100):
        _, value, terminated, truncated, _ = scalar.step(np.ones(scalar.codec.width, dtype=np.int64))
        seen.append(value)
        if terminated or truncated:
            scalar.reset()
        seen_together.append(vector.step(np.ones((3, vector.codec.width), dtype=np.int64))[1].tolist())
    assert seen == [i % 40 + 1.0 for i in range(100)]
    assert seen_together == [[value] * 3 for value in seen]
    scalar.reset(seed=1)
    assert scalar.step_decision(Decision.greedy(scalar.layout.num_queues))[1] == 1.0  # nothing is left of the last one


@pytest.mark.parametrize("spec", ["latency", "throughput", {"name": "slo_goodput", "ttft": 100.0, "tpot": 10.0}], ids=str)
def test_built_in_rewards_called_as_ordinary_callables_are_the_compiled_ones(spec: Any) -> None:
    built_in = make_reward(spec)
    settings: dict[str, Any] = {**ADMIT, "scenario": "nested-two-type", "num_requests": 4, "max_admit": 4}

    def ordinary(outcome: Any) -> float:
        return built_in(outcome)

    assert walked(LLMSchedEnv(**settings, reward=spec)) == walked(LLMSchedEnv(**settings, reward=ordinary))
    assert walked_together(together(3, **settings, reward=spec)) == walked_together(together(3, **settings, reward=ordinary))
    env = together(3, **settings, reward=ordinary)
    _, infos = env.reset(seed=0)
    rng, total = np.random.default_rng(0), 0.0
    for _ in range(300):
        _, rewards, _, _, infos = env.step(drawn(infos["action_mask"], env.single_action_space.nvec, rng))  # type: ignore[attr-defined]
        total += rewards.sum()
    assert total < 0 if spec == "latency" else total > 0


def test_a_reward_in_a_vector_environment_is_called_once_for_every_engine_and_step() -> None:
    calls: list[tuple[float, int]] = []

    def reward(outcome: Any) -> int:  # not even a float
        calls.append((outcome.duration, outcome.num_requests))
        return len(calls)

    env = LLMSchedVectorEnv(3, **SETTINGS, reward=reward)
    env.reset(seed=0)
    assert not calls
    for step in range(4):
        _, rewards, *_ = env.step(np.ones((3, env.codec.width), dtype=np.int64))
        assert rewards.tolist() == [3 * step + 1.0, 3 * step + 2.0, 3 * step + 3.0]
    assert all(n == 30 for _, n in calls)


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled")
@pytest.mark.parametrize("function", [reads_too_much, of_two, gives_text, uncompiled])
def test_compiled_rewards_that_cannot_be_compiled_are_refused(function: Any) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)reward: '{function.__name__}' cannot be compiled as \(engine, own\) -> float: "):
        CompiledReward(function)
    if function is not uncompiled:  # which is an ordinary callable
        with pytest.raises(ConfigError, match=rf"reward: '{function.__name__}' cannot be compiled"):
            LLMSchedEnv(reward=function)
