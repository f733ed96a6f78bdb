"""The training environment equals the environment itself; its own action set and features against plain Python."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra: agents)")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed (extra: agents)")

from llmsched_agents.domain import Domain, EnvSetting, arrivals_of, workload_of
from llmsched_agents.interface import FIELDS, Interface
from llmsched_agents.kernel import FEATURES, HIDDEN
from llmsched_agents.recipe import LEVELS, Recipe, boundary_with_prefill, class_tokens, first_token_budget, fluid_budget
from llmsched_agents.sb3_vec import SB3VecEnv
from llmsched_agents.training_env import AgentVecEnv
from llmsched_baselines import Setting
from llmsched_env import AdmitOnly, ConfigError, Decision, EngineConfig, EpisodeLimits, LLMSchedEnv
from llmsched_env.backends import make_backend
from llmsched_env.compiled import compiled
from llmsched_env.forecast import class_work
from llmsched_env.peak import GRID, forecast_steps
from llmsched_env.perf import LinearTime, load_calibration
from llmsched_env.reward import CompiledReward
from llmsched_env.types import LengthStatistics
from llmsched_env.vector import LLMSchedVectorEnv
from llmsched_env.workload import Scenario, load_scenario

CONV = Domain(("azure-conv",), (0.9, 1.1), (300,))  # a small cache: evictions within seconds
PAPER = Domain(("nested-two-type",), (1.0,))
PEAK = Recipe(action_set="peak", num_classes=4, num_segments=1, order="work", features=True)


def legal(masks: np.ndarray, components: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    parts = np.split(masks, np.cumsum(components)[:-1], axis=1)
    return np.stack([[rng.choice(np.flatnonzero(row)) for row in part] for part in parts], axis=1)


def in_agents_order(observed: Any) -> np.ndarray:
    """The environment's observation as agents read it: their order is part of every checkpoint, whatever the environment's is."""
    assert sorted(FIELDS) == list(observed)
    return np.concatenate([observed[name] for name in FIELDS], axis=-1)


def scalar(setting: EnvSetting, recipe: Recipe, **kwargs: Any) -> LLMSchedEnv:
    placed = setting.placed(recipe)
    one_by_one = {"action_set": "admit", "hold": 1, **kwargs}
    if one_by_one["action_set"] == "admit":
        one_by_one["max_admit"] = recipe.max_admit
    return LLMSchedEnv(placed.scenario, rate=placed.rate, engine=placed.engine, **one_by_one)


@pytest.mark.parametrize("domain", [CONV, PAPER])
def test_native_actions_equal_the_plain_adapter(domain: Domain) -> None:
    recipe = Recipe(action_set="admit", num_segments=3, max_admit=4)
    settings = domain.grid()
    ours = AgentVecEnv(settings, recipe, 3, num_requests=4)
    placed = [s.placed(recipe) for s in settings]
    vector = LLMSchedVectorEnv(
        3,
        scenario=[p.scenario for p in placed],
        rate=[p.rate for p in placed],
        engine=[p.engine for p in placed],
        num_requests=4,
        action_set="admit",
        max_admit=4,
    )
    assert ours.observation_space == SB3VecEnv(vector, flatten=True).observation_space
    theirs = SB3VecEnv(vector)
    assert ours.action_space == theirs.action_space
    ours.seed(5), theirs.seed(5)
    rng = np.random.default_rng(0)
    a, b = ours.reset(), theirs.reset()
    ends = 0
    for _ in range(600):
        np.testing.assert_array_equal(a, in_agents_order(b))
        masks = ours.action_masks()
        np.testing.assert_array_equal(masks, vector.action_masks())
        np.testing.assert_array_equal(masks, np.stack(ours.env_method("action_masks")))
        actions = legal(masks, ours.components, rng)
        before = vector.fleet.clocks.copy()
        a, rewards, dones, infos = ours.step(actions)
        b, expected, their_dones, their_infos = theirs.step(actions)
        np.testing.assert_array_equal(rewards, expected)
        np.testing.assert_array_equal(dones, their_dones)
        going = ~dones
        moved = (vector.fleet.clocks - before) / ours.record.time_scale
        np.testing.assert_allclose(ours.record.durations[going], moved[going], atol=1e-9)
        for i in np.flatnonzero(dones):
            ends += 1
            assert infos[i]["episode"]["l"] == their_infos[i]["episode"]["l"]
            assert infos[i]["episode"]["r"] == pytest.approx(their_infos[i]["episode"]["r"], abs=1e-5)
            assert "terminal_observation" not in infos[i]
    assert ends > 1


def test_admit_only_is_the_wrapper_of_that_name() -> None:
    recipe = Recipe(action_set="admit-only", num_segments=3, max_admit=4)
    setting = CONV.grid()[0]
    ours = AgentVecEnv([setting], recipe, 2, num_requests=12)
    theirs = [AdmitOnly(scalar(setting, recipe, num_requests=12)) for _ in range(2)]
    ours.seed(1)
    a = ours.reset()
    observed = [env.reset(seed=1 + i)[0] for i, env in enumerate(theirs)]
    rng = np.random.default_rng(1)
    for _ in range(300):
        for i, env in enumerate(theirs):
            np.testing.assert_array_equal(a[i], in_agents_order(observed[i]))
            np.testing.assert_array_equal(ours.action_masks()[i], env.action_masks())
        actions = legal(ours.action_masks(), ours.components, rng)[:, 0]
        a, rewards, dones, _ = ours.step(actions)
        for i, env in enumerate(theirs):
            observed[i], reward, terminated, truncated, _ = env.step(actions[i])
            assert rewards[i] == np.float32(reward) and dones[i] == (terminated or truncated)
            if dones[i]:
                observed[i] = env.reset()[0]


def test_reserve_is_the_environments_own_action_set() -> None:
    recipe = Recipe(action_set="reserve", num_classes=3, num_segments=2, order="class", levels=(0.5, 1.0, 1.2, math.inf))
    setting = CONV.grid()[1]
    ours = AgentVecEnv([setting], recipe, 1, num_requests=30)
    theirs = scalar(setting, recipe, num_requests=30, action_set="reserve", thetas=recipe.levels)
    assert ours.action_space == theirs.action_space
    ours.seed(2)
    a, (b, _) = ours.reset(), theirs.reset(seed=2)
    rng = np.random.default_rng(2)
    for _ in range(400):
        np.testing.assert_array_equal(a[0], in_agents_order(b))
        action = int(rng.integers(4))
        a, rewards, dones, _ = ours.step(np.array([action]))
        b, reward, _, _, _ = theirs.step(action)
        assert rewards[0] == np.float32(reward)
        if dones[0]:
            b, _ = theirs.reset()


def test_a_held_action_is_its_iterations_one_after_the_other() -> None:
    setting = CONV.grid()[0]
    discount = 3.0
    held = AgentVecEnv([setting], Recipe(**{**vars(PEAK), "hold": 5}), 1, num_requests=60, discount_seconds=discount)
    single = AgentVecEnv([setting], PEAK, 1, num_requests=60)
    held.seed(4), single.seed(4)
    a, b = held.reset(), single.reset()
    rng = np.random.default_rng(3)
    ended = False
    while not ended:
        np.testing.assert_array_equal(a, b)
        action = rng.integers(0, len(LEVELS), 1)
        a, rewards, dones, _ = held.step(action)
        total, elapsed, ended = 0.0, 0.0, False
        for _ in range(5):
            b, reward, done, _ = single.step(action)
            total += float(reward[0]) * math.exp(-elapsed / (discount * single.record.time_scale[0]))
            elapsed += float(single.record.durations[0]) * single.record.time_scale[0]
            ended = bool(done[0])
            if ended:
                break
        assert dones[0] == ended
        assert rewards[0] == pytest.approx(total, rel=1e-5)
        assert held.record.durations[0] * held.record.time_scale[0] == pytest.approx(elapsed)


# --- the action set `peak` against plain Python ---------------------------------------------------
def survival(statistics: LengthStatistics, in_class: np.ndarray, g: int, ahead: int) -> float:
    """P(output > g + ahead | output > g) in a class, 5 % of it from all requests."""
    weight = np.where(in_class, statistics.weight, 0.0)
    weight = 0.95 * weight / weight.sum() + 0.05 * statistics.weight
    alive = weight[statistics.output > g].sum()
    return float(weight[statistics.output > g + ahead].sum() / alive) if alive > 1e-12 else float(ahead == 0)


def expected_kv(view: Any, statistics: LengthStatistics, index: np.ndarray, extra: list[tuple[int, int, int]], spare: float) -> np.ndarray:
    """Expected KV tokens at every step of the forecast: residents and (class, prompt, generated) of ``extra``."""
    residents = view.resident_requests()
    half = spare if view.engine.preset == "paper" else spare * view.engine.block_size + (view.engine.block_size - 1) / 2
    steps = forecast_steps(statistics.max_output).astype(int)
    who = list(zip(residents.queue // view.layout.num_segments, residents.prompt_tokens, residents.generated, strict=True)) + extra
    return np.array([sum(survival(statistics, index == j, int(g), t) * (p + g + half + t) for j, p, g in who) for t in steps])


def test_the_forecast_looks_as_far_as_outputs_reach_and_closer_where_they_are_short() -> None:
    assert tuple(forecast_steps(GRID[-1] + 1)) == tuple(forecast_steps(100_000)) == GRID
    assert tuple(forecast_steps(970)) == (*GRID[:-1], 969)
    assert forecast_steps(20).tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 17, 19]
    for longest in (1, 2, 7, 14, 15, 100, 490, 970):
        steps = forecast_steps(longest)
        assert steps.shape == (len(GRID),) and steps[0] == 0 and (np.diff(steps) >= 0).all() and steps[-1] == longest - 1
        if longest <= len(GRID):
            assert set(steps.tolist()) == set(range(longest))
        else:
            assert (np.diff(steps) > 0).all()


@pytest.mark.parametrize("spare", [0.0, 1.5])
@pytest.mark.parametrize("name", ["azure-conv", "nested-two-type"])
def test_peak_admits_exactly_as_many_as_the_prediction_allows(name: str, spare: float) -> None:
    domain = Domain((name,), (1.1,), (300,))
    setting = domain.grid()[0]
    recipe = Recipe(**{**vars(PEAK), "levels": (0.6, 1.0, math.inf), "num_classes": 3 if name == "azure-conv" else 1, "spare": spare})
    interface = Interface(recipe, setting.setting)
    statistics = setting.scenario.statistics
    index = interface.layout.classify(statistics.prompt, statistics.output, statistics.type_id)
    backend = make_backend("sim")
    workload = setting.scenario.generate(0, rate=setting.rate, num_requests=40)
    view = backend.reset(workload, interface.layout, interface.engine, EpisodeLimits())
    rng = np.random.default_rng(0)
    work = class_work(statistics, interface.layout)
    decision, granted = Decision(interface.layout.num_queues), 0
    capacity = interface.engine.kv_capacity_tokens
    while not backend.done:
        level = int(rng.integers(3))
        interface.decode(view, np.array([level]), decision)
        assert decision.run.all()
        if level < 2:
            order = np.argsort(work, kind="stable")
            waiting = [view.waiting_requests(j, 64) for j in range(len(work))]
            heads = [list(zip(w.prompt_tokens, w.generated, strict=True)) for w in waiting]
            admitted = [(j, p, g) for j in order for p, g in heads[j][: decision.admit[j]]]
            left = [(j, *heads[j][decision.admit[j]]) for j in order if len(heads[j]) > decision.admit[j]]
            peak = expected_kv(view, statistics, index, admitted, spare).max()
            limit = recipe.choices[level] * capacity
            alone = view.num_residents == 0 and len(admitted) == 1
            assert peak <= limit * (1 + 1e-6) or alone or not admitted  # residents may have entered at another level
            if left and not alone:  # the next in the order of work does not fit any more
                assert expected_kv(view, statistics, index, [*admitted, left[0]], spare).max() > limit * (1 - 1e-6)
            granted += len(admitted)
        backend.advance(decision)
    assert granted > 10


def test_an_empty_engine_takes_its_first_request_at_any_level() -> None:
    setting = CONV.grid()[0]
    recipe = Recipe(**{**vars(PEAK), "levels": (1e-6,)})
    env = AgentVecEnv([setting], recipe, 1, num_requests=10)
    env.seed(0)
    env.reset()
    done, steps = False, 0
    while not done and steps < 100_000:
        _, _, dones, _ = env.step(np.zeros(1, dtype=np.int64))
        done, steps = bool(dones[0]), steps + 1
    assert done


def test_hidden_lengths_reach_neither_features_nor_decisions() -> None:
    setting = CONV.grid()[0]
    interface = Interface(PEAK, setting.setting)
    workload = setting.scenario.generate(1, rate=setting.rate, num_requests=20)
    backend = make_backend("sim")
    view = backend.reset(workload, interface.layout, interface.engine, EpisodeLimits())
    decision = Decision(interface.layout.num_queues)
    rng = np.random.default_rng(0)
    for _ in range(200):
        action = rng.integers(0, len(LEVELS), 1)
        seen = interface.observe(view)[0].copy()
        interface.decode(view, action, decision)
        wanted = decision.rows.copy()
        requests, hidden = backend.record.requests.rows, backend.record.hidden.rows
        kept = requests.copy(), hidden.copy()
        requests["output"] = rng.integers(1, 1000, len(requests))
        for name in ("output", "due", "outside"):
            hidden[name] = rng.integers(1, 1000, len(hidden))
        np.testing.assert_array_equal(interface.observe(view)[0], seen)
        np.testing.assert_array_equal(interface.decode(view, action, decision).rows, wanted)
        requests[:], hidden[:] = kept
        backend.advance(decision)
        if backend.done:
            break


def test_hidden_numbers_stand_after_the_public_ones() -> None:
    settings = CONV.grid()
    with_hidden = AgentVecEnv(settings, PEAK, 2, num_requests=30, hidden=True)
    without = AgentVecEnv(settings, PEAK, 2, num_requests=30)
    with_hidden.seed(0), without.seed(0)
    a, b = with_hidden.reset(), without.reset()
    assert a.shape[1] == b.shape[1] + HIDDEN == with_hidden.public + HIDDEN
    for _ in range(50):
        np.testing.assert_array_equal(a[:, : with_hidden.public], b)
        assert a.min() >= 0.0 and a.max() <= 1.0 and np.isfinite(a).all()
        actions = np.array([3, 8])
        a, b = with_hidden.step(actions)[0], without.step(actions)[0]
    with pytest.raises(ConfigError, match="hidden"):
        AgentVecEnv(settings, Recipe(), 2, hidden=True)


# --- roll-outs from a state ---------------------------------------------------------------------------
def everything(env: AgentVecEnv) -> list[np.ndarray]:
    """Engines, environments and what agents remember; not what the next step writes anew (decisions, scratch)."""
    engines = [array for i in range(env.num_envs) for array in env.vector.fleet.save(i)]
    agents = [array.copy() for agent in env._agents for array in (agent._memory, agent.held, agent.action)]
    return [*engines, *(record._memory.copy() for record in env.vector._envs), *agents]


def test_branches_leave_the_engines_alone_and_cost_what_the_future_costs() -> None:
    settings = CONV.grid()
    env = AgentVecEnv(settings, PEAK, 2, num_requests=40)
    env.seed(3)
    env.reset()
    rng = np.random.default_rng(0)
    for _ in range(60):
        env.step(rng.integers(0, len(LEVELS), 2))
    before = everything(env)
    follow = np.array([8, 5])
    costs = env.branch(follow, 1.0, 1e9)
    for array, kept in zip(everything(env), before, strict=True):
        assert array.dtype == kept.dtype and array.tobytes() == kept.tobytes()
    assert costs.shape == (2, len(LEVELS)) and (costs > 0).all()
    total = np.zeros(2)
    live = np.ones(2, dtype=np.bool_)
    while live.any():
        _, rewards, dones, _ = env.step(follow)
        total -= np.where(live, rewards, 0.0)
        live &= ~dones
    np.testing.assert_allclose(costs[np.arange(2), follow], total, rtol=1e-4)


@compiled
def remembers(engine, own):  # type: ignore[no-untyped-def]
    own.memory[0] += 1
    return -engine.report.system_seconds / engine.num_requests


def test_branches_leave_what_a_reward_remembers_alone() -> None:
    env = AgentVecEnv(CONV.grid(), PEAK, 2, num_requests=20, reward=CompiledReward(remembers, memory=1))
    plain = AgentVecEnv(CONV.grid(), PEAK, 2, num_requests=20)
    for each in (env, plain):
        each.seed(3)
        each.reset()
        for _ in range(10):
            each.step(np.array([3, 8]))
    follow = np.array([8, 5])
    np.testing.assert_array_equal(env.branch(follow, 1.0, 5.0), plain.branch(follow, 1.0, 5.0))
    assert [record.reward_numbers.memory.tolist() for record in env.vector._envs] == [[10], [10]]


def test_after_the_horizon_nothing_arrives() -> None:
    env = AgentVecEnv(CONV.grid()[:1], PEAK, 1, num_requests=200)
    env.seed(3)
    env.reset()
    follow = np.array([8])
    short, long = (float(env.branch(follow, 1.0, seconds)[0, 8]) for seconds in (2.0, 1e9))
    assert 0 < short < long / 2


def test_threads_change_neither_a_byte_nor_torchs_own() -> None:
    import torch

    before = torch.get_num_threads()
    one, two = (AgentVecEnv(CONV.grid(), PEAK, 4, num_requests=20, threads=threads) for threads in (1, 2))
    one.seed(0), two.seed(0)
    np.testing.assert_array_equal(one.reset(), two.reset())
    rng = np.random.default_rng(0)
    for _ in range(150):
        actions = rng.integers(0, len(LEVELS), 4)
        for a, b in zip(one.step(actions)[:3], two.step(actions)[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(one.record.durations, two.record.durations)
    follow = np.array([8, 5, 8, 3])
    np.testing.assert_array_equal(one.branch(follow, 1.0, 5.0), two.branch(follow, 1.0, 5.0))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
def test_a_copy_keeps_the_state_and_goes_its_own_way(copied: Callable[[AgentVecEnv], AgentVecEnv]) -> None:
    env, same = (AgentVecEnv(CONV.grid(), PEAK, 2, num_requests=20) for _ in range(2))
    for each in (env, same):
        each.seed(0)
        each.reset()
        for _ in range(30):
            each.step(np.array([3, 8]))
    other = copied(env)
    kept = everything(env)
    first = [other.step(np.array([8, 3])) for _ in range(30)]
    for array, before in zip(everything(env), kept, strict=True):  # the original stands where it stood
        assert array.tobytes() == before.tobytes()
    second = [same.step(np.array([8, 3])) for _ in range(30)]
    for ours, theirs in zip(first, second, strict=True):
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_array_equal(a, b)


# --- settings -----------------------------------------------------------------------------------------
def test_every_setting_gets_queues_of_one_shape() -> None:
    names = ("two-type", "p512d20", "lmsys", "azure-conv", "azure-code", "sharegpt")
    recipe = Recipe(action_set="peak", num_classes=8, num_segments=1, order="work", token_budget="fluid", features=True)
    domain = Domain(names, (0.4, 1.1), (2200, 8000), (), ("poisson", "gamma-3", "mmpp"))
    settings = domain.sample(12, np.random.default_rng(0))
    env = AgentVecEnv(settings, recipe, 12, num_requests=40, backlog=(0, 10))
    env.seed(0)
    observed = env.reset()
    for _ in range(100):
        assert np.isfinite(observed).all() and observed.min() >= 0 and observed.max() <= 1
        observed, rewards, _, _ = env.step(np.full(12, 8))
        assert (rewards <= 0).all()
    assert len(set(env.record.group)) == 12
    again = domain.sample(12, np.random.default_rng(0))
    assert [s.describe() for s in again] == [s.describe() for s in settings]
    assert Domain.from_dict(domain.describe()) == domain


def test_least_work_first() -> None:
    scenario = load_scenario("azure-conv")
    setting = EnvSetting(scenario, 4.0, scenario.engine)
    recipe = Recipe(action_set="peak", num_classes=8, num_segments=1, order="work")
    layout, engine = recipe.layout_for(scenario.statistics), recipe.engine_for(setting.setting)
    work = class_work(scenario.statistics, layout)
    assert engine.admission_order == "class"
    assert np.array_equal(np.argsort(engine.class_rank), np.argsort(work))
    assert not np.array_equal(np.argsort(work), np.arange(8))  # the longest prompts here have short outputs


def with_formula(scenario: Scenario) -> Scenario:
    """On the smooth iteration times from which the numbers below come."""
    return dataclasses.replace(scenario, engine=scenario.engine.replace(time_model=load_calibration("a100-llama2-7b-c10")))


def test_the_token_budget_follows_the_fluid_model() -> None:
    conv, code, long = (with_formula(load_scenario(name)) for name in ("azure-conv", "azure-code", "mooncake"))
    assert fluid_budget(conv.statistics, conv.engine.replace(num_blocks=2816), 4.8) == 256
    small = code.engine.replace(num_blocks=2816)  # few output tokens: prompts are the main work
    assert [fluid_budget(code.statistics, small, rate) for rate in (4.0, 7.0, 8.8)] == [768, 1024, 1024]
    large = conv.engine.replace(num_blocks=7424)  # 256 tokens an iteration are 93 % of its boundary of 6.5 requests/s
    assert [fluid_budget(conv.statistics, large, rate) for rate in (3.0, 5.4, 6.0, 7.0)] == [256, 256, 384, 384]
    assert first_token_budget(conv.statistics, conv.engine.replace(num_blocks=2816)) == 256
    assert first_token_budget(conv.statistics, large) == 1024
    assert first_token_budget(conv.statistics, large.replace(max_num_batched_tokens=512)) == 512
    few = long.engine.replace(num_blocks=2816)  # five prompts fill the memory, and hold it while they are computed
    assert [fluid_budget(long.statistics, engine, 0.3) for engine in (few, long.engine.replace(num_blocks=7424))] == [512, 256]
    assert first_token_budget(long.statistics, few) == 2048
    paper = load_scenario("two-type")
    assert first_token_budget(paper.statistics, paper.engine) == paper.engine.max_num_batched_tokens
    assert fluid_budget(paper.statistics, paper.engine, 1.0) == paper.engine.max_num_batched_tokens
    whole = EngineConfig.vllm(enable_chunked_prefill=False, max_num_batched_tokens=4096)
    assert fluid_budget(conv.statistics, whole, 1.0) == 4096


def test_prompts_hold_memory_while_they_are_computed() -> None:
    """Against the closed form for one length and linear time: y = C / S requests at a stage, y / tau(y) of them a second."""
    prompt, output, budget, d0, d1 = 8000, 301, 256, 0.01, 1e-6
    statistics = LengthStatistics.of([float(prompt)], [float(output)], [1.0], source="one length")
    engine = EngineConfig.vllm(num_blocks=2816, max_num_batched_tokens=budget, time_model=LinearTime(d0, d1))
    load = output * (prompt + (output - 1) / 2)  # tokens x iterations, the first token from the prefill
    charged = load + 7.5 * output + prompt * prompt / budget
    y = 2816 * 16 / charged
    assert boundary_with_prefill(statistics, engine) == pytest.approx(y / (d0 + d1 * y * load), rel=1e-9)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"action_set": "peaks"}, "action_set"),
        ({"spare": -0.5}, "spare"),
        ({"spare": float("nan")}, "spare"),
        ({"order": "size"}, "order"),
        ({"hold": 0}, "hold"),
        ({"num_classes": True}, "num_classes"),
        ({"action_set": "peak", "levels": (0.0, 1.0)}, "levels"),
        ({"colour": 1}, "colour"),
    ],
)
def test_recipes_refuse(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict(fields)


def test_recipes_round_trip() -> None:
    for recipe in (
        PEAK,
        Recipe(late_last=1.0, engine={"max_num_seqs": 64, "class_rank": (1, 0)}),
        Recipe(layout=load_scenario("azure-conv").known_layout, known_lengths=True),
    ):
        assert Recipe.from_dict(recipe.as_dict()) == recipe


def test_arrivals_by_name() -> None:
    assert arrivals_of("gamma-2.5", 4.0).rate == pytest.approx(4.0)
    assert arrivals_of("mmpp", 4.0).rate == pytest.approx(4.0)
    for bad in ("gamma", "gamma-x", "weibull-2"):
        with pytest.raises(ConfigError, match="bursts"):
            arrivals_of(bad, 1.0)


def test_width_of_the_observation() -> None:
    env = AgentVecEnv(CONV.grid(), PEAK, 2)
    plain = AgentVecEnv(CONV.grid(), Recipe(**{**vars(PEAK), "features": False}), 2)
    assert env.public == plain.public + FEATURES


def test_mixed_traffic_is_of_one_kind_in_every_episode_and_known_as_a_mix() -> None:
    mixed = workload_of("azure-conv+sharegpt")
    parts = [load_scenario("azure-conv"), load_scenario("sharegpt")]
    means = [part.statistics.mean_prompt for part in parts]
    assert mixed.statistics.mean_prompt == pytest.approx(np.mean(means))
    assert mixed.engine == parts[0].engine and mixed.name == "azure-conv+sharegpt"
    seen = [mixed.generate(seed, num_requests=3000).prompt_tokens.mean() for seed in range(12)]
    nearest = [int(np.argmin([abs(mean - value) for mean in means])) for value in seen]
    assert set(nearest) == {0, 1}
    assert all(value == pytest.approx(means[i], rel=0.25) for value, i in zip(seen, nearest, strict=True))
    assert Domain(("azure-conv+sharegpt",), (1.0,)).grid()[0].rate > 0
    with pytest.raises(ConfigError, match="preset"):
        workload_of("azure-conv+two-type")


def test_expected_order_puts_long_outputs_behind_long_prompts() -> None:
    statistics = LengthStatistics.of([100.0, 200.0], [500.0, 10.0], [0.5, 0.5], source="two points")
    setting = Setting(statistics, 1.0, load_scenario("azure-conv").engine)
    recipe = Recipe(num_classes=2, num_segments=1, order="expected")
    cost = class_tokens(statistics, recipe.layout_for(statistics))
    # 95 % of a class are its own requests, 5 % are all.
    everyone = 0.5 * (100 + 3 * 500) + 0.5 * (200 + 3 * 10)
    assert cost == pytest.approx([0.95 * 1600 + 0.05 * everyone, 0.95 * 230 + 0.05 * everyone], rel=0.02)
    assert recipe.engine_for(setting).class_rank == (1, 0)
    assert recipe.engine_for(setting).admission_order == "class"
