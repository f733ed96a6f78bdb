"""The action set ``peak``: what a level admits, in which order, and the token budget beside it."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from llmsched_env import LLMSchedEnv
from llmsched_env.engine_config import EngineConfig
from llmsched_env.peak import LEVELS, WORK_ORDERS, forecast_steps, peak_tables
from llmsched_env.types import ADMIT_ALL, Decision, LengthStatistics, QueueLayout
from llmsched_env.workload import load_scenario

SMALL: dict[str, Any] = {"num_requests": 60, "backlog": 40, "engine": {"num_blocks": 400}, "hold": 1}


def predicted(env: LLMSchedEnv, entering: list[tuple[int, int, int]]) -> float:
    """The peak in plain Python: residents, and ``entering`` as (class, prompt, generated), at every step of the forecast."""
    engine, layout, statistics = env.engine, env.layout, env.scenario.statistics
    tables = peak_tables(statistics, layout, engine)
    view = env.view().resident_requests()
    present = [
        (int(q) // layout.num_segments, int(p), int(g)) for q, p, g in zip(view.queue, view.prompt_tokens, view.generated, strict=True)
    ]
    most = 0.0
    for t, ahead in enumerate(forecast_steps(statistics.max_output)):
        total = 0.0
        for j, prompt, tokens in [*present, *entering]:
            stays = tables.survival[j, min(tokens, tables.survival.shape[1] - 1), t]
            total += float(stays) * (prompt + tokens + tables.headroom + ahead)
        most = max(most, total)
    return most


def waiting_in_order(env: LLMSchedEnv, order: str) -> list[tuple[int, int, int]]:
    """(class, prompt, generated) of the requests outside, as they may enter."""
    view, found = env.view(), []
    by_work = peak_tables(env.scenario.statistics, env.layout, env.engine).by_work.tolist()
    for j in range(env.layout.num_classes):
        requests = view.waiting_requests(j, 10_000)
        rows = zip(requests.arrival, requests.id, requests.prompt_tokens, requests.generated, strict=True)
        for place, (arrival, ident, prompt, tokens) in enumerate(rows):
            key = (by_work.index(j), place) if order == "work" else (arrival, ident)
            found.append((key, (j, int(prompt), int(tokens))))
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


@pytest.mark.parametrize("order", WORK_ORDERS)
@pytest.mark.parametrize("level", [0.5, 0.8, 0.95])
def test_a_level_admits_as_many_as_are_predicted_to_fit(level: float, order: str) -> None:
    env = LLMSchedEnv(**SMALL | {"engine": {"num_blocks": 1000}})
    env.reset(seed=4)
    limit = level * env.engine.num_blocks * env.engine.block_size
    action = np.array([LEVELS.index(level), WORK_ORDERS.index(order)])
    seen = 0
    for _ in range(400):
        outside = waiting_in_order(env, order)
        admitted: list[tuple[int, int, int]] = []
        for row in outside:
            # A preempted request comes back before others of its class: the reference's order is that of fresh ones.
            if predicted(env, [*admitted, row]) > limit and not (not admitted and env.view().num_residents == 0):
                break
            admitted.append(row)
        expected = np.bincount([j for j, _, _ in admitted], minlength=env.layout.num_classes)
        preempted = any(g for _, _, g in outside)
        _, _, terminated, truncated, _ = env.step(action)
        if not preempted:
            decided = env._decision.admit.reshape(env.layout.num_classes, -1)[:, 0]
            assert decided.tolist() == expected.tolist()
            seen += bool(expected.sum())
        if terminated or truncated:
            break
    assert seen > 1


def test_the_highest_level_admits_whatever_fits() -> None:
    env = LLMSchedEnv(**SMALL)
    env.reset(seed=0)
    env.step(np.array([LEVELS.index(math.inf), 0]))
    assert (env._decision.admit == ADMIT_ALL).all()


def test_the_highest_level_keeps_the_order_by_work() -> None:
    env = LLMSchedEnv(**SMALL)
    env.reset(seed=0)
    least = int(peak_tables(env.scenario.statistics, env.layout, env.engine).by_work[0])
    waiting = env.view().waiting[:, 0].copy()
    env.step(np.array([LEVELS.index(math.inf), 1]))
    admitted = env._decision.admit.reshape(env.layout.num_classes, -1)[:, 0]
    assert 0 < admitted[least] <= waiting[least] and admitted.sum() < waiting.sum()
    if admitted[least] < waiting[least]:  # the first class fills the memory
        assert admitted.sum() == admitted[least]


def test_admitting_everything_is_vllm() -> None:
    from llmsched_baselines import Setting, make_policy
    from llmsched_env.runner import run_episode

    env = LLMSchedEnv(num_requests=200)
    env.reset(seed=11)
    workload = env.backend._workload
    over = False
    while not over:
        _, _, terminated, truncated, info = env.step(np.array([len(LEVELS) - 1, 0]))
        over = terminated or truncated
    policy = make_policy("vllm", Setting(env.scenario.statistics, env.rate, env.engine))
    assert info["summary"]["latency_mean"] == run_episode(policy, workload).summary.latency_mean


@pytest.mark.parametrize("name", ["azure-conv-40gb", "two-type"])
def test_the_environment_and_agents_mean_the_same_by_a_level(name: str) -> None:
    pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed (extra: agents)")
    from llmsched_agents.domain import EnvSetting
    from llmsched_agents.recipe import Recipe
    from llmsched_agents.training_env import AgentVecEnv

    scenario = load_scenario(name)
    recipe = Recipe(action_set="peak", layout=scenario.layout, levels=LEVELS, hold=6)
    agents = AgentVecEnv([EnvSetting(scenario, scenario.rate, scenario.engine)], recipe, 2, num_requests=80, backlog=30)
    env = gym.make_vec("LLMSched-v1", 2, scenario=name, num_requests=80, backlog=30, hold=6, orders=(), autoreset_mode="SameStep")
    agents.seed(3), agents.reset(), env.reset(seed=3)
    rng = np.random.default_rng(0)
    for _ in range(200):
        action = rng.integers(0, len(LEVELS), 2)
        _, theirs, dones, _ = agents.step(action)
        _, ours, terminated, truncated, infos = env.step(action)
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        np.testing.assert_array_equal(dones, terminated | truncated)
        np.testing.assert_allclose(infos["clock"], [record.clock for record in agents.vector.fleet.records])


def test_a_budget_slows_prompts_down() -> None:
    budgets = (0, 128, 512)
    tokens = {}
    for i, budget in enumerate(budgets):
        env = LLMSchedEnv(**SMALL, token_budgets=budgets)
        assert env.action_space == gym.spaces.MultiDiscrete([len(LEVELS), 2, 3])
        env.reset(seed=0)
        most = 0
        for _ in range(30):
            env.step(np.array([len(LEVELS) - 1, 0, i]))
            most = max(most, int(env.backend.report().total_tokens))
        tokens[budget] = most
    assert tokens[128] <= 128 < tokens[512] <= 512 < tokens[0]


def test_a_budget_may_be_smaller_than_the_number_of_residents() -> None:
    env = LLMSchedEnv("lmsys", num_requests=300, backlog=300, engine={"max_num_seqs": 256})
    env.reset(seed=0)
    greedy = Decision.greedy(env.layout.num_queues)
    for _ in range(40):
        env.step_decision(greedy)
    assert env.view().num_residents > 128
    greedy.token_budget = 1  # at least a tile
    env.step_decision(greedy)
    report = env.backend.report()
    assert report.total_tokens == 128 and report.decode_requests <= 128


def test_masks_and_samples_have_a_place_for_every_component() -> None:
    for chosen in ({}, {"token_budgets": (0, 256)}, {"action_set": "admit", "token_budgets": (0, 256), "max_admit": 3}):
        env = LLMSchedEnv(**SMALL | {"hold": None}, **chosen)
        _, info = env.reset(seed=0)
        assert info["action_mask"].shape == (sum(env.action_space.nvec),)
        assert info["action_mask"][-2:].all()
        for _ in range(20):
            _, _, terminated, truncated, info = env.step(env.action_space.sample(mask=env.sample_mask()))
            if terminated or truncated:
                break


def test_least_work_comes_first_whatever_the_number_of_its_class() -> None:
    """Class 0 has short prompts and long outputs, class 1 the reverse: KV x iterations of 300 (10 + 150) against 5 (100 + 2.5)."""
    statistics = LengthStatistics.of(np.array([10.0, 100.0]), np.array([300.0, 5.0]), np.array([0.5, 0.5]))
    layout = QueueLayout("prompt", (50,))
    assert peak_tables(statistics, layout, EngineConfig.vllm()).by_work.tolist() == [1, 0]
