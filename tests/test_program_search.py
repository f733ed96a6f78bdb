"""The evaluator for program search: good programs have a score, bad ones a reason, and none hurts the caller."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from llmsched_agents import program_search
from llmsched_agents.program_search import Evaluation, ProgramTask, evaluate_program
from llmsched_baselines import Setting, make_policy
from llmsched_env import ConfigError
from llmsched_env.runner import run_episode
from llmsched_env.workload import load_scenario

GREEDY = "from llmsched_env import Decision\ndef decide(view):\n    return Decision.greedy(1)\n"
ALMOST = "from llmsched_env import Decision\ndef decide(view):\n    return Decision.of(run=[1], admit=[int(view.num_residents < 2)])\n"
TASK = ProgramTask(num_requests=12, seeds=(3, 4), seconds=30.0, memory_mb=256)


def test_a_good_program_has_the_score_of_the_same_policy() -> None:
    found = evaluate_program("print('noise')\n" + GREEDY, TASK)
    scenario = load_scenario(TASK.scenario)
    policy = make_policy("vllm", Setting(scenario.statistics, TASK.rate, scenario.engine))
    workloads = [scenario.generate(seed, rate=TASK.rate, num_requests=TASK.num_requests) for seed in TASK.seeds]
    latencies = tuple(run_episode(policy, workload).summary.latency_mean for workload in workloads)
    assert found == Evaluation(pytest.approx(-sum(latencies) / 2), "", latencies)
    assert evaluate_program(ALMOST, TASK).score < found.score


BAD: dict[str, tuple[str, str]] = {
    "syntax": ("def decide(view:\n", "SyntaxError"),
    "no decide": ("def decision(view): return 1", "no 'decide' there"),
    "empty": ("", "no 'decide' there"),
    "its own error": ("def decide(view): return 1 / 0", "ZeroDivisionError: division by zero"),
    "no decision": ("def decide(view): return [1]", r"TypeError: decide returned \[1\], must return a Decision"),
    "not a function": ("decide = 7", "TypeError|ConfigError"),
    "wrong queues": ("from llmsched_env import Decision\ndef decide(view): return Decision.greedy(5)", "ConfigError"),
    "memory": ("def decide(view):\n    kept = []\n    while True:\n        kept.append(bytearray(10**7))", "MemoryError"),
    "memory when imported": ("kept = [bytearray(10**6) for _ in range(10**6)]", "MemoryError"),
    "exit": ("import sys\ndef decide(view): sys.exit(3)", "SystemExit: 3"),
    "sudden end": ("import os\nos._exit(7)", "ended with code 7"),
    "recursion": ("def decide(view): return decide(view)", "RecursionError"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_program_has_a_reason(case: str) -> None:
    source, reason = BAD[case]
    found = evaluate_program(source, TASK)
    assert found.score == -math.inf and not found.latencies
    assert re.search(reason, found.error), found.error


@pytest.mark.parametrize(
    "source",
    ["while True: pass", "def decide(view):\n    while True: pass", "import subprocess\nsubprocess.run(['sleep', '600'])"],
    ids=["when imported", "in a decision", "in a child"],
)
def test_an_endless_program_is_ended(source: str) -> None:
    task = ProgramTask(num_requests=5, seeds=(0,), seconds=1.0)
    assert evaluate_program(source, task) == Evaluation(-math.inf, "more than 1 seconds")


def test_the_form_of_openevolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_search, "ProgramTask", lambda: TASK)
    (tmp_path / "good.py").write_text(GREEDY, encoding="utf-8")
    (tmp_path / "bad.py").write_text("decide", encoding="utf-8")
    good = program_search.evaluate(str(tmp_path / "good.py"))
    assert good["valid"] == 1.0 and -100.0 < good["combined_score"] < 0.0
    assert program_search.evaluate(str(tmp_path / "bad.py")) == {"combined_score": -math.inf, "valid": 0.0}


@pytest.mark.parametrize(
    "settings",
    [
        {"scenario": "nowhere"},
        {"rate": 0.0},
        {"num_requests": 0},
        {"seeds": ()},
        {"seeds": (-1,)},
        {"seconds": 0.0},
        {"memory_mb": 3},
    ],
)
def test_a_bad_task_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ProgramTask(**settings)


@pytest.mark.parametrize("source", [None, b"x = 1", "\ud800"])
def test_a_source_must_be_a_text(source: Any) -> None:
    with pytest.raises(ConfigError, match="source"):
        evaluate_program(source)
