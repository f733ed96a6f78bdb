"""A production vLLM server under a policy, asked over HTTP by concurrent streaming clients: under asynchronous scheduling and without."""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from serve_http import Answer, HttpServer, write_tokenizer
from serve_policies import RAISING_PROMPT

from llmsched_hardware.real_engine import EngineOptions, build_engine, free_engine, write_tiny_llama
from llmsched_hardware.versions import prepare_environment

prepare_environment()

LENGTHS = {"prompt": [24, 90], "output": [12, 40], "weight": [1, 1]}


def random_requests(count: int, seed: int) -> list[dict[str, Any]]:
    g = np.random.default_rng(seed)
    return [
        {"prompt": g.integers(3, 999, int(g.choice([24, 90]))).tolist(), "max_tokens": int(g.choice([12, 40])), "ignore_eos": True}
        for _ in range(count)
    ]


REQUESTS = random_requests(48, seed=1)


@dataclass
class Servers:
    waiting: HttpServer
    stubborn: HttpServer
    refused: HttpServer
    reference: list[list[int]]


def tokens_without_a_policy(model: Path) -> list[list[int]]:
    """The same requests on a vLLM engine in this process."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = build_engine(EngineOptions(model=str(model), dtype="float32", max_model_len=512, num_blocks=512))
    tokens: dict[str, list[int]] = {}
    for i, request in enumerate(REQUESTS):
        params = SamplingParams(
            temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        engine.add_request(str(i), {"prompt_token_ids": request["prompt"]}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    free_engine(engine)
    return [tokens[str(i)] for i in range(len(REQUESTS))]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Three servers that start side by side: most of a start is waiting for imports."""
    root = tmp_path_factory.mktemp("serve")
    model = write_tiny_llama(root / "model", max_model_len=512, seed=0)
    write_tokenizer(model)
    with contextlib.ExitStack() as stack:
        waiting = HttpServer(
            model,
            root / "waiting",
            "nested-wait",
            {
                "lengths": LENGTHS,
                "rate": 20.0,
                "options": {"segment_ends": [12]},
                "max_wait_seconds": 2.0,
                "report_path": str(root / "report.json"),
                "report_interval_seconds": 0.2,
            },
            asynchronous=True,
        )
        stubborn = HttpServer(model, root / "stubborn", "serve_policies:Stubborn", {"max_wait_seconds": 1.5})
        refused = HttpServer(model, root / "refused", "wait", {"lengths": LENGTHS})
        for server in (waiting, stubborn, refused):
            stack.enter_context(server)
        reference = tokens_without_a_policy(model)
        waiting.wait_until_ready()
        stubborn.wait_until_ready()
        yield Servers(waiting, stubborn, refused, reference)


def assert_complete(answers: list[Answer], requests: list[dict[str, Any]]) -> None:
    assert [a.reason for a in answers] == ["length"] * len(requests)
    assert [len(a.tokens) for a in answers] == [r["max_tokens"] for r in requests]


def test_every_request_completes_with_the_tokens_it_would_have_without_a_policy(servers: Servers) -> None:
    server = servers.waiting
    answers = server.ask(REQUESTS, spacing=0.01)
    assert_complete(answers, REQUESTS)
    assert [a.tokens for a in answers] == servers.reference
    # Once more: prompts now lie in the prefix cache, which is on by default.
    answers = server.ask(REQUESTS)
    assert [a.tokens for a in answers] == servers.reference
    metrics = server.metrics()
    assert metrics['vllm:request_success_total{finished_reason="length"}'] == 2 * len(REQUESTS)
    assert metrics["vllm:prefix_cache_hits_total"] > 0
    assert "policy nested-wait: asynchronous scheduling" in server.log
    # The policy did something: it held requests at its boundary, and was asked in every iteration that computed.
    assert metrics['llmsched:iterations_total{by="repeat",policy="nested-wait"}'] > 0
    assert metrics['llmsched:iterations_total{by="vllm",policy="nested-wait"}'] == 0
    assert metrics['llmsched:policy_errors_total{policy="nested-wait"}'] == 0


def test_policy_latency_is_among_the_servers_metrics(servers: Servers) -> None:
    server = servers.waiting
    server.ask(REQUESTS[:4])
    metrics = server.metrics()
    decided = metrics['llmsched:iterations_total{by="policy",policy="nested-wait"}']
    assert decided > 0
    assert metrics['llmsched:policy_seconds_count{policy="nested-wait"}'] == decided
    assert metrics['llmsched:policy_seconds_bucket{le="+Inf",policy="nested-wait"}'] == decided
    assert 0 < metrics['llmsched:policy_seconds_sum{policy="nested-wait"}'] / decided < 1
    everything = decided + metrics['llmsched:iterations_total{by="repeat",policy="nested-wait"}']
    assert metrics['llmsched:gate_seconds_count{policy="nested-wait"}'] == everything
    report = json.loads((server.folder.parent / "report.json").read_text())
    assert report["policy"] == "nested-wait" and 0 < report["policy_seconds"]["p50"] <= report["policy_seconds"]["p99"]


def test_stop_tokens_end_requests_whose_length_nobody_knew(servers: Servers) -> None:
    stops = [tokens[5] for tokens in servers.reference[:12]]
    requests = [{**r, "max_tokens": 300, "stop_token_ids": [s]} for r, s in zip(REQUESTS, stops, strict=False)]
    answers = servers.waiting.ask(requests)
    assert [a.reason for a in answers] == ["stop"] * 12
    for answer, tokens, stop in zip(answers, servers.reference, stops, strict=False):
        assert answer.tokens == tokens[: tokens.index(stop) + 1]


def test_clients_that_hang_up_leave_nothing_behind(servers: Servers) -> None:
    server = servers.waiting
    long = [{**r, "max_tokens": 400, "hang_up": 3} for r in random_requests(16, seed=2)]
    answers = server.ask(long)
    assert all(a.reason is None and 3 <= len(a.tokens) < 400 for a in answers)
    for name in ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"):
        server.wait_for_metric(name, 0.0)
    for where in ("outside", "boundary", "held"):
        server.wait_for_metric(f'llmsched:requests{{policy="nested-wait",where="{where}"}}', 0.0)
    # The places are free again: as many requests as fit at once.
    assert_complete(server.ask(random_requests(32, seed=3)), random_requests(32, seed=3))
    assert server.metrics()['llmsched:policy_errors_total{policy="nested-wait"}'] == 0


def test_structured_output_passes_the_gate_too(servers: Servers) -> None:
    answers = servers.waiting.ask(
        [{"prompt": [5, 6, 7], "max_tokens": 20, "structured_outputs": {"choice": [f"w{10 + i}"]}} for i in range(6)]
    )
    assert [a.tokens[0] for a in answers] == [10 + i for i in range(6)]
    assert [a.reason for a in answers] == ["stop"] * 6


def test_a_policy_that_admits_nobody_cannot_keep_anyone_waiting(servers: Servers) -> None:
    server = servers.stubborn
    requests = random_requests(10, seed=4)
    answers = server.ask(requests)
    assert_complete(answers, requests)
    assert all(a.first is not None and a.first >= 1.5 for a in answers)  # only the guard let them in
    metrics = server.metrics()
    assert metrics['llmsched:guard_releases_total{policy="stubborn",queue="outside"}'] == 10
    assert metrics['llmsched:guard_releases_total{policy="stubborn",queue="boundary"}'] == 0
    assert metrics['llmsched:fallback{policy="stubborn"}'] == 0


def test_a_policy_that_raises_is_replaced_by_vllm_with_one_logged_error(servers: Servers) -> None:
    """Runs after the one above: the policy is gone for good."""
    server = servers.stubborn
    requests = random_requests(10, seed=5)
    bad = {"prompt": [9] * RAISING_PROMPT, "max_tokens": 12, "ignore_eos": True}
    answers = server.ask([*requests, bad])
    assert_complete(answers, [*requests, bad])
    # A slow client's bad request may come after the guard has let others go; from then on it has nothing to do.
    before = server.metrics()['llmsched:guard_releases_total{policy="stubborn",queue="outside"}']
    assert_complete(server.ask([bad, *requests, bad]), [bad, *requests, bad])
    metrics = server.metrics()
    assert metrics['llmsched:policy_errors_total{policy="stubborn"}'] == 1
    assert metrics['llmsched:fallback{policy="stubborn"}'] == 1
    assert metrics['llmsched:iterations_total{by="vllm",policy="stubborn"}'] >= 24
    assert metrics['llmsched:guard_releases_total{policy="stubborn",queue="outside"}'] == before
    assert server.log.count("raised; vLLM's own admission is in force") == 1
    assert server.log.count("ArithmeticError: a mistake in the policy") == 1
    assert " ERROR " in next(line for line in server.log.splitlines() if "own admission is in force" in line)


def test_a_policy_that_cannot_run_here_stops_the_server_before_its_first_request(servers: Servers) -> None:
    assert servers.refused.wait_until_dead() != 0
    assert "policy 'wait' must know output lengths when requests arrive, which a server does not" in servers.refused.log
