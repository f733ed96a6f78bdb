"""One program of ``llmsched_agents.program_search``, in the process that belongs to it."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any, cast

from llmsched_agents.program_search import MODULE, ProgramTask
from llmsched_baselines import Policy, Setting, make_policy, policy_class
from llmsched_env import Decision, checks
from llmsched_env.backend import View
from llmsched_env.runner import run_episode
from llmsched_env.workload import load_scenario


class ProgramPolicy(Policy):
    """Decides by a function of the view; raises TypeError where that returns no ``Decision``."""

    name = "program"

    def decide(self, view: View) -> Decision:
        decision: object = policy_class(f"{MODULE}:decide")(cast(Any, view))
        if not isinstance(decision, Decision):
            raise TypeError(f"decide returned {checks.shown(decision)}, must return a Decision")
        return decision


def _latencies(task: ProgramTask) -> list[float]:
    """Mean latency in seconds of the program for every seed."""
    scenario, found = load_scenario(task.scenario), []
    policy = ProgramPolicy(Setting(scenario.statistics, task.rate, scenario.engine))
    for seed in task.seeds:
        summary = run_episode(policy, scenario.generate(seed, rate=task.rate, num_requests=task.num_requests)).summary
        if summary.completed != task.num_requests:
            raise RuntimeError(f"{summary.completed} of {task.num_requests} requests completed")
        found.append(float(summary.latency_mean))
    return found


def main(folder: str) -> None:
    """Read a task, try the program in ``folder`` on it, write what came of it."""
    scenario = load_scenario("azure-conv")  # compiled before any limit counts
    warm = scenario.generate(0, rate=6.0, num_requests=3)
    run_episode(make_policy("vllm", Setting(scenario.statistics, 6.0, scenario.engine)), warm, on_step=lambda *_: None)
    out, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # what the program prints goes nowhere
    os.dup2(nothing, 2)
    os.write(out, b"ready\n")
    task = ProgramTask(**json.load(sys.stdin))
    sys.path.insert(0, folder)
    mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    found: dict[str, Any] = {"latencies": [], "error": ""}
    try:
        resource.setrlimit(resource.RLIMIT_AS, (mapped + task.memory_mb * 2**20, most))
        found["latencies"] = _latencies(task)
    except BaseException as caught:  # a program may raise anything, its own exit included
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        found["error"] = f"{type(caught).__name__}: {caught}"[:2000]
    os.write(out, json.dumps(found).encode())
    os._exit(0)  # threads and exit handlers of the program are not waited for


if __name__ == "__main__":
    main(sys.argv[1])
