"""Nothing that is given from outside makes compiled code read beyond an array: refused by name, and nothing has moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_baselines import Setting, make_policy
from llmsched_env import AdmitOnly, ConfigError, Decision, EngineConfig, EpisodeLimits, LLMSchedEnv, QueueLayout, Workload
from llmsched_env.backends import make_backend
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.vector import LLMSchedVectorEnv
from llmsched_env.workload import load_scenario
from tests.env_settings import ADMIT, RESERVE

BAD_NUMBERS = [-1, -(2**63), 2**31, 2**63 - 1, 3.7, -0.5, math.nan, math.inf, -math.inf, 1e300, "1", None, [1, 2], True, b"1", 1 + 2j]


def scalar(**kwargs: Any) -> LLMSchedEnv:
    env = LLMSchedEnv(**{**ADMIT, "num_requests": 20, "rate": 6.0, "backlog": 10, **kwargs})
    env.reset(seed=0)
    return env


def state(env: LLMSchedEnv) -> bytes:
    return b"".join(table.tobytes() for table in env.backend._tables.values())  # type: ignore[attr-defined]


@pytest.mark.parametrize("value", [*BAD_NUMBERS, 10, 100_000_000])
def test_a_reserve_action_outside_its_space(value: Any) -> None:
    env = scalar(**RESERVE)
    before = state(env)
    if value is True:
        pytest.skip("numpy takes True for a bool array, which has a refusal of its own below")
    with pytest.raises(ConfigError, match="action"):
        env.step(value)
    assert state(env) == before
    vector = LLMSchedVectorEnv(2, **RESERVE, num_requests=20, rate=6.0)
    vector.reset(seed=0)
    with pytest.raises(ConfigError, match="action"):
        vector.step([0, value])


@pytest.mark.parametrize("place", [0, 3, 4, 7])
@pytest.mark.parametrize("value", [-1, 17, 2, 2**31, 0.5, math.nan])
def test_an_admit_action_outside_its_space(place: int, value: float) -> None:
    if place >= 4 and value == 2:
        value = 18  # 2 is a count, but no run bit
    env = scalar()
    action = np.array([1.0] * 4 + [16.0] * 4)
    action[place] = value
    before = state(env)
    with pytest.raises(ConfigError, match="action"):
        env.step(action)
    assert state(env) == before
    vector = LLMSchedVectorEnv(3, **ADMIT, num_requests=20, rate=6.0)
    vector.reset(seed=0)
    clocks = vector.fleet.clocks.copy()
    with pytest.raises(ConfigError, match="environment 1" if float(value).is_integer() else "action"):
        vector.step(np.stack([np.array([1] * 4 + [16] * 4), action, np.array([1] * 4 + [16] * 4)]))
    np.testing.assert_array_equal(vector.fleet.clocks, clocks)  # no engine has moved, the legal ones neither


@pytest.mark.parametrize("action", [[1] * 7, [1] * 9, [[1] * 8], 1, [], "x", [True] * 8, [None] * 8, [[1], [1, 2]]])
def test_actions_of_another_form(action: Any) -> None:
    env = scalar()
    with pytest.raises(ConfigError, match="action"):
        env.step(action)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, np.float32, np.float64])
def test_whole_numbers_of_any_type_are_taken(dtype: Any) -> None:
    one, other = scalar(), scalar()
    for _ in range(20):
        a = one.step(np.array([1] * 4 + [16] * 4))
        b = other.step(np.array([1] * 4 + [16] * 4, dtype=dtype))
        assert a[1] == b[1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=8, max_size=8))
def test_any_integers_are_taken_or_refused(action: list[int]) -> None:
    env = scalar()
    legal = all(0 <= a <= (1 if i < 4 else 16) for i, a in enumerate(action))
    if legal:
        env.step(np.array(action))
        return
    with pytest.raises(ConfigError, match=r"action: component \d is"):
        env.step(np.array(action))


@pytest.mark.parametrize("value", [-1, 17, 2.5, math.nan, "x"])
def test_admit_only(value: Any) -> None:
    env = AdmitOnly(gym.make("LLMSched-v1", **ADMIT, num_requests=20))
    env.reset(seed=0)
    with pytest.raises(ConfigError, match="action"):
        env.step(value)


@pytest.mark.parametrize("width", [0, 1, 3, 5, 64])
def test_a_decision_of_another_width(width: int) -> None:
    env = scalar()
    with pytest.raises(ConfigError, match=f"decision: {width} queues, must be 4"):
        env.step_decision(Decision.greedy(width) if width else Decision(0))
    backend = SimBackend()
    layout = QueueLayout(segment_ends=(5, 9, 20))
    backend.reset(Workload.of([0.0], [5], [30]), layout, EngineConfig.vllm(), EpisodeLimits())
    for call in (backend.advance, backend.step):
        with pytest.raises(ConfigError, match="decision"):
            call(Decision.greedy(width) if width else Decision(0))
    with pytest.raises(ConfigError, match="decision: list, must be a Decision"):
        backend.advance([1, 2, 3, 4])  # type: ignore[arg-type]


def test_a_policy_on_the_queues_of_another() -> None:
    scenario = load_scenario("azure-conv")
    setting = Setting(scenario.statistics, 5.0, scenario.engine)
    for name in ("reserve", "shortest-prompt", "nested-wait", "vllm-v0"):
        policy = make_policy(name, setting, overload=True)
        backend = make_backend("sim")
        other = QueueLayout(segment_ends=(3, 5, 7, 11, 13))
        view = backend.reset(scenario.generate(0, num_requests=5), other, policy.engine.replace(class_rank=()), EpisodeLimits())
        with pytest.raises(ConfigError, match="queues"):
            policy.decide(view)
            backend.advance(policy.decide(view))


def test_nothing_is_asked_before_reset() -> None:
    for env in (LLMSchedEnv(**ADMIT, num_requests=5), LLMSchedVectorEnv(2, **ADMIT, num_requests=5)):
        for ask in ("action_masks", "sample_mask"):
            with pytest.raises(gym.error.ResetNeeded):
                getattr(env, ask)()
    env = LLMSchedEnv(**ADMIT, num_requests=5)
    for call in (env.view, lambda: env.step([1] * 8), lambda: env.step_decision(Decision.greedy(4))):
        with pytest.raises(gym.error.ResetNeeded):
            call()


@pytest.mark.parametrize("ends", [[2**31], [2**40], [5, 5], [9, 3], [0], [-1], [2.5], [True], ["3"], [math.nan]])
def test_segment_ends(ends: list[Any]) -> None:
    with pytest.raises(ConfigError, match="segment_ends"):
        LLMSchedEnv(segment_ends=ends)


def test_forecasts_of_drawn_rates_are_bounded() -> None:
    env = LLMSchedEnv(num_requests=3)
    for rate in np.linspace(1.0, 6.0, 60):
        env.reset(seed=0, options={"rate": float(rate)})
    assert len(env._records) <= 32


# --- fuzzing the action decoder ---------------------------------------------------------------------------
_ATOMS = st.one_of(st.integers(), st.integers(-2, 20), st.floats(), st.booleans(), st.none(), st.text(max_size=3), st.complex_numbers())
_OBJECTS = st.recursive(
    _ATOMS, lambda inner: st.lists(inner, max_size=9) | st.tuples(inner, inner) | st.dictionaries(st.text(max_size=2), inner)
)
_ARRAYS = st.builds(
    lambda values, kind, shape: np.resize(np.array(values), shape).astype(kind),
    st.lists(st.integers(-3, 20), min_size=1, max_size=16),
    st.sampled_from(["i1", "u1", "i4", "u8", "f4", "f8", "?", "c8", "U3", "M8[s]", "O"]),
    st.sampled_from([(8,), (1,), (), (2, 8), (8, 1), (0,), (3, 8)]),
)


def _fuzz_actions(examples: int) -> None:
    kinds: list[dict[str, Any]] = [ADMIT, RESERVE, {"scenario": "azure-conv-40gb", "action_set": "peak"}]
    envs = [scalar(**kind) for kind in kinds]
    vectors = [LLMSchedVectorEnv(2, **kind, num_requests=20, rate=6.0, threads=1) for kind in kinds]
    for vector in vectors:
        vector.reset(seed=0)

    @settings(max_examples=examples, deadline=None, database=None)
    @given(_OBJECTS | _ARRAYS)
    def one(action: Any) -> None:
        for env in envs:
            before = state(env)
            try:
                *_, terminated, truncated, _ = env.step(action)
                if terminated or truncated:
                    env.reset()
            except ConfigError as error:
                assert "action" in str(error) and state(env) == before
        for vector in vectors:
            clocks = vector.fleet.clocks.copy()
            try:
                vector.step(action)
            except ConfigError as error:
                assert "action" in str(error)
                np.testing.assert_array_equal(vector.fleet.clocks, clocks)

    one()


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Decision(-1), "decision.num_queues: -1"),
        (lambda: Decision(10**12), "decision.num_queues"),
        (lambda: scalar().reset(options="x"), "options: 'x'"),  # type: ignore[arg-type]
        (lambda: scalar().reset(options={"rate": 1e-300}), "rate: 1e-300"),
        (lambda: LLMSchedEnv(rate=1e-300), "rate: 1e-300"),
        (lambda: LLMSchedVectorEnv(num_envs=2, rate=[]), "rate: \\[\\]"),
        (lambda: LLMSchedVectorEnv(num_envs=2, engine=[]), "engine: \\[\\]"),  # type: ignore[arg-type]
        (lambda: LLMSchedVectorEnv(num_envs=2, scenario=[]), "scenario: \\[\\]"),
    ],
)
def test_whoever_finds_the_fault_the_message_names_the_argument(make: Callable[[], Any], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}"):
        make()


def test_actions_in_another_shape_are_refused_though_their_number_is_right() -> None:
    vector = LLMSchedVectorEnv(num_envs=3, num_requests=5)
    vector.reset(seed=0)
    shape = vector.action_space.shape
    assert shape is not None
    with pytest.raises(ConfigError, match="must begin with the number of environments, 3"):
        vector.step(np.ones(int(np.prod(shape)), dtype=np.int64))


def test_any_object_as_an_action() -> None:
    _fuzz_actions(500)


@pytest.mark.slow
def test_any_object_as_an_action_at_length() -> None:
    _fuzz_actions(10_000)
