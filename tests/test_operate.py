"""Admission of the most urgent first: the walk by hand, against a reference, and at its two ends."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numba
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from llmsched_env import LLMSchedEnv
from llmsched_env.action import AGEING, BUDGETS
from llmsched_env.compiled import compiled
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine.state import Engine
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.forecast import class_work
from llmsched_env.operate import decode_operate, decode_operate_up_to
from llmsched_env.peak import LEVELS, PeakRecord, decode_peak_by_work, forecast_steps, peak_tables
from llmsched_env.records import Record, Vector
from llmsched_env.render.env_viewer import asked_words
from llmsched_env.types import Decision, LengthStatistics, QueueLayout, Workload
from llmsched_env.work import expected_work, work_weights
from llmsched_env.workload import load_scenario

ROOT = Path(__file__).resolve().parents[1]
WIDE = {"max_num_batched_tokens": 10**6, "max_num_seqs": 10**5}
"""An engine in which neither tokens nor seats bind."""


class OperateRecord(Record):
    level: float
    tau0: float
    budget: int
    cost: Vector
    peak: PeakRecord


@compiled
def operate(engine: Engine, policy: OperateRecord, decision: Decision) -> None:
    decision.token_budget = policy.budget
    decode_operate(engine, policy.peak, policy.level, policy.cost, policy.tau0, decision)


@compiled
def by_work(engine: Engine, policy: OperateRecord, decision: Decision) -> None:
    decision.token_budget = 0
    decode_peak_by_work(engine, policy.peak, policy.level, decision)


def rule_of(
    statistics: LengthStatistics, layout: QueueLayout, engine: EngineConfig, function: Callable[..., None] = operate, **chosen: Any
) -> Rule:
    tables = peak_tables(statistics, layout, engine)
    cost = np.asarray(chosen.pop("cost", class_work(statistics, layout)), dtype=np.float64)
    record = OperateRecord(cost=cost, peak=tables.record())
    for name, value in {"level": 0.9, "tau0": math.inf, "budget": 0, **chosen}.items():
        setattr(record, name, value)
    return Rule(function, layout.num_queues, record)


def started(workload: Workload, layout: QueueLayout, engine: EngineConfig) -> SimBackend:
    backend = SimBackend()
    backend.reset(workload, layout, engine, EpisodeLimits())
    return backend


TWO = LengthStatistics.of([10.0, 100.0], [20.0, 20.0], [0.5, 0.5])
LAYOUT = QueueLayout("prompt", (50,))
LONG_AGO = Workload.of([0.0, 5.0, 6.0, 7.0], [100, 10, 10, 100], [20, 20, 20, 20])
"""A long request that has waited since 0, two short newcomers and a long one."""


@pytest.mark.parametrize("tau0", [0.0, 1.0, 30.0, math.inf])
def test_short_ones_come_first_where_nobody_has_waited_long_for_its_work(tau0: float) -> None:
    """Works 1 and 4, waits 8 s (long), 3 and 2 (short): (8 + tau0) / 4 is never above 2 + tau0; of equals the first class enters."""
    assert admitted(tau0, [1.0, 4.0], 2) == [2, 0]
    assert admitted(tau0, [1.0, 4.0], 3) == [2, 1]


@pytest.mark.parametrize("tau0", [0.0, 5.0, 7.0, 9.0, 10.0, 20.0, math.inf])
def test_a_long_one_that_has_waited_enough_overtakes(tau0: float) -> None:
    """Works 1 and 1.5: (8 + tau0) / 1.5 is above the 3 + tau0 of the first short one below 7 s, above the second's 2 + tau0 below 10 s."""
    assert admitted(tau0, [1.0, 1.5], 3) == [2, 1]
    most = 2 if tau0 >= 10 else 1  # of two seats
    assert admitted(tau0, [1.0, 1.5], 2) == [most, 2 - most]
    first = [1, 0] if tau0 >= 7 else [0, 1]
    assert admitted(tau0, [1.0, 1.5], 1) == first


def admitted(tau0: float, cost: list[float], seats: int) -> list[int]:
    """What enters at 8 s of ``LONG_AGO``, by class."""
    engine = EngineConfig.vllm(num_blocks=400, max_num_seqs=seats)
    backend = started(LONG_AGO, LAYOUT, engine)
    held = Decision.of([1, 1], [0, 0])
    while backend.record.next_arrival < len(LONG_AGO):
        backend.step(held)
    backend.record.clock = 8.0
    decision = rule_of(TWO, LAYOUT, engine, tau0=tau0, cost=cost).decide(backend.snapshot())
    return decision.admit.tolist()


def test_the_next_of_a_queue_counts_with_its_own_wait() -> None:
    """Both classes cost the same; waits 8 (long), 3, 2 (short), 1 (long): the order is that of arrival."""
    for seats, entering in ((1, [0, 1]), (2, [1, 1]), (3, [2, 1]), (4, [2, 2])):
        assert admitted(5.0, [2.0, 2.0], seats) == entering


def test_no_more_residents_than_tokens_of_the_budget() -> None:
    n = 400
    workload = Workload.of(np.zeros(n), np.ones(n, int), np.full(n, 50))
    engine = EngineConfig.vllm(num_blocks=7_424, max_num_seqs=256)
    for budget, most in ((0, 256), (128, 128), (192, 192), (10_000, 256)):
        backend = started(workload, LAYOUT, engine)
        rule = rule_of(TWO, LAYOUT, engine, budget=budget, level=math.inf)
        seen = 0
        for _ in range(30):
            backend.step(rule.decide(backend.snapshot()))
            seen = max(seen, backend.record.num_residents)
        assert seen == most


def test_only_what_can_begin_is_asked_for() -> None:
    """Prompts of 100 tokens and a budget of 256: three begin, the third with what is left."""
    workload = Workload.of(np.zeros(9), np.full(9, 100), np.full(9, 20))
    engine = EngineConfig.vllm(num_blocks=400)
    backend = started(workload, LAYOUT, engine)
    rule = rule_of(TWO, LAYOUT, engine, budget=256)
    decision = rule.decide(backend.snapshot())
    assert decision.admit.tolist() == [0, 3] and decision.token_budget == 256
    assert backend.step(decision).admitted == 3
    # 44 tokens of the third are left to prefill, two decode: 210 of 256 tokens for others.
    assert rule.decide(backend.snapshot()).admit.tolist() == [0, 3]


def test_an_empty_engine_takes_the_first_whatever_it_needs() -> None:
    workload = Workload.of([0.0, 0.0], [900, 900], [50, 50])
    engine = EngineConfig.vllm(num_blocks=64, max_model_len=1_000)
    backend = started(workload, LAYOUT, engine)
    assert rule_of(TWO, LAYOUT, engine, level=0.1).decide(backend.snapshot()).admit.tolist() == [0, 1]


@pytest.mark.parametrize("level", [0.5, 0.9, math.inf])
@pytest.mark.parametrize("name", ["azure-conv-40gb", "two-type"])
def test_an_infinite_tau0_is_the_order_by_work(name: str, level: float) -> None:
    scenario = load_scenario(name)
    engine = scenario.engine.replace(**WIDE) if scenario.engine.preset == "vllm" else scenario.engine
    workload = scenario.generate(3, rate=1.5 * scenario.rate, num_requests=150).with_backlog(60)
    ours, theirs = started(workload, scenario.layout, engine), started(workload, scenario.layout, engine)
    operating = rule_of(scenario.statistics, scenario.layout, engine, level=level)
    least = rule_of(scenario.statistics, scenario.layout, engine, by_work, level=level)
    entered = 0
    while not ours.done:
        decision, other = operating.decide(ours.snapshot()), least.decide(theirs.snapshot())
        assert decision.admit.tolist() == other.admit.tolist()
        entered += ours.step(decision).admitted
        theirs.step(other)
    assert theirs.done and entered >= 150
    np.testing.assert_array_equal(ours.log().completed, theirs.log().completed)


def reference(backend: SimBackend, rule: Rule, statistics: LengthStatistics) -> list[int]:
    """The walk in plain Python, from what a view shows."""
    view, layout, engine, record = backend.snapshot(), backend.layout, backend.engine, rule.policy
    tables, steps = peak_tables(statistics, layout, engine), forecast_steps(statistics.max_output)
    last = tables.survival.shape[1] - 1

    def course(j: int, prompt: int, tokens: int) -> Any:
        return tables.survival[j, min(tokens, last)].astype(float) * (prompt + tokens + tables.headroom + steps)

    residents = view.resident_requests()
    rows = list(zip(residents.queue, residents.prompt_tokens, residents.generated, residents.computed, strict=True))
    total = sum((course(int(q) // layout.num_segments, int(p), int(g)) for q, p, g, _ in rows), np.zeros(steps.size))
    budget = min(max(record.budget, 128), engine.max_num_batched_tokens) if record.budget else engine.max_num_batched_tokens
    seats = min(budget, engine.max_num_seqs) - view.num_residents
    target = residents.prefill_target
    tokens = budget - sum(max(int(t) - int(c), 1) for t, (_, _, _, c) in zip(target, rows, strict=True))
    queues = []
    for j in range(layout.num_classes):
        w = view.waiting_requests(j, 10**6)
        queues.append(list(zip(w.arrival.tolist(), w.prompt_tokens.tolist(), w.generated.tolist(), strict=True)))
    capacity = engine.kv_capacity_tokens
    admit = [0] * layout.num_classes
    empty = view.num_residents == 0
    while any(queues) and seats > 0 and tokens > 0:

        def urgency(j: int) -> float:
            work = record.cost[j]
            return -work if math.isinf(record.tau0) else (view.clock - queues[j][0][0] + record.tau0) / work

        best = max((j for j in range(layout.num_classes) if queues[j]), key=urgency)
        _, prompt, kept = queues[best][0]
        new = total + course(best, prompt, kept)
        fits = new[0] <= capacity if math.isinf(record.level) else (new <= record.level * capacity).all()
        if not fits and not empty:
            break
        total, empty = new, False
        admit[best] += 1
        seats -= 1
        tokens -= prompt + kept
        queues[best].pop(0)
    return admit


@pytest.mark.parametrize("tau0", [0.0, 3.0, 30.0, math.inf])
@pytest.mark.parametrize(("level", "budget"), [(0.8, 0), (0.95, 256), (math.inf, 512)])
def test_the_walk_is_that_of_a_reference(tau0: float, level: float, budget: int) -> None:
    scenario = load_scenario("azure-conv-40gb")
    engine = scenario.engine.replace(num_blocks=1_000, max_num_seqs=48)
    workload = scenario.generate(5, rate=8.0, num_requests=120).with_backlog(50)
    backend = started(workload, scenario.layout, engine)
    rule = rule_of(scenario.statistics, scenario.layout, engine, tau0=tau0, level=level, budget=budget)
    entered = asked = 0
    while not backend.done:
        expected = reference(backend, rule, scenario.statistics)
        decision = rule.decide(backend.snapshot())
        outside = decision.admit.reshape(scenario.layout.num_classes, -1)[:, 0]
        assert outside.tolist() == expected
        report = backend.step(decision)
        if not report.preempted:
            asked += int(outside.sum())
            entered += report.admitted
    assert entered >= 120
    assert entered >= 0.95 * asked  # what is asked for begins, unless the blocks of a whole prompt lack


def test_arrival_times_are_of_those_who_have_arrived() -> None:
    scenario = load_scenario("azure-conv-40gb")
    workload = scenario.generate(0, num_requests=50)
    backend = started(workload, scenario.layout, scenario.engine)
    greedy = Decision.greedy(scenario.layout.num_queues)
    for _ in range(200):
        times, now = backend.record.arrived.time, backend.record.clock
        arrived = workload.arrival <= now
        np.testing.assert_array_equal(times[arrived], workload.arrival[arrived])
        assert np.isnan(times[~arrived]).all()
        backend.step(greedy)


# --- at most so many residents, and tables by groups ----------------------------------------------------
class UpToRecord(Record):
    level: float
    tau0: float
    budget: int
    most: float
    cost: Vector
    peak: PeakRecord


@compiled
def up_to(engine: Engine, policy: UpToRecord, decision: Decision) -> None:
    decision.token_budget = policy.budget
    decode_operate_up_to(engine, policy.peak, policy.level, policy.cost, policy.tau0, policy.most, decision)


def up_to_rule(
    statistics: LengthStatistics, layout: QueueLayout, engine: EngineConfig, most: float, peak: PeakRecord | None = None
) -> Rule:
    record = UpToRecord(cost=class_work(statistics, layout), peak=peak or peak_tables(statistics, layout, engine).record())
    record.level, record.tau0, record.most = 0.9, math.inf, most
    return Rule(up_to, layout.num_queues, record)


@pytest.mark.parametrize(("most", "seen"), [(math.inf, 12), (100.0, 12), (7.9, 7), (1.0, 1), (0.2, 1), (0.0, 1)])
@pytest.mark.parametrize("paper", [False, True])
def test_no_more_residents_than_are_allowed_and_never_nobody(most: float, seen: int, paper: bool) -> None:
    workload = Workload.of(np.zeros(40), np.full(40, 10), np.full(40, 20))
    engine = EngineConfig.paper(12 * 30 + 30, 0.01, 1e-6) if paper else EngineConfig.vllm(num_blocks=400, max_num_seqs=12)
    backend = started(workload, LAYOUT, engine)
    rule = up_to_rule(TWO, LAYOUT, engine, most)
    found = 0
    while not backend.done:
        backend.step(rule.decide(backend.snapshot()))
        found = max(found, backend.record.num_residents)
    if not paper or most < 12:
        assert found == seen
    assert backend.counters().finished == 40 and backend.counters().drain_iterations == 0


def test_a_smaller_cap_only_ends_admission() -> None:
    """More residents than are allowed now stay as they are."""
    workload = Workload.of(np.zeros(40), np.full(40, 10), np.full(40, 20))
    engine = EngineConfig.vllm(num_blocks=400)
    backend = started(workload, LAYOUT, engine)
    rule = up_to_rule(TWO, LAYOUT, engine, 10.0)
    backend.step(rule.decide(backend.snapshot()))
    assert backend.record.num_residents == 10
    rule.policy.most = 4.0
    decision = rule.decide(backend.snapshot())
    assert decision.admit.tolist() == [0, 0] and decision.run.tolist() == [1, 1] and decision.evict.tolist() == [0, 0]


@pytest.mark.parametrize("name", ["azure-conv-40gb", "two-type"])
def test_a_table_by_groups_and_ranges_is_the_full_one(name: str) -> None:
    """Pairs of classes, and lengths in ranges of five: the same decisions as from a table with a row for each class and length."""
    scenario = load_scenario(name)
    full = peak_tables(scenario.statistics, scenario.layout, scenario.engine).record()
    classes, lengths = full.survival.shape[:2]
    group, place = np.arange(classes) // 2, np.arange(lengths) // 5
    small = np.ascontiguousarray(full.survival[::2, ::5])
    parts = {"steps": full.steps, "by_work": full.by_work}
    scratch = [{"total": np.zeros(full.steps.size), "own": np.zeros(full.steps.size)} for _ in range(2)]
    by_group = PeakRecord(survival=small, group=group, place=place, **parts, **scratch[0])
    spread = np.ascontiguousarray(small[group][:, place])
    one_by_one = PeakRecord(survival=spread, group=np.arange(classes), place=np.arange(lengths), **parts, **scratch[1])
    by_group.headroom = one_by_one.headroom = full.headroom
    workload = scenario.generate(3, rate=1.5 * scenario.rate, num_requests=150).with_backlog(60)
    backend = started(workload, scenario.layout, scenario.engine)
    rules = [up_to_rule(scenario.statistics, scenario.layout, scenario.engine, math.inf, peak) for peak in (by_group, one_by_one)]
    while not backend.done:
        one, other = (rule.decide(backend.snapshot()) for rule in rules)
        assert one.admit.tolist() == other.admit.tolist()
        np.testing.assert_array_equal(rules[0].policy.peak.total, rules[1].policy.peak.total)
        backend.step(one)


# --- the action set ----------------------------------------------------------------------------------
SMALL: dict[str, Any] = {"action_set": "operate", "num_requests": 60, "backlog": 40, "engine": {"num_blocks": 400}}


def test_an_action_has_a_level_ageing_and_a_budget() -> None:
    env = LLMSchedEnv(**SMALL)
    assert env.action_space == gym.spaces.MultiDiscrete([len(LEVELS), len(AGEING), len(BUDGETS)])
    _, info = env.reset(seed=0)
    assert info["action_mask"].all() and info["action_mask"].shape == (len(LEVELS) + len(AGEING) + len(BUDGETS),)
    paper = LLMSchedEnv("two-type", action_set="operate", class_by="type")
    assert paper.action_space == gym.spaces.MultiDiscrete([len(LEVELS), len(AGEING)])
    one_class = LLMSchedEnv(**SMALL, class_by="single", token_budgets=(0,))
    assert one_class.action_space == gym.spaces.MultiDiscrete([len(LEVELS), 1])
    small = LLMSchedEnv(action_set="operate", engine={"max_num_batched_tokens": 300})
    assert small.codec.token_budgets == (128, 256, 0)


def test_an_action_is_the_rule_of_its_numbers() -> None:
    env = LLMSchedEnv(**SMALL, hold=1)
    env.reset(seed=3)
    statistics = env.scenario.statistics
    cost = expected_work(statistics, env.layout, work_weights(env.engine, statistics))
    rng = np.random.default_rng(0)
    admitted = 0
    over = False
    while not over:
        action = np.array([rng.integers(size) for size in env.action_space.nvec])
        chosen = {"level": LEVELS[action[0]], "tau0": AGEING[action[1]], "budget": BUDGETS[action[2]]}
        decision = rule_of(statistics, env.layout, env.engine, cost=cost, **chosen).decide(env.view())
        expected = decision.admit.tolist()
        _, _, terminated, truncated, _ = env.step(action)
        assert env._decision.admit.tolist() == expected and env._decision.token_budget == chosen["budget"]
        admitted += int(decision.admit.reshape(env.layout.num_classes, -1)[:, 0].sum())
        over = terminated or truncated
    assert admitted >= 60


@pytest.mark.parametrize("chosen", [{"scenario": "azure-conv-40gb"}, {"scenario": "two-type", "class_by": "type"}])
def test_many_at_once_are_one_by_one(chosen: dict[str, Any]) -> None:
    settings = {**chosen, "action_set": "operate", "num_requests": 40, "backlog": 20, "hold": 3, "hold_seconds": 0.0}
    envs = gym.make_vec("llmsched_env:LLMSched-v1", num_envs=3, autoreset_mode="SameStep", **settings)
    single = [LLMSchedEnv(**settings) for _ in range(3)]
    observations, _ = envs.reset(seed=5)
    for i, env in enumerate(single):
        observation, _ = env.reset(seed=5 + i)
        for name, value in observation.items():
            np.testing.assert_array_equal(value, observations[name][i])
    rng = np.random.default_rng(1)
    over = np.zeros(3, dtype=bool)
    for _ in range(60):
        actions = rng.integers(0, envs.single_action_space.nvec, (3, envs.single_action_space.shape[0]))
        observations, rewards, terminated, truncated, _ = envs.step(actions)
        for i, env in enumerate(single):
            if over[i]:
                continue
            observation, reward, ended, cut, _ = env.step(actions[i])
            assert reward == rewards[i] and ended == terminated[i] and cut == truncated[i]
            over[i] = ended or cut
            if not over[i]:
                for name, value in observation.items():
                    np.testing.assert_array_equal(value, observations[name][i])


def test_the_environment_passes_gymnasiums_checks() -> None:
    env = gym.make("llmsched_env:LLMSched-v1", **SMALL, disable_env_checker=True)
    check_env(env.unwrapped, skip_render_check=True)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"ageing": (1.0,), "action_set": "peak"}, "ageing: .* is for action_set='operate', not 'peak'"),
        ({"orders": ("work",)}, "orders: .* is for action_set='peak', not 'operate'"),
        ({"ageing": (-1.0,)}, "ageing"),
        ({"ageing": (math.nan,)}, "ageing"),
        ({"ageing": 5.0}, "ageing"),
        ({"levels": ()}, "levels"),
        ({"token_budgets": (200,)}, "token_budgets: 200, must be a multiple of 128"),
        ({"scenario": "two-type", "token_budgets": (128,)}, "token_budgets: .*paper preset"),
    ],
)
def test_settings_are_refused_by_name(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        LLMSchedEnv(**{"action_set": "operate", **wrong})


def test_a_picture_says_what_was_asked() -> None:
    env = LLMSchedEnv(**SMALL)
    assert asked_words(env.codec, np.array([4, 2, 0])) == "level 0.9, ageing 60 s"
    assert asked_words(env.codec, np.array([6, 4, 0])) == "no limit, least work first"


def test_all_of_this_holds_in_plain_python_too() -> None:
    if numba.config.DISABLE_JIT:
        return
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1")
    chosen = "overtakes or short_ones or own_wait or budget or begin or empty or (reference and 3.0 and 256) or rule_of_its_numbers"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", f"({chosen}) and not plain_python", __file__]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
