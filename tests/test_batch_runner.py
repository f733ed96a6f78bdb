"""Compiled rules: the plain-Python decision at every step, the same episodes, nothing hidden read."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hst

from llmsched_baselines import Policy, Setting, make_policy, policy_class, policy_names
from llmsched_env.backend import View
from llmsched_env.backends import make_backend
from llmsched_env.batch_runner import Run, run_batch
from llmsched_env.compiled import compiled
from llmsched_env.engine import rules
from llmsched_env.engine import state as st
from llmsched_env.engine.queues import next_in_order, start_of_queues
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine.step import engine_at
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.fluid import rotation_quota
from llmsched_env.records import Counts
from llmsched_env.runner import EpisodeResult, rule_of, run_episode
from llmsched_env.types import Decision, LengthStatistics, QueueLayout, Workload
from llmsched_env.workload import Scenario, load_scenario
from tests.reference_policies import REFERENCES, in_order

pytestmark = pytest.mark.filterwarnings("ignore::llmsched_env.perf.base.CalibrationRangeWarning")
ROOT = Path(__file__).resolve().parents[1]
AZURE = load_scenario("azure-conv")
TWO_TYPES = load_scenario("two-type")
PAPER = EngineConfig.paper(3750, 1.0, 1e-3)


def runs_on_paper(name: str) -> bool:
    try:
        make_policy(name, Setting(TWO_TYPES.statistics, 3.0, PAPER), overload=True)
    except ConfigError as error:
        assert "must be 'vllm'" in str(error)
        return False
    return True


OF_PAPER = [name for name in policy_names() if runs_on_paper(name)]
OPTIONS: dict[str, dict[str, Any]] = {"shortest-prompt": {"theta": 0.9, "num_classes": 4}}

# (scenario, engine, rate): plenty of memory, evictions at every turn, overload, late requests, few sequences.
CASES: dict[str, tuple[Scenario, EngineConfig, float]] = {
    "light": (AZURE, AZURE.engine, 4.0),
    "evictions": (AZURE, AZURE.engine.replace(num_blocks=500), 6.0),
    "overload": (AZURE, AZURE.engine, 30.0),
    "late": (AZURE, AZURE.engine.replace(num_blocks=1200, late_after=3.0), 9.0),
    "few": (AZURE, AZURE.engine.replace(max_num_seqs=12, scheduler_reserve_full_isl=False), 6.0),
    "paper": (TWO_TYPES, PAPER, 3.0),
    "paper-evictions": (TWO_TYPES, EngineConfig.paper(500, 1.0, 1e-3), 2.0),
    "paper-overload": (TWO_TYPES, PAPER, 20.0),
}


def made(name: str, case: str, **options: Any) -> tuple[Policy, Setting, Workload]:
    scenario, engine, rate = CASES[case]
    setting = Setting(scenario.statistics, rate, engine, horizon_seconds=100.0)
    policy = make_policy(name, setting, overload=True, **{**OPTIONS.get(name, {}), **options})
    return policy, setting, scenario.generate(3, rate=rate, num_requests=150)


def names(case: str) -> list[str]:
    return OF_PAPER if case.startswith("paper") else policy_names()


ALL = [(case, name) for case in CASES for name in names(case)]
RULED = [(case, name) for case, name in ALL if name in REFERENCES]


class Asked:
    """The same policy as a user's own would be: ``decide`` alone, asked before every step."""

    constant = None

    def __init__(self, policy: Policy) -> None:
        self.name, self.layout, self.engine = policy.name, policy.layout, policy.engine
        self.known_lengths, self.notes = policy.known_lengths, policy.notes
        self._policy = policy

    def reset(self) -> None:
        self._policy.reset()

    def decide(self, view: View) -> Decision:
        return self._policy.decide(view)


def assert_same(a: EpisodeResult, b: EpisodeResult) -> None:
    assert a.counters == b.counters
    for field in a.log.__dataclass_fields__:
        one, other = getattr(a.log, field), getattr(b.log, field)
        assert one.tobytes() == other.tobytes() if isinstance(one, np.ndarray) else one == other, field
    assert repr(a.summary) == repr(b.summary)  # NaN is not equal to itself


def same(one: Decision, other: Decision) -> bool:
    return bool(np.array_equal(one.rows, other.rows))


def start(policy: Policy, workload: Workload, limits: EpisodeLimits = EpisodeLimits()) -> tuple[SimBackend, Any]:  # noqa: B008
    backend = make_backend("sim")
    assert isinstance(backend, SimBackend)
    policy.reset()
    view = backend.reset(workload, policy.layout, policy.engine, limits, reveal_output_length=policy.known_lengths)
    return backend, view


def known_to(policy: Policy, setting: Setting) -> SimpleNamespace:
    """What a reference reads of a policy."""
    return SimpleNamespace(
        parameters=getattr(policy, "parameters", None),
        engine=policy.engine,
        statistics=setting.statistics,
        longest_prompt=setting.statistics.prompt.max(),
        theta=OPTIONS.get(policy.name, {}).get("theta", 1.1),
        capacity=policy.engine.kv_capacity_tokens,
    )


# --- one rule, two forms ----------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "name"), RULED)
def test_a_rule_decides_as_its_plain_python_reference_at_every_step(case: str, name: str) -> None:
    follow(*made(name, case), limit=500 if name == "mc-sf" else 1500)


@pytest.mark.parametrize("options", [{"thresholds": [2, 1]}, {"thresholds": [0.3, 0.15]}])
def test_wait_with_given_thresholds_too(options: dict[str, Any]) -> None:
    follow(*made("wait", "paper-evictions", **options))


@pytest.mark.parametrize("variant", ["A", "B"])
@pytest.mark.parametrize("capacity", [90, 150, 400])
def test_nested_wait_repairs_as_its_reference(variant: str, capacity: int) -> None:
    # Boundary queues fill a memory that is too small for these thresholds, and the repair evicts.
    statistics = LengthStatistics.of([5, 10, 10, 15], [3, 8, 15, 25], [3, 2, 2, 1])
    setting = Setting(statistics, 2.0, EngineConfig.paper(capacity, 1.0, 1e-3))
    policy = make_policy("nested-wait", setting, segment_ends=(4, 10), thresholds=[3, 2, 1], variant=variant, overload=True)
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 4, 200)
    workload = Workload.of(np.cumsum(rng.exponential(0.5, 200)), statistics.prompt[kind], statistics.output[kind])
    assert follow(policy, setting, workload) > 20 or capacity == 400


@pytest.mark.parametrize("capacity", [84, 88, 92, 96, 100])
def test_nested_wait_repairs_before_a_last_segment_of_one_token(capacity: int) -> None:
    statistics = LengthStatistics.of([5, 5, 5], [3, 8, 9], [1, 1, 1])
    setting = Setting(statistics, 2.0, EngineConfig.paper(capacity, 1.0, 1e-3))
    policy = make_policy("nested-wait", setting, segment_ends=(4, 8), thresholds=[2, 1, 1], overload=True)
    kind = np.random.default_rng(0).integers(0, 3, 150)
    assert 50 < follow(policy, setting, Workload.of(np.arange(150) * 0.5, statistics.prompt[kind], statistics.output[kind])) < 100


@pytest.mark.parametrize("capacity", [61, 97, 150])
def test_mc_sf_fills_a_small_memory_as_its_reference(capacity: int) -> None:
    statistics = LengthStatistics.of([3, 7, 11, 2], [5, 9, 21, 13], [1, 1, 1, 1])
    setting = Setting(statistics, 2.0, EngineConfig.paper(capacity, 0.1, 1e-3))
    policy = make_policy("mc-sf", setting, num_classes=3)
    kind = np.random.default_rng(0).integers(0, 4, 200)
    follow(policy, setting, Workload.of(np.arange(200) * 0.2, statistics.prompt[kind], statistics.output[kind]))


def test_nested_wait_repairs_in_blocks_too() -> None:
    engine = AZURE.engine.replace(num_blocks=300)
    setting = Setting(AZURE.statistics, 3.0, engine)
    policy = make_policy("nested-wait", setting, segment_ends=(40, 100), thresholds=[1, 4, 6], overload=True)
    assert follow(policy, setting, AZURE.generate(0, rate=3.0, num_requests=120)) > 20


def follow(policy: Policy, setting: Setting, workload: Workload, limit: int = 3000) -> int:
    """Ask rule and reference at every step; the evictions they asked for."""
    backend, view = start(policy, workload)
    reference, facts, launched = REFERENCES[policy.name], known_to(policy, setting), [0] * policy.layout.num_queues
    evicted = steps = 0
    while not backend.done and steps < limit:
        expected = reference(facts, view, launched)
        decision = policy.decide(view)
        assert same(decision, expected), f"step {steps}: {decision}, expected {expected}"
        evicted += int(decision.evict.sum())
        backend.advance(decision)
        steps += 1
    assert steps > 20
    return evicted


@settings(max_examples=40)
@given(
    name=hst.sampled_from(sorted(REFERENCES)),
    paper=hst.booleans(),
    lengths=hst.lists(hst.tuples(hst.integers(1, 60), hst.integers(1, 40)), min_size=2, max_size=40),
    tight=hst.integers(1, 4),
    rate=hst.floats(0.2, 50.0),
    seed=hst.integers(0, 2**20),
)
def test_any_small_episode_is_decided_alike(
    name: str, paper: bool, lengths: list[tuple[int, int]], tight: int, rate: float, seed: int
) -> None:
    prompts, outputs = (np.array(x) for x in zip(*lengths, strict=True))
    statistics = LengthStatistics.of(prompts, outputs, np.ones(len(prompts)))
    if paper:
        engine = EngineConfig.paper(100 * tight, 0.05, 1e-3)
    else:
        sizes = {"num_blocks": 25 * tight, "block_size": 4, "max_num_seqs": 2 * tight}
        engine = EngineConfig.vllm(max_num_batched_tokens=128, max_model_len=100, **sizes)
    policy = make_policy(name, Setting(statistics, rate, engine), overload=True, **OPTIONS.get(name, {}))
    arrival = np.cumsum(np.random.default_rng(seed).exponential(1 / rate, len(prompts)))
    workload = Workload.of(arrival, prompts, outputs)
    # Nested WAIT outside its theory (tight memory, overload) may launch and clear the same requests without end.
    limits = EpisodeLimits(max_iterations=3000)
    backend, view = start(policy, workload, limits)
    facts, launched = known_to(policy, Setting(statistics, rate, engine)), [0] * policy.layout.num_queues
    while not backend.done:
        expected = REFERENCES[name](facts, view, launched)
        assert same(policy.decide(view), expected)
        backend.advance(expected)
    assert_same(*run_batch([Run(policy, workload, limits), Run(Asked(policy), workload, limits)]))


# --- whole episodes ---------------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "name"), ALL)
def test_run_batch_equals_run_episode_and_asking_before_every_step(case: str, name: str) -> None:
    policy, _, workload = made(name, case)
    (result,) = run_batch([Run(policy, workload)])
    assert_same(result, run_episode(policy, workload))
    assert_same(result, run_episode(Asked(policy), workload))
    assert result.summary.completed == len(workload)
    if case == "evictions" and name in ("fcfs", "vllm"):
        assert result.counters.evictions > 20


@pytest.mark.parametrize(
    "limits", [EpisodeLimits(drain=False), EpisodeLimits(horizon=20.0), EpisodeLimits(max_iterations=333), EpisodeLimits(max_iterations=1)]
)
def test_limits_hold_in_compiled_episodes(limits: EpisodeLimits) -> None:
    for name in ("vllm", "wait", "nested-wait", "mc-sf"):
        policy, _, workload = made(name, "overload")
        compiled, asked = run_batch([Run(policy, workload, limits), Run(Asked(policy), workload, limits)])
        assert_same(compiled, asked)
    assert compiled.counters.end != "running"


def test_runs_of_any_size_and_policy_share_one_batch_in_order() -> None:
    runs = []
    for i, (case, name) in enumerate(ALL):
        policy, _, workload = made(name, case)
        part = slice(0, (13, 150, 1, 90)[i % 4])
        workload = Workload.of(
            workload.arrival[part], workload.prompt_tokens[part], workload.output_tokens[part], workload.type_id[part]
        )  # fmt: skip
        runs.append(Run(policy if i % 5 else Asked(policy), workload))
    results = list(run_batch(runs))
    assert [len(r.log) for r in results] == [len(run.workload) for run in runs]
    for run, result in zip(runs, results, strict=True):
        assert_same(result, run_episode(run.policy, run.workload))


def test_an_empty_batch_and_an_empty_workload() -> None:
    assert list(run_batch([])) == []
    policy, _, _ = made("wait", "light")
    (result,) = run_batch([Run(policy, Workload.of([], [], []))])
    assert result.counters.end == "finished" and result.counters.iterations == 0


def test_a_policy_forgets_between_runs() -> None:
    policy, _, workload = made("wait", "overload")
    first, second = run_batch([Run(policy, workload)] * 2)
    assert_same(first, second)


def test_a_request_that_can_never_be_served_is_refused_when_its_turn_comes() -> None:
    policy, _, workload = made("vllm", "light")
    results = run_batch([Run(policy, workload), Run(policy, Workload.of([0.0], [10**6], [1]))])
    next(results)
    with pytest.raises(ConfigError, match="request 0"):
        next(results)


def test_an_episode_cut_into_many_calls_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, _, workload = made("nested-wait", "evictions")
    whole = run_episode(policy, workload)
    monkeypatch.setattr(rules, "SECONDS_PER_CALL", 1e-9)  # as a rule so slow that each call makes few steps
    assert_same(whole, run_episode(policy, workload))


@pytest.mark.parametrize(("seconds_a_step", "least", "most"), [(0.05, 1, 4), (1e-3, 50, 200), (1e-6, 1000, 10_000_000)])
def test_the_slower_a_rule_the_fewer_steps_between_two_looks_for_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, seconds_a_step: float, least: int, most: int
) -> None:
    policy, _, workload = made("wait", "overload")
    rule = rule_of(policy)
    assert rule is not None
    play, asked, clock = rules._play, [], [0.0]

    def played(address: int, steps: int, *args: Any) -> Any:
        asked.append(steps)
        clock[0] += steps * seconds_a_step
        return play(address, steps, *args)

    monkeypatch.setattr(rules, "_play", played)
    monkeypatch.setattr(rules, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    run_episode(policy, workload)
    assert asked[0] == 100 and all(least <= steps <= most for steps in asked[1:]) and len(asked) > 1
    assert seconds_a_step > 0.01 or max(asked) >= 100


@pytest.mark.parametrize("name", policy_names())
def test_policies_survive_copies_and_pickles(name: str) -> None:
    policy, _, workload = made(name, "overload")
    expected = run_episode(policy, workload)
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert_same(expected, run_episode(other, workload))


PURE_PYTHON = """
import sys
from tests.test_batch_runner import digest
print(digest())
"""


def digest() -> str:
    """Every completion time of a few small episodes."""
    found = hashlib.sha256()
    for name in REFERENCES:
        policy, _, workload = made(name, "paper-overload")
        small = Workload.of(workload.arrival[:25], workload.prompt_tokens[:25], workload.output_tokens[:25], workload.type_id[:25])
        found.update(run_episode(policy, small).log.completed.tobytes())
    return found.hexdigest()


def test_rules_are_ordinary_python_without_the_compiler() -> None:
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1", PYTHONPATH=str(ROOT))
    done = subprocess.run([sys.executable, "-c", PURE_PYTHON], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest()


# --- the information boundary -----------------------------------------------------------------------
class Blind:
    """A copy of a record as ``View`` holds it, with other numbers where a policy may not look."""

    def __init__(self, record: st.Engine, layout: QueueLayout) -> None:
        self.original, self.record, self.layout = record, copy.deepcopy(record), layout
        self.handle = self.record.handle
        self._own = self.record._memory.copy()  # its addresses

    def scramble(self, rng: np.random.Generator, *, lengths: int | None = None) -> Blind:
        """Take the original over, then overwrite hidden tables, requests to come, output lengths."""
        memory = self.original._memory.copy()
        for name, field in st.Engine.FIELDS.items():
            if field.kind == "rows" and name in self.original._objects:  # a table for priorities is there where they count
                memory[name] = self._own[name]
                getattr(self.record, name).rows[:] = getattr(self.original, name).rows
        memory["batch"]["model"] = self._own["batch"]["model"]
        self.record._memory[()] = memory
        record, requests = self.record, self.record.requests
        future = requests.status == st.FUTURE
        for table in (record.hidden, record.phases, record.wheel):
            for name in table.rows.dtype.names:
                table.rows[name] = rng.integers(1, 5000, len(table))
        for name in requests.rows.dtype.names:
            if name != "status":
                requests.rows[name][future] = rng.integers(1, 5000, int(future.sum()))
        requests.output[:] = rng.integers(1, 5000, len(requests)) if lengths is None else lengths
        record.events.due[:] = rng.integers(0, 5000, len(record.events))
        record.num_requests, record.next_arrival = (int(x) for x in rng.integers(1, 5000, 2))
        return self


def everything(record: st.Engine) -> bytes:
    """All of an engine that is not scratch."""
    queues = record.queues.rows.copy()
    queues["left"] = 0
    tables = [table.rows for table in (record.requests, record.hidden, record.events, record.phases, record.wheel)]
    return b"".join(part.tobytes() for part in (record._memory, queues, *tables, record.batch.model))


@pytest.mark.parametrize(("case", "name"), [(case, name) for case, name in ALL if not policy_class(name).known_lengths])
def test_hidden_lengths_and_future_requests_are_never_read(case: str, name: str) -> None:
    """Whatever stands there, the decision is the same: hidden rows and future requests are overwritten before asking."""
    policy, _, workload = made(name, case)
    assert not policy.known_lengths
    backend, view = start(policy, workload)
    rule = rule_of(policy)
    assert rule is not None
    rng = np.random.default_rng(0)
    blind, blind_view = copy.deepcopy(rule), Blind(backend.record, view.layout)
    steps = 0
    while not backend.done and steps < 1500:
        blind.decide(blind_view.scramble(rng))
        decision = policy.decide(view)
        assert same(blind.decision, decision)
        for name, field in type(rule.policy).FIELDS.items():  # what they remember
            assert field.declared is not Counts or getattr(blind.policy, name).tolist() == getattr(rule.policy, name).tolist()
        backend.advance(decision)
        steps += 1
    assert steps > 20


def test_the_test_above_sees_a_policy_that_reads_output_lengths() -> None:
    policy, _, workload = made("mc-sf", "evictions")
    backend, view = start(policy, workload)
    rule = rule_of(policy)
    assert rule is not None and rule.known_lengths
    differs = False
    blind, blind_view, rng = copy.deepcopy(rule), Blind(backend.record, view.layout), np.random.default_rng(0)
    while not backend.done:
        blind.decide(blind_view.scramble(rng, lengths=3000))
        decision = policy.decide(view)
        differs = differs or not same(blind.decision, decision)
        backend.advance(decision)
    assert differs


@pytest.mark.parametrize("name", policy_names())
def test_a_rule_writes_nothing_but_decision_memory_and_scratch(name: str) -> None:
    policy, _, workload = made(name, "evictions")
    backend, view = start(policy, workload)
    for _ in range(600):
        before = everything(backend.record)
        decision = policy.decide(view)
        assert before == everything(backend.record)
        backend.advance(decision)


# --- pieces that rules share ------------------------------------------------------------------------
def test_rotation_is_that_of_the_fluid_model() -> None:
    rng = np.random.default_rng(1)
    rotated = getattr(rules.rotated, "py_func", rules.rotated)
    for threshold in (*rng.uniform(0, 3, 200), 1 / 3, 0.1, 2.0, 7.0, 1e-4):
        for i in (*range(40), 999, 10**6):
            assert rotated(threshold, i) == rotation_quota(threshold, i)


@compiled
def walk_outside(handle, out):  # type: ignore[no-untyped-def]
    """Everything outside as rules walk over it, into ``out``; returns how many. One more than there are would not fit."""
    record = engine_at(handle)
    start_of_queues(record)
    count = 0
    q = next_in_order(record)
    while q >= 0 and count < out.shape[0]:
        out[count] = record.queues.left[q]
        record.queues.left[q] = record.requests.next[out[count]]
        count += 1
        q = next_in_order(record)
    return count


@pytest.mark.parametrize(
    "engine",
    [
        {},
        {"late_after": 1.0},
        {"admission_order": "class"},
        {"admission_order": "class", "class_rank": (1, 0, 1)},
        {"admission_order": "class", "late_after": 1.0},
    ],
)
def test_the_walk_over_the_queues_is_the_admission_order(engine: dict[str, Any]) -> None:
    layout = QueueLayout(by="prompt", edges=(300, 1000))
    config = AZURE.engine.replace(num_blocks=300, **engine)
    backend = make_backend("sim")
    view = backend.reset(AZURE.generate(0, rate=20.0, num_requests=200), layout, config, EpisodeLimits())
    evictions = late = 0
    for _ in range(2500):
        walked = np.empty(backend.record.num_waiting + 1, dtype=np.int64)
        count = walk_outside(backend.record.handle, walked)
        assert walked[:count].tolist() == [r for *_, r in in_order(view)]
        late += int(view.late.sum())
        backend.advance(Decision.greedy(3))
        evictions = view.evictions
    assert evictions > 0
    assert (late > 0) == ("late_after" in engine)
