"""A vLLM server with an OpenAI-compatible API on a free loopback port, and streaming clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from llmsched_hardware.versions import cpu_block_size

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 300.0
VOCABULARY = 1000
BLOCK = cpu_block_size()
FAKED = Path(__file__).with_name("faked_executor.py")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy


def write_tokenizer(folder: Path) -> None:
    """One word a token: ``w7`` is token 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))


@dataclass(frozen=True)
class Answer:
    """What a client got: tokens in order, why it ended, and when (seconds after it was sent)."""

    tokens: list[int]
    reason: str | None
    first: float | None
    last: float


@dataclass
class HttpServer:
    """A server process; ``with`` ends it and all its children whatever happens.

    Attributes:
        model: a Hugging Face folder.
        folder: of the server's own; must not exist.
        policy: ``LLMSCHED_POLICY``; None for the unmodified server.
        config: of the policy.
        flags: further words of the command; the last one of a kind counts.
        faked_seconds: of an iteration of a model that computes nothing (``faked_executor``); None for the real one.
        asynchronous: scheduling, which vLLM switches off on a CPU; here it is put back. The real model then computes while it is
            called, so nothing overlaps, but the scheduler, its outputs and their order are those of a GPU.
    """

    model: Path
    folder: Path
    policy: str | None
    config: Mapping[str, Any] = field(default_factory=dict)
    flags: Sequence[str] = ()
    faked_seconds: float | None = None
    asynchronous: bool = False

    @property
    def program(self) -> list[str]:
        words = [str(FAKED), "--async-scheduling" if self.asynchronous else "--no-async-scheduling"]
        if self.faked_seconds is not None:
            return [*words, "--distributed-executor-backend", "faked_executor.FakedExecutor", "--load-format", "dummy"]
        return words if self.asynchronous else ["-m", "vllm.entrypoints.openai.api_server"]

    def __enter__(self) -> HttpServer:
        self.folder.mkdir(parents=True)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = int(s.getsockname()[1])
        # Nothing of this process's vLLM settings: the server is to run as in production, engine core in a process of its own.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("VLLM_", "LLMSCHED_", "PROMETHEUS_"))}
        env |= {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "TORCHDYNAMO_DISABLE": "1",  # the first request for prompt_logprobs would have the CPU worker compile for minutes
            "PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "baselines", "agents", "hardware", "tests/real_vllm")),
        }
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        if self.faked_seconds is not None:
            env |= {"FAKED_SECONDS": str(self.faked_seconds), "VLLM_TARGET_DEVICE": "cpu"}
        command = [
            *(sys.executable, *self.program, "--model", str(self.model), "--served-model-name", "tiny"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager", "--block-size", str(BLOCK)),
            *("--num-gpu-blocks-override", str(8192 // BLOCK + 1), "--max-model-len", "512"),
            *("--max-num-seqs", "32", "--max-num-batched-tokens", "256"),
            *self.flags,
        ]
        if self.policy is not None:
            (self.folder / "metrics").mkdir()
            (self.folder / "policy.json").write_text(json.dumps(self.config))
            env["LLMSCHED_POLICY"] = self.policy
            env["LLMSCHED_POLICY_CONFIG"] = str(self.folder / "policy.json")
            env["PROMETHEUS_MULTIPROC_DIR"] = str(self.folder / "metrics")
            command += ["--scheduler-cls", "llmsched_hardware.serve.PolicyScheduler"]
        self._log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env, cwd=self.folder, start_new_session=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # whatever is left of the group
            self.process.wait(30)
        finally:
            self._log.close()

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def wait_until_ready(self) -> None:
        """Until ``/health`` answers; an error with the log's end if the server dies or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.log[-6000:]}")
            try:
                with _DIRECT.open(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        raise RuntimeError(f"the server is not ready after {START_SECONDS:.0f} s:\n{self.log[-6000:]}")

    def wait_until_dead(self) -> int:
        return self.process.wait(START_SECONDS)

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics`` by name and labels, once the policy's, which are a second late, stand still."""
        seen = self.samples()
        while self.policy is not None:
            time.sleep(1.5)
            before, seen = seen, self.samples()
            if all(value == before.get(name) for name, value in seen.items() if name.startswith("llmsched:")):
                break
        return seen

    def samples(self) -> dict[str, float]:
        """What ``/metrics`` says now."""
        with _DIRECT.open(f"http://127.0.0.1:{self.port}/metrics", timeout=30) as response:
            text = response.read().decode()
        found = {}
        for line in text.splitlines():
            if line and not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                name = re.sub(r'(engine|model_name|pid)="[^"]*",?', "", name).replace(",}", "}").replace("{}", "")
                found[name] = float(value)
        return found

    def wait_for_metric(self, name: str, value: float) -> None:
        """Metrics are a moment late; one that never comes is an error."""
        for _ in range(200):
            seen = self.samples().get(name)
            if seen == value:
                return
            time.sleep(0.1)
        raise AssertionError(f"{name} is {seen}, not {value}")

    def ask(self, requests: Sequence[Mapping[str, Any]], *, spacing: float = 0.0, at_once: int = 1_000_000) -> list[Answer]:
        """Stream all requests at once (``spacing`` seconds apart), at most ``at_once`` at a time."""

        async def all_of_them() -> list[Answer]:
            connector = aiohttp.TCPConnector(limit=0, force_close=True)
            places = asyncio.Semaphore(at_once)

            async def one(request: Mapping[str, Any]) -> Answer:
                async with places:
                    return await self._stream(session, dict(request))

            async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
                tasks = []
                for request in requests:
                    tasks.append(asyncio.create_task(one(request)))
                    await asyncio.sleep(spacing)
                return list(await asyncio.gather(*tasks))

        return asyncio.run(asyncio.wait_for(all_of_them(), START_SECONDS))

    async def _stream(self, session: aiohttp.ClientSession, request: dict[str, Any]) -> Answer:
        """One request; ``hang_up`` is the number of tokens after which the client disconnects."""
        hang_up = request.pop("hang_up", None)
        body = {"model": "tiny", "temperature": 0, "stream": True, "return_token_ids": True, **request}
        start = time.monotonic()
        tokens: list[int] = []
        reason, first = None, None
        async with session.post(f"http://127.0.0.1:{self.port}/v1/completions", json=body) as response:
            assert response.status == 200, await response.text()
            async for line in response.content:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, event
                choice = event["choices"][0]
                tokens += choice.get("token_ids") or []
                first = time.monotonic() - start if first is None and tokens else first
                reason = choice["finish_reason"] or reason
                if hang_up is not None and len(tokens) >= hang_up:
                    break
        return Answer(tokens, reason, first, time.monotonic() - start)
