"""The bound below every policy: worked out by hand, and never beaten."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs

from llmsched_baselines import Setting, make_policy
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.fluid.bound import latency_bound, least_remaining_first
from llmsched_env.fluid.minorant import lower_lines, minorant
from llmsched_env.perf import FormulaTime, IterationTimeModel, LinearTime, TableTime, load_calibration
from llmsched_env.perf.batch import Batch
from llmsched_env.perf.traffic import TrafficTime
from llmsched_env.runner import run_episode
from llmsched_env.types import Decision, LengthStatistics, QueueLayout, Workload
from llmsched_env.workload import load_scenario

TABLE = TableTime(
    tokens=[1, 8, 16, 64],
    linear=[0.010, 0.011, 0.010, 0.020],
    decode_batch=[1, 4, 8],
    decode_kv=[4, 16, 64],
    decode=[[0.001, 0.002, 0.004], [0.002, 0.005, 0.012], [0.003, 0.009, 0.030]],
    prefill_context=[0, 32],
    prefill_chunk=[1, 32],
    prefill=[[0.0005, 0.004], [0.001, 0.006]],
    sequences=[1, 8],
    per_sequence=[0.0005, 0.002],
    constant=0.001,
    per_request=0.0001,
)
FORMULA = FormulaTime(a=0.009, b=3e-5, s=0.004, c=7e-5, d1=2e-6, d2=3e-6, d3=5e-8, d4=3e-5, knee=16.0)
TRAFFIC = TrafficTime((1.0, 8.0, 64.0), (0.02, 0.025, 0.05), decode=1e-4, decode_kv=1e-5, prefill_work=1e-6, new_shape=0.01, shapes=2)
MODELS: tuple[IterationTimeModel, ...] = (LinearTime(0.01, 1e-5), FORMULA, TABLE, TABLE.clipped(), TRAFFIC)


# --- by hand -----------------------------------------------------------------------------------------
def test_least_remaining_first_by_hand() -> None:
    # 5 s of work at 0; 1 s at 1 preempts it (4 left); 6 s at 2 waits: done at 2, 6 and 12.
    assert least_remaining_first(np.array([0.0, 1.0, 2.0]), np.array([5.0, 1.0, 6.0])) == pytest.approx((6 + (2 - 1) + (12 - 2)) / 3)
    # a shorter one arrives just as the machine is free
    assert least_remaining_first(np.array([0.0, 2.0]), np.array([2.0, 1.0])) == pytest.approx((2 + 1) / 2)
    assert least_remaining_first(np.array([3.0]), np.array([0.0])) == 0.0


@given(hs.lists(hs.tuples(hs.integers(0, 20), hs.integers(1, 9)), min_size=1, max_size=7))
def test_no_order_beats_least_remaining_first(jobs: list[tuple[int, int]]) -> None:
    """Against every fixed order of priorities, second by second."""
    jobs.sort()
    arrival, work = np.array(jobs, dtype=float).T
    best = least_remaining_first(arrival, work)
    rng = np.random.default_rng(0)
    for _ in range(20):
        order = rng.permutation(len(jobs))
        left, now, total = work.copy(), 0, 0.0
        while left.any():
            ready = [i for i in order if left[i] > 0 and arrival[i] <= now]
            now += 1
            if ready:
                left[ready[0]] -= 1
                total += (now - arrival[ready[0]]) * (left[ready[0]] == 0)
        assert best <= total / len(jobs) + 1e-9


def test_one_request_in_the_papers_model_is_exact() -> None:
    engine = EngineConfig.paper(3_750, 1.0, 1e-3)
    workload = Workload.of([2.0], [10], [20])
    bound = latency_bound(workload, engine)
    # 21 iterations of 1 s, and (20 + 1) (10 + 20 / 2) tokens x iterations at 1 ms
    assert bound.alone == pytest.approx(21 + 0.420)
    # on one machine: of the fixed second a token of 3,750 has its part
    assert bound.pooled == pytest.approx(420 * (1e-3 + 1 / 3_750))
    assert bound.mean == bound.alone and bound.requests == 1
    assert run_episode(make_policy("fcfs", _setting(engine)), workload).summary.latency_mean == pytest.approx(bound.mean, rel=1e-6)


def test_one_request_in_the_vllm_preset_is_exact() -> None:
    engine = EngineConfig.vllm(time_model=LinearTime(0.01, 1e-5), num_blocks=100, max_model_len=200)
    workload = Workload.of([0.0], [30], [5])
    bound = latency_bound(workload, engine)
    assert bound.alone == pytest.approx(5 * 0.01 + 1e-5 * (30 + 31 + 32 + 33 + 34))
    assert run_episode(make_policy("vllm", _setting(engine)), workload).summary.latency_mean == pytest.approx(bound.mean, rel=1e-6)


def test_shares_of_seats_and_blocks_by_hand() -> None:
    """Prompt 17, output 3: iterations with 17, 18 and 19 tokens hold 2 blocks each; 4 seats, 100 blocks."""
    engine = EngineConfig.vllm(
        time_model=LinearTime(0.01, 0.0), num_blocks=100, max_model_len=200, max_num_seqs=4, max_num_batched_tokens=10
    )
    n = 400
    bound = latency_bound(Workload.of(np.zeros(n), np.full(n, 17), np.full(n, 3)), engine)
    by_seat = 0.01 * (2 + 2) / 4  # two iterations of prefill with 10 tokens each
    assert bound.seat_share == 1.0
    assert bound.pooled == pytest.approx(by_seat * (n + 1) / 2)
    wide = engine.replace(max_num_seqs=400, max_num_batched_tokens=400)
    found = latency_bound(Workload.of(np.zeros(n), np.full(n, 17), np.full(n, 3)), wide)
    assert found.seat_share == 0.0
    assert found.pooled == pytest.approx(0.01 * 3 * 2 / 100 * (n + 1) / 2)


def test_requests_that_do_not_count_are_left_out() -> None:
    engine = EngineConfig.paper(100, 1.0, 1e-3, oversize="reject")
    workload = Workload.of([0.0, 5.0, 6.0], [10, 10, 90], [5, 5, 20])
    assert latency_bound(workload, engine).requests == 2
    later = latency_bound(workload, engine, since=3.0)
    assert later.requests == 1
    assert later.mean == pytest.approx(latency_bound(Workload.of([5.0], [10], [5]), engine).mean)
    assert latency_bound(workload, engine, since=100.0).requests == 0


def test_lines_lie_along_the_lower_hull() -> None:
    # The point (2, 5) lies above the line from (1, 1) to (4, 4).
    assert lower_lines([(1, 1.0), (2, 5.0), (4, 4.0), (8, 12.0)]) == ((1.0, 0.0), (0.0, 1.0), (-4.0, 2.0))
    assert lower_lines([(1, 3.0), (2, 1.0)]) == ((1.0, 0.0),)


# --- never beaten ------------------------------------------------------------------------------------
def _setting(engine: EngineConfig) -> Setting:
    statistics = LengthStatistics.of([8, 30], [4, 16], [1, 1])
    return Setting(statistics, 1.0, engine)


@given(
    hs.sampled_from(MODELS),
    hs.integers(0, 60),
    hs.integers(1, 40),
    hs.lists(hs.integers(2, 120), max_size=12),
    hs.booleans(),
)
@settings(max_examples=300)
def test_every_batch_takes_at_least_its_lines(model: Any, chunk: int, chunks: int, contexts: list[int], sampling: bool) -> None:
    """Up to 12 decodes and prompts of up to 52 tokens together."""
    chunks = min(chunks, chunk)
    sizes = [chunk // chunks + (i < chunk % chunks) for i in range(chunks)] if chunks else []
    n, prefilled = len(contexts), float(sum(sizes))
    if n + prefilled == 0 or n + prefilled > 64:
        return
    batch = Batch(
        decodes=n,
        decode_kv=sum(contexts),
        prefills=len(sizes),
        prefill_tokens=prefilled,
        prefill_squares=float(sum(c * c for c in sizes)),
        prefill_work=sum(c * c / 2 for c in sizes),
        sampled=n + len(sizes) * sampling,
        load=sum(contexts) + prefilled,
        batch_size=n + len(sizes),
    )
    lines = minorant(model, 64, 64, 120)
    seconds = model.seconds(batch)
    for u, v in lines.tokens:
        assert lines.constant + u >= 0 and v >= 0
        for b, w in lines.decode:
            assert b + w >= -1e-18
            least = lines.constant + u + v * (n + prefilled) + b * n + w * sum(contexts)
            least += lines.per_request * batch.batch_size + lines.per_sample * batch.sampled + lines.per_work * batch.prefill_work
            assert least <= seconds * (1 + 1e-12)


@pytest.mark.parametrize("name", ["a100-llama2-7b-vllm", "a100-llama3-8b-vllm", "rtx4090-llama31-8b-vllm", "a100-llama2-7b-c10"])
def test_calibrations_lie_above_their_lines(name: str) -> None:
    model = load_calibration(name)
    lines = minorant(model, 2_048, 256, 4_096)
    rng = np.random.default_rng(0)
    n = rng.integers(0, 257, 4_000)
    kv = np.where(n > 0, n * rng.uniform(2, 4_096, 4_000) ** rng.uniform(0.3, 1, 4_000), 0.0)
    kv = np.maximum(kv, 2.0 * n)
    prompt = np.where(n == 0, 1.0, 0.0) + rng.integers(0, 2_048 - 256, 4_000)
    rows = [
        Batch(
            decodes=float(d), decode_kv=float(k), prefills=float(p > 0), prefill_tokens=float(p), prefill_squares=float(p * p),
            prefill_work=float(p * p / 2), sampled=float(d), load=float(k + p), batch_size=float(d + (p > 0)),
        ).array()
        for d, k, p in zip(n, kv, prompt, strict=True)
    ]  # fmt: skip
    seconds = model.seconds_of(np.array(rows))
    tightest = np.zeros(len(rows))
    for u, v in lines.tokens:
        for b, w in lines.decode:
            least = lines.constant + u + v * (n + prompt) + b * n + w * kv
            least += lines.per_request * (n + (prompt > 0)) + lines.per_sample * n + lines.per_work * prompt**2 / 2
            assert (least <= seconds * (1 + 1e-12)).all()
            tightest = np.maximum(tightest, least / seconds)
    assert np.median(tightest) > (0.6 if name.startswith("a100") else 0.2)  # MixedAttentionTime: without attention


def _engines(draw: Any) -> EngineConfig:
    model = draw(hs.sampled_from(MODELS))
    if draw(hs.booleans()) and type(model) is LinearTime:
        return EngineConfig.paper(draw(hs.integers(60, 300)), 1.0, 1e-2, boundary_slot=draw(hs.booleans()))
    seqs = draw(hs.integers(1, 16))
    budget = draw(hs.integers(seqs, 64))
    return EngineConfig.vllm(
        time_model=model,
        num_blocks=draw(hs.integers(30, 120)),
        block_size=draw(hs.sampled_from([1, 2, 4])),
        max_model_len=30,
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        scheduler_reserve_full_isl=draw(hs.booleans()),
        async_scheduling=draw(hs.booleans()),
        eviction=draw(hs.sampled_from(["recompute", "lose_progress"])),
        long_prefill_token_threshold=draw(hs.sampled_from([0, 3])),
    )


def _workloads(draw: Any) -> Workload:
    n = draw(hs.integers(1, 25))
    gaps = draw(hs.lists(hs.floats(0.0, 0.5), min_size=n, max_size=n))
    prompts = draw(hs.lists(hs.integers(1, 15), min_size=n, max_size=n))
    outputs = draw(hs.lists(hs.integers(1, 15), min_size=n, max_size=n))
    return Workload.of(np.cumsum(gaps), prompts, outputs)


@given(hs.data())
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore::llmsched_env.perf.base.CalibrationRangeWarning")
def test_random_decisions_never_beat_it(data: Any) -> None:
    engine, workload = _engines(data.draw), _workloads(data.draw)
    layout = data.draw(hs.sampled_from([QueueLayout(), QueueLayout("prompt", (5,), segment_ends=(4,))]))
    backend = SimBackend()
    backend.reset(workload, layout, engine, EpisodeLimits())
    rng = np.random.default_rng(data.draw(hs.integers(0, 2**32 - 1)))
    greedy = data.draw(hs.floats(0.0, 1.0))
    while not backend.done:
        q = layout.num_queues
        if rng.random() < greedy:
            decision = Decision.greedy(q)
        else:
            decision = Decision.of(rng.integers(0, 2, q), rng.integers(0, 3, q), rng.integers(0, 2, q) * (np.arange(q) % 2))
        backend.step(decision)
    log = backend.log()
    for since in (0.0, float(workload.arrival[len(workload) // 2])):
        counted = log.arrival >= since
        bound = latency_bound(workload, engine, since=since)
        assert bound.requests == counted.sum()
        assert bound.mean <= float(np.mean((log.completed - log.arrival)[counted]))


POLICIES = ("vllm", "sarathi", "shortest-prompt", "reserve", "expected-work", "mc-sf", "oracle-sjf", "pooled-work", "nested-wait")


@given(hs.data())
@settings(max_examples=25, deadline=None)
@pytest.mark.filterwarnings("ignore::llmsched_env.perf.base.CalibrationRangeWarning")
def test_baselines_never_beat_it_on_small_engines(data: Any) -> None:
    engine, workload = _engines(data.draw), _workloads(data.draw)
    for name in POLICIES:
        try:
            policy = make_policy(name, _setting(engine), overload=True)
        except ConfigError:
            continue
        if policy.engine.max_num_batched_tokens <= engine.max_num_batched_tokens and policy.engine.most_active <= engine.most_active:
            result = run_episode(policy, workload)
            assert latency_bound(workload, engine).mean <= result.summary.latency_mean


@pytest.mark.parametrize(("name", "rate"), [("azure-conv", 5.5), ("lmsys", 40.0), ("two-type", 2.6)])
@pytest.mark.filterwarnings("ignore::llmsched_env.perf.base.CalibrationRangeWarning")
def test_scenarios_stay_above_it(name: str, rate: float) -> None:
    scenario = load_scenario(name)
    engine = scenario.engine
    if engine.preset == "vllm":
        engine = engine.replace(time_model=load_calibration("a100-llama2-7b-vllm"), num_blocks=2_816)
    workload = scenario.generate(1, rate=rate, num_requests=400).with_backlog(100)
    bound = latency_bound(workload, engine)
    least = math.inf
    for policy in ("vllm", "fcfs", "reserve", "mc-sf", "pooled-work"):
        try:
            made = make_policy(policy, Setting(scenario.statistics, rate, engine))
        except ConfigError:
            continue
        least = min(least, run_episode(made, workload).summary.latency_mean)
    assert 0.2 * least < bound.mean <= least


# --- refused -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("engine", "named"),
    [
        (EngineConfig.vllm(enable_prefix_caching=True), "enable_prefix_caching"),
        (EngineConfig.vllm(time_model=load_calibration("a100-llama2-7b-vidur")), "vidur"),
        (EngineConfig(preset="paper", time_model=FORMULA), "paper preset"),
    ],
)
def test_what_is_not_proven_is_refused(engine: EngineConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        latency_bound(Workload.of([0.0], [5], [5]), engine)
