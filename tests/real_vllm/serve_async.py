"""What a policy costs under vLLM's asynchronous scheduling, with a model that sleeps. Prints two tables of docs/deploy.md.

    OMP_NUM_THREADS=1 VLLM_TARGET_DEVICE=cpu python tests/real_vllm/serve_async.py engine
    OMP_NUM_THREADS=1 VLLM_TARGET_DEVICE=cpu python tests/real_vllm/serve_async.py server

``engine``: vLLM's engine core in this process, so many requests that decode, seconds from one iteration to the next. ``server``: the whole
server asked over HTTP by streaming clients, a closed loop of ``CLIENTS``. The unmodified server, the policy and both without asynchronous
scheduling follow each other; medians over the rounds.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llmsched_hardware.versions import cpu_block_size, installed, prepare_environment

EXECUTION = (0.005, 0.010, 0.020)
ARMS = (("vLLM", None, True), ("policy", "vllm", True), ("policy, synchronous", "vllm", False), ("vLLM, synchronous", None, False))
RUNNING = (1, 16, 64, 256)
ROUNDS, ITERATIONS = 4, 100
CLIENTS, REQUESTS, PROMPT, OUTPUT = 32, 192, 64, 64
LENGTHS = {"prompt": [PROMPT], "output": [OUTPUT], "weight": [1]}


# --- the engine core alone ---------------------------------------------------------------------------------------------
def engine_core(policy: str | None, asynchronous: bool, seconds: float, folder: Path) -> Any:
    from faked_executor import FakedExecutor
    from vllm import EngineArgs
    from vllm.v1.engine.core import EngineCore

    from llmsched_hardware.options import SCHEDULER_CLASS
    from llmsched_hardware.real_engine import write_tiny_llama

    os.environ["FAKED_SECONDS"] = str(seconds)
    config: dict[str, Any] = {}
    if policy is not None:
        (folder / "policy.json").write_text(json.dumps({"lengths": LENGTHS, "rate": 5.0}))
        os.environ |= {"LLMSCHED_POLICY": policy, "LLMSCHED_POLICY_CONFIG": str(folder / "policy.json")}
        config["scheduler_cls"] = SCHEDULER_CLASS
    arguments = EngineArgs(
        model=str(write_tiny_llama(folder / "model", 2_048)),
        load_format="dummy",
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        async_scheduling=asynchronous,
        distributed_executor_backend=FakedExecutor,
        max_model_len=2_048,
        num_gpu_blocks_override=300 * 2_048 // cpu_block_size(),
        block_size=cpu_block_size(),
        max_num_seqs=256,
        max_num_batched_tokens=32_768,
        **config,
    )
    return EngineCore(arguments.create_engine_config(), FakedExecutor, log_stats=True)


def periods(core: Any, running: int) -> list[float]:
    """Seconds from one iteration to the next, a median for each round; all requests decode. They are gone afterwards."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    names = [f"{running}-{i}" for i in range(running)]
    for name in names:
        params = SamplingParams(max_tokens=2_000, ignore_eos=True)
        hasher = core.request_block_hasher
        core.add_request(
            Request(request_id=name, prompt_token_ids=[7] * PROMPT, sampling_params=params, pooling_params=None, block_hasher=hasher)
        )
    found = []
    for done in range(ROUNDS + 1):
        times: list[float] = []
        while len(times) <= ITERATIONS:
            if core.step_fn()[0]:  # tokens have come back
                times.append(time.perf_counter())
        if done:
            found.append(statistics.median(b - a for a, b in itertools.pairwise(times)))
    core.abort_requests(names)
    while core.scheduler.has_requests() or core.batch_queue:
        core.step_fn()
    return found


def engine_table() -> None:
    from faked_executor import keep_asynchronous

    keep_asynchronous()
    print("| execution, ms | running | " + " | ".join(f"{arm}, ms" for arm, _, _ in ARMS) + " |")
    print("| ---: | ---: |" + " ---: |" * len(ARMS))
    for seconds in EXECUTION:
        cells: dict[int, list[str]] = {n: [] for n in RUNNING}
        for _, policy, asynchronous in ARMS:
            with tempfile.TemporaryDirectory() as folder:
                core = engine_core(policy, asynchronous, seconds, Path(folder))
                for n in RUNNING:
                    cells[n].append(f"{statistics.median(periods(core, n)) * 1e3:.2f}")
                core.shutdown()
        for n, row in cells.items():
            print(f"| {seconds * 1e3:g} | {n} | {' | '.join(row)} |", flush=True)


# --- the whole server ---------------------------------------------------------------------------------------------------
def server_table() -> None:
    from serve_http import HttpServer, write_tokenizer

    from llmsched_hardware.real_engine import write_tiny_llama

    requests = [{"prompt": [3 + i % 900] * PROMPT, "max_tokens": OUTPUT, "ignore_eos": True} for i in range(REQUESTS)]
    flags = ("--max-num-seqs", "256", "--max-num-batched-tokens", "2048", "--no-enable-prefix-caching")
    print("| execution, ms | server | requests/s | TTFT, ms | TPOT, ms |\n| ---: | --- | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = write_tiny_llama(root / "model", 512)
        write_tokenizer(model)
        for seconds in EXECUTION:
            for arm, policy, asynchronous in ARMS:
                folder = root / f"{seconds}-{arm}"
                config = {"lengths": LENGTHS, "rate": 5.0}
                with HttpServer(model, folder, policy, config, flags, faked_seconds=seconds, asynchronous=asynchronous) as server:
                    server.wait_until_ready()
                    rounds = [one_round(server, requests) for _ in range(ROUNDS)][1:]
                figures = [statistics.median(column) for column in zip(*rounds, strict=True)]
                print(f"| {seconds * 1e3:g} | {arm} | {figures[0]:.1f} | {figures[1] * 1e3:.1f} | {figures[2] * 1e3:.2f} |", flush=True)


def one_round(server: Any, requests: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Requests a second, and the means of the time to the first token and of the time per later token, seconds."""
    start = time.perf_counter()
    answers = server.ask(requests, at_once=CLIENTS)
    took = time.perf_counter() - start
    assert all(len(a.tokens) == OUTPUT for a in answers)
    later = [(a.last - a.first) / (OUTPUT - 1) for a in answers]
    return len(answers) / took, statistics.mean(a.first for a in answers), statistics.mean(later)


def main(words: list[str]) -> None:
    tables: dict[str, Callable[[], None]] = {"engine": engine_table, "server": server_table}
    if len(words) != 1 or words[0] not in tables:
        sys.exit(__doc__)
    prepare_environment()
    print(f"vLLM {installed()[1]}, {os.cpu_count()} cores")
    tables[words[0]]()


if __name__ == "__main__":
    main(sys.argv[1:])
