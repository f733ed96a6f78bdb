"""`PolicyScheduler` in this process, with faked tokens on a clock that the test moves."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmsched_hardware.versions import prepare_environment

prepare_environment()  # vLLM reads it when it is imported

import serve_policies
from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from llmsched_env.engine_config import EngineConfig
from llmsched_env.types import Decision, QueueLayout
from llmsched_hardware.serve import PolicyScheduler
from llmsched_hardware.vllm_scheduler import VllmSchedulerBackend, faked_scheduler

TOKEN = 7
END_OF_TEXT = 2
LENGTHS = {"prompt": [8], "output": [8], "weight": [1]}


class Server:
    """vLLM's scheduler under a policy; what an engine core does around it is done by ``step``.

    Under asynchronous scheduling a batch comes back after the next one was scheduled.

    Attributes:
        clock: seconds, both wall and monotonic.
        slept: seconds of every rest the scheduler took; they do not move the clock.
    """

    def __init__(self, engine: EngineConfig, asynchronous: bool = False) -> None:
        self.clock = 0.0
        self.slept: list[float] = []
        self._running: list[tuple[Any, list[str]]] = []
        self.asynchronous = asynchronous
        with contextlib.closing(VllmSchedulerBackend()) as backend:
            config = backend.vllm_config(engine)
            config.scheduler_config.async_scheduling = asynchronous  # the CPU platform has switched it off
            self.scheduler = faked_scheduler(PolicyScheduler, config, engine)
        s = self.scheduler
        s.monotonic = s.wall = lambda: self.clock
        s._epoch = 0.0
        s.sleep = self.slept.append

    def add(self, name: str, prompt: int, max_tokens: int, arrival: float | None = None, **params: Any) -> Request:
        """A request of ``prompt`` tokens arrives."""
        request = Request(
            request_id=name,
            prompt_token_ids=[TOKEN] * prompt,
            sampling_params=SamplingParams(max_tokens=max_tokens, **params),
            pooling_params=None,
            arrival_time=self.clock if arrival is None else arrival,
        )
        if not params.get("ignore_eos"):
            request.sampling_params.update_from_generation_config({}, END_OF_TEXT)
        self.scheduler.add_request(request)
        return request

    def schedule(self) -> Any:
        """vLLM's output for one iteration, which then runs."""
        output = self.scheduler.schedule()
        requests = self.scheduler.requests
        caught_up = [i for i in output.num_scheduled_tokens if not requests[i].is_prefill_chunk]
        self._running.append((output, caught_up))
        return output

    def finish(self, stop: frozenset[str] = frozenset()) -> None:
        """The oldest batch that runs comes back: a token for every request that caught up; those in ``stop`` get the end of text."""
        output, caught_up = self._running.pop(0)
        ids = list(output.num_scheduled_tokens)
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids,
                req_id_to_index={i: k for k, i in enumerate(ids)},
                sampled_token_ids=[[END_OF_TEXT if i in stop else TOKEN] if i in caught_up else [] for i in ids],
                logprobs=None,
                prompt_logprobs_dict={},
                pooler_output=[],
            ),
        )

    def step(self, seconds: float = 0.01, stop: frozenset[str] = frozenset()) -> dict[str, int]:
        """One iteration; the tokens scheduled for each request."""
        output = self.schedule()
        while len(self._running) > self.asynchronous or (self._running and not output.num_scheduled_tokens):
            self.clock += seconds
            self.finish(stop)
        return dict(output.num_scheduled_tokens)

    def run_until_empty(self, limit: int = 5_000, seconds: float = 0.01) -> int:
        """Iterations until every request has finished."""
        for i in range(limit):
            if not self.scheduler.has_unfinished_requests():
                return i
            self.step(seconds)
        raise AssertionError(f"{len(self.scheduler.requests)} requests left after {limit} iterations")


def make_server(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    engine: EngineConfig,
    layout: QueueLayout,
    script: Callable[[Any], Decision] | None = None,
    changes: dict[str, object] | None = None,
    asynchronous: bool = False,
    **config: Any,
) -> Server:
    """A server under a scripted policy; ``config`` goes into its JSON file."""
    monkeypatch.setattr(serve_policies.Scripted, "layout", layout)
    monkeypatch.setattr(serve_policies.Scripted, "changes", changes or {})
    monkeypatch.setattr(serve_policies.Scripted, "script", None)  # greedy, for the rehearsal
    configure(monkeypatch, folder, "serve_policies:Scripted", **{"max_wait_seconds": 1000.0, **config})
    server = Server(engine, asynchronous)
    if script is not None:
        monkeypatch.setattr(serve_policies.Scripted, "script", staticmethod(script))
    return server


def configure(monkeypatch: pytest.MonkeyPatch, folder: Path, policy: str, **config: Any) -> None:
    """Set the environment variables of the live server."""
    path = folder / "policy.json"
    path.write_text(json.dumps({"lengths": LENGTHS, "rate": 1.0, **config}))
    monkeypatch.setenv("LLMSCHED_POLICY", policy)
    monkeypatch.setenv("LLMSCHED_POLICY_CONFIG", str(path))
