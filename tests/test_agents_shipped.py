"""The checkpoints that ship: small, complete, and run without torch, on one engine and on many; on vLLM: real_vllm/test_agents_vllm.py."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is not installed (extra: checkpoints)")

from llmsched_agents.checkpoint import CONFIG, RECORD, WEIGHTS, load_checkpoint, read_record
from llmsched_baselines import Setting, make_policy
from llmsched_env.batch_runner import Run, run_batch
from llmsched_env.runner import run_episode
from llmsched_env.workload import load_scenario, scenario_names

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "agents" / "llmsched_agents" / "checkpoints"
NAMES = ("generalist", "slo")


def setting_of(name: str, rate: float | None = None) -> Setting:
    scenario = load_scenario(name)
    return Setting(scenario.statistics, rate or scenario.rate, scenario.engine)


def test_these_ship() -> None:
    assert sorted(folder.name for folder in CHECKPOINTS.iterdir() if folder.is_dir()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_small_and_says_how_it_was_made(name: str) -> None:
    folder = CHECKPOINTS / name
    assert {file.name for file in folder.iterdir()} == {CONFIG, RECORD, WEIGHTS}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 2_000_000
    record = read_record(folder)
    assert record["algorithm"] and record["settings"] and record["wall_seconds"] > 0
    assert load_checkpoint(folder).name == name


@pytest.mark.filterwarnings("ignore::llmsched_env.perf.base.CalibrationRangeWarning")  # mooncake's prompts
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scenario", [name for name in scenario_names() if load_scenario(name).rows is None])
def test_a_checkpoint_runs_on_every_scenario(name: str, scenario: str) -> None:
    setting = setting_of(scenario)
    agent = load_checkpoint(CHECKPOINTS / name, setting)
    workload = load_scenario(scenario).generate(1, rate=setting.rate, num_requests=30)
    result = run_episode(agent, workload)
    assert result.summary.completed == 30 and not result.summary.truncated
    (batched,) = run_batch([Run(agent, workload)])
    np.testing.assert_array_equal(batched.log.completed, result.log.completed)


def test_torch_is_not_imported() -> None:
    code = f"""
import sys
sys.modules["torch"] = None
sys.modules["stable_baselines3"] = None
sys.modules["yaml"] = None
from llmsched_agents.checkpoint import load_checkpoint
from llmsched_env.runner import run_episode
from llmsched_env.workload import load_scenario
from llmsched_baselines import Setting
scenario = load_scenario("azure-conv")
for name in {NAMES!r}:
    agent = load_checkpoint({str(CHECKPOINTS)!r} + "/" + name, Setting(scenario.statistics, 4.0, scenario.engine))
    print(run_episode(agent, scenario.generate(0, rate=4.0, num_requests=5)).summary.completed)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["5", "5"]


def test_an_agent_is_compared_beside_the_experts(tmp_path: Path) -> None:
    pytest.importorskip("joblib", reason="joblib is not installed (extra: cli)")
    from llmsched_env.cli.compare import main

    words = ["--scenario", "azure-conv", "--rates", "5", "--policies", "vllm", str(CHECKPOINTS / "generalist"), "--seeds", "2"]
    words += ["--num-requests", "40", "--jobs", "1", "--quiet", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    with (tmp_path / "out" / "summary.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["policy"] for row in rows].count("generalist") == 2
    assert "generalist" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert main([*words, "--resume"]) == 0
    copied = tmp_path / "sarathi"
    copied.mkdir()
    assert main([*words[:5], "vllm", str(tmp_path / "nowhere" / "agent"), *words[7:-1], str(tmp_path / "other")]) == 2
    assert main([*words[:5], "sarathi", str(copied), *words[7:-1], str(tmp_path / "other")]) == 2


def test_the_generalist_beats_the_defaults_under_overload() -> None:
    scenario = load_scenario("azure-conv")
    setting = Setting(scenario.statistics, 5.3, scenario.engine, overrides={"num_blocks": 2816})
    workload = scenario.generate(77, rate=5.3, num_requests=1500)
    ours = run_episode(load_checkpoint(CHECKPOINTS / "generalist", setting), workload).summary.latency_mean
    for name in ("vllm", "sarathi", "reserve", "expected-work"):
        assert ours < 0.9 * run_episode(make_policy(name, setting), workload).summary.latency_mean
