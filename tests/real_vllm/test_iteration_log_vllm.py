"""Iterations that vLLM's scheduler and engines log, against a recount from what the scheduler puts out."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

import serve_inprocess
from serve_inprocess import Server, make_server
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from llmsched_env.backends import make_backend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import Batch
from llmsched_env.types import Decision, QueueLayout, Workload
from llmsched_hardware import options
from llmsched_hardware.calibration.iteration_log import IterationLog, read_iteration_log
from llmsched_hardware.versions import cpu_block_size

ENGINE = EngineConfig.vllm(num_blocks=24, block_size=4, max_num_seqs=8, max_num_batched_tokens=24, max_model_len=64)
HALVES = QueueLayout(segment_ends=(4,))
Make = Callable[..., Server]


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    return lambda *args, **config: make_server(monkeypatch, tmp_path, *args, asynchronous=request.param, **config)


@dataclass
class Recount:
    """Every batch token by token: what each request has computed, and up to where it computes what was there when it entered."""

    computed: dict[str, int] = field(default_factory=dict)
    target: dict[str, int] = field(default_factory=dict)
    ended: int = 0
    batches: list[Batch] = field(default_factory=list)
    begins: list[float] = field(default_factory=list)
    ends: dict[int, float] = field(default_factory=dict)
    outputs: list[Any] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)

    def scheduled(self, server: Server, output: Any) -> None:
        """After ``schedule``."""
        scheduler = server.scheduler
        for request_id in output.finished_req_ids:
            self.ended += self.computed.pop(request_id, None) is not None
            self.target.pop(request_id, None)
        entered = {r.req_id: r.num_computed_tokens for r in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        entered |= {i: n for i, n in zip(cached.req_ids, cached.num_computed_tokens, strict=True) if i in cached.resumed_req_ids}
        if not output.num_scheduled_tokens:
            return
        sums = dict.fromkeys(Batch.__dataclass_fields__, 0.0)
        for request_id, tokens in output.num_scheduled_tokens.items():
            if request_id in entered:
                request = scheduler.requests[request_id]
                self.computed[request_id] = entered[request_id]
                self.target[request_id] = len(request.all_token_ids)
            held, target = self.computed[request_id], self.target[request_id]
            self.computed[request_id] = held + tokens
            sums["load"] += held + tokens
            sums["batch_size"] += 1
            if held >= target:
                assert tokens == 1
                sums["decodes"] += 1
                sums["decode_kv"] += held + 1
                sums["sampled"] += 1
                sums["decode_longest"] = max(sums["decode_longest"], held + 1)
                sums["decode_shortest"] = min(sums["decode_shortest"] or held + 1, held + 1)
                sums["decode_squares"] += (held + 1) ** 2
                continue
            sums["prefills"] += 1
            sums["prefill_tokens"] += tokens
            sums["prefill_squares"] += tokens**2
            sums["prefill_context"] += held
            sums["prefill_context64"] += (held + 63) // 64 * 64
            sums["prefill_work"] += tokens * (tokens / 2 + held)
            sums["sampled"] += held + tokens >= target
        sums["started"], sums["finished"] = len(entered), self.ended
        self.ended = 0
        self.batches.append(Batch(**sums))
        self.begins.append(server.clock)
        self.outputs.append(output)
        pool = scheduler.kv_cache_manager.block_pool
        self.places.append(
            (pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(), sum(scheduler.get_request_counts()), len(scheduler.running))
        )


def drive(server: Server, recount: Recount, requests: int, seed: int, **params: Any) -> list[int]:
    """Random requests in bursts, some aborted; preemptions of every iteration with tokens."""
    scheduler, choice = server.scheduler, random.Random(seed)
    scheduler.watch.clock = lambda: server.clock
    scheduler.watch._origin = 0.0
    victims: list[int] = []
    counted = [0]
    preempt = scheduler._preempt_request

    def counting(*args: Any, **kwargs: Any) -> None:
        counted[0] += 1
        preempt(*args, **kwargs)

    scheduler._preempt_request = counting
    update = scheduler.update_from_output

    def updated(output: Any, *args: Any) -> Any:
        result = update(output, *args)
        recount.ends[id(output)] = server.clock
        return result

    scheduler.update_from_output = updated
    made = 0
    for _ in range(10_000):
        if made == requests and not scheduler.has_requests():
            break
        while made < requests and choice.random() < 0.3:
            server.add(f"r{made}", choice.randint(1, 40), choice.randint(1, 22), **params)
            made += 1
        if scheduler.requests and choice.random() < 0.02:
            from vllm.v1.request import RequestStatus

            scheduler.finish_requests([choice.choice(list(scheduler.requests))], RequestStatus.FINISHED_ABORTED)
        server.clock += choice.random() / 100
        counted[0] = 0
        output = server.schedule()
        recount.scheduled(server, output)
        if output.num_scheduled_tokens:
            victims.append(counted[0])
        stop = frozenset(i for i in scheduler.requests if choice.random() < 0.02)
        while len(server._running) > server.asynchronous or (server._running and not output.num_scheduled_tokens):
            server.clock += 0.01 + choice.random() / 100
            server.finish(stop)
    assert made == requests and not scheduler.requests
    return victims


def read(server: Server, path: Path) -> IterationLog:
    assert server.scheduler.watch.writer.close(30.0)
    return read_iteration_log(path)


def equal(found: IterationLog, recount: Recount, victims: list[int]) -> None:
    assert len(found) == len(recount.batches) > 100
    for i, (row, batch) in enumerate(zip(found.rows(), recount.batches, strict=True)):
        assert row.batch == batch, i
        assert row.begin == pytest.approx(recount.begins[i], abs=1e-6)
        assert row.end == pytest.approx(recount.ends[id(recount.outputs[i])], abs=1e-6)
        assert (row.blocks, row.waiting + row.running, row.running) == recount.places[i]
        assert row.preempted == victims[i]


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_are_what_a_recount_says(make: Make, tmp_path: Path, seed: int) -> None:
    """Under memory pressure: preempted requests compute their output again."""
    path = tmp_path / "log.csv"
    server, recount = make(ENGINE, QueueLayout(), None, iteration_log=str(path)), Recount()
    victims = drive(server, recount, 120, seed)
    found = read(server, path)
    equal(found, recount, victims)
    assert sum(victims) > 5
    assert found.engine["asynchronous"] is server.asynchronous and found.engine["num_blocks"] == 24
    assert {k: v["policy"] for k, v in found.segments.items()} == {0: "scripted"}
    again = [b for b in recount.batches if b.prefill_tokens]
    assert len(again) > 20
    seconds, busy = found.seconds(), found.column("end")[-1]
    assert (seconds > 0).all() and seconds.sum() <= busy
    assert (found.column("execute_seconds") == -1).all() == server.asynchronous


def test_holds_evictions_and_boundaries_are_in_the_rows(make: Make, tmp_path: Path) -> None:
    choice = random.Random(3)

    def script(view: Any) -> Decision:
        decision = Decision.greedy(2)
        decision.run[:] = choice.random() < 0.8
        decision.evict[1] = choice.random() < 0.2
        return decision

    path = tmp_path / "log.csv"
    server, recount = make(ENGINE, HALVES, script, iteration_log=str(path), max_wait_seconds=0.5), Recount()
    victims = drive(server, recount, 80, 5)
    equal(read(server, path), recount, victims)
    assert sum(victims) > 5


def test_hits_in_the_prefix_cache_are_context(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All prompts begin alike."""
    init_none_hash(sha256)
    monkeypatch.setitem(options.FIXED, "enable_prefix_caching", True)
    hasher = get_request_block_hasher(ENGINE.block_size, sha256)
    monkeypatch.setattr(serve_inprocess, "Request", functools.partial(Request, block_hasher=hasher))
    path = tmp_path / "log.csv"
    server, recount = make(ENGINE, QueueLayout(), None, iteration_log=str(path)), Recount()
    assert server.scheduler.kv_cache_manager.enable_caching
    victims = drive(server, recount, 120, 7)
    found = read(server, path)
    equal(found, recount, victims)
    assert found.engine["prefix_caching"] and (found.column("prefill_context")[found.column("prefills") == 1] > 0).sum() > 20


def test_a_policy_that_fails_and_vllms_own_admission_are_logged(make: Make, tmp_path: Path) -> None:
    def script(view: Any) -> Decision:
        raise ArithmeticError("a mistake in the policy")

    path = tmp_path / "log.csv"
    server, recount = make(ENGINE, QueueLayout(), script, iteration_log=str(path)), Recount()
    victims = drive(server, recount, 100, 11)
    equal(read(server, path), recount, victims)


def test_a_log_of_another_engine_stops_the_server_before_its_first_request(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    server = make(ENGINE, QueueLayout(), None, iteration_log=str(path))
    server.add("a", 5, 5)
    server.run_until_empty()
    device = read(server, path).engine["device"]
    path.write_text(path.read_text().replace(f'"device":"{device}"', '"device":"another"'))
    with pytest.raises(ConfigError, match=r"log\.csv holds iterations of another engine \(device 'another', now "):
        make(ENGINE, QueueLayout(), None, iteration_log=str(path))


def test_the_environment_variable_wins_over_the_file(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSCHED_LOG_ITERATIONS", str(tmp_path / "other.csv"))
    server = make(ENGINE, QueueLayout(), None, iteration_log=str(tmp_path / "log.csv"))
    server.add("a", 5, 5)
    server.run_until_empty()
    server.scheduler.shutdown()
    assert len(read_iteration_log(tmp_path / "other.csv")) == 5 and not (tmp_path / "log.csv").exists()
    monkeypatch.setenv("LLMSCHED_LOG_ITERATIONS", str(tmp_path / "no" / "other.csv"))
    with pytest.raises(ConfigError, match=r"LLMSCHED_LOG_ITERATIONS: .*its folder does not exist"):
        make(ENGINE, QueueLayout(), None)
    assert np.isfinite(server.clock)


def test_an_engine_logs_its_episodes(tmp_path: Path) -> None:
    """Against the record of the same iterations; two policies whose engines differ in what may differ."""
    block = cpu_block_size()
    settings = {"num_blocks": 256 // block, "block_size": block, "max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    engine = EngineConfig.vllm(**settings)
    numbers = np.random.default_rng(0)
    prompt, output = numbers.integers(1, 80, 30), numbers.integers(1, 40, 30)
    workload = Workload.of(np.zeros(30), prompt, output)
    paths = {name: tmp_path / f"{name}.csv" for name in ("record", "log")}
    backend = make_backend("vllm", record=paths["record"], iteration_log=paths["log"])
    try:
        for run, changes in enumerate(({}, {}, {"max_num_seqs": 4})):
            backend.about_episode = {"run": run}
            backend.reset(workload, QueueLayout(), engine.replace(**changes), EpisodeLimits())
            while not backend.done:
                backend.advance(Decision.greedy(1))
    finally:
        backend.close()
    found = read_iteration_log(paths["log"])
    lines = [json.loads(line) for line in paths["record"].read_text().splitlines()]
    steps = [line for line in lines if line["kind"] == "step" and line["tokens"]]
    rows = list(found.rows())
    assert len(steps) == len(rows) > 90
    for row, step in zip(rows, steps, strict=True):
        batch = row.batch
        assert (batch.decodes, batch.prefills) == (step["decode_requests"], step["prefill_requests"])
        assert (batch.prefill_tokens, batch.load) == (step["prefill_tokens"], step["load"])
        assert (batch.started, row.preempted) == (step["admitted"], len(step["preempted"]))
        assert row.execute_seconds == pytest.approx(step["execute"], abs=1e-6)
    assert [s["run"] for s in found.segments.values()] == [0, 1, 2] and found.segments[2]["engine"] == {"max_num_seqs": 4}
    assert (found.engine["model"], found.engine["max_num_seqs"], found.engine["asynchronous"]) == ("tiny", 8, False)
    for run in range(3):
        own = [r for r in rows if r.segment == run]
        assert own[0].begin >= 0 and sum(r.batch.finished for r in own) >= 30 - 8
    seconds, executed = found.seconds(), found.column("execute_seconds")
    assert (seconds >= executed).all()
