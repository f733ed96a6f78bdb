"""What a live server promises whatever its policy does: nothing is lost, nobody waits for ever, it does not grow."""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

import serve_policies
from serve_inprocess import Server, configure, make_server
from serve_policies import random_agent
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from llmsched_agents.adaptive_times import seconds_of
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError
from llmsched_env.records import Level
from llmsched_env.types import ADMIT_ALL, Decision, QueueLayout
from llmsched_hardware import live, serve, versions
from llmsched_hardware.live import LiveMirror
from llmsched_hardware.live_rehearsal import rehearse
from tests.engine_walk import shown

ENGINE = EngineConfig.vllm(num_blocks=64, block_size=4, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=128)
HALVES = QueueLayout(segment_ends=(4,))
Make = Callable[..., Server]


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    return lambda *args, **config: make_server(monkeypatch, tmp_path, *args, asynchronous=request.param, **config)


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> list[logging.LogRecord]:
    """Errors that the live server logs."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[method-assign]
    serve.logger.addHandler(handler)
    monkeypatch.setattr(serve.logger, "propagate", False)
    yield records  # type: ignore[misc]
    serve.logger.removeHandler(handler)


def let_the_last_batch_back(server: Server) -> None:
    """Under asynchronous scheduling the last token comes while the next iteration is decided, in which its request has no more to do."""
    if server.asynchronous:
        assert server.step() == {}


def nothing(view: Any) -> Decision:
    return Decision(view.layout.num_queues)


# --- the guard ------------------------------------------------------------------------------------------


def test_a_request_kept_outside_is_admitted_when_it_has_waited_long_enough(make: Make) -> None:
    server = make(ENGINE, HALVES, nothing, max_wait_seconds=2.0)
    server.add("a", 10, 12)
    while server.clock < 2.0:
        assert server.step() == {}
    server.clock = 2.0001
    server.add("b", 10, 12)  # its own time has only begun
    assert server.step() == {"a": 10}
    assert server.scheduler.gatekeeper.releases == {"outside": 1, "boundary": 0, "held": 0}
    # From then on the policy has no say over it: eleven more tokens in as many iterations, through the boundary at 4.
    for _ in range(11):
        assert server.step() == {"a": 1}
    let_the_last_batch_back(server)
    assert set(server.scheduler.requests) == {"b"}
    server.clock = 10.0
    server.run_until_empty()
    assert server.scheduler.gatekeeper.releases == {"outside": 2, "boundary": 0, "held": 0}
    assert server.scheduler.policy_metrics.releases == {"outside": 2, "boundary": 0, "held": 0}


@pytest.mark.parametrize(("tokens", "kind"), [(4, "boundary"), (2, "held")])
def test_a_request_kept_at_a_boundary_or_held_is_released(make: Make, tokens: int, kind: str) -> None:
    stop = {"now": False}

    def script(view: Any) -> Decision:
        return nothing(view) if stop["now"] else Decision.of([1, 1], [ADMIT_ALL, 0])

    server = make(ENGINE, HALVES, script, max_wait_seconds=2.0)
    server.add("a", 10, 12)
    for _ in range(tokens):
        server.step()
    stop["now"] = True
    server.add("x", 3, 3)  # so that the policy is asked again
    start = server.clock
    while server.step() == {}:
        assert server.clock < 10
    # The guard counts from the schedule after the last token.
    assert 2.0 < server.clock - start <= 2.0 + 0.03
    assert server.scheduler.gatekeeper.releases[kind] == 1
    server.clock += 5
    server.run_until_empty(seconds=0.1)


def test_memory_full_of_frozen_requests_comes_free(make: Make) -> None:
    """All blocks held at a boundary, others outside: without the guard nothing could ever run again."""
    server = make(ENGINE, HALVES, lambda view: Decision.of([1, 1], [ADMIT_ALL, 0]), max_wait_seconds=1.0)
    for i in range(16):
        server.add(f"{i}", 20, 40)
    for _ in range(30):
        server.step()
    mirror = server.scheduler.mirror
    assert mirror.record.num_boundary > 8 and mirror.view.kv_free < 6
    assert server.step() == {}
    server.run_until_empty(seconds=0.05)
    assert server.scheduler.gatekeeper.releases["boundary"] > 8
    assert len(mirror) == 0


def test_a_released_request_that_is_preempted_goes_first(make: Make) -> None:
    engine = ENGINE.replace(num_blocks=32, max_model_len=64)
    server = make(engine, QueueLayout(), nothing, max_wait_seconds=1.0)
    for i in range(6):
        server.add(f"{i}", 16, 40)
    server.clock = 1.5
    server.run_until_empty()
    assert server.scheduler.mirror.record.forced_evictions > 0
    assert server.scheduler.gatekeeper.releases == {"outside": 6, "boundary": 0, "held": 0}


# --- idling ---------------------------------------------------------------------------------------------


def test_the_policy_is_asked_again_only_when_something_has_changed(make: Make) -> None:
    asked: list[int] = []

    def script(view: Any) -> Decision:
        asked.append(view.num_waiting)
        return nothing(view)

    server = make(ENGINE, HALVES, script, max_wait_seconds=3.0)
    server.add("a", 10, 12)
    for _ in range(20):
        server.step(0.001)
    assert asked == [1]
    # The scheduler rests instead of spinning, longer and longer, at most 5 ms.
    assert server.slept[0] < 0.001 and max(server.slept) == 0.005 and len(server.slept) == 19
    server.add("b", 10, 12)
    server.step()
    assert asked == [1, 2] and len(server.slept) == 19  # no rest between the arrival and the decision
    server.scheduler.finish_requests("a", RequestStatus.FINISHED_ABORTED)
    server.step()
    assert asked == [1, 2, 1]
    # The rest never runs past the guard.
    server.clock = 3.0 - 0.002 + 0.021
    server.step(0.0)
    server.step(0.0)
    assert server.slept[-1] <= 0.0025


def test_iterations_that_compute_are_never_delayed(make: Make) -> None:
    server = make(ENGINE, HALVES, None)
    for i in range(5):
        server.add(f"{i}", 10, 12)
    server.run_until_empty()
    assert server.slept == []
    assert server.scheduler.policy_metrics.counts["repeat"] == 0


# --- requests come and go ---------------------------------------------------------------------------------


def check_against_scheduler(server: Server) -> None:
    """The mirror must hold what vLLM's own queues hold, and what a mirror rebuilt from them holds."""
    scheduler, mirror = server.scheduler, server.scheduler.mirror
    view = mirror.view
    outside = [r.request_id for r in scheduler.waiting]
    listed = {j: [mirror.names[r] for r in view.waiting_requests(j, 10**6).id] for j in range(mirror.layout.num_classes)}
    assert sorted(outside) == sorted(name for names in listed.values() for name in names)
    for names in listed.values():
        assert [name for name in outside if name in names] == names
    if not mirror.resyncs:
        # Over all classes, vLLM's queue is in the order of the keys.
        waiting = [w for j in range(mirror.layout.num_classes) for w in [view.waiting_requests(j, 10**6)]]
        keyed = sorted((key, mirror.names[r]) for w in waiting for key, r in zip(w.key.tolist(), w.id.tolist(), strict=True))
        assert [name for _, name in keyed] == outside
    residents = view.resident_requests()
    assert [mirror.names[r] for r in residents.id] == [r.request_id for r in scheduler.running]
    assert residents.generated.tolist() == [r.num_output_tokens + r.num_output_placeholders for r in scheduler.running]
    pool = scheduler.kv_cache_manager.block_pool
    assert view.kv_used == pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    assert view.kv_used == view.resident_kv.sum() + view.boundary_kv.sum()
    assert view.num_residents == len(scheduler.running) == view.residents.sum() + view.waiting[:, 1:].sum()
    assert len(mirror) == len(scheduler.requests)


@pytest.mark.parametrize("seed", range(6))
def test_arrivals_aborts_stops_preemptions_in_any_order(make: Make, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Also with queue keys that are renumbered all the time."""
    g = np.random.default_rng(seed)
    if seed % 2:
        monkeypatch.setattr(live, "_RENUMBER_ABOVE", 12)
    layout = QueueLayout("prompt", (12, 20), segment_ends=(3, 9))
    checked = []

    def script(view: Any) -> Decision:
        check_against_scheduler(server)
        checked.append(1)
        q = layout.num_queues
        if g.random() < 0.5:
            return Decision.greedy(q)
        evict = g.choice([0, 0, 0, 1], q) if g.random() < 0.3 else 0
        return Decision.of(g.random(q) < 0.7, g.choice([0, 1, 3, ADMIT_ALL], q), evict)

    server = make(ENGINE, layout, script, {"admission_order": str(g.choice(["arrival", "class"]))}, max_wait_seconds=1.0)
    scheduler = server.scheduler
    made = 0
    for _ in range(900):
        for _ in range(g.poisson(0.25)):
            server.add(f"{made}", int(g.integers(1, 30)), int(g.integers(1, 60)))
            made += 1
        live_ids = list(scheduler.requests)
        if live_ids and g.random() < 0.1:
            scheduler.finish_requests({str(i) for i in g.choice(live_ids, min(2, len(live_ids)))}, RequestStatus.FINISHED_ABORTED)
        stop = frozenset(str(i) for i in g.choice(live_ids, 1)) if live_ids and g.random() < 0.1 else frozenset()
        server.step(stop=stop)
    server.run_until_empty()
    mirror = scheduler.mirror
    assert made > 150 and len(checked) > 500
    assert scheduler.policy_metrics.errors == 0 and mirror.resyncs == 0
    assert scheduler.policy_metrics.evictions > 0 and mirror.record.forced_evictions > 0
    assert len(mirror) == 0 and not mirror.overdue
    assert mirror.record.num_waiting == mirror.record.num_residents == 0
    assert mirror.view.waiting.sum() == mirror.view.residents.sum() == mirror.view.resident_kv.sum() == 0


def test_memory_follows_the_requests_present_not_those_served(make: Make) -> None:
    server = make(ENGINE, QueueLayout(), None)
    mirror = server.scheduler.mirror
    for i in range(3_000):
        server.add(f"{i}", 4, 2)
        if i % 8 == 7:
            server.step()
            server.step()
            if i % 80 == 79:
                server.scheduler.finish_requests([f"{i}"], RequestStatus.FINISHED_ABORTED)
    server.run_until_empty()
    assert len(mirror.record.requests) == 256 and len(mirror.names) == 256
    assert len(mirror) == 0 and len(mirror.queued) <= 1
    for i in range(600):  # more than there is room for at first
        server.add(f"more-{i}", 4, 2)
    server.run_until_empty()
    assert len(mirror.record.requests) == 1024 and len(mirror) == 0 and mirror.resyncs == 0


def test_max_tokens_reaches_no_byte_a_policy_can_read(make: Make) -> None:
    """Two servers, the same requests but for ``max_tokens``, ended by the same stop tokens."""
    seen: list[list[bytes]] = []
    for limit in (30, 90):
        states: list[bytes] = []

        def script(view: Any, states: list[bytes] = states) -> Decision:
            states.extend((*shown(view._whole, Level.KNOWN).values(), view._whole.hidden.rows.tobytes()))
            return Decision.greedy(2)

        server = make(ENGINE, HALVES, script)
        for i in range(6):
            server.add(f"{i}", 8, limit - i)
        for step in range(20):
            server.step(stop=frozenset({f"{step // 3}"}) if step % 3 == 2 else frozenset())
        assert not server.scheduler.requests
        seen.append(states)
    assert seen[0] == seen[1] and len(seen[0]) > 50


def test_known_lengths_are_shown_where_the_operator_says_they_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    lengths = {"prompt": [8, 8], "output": [4, 12], "weight": [1, 1]}
    configure(monkeypatch, tmp_path, "mc-sf", lengths=lengths, options={"num_classes": 2}, assume_max_tokens=True)
    server = Server(ENGINE)
    for i in range(12):
        server.add(f"{i}", 8, 12 if i % 2 else 4, ignore_eos=True)
    server.step()
    view = server.scheduler.mirror.view
    assert view.reveals_output_length
    server.scheduler.mirror.refresh(server.clock, server.scheduler.running, server.scheduler.waiting, 0)
    assert set(view.resident_requests().output_tokens.tolist()) <= {4, 12}  # type: ignore[union-attr]
    server.run_until_empty()


@pytest.mark.parametrize("policy", ["vllm", "fcfs", "nested-wait", "reserve", "shortest-prompt", "agent", "generalist", "adaptive"])
def test_every_policy_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy: str) -> None:
    lengths = {"prompt": [8, 20], "output": [6, 24], "weight": [2, 1]}
    options: dict[str, Any] = {"segment_ends": [6]} if policy == "nested-wait" else {}
    named = str(random_agent(tmp_path / "agent", action_set="admit")) if policy == "agent" else policy
    configure(monkeypatch, tmp_path, named, lengths=lengths, rate=30.0, max_wait_seconds=3.0, options=options)
    budget = 256 if policy == "generalist" else ENGINE.max_num_batched_tokens  # its own, which it insists on
    server = Server(ENGINE.replace(num_blocks=400, max_num_batched_tokens=budget))  # Nested WAIT's buffer for a workload of two lengths
    g = np.random.default_rng(0)
    for i in range(150):
        server.add(f"{i}", int(g.choice([8, 20])), int(g.choice([6, 24])), ignore_eos=True)
        server.step()
    server.run_until_empty()
    scheduler = server.scheduler
    assert scheduler.policy_metrics.errors == 0 and scheduler.mirror.resyncs == 0
    assert scheduler.live.policy.layout.num_segments == {"nested-wait": 2, "agent": 4}.get(policy, 1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_server_teaches_adaptive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asynchronous: bool) -> None:
    """Output lengths by prompt, and the seconds of each batch with that very batch: a token takes a millisecond here."""
    configure(monkeypatch, tmp_path, "adaptive", lengths={"prompt": [30], "output": [60], "weight": [1]}, rate=1.0)
    server = Server(ENGINE.replace(num_blocks=400, max_num_batched_tokens=256, async_scheduling=asynchronous), asynchronous)

    def iterate() -> None:
        output = server.schedule()
        while len(server._running) > asynchronous or (server._running and not output.num_scheduled_tokens):
            server.clock += 0.005 + 0.001 * server._running[0][0].total_num_scheduled_tokens
            server.finish()

    g = np.random.default_rng(1)
    for i in range(600):
        prompt = int(g.choice([8, 40]))
        server.add(f"{i}", prompt, {8: 6, 40: 24}[prompt], ignore_eos=True)
        iterate()
    while server.scheduler.has_unfinished_requests():
        iterate()
    scheduler = server.scheduler
    assert scheduler.policy_metrics.errors == 0 and scheduler.mirror.resyncs == 0
    learned, layout = scheduler.live.policy.rule.policy, scheduler.live.policy.layout
    assert learned.lengths.finished + learned.lengths.fresh >= 600 - 1 - asynchronous  # the last ones end after the last decision
    for prompt, output in ((8, 6), (40, 24)):
        group = learned.lengths.group[layout.classify([prompt], [1], [0])[0]]
        assert learned.lengths.mean[group] == pytest.approx(output, rel=0.2)
    for decodes, prefill in ((4.0, 0.0), (12.0, 0.0), (8.0, 40.0)):
        assert seconds_of(learned.times, decodes, 30.0, prefill, 20.0) == pytest.approx(0.005 + 0.001 * (decodes + prefill), rel=0.1)


# --- states the mirror does not follow ------------------------------------------------------------------------


def test_a_paused_server_is_vllms_own(make: Make) -> None:
    server = make(ENGINE, HALVES, nothing)
    server.add("a", 10, 6)
    assert server.step() == {}
    server.scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert server.step() == {}
    server.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert server.step() == {}
    assert server.scheduler.policy_metrics.counts == {"policy": 2, "repeat": 0, "vllm": 1}  # asked anew after the pause


def test_what_runs_is_drained_while_new_requests_are_paused(make: Make) -> None:
    held = {"on": False}
    server = make(ENGINE, HALVES, lambda view: nothing(view) if held["on"] else Decision.greedy(2))
    server.add("a", 10, 12)
    server.step()
    held["on"] = True
    server.add("b", 10, 12)
    assert server.step() == {}
    server.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    for _ in range(11):
        assert server.step() == {"a": 1}
    let_the_last_batch_back(server)
    held["on"] = False
    server.scheduler.set_pause_state(PauseState.UNPAUSED)
    assert server.step() == {"b": 10}
    assert server.scheduler.mirror.resyncs == 1
    server.run_until_empty()


def test_running_requests_thrown_out_by_a_cache_reset_are_found_again(make: Make) -> None:
    server = make(ENGINE, HALVES, None)
    for i in range(6):
        server.add(f"{i}", 10, 12)
    for _ in range(3):
        server.step()
    server.scheduler.reset_prefix_cache(reset_running_requests=True)
    server.step()
    assert server.scheduler.mirror.resyncs == 1
    check_against_scheduler_after(server)
    server.run_until_empty()
    assert server.scheduler.policy_metrics.errors == 0


def check_against_scheduler_after(server: Server) -> None:
    """The same at the start of the next iteration."""
    s = server.scheduler
    pool = s.kv_cache_manager.block_pool
    s.mirror.refresh(server.clock, s.running, s.waiting, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
    check_against_scheduler(server)


def wait_for_grammar(scheduler: Any, request: Any, grammar: Any) -> None:
    """Queue a request as vLLM does one with structured output whose grammar is not compiled."""
    scheduler.waiting.remove_requests([request])
    scheduler.mirror.leave(request.request_id)
    request.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    request.structured_output_request = grammar
    scheduler._enqueue_waiting_request(request)


def test_a_request_whose_grammar_is_not_ready_is_gated_all_the_same(make: Make) -> None:
    server = make(ENGINE, HALVES, lambda view: Decision.of([1, 1], [0, 0]))
    request = server.add("a", 10, 6)
    other = server.add("b", 10, 6)
    scheduler = server.scheduler
    wait_for_grammar(scheduler, request, SimpleNamespace(grammar=None))
    assert server.step() == {} and scheduler.mirror.view.num_waiting == 1
    request.structured_output_request.grammar = object()
    assert server.step() == {}  # ready, but the policy admits nobody
    assert scheduler.mirror.view.num_waiting == 2
    assert list(versions.standing(scheduler)) == [other, request]


def test_a_grammar_that_becomes_ready_during_the_iteration_waits_for_the_next(make: Make) -> None:
    class Compiling:
        """Ready from the second look on, as a grammar compiled by another thread may be."""

        looks = 0

        @property
        def grammar(self) -> object | None:
            self.looks += 1
            return object() if self.looks > 1 else None

    server = make(ENGINE, HALVES, lambda view: Decision.of([1, 1], [0, 0]))
    request = server.add("a", 10, 6)
    server.add("b", 10, 6)
    scheduler = server.scheduler
    wait_for_grammar(scheduler, request, Compiling())
    for _ in range(3):
        assert server.step() == {}
    assert scheduler.mirror.view.num_waiting == 2


# --- a policy that fails ----------------------------------------------------------------------------------------


def test_a_policy_that_raises_is_replaced_with_one_logged_error(make: Make, errors: list[logging.LogRecord]) -> None:
    calls = []

    def script(view: Any) -> Decision:
        calls.append(1)
        if len(calls) > 3:
            raise ZeroDivisionError("mine")
        return Decision.of([1, 1], [1, 0])

    server = make(ENGINE, HALVES, script)
    for i in range(20):
        server.add(f"{i}", 10, 12)
    for _ in range(5):
        server.step()
    server.add("late", 10, 12)
    server.scheduler.finish_requests(["3"], RequestStatus.FINISHED_ABORTED)
    server.run_until_empty()
    assert len(calls) == 4 and len(errors) == 1
    assert errors[0].exc_info is not None and "mine" in str(errors[0].exc_info[1]) and "from now on" in errors[0].getMessage()
    metrics = server.scheduler.policy_metrics
    assert metrics.errors == 1 and metrics.in_fallback and metrics.counts["vllm"] > 10
    assert metrics.summary()["in_fallback"] is True


def test_a_policy_that_raises_may_be_tried_again(make: Make, errors: list[logging.LogRecord]) -> None:
    calls = []

    def script(view: Any) -> Decision:
        calls.append(1)
        if len(calls) in (3, 6):
            raise ZeroDivisionError("mine")
        check_against_scheduler(server)
        return Decision.greedy(2)

    server = make(ENGINE, HALVES, script, retry_after_iterations=4)
    for i in range(30):
        server.add(f"{i}", 10, 12)
    server.run_until_empty()
    assert len(errors) == 1 and "for 4 iterations" in errors[0].getMessage()
    metrics = server.scheduler.policy_metrics
    assert metrics.errors == 2 and not metrics.in_fallback and metrics.counts["vllm"] == 8
    assert server.scheduler.mirror.resyncs == 2 and len(calls) > 20


@pytest.mark.parametrize(
    "decision", [Decision(3), Decision.of([1, 1], [-1, 0]), None, "admit all"], ids=["queues", "negative", "none", "text"]
)
def test_what_is_no_decision_counts_as_a_failure(make: Make, errors: list[logging.LogRecord], decision: Any) -> None:
    server = make(ENGINE, HALVES, lambda view: decision)
    server.add("a", 10, 12)
    server.run_until_empty()
    assert len(errors) == 1 and server.scheduler.policy_metrics.errors == 1


def test_a_policy_that_fails_at_once_stops_the_server_from_starting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(serve_policies.Scripted, "layout", QueueLayout())
    monkeypatch.setattr(serve_policies.Scripted, "changes", {})
    monkeypatch.setattr(serve_policies.Scripted, "script", staticmethod(lambda view: view.no_such_thing))
    configure(monkeypatch, tmp_path, "serve_policies:Scripted")
    with pytest.raises(ConfigError, match=r"policy 'scripted' fails on an almost empty server: AttributeError: .*no_such_thing"):
        Server(ENGINE)


def test_the_rehearsal_shows_every_kind_of_queue() -> None:
    class Watching:
        name = "watching"
        layout = HALVES
        seen: ClassVar[list[tuple[int, int, int]]] = []

        def decide(self, view: Any) -> Decision:
            self.seen.append((view.num_waiting, int(view.residents.sum()), int(view.waiting[0, 1])))
            return Decision.greedy(2)

        def reset(self) -> None:
            self.seen.append((-1, -1, -1))

    policy: Any = Watching()
    rehearse(policy, LiveMirror(HALVES, ENGINE))
    assert policy.seen == [(0, 0, 0), (3, 0, 0), (2, 1, 0), (2, 0, 1), (-1, -1, -1)]


# --- what is refused, what is reported ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("scheduler_config.policy", "priority", "--scheduling-policy fcfs"),
        ("parallel_config.pipeline_parallel_size", 2, "pipeline parallelism"),
        ("parallel_config.data_parallel_size", 2, "data parallelism"),
        ("parallel_config.decode_context_parallel_size", 2, "context parallelism"),
        ("speculative_config", object(), "speculative decoding"),
        ("lora_config", object(), "LoRA"),
        ("kv_transfer_config", object(), "KV and encoder transfer"),
        ("model_config.runner_type", "pooling", "not decoders of text"),
    ],
)
def test_settings_that_were_not_tested_are_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, path: str, value: Any, message: str
) -> None:
    server = make(ENGINE, HALVES, None)
    whole = server.scheduler.vllm_config
    names = ("scheduler_config", "parallel_config", "model_config", "speculative_config", "lora_config", "kv_transfer_config")
    config = SimpleNamespace(ec_transfer_config=None, **{name: getattr(whole, name) for name in names})
    serve.check_supported(config, server.scheduler.kv_cache_config)
    first, _, second = path.partition(".")
    if second:
        monkeypatch.setattr(getattr(config, first), second, value)
    else:
        monkeypatch.setattr(config, first, value)
    with pytest.raises(ConfigError, match=message):
        serve.check_supported(config, server.scheduler.kv_cache_config)


def test_other_kinds_of_kv_cache_are_refused(make: Make) -> None:
    server = make(ENGINE, HALVES, None)
    groups = server.scheduler.kv_cache_config.kv_cache_groups
    two = SimpleNamespace(kv_cache_groups=groups * 2)
    with pytest.raises(ConfigError, match="one group of full attention"):
        serve.check_supported(server.scheduler.vllm_config, two)


def test_the_report_is_final_after_a_shutdown_in_order(make: Make, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    server = make(ENGINE, HALVES, None, report_path=str(path), report_interval_seconds=1000)
    server.add("a", 10, 12)
    server.run_until_empty()
    server.scheduler.shutdown()
    report = json.loads(path.read_text())
    assert report["iterations"]["policy"] == 12 + server.asynchronous and report["policy_errors"] == 0
    assert report["requests"] == {"outside": 0, "boundary": 0, "held": 0}
    assert 0 < report["policy_seconds"]["p50"] <= report["policy_seconds"]["max"] < 10
    assert report["policy_seconds"]["count"] == 12 + server.asynchronous
    assert list(tmp_path.glob("*.part")) == []
