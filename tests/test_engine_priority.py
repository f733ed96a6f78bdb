"""Scheduling by priority: traces worked by hand, random episodes against the reference, the record, refusals."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs
from lockstep import Case, compare_many, random_episode
from test_engine_vllm import random_engine

import llmsched_env
from llmsched_baselines import Setting, make_policy
from llmsched_baselines.overrides import parse_overrides
from llmsched_env.backends import make_backend
from llmsched_env.bench.replay import from_first_arrival
from llmsched_env.engine import state as st
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime
from llmsched_env.types import MOST_PRIORITY, Decision, QueueLayout, Workload
from llmsched_env.vector import LLMSchedVectorEnv
from llmsched_env.workload import load_scenario
from tests.engine_walk import check_engine, differing, shown
from tests.env_settings import ADMIT

Told = tuple[dict[int, int], list[int]]


def small(**options: Any) -> EngineConfig:
    """An iteration takes a second; 10 blocks of 4 tokens."""
    sizes = {"num_blocks": 10, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": 32, "max_model_len": 40}
    return EngineConfig.vllm(time_model=LinearTime(1.0, 0.0), **{**sizes, "scheduling_policy": "priority", **options})


def told(
    engine: EngineConfig, requests: list[tuple[float, int, int, int]], decisions: list[Decision] | None = None, most: int = 1_000
) -> list[Told]:
    """(tokens by request, preempted) of each step; requests are (arrival, prompt, output, priority).

    With ``decisions`` each request is a class of its own, and there is no drain.
    """
    backend = make_backend("sim", trace=True)
    assert isinstance(backend, SimBackend)
    arrival, prompt, output, priority = zip(*requests, strict=True)
    layout = QueueLayout(by="type", num_types=len(requests)) if decisions else QueueLayout()
    workload = Workload.of(arrival, prompt, output, np.arange(len(requests)) if decisions else None, priority=priority)
    backend.reset(workload, layout, engine, EpisodeLimits(drain=not decisions))
    found: list[Told] = []
    while not backend.done and len(found) < most:
        report = backend.step(decisions[len(found)] if decisions and len(found) < len(decisions) else Decision.greedy(layout.num_queues))
        check_engine(backend)
        ids, tokens = backend.scheduled()
        found.append((dict(zip(ids.tolist(), tokens.tolist(), strict=True)), list(report.preempted)))
    return found


# --- who enters -----------------------------------------------------------------------------------------
def test_the_waiting_enter_by_priority_then_arrival_then_number() -> None:
    """One seat: C is the most urgent of those at time 0, A and B are equal, D comes later with B's priority, E last and first."""
    requests = [(0.0, 4, 1, 2), (0.0, 4, 1, 2), (0.0, 4, 1, 0), (0.5, 4, 1, 2), (1.5, 4, 1, -7)]
    steps = told(small(max_num_seqs=1), requests)
    assert [list(tokens) for tokens, _ in steps] == [[2], [0], [4], [1], [3]]


def test_without_priorities_it_is_the_order_of_arrival() -> None:
    """The column left out: all are 0. What differs from ``fcfs`` is preemption alone, of which there is none."""
    workload = Workload.of([0.0, 0.0, 0.5, 1.0], [4, 9, 5, 3], [3, 5, 2, 4])
    logs = []
    for policy in ("fcfs", "priority"):
        backend = make_backend("sim")
        backend.reset(workload, QueueLayout(), small(scheduling_policy=policy), EpisodeLimits())
        while not backend.done:
            backend.step(Decision.greedy(1))
        logs.append(backend.log())
    assert all(
        np.array_equal(getattr(logs[0], name), getattr(logs[1], name), equal_nan=True) for name in ("admitted", "first_token", "completed")
    )


def test_an_engine_without_the_policy_reads_no_priority() -> None:
    requests = [(0.0, 4, 1, 2), (0.0, 4, 1, 0)]
    assert [list(tokens) for tokens, _ in told(small(max_num_seqs=1, scheduling_policy="fcfs"), requests)] == [[0], [1]]


# --- who is preempted -----------------------------------------------------------------------------------
def test_who_preempts_itself_does_not_end_the_iteration() -> None:
    """Four blocks. A (priority 1) holds 8 tokens in two, B (0), after it, 5 in two. A needs a third and is itself the least urgent;
    B goes on in the same iteration, as in vLLM 0.33 and not before."""
    steps = told(small(num_blocks=4, max_model_len=16), [(0.0, 7, 4, 1), (0.5, 5, 4, 0)])
    assert steps[:4] == [({0: 7}, []), ({0: 1, 1: 5}, []), ({1: 1}, [0]), ({1: 1}, [])]


def test_a_victim_that_was_served_before_computes_nothing() -> None:
    """Five blocks: A (priority 1) has 9 tokens in three, B (0) 8 in two. A is served first and needs none; B needs a third, and A goes."""
    steps = told(small(num_blocks=5, max_model_len=20), [(0.0, 8, 9, 1), (0.5, 8, 3, 0)])
    assert steps[:4] == [({0: 8}, []), ({0: 1, 1: 8}, []), ({1: 1}, [0]), ({1: 1}, [])]


def test_the_budget_that_a_victim_gives_back_is_used() -> None:
    """Budget 12, ten blocks. After three iterations A (priority 1) holds 30 tokens in eight blocks, B and C (0) 4 and 2 in one each. A is
    served with 1 token, B needs a block, and A goes: C, 18 tokens short, computes 11 of them and not 10."""
    engine = small(max_num_batched_tokens=12, scheduler_reserve_full_isl=False)
    steps = told(engine, [(0.0, 30, 9, 1), (0.5, 4, 9, 0), (0.5, 20, 2, 0)])
    assert steps[:4] == [({0: 12}, []), ({0: 12}, []), ({0: 6, 1: 4, 2: 2}, []), ({1: 1, 2: 11}, [0])]


def test_a_chunk_of_a_prompt_is_undone_with_its_blocks() -> None:
    """Eight blocks, 8 tokens of a prompt an iteration. A (priority 1) holds 20 in five, B (0) 4 in one. A's next chunk takes the last two
    blocks, then B needs one: A loses its chunk and all it had, and begins again beside B."""
    sizes = {"num_blocks": 8, "max_model_len": 32, "max_num_batched_tokens": 12}
    engine = small(**sizes, long_prefill_token_threshold=8, scheduler_reserve_full_isl=False)
    steps = told(engine, [(0.0, 30, 2, 1), (0.5, 4, 9, 0)])
    assert steps[:4] == [({0: 12}, []), ({0: 8, 1: 4}, []), ({1: 1}, [0]), ({1: 1, 0: 8}, [])]


def test_of_equal_ones_the_first_admitted_is_preempted() -> None:
    """Equal priority and arrival: the first of the running goes. Of two arrivals the later goes."""
    engine = small(num_blocks=4, max_model_len=16)
    assert told(engine, [(0.0, 8, 4, 0), (0.0, 8, 4, 0)])[1] == ({1: 1}, [0])
    steps = told(engine, [(0.0, 5, 9, 0), (0.5, 5, 9, 0)])
    assert steps[3:5] == [({0: 1, 1: 1}, []), ({0: 1}, [1])]


def test_nobody_enters_where_somebody_is_preempted() -> None:
    """C, the most urgent, arrives in iteration 1 and has to wait for iteration 3: iteration 2 preempts A."""
    steps = told(small(num_blocks=4, max_model_len=16), [(0.0, 8, 4, 1), (0.0, 8, 4, 0), (0.5, 1, 1, -1)])
    assert steps[1] == ({1: 1}, [0]) and 2 in steps[2][0]


def test_a_held_request_is_no_victim() -> None:
    """The least urgent is held in a segment of its own: the other one, which runs, preempts itself."""
    steps = told(small(num_blocks=4, max_model_len=16), [(0.0, 8, 4, 5), (0.0, 8, 4, 0)], [Decision.greedy(2), Decision.of([0, 1], [0, 0])])
    assert steps[1] == ({}, [1])


def test_a_preempted_request_goes_back_to_its_place() -> None:
    """A (priority 1) is preempted while B2 (0) and C (1) wait: B2 stands before it, C, which came later, behind it."""
    backend = make_backend("sim")
    workload = Workload.of([0.0, 0.0, 0.5, 0.6], [8, 8, 8, 8], [4, 4, 4, 4], priority=[1, 0, 1, 0])
    view = backend.reset(workload, QueueLayout(), small(num_blocks=4, max_model_len=16), EpisodeLimits())
    backend.step(Decision.greedy(1))
    assert view.waiting_requests(0, 9).id.tolist() == [3, 2]
    assert backend.step(Decision.greedy(1)).preempted == (0,)
    waiting = view.waiting_requests(0, 9)
    assert waiting.id.tolist() == [3, 0, 2]
    assert waiting.key.tolist() == [3, st.PRIORITY_STEP, st.PRIORITY_STEP + 2]
    assert view.head_key.tolist() == [3]


def test_a_prefill_that_was_undone_begins_the_interval_anew() -> None:
    """Interval 3. A (priority 1) computes beside B (0) in iteration 2, waits in 3 and 4, and loses its chunk of iteration 5 to B's block.
    To vLLM that iteration carried prefill: A enters again in iteration 8, not in iteration 6."""
    sizes = {"num_blocks": 8, "max_model_len": 32, "max_num_batched_tokens": 12}
    engine = small(**sizes, long_prefill_token_threshold=8, scheduler_reserve_full_isl=False)
    steps = told(engine.replace(prefill_schedule_interval=3), [(0.0, 30, 2, 1), (0.5, 2, 12, 0)])
    assert steps[:4] == [({0: 12}, []), ({0: 8, 1: 2}, []), ({1: 1}, []), ({1: 1}, [])]
    assert steps[4:8] == [({1: 1}, [0]), ({1: 1}, []), ({1: 1}, []), ({1: 1, 0: 8}, [])]


def test_an_iteration_left_empty_by_preemption_carries_prefill_too() -> None:
    """Interval 3, ten blocks. C, held from its first token on, has six, A (priority 1) one, B (0) three. A's last chunk needs none, B's 2:
    A goes, then B itself. Nothing is computed, and yet prefill waits for two iterations."""
    engine = small(max_num_batched_tokens=12, scheduler_reserve_full_isl=False, prefill_schedule_interval=3)
    decisions = [
        Decision.of([1, 1, 1], [1, 0, 0]),
        Decision.of([1, 1, 1], [0, 1, 0]),
        Decision.of([0, 0, 1], [0, 0, 1]),
        Decision.of([0, 1, 1], [0, 0, 0]),
    ]
    steps = told(engine, [(0.0, 23, 9, -1), (0.0, 3, 2, 1), (0.0, 20, 2, 0)], decisions)
    assert steps[:4] == [({0: 12}, []), ({0: 11, 1: 1}, []), ({2: 12}, []), ({}, [1, 2])]
    assert steps[4:7] == [({0: 1}, []), ({0: 1}, []), ({0: 1, 2: 11}, [])]


# --- against the reference --------------------------------------------------------------------------------
def by_priority(rng: np.random.Generator, workload: Workload) -> EngineConfig:
    engine = random_engine(rng, workload).replace(padded_prefill=False, decode_needs_free_block=False, admission_order="arrival")
    return engine.replace(
        scheduling_policy="priority",
        prefill_schedule_interval=int(rng.choice([1, 1, 2, 5])),
        max_num_active_seqs=int(rng.integers(1, engine.max_num_seqs + 1)) if rng.random() < 0.3 else None,
        long_prefill_token_threshold=min(int(rng.choice([0, 0, 3, 10])), engine.max_model_len),
    )


def priority_case(seed: int) -> Case:
    case = random_episode(seed, by_priority)
    priority = np.random.default_rng((seed, 3)).integers(-1, 3, len(case.workload))
    return replace(case, workload=replace(case.workload, priority=priority.astype(np.int32)))


def test_random_episodes_equal_the_reference() -> None:
    total, preempting = compare_many(priority_case, range(100))
    assert preempting > 40, total
    assert total.iterations > 8_000, total
    assert total.evictions > 100, total
    assert total.partial > 300, total


@pytest.mark.slow
def test_many_random_episodes_equal_the_reference() -> None:
    total, preempting = compare_many(priority_case, range(30_000, 31_200))
    assert preempting > 500, total


# --- the record ---------------------------------------------------------------------------------------------
@settings(max_examples=80, deadline=None)
@given(
    rows=hs.lists(
        hs.tuples(hs.sampled_from([0.0, 0.0, 0.3, 1.0]), hs.integers(1, 14), hs.integers(1, 10), hs.integers(-2, 2)),
        min_size=1,
        max_size=14,
    ),
    blocks=hs.integers(6, 16),
    budget=hs.integers(6, 30),
    ends=hs.sampled_from([(), (3,), (2, 6)]),
    asynchronous=hs.booleans(),
    caching=hs.booleans(),
    seed=hs.integers(0, 2**20),
)
def test_the_record_is_in_order_after_every_step(
    rows: list[tuple[float, int, int, int]],
    blocks: int,
    budget: int,
    ends: tuple[int, ...],
    asynchronous: bool,
    caching: bool,
    seed: int,
) -> None:
    gaps, prompt, output, priority = zip(*rows, strict=True)
    workload = Workload.of(np.cumsum(gaps), prompt, output, priority=priority)
    options = {"async_scheduling": asynchronous, "enable_prefix_caching": caching}
    engine = small(num_blocks=blocks, max_num_batched_tokens=budget, max_num_seqs=6, max_model_len=24, **options)
    layout = QueueLayout(segment_ends=ends)
    backend = SimBackend(trace=True)
    view = backend.reset(workload, layout, engine, EpisodeLimits())
    rng = np.random.default_rng(seed)
    for _ in range(3_000):
        if backend.done:
            break
        q = layout.num_queues
        wild = rng.random() < 0.3
        decision = Decision.of(rng.integers(0, 2, q), rng.integers(0, 3, q), rng.integers(0, 2, q)) if wild else Decision.greedy(q)
        report = backend.step(decision)
        check_engine(backend)
        waiting = view.waiting_requests(0, 99).id
        order = [(int(workload.priority[r]), float(workload.arrival[r]), int(r)) for r in waiting]  # type: ignore[index]
        assert order == sorted(order)
        victims = [(int(workload.priority[r]), float(workload.arrival[r])) for r in report.preempted]  # type: ignore[index]
        assert victims == sorted(victims, reverse=True) or report.forced_drain
        assert not set(report.preempted) & set(backend.scheduled()[0].tolist()) or report.forced_drain
    assert backend.end == "finished"


def test_queue_keys_say_nothing_of_requests_to_come() -> None:
    """Two episodes whose later requests have other priorities: everything shown is the same until they arrive."""
    engine = small()
    backends = []
    for priority in ([1, 0, 2, 2], [1, 0, -400, 2]):
        backend = SimBackend()
        backend.reset(Workload.of([0.0, 0.0, 5.5, 6.0], [8] * 4, [9] * 4, priority=priority), QueueLayout(), engine, EpisodeLimits())
        backends.append(backend)
    for _ in range(5):
        assert not differing(*(shown(backend.record) for backend in backends))
        for backend in backends:
            backend.step(Decision.greedy(1))
    for backend in backends:
        backend.step(Decision.of([0], [0]))
    assert differing(*(shown(backend.record) for backend in backends))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda backend: pickle.loads(pickle.dumps(backend))])
def test_a_copy_goes_on_from_where_it_was(copied: Any) -> None:
    case = priority_case(7)
    backend = SimBackend()
    backend.reset(case.workload, case.layout, case.engine, case.limits)
    for number in range(10):
        backend.step(case.decide(number))
    other = copied(backend)
    number = 10
    while not backend.done:
        assert backend.step(case.decide(number)) == other.step(case.decide(number))
        number += 1
    assert other.done


# --- workloads ------------------------------------------------------------------------------------------------
def test_a_workload_keeps_its_priorities() -> None:
    workload = Workload.of([1.0, 2.0, 3.0], [5] * 3, [5] * 3, priority=[2, 0, -1])
    assert workload.priority is not None and workload.priority.dtype == np.int32
    for other in (workload.with_backlog(2), from_first_arrival(workload), pickle.loads(pickle.dumps(workload))):
        assert other.priority is not None and other.priority.tolist() == [2, 0, -1]
    assert Workload.of([1.0], [5], [5]).priority is None


@pytest.mark.parametrize(
    ("priority", "message"),
    [
        ([0, MOST_PRIORITY + 1], r"workload\.priority: row 1 is 501, must be an integer from -500 to 500"),
        ([-501, 0], r"workload\.priority: row 0 is -501"),
        ([0.5, 0], r"workload\.priority: row 0 is 0\.5"),
        ([0], r"workload\.priority: shape \(1,\), must be \(2,\) as arrival has"),
    ],
)
def test_priorities_are_checked(priority: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Workload.of([0.0, 1.0], [5, 5], [5, 5], priority=priority)


def test_more_requests_than_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(st, "PRIORITY_STEP", 2)
    with pytest.raises(ConfigError, match=r"workload: 3 requests, must be at most 2 with engine\.scheduling_policy='priority'"):
        SimBackend().reset(Workload.of([0.0] * 3, [5] * 3, [5] * 3), QueueLayout(), small(), EpisodeLimits())


# --- values -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheduling_policy": "lifo"}, r"engine\.scheduling_policy: 'lifo', must be (one of )?'?fcfs"),
        ({"late_after": 2.0}, r"engine\.late_after: 2\.0, must be 0\.0 with scheduling_policy='priority'"),
        ({"admission_order": "class"}, r"engine\.admission_order: 'class', must be 'arrival' with scheduling_policy='priority'"),
        ({"decode_needs_free_block": True}, r"engine\.decode_needs_free_block: True, must be False with scheduling_policy='priority'"),
        (
            {"padded_prefill": True, "enable_chunked_prefill": False, "max_num_batched_tokens": 64},
            r"engine\.padded_prefill: True, must be False with scheduling_policy='priority'",
        ),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small(**options)


def test_the_paper_preset_has_no_priorities() -> None:
    with pytest.raises(ConfigError, match=r"engine\.scheduling_policy: 'priority', but it is an option of the vllm preset"):
        EngineConfig.paper(1000, 1.0, 0.0, scheduling_policy="priority")


def test_real_engines_and_servers_refuse_it() -> None:
    """Neither tells a policy or the simulator what priorities its requests have."""
    from llmsched_hardware.live_config import _check_engine
    from llmsched_hardware.real_engine import EngineOptions

    with pytest.raises(ConfigError, match=r"engine\.scheduling_policy: 'priority', must be 'fcfs' on a real engine"):
        EngineOptions.of(small())
    scenario = load_scenario("azure-conv")
    policy = make_policy("vllm", Setting(scenario.statistics, 6.0, small()))
    with pytest.raises(ConfigError, match=r"policy 'vllm': its engine schedules by priority, which no policy in a server does"):
        _check_engine(policy, small(scheduling_policy="fcfs"))


def test_values_come_from_words() -> None:
    assert parse_overrides(["engine.scheduling_policy=priority"], {}).engine == {"scheduling_policy": "priority"}


def test_environments_run_with_it() -> None:
    """A scenario has no priorities: all are equal, and the two environments agree step by step."""
    settings = {**ADMIT, "rate": 9.0, "num_requests": 30, "engine": {"num_blocks": 300, "scheduling_policy": "priority"}}
    scalar, vector = llmsched_env.LLMSchedEnv(**settings), LLMSchedVectorEnv(1, **settings)
    scalar.reset(seed=4)
    vector.reset(seed=4)
    done = False
    while not done:
        action = np.array([1] * 4 + [16] * 4)
        one, many = scalar.step(action), vector.step(action[None])
        assert one[1] == many[1][0]
        done = one[2]
    assert one[4]["summary"]["evictions"] >= 0
