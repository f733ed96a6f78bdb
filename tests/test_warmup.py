"""``llmsched warmup`` and the line that announces a first use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numba
import pytest

from llmsched_agents.checkpoint import shipped_agents
from llmsched_baselines import SHIPPED
from llmsched_env import compiled as module
from llmsched_env.bench import warmup as bench
from llmsched_env.cli import warmup
from llmsched_env.spec import ACTION_SETS

ROOT = Path(__file__).resolve().parents[1]

FIRST_USE = """
import gymnasium as gym
for name in ("LLMSched-v1", "LLMSchedKnown-v1"):
    env = gym.make(f"llmsched_env:{name}")
    env.reset(seed=0)
    env.step(env.action_space.sample())
    many = gym.make_vec(name, num_envs=4)
    many.reset(seed=0)
    many.step(many.action_space.sample())
"""


def test_parts_are_all_that_ships() -> None:
    names = [part.name for part in bench.parts()]
    assert len(set(names)) == len(names)
    ours = {name: spec for name, spec in gym.registry.items() if name.startswith("LLMSched") and spec.version == 1}
    simulated = {name for name, spec in ours.items() if "backend" not in spec.kwargs}
    assert simulated == set(bench.environments()) and "LLMSched-v1" in simulated and "LLMSchedHardware-v1" not in simulated
    wanted = {*simulated, *(f"agent {name}" for name in shipped_agents())}
    for preset in ("vllm", "paper"):
        wanted |= {f"policy {cls.name}, preset {preset}" for cls in SHIPPED} | {f"actions {a}, preset {preset}" for a in ACTION_SETS}
    assert wanted <= set(names)


def test_a_part_is_run_and_counted() -> None:
    chosen = [part for part in bench.parts() if part.name in ("LLMSched-v1", "policy fcfs, preset paper")]
    first = list(bench.warm(chosen))
    assert [one.name for one in first] == [part.name for part in chosen]
    assert all(one.compiled >= 0 and one.seconds > 0 for one in first)
    assert [one.compiled for one in bench.warm(chosen)] == [0, 0]


def test_the_command_says_what_it_did(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_said", set())
    chosen = [part for part in bench.parts() if part.name == "LLMSched-v1"]
    monkeypatch.setattr(warmup, "parts", lambda: chosen)
    list(bench.warm(chosen))
    assert warmup.main([]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("1 parts, nothing to compile") and str(module.CACHE_FOLDER) in out
    assert "compiling for this machine" not in err
    assert warmup.main(["--quiet", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["found"]["compiled"] == 0


def test_a_cache_that_keeps_nothing_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_said", set())
    monkeypatch.setattr(module, "CACHE_FOLDER", tmp_path / "nothing")
    monkeypatch.setattr(warmup, "parts", list)
    assert warmup.main([]) == 1
    assert "NUMBA_CACHE_DIR" in capsys.readouterr().err


def test_a_first_use_is_announced_with_its_time_in_the_main_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Worker:
        name = "LokyProcess-1"

    def announced(**changes: Any) -> str:
        monkeypatch.setattr(module, "_said", set())
        for name, value in changes.items():
            monkeypatch.setattr(module, name, value)
        for _ in range(2):
            module._say("compiling", f"compiling for this machine, which takes {module.FIRST_USE}")
        return capsys.readouterr().err

    monkeypatch.delenv("LLMSCHED_QUIET", raising=False)
    assert announced() == "llmsched_env: compiling for this machine, which takes 10 to 30 seconds\n"
    monkeypatch.setenv("LLMSCHED_QUIET", "1")
    assert announced() == ""
    monkeypatch.delenv("LLMSCHED_QUIET")
    assert announced(current_process=Worker) == ""


@pytest.mark.slow
@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled")
def test_after_a_warmup_nothing_is_compiled(tmp_path: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name not in ("LLMSCHED_QUIET", "NUMBA_DISABLE_JIT")}
    variables |= {"NUMBA_CACHE_DIR": str(tmp_path)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *words], env=variables, cwd=ROOT, check=True, capture_output=True, text=True)

    first = run("-m", "llmsched_env.cli", "warmup")
    assert "functions compiled" in first.stdout and "compiling for this machine" not in first.stderr
    assert "nothing to compile" in run("-m", "llmsched_env.cli", "warmup", "--quiet").stdout
    assert run("-c", FIRST_USE).stderr == ""
    demo = ("demo", "--quiet", "--seeds", "1", "--num-requests", "50", "--jobs", "1", "--out", str(tmp_path / "demo"))
    assert run("-m", "llmsched_env.cli", *demo).stderr == ""
