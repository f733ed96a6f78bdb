"""Invariants of the engine under arbitrary decisions, both presets (hypothesis)."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs
from local_policies import GreedyFCFS, PrefixNested, ThresholdWait, play

from llmsched_env.backend import View
from llmsched_env.backends import make_backend
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime, load_calibration
from llmsched_env.types import ADMIT_ALL, Decision, IterationReport, QueueLayout, RequestLog, Workload

Script = tuple[Decision, ...]


@dataclass(frozen=True, slots=True)
class Episode:
    """``script`` first, then the greedy decision."""

    workload: Workload
    layout: QueueLayout
    engine: EngineConfig
    limits: EpisodeLimits
    script: Script

    def decision(self, number: int) -> Decision:
        return self.script[number] if number < len(self.script) else Decision.greedy(self.layout.num_queues)

    def start(self, backend: SimBackend | None = None) -> tuple[SimBackend, View]:
        backend = backend or SimBackend(trace=True)
        return backend, backend.reset(self.workload, self.layout, self.engine, self.limits)


@hs.composite
def workloads(draw: hs.DrawFn, num_types: int) -> Workload:
    rows = draw(
        hs.lists(
            hs.tuples(
                hs.sampled_from([0.0, 0.0, 0.25, 1.0]) | hs.floats(0, 5),
                hs.integers(1, 20),
                hs.integers(1, 12),
                hs.integers(0, num_types - 1),
            ),
            min_size=1,
            max_size=25,
        )
    )
    gaps, prompt, output, kinds = zip(*rows, strict=True)
    return Workload.of(np.cumsum(gaps), prompt, output, kinds)


@hs.composite
def layouts(draw: hs.DrawFn, num_types: int) -> QueueLayout:
    ends = tuple(sorted(draw(hs.sets(hs.integers(1, 11), max_size=2))))
    by = draw(hs.sampled_from(["single", "type", "prompt", "output"]))
    if by == "single":
        return QueueLayout(segment_ends=ends)
    if by == "type":
        return QueueLayout(by="type", num_types=num_types, segment_ends=ends)
    return QueueLayout(by=by, edges=tuple(sorted(draw(hs.sets(hs.integers(1, 19), max_size=2)))), segment_ends=ends)


@hs.composite
def engines(draw: hs.DrawFn, longest: int) -> EngineConfig:
    order = draw(hs.sampled_from(["arrival", "class"]))
    model = draw(hs.sampled_from([LinearTime(0.5, 0.0), LinearTime(0.1, 0.01), load_calibration("a100-llama2-7b-c10")]))
    if draw(hs.booleans()):
        return EngineConfig(
            preset="paper",
            time_model=model,
            admission_order=order,
            capacity_tokens=longest + draw(hs.integers(0, 60)),
            boundary_slot=draw(hs.booleans()),
        )
    block, seqs = draw(hs.integers(1, 8)), draw(hs.integers(1, 12))
    free_block, chunked = draw(hs.booleans()), draw(hs.booleans())
    return EngineConfig.vllm(
        time_model=model,
        admission_order=order,
        block_size=block,
        num_blocks=-(-longest // block) + int(free_block) + draw(hs.integers(0, 12)),
        max_model_len=longest,
        max_num_seqs=seqs,
        max_num_batched_tokens=max(seqs, draw(hs.integers(1, 40)), 0 if chunked else longest),
        enable_chunked_prefill=chunked,
        scheduler_reserve_full_isl=draw(hs.booleans()),
        watermark=draw(hs.sampled_from([0.0, 0.1, 0.4])),
        padded_prefill=draw(hs.booleans()) and not chunked,
        decode_needs_free_block=free_block,
    )


@hs.composite
def scripts(draw: hs.DrawFn, queues: int) -> Script:
    row = hs.tuples(
        hs.lists(hs.integers(0, 1), min_size=queues, max_size=queues),
        hs.lists(hs.sampled_from([ADMIT_ALL, 0, 1, 3]), min_size=queues, max_size=queues),
        hs.lists(hs.sampled_from([0, 0, 1, ADMIT_ALL]), min_size=queues, max_size=queues),
    )
    return tuple(Decision.of(*r) for r in draw(hs.lists(row, max_size=50)))


@hs.composite
def episodes(draw: hs.DrawFn, drain: bool | None = None, horizon: bool = True) -> Episode:
    num_types = draw(hs.integers(1, 3))
    workload = draw(workloads(num_types))
    layout = draw(layouts(num_types))
    longest = int((workload.prompt_tokens + workload.output_tokens).max())
    engine = draw(engines(longest))
    if longest > 3 and draw(hs.integers(0, 5)) == 0:  # some requests too long, refused on arrival
        engine = draw(engines(longest - 2)).replace(oversize="reject")
    limits = EpisodeLimits(
        drain=draw(hs.booleans()) if drain is None else drain,
        horizon=draw(hs.just(math.inf) | hs.sampled_from([0.7, 3.0, 10.0])) if horizon else math.inf,
    )
    return Episode(workload, layout, engine, limits, draw(scripts(layout.num_queues)))


def residents_kv(view: View) -> int:
    """KV units of the residents, summed from their own records."""
    computed = view.resident_requests().computed
    if view.engine.preset == "paper":
        return int(computed.sum())
    return int(np.sum(-(-computed // view.engine.block_size)))


def check_view(backend: SimBackend, view: View) -> None:
    """The summary arrays of the view against its request records and the log."""
    layout, log, residents = view.layout, backend.log(), view.resident_requests()
    shape = (layout.num_classes, layout.num_segments)
    assert view.kv_used == residents_kv(view) == int(view.resident_kv.sum() + view.boundary_kv.sum())
    assert 0 <= view.kv_used <= view.engine.kv_capacity
    assert view.kv_free == view.engine.kv_capacity - view.kv_used
    interior = np.bincount(residents.queue[~residents.at_boundary], minlength=layout.num_queues).reshape(shape)
    boundary = np.bincount(residents.queue[residents.at_boundary], minlength=layout.num_queues).reshape(shape)
    assert np.array_equal(view.residents, interior)
    assert np.array_equal(view.waiting[:, 1:], boundary[:, 1:])
    assert not boundary[:, 0].any()
    assert view.num_residents == len(residents.id) == int(view.residents.sum() + view.waiting[:, 1:].sum())
    assert view.num_waiting == int(view.waiting[:, 0].sum())
    ends = np.asarray(layout.segment_ends, dtype=int)
    unfinished = residents.computed < residents.prefill_target
    segment = np.where(unfinished, 0, np.searchsorted(ends, residents.generated, side="right"))
    assert np.array_equal(residents.queue % layout.num_segments, segment)
    assert np.all(np.isin(residents.generated[residents.at_boundary], ends))
    assert np.array_equal(residents.queue // layout.num_segments, log.class_id[residents.id])
    for j in range(layout.num_classes):
        queue = view.waiting_requests(j, 10**6)
        assert len(queue.id) == view.waiting[j, 0]
        assert np.all(np.diff(queue.key) > 0)
        if len(queue.id):
            assert view.head_tokens[j] == queue.prompt_tokens[0] + queue.generated[0]
            assert view.head_key[j] == queue.key[0]
            assert view.head_arrival[j] == queue.arrival[0]
        else:
            assert view.head_tokens[j] == 0
            assert math.isnan(view.head_arrival[j])
        assert queue.output_tokens is None
        if view.engine.preset == "paper":
            assert not queue.generated.any()
    assert residents.output_tokens is None


def conservation(backend: SimBackend, view: View) -> None:
    log = backend.log()
    arrived = log.arrival <= view.clock
    finished = ~np.isnan(log.completed)
    waiting = [i for j in range(view.layout.num_classes) for i in view.waiting_requests(j, 10**6).id.tolist()]
    here = sorted(waiting + view.resident_requests().id.tolist())
    assert here == np.flatnonzero(arrived & ~finished & ~log.rejected).tolist()
    assert int(arrived.sum()) == view.num_waiting + view.num_residents + int(finished.sum()) + int(log.rejected.sum())
    assert not np.any(finished & log.rejected)


def causality(log: RequestLog, clock: float) -> None:
    with np.errstate(invalid="ignore"):
        for earlier, later in ((log.arrival, log.admitted), (log.admitted, log.first_token), (log.first_token, log.completed)):
            assert not np.any(np.isnan(earlier) & ~np.isnan(later))
            assert not np.any(later < earlier)
        assert not np.any(log.completed > clock)
    assert np.all(log.forced_evictions <= log.evictions)


@settings(max_examples=300)
@given(episodes())
def test_invariants_hold_at_every_step(episode: Episode) -> None:
    backend, view = episode.start()
    check_view(backend, view)
    conservation(backend, view)
    totals = dict.fromkeys(("evicted", "preempted", "completed", "rejected", "tokens", "iterations"), 0)
    rejected_at_reset = int(backend.log().rejected.sum())
    system_seconds, number, clock = 0.0, 0, view.clock
    assert clock == 0.0
    while not backend.done:
        before = backend.log()
        report = backend.step(episode.decision(number))
        number += 1
        log = backend.log()
        assert report.start == clock
        assert report.duration >= 0
        assert view.clock == pytest.approx(report.start + report.duration, rel=1e-12)
        clock = view.clock
        assert clock <= episode.limits.horizon
        assert report.kv_used <= episode.engine.kv_capacity
        causality(log, clock)
        conservation(backend, view)
        crossed = backend.end == "horizon" and not report.idle
        if crossed:  # the iteration that the horizon cuts short counts for nothing but time
            assert clock == episode.limits.horizon
            assert not report.finished
            assert report.completed_tokens == report.generated_tokens == 0
            system_seconds += report.system_seconds
            totals["evicted"] += len(report.evicted)
            totals["preempted"] += len(report.preempted)
            totals["rejected"] += report.rejected
            break
        check_view(backend, view)
        assert report.duration > 0 or report.idle
        assert report.waiting == view.num_waiting
        assert view.evictions == int(log.evictions.sum())
        finished = np.flatnonzero(np.isnan(before.completed) & ~np.isnan(log.completed))
        assert sorted(report.finished) == finished.tolist()
        assert report.completed == len(finished)
        assert report.completed_tokens == int(log.output_tokens[finished].sum())
        assert np.all(log.completed[finished] == clock)
        ids, tokens = backend.scheduled()
        assert len(set(ids.tolist())) == len(ids)
        assert not set(ids.tolist()) & (set(report.preempted) | set(report.evicted)) or report.forced_drain
        if report.idle:
            assert len(ids) == 0
            assert report.batch_size == 0
            assert not report.finished
        else:
            assert report.batch_size >= len(ids)
            assert report.total_tokens == int(tokens.sum())
            assert np.all(tokens > 0)
            if episode.engine.preset == "vllm" and not episode.engine.padded_prefill:
                assert report.total_tokens <= episode.engine.max_num_batched_tokens
        if episode.engine.preset == "vllm":
            assert view.num_residents <= episode.engine.max_num_seqs
        totals["evicted"] += len(report.evicted)
        totals["preempted"] += len(report.preempted)
        totals["completed"] += report.completed
        totals["rejected"] += report.rejected
        totals["tokens"] += report.completed_tokens
        totals["iterations"] += not report.idle
        system_seconds += report.system_seconds
        assert number < 5_000
    log, counters = backend.log(), backend.counters()
    assert int(log.evictions.sum()) == totals["evicted"] + totals["preempted"] == counters.evictions
    assert int(log.forced_evictions.sum()) == totals["preempted"] == counters.forced_evictions
    assert int(log.rejected.sum()) == totals["rejected"] + rejected_at_reset == counters.rejected
    assert counters.finished == totals["completed"]
    assert counters.iterations == totals["iterations"]
    assert counters.clock == clock
    assert counters.system_seconds == pytest.approx(system_seconds, rel=1e-9, abs=1e-9)
    served = ~log.rejected & (log.arrival <= clock)
    left = np.where(np.isnan(log.completed), clock, log.completed)
    assert system_seconds == pytest.approx(float(np.sum((left - log.arrival)[served])), rel=1e-9, abs=1e-9)


@settings(max_examples=200)
@given(episodes(drain=True, horizon=False))
def test_drain_completes_every_request(episode: Episode) -> None:
    backend, _ = episode.start()
    number = 0
    while not backend.done:
        backend.step(episode.decision(number))
        number += 1
        assert number < 5_000
    log = backend.log()
    too_long = log.prompt_tokens + log.output_tokens > episode.engine.longest_request
    assert backend.end == "finished"
    assert np.array_equal(log.rejected, too_long)
    assert np.array_equal(np.isnan(log.completed), too_long)
    assert np.array_equal(np.isnan(log.admitted), too_long)
    assert backend.counters().kv_peak <= episode.engine.kv_capacity


@settings(max_examples=100)
@given(episodes(drain=True, horizon=False))
def test_drain_completes_under_a_policy_that_never_acts(episode: Episode) -> None:
    backend, _ = episode.start()
    nothing = Decision(episode.layout.num_queues)
    number = 0
    while not backend.done:
        report = backend.step(nothing)
        number += 1
        assert report.idle or report.forced_drain
        assert number < 5_000
    log = backend.log()
    assert np.array_equal(np.isnan(log.completed), log.rejected)
    assert backend.counters().drain_iterations == backend.counters().iterations


@settings(max_examples=100)
@given(episodes(drain=False, horizon=False))
def test_without_drain_a_policy_that_never_acts_strands_everything(episode: Episode) -> None:
    backend, view = episode.start()
    while not backend.done:
        assert backend.step(Decision(episode.layout.num_queues)).idle
    log = backend.log()
    assert np.isnan(log.completed).all()
    assert view.num_waiting == len(log) - int(log.rejected.sum())
    assert backend.end == ("stranded" if view.num_waiting else "finished")
    assert view.clock == log.arrival[-1]


# --- a policy cannot see what is hidden -------------------------------------------------------------


def visible(view: View) -> list[bytes | float | int]:
    """Everything the view shows, as comparable values."""
    shown: list[bytes | float | int] = [view.clock, view.num_residents, view.num_waiting, view.kv_used, view.evictions]
    shown += [view.last_iteration_seconds]
    shown += [a.tobytes() for a in (view.waiting, view.residents, view.resident_kv, view.boundary_kv, view.head_tokens)]
    shown += [view.arrival_rate.tobytes(), view.head_arrival.tobytes()]
    r = view.resident_requests()
    shown += [a.tobytes() for a in (r.id, r.queue, r.at_boundary, r.prompt_tokens, r.generated, r.computed, r.prefill_target)]
    for j in range(view.layout.num_classes):
        w = view.waiting_requests(j, 10**6)
        shown += [a.tobytes() for a in (w.id, w.prompt_tokens, w.generated, w.arrival, w.key)]
    return shown


@settings(max_examples=200)
@given(episodes(), hs.data())
def test_output_lengths_do_not_show_before_completion(episode: Episode, data: hs.DataObject) -> None:
    """Two workloads that differ in output lengths alone look equal until the first completion."""
    if episode.layout.by == "output" or episode.engine.oversize == "reject":
        return
    n = len(episode.workload)
    low, high = 1, int(episode.workload.output_tokens.min())
    other_lengths = np.array(data.draw(hs.lists(hs.integers(low, high), min_size=n, max_size=n)))
    w = episode.workload
    other = Episode(
        Workload.of(w.arrival, w.prompt_tokens, other_lengths, w.type_id),
        episode.layout,
        episode.engine,
        episode.limits,
        episode.script,
    )
    (first, view), (second, other_view) = episode.start(), other.start()
    number = 0
    while True:
        assert visible(view) == visible(other_view)
        if first.done:
            break
        a, b = first.step(episode.decision(number)), second.step(other.decision(number))
        number += 1
        if a.finished or b.finished:
            break
        assert a == b


# --- determinism and plain Python ---------------------------------------------------------------------


def fingerprint(backend: SimBackend, reports: list[IterationReport]) -> bytes:
    log = backend.log()
    arrays = (log.arrival, log.class_id, log.admitted, log.first_token, log.completed, log.evictions, log.forced_evictions, log.rejected)
    return b"".join(a.tobytes() for a in arrays) + repr(reports).encode() + repr(backend.counters()).encode()


def run_script(episode: Episode, backend: SimBackend | None = None) -> bytes:
    backend, _ = episode.start(backend)
    reports = []
    while not backend.done:
        reports.append(backend.step(episode.decision(len(reports))))
    return fingerprint(backend, reports)


@settings(max_examples=50)
@given(episodes(), episodes())
def test_same_inputs_give_the_same_bytes(episode: Episode, other: Episode) -> None:
    backend = SimBackend()
    first = run_script(episode, backend)
    assert run_script(episode) == first
    run_script(other, backend)  # an episode of another size in between leaves nothing behind
    assert run_script(episode, backend) == first


def fixed_episodes() -> list[Episode]:
    """A fixed set for both presets, some with asynchronous scheduling: holds, boundary queues, evictions of both kinds, rejections."""
    found = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = 20
        workload = Workload.of(np.cumsum(rng.exponential(0.2, n)), rng.integers(1, 20, n), rng.integers(1, 30, n), rng.integers(0, 2, n))
        layout = QueueLayout(by="type", num_types=2, segment_ends=(3, 9))
        if seed % 2:
            engine = EngineConfig.paper(40, 0.1, 1e-3, oversize="reject", boundary_slot=seed % 4 == 1)
        else:
            engine = EngineConfig.vllm(
                num_blocks=15,
                block_size=4,
                max_model_len=40,
                max_num_seqs=8,
                max_num_batched_tokens=48,
                enable_chunked_prefill=seed % 4 == 0,
                oversize="reject",
                scheduler_reserve_full_isl=seed % 8 == 0,
                async_scheduling=seed >= 24,
            )
        q = layout.num_queues
        script = tuple(
            Decision.of(rng.random(q) < 0.9, np.where(rng.random(q) < 0.7, ADMIT_ALL, 1), rng.random(q) < 0.1) for _ in range(60)
        )
        limits = EpisodeLimits(horizon=2.0 if seed % 6 == 5 else math.inf)
        found.append(Episode(workload, layout, engine, limits, script))
    return found


def digest() -> str:
    """One hash over every report and log of the fixed episodes; printed by the subprocess below."""
    return hashlib.sha256(b"".join(run_script(e) for e in fixed_episodes())).hexdigest()


def test_fixed_episodes_meet_evictions_of_both_kinds_and_rejections() -> None:
    counters = []
    for episode in fixed_episodes():
        backend, _ = episode.start()
        run_script(episode, backend)
        counters.append((episode.engine.preset, backend.counters()))
    for preset in ("paper", "vllm"):
        assert sum(c.forced_evictions for p, c in counters if p == preset) > 20
        assert sum(c.evictions - c.forced_evictions for p, c in counters if p == preset) > 3
        assert sum(c.rejected for p, c in counters if p == preset) > 0


def test_compiled_kernel_equals_plain_python() -> None:
    here = Path(__file__).resolve().parent
    environment = dict(os.environ, NUMBA_DISABLE_JIT="1", PYTHONPATH=os.pathsep.join([str(here.parent), str(here)]))
    code = "import test_engine_properties as t; print(t.digest())"
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=here.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == digest()


# --- WAIT within its memory bound ---------------------------------------------------------------------


@settings(max_examples=150)
@given(hs.data())
def test_wait_never_evicts_when_its_thresholds_fit(data: hs.DataObject) -> None:
    types = data.draw(hs.lists(hs.tuples(hs.integers(1, 10), hs.integers(1, 8), hs.integers(1, 4)), min_size=1, max_size=3))
    bound = sum(n * sum(prompt + s for s in range(output + 1)) for prompt, output, n in types)
    rows = data.draw(hs.lists(hs.tuples(hs.sampled_from([0.0, 0.1, 1.0]), hs.integers(0, len(types) - 1)), min_size=1, max_size=60))
    gaps, kinds = zip(*rows, strict=True)
    workload = Workload.of(np.cumsum(gaps), [types[k][0] for k in kinds], [types[k][1] for k in kinds], kinds)
    engine = EngineConfig.paper(bound, 0.3, 0.01)
    backend, reports = play(ThresholdWait([n for *_, n in types]), workload, engine, EpisodeLimits(drain=False))
    assert backend.counters().evictions == 0
    assert all(r.kv_used <= bound for r in reports)
    assert backend.counters().kv_peak <= bound


# --- horizon, rejection, refusal ------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "vllm"])
def test_an_iteration_that_ends_after_the_horizon_does_not_count(preset: str) -> None:
    model = LinearTime(1.0, 0.0)
    engine = EngineConfig.paper(50, 1.0, 0.0) if preset == "paper" else EngineConfig.vllm(time_model=model)
    last = 4.0 if preset == "paper" else 3.0  # seconds until three output tokens are there
    workload = Workload.of([0.0], [2], [3])
    for horizon, finished in ((last, 1), (math.nextafter(last, 0.0), 0), (last - 0.5, 0)):
        backend, _ = play(GreedyFCFS(), workload, engine, EpisodeLimits(horizon=horizon))
        counters = backend.counters()
        assert counters.finished == finished
        assert counters.iterations == (last if finished else last - 1)
        assert np.isnan(backend.log().completed[0]) == (not finished)
        assert counters.clock == min(horizon, last)


def test_idle_time_stops_at_the_horizon() -> None:
    backend, reports = play(GreedyFCFS(), Workload.of([9.0], [1], [1]), EngineConfig.paper(12, 1.0, 0.0), EpisodeLimits(horizon=4.0))
    assert (reports, backend.end, backend.counters().clock) == ([], "horizon", 4.0)
    assert backend.snapshot().num_waiting == 0


@pytest.mark.parametrize("preset", ["paper", "vllm"])
@pytest.mark.parametrize(("prompt", "output"), [(65, 1), (60, 5)])
def test_a_request_that_never_fits(preset: str, prompt: int, output: int) -> None:
    engine = (
        EngineConfig.paper(64, 1.0, 0.0)
        if preset == "paper"
        else EngineConfig.vllm(num_blocks=4, block_size=16, max_model_len=64, max_num_seqs=4)
    )
    workload = Workload.of([0.0, 0.5, 1.0], [4, prompt, 4], [2, output, 2])
    backend = make_backend("sim")
    with pytest.raises(ConfigError, match=r"request 1 .*64"):
        backend.reset(workload, QueueLayout(), engine, EpisodeLimits())
    rejecting, _ = play(GreedyFCFS(), workload, engine.replace(oversize="reject"), EpisodeLimits())
    log = rejecting.log()
    assert log.rejected.tolist() == [False, True, False]
    assert np.isnan(log.completed).tolist() == [False, True, False]
    assert rejecting.counters().rejected == 1
    fits = Workload.of([0.0], [62], [2])
    assert play(GreedyFCFS(), fits, engine, EpisodeLimits())[0].counters().finished == 1


def test_max_iterations_ends_the_episode_and_says_so() -> None:
    workload = Workload.of([0.0] * 3, [4] * 3, [5] * 3)
    backend, reports = play(GreedyFCFS(), workload, EngineConfig.paper(100, 1.0, 0.0), EpisodeLimits(max_iterations=2))
    assert (len(reports), backend.end) == (2, "max_iterations")


def test_stepping_a_finished_episode_is_an_error() -> None:
    backend, _ = play(GreedyFCFS(), Workload.of([0.0], [1], [1]), EngineConfig.paper(12, 1.0, 0.0), EpisodeLimits())
    with pytest.raises(RuntimeError, match="ended"):
        backend.step(Decision.greedy(1))


def test_draining_only_starts_when_the_policy_schedules_nothing() -> None:
    """WAIT goes on by itself while it can after the last arrival; each drain step is one greedy iteration."""
    workload = Workload.of([0.1 * k for k in range(10)], [2] * 10, [3] * 10)
    backend, reports = play(ThresholdWait((4,)), workload, EngineConfig.paper(200, 1.0, 0.0), EpisodeLimits())
    forced = [r.forced_drain for r in reports]
    assert backend.counters().drain_iterations == sum(forced) > 0
    assert backend.counters().finished == 10
    assert not any(forced[: forced.index(True)])
    assert all(r.start >= 0.9 for r in reports if r.forced_drain)
    assert backend.counters().evictions == 0


def test_nested_drains_to_the_end() -> None:
    workload = Workload.of([0.1 * k for k in range(30)], [2] * 30, [1 + k % 5 for k in range(30)])
    backend, reports = play(PrefixNested((4, 2), (2, 5)), workload, EngineConfig.paper(200, 1.0, 0.0), EpisodeLimits())
    assert backend.counters().finished == 30
    assert any(r.forced_drain for r in reports)
