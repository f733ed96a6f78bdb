"""What a policy adds to vLLM's scheduler: CPU time of an iteration, the model left out. Prints the table of docs/deploy.md.

    OMP_NUM_THREADS=1 python tests/real_vllm/serve_overhead.py

Every scheduler decodes the same batches with faked tokens; policies are asked in every iteration, and
the greedy decision is carried out in place of theirs so that the batches are the same. CPU time of the
process, 10th percentile of the iterations: other work on the machine adds to it, nothing takes from it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from serve_inprocess import Server
from serve_policies import random_agent

from llmsched_env.engine_config import EngineConfig
from llmsched_env.types import Decision
from llmsched_hardware.vllm_scheduler import VllmSchedulerBackend, faked_scheduler

ENGINE = EngineConfig.vllm(max_num_batched_tokens=32_768)
LENGTHS = {"prompt": [64, 64], "output": [200, 400], "weight": [1, 1]}
POLICIES = ("none", "vllm", "nested-wait", "reserve", "agent")
RUNNING = (1, 16, 64, 256)
ITERATIONS = 150


def server_of(policy: str, folder: Path) -> Server:
    if policy == "none":
        from vllm.v1.core.sched.scheduler import Scheduler

        server = Server.__new__(Server)
        server.clock, server.slept, server._running, server.asynchronous = 0.0, [], [], False
        with contextlib.closing(VllmSchedulerBackend()) as backend:
            server.scheduler = faked_scheduler(Scheduler, backend.vllm_config(ENGINE), ENGINE)
        return server
    options = {"segment_ends": [200]} if policy == "nested-wait" else {}
    name = str(random_agent(folder / "agent", action_set="peak", features=True)) if policy == "agent" else policy
    (folder / "policy.json").write_text(json.dumps({"lengths": LENGTHS, "rate": 5.0, "overload": True, "options": options}))
    os.environ |= {"LLMSCHED_POLICY": name, "LLMSCHED_POLICY_CONFIG": str(folder / "policy.json")}
    server = Server(ENGINE)
    live: Any = server.scheduler.live.policy
    ask, greedy = live.decide, Decision.greedy(live.layout.num_queues)
    live.decide = lambda view: (ask(view), greedy)[1]
    return server


def measure(server: Server, running: int) -> tuple[float, float]:
    """Seconds of ``schedule`` and of the update after it."""
    for i in range(running):
        server.add(f"{i}", 64, ITERATIONS + 50, ignore_eos=True)
    for _ in range(3):
        server.step()
    scheduled, updated = [], []
    for _ in range(ITERATIONS):
        start = time.process_time()
        server.schedule()
        middle = time.process_time()
        server.clock += 0.01
        server.finish()
        scheduled.append(middle - start)
        updated.append(time.process_time() - middle)
    return float(np.quantile(scheduled, 0.1)), float(np.quantile(updated, 0.1))


def main() -> None:
    print("| running | policy | schedule, us | update, us | view and gate (P50, wall), us | policy (P50, wall), us |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for running in RUNNING:
        for policy in POLICIES:
            with tempfile.TemporaryDirectory() as folder:
                server = server_of(policy, Path(folder))
                schedule, update = measure(server, running)
            cells = [f"{running}", f"`{policy}`" if policy != "none" else "vLLM alone", f"{schedule * 1e6:.0f}", f"{update * 1e6:.0f}"]
            if policy == "none":
                cells += ["", ""]
            else:
                summary = server.scheduler.policy_metrics.summary()
                cells += [f"{summary[name]['p50'] * 1e6:.0f}" for name in ("gate_seconds", "policy_seconds")]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
