"""Asynchronous scheduling (rule 22): hand-worked traces, invariants, and what a request's time costs more than without."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as hs
from lockstep import random_decisions, random_layout, random_workload
from test_engine_properties import Episode, episodes, fingerprint, run_script, visible

import llmsched_env
from llmsched_baselines import Setting, make_policy
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import LinearTime
from llmsched_env.types import ADMIT_ALL, Decision, IterationReport, QueueLayout, Workload
from tests.engine_walk import check_engine
from tests.env_settings import ADMIT

SECOND = LinearTime(1.0, 0.0)
SMALL: dict[str, Any] = {
    "time_model": SECOND,
    "async_scheduling": True,
    "num_blocks": 20,
    "block_size": 4,
    "max_model_len": 40,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 40,
}
GREEDY = Decision.greedy(1)


def run(
    workload: Workload, engine: EngineConfig, *, layout: QueueLayout | None = None, limits: EpisodeLimits | None = None, script: Any = ()
) -> tuple[SimBackend, list[IterationReport]]:
    """An episode under ``script``, then greedily; the record is walked after every step."""
    layout = layout or QueueLayout()
    backend = SimBackend(trace=True)
    backend.reset(workload, layout, engine, limits or EpisodeLimits())
    reports: list[IterationReport] = []
    while not backend.done:
        decision = script[len(reports)] if len(reports) < len(script) else Decision.greedy(layout.num_queues)
        reports.append(backend.step(decision))
        if backend.end != "horizon":
            check_engine(backend)
        assert len(reports) < 5_000
    return backend, reports


def test_one_request_step_by_step() -> None:
    """Three tokens take three seconds; a fourth iteration is scheduled, and its token thrown away."""
    backend = SimBackend(trace=True)
    view = backend.reset(Workload.of([0.0], [5], [3]), QueueLayout(), EngineConfig.vllm(**SMALL), EpisodeLimits())
    seen = []
    while not backend.done:
        report = backend.step(GREEDY)
        ids, tokens = backend.scheduled()
        generated = view.resident_requests().generated.tolist()
        seen.append((report.start, report.duration, tokens.tolist(), report.generated_tokens, report.completed, generated, len(ids)))
        check_engine(backend)
    assert seen == [
        (0.0, 0.0, [5], 0, 0, [1], 1),  # nothing runs yet: the clock stands, the prefill begins
        (0.0, 1.0, [1], 1, 0, [2], 1),  # the first token comes out at 1
        (1.0, 1.0, [1], 1, 0, [3], 1),
        (2.0, 1.0, [1], 1, 1, [], 1),  # one iteration more than the request needs
    ]
    log, counters = backend.log(), backend.counters()
    assert (log.admitted[0], log.first_token[0], log.completed[0]) == (0.0, 1.0, 3.0)
    assert (counters.iterations, counters.busy_seconds, counters.clock, counters.idle_steps) == (3, 3.0, 3.0, 0)
    assert backend.end == "finished"


def test_an_arrival_waits_for_one_iteration_more() -> None:
    """It comes while the first iteration runs, when the second is scheduled already."""
    workload = Workload.of([0.0, 0.5], [5, 5], [9, 1])
    engine = EngineConfig.vllm(**SMALL)
    assert run(workload, engine)[0].log().first_token.tolist() == [1.0, 3.0]
    assert run(workload, engine.replace(async_scheduling=False))[0].log().first_token.tolist() == [1.0, 2.0]


def test_the_superfluous_token_takes_a_block_and_preempts() -> None:
    """Two prompts of one and two blocks fill the memory. The first ends with its prefill, which nobody knows: its next token needs a
    block and the other request, the newest, gives up its own. The token that was in flight for it is delivered.
    """
    workload = Workload.of([0.0, 0.0], [4, 8], [1, 2])
    engine = EngineConfig.vllm(**{**SMALL, "num_blocks": 3, "max_model_len": 12, "max_num_seqs": 4, "max_num_batched_tokens": 12})
    backend, reports = run(workload, engine)
    assert [r.preempted for r in reports] == [(), (1,), (), ()]
    assert [r.finished for r in reports] == [(), (0,), (), (1,)]
    assert [r.kv_used for r in reports] == [3, 2, 3, 3]
    log = backend.log()
    assert log.first_token.tolist() == [1.0, 1.0]
    assert log.completed.tolist() == [1.0, 3.0]  # prompt and token computed again from 2 on
    plain = run(workload, engine.replace(async_scheduling=False))[0]
    assert plain.log().completed.tolist() == [1.0, 2.0] and plain.counters().forced_evictions == 0


def test_the_last_token_comes_out_although_the_request_is_preempted() -> None:
    """The newest of two ends while it is preempted: it leaves the queue, not the engine."""
    workload = Workload.of([0.0, 0.0], [4, 8], [5, 1])
    engine = EngineConfig.vllm(**{**SMALL, "num_blocks": 3, "max_model_len": 12, "max_num_seqs": 4, "max_num_batched_tokens": 12})
    backend, reports = run(workload, engine)
    assert (reports[1].preempted, reports[1].finished) == ((1,), (1,))
    log = backend.log()
    assert log.completed[1] == 1.0 and log.evictions.tolist() == [0, 1]
    assert backend.counters().system_seconds == pytest.approx(float((log.completed - log.arrival).sum()))


def test_a_request_as_long_as_any_may_be_is_not_scheduled_again() -> None:
    backend, reports = run(Workload.of([0.0], [5], [3]), EngineConfig.vllm(**{**SMALL, "max_model_len": 8}))
    assert [(r.idle, r.duration, r.batch_size, r.completed) for r in reports] == [
        (False, 0.0, 1, 0),
        (False, 1.0, 1, 0),
        (False, 1.0, 1, 0),
        (True, 1.0, 0, 1),
    ]
    assert backend.counters().iterations == 3 and backend.counters().idle_steps == 1


@pytest.mark.parametrize("act", ["admit", "hold", "evict"])
def test_a_request_that_ends_at_a_segment_end_stands_at_the_boundary_until_then(act: str) -> None:
    layout = QueueLayout(segment_ends=(2,))
    decisions = {
        "admit": Decision.of([1, 1], [ADMIT_ALL, ADMIT_ALL]),
        "hold": Decision.of([1, 1], [ADMIT_ALL, 0]),
        "evict": Decision.of([1, 1], [ADMIT_ALL, 0], [0, 1]),
    }
    script = [decisions["hold"], decisions["hold"], decisions[act]]
    for limit in (8, 6):  # with room for another token, and without
        engine = EngineConfig.vllm(**{**SMALL, "max_model_len": limit})
        backend, reports = run(Workload.of([0.0], [4], [2]), engine, layout=layout, script=script)
        assert backend.log().completed.tolist() == [2.0]
        assert reports[-1].finished == (0,) and len(reports) == 3
        assert reports[-1].batch_size == (act == "admit" and limit == 8)
        assert backend.counters().evictions == (act == "evict")


def test_an_empty_schedule_waits_for_the_iteration_that_runs() -> None:
    """Nothing is held back by drain while something runs; then the clock stands for the next schedule."""
    hold = Decision.of([0], [0])
    backend, reports = run(Workload.of([0.0], [5], [3]), EngineConfig.vllm(**SMALL), script=[GREEDY, GREEDY, hold, GREEDY, GREEDY])
    assert [(r.start, r.duration, r.idle, r.forced_drain) for r in reports] == [
        (0.0, 0.0, False, False),
        (0.0, 1.0, False, False),
        (1.0, 1.0, True, False),
        (2.0, 0.0, False, False),
        (2.0, 1.0, False, False),
    ]
    assert backend.log().completed.tolist() == [3.0]


def test_a_drain_iteration_replaces_a_decision_only_when_nothing_runs() -> None:
    nothing = Decision(1)
    backend, reports = run(Workload.of([0.0], [5], [2]), EngineConfig.vllm(**SMALL), script=[nothing] * 20)
    assert [(r.idle, r.forced_drain, r.duration) for r in reports] == [
        (False, True, 0.0),
        (True, False, 1.0),
        (False, True, 0.0),
        (True, False, 1.0),
    ]
    assert backend.end == "finished" and backend.log().completed.tolist() == [2.0]
    backend, reports = run(
        Workload.of([0.0], [5], [2]), EngineConfig.vllm(**SMALL), limits=EpisodeLimits(drain=False), script=[nothing] * 20
    )
    assert backend.end == "stranded" and len(reports) == 1


@pytest.mark.parametrize(("horizon", "completed"), [(3.0, 1), (math.nextafter(3.0, 0.0), 0), (2.5, 0)])
def test_an_iteration_that_ends_after_the_horizon_does_not_count(horizon: float, completed: int) -> None:
    backend, reports = run(Workload.of([0.0], [5], [3]), EngineConfig.vllm(**SMALL), limits=EpisodeLimits(horizon=horizon))
    counters = backend.counters()
    assert (counters.iterations, counters.finished, counters.clock) == (2 + completed, completed, min(horizon, 3.0))
    assert sum(r.generated_tokens for r in reports) == 2 + completed
    assert np.isnan(backend.log().completed[0]) == (not completed)


def test_what_cannot_be_simulated_together_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"engine\.async_scheduling: True, but it is an option of the vllm preset"):
        EngineConfig.paper(100, 1.0, 0.0, async_scheduling=True)
    for name in ("padded_prefill", "decode_needs_free_block"):
        with pytest.raises(ConfigError, match=rf"engine\.{name}: True, must be False with async_scheduling"):
            EngineConfig.vllm(async_scheduling=True, **{name: True})
    with pytest.raises(ConfigError, match=r"engine\.async_scheduling: 3, must be"):
        EngineConfig.vllm(async_scheduling=3)


# --- invariants under arbitrary decisions -----------------------------------------------------------------
@hs.composite
def overlapped(draw: hs.DrawFn, drain: bool | None = None, horizon: bool = True) -> Episode:
    """An episode of the invariants of both presets, on an engine with asynchronous scheduling."""
    found = draw(episodes(drain=drain, horizon=horizon))
    longest = int((found.workload.prompt_tokens + found.workload.output_tokens).max())
    block, seqs = draw(hs.integers(1, 8)), draw(hs.integers(1, 12))
    engine = EngineConfig.vllm(
        time_model=draw(hs.sampled_from([LinearTime(0.5, 0.0), LinearTime(0.1, 0.01)])),
        admission_order=found.engine.admission_order,
        late_after=draw(hs.sampled_from([0.0, 0.3])),
        block_size=block,
        num_blocks=-(-(longest + 1) // block) + draw(hs.integers(0, 12)),
        max_model_len=longest + draw(hs.integers(0, 1)),
        max_num_seqs=seqs,
        max_num_batched_tokens=max(seqs, longest + 1, draw(hs.integers(1, 40))),
        watermark=draw(hs.sampled_from([0.0, 0.1])),
        enable_prefix_caching=draw(hs.booleans()),
        eviction=draw(hs.sampled_from(["recompute", "recompute", "lose_progress"])),
        async_scheduling=True,
    )
    return Episode(found.workload, found.layout, engine, found.limits, found.script)


@settings(max_examples=200, deadline=None)
@given(overlapped())
def test_the_record_is_in_order_after_every_step(episode: Episode) -> None:
    backend, view = episode.start()
    totals = dict.fromkeys(("steps", "finished", "tokens", "ended", "idle"), 0)
    system_seconds = 0.0
    while not backend.done:
        running, before = backend.record.flight_seconds > 0, backend.record.iterations
        start = backend.record.clock
        report = backend.step(episode.decision(totals["steps"]))
        totals["steps"] += 1
        system_seconds += report.system_seconds
        if backend.end == "horizon":
            break
        check_engine(backend)
        ended = backend.record.iterations - before
        assert ended == running
        assert report.start == start and (report.duration > 0 or not running)
        assert not report.finished or running
        log = backend.log()
        assert np.all(log.completed[list(report.finished)] == view.clock)
        totals["ended"] += ended
        totals["idle"] += report.idle
        totals["finished"] += report.completed
        totals["tokens"] += report.generated_tokens
        assert totals["steps"] < 5_000
    log, counters = backend.log(), backend.counters()
    done = ~np.isnan(log.completed)
    assert np.all(log.completed[done] >= log.first_token[done]) and np.all(log.first_token[done] > log.admitted[done])
    assert counters.finished == done.sum() >= totals["finished"]
    assert counters.iterations == totals["ended"]
    assert totals["tokens"] >= int(log.output_tokens[done].sum())
    served = ~log.rejected & (log.arrival <= counters.clock)
    left = np.where(done, log.completed, counters.clock)
    assert system_seconds == pytest.approx(float((left - log.arrival)[served].sum()), rel=1e-9, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(overlapped(drain=True, horizon=False))
def test_drain_completes_every_request(episode: Episode) -> None:
    backend, _ = episode.start()
    reports: list[IterationReport] = []
    while not backend.done:
        reports.append(backend.step(episode.decision(len(reports))))
        assert len(reports) < 5_000
    log, counters = backend.log(), backend.counters()
    assert backend.end == "finished" and np.isfinite(log.completed).all()
    assert counters.finished == len(log)
    assert counters.kv_peak <= episode.engine.num_blocks
    assert counters.busy_seconds <= counters.clock * (1 + 1e-12)
    if episode.engine.eviction == "recompute":  # every token that came out once is kept
        assert sum(r.generated_tokens for r in reports) == int(log.output_tokens.sum())


@settings(max_examples=100, deadline=None)
@given(overlapped(), hs.data())
def test_output_lengths_do_not_show_before_completion(episode: Episode, data: hs.DataObject) -> None:
    w = episode.workload
    if episode.layout.by == "output":
        return
    shortest = int(w.output_tokens.min())
    lengths = data.draw(hs.lists(hs.integers(1, shortest), min_size=len(w), max_size=len(w)))
    other = Episode(
        Workload.of(w.arrival, w.prompt_tokens, lengths, w.type_id), episode.layout, episode.engine, episode.limits, episode.script
    )
    (first, view), (second, other_view) = episode.start(), other.start()
    number = 0
    while True:
        assert visible(view) == visible(other_view)
        if first.done or second.done:
            break
        a, b = first.step(episode.decision(number)), second.step(other.decision(number))
        number += 1
        if a.finished or b.finished:
            break
        assert a == b


@settings(max_examples=30, deadline=None)
@given(overlapped(), overlapped())
def test_same_inputs_give_the_same_bytes(episode: Episode, other: Episode) -> None:
    backend = SimBackend()
    first = run_script(episode, backend)
    run_script(other, backend)  # an episode of another size in between leaves nothing behind
    assert run_script(episode, backend) == first


# --- beside the synchronous engine ------------------------------------------------------------------------
def test_without_completions_and_arrivals_both_engines_schedule_the_same() -> None:
    """All requests are there at the start and the first completion lies behind the compared steps."""
    compared = preemptions = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        w = random_workload(rng)
        n = len(w)
        workload = Workload.of(np.zeros(n), w.prompt_tokens, np.full(n, 45))
        layout = random_layout(rng, 45)
        layout = QueueLayout(segment_ends=layout.segment_ends)
        engine = EngineConfig.vllm(
            time_model=SECOND,
            num_blocks=int(rng.integers(30, 60)),
            block_size=4,
            max_model_len=110,
            max_num_seqs=int(rng.integers(4, 30)),
            max_num_batched_tokens=int(rng.integers(30, 130)),
        )
        decide = random_decisions(rng, layout.num_queues)
        pair = [SimBackend(trace=True), SimBackend(trace=True)]
        for backend, overlaps in zip(pair, (False, True), strict=True):
            backend.reset(workload, layout, engine.replace(async_scheduling=overlaps), EpisodeLimits(drain=False))
        for step in range(44):
            reports = [backend.step(decide(step)) for backend in pair]
            for name in ("batch_size", "prefill_tokens", "load", "kv_used", "admitted", "evicted", "preempted", "waiting"):
                assert getattr(reports[0], name) == getattr(reports[1], name), (seed, step, name)
            assert all(np.array_equal(a, b) for a, b in zip(*(backend.scheduled() for backend in pair), strict=True))
            compared += 1
            preemptions += len(reports[0].preempted)
            if pair[0].done or pair[1].done:
                break
    assert compared > 1000 and preemptions > 100


def test_mean_latency_beside_the_synchronous_engine() -> None:
    """On equal iteration times overlapping gains nothing: an arrival waits for up to one iteration more, and superfluous tokens cost."""
    rng = np.random.default_rng(0)
    n = 200
    workload = Workload.of(np.cumsum(rng.exponential(0.5, n)), rng.integers(1, 20, n), rng.integers(1, 20, n))
    mean = {}
    for overlaps in (False, True):
        engine = EngineConfig.vllm(**{**SMALL, "time_model": LinearTime(0.02, 1e-4), "async_scheduling": overlaps})
        log = run(workload, engine)[0].log()
        mean[overlaps] = float((log.completed - log.arrival).mean())
    assert mean[False] < mean[True] < mean[False] + 3 * 0.03


# --- environments, rules ----------------------------------------------------------------------------------
def test_the_environment_plays_it_like_the_backend() -> None:
    env = llmsched_env.LLMSchedEnv(**ADMIT, rate=9.0, num_requests=40, engine={"num_blocks": 400, "async_scheduling": True})
    plain = llmsched_env.LLMSchedEnv(**ADMIT, rate=9.0, num_requests=40, engine={"num_blocks": 400})
    returns = {}
    for name, played in (("async", env), ("sync", plain)):
        played.reset(seed=1)
        total, done = 0.0, False
        while not done:
            _, reward, done, _, info = played.step(np.array([1] * 4 + [16] * 4))
            total += float(reward)
        returns[name] = total
        assert total == pytest.approx(-info["summary"]["latency_mean"])
    assert returns["async"] < returns["sync"]


def test_a_compiled_rule_plays_the_episode_that_its_decisions_play() -> None:
    env = llmsched_env.LLMSchedEnv("lmsys", rate=9.0, num_requests=60, engine={"num_blocks": 300, "async_scheduling": True})
    env.reset(seed=0)
    log = env.backend.log()
    workload = Workload.of(log.arrival, log.prompt_tokens, log.output_tokens)
    policy = make_policy("reserve", Setting(env.scenario.statistics, 9.0, env.engine))
    prints = []
    for stepped in (False, True):
        backend = SimBackend()
        view = backend.reset(workload, policy.layout, policy.engine, EpisodeLimits())
        assert policy.engine.async_scheduling
        if stepped:
            while not backend.done:
                backend.step(policy.decide(view))
        else:
            policy.rule.play(backend)
        prints.append(fingerprint(backend, []))
    assert prints[0] == prints[1]
