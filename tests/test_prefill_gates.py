"""The settings by which vLLM keeps prefill and requests back: traces worked by hand, random episodes against the reference, refusals."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from lockstep import Case, compare_many, random_episode
from test_engine_vllm import random_engine

from llmsched_baselines import Setting, make_policy
from llmsched_baselines.overrides import parse_overrides
from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime
from llmsched_env.types import Decision, QueueLayout, Workload
from llmsched_env.workload import load_scenario
from llmsched_env.workload.scenario_files import read_scenario

NAMES = ("prefill_schedule_interval", "max_num_active_seqs", "long_prefill_token_threshold")


def small(**options: Any) -> EngineConfig:
    settings = {"num_blocks": 100, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 100}
    return EngineConfig.vllm(time_model=LinearTime(1.0, 0.0), **{**settings, **options})


def scheduled(
    engine: EngineConfig, requests: list[tuple[float, int, int]], decisions: list[Decision] | None = None
) -> list[dict[int, int]]:
    """Tokens by request in each step; requests are (arrival, prompt, output), an iteration takes a second."""
    backend = make_backend("sim", trace=True)
    arrival, prompt, output = zip(*requests, strict=True)
    backend.reset(Workload.of(arrival, prompt, output), QueueLayout(), engine, EpisodeLimits())
    found: list[dict[int, int]] = []
    while not backend.done:
        backend.step(decisions[len(found)] if decisions and len(found) < len(decisions) else Decision.greedy(1))
        ids, tokens = backend.scheduled()
        found.append(dict(zip(ids.tolist(), tokens.tolist(), strict=True)))
    return found


# --- the interval between prefills ---------------------------------------------------------------------
def test_prefill_waits_for_the_interval_while_somebody_decodes() -> None:
    """Interval 4: A's prefill in iteration 1, so B, which arrives in it, enters in iteration 5; C after it in iteration 9."""
    steps = scheduled(small(prefill_schedule_interval=4), [(0.0, 8, 12), (0.5, 8, 12), (4.5, 8, 2)])
    assert [sorted(step) for step in steps[:10]] == [[0]] * 4 + [[0, 1]] * 4 + [[0, 1, 2]] * 2
    assert (steps[0], steps[4][1], steps[8][2]) == ({0: 8}, 8, 8)


def test_nothing_waits_where_nobody_decodes() -> None:
    """A ends in iteration 2: B enters in iteration 3, in the middle of an interval of 10."""
    steps = scheduled(small(prefill_schedule_interval=10), [(0.0, 8, 2), (0.5, 8, 2)])
    assert steps == [{0: 8}, {0: 1}, {1: 8}, {1: 1}]


def test_running_chunks_wait_too() -> None:
    """B's prompt of 60 takes chunks of 31 and 29 beside A's decode: four iterations apart."""
    steps = scheduled(small(prefill_schedule_interval=4), [(0.0, 8, 20), (0.5, 60, 2)])
    assert [step.get(1, 0) for step in steps[:11]] == [0, 0, 0, 0, 31, 0, 0, 0, 29, 1, 0]


def test_a_release_that_leaves_somebody_outside_ends_the_interval() -> None:
    """Iteration 5 releases B and has no tokens left for C: C does not wait for iteration 9."""
    requests = [(0.0, 8, 20), (0.5, 31, 9), (0.6, 8, 9)]
    steps = scheduled(small(prefill_schedule_interval=4), requests)
    assert [step.get(1, 0) for step in steps[:6]] == [0, 0, 0, 0, 31, 1]
    assert [step.get(2, 0) for step in steps[:6]] == [0, 0, 0, 0, 0, 8]
    kept = scheduled(small(prefill_schedule_interval=4, prefill_interval_release=False), requests)
    assert [step.get(2, 0) for step in kept[:9]] == [0, 0, 0, 0, 0, 0, 0, 0, 8]


def test_a_prompt_of_one_token_is_no_prefill() -> None:
    """It enters at once, and begins no interval."""
    steps = scheduled(small(prefill_schedule_interval=4), [(0.0, 8, 20), (0.5, 1, 3), (2.5, 8, 2)])
    assert [step.get(1, 0) for step in steps[:5]] == [0, 1, 1, 1, 0]
    assert [step.get(2, 0) for step in steps[:6]] == [0, 0, 0, 0, 8, 1]


def test_the_queue_counts_as_far_as_a_decision_opens_it() -> None:
    """B enters in iteration 5 and C may not: nobody who might enter is left, so the next interval holds."""
    first = [Decision.greedy(1)] * 4 + [Decision.of([1], [1])]
    steps = scheduled(small(prefill_schedule_interval=4), [(0.0, 8, 20), (0.5, 8, 9), (0.6, 8, 9)], first)
    assert [step.get(1, 0) for step in steps[:6]] == [0, 0, 0, 0, 8, 1]
    assert [step.get(2, 0) for step in steps[:9]] == [0, 0, 0, 0, 0, 0, 0, 0, 8]


def test_every_episode_begins_anew() -> None:
    backend = make_backend("sim")
    backend.reset(Workload.of([0.0, 0.5], [8, 8], [4, 4]), QueueLayout(), small(prefill_schedule_interval=50), EpisodeLimits())
    while not backend.done:
        backend.step(Decision.greedy(1))
    env = gym.make("llmsched_env:LLMSched-v1", num_requests=20, engine={"prefill_schedule_interval": 8})
    runs = []
    for _ in range(2):
        env.reset(seed=4)
        rewards, done = [], False
        while not done:
            _, reward, terminated, truncated, _ = env.step(env.action_space.sample() * 0)
            rewards.append(reward)
            done = terminated or truncated
        runs.append(rewards)
    assert runs[0] == runs[1]


# --- the other two ----------------------------------------------------------------------------------------
def test_admission_ends_at_the_active_cap() -> None:
    steps = scheduled(small(max_num_active_seqs=2), [(0.0, 4, 3)] * 3)
    assert [sorted(step) for step in steps] == [[0, 1]] * 3 + [[2]] * 3


def test_a_long_prompt_takes_so_many_tokens_an_iteration() -> None:
    """Threshold 10: A's 25 tokens take three iterations beside B; B's decode passes A's chunks."""
    steps = scheduled(small(long_prefill_token_threshold=10), [(0.0, 25, 2), (0.0, 6, 4)])
    assert steps == [{0: 10, 1: 6}, {0: 10, 1: 1}, {0: 5, 1: 1}, {0: 1, 1: 1}]


def test_a_request_alone_is_not_limited() -> None:
    """Alone in iteration 1 it takes the whole budget of 32; B's arrival limits it from iteration 2 on."""
    steps = scheduled(small(long_prefill_token_threshold=10), [(0.0, 60, 2), (0.5, 6, 2)])
    assert [step.get(0, 0) for step in steps] == [32, 10, 10, 8, 1]


def test_one_who_waits_counts_as_far_as_a_decision_admits_it() -> None:
    hold = Decision.of([1], [0])
    steps = scheduled(small(long_prefill_token_threshold=10), [(0.0, 60, 2), (0.5, 6, 2)], [Decision.greedy(1), hold])
    assert steps == [{0: 32}, {0: 28}, {0: 1, 1: 6}, {1: 1}]


def test_a_limited_prompt_is_admitted_without_chunked_prefill() -> None:
    """What is limited fits the budget left, as in vLLM."""
    engine = small(long_prefill_token_threshold=10, enable_chunked_prefill=False, max_num_batched_tokens=100)
    steps = scheduled(engine, [(0.0, 80, 2), (0.0, 80, 2)])
    assert steps[0] == {0: 10, 1: 10}


# --- against the reference ----------------------------------------------------------------------------------
def gated_engine(rng: np.random.Generator, workload: Workload) -> EngineConfig:
    engine = random_engine(rng, workload).replace(padded_prefill=False, decode_needs_free_block=False)
    interval = int(rng.choice([1, 2, 3, 5, 12]))
    return engine.replace(
        prefill_schedule_interval=interval,
        prefill_interval_release=bool(interval == 1 or rng.random() < 0.7),
        max_num_active_seqs=int(rng.integers(1, engine.max_num_seqs + 1)) if rng.random() < 0.5 else None,
        long_prefill_token_threshold=min(int(rng.choice([0, 1, 3, 10])), engine.max_model_len),
    )


def gated_case(seed: int) -> Case:
    return random_episode(seed, gated_engine)


def test_random_episodes_equal_the_reference() -> None:
    total, preempting = compare_many(gated_case, range(120))
    assert preempting > 40, total
    assert total.iterations > 12_000, total
    assert total.partial > 1_000, total


@pytest.mark.slow
def test_many_random_episodes_equal_the_reference() -> None:
    total, preempting = compare_many(gated_case, range(20_000, 21_200))
    assert preempting > 400, total


# --- values ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefill_schedule_interval": 0}, r"engine\.prefill_schedule_interval: 0, must be an integer from 1"),
        ({"prefill_schedule_interval": 2.5}, r"engine\.prefill_schedule_interval: 2\.5"),
        ({"long_prefill_token_threshold": -1}, r"engine\.long_prefill_token_threshold: -1, must be an integer from 0"),
        ({"long_prefill_token_threshold": 101}, r"engine\.long_prefill_token_threshold: 101, must be <= max_model_len = 100"),
        ({"max_num_active_seqs": 0}, r"engine\.max_num_active_seqs: 0, must be an integer from 1"),
        ({"max_num_active_seqs": 9}, r"engine\.max_num_active_seqs: 9, must be <= max_num_seqs = 8"),
        ({"prefill_interval_release": 0}, r"engine\.prefill_interval_release: 0, must be true or false"),
        ({"prefill_interval_release": False}, r"engine\.prefill_interval_release: False, needs prefill_schedule_interval above 1"),
        ({"prefill_schedule_interval": 4, "decode_needs_free_block": True}, r"_interval: 4, must be 1 with decode_needs_free_block"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**options)


@pytest.mark.parametrize(("name", "value"), [(NAMES[0], 4), (NAMES[1], 4), (NAMES[2], 64)])
def test_the_paper_preset_has_none_of_them(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=rf"engine\.{name}: {value}, but it is an option of the vllm preset"):
        EngineConfig.paper(1000, 1.0, 0.0, **{name: value})


def test_values_come_from_words_and_files(tmp_path: Any) -> None:
    words = ["engine.prefill_schedule_interval=8", "engine.max_num_active_seqs=64", "engine.long_prefill_token_threshold=256"]
    assert parse_overrides(words, {}).engine == {NAMES[0]: 8, NAMES[1]: 64, NAMES[2]: 256}
    file = tmp_path / "night.toml"
    file.write_text(
        'description = "x"\n[lengths]\ntable = "azure-conv"\n[arrivals]\nprocess = "poisson"\nrate = 5.0\n'
        "[engine]\nprefill_schedule_interval = 8\n"
    )
    assert read_scenario(file).engine.prefill_schedule_interval == 8


@pytest.mark.parametrize(
    ("name", "options", "field", "value"),
    [
        ("prefill-cadence", {"interval": 8}, "prefill_schedule_interval", 8),
        ("prefill-decode-interval", {"rounds": 3}, "prefill_schedule_interval", 4),
        ("active-cap", {"cap": 32}, "max_num_active_seqs", 32),
        ("prefill-threshold", {"threshold": 256}, "long_prefill_token_threshold", 256),
    ],
)
def test_policies_stand_for_an_engine_with_the_setting(name: str, options: dict[str, int], field: str, value: int) -> None:
    scenario = load_scenario("azure-conv")
    setting = Setting(scenario.statistics, 6.0, scenario.engine)
    policy = make_policy(name, setting, **options)
    assert getattr(policy.engine, field) == value
    assert policy.engine.prefill_interval_release is (name != "prefill-decode-interval")
    assert repr(policy.constant) == repr(make_policy("vllm", setting).constant)
    option = next(iter(options))
    with pytest.raises(ConfigError, match=rf"policy\.{option}: -1"):
        make_policy(name, setting, **{option: -1})
    with pytest.raises(ConfigError, match=r"engine\.preset is 'paper'"):
        make_policy(name, Setting(scenario.statistics, 6.0, EngineConfig.paper(1000, 1.0, 0.0)))
