"""What is seen of predictions: the prediction itself, once its request has arrived, and what has become of earlier ones."""

from __future__ import annotations

import math
import pickle
from typing import Any

import gymnasium as gym
import numba
import numpy as np
import pytest

from llmsched_env import ConfigError, EngineConfig, EpisodeLimits, QueueLayout, Workload
from llmsched_env.compiled import compiled
from llmsched_env.engine import state as st
from llmsched_env.engine.rules import Rule
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.types import ADMIT_ALL, Decision

CONFIGS = {
    "vllm": EngineConfig.vllm(num_blocks=30, block_size=4, max_num_batched_tokens=32, max_num_seqs=6, max_model_len=60),
    "paper": EngineConfig.paper(150, 0.05, 1e-3),
}
LAYOUT = QueueLayout("predicted", (10, 20), prompt_edges=(10,))
ENVIRONMENT = "llmsched_env:LLMSchedPredicted-v1"


def workload(seed: int = 0, n: int = 40, output: int | None = None) -> Workload:
    rng = np.random.default_rng(seed)
    arrival, prompt = np.cumsum(rng.exponential(0.05, n)), rng.integers(1, 30, n)
    lengths = rng.integers(1, 25, n) if output is None else np.full(n, output)
    return Workload.of(arrival, prompt, lengths, predicted_tokens=rng.integers(1, 30, n))


@compiled
def reads_foretold(engine: Any, policy: Any, decision: Any) -> None:
    decision.run[0] = engine.foretold.predicted[5]


@compiled
def reads_output(engine: Any, policy: Any, decision: Any) -> None:
    decision.run[0] = engine.requests.output[0]


@compiled
def writes_prediction(engine: Any, policy: Any, decision: Any) -> None:
    engine.arrived.predicted[0] = 5


@compiled
def writes_sums(engine: Any, policy: Any, decision: Any) -> None:
    engine.predictions.completed = 5.0


@pytest.mark.parametrize("function", [reads_foretold, reads_output, writes_prediction, writes_sums], ids=lambda f: f.__name__)
def test_a_rule_is_refused_what_is_not_its_own(function: Any) -> None:
    backend = SimBackend()
    view = backend.reset(workload(), LAYOUT, CONFIGS["vllm"], EpisodeLimits())
    with pytest.raises((AttributeError, ValueError) if numba.config.DISABLE_JIT else ConfigError):
        Rule(function, LAYOUT.num_queues).decide(view)


@compiled
def adds_up(engine: Any, policy: Any, decision: Any) -> None:
    """Remembers the sum of the predictions it finds, and that of requests to come; the number of rows is its parameter."""
    found = 0
    early = 0
    for r in range(int(policy.parameters[0])):
        if engine.requests.status[r] == 0:
            early += engine.arrived.predicted[r]
        else:
            found += engine.arrived.predicted[r]
    policy.memory[0] = found
    policy.memory[1] = early
    for q in range(engine.settings.num_queues):
        decision.run[q] = 1
        decision.admit[q] = ADMIT_ALL
        decision.evict[q] = 0


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_predictions_are_seen_once_their_requests_have_arrived(config: EngineConfig) -> None:
    rule = Rule(adds_up, LAYOUT.num_queues, [40], memory=2)
    backend = SimBackend()
    for seed in (0, 0, 1):  # later episodes use the same tables
        requests = workload(seed)
        view = backend.reset(requests, LAYOUT, config, EpisodeLimits())
        future_steps = 0
        while not backend.done:
            decision = rule.decide(view)
            arrived = backend.record.requests.status != st.FUTURE
            future_steps += not arrived.all()
            assert rule.policy.memory.tolist() == [requests.predicted_tokens[arrived].sum(), 0]
            assert backend.record.predictions.arrived == arrived.sum()
            backend.advance(decision)
        assert future_steps > 10


def test_true_lengths_are_not_seen_before_the_end() -> None:
    """Two episodes with the same predictions and other lengths look alike until the first request completes."""
    seen = []
    for output in (20, 25):
        backend = SimBackend()
        view = backend.reset(workload(output=output), LAYOUT, CONFIGS["vllm"], EpisodeLimits())
        shown = []
        while not backend.done and backend.record.finished == 0:
            backend.advance(Decision.greedy(LAYOUT.num_queues))
            record = view.record
            if backend.record.finished == 0:
                sums = record.predictions
                tables = [record.requests.rows.tobytes(), record.arrived.rows.tobytes(), record.queues.rows["waiting"].tobytes()]
                shown.append((record.clock, sums.completed, sums.predicted, sums.actual, sums.products, *tables))
        seen.append(shown)
    common = min(map(len, seen))
    assert common > 5 and seen[0][:common] == seen[1][:common]


def test_sums_are_those_of_completed_requests() -> None:
    requests, backend = workload(), SimBackend()
    backend.reset(requests, LAYOUT, CONFIGS["vllm"], EpisodeLimits())
    order: list[int] = []
    while not backend.done:
        order.extend(backend.step(Decision.greedy(LAYOUT.num_queues)).finished)
        x, y = np.log(requests.predicted_tokens[order]), np.log(requests.output_tokens[order])
        keep = (1 - 1 / st.PREDICTION_MEMORY) ** np.arange(len(order))[::-1]
        sums = backend.record.predictions
        expected = [keep.sum(), keep @ x, keep @ y, keep @ x**2, keep @ y**2, keep @ (x * y)]
        names = ("completed", "predicted", "actual", "predicted_squares", "actual_squares", "products")
        assert [getattr(sums, name) for name in names] == pytest.approx(expected)
    backend.reset(requests, LAYOUT, CONFIGS["vllm"], EpisodeLimits())
    assert backend.record.predictions.completed == 0.0


def test_the_field_calibration_tells_mean_spread_and_correlation() -> None:
    env = gym.make(ENVIRONMENT).unwrapped
    observation, _ = env.reset(seed=1)
    assert observation["calibration"].tolist() == [0.0, 0.5, 0.0, 1.0]
    finished: list[int] = []
    over = False
    while not over:
        before = env.backend.record.requests.status == st.FINISHED
        observation, _, over, _, _ = env.step(np.array([4, 4]))
        now = np.flatnonzero((env.backend.record.requests.status == st.FINISHED) & ~before)
        times = env.backend.record.hidden.completed[now]
        finished.extend(now[np.argsort(times, kind="stable")].tolist())
    hidden, arrived = env.backend.record.hidden, env.backend.record.arrived
    x, y = np.log(arrived.predicted[finished]), np.log(hidden.output[finished])
    weight = (1 - 1 / st.PREDICTION_MEMORY) ** np.arange(len(finished))[::-1]
    error = np.average(y - x, weights=weight)
    spread = math.sqrt(np.average((y - x - error) ** 2, weights=weight))
    correlation = np.cov(x, y, aweights=weight, ddof=0)
    correlation = correlation[0, 1] / math.sqrt(correlation[0, 0] * correlation[1, 1])
    expected = [math.log1p(int(weight.sum())) / math.log1p(10_000), 0.5 + error / 8, spread / 4, 0.5 + correlation / 2]
    assert observation["calibration"] == pytest.approx(expected, abs=1e-3)
    assert spread == pytest.approx(0.6, abs=0.1)


def test_many_are_equal_to_one_and_episodes_repeat() -> None:
    many, one = gym.make_vec(ENVIRONMENT, num_envs=3, num_requests=60), gym.make(ENVIRONMENT, num_requests=60)
    rng = np.random.default_rng(0)
    actions = np.stack([rng.integers(0, many.single_action_space.nvec, (3, 2)) for _ in range(40)])
    together, _ = many.reset(seed=7)
    course: list[list[Any]] = [[{k: v[i].copy() for k, v in together.items()}] for i in range(3)]
    for action in actions:
        observed, rewards, ended, _, _ = many.step(action)
        for i in range(3):
            course[i].append(({k: v[i].copy() for k, v in observed.items()}, float(rewards[i]), bool(ended[i])))
    for i in range(3):
        for _ in range(2):
            observation, _ = one.reset(seed=7 + i)
            assert all((observation[k] == v).all() for k, v in course[i][0].items())
            for action, (expected, reward, end) in zip(actions, course[i][1:], strict=True):
                observation, found, over, _, _ = one.step(action[i])
                assert all((observation[k] == v).all() for k, v in expected.items()) and found == reward and over == end
                if over:
                    break


def test_a_checkpoint_goes_on_alike() -> None:
    env = gym.make(ENVIRONMENT, num_requests=80).unwrapped
    env.reset(seed=2)
    for _ in range(3):
        env.step(np.array([3, 3]))
    copy = pickle.loads(pickle.dumps(env))
    over = False
    while not over:
        one, other = env.step(np.array([3, 3])), copy.step(np.array([3, 3]))
        assert all((one[0][k] == other[0][k]).all() for k in one[0]) and one[1:3] == other[1:3]
        over = one[2]
