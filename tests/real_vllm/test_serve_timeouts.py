"""A live policy that does not return in time, or leaves as it pleases: the loop goes on, and what was given up is never used again."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

import serve_policies
from serve_inprocess import Server, make_server

from llmsched_env.engine_config import EngineConfig
from llmsched_env.types import Decision, QueueLayout
from llmsched_hardware import live_caller, serve
from llmsched_hardware.live_thread import left_behind

ENGINE = EngineConfig.vllm(num_blocks=64, block_size=4, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=128)
HALVES = QueueLayout(segment_ends=(4,))
LIMIT = 0.2
"""seconds: what an ordinary decision of these tests stays far below."""
SOON = 20.0
Make = Callable[..., Server]


@pytest.fixture(params=[False, True], ids=["synchronous", "asynchronous"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Make:
    common = {"policy_timeout_seconds": LIMIT, "asynchronous": request.param}
    return lambda *args, **config: make_server(monkeypatch, tmp_path, *args, **{**common, **config})


@pytest.fixture
def errors(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[logging.LogRecord]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[method-assign]
    serve.logger.addHandler(handler)
    monkeypatch.setattr(serve.logger, "propagate", False)
    yield records
    serve.logger.removeHandler(handler)


@pytest.fixture
def hanging() -> Iterator[threading.Event]:
    """What a hanging decision waits for; set at the end, so that no thread stays."""
    event = threading.Event()
    yield event
    event.set()
    wait_until(lambda: left_behind() == 0)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Moody:
    """A script that decides greedily, but does something else in some of its calls.

    Attributes:
        calls: decisions so far; threads: that made them.
    """

    def __init__(self, **moods: Callable[[], Any]) -> None:
        self.calls = 0
        self.moods = {int(name[1:]): mood for name, mood in moods.items()}
        self.threads: list[int] = []

    def __call__(self, view: Any) -> Decision:
        self.calls += 1
        self.threads.append(threading.get_ident())
        mood = self.moods.get(self.calls)
        return Decision.greedy(2) if mood is None else mood()


def test_within_the_limit_a_policy_decides_as_without_one(make: Make, errors: list[logging.LogRecord]) -> None:
    found = []
    for limit in (None, LIMIT * 50):
        script = Moody()
        server = make(ENGINE, HALVES, script, policy_timeout_seconds=limit)
        for i in range(12):
            server.add(f"{i}", 10, 12)
        steps = []
        while server.scheduler.has_unfinished_requests():
            steps.append(server.step())
        found.append((steps, script.calls))
        assert (threading.get_ident() in script.threads) == (limit is None) and len(set(script.threads)) == 1
    assert found[0] == found[1] and errors == []


def test_the_loop_goes_on_without_a_policy_that_hangs(
    make: Make, errors: list[logging.LogRecord], hanging: threading.Event, tmp_path: Path
) -> None:
    script = Moody(_3=lambda: hanging.wait(SOON))
    server = make(ENGINE, HALVES, script, report_path=str(tmp_path / "report.json"))
    for i in range(8):
        server.add(f"{i}", 10, 12)
    server.run_until_empty()
    metrics = server.scheduler.policy_metrics
    assert script.calls == 3 and (metrics.errors, metrics.overdue) == (1, 1) and metrics.in_fallback
    assert [e.getMessage() for e in errors] == ["policy scripted did not decide within 0.2 s; vLLM's own admission is in force from now on"]
    assert left_behind() == 1 and metrics.stuck()
    server.scheduler.shutdown()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["policy_overdue"] == 1 and report["policy_stuck"] and report["in_fallback"]


def test_a_new_policy_with_a_mirror_of_its_own_takes_over(
    make: Make, errors: list[logging.LogRecord], hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(serve_policies.Scripted, "reset", lambda self: made.append(self))
    script = Moody(_4=lambda: hanging.wait(SOON))
    server = make(ENGINE, HALVES, script, retry_after_iterations=3)
    for i in range(40):
        server.add(f"{i}", 10, 30)
    scheduler = server.scheduler
    first, caller = scheduler.mirror, scheduler.caller
    start, built = caller._start, threading.Event()
    caller._start = lambda: (start(), built.set())[0]
    for _ in range(4):
        server.step()
    assert scheduler.policy_metrics.overdue == 1 and caller.lost
    seen = [int(x) for x in first.record.requests.status[:40]]
    outside = list(scheduler.waiting)
    since = {r.request_id: float(first.stays.since[first.index(r.request_id)]) for r in outside}
    deadline = time.monotonic() + SOON
    while scheduler._fallback:  # the new policy is built beside the loop
        server.step()
        assert caller._building is None or built.wait(SOON)  # else the requests may all be served before
        time.sleep(0.01)
        assert time.monotonic() < deadline and scheduler.has_unfinished_requests()
    assert scheduler.mirror is not first and not caller.lost and len(set(map(id, made))) == 2
    assert [int(x) for x in first.record.requests.status[:40]] == seen  # the old mirror is left as it was
    waiting = [r.request_id for r in scheduler.waiting if r.request_id in since and not r.num_preemptions]
    assert waiting  # and those who still wait have waited since they came
    assert {i: float(scheduler.mirror.stays.since[scheduler.mirror.index(i)]) for i in waiting} == {i: since[i] for i in waiting}
    server.run_until_empty()
    metrics = scheduler.policy_metrics
    assert script.calls > 10 and len(errors) == 1 and (metrics.errors, metrics.overdue) == (1, 1) and not metrics.in_fallback
    assert len(scheduler.mirror) == 0


def test_a_policy_that_hangs_again_and_again_is_not_started_for_ever(
    make: Make, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_caller, "MOST_LEFT_BEHIND", 2)
    hung: list[int] = []

    def script(view: Any) -> Decision:
        if view.num_waiting + int(view.residents.sum()) > 5:  # more than a rehearsal shows
            hung.append(1)
            hanging.wait(SOON)
        return Decision.greedy(2)

    server = make(ENGINE, HALVES, script, retry_after_iterations=1, policy_timeout_seconds=0.02)
    scheduler = server.scheduler

    def failed_six_times() -> bool:
        if not scheduler.has_unfinished_requests():
            for i in range(16):
                server.add(f"{time.monotonic()} {i}", 10, 60)
        server.step()
        return scheduler.policy_metrics.errors >= 6

    wait_until(failed_six_times)
    assert scheduler.policy_metrics.overdue == 2 and left_behind() == 2 and len(hung) == 2
    server.run_until_empty()


def test_a_new_policy_that_is_never_ready_is_given_up(make: Make, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_caller, "MOST_SECONDS_TO_BUILD", 0.05)
    script = Moody(**{f"_{i}": lambda: hanging.wait(SOON) for i in range(2, 50)})  # its rehearsal hangs, too
    server = make(ENGINE, HALVES, script, retry_after_iterations=1, policy_timeout_seconds=0.02)
    scheduler = server.scheduler

    def failed_four_times() -> bool:
        if not scheduler.has_unfinished_requests():
            server.add(f"{time.monotonic()}", 10, 60)
        server.step()
        return scheduler.policy_metrics.errors >= 4

    wait_until(failed_four_times)
    assert left_behind() == live_caller.MOST_LEFT_BEHIND == scheduler.policy_metrics.overdue
    server.run_until_empty()


def test_a_policy_may_spin_in_python(make: Make) -> None:
    def spin() -> None:
        while True:
            pass

    script = Moody(_2=spin)
    server = make(ENGINE, HALVES, script)
    for i in range(8):
        server.add(f"{i}", 10, 12)
    server.run_until_empty()
    assert server.scheduler.policy_metrics.overdue == 1
    wait_until(lambda: left_behind() == 0)  # and does not take half of Python's time from then on


@pytest.mark.parametrize("limit", [None, LIMIT])
def test_a_policy_that_exits_fails_and_nothing_else_does(make: Make, errors: list[logging.LogRecord], limit: float | None) -> None:
    script = Moody(_2=sys.exit)
    server = make(ENGINE, HALVES, script, policy_timeout_seconds=limit)
    for i in range(4):
        server.add(f"{i}", 10, 12)
    server.run_until_empty()
    assert server.scheduler.policy_metrics.errors == 1 and len(errors) == 1 and "raised" in errors[0].getMessage()


def test_a_reset_that_hangs_is_given_up_as_well(make: Make, hanging: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ZeroDivisionError("mine")

    server = make(ENGINE, HALVES, Moody(_2=fail), retry_after_iterations=1)
    monkeypatch.setattr(serve_policies.Scripted, "reset", lambda self: hanging.wait(SOON))
    for i in range(4):
        server.add(f"{i}", 10, 40)
    server.run_until_empty()
    assert server.scheduler.policy_metrics.overdue >= 1 and server.scheduler.caller.lost


def test_without_a_limit_a_policy_that_takes_long_is_reported_while_it_does(
    make: Make, errors: list[logging.LogRecord], hanging: threading.Event
) -> None:
    server = make(ENGINE, HALVES, Moody(_2=lambda: (hanging.wait(SOON), Decision.greedy(2))[1]), policy_timeout_seconds=None)
    metrics = server.scheduler.policy_metrics

    def look() -> None:
        wait_until(metrics.stuck)
        wait_until(lambda: bool(errors))
        hanging.set()

    watch = threading.Thread(target=look)
    watch.start()
    server.add("a", 10, 12)
    server.run_until_empty()
    watch.join(SOON)
    assert [e.getMessage() for e in errors] == ["policy scripted has not decided for more than 1 s; the engine waits for it"]
    assert not metrics.stuck() and metrics.errors == 0
