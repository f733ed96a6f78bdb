"""Everything at once over HTTP: hundreds of streaming clients of all kinds, a policy that fails in every way, a full disk, a stop.

vLLM's own server runs on a model that sleeps (``faked_executor``), so that asynchronous scheduling, too, can be tried without a GPU.
Every request must be answered exactly once and as the unmodified server answers it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from serve_clients import Reply, stream
from serve_http import HttpServer, write_tokenizer
from serve_policies import MOODS
from small_disk import Disk, small_disk

from llmsched_hardware.real_engine import write_tiny_llama
from llmsched_hardware.versions import prepare_environment

prepare_environment()

ITERATION_SECONDS = 0.002
MODES = {"synchronous": False, "asynchronous": True}
SETTINGS: dict[str, Any] = {
    "lengths": {"prompt": [24, 90], "output": [12, 40], "weight": [1, 1]},
    "rate": 20.0,
    "max_wait_seconds": 5.0,
    "retry_after_iterations": 20,
    "policy_timeout_seconds": 0.5,
    "report_interval_seconds": 0.2,
}


@dataclass
class Servers:
    """Attributes: plain: vLLM's own; by mode: under a policy; disks: where their reports are."""

    plain: HttpServer
    by_mode: dict[str, HttpServer] = field(default_factory=dict)
    disks: dict[str, Disk] = field(default_factory=dict)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """They start side by side."""
    root = tmp_path_factory.mktemp("live")
    model = write_tiny_llama(root / "model", max_model_len=512, seed=0)
    write_tokenizer(model)
    with contextlib.ExitStack() as stack:
        made = Servers(stack.enter_context(HttpServer(model, root / "plain", None, faked_seconds=ITERATION_SECONDS)))
        for mode, asynchronous in MODES.items():
            made.disks[mode] = stack.enter_context(small_disk(root / f"disk-{mode}", 64))
            made.by_mode[mode] = stack.enter_context(
                HttpServer(
                    model,
                    root / mode,
                    "serve_policies:Moody",
                    {**SETTINGS, "report_path": str(made.disks[mode].folder / "report.json")},
                    flags=("--shutdown-timeout", "60"),
                    faked_seconds=ITERATION_SECONDS,
                    asynchronous=asynchronous,
                )
            )
        for server in (made.plain, *made.by_mode.values()):
            server.wait_until_ready()
        yield made


# --- requests -----------------------------------------------------------------------------------------------


def requests_of_all_kinds(seed: int) -> list[dict[str, Any]]:
    """560 in a random order."""
    g = np.random.default_rng(seed)

    def prompt(length: int | None = None) -> list[int]:
        return [int(t) for t in g.integers(3, 999, int(g.integers(1, 180)) if length is None else length)]

    def plain(count: int, **fields: Any) -> list[dict[str, Any]]:
        return [{"prompt": prompt(), "max_tokens": int(g.integers(2, 60)), **fields} for _ in range(count)]

    found = [
        *plain(150, ignore_eos=True),
        *plain(60),  # these may end by themselves
        *plain(60, stop=["w7", "w123 w"]),
        *plain(50, n=3, temperature=1.0),
        *plain(60, hang_up=2, max_tokens=300, ignore_eos=True),
        *[{"prompt": prompt(), "max_tokens": 1} for _ in range(60)],
        # w1 and w2 are no tokens, so that no beginning of a choice is one
        *[{"prompt": prompt(), "max_tokens": 20, "structured_outputs": {"choice": [f"w{10 + i}", f"w{20 + i}"]}} for i in range(10)] * 4,
        *[{"prompt": prompt(int(g.integers(512, 700))), "max_tokens": 5} for _ in range(40)],  # longer than the model takes
        *[{"prompt": prompt(400), "max_tokens": 112, "ignore_eos": True} for _ in range(10)],  # as long as it takes
        *[{"prompt": prompt(length), "max_tokens": 12, "ignore_eos": True} for length in MOODS for _ in range(5)],
    ]
    return [found[i] for i in g.permutation(len(found))]


def assert_same(replies: list[Reply], expected: list[Reply], requests: list[dict[str, Any]]) -> None:
    """Every request has one answer, that of the unmodified server; of one who hung up the beginning."""
    for reply, other, request in zip(replies, expected, requests, strict=True):
        if "hang_up" in request:
            common = min(len(reply.tokens[0]), len(other.tokens[0]))
            assert common >= request["hang_up"] and reply.tokens[0][:common] == other.tokens[0][:common]
            assert not reply.reasons and not reply.errors
            continue
        assert reply == other, request
        assert [len(reasons) for reasons in reply.reasons.values()] == [1] * (request.get("n", 1) if reply.status == 200 else 0)
        assert reply.done == (reply.status == 200)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_until_empty(server: HttpServer) -> None:
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        server.wait_for_metric(name, 0.0)
    for where in ("outside", "boundary", "held"):
        server.wait_for_metric(f'llmsched:requests{{policy="moody",where="{where}"}}', 0.0)


# --- tests, in order: each mode is stopped by the last of them ----------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_request_is_answered_once_whatever_the_policy_does(servers: Servers, mode: str) -> None:
    requests = requests_of_all_kinds(seed=1)
    assert len(requests) == 560
    expected = stream(servers.plain.port, requests)
    server = servers.by_mode[mode]
    replies = stream(server.port, requests)
    assert_same(replies, expected, requests)
    assert sum(reply.status == 400 for reply in replies) == 40
    wait_until_empty(server)
    metrics = server.metrics()
    assert metrics['llmsched:policy_errors_total{policy="moody"}'] > 0
    assert metrics['llmsched:iterations_total{by="policy",policy="moody"}'] > 0
    assert metrics['llmsched:iterations_total{by="vllm",policy="moody"}'] > 0
    assert server.log.count("vLLM's own admission is in force") == 1  # the others are counted
    assert server.process.poll() is None


def wait_until_the_policy_decides(server: HttpServer) -> None:
    """Iterations go by until it is asked again, and one that was given up has ended."""

    def decides() -> bool:
        stream(server.port, [{"prompt": [9] * 20, "max_tokens": 30, "ignore_eos": True}])
        now = server.samples()
        return now['llmsched:fallback{policy="moody"}'] == now['llmsched:policy_stuck{policy="moody"}'] == 0

    wait_until(decides)


def counts(server: HttpServer) -> dict[str, float]:
    found = server.samples()
    return {kind: found[f'llmsched:policy_{kind}_total{{policy="moody"}}'] for kind in ("errors", "overdue")}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("length", "mood"), list(MOODS.items()))
def test_after_any_failure_the_policy_is_back(servers: Servers, mode: str, length: int, mood: str) -> None:
    server = servers.by_mode[mode]
    wait_until_the_policy_decides(server)
    before = counts(server)
    prompts = [[7 + length] * length, *([50 + i] * 30 for i in range(12))]
    requests = [{"prompt": p, "max_tokens": 60, "ignore_eos": True} for p in prompts]
    assert_same(stream(server.port, requests), stream(servers.plain.port, requests), requests)
    if mood != "take a while":
        kind = "overdue" if mood in ("hang", "spin") else "errors"
        wait_until(lambda: counts(server)[kind] > before[kind])  # a second late
    wait_until_the_policy_decides(server)
    wait_until_empty(server)
    after = counts(server)
    assert (after["errors"] > before["errors"]) == (mood != "take a while")
    assert (after["overdue"] > before["overdue"]) == (mood in ("hang", "spin"))


@pytest.mark.parametrize("mode", MODES)
def test_a_full_disk_costs_the_report_and_nothing_else(servers: Servers, mode: str) -> None:
    server, disk = servers.by_mode[mode], servers.disks[mode]
    path = disk.folder / "report.json"
    wait_until(path.exists)
    disk.fail()
    requests = requests_of_all_kinds(seed=2)[:120]
    assert_same(stream(server.port, requests), stream(servers.plain.port, requests), requests)
    wait_until(lambda: "report.json failed and is tried again" in server.log)
    disk.heal()
    wait_until_empty(server)
    iterations = server.metrics()['llmsched:iterations_total{by="policy",policy="moody"}']
    wait_until(lambda: json.loads(path.read_text())["iterations"]["policy"] >= iterations)
    assert server.log.count("report.json failed and is tried again") == 1 and server.process.poll() is None
    assert list(disk.folder.iterdir()) == [path]


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_with_a_timeout_lets_every_request_end(servers: Servers, mode: str) -> None:
    """vLLM drains for ``--shutdown-timeout``; the report is the last word."""
    server = servers.by_mode[mode]
    requests = [{"prompt": [11 + i] * 30, "max_tokens": 300, "ignore_eos": True} for i in range(40)]
    expected = stream(servers.plain.port, requests)

    def stop(events: int) -> None:
        if events == 500:
            os.kill(server.process.pid, signal.SIGTERM)

    assert_same(stream(server.port, requests, after=stop), expected, requests)
    assert server.wait_until_dead() == 0
    report = json.loads((servers.disks[mode].folder / "report.json").read_text())
    assert report["requests"] == {"outside": 0, "boundary": 0, "held": 0}
    assert report["iterations"]["policy"] > 0 and report["policy_overdue"] > 0
