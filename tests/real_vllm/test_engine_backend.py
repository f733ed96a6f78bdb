"""A real vLLM engine (CPU build, tiny Llama with random weights) as a backend: decisions, equality with `sim`, clocks, failures.

Run by ``make test-vllm`` in an environment with vLLM; skipped elsewhere.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:  # importing it would read its settings before the backend has made them
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from gymnasium.utils.env_checker import check_env

from llmsched_baselines import Setting, make_policy
from llmsched_env.backends import make_backend
from llmsched_env.engine import state as st
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError, EngineError
from llmsched_env.perf import LinearTime
from llmsched_env.runner import run_episode
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout, RequestLog, Workload
from llmsched_env.workload.lengths import Types
from llmsched_hardware import real_engine
from llmsched_hardware.gated_scheduler import Admission
from llmsched_hardware.real_engine import EngineOptions, build_engine, engine_scheduler, free_engine, num_usable_blocks
from llmsched_hardware.versions import cpu_block_size
from llmsched_hardware.vllm_engine import VllmEngineBackend
from tests.env_settings import ADMIT

BLOCK = cpu_block_size()
ENGINE = EngineConfig.vllm(
    block_size=BLOCK,
    num_blocks=384 // BLOCK,
    max_num_seqs=8,
    max_num_batched_tokens=64,
    max_model_len=160,
    time_model=LinearTime(0.01, 1e-5),
)
SEGMENTS = QueueLayout(segment_ends=(4, 12))
LENGTHS = Types((20, 40, 90), (8, 30, 60), (0.4, 0.4, 0.2))


def workload(seed: int, n: int = 30, rate: float = 40.0) -> Workload:
    g = np.random.default_rng(seed)
    rows = g.choice(3, n, p=[0.4, 0.4, 0.2])
    return Workload.of(np.cumsum(g.exponential(1 / rate, n)), np.array([20, 40, 90])[rows], np.array([8, 30, 60])[rows])


def together(*requests: tuple[int, int]) -> Workload:
    """Requests (prompt, output) that all arrive at time 0."""
    return Workload.of(np.zeros(len(requests)), [p for p, _ in requests], [o for _, o in requests])


@pytest.fixture(scope="module")
def shared() -> Iterator[VllmEngineBackend]:
    """One engine for all tests that need the settings above: episodes reuse it."""
    backend = VllmEngineBackend(clock="virtual", keep_tokens=True, trace=True)
    yield backend
    backend.close()


def running(backend: VllmEngineBackend) -> dict[int, int]:
    """Computed tokens by request, as vLLM's scheduler has them."""
    numbers = backend._number
    return {numbers[r.request_id]: r.num_computed_tokens for r in engine_scheduler(backend._engine).running}


def free_blocks(backend: VllmEngineBackend) -> int:
    return int(engine_scheduler(backend._engine).kv_cache_manager.block_pool.get_num_free_blocks())


def assert_same_log(a: RequestLog, b: RequestLog) -> None:
    for f in dataclasses.fields(RequestLog):
        x, y = getattr(a, f.name), getattr(b, f.name)
        same = x == y if f.name == "request_id" else np.array_equal(x, y, equal_nan=f.name in ("admitted", "first_token", "completed"))
        assert same, f"{f.name}: {x} against {y}"


# --- what a decision does in the engine ---------------------------------------------------------------
def test_gate_hold_boundary_queue_eviction_and_readmission(shared: VllmEngineBackend) -> None:
    backend, layout = shared, QueueLayout(segment_ends=(3,))
    backend.reset(together((20, 6), (20, 6), (20, 6)), layout, ENGINE, EpisodeLimits(drain=False))
    run, none = [1, 1], [0, 0]

    # The gate: nobody enters who is not admitted, the oldest enters first.
    backend.step(Decision.of(run, [1, 0]))
    assert running(backend) == {0: 20}
    backend.step(Decision.of(none, [1, 0]))  # the first is held while the second is prefilled
    assert running(backend) == {0: 20, 1: 20}
    backend.step(Decision.of(run, none))
    assert running(backend) == {0: 21, 1: 21}

    # The boundary queue after three tokens: KV kept, no progress while it waits, whatever `run` says.
    backend.step(Decision.of(run, none))
    backend.step(Decision.of(run, [1, 0]))
    assert backend.snapshot().waiting.tolist() == [[0, 2]]
    assert running(backend) == {0: 22, 1: 22, 2: 20}
    before = free_blocks(backend)
    backend.step(Decision.of([0, 1], [0, 1]))  # the older one enters the last segment
    assert running(backend) == {0: 23, 1: 22, 2: 20}
    assert free_blocks(backend) == before

    # Eviction: the KV goes, the request waits outside until it is admitted again, and recomputes what it had.
    report = backend.step(Decision.of(none, none, [0, 1]))
    assert report.evicted == (1,)
    assert running(backend) == {0: 23, 2: 20}
    assert free_blocks(backend) == before + -(-22 // BLOCK)
    backend.step(Decision.of(run, none))
    assert running(backend) == {0: 24, 2: 21}
    assert backend.snapshot().num_waiting == 1
    report = backend.step(Decision.of(none, [1, 0]))
    assert report.prefill_tokens == 23  # prompt and its three tokens
    while not backend.done:
        backend.step(Decision.greedy(2))
    assert backend.counters().finished == 3
    assert free_blocks(backend) == ENGINE.num_blocks
    assert {r: len(t) for r, t in backend.tokens.items()} == {0: 6, 1: 6, 2: 6}


def test_held_requests_keep_their_sequence_slots(shared: VllmEngineBackend) -> None:
    """The gate alone, without the backend's own count of places."""
    shared.reset(together(*[(10, 6)] * 10), QueueLayout(), ENGINE, EpisodeLimits())
    while len(running(shared)) < 8:
        shared.step(Decision.of([1], [ADMIT_ALL]))
    scheduler = engine_scheduler(shared._engine)
    held = frozenset(r.request_id for r in scheduler.running)
    waiting = [r.request_id for r in scheduler.waiting]
    assert len(waiting) == 2
    scheduler.gate = Admission(admit=waiting, hold=held)
    shared._engine.step()
    assert scheduler.gate.admitted == [] and scheduler.gate.tokens == {}
    scheduler.gate = Admission(admit=None, hold=held)  # vLLM's own admission
    shared._engine.step()
    assert scheduler.gate.admitted == []
    assert [r.request_id for r in scheduler.waiting] == waiting


class RandomPolicy:
    """Random run, admit and evict; the same sequence in every episode."""

    name, known_lengths, notes = "random", False, ""
    engine, layout = ENGINE, SEGMENTS

    def __init__(self, seed: int, evict: float = 0.2) -> None:
        self._seed, self._evict = seed, evict

    def reset(self) -> None:
        self._rng = np.random.default_rng(self._seed)

    def decide(self, view: Any) -> Decision:
        g = self._rng
        if g.random() < 0.3:
            return Decision.greedy(3)
        evict = g.choice([0, 0, 1], 3) if g.random() < self._evict else np.zeros(3, int)
        return Decision.of(g.random(3) < 0.8, g.choice([0, 1, 2, ADMIT_ALL], 3), evict)


def policies() -> list[Any]:
    setting = Setting(LENGTHS.statistics(), 40.0, ENGINE, overrides={"max_num_batched_tokens": 64, "max_num_seqs": 8})
    built = [make_policy(name, setting, overload=True) for name in ("vllm", "nested-wait", "wait", "reserve")]
    return [RandomPolicy(0), RandomPolicy(1), *built]


@pytest.mark.parametrize("policy", policies(), ids=lambda p: p.name)
def test_whole_episodes_equal_the_other_backends(shared: VllmEngineBackend, policy: Any) -> None:
    """Under the virtual clock: every report, every scheduled token, the counters and the log."""
    work = workload(3)
    outcomes = []
    for backend in (make_backend("sim", trace=True), make_backend("vllm-scheduler", trace=True), shared):
        steps: list[Any] = []
        result = run_episode(
            policy,
            work,
            backend=backend,
            on_step=lambda report, view, b=backend, s=steps: s.append((report, [x.tolist() for x in b.scheduled() if not report.idle])),
        )
        outcomes.append((steps, result))
        if backend is not shared:
            backend.close()
    (steps, result), *others = outcomes
    for other_steps, other in others:
        for mine, theirs in zip(steps, other_steps, strict=True):
            assert mine == theirs
        assert other.counters == result.counters
        assert repr(other.summary) == repr(result.summary)
        assert_same_log(other.log, result.log)
    assert result.counters.finished == len(work)
    if policy.name == "random":
        assert result.counters.forced_evictions > 0
        assert result.counters.evictions > result.counters.forced_evictions


def test_horizon_and_stranded_episodes_end_alike(shared: VllmEngineBackend) -> None:
    sim = make_backend("sim")
    policy = RandomPolicy(2)
    for limits in (EpisodeLimits(horizon=0.5), EpisodeLimits(drain=False), EpisodeLimits(max_iterations=40)):
        ends = [run_episode(policy, workload(5), limits=limits, backend=b) for b in (sim, shared)]
        assert ends[0].counters == ends[1].counters
        assert ends[0].counters.end != "finished"
        assert_same_log(ends[0].log, ends[1].log)


def test_gated_tokens_equal_the_ungated_engine(shared: VllmEngineBackend) -> None:
    """Greedy token ids under random gating, holding, eviction and preemption: what the KV cache holds is right."""
    from vllm.v1.core.sched.scheduler import Scheduler

    work = workload(11, n=36)
    result = run_episode(RandomPolicy(4, evict=0.8), work, backend=shared)
    assert result.counters.forced_evictions > 3
    assert result.counters.evictions > result.counters.forced_evictions + 3

    plain = build_engine(EngineOptions(num_blocks=200, max_model_len=160, max_num_seqs=8, max_num_batched_tokens=160), Scheduler)
    try:
        assert type(engine_scheduler(plain)) is Scheduler
        vocabulary = real_engine.vocabulary_size(plain)
        for r, (p, o) in enumerate(zip(work.prompt_tokens.tolist(), work.output_tokens.tolist(), strict=True)):
            real_engine.add_request(plain, str(r), real_engine.prompt_token_ids(0, r, p, vocabulary), o)
        tokens = {}
        while plain.has_unfinished_requests():
            tokens.update({int(output.request_id): list(output.outputs[0].token_ids) for output in plain.step()})
    finally:
        free_engine(plain)
    assert tokens == shared.tokens
    assert len({tuple(t[:8]) for t in tokens.values()}) == len(work)  # not the same text over and over
    assert all(len(set(t)) > len(t) // 2 for t in tokens.values())


def test_episodes_reuse_the_engine(shared: VllmEngineBackend) -> None:
    work, policy = workload(7, n=12), RandomPolicy(5)
    first = run_episode(policy, work, backend=shared)
    engine, tokens = shared._engine, shared.tokens
    shared.reset(workload(8), SEGMENTS, ENGINE, EpisodeLimits())
    for _ in range(15):  # broken off with requests waiting, running and held
        shared.step(Decision.of([1, 0, 1], [2, 0, 1]))
    assert shared.snapshot().num_residents
    third = run_episode(policy, work, backend=shared)
    assert shared._engine is engine
    assert third.counters == first.counters
    assert_same_log(third.log, first.log)
    assert shared.tokens == tokens
    assert free_blocks(shared) == num_usable_blocks(engine) == ENGINE.num_blocks


# --- clocks and times -----------------------------------------------------------------------------------
class Slow(RandomPolicy):
    name = "slow"

    def decide(self, view: Any) -> Decision:
        time.sleep(0.002)
        return super().decide(view)


def test_the_measured_clock_is_the_sum_of_measured_steps(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    backend = VllmEngineBackend(record=record)
    work = workload(13, n=12, rate=200.0)
    result = run_episode(Slow(6), work, backend=backend)
    counters, total = result.counters, backend.total_seconds
    assert counters.finished == len(work)
    assert counters.busy_seconds == pytest.approx(total.whole, rel=0.05)  # steps that schedule nothing move no clock
    assert 0 < total.execute < total.whole
    assert total.schedule + total.execute + total.update <= total.whole
    steps = counters.iterations + counters.idle_steps
    assert backend.thinking_seconds >= 0.002 * steps
    assert counters.out_of_range == 0  # the time model is not asked

    lines = [json.loads(line) for line in record.read_text().splitlines()]
    kinds = [line["kind"] for line in lines]
    assert kinds[0] == "episode" and kinds[-1] == "end"
    assert lines[0]["machine"]["num_blocks"] == ENGINE.num_blocks
    recorded = [line for line in lines if line["kind"] == "step"]
    assert len(recorded) == steps
    assert sum(line["thinking"] for line in recorded) == pytest.approx(backend.thinking_seconds)
    busy = [line for line in recorded if line["tokens"]]
    assert all(line["duration"] == line["whole"] for line in busy)
    assert sum(sum(line["tokens"].values()) for line in busy) >= int(work.prompt_tokens.sum() + work.output_tokens.sum()) - len(work)
    finished = {line["request"]: line for line in lines if line["kind"] == "request"}
    assert len(finished) == len(work)
    for r, line in finished.items():
        assert line["completed"] == result.log.completed[r]
        assert line["output_tokens"] == work.output_tokens[r]
    backend.close()


def test_the_wall_clock_waits_for_arrivals_and_counts_thinking() -> None:
    backend = VllmEngineBackend(clock="wall")
    work = Workload.of([0.0, 0.3], [20, 20], [4, 4])
    backend.reset(work, QueueLayout(), ENGINE, EpisodeLimits())
    start = time.perf_counter()
    while not backend.done:
        time.sleep(0.002)
        backend.advance(Decision.greedy(1))
        assert time.perf_counter() - start >= backend.counters().clock - 0.01  # never ahead of the real time
    counters = backend.counters()
    assert counters.clock > 0.3
    assert counters.busy_seconds >= backend.thinking_seconds - 0.002 * counters.idle_steps - 0.01
    assert counters.busy_seconds > backend.total_seconds.whole
    backend.close()


# --- lengths that the model decides -----------------------------------------------------------------------
def test_real_stopping_discovers_the_lengths(shared: VllmEngineBackend) -> None:
    work = workload(17, n=16)
    run_episode(RandomPolicy(7), work, backend=shared)
    # Stop tokens that some requests generate on the way, and some not.
    stops = sorted({t[len(t) // 2] for r, t in shared.tokens.items() if r % 2})
    expected = {r: min((i + 1 for i, token in enumerate(t) if token in stops), default=len(t)) for r, t in shared.tokens.items()}
    assert 0 < sum(expected[r] < len(t) for r, t in shared.tokens.items()) < len(work)

    backend = VllmEngineBackend(clock="virtual", real_stopping=True, stop_token_ids=stops, keep_tokens=True)
    found = run_episode(RandomPolicy(7), work, backend=backend)
    lengths = found.log.output_tokens.tolist()
    assert lengths == [expected[r] for r in range(len(work))]
    assert [len(backend.tokens[r]) for r in range(len(work))] == lengths
    # Had the lengths been known beforehand, the simulator would have done the same.
    known = dataclasses.replace(work, output_tokens=found.log.output_tokens)
    sim = run_episode(RandomPolicy(7), known, backend=make_backend("sim"))
    assert sim.counters == found.counters
    assert_same_log(sim.log, found.log)

    with pytest.raises(ConfigError, match="reveal_output_length"):
        backend.reset(work, SEGMENTS, ENGINE, EpisodeLimits(), reveal_output_length=True)
    with pytest.raises(ConfigError, match=r"layout\.by: 'output'"):
        backend.reset(work, QueueLayout("output", (20,)), ENGINE, EpisodeLimits())
    backend.close()


# --- failures ---------------------------------------------------------------------------------------------
def test_an_engine_that_dies_names_the_cause_and_keeps_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record.jsonl"
    backend = VllmEngineBackend(clock="virtual", record=record)
    work, policy = workload(19, n=10), RandomPolicy(8)
    policy.reset()
    view = backend.reset(work, SEGMENTS, ENGINE, EpisodeLimits())
    executor = backend._engine.engine_core.engine_core.model_executor
    execute, calls = executor.execute_model, 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 60:
            import torch

            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return execute(*args, **kwargs)

    monkeypatch.setattr(executor, "execute_model", dying)
    steps = 0
    with pytest.raises(EngineError, match=r"the vLLM engine died: OutOfMemoryError: CUDA out of memory.*lower gpu_memory_utilization"):
        while True:
            backend.advance(policy.decide(view))
            steps += 1
    lines = [json.loads(line) for line in record.read_text().splitlines()]  # before anything is closed
    assert sum(line["kind"] == "step" for line in lines) == steps > 40
    finished = int(backend.counters().finished)
    assert sum(line["kind"] == "request" for line in lines) == finished > 0
    assert lines[-1]["kind"] == "error" and "out of memory" in lines[-1]["cause"]
    assert np.isfinite(backend.log().completed).sum() == finished

    with pytest.raises(EngineError, match=r"died.*call reset\(\) for a new engine"):
        backend.advance(Decision.greedy(3))
    broken = backend._engine
    result = run_episode(policy, work, backend=backend)  # a new engine
    assert backend._engine is not broken
    assert_same_log(result.log, run_episode(policy, work, backend=make_backend("sim")).log)
    backend.close()
    backend.close()


def test_an_engine_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    small = EngineOptions(num_blocks=10, max_model_len=160)
    for options, cause in (
        (dataclasses.replace(small, model="/no/such/folder"), "/no/such/folder, no such folder"),
        (dataclasses.replace(small, extra={"max_lora": 1}), r"extra\.max_lora: vllm\.EngineArgs has no such field; did you mean 'max_lor"),
        (dataclasses.replace(small, dtype="float99"), "vLLM refuses these engine settings.*float99"),
        (dataclasses.replace(small, max_num_batched_tokens=4), "vLLM refuses these engine settings.*max_num_batched_tokens"),
    ):
        with pytest.raises(ConfigError, match=cause):
            build_engine(options)

    with pytest.raises(ConfigError, match="max_model_len: 161, must fit the KV cache: <= 160 tokens"):
        dataclasses.replace(small, max_model_len=161)

    def no_memory(*args: Any, **kwargs: Any) -> Any:
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vllm.LLMEngine, "from_engine_args", no_memory)
    with pytest.raises(EngineError, match=r"cannot start: OutOfMemoryError: CUDA out of memory \(out of memory: lower"):
        build_engine(small)


def test_models_whose_cache_is_not_counted_in_blocks_of_full_attention_are_refused(tmp_path: Path) -> None:
    from llmsched_hardware.shapes import model_shape

    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
    (tmp_path / "config.json").write_text(json.dumps(model_shape("tiny").config() | layers))
    with pytest.raises(ConfigError, match=r"model: .* keeps its KV cache as .*SlidingWindowSpec.*; only full attention"):
        build_engine(EngineOptions(model=str(tmp_path), load_format="dummy", num_blocks=40, max_model_len=160))


def test_settings_that_differ_from_the_engine_are_refused(shared: VllmEngineBackend) -> None:
    shared.reset(together((5, 5)), QueueLayout(), ENGINE, EpisodeLimits())
    options = EngineOptions.of(ENGINE)
    real_engine._check_agreement(shared._engine, options)
    for name, value in (("num_blocks", 25), ("max_num_batched_tokens", 65), ("watermark", 0.1), ("enable_chunked_prefill", False)):
        with pytest.raises(ConfigError, match=rf"{name}: asked for {value}, but vLLM runs tiny with"):
            real_engine._check_agreement(shared._engine, dataclasses.replace(options, **{name: value}))


def test_other_settings_rebuild_the_engine() -> None:
    backend = VllmEngineBackend(clock="virtual")
    sim = make_backend("sim")
    work, built = workload(23, n=8), []
    small = ENGINE.replace(num_blocks=-(-176 // BLOCK), watermark=0.1, scheduler_reserve_full_isl=False)
    for engine in (ENGINE, ENGINE.replace(late_after=1.0), small):
        policy = RandomPolicy(9)
        policy.engine = engine
        logs = [run_episode(policy, work, backend=b).log for b in (sim, backend)]
        assert_same_log(*logs)
        built.append(backend._engine)
        assert num_usable_blocks(built[-1]) == engine.num_blocks
    assert built[0] is built[1]  # what only our queues know of is no reason
    assert built[1] is not built[2]
    backend.close()
    with pytest.raises(RuntimeError, match="no engine is running"):
        backend.machine()
    assert_same_log(run_episode(policy, work, backend=backend).log, logs[0])  # after close() a reset builds it again
    backend.close()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"clok": "wall"}, r"backend_config\.clok: unknown; did you mean 'clock'"),
        ({"clock": "virtuel"}, r"backend_config\.clock: 'virtuel', must be one of measured, virtual, wall; did you mean 'virtual'"),
        ({"num_blocks": 5}, r"backend_config\.num_blocks: belongs to the environment's engine settings"),
        ({"extra": {"async_scheduling": True}}, r"extra\.async_scheduling: set by llmsched_env"),
        ({"stop_token_ids": [3]}, r"stop_token_ids: \[3\], needs real_stopping=True"),
        ({"temperature": -1.0}, r"temperature: -1\.0, must be finite and >= 0"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization: 1\.5, must be in \(0, 1\]"),
        ({"model": ""}, r"model: '', must be"),
        ({"record": "/no/such/folder/file"}, r"record: /no/such/folder/file, cannot be written"),
    ],
)
def test_bad_settings_are_refused_before_any_engine_is_built(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_backend("vllm", **config)


def test_requests_that_do_not_fit_are_refused_before_any_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmsched_hardware.vllm_engine.build_engine", lambda options: pytest.fail("an engine was built"))
    backend = VllmEngineBackend()
    with pytest.raises(ConfigError, match=r"request 0 needs 100 prompt \+ 61 output tokens, more than engine\.max_model_len = 160"):
        backend.reset(together((100, 61)), QueueLayout(), ENGINE, EpisodeLimits())
    with pytest.raises(ConfigError, match=r"engine\.preset: 'paper'"):
        backend.reset(together((5, 5)), QueueLayout(), EngineConfig.paper(100, 1.0, 0.0), EpisodeLimits())


def test_sampling_that_ends_a_cpu_engine_is_refused_before_any_engine_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = VllmEngineBackend(temperature=0.7)
    with monkeypatch.context() as patch:
        patch.setattr("llmsched_hardware.vllm_engine.build_engine", lambda options: pytest.fail("an engine was built"))
        with pytest.raises(ConfigError, match=r"temperature: must be 0 for vLLM on a CPU with engine\.enable_chunked_prefill=True"):
            backend.reset(together((100, 20)), QueueLayout(), ENGINE, EpisodeLimits())
    # Whole prompts are sampled as anywhere else.
    policy = RandomPolicy(9)
    policy.engine = ENGINE.replace(enable_chunked_prefill=False, max_num_batched_tokens=512)
    work = together(*[(100, 20)] * 12)
    assert np.isfinite(run_episode(policy, work, backend=backend).log.completed).all()
    backend.close()


# --- the environment ----------------------------------------------------------------------------------------
SMALL = {"num_blocks": 4160 // BLOCK, "block_size": BLOCK, "max_num_seqs": 16, "max_num_batched_tokens": 512}


def test_gymnasium_checker() -> None:
    env = gym.make("llmsched_env:LLMSchedHardware-v1", num_requests=4, engine=SMALL).unwrapped
    env.reset(seed=0)  # vLLM's own warnings come when the engine is built
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True, skip_close_check=True)
    assert env.spec is not None and env.spec.nondeterministic
    env.close()


def test_the_default_environment_runs_out_of_the_box() -> None:
    env = gym.make("llmsched_env:LLMSchedHardware-v1", num_requests=3)
    base: Any = env.unwrapped
    assert isinstance(base.backend, VllmEngineBackend)
    sim = gym.make("llmsched_env:LLMSched-v1", num_requests=3)
    assert env.action_space == sim.action_space
    assert env.observation_space == sim.observation_space
    observation, _ = env.reset(seed=1)
    done = False
    while not done:
        assert env.observation_space.contains(observation)
        observation, _, terminated, truncated, info = env.step(np.array([6, 0]))  # as many as fit, in order of arrival
        done = terminated or truncated
    assert info["summary"]["completed"] == 3
    assert info["summary"]["sim_seconds"] > 0
    with pytest.raises(TypeError, match="cannot be pickled"):
        import copy

        copy.deepcopy(base.backend)
    env.close()


def test_the_virtual_clock_gives_the_same_observations_and_rewards_as_the_simulator() -> None:
    envs = [
        gym.make("LLMSched-v1", **ADMIT, num_requests=12, engine=SMALL, rate=9.0, backend=name, backend_config=config).unwrapped
        for name, config in (("sim", {}), ("vllm", {"clock": "virtual"}))
    ]
    first = [env.reset(seed=3)[0] for env in envs]
    assert all(np.array_equal(first[0][k], first[1][k]) for k in first[0])
    rng, done = np.random.default_rng(0), False
    while not done:
        action = np.concatenate([rng.random(4) < 0.9, rng.choice([0, 1, 16], 4)]).astype(np.int64)
        a, b = (env.step(action) for env in envs)
        assert all(np.array_equal(a[0][k], b[0][k]) for k in a[0])
        assert a[1:4] == b[1:4]
        done = a[2]
    assert a[4]["summary"] == b[4]["summary"]
    for env in envs:
        env.close()


def test_closing_frees_the_engine() -> None:
    before = set(real_engine._live)
    backend = VllmEngineBackend(clock="virtual")
    backend.reset(together((5, 5)), QueueLayout(), ENGINE, EpisodeLimits())
    assert len(set(real_engine._live) - before) == 1
    backend.close()
    assert set(real_engine._live) == before


def test_requests_refused_on_arrival_never_reach_the_engine(shared: VllmEngineBackend) -> None:
    engine = ENGINE.replace(oversize="reject")
    shared.reset(together((5, 5), (150, 50), (6, 5)), QueueLayout(), engine, EpisodeLimits())
    while not shared.done:
        shared.advance(Decision.greedy(1))
    assert shared.record.requests.status.tolist() == [st.FINISHED, st.REJECTED, st.FINISHED]
    assert sorted(shared.tokens) == [0, 2]
