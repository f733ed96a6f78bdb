"""``llmsched train``: what it takes, what it refuses, and a run that goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra: agents)")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed (extra: agents)")
pytest.importorskip("safetensors", reason="safetensors is not installed (extra: agents)")
pytest.importorskip("yaml", reason="pyyaml is not installed (extra: agents)")

import torch as th

from llmsched_agents.checkpoint import load_checkpoint, read_config, read_record
from llmsched_agents.training import Training
from llmsched_env import ConfigError
from llmsched_env.cli import train
from llmsched_env.cli.train import parse_change, parse_reward
from llmsched_env.compiled import compiled
from llmsched_env.registry import REWARDS, SCENARIOS, register_reward, register_scenario
from llmsched_env.runner import run_episode
from llmsched_env.workload import load_scenario

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--algo", "a2c", "--entry", "admit-only", "--kv", "600", "--threads", "1", "--no-tensorboard", "--quiet", "--seed", "3"]
SMALL += ["--set", "n_envs=4", "n_steps=8", "env_kwargs={num_requests: 20}", "--loads", "0.9", "--total-timesteps", "64"]
SMALL += ["--save-every", "32"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    th.set_num_threads(1)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_checkpoint(folder / "agent").network.tensors())


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        ("n_epochs=2", ("n_epochs", 2)),
        ("learning_rate=1.0e-3", ("learning_rate", 1.0e-3)),
        ("recipe.features=false", ("recipe.features", False)),
        ("policy_kwargs={net_arch: [8, 8]}", ("policy_kwargs", {"net_arch": [8, 8]})),
        ("name=a=b", ("name", "a=b")),
    ],
)
def test_values_are_yaml(pair: str, expected: tuple[str, object]) -> None:
    assert parse_change(pair) == expected


@pytest.mark.parametrize("pair", ["n_epochs", "=2", "x=[1"])
def test_what_is_no_assignment_is_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        parse_change(pair)


@compiled
def my_reward(engine: Any, own: Any) -> float:
    return -1.0 * engine.report.duration


def plain_reward(outcome: object) -> float:
    return 1.0


def test_rewards_are_names_limits_or_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_reward("latency") == "latency"
    assert parse_reward("slo_goodput:1,0.1") == {"name": "slo_goodput", "ttft": 1.0, "tpot": 0.1}
    assert parse_reward(f"{__name__}:my_reward") == f"{__name__}:my_reward"
    monkeypatch.setattr(REWARDS, "_here", dict(REWARDS._here))
    register_reward("mine", my_reward)
    assert parse_reward("mine") == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--reward", "latancy"], "did you mean 'latency'"),
        (["--reward", "slo_goodput:1"], "--reward 'slo_goodput:1'"),
        (["--reward", "latency:1,2"], "latency"),
        (["--reward", "nowhere_module:reward"], "nowhere_module"),
        (["--scenarios", "azure-con"], "did you mean 'azure-conv'"),
        (["--scenarios", "nowhere.toml"], "nowhere.toml"),
        (["--algo", "pppo"], "ppo"),
        (["--set", "n_epochs"], "--set"),
        (["--threads", "0"], "--threads"),
        (["--random", "-1"], "--random"),
        (["--from-clone", "/nowhere"], "/nowhere"),
        (["--kv", "many"], "--kv"),
    ],
)
def test_train_refuses_before_any_work(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*SMALL, "--out", str(tmp_path / "x"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert train.main([*SMALL, "--out", str(whole), "--json", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["found"]
    assert found["agent"] == str(whole / "agent") and found["progress"]["steps"] == 64
    save = Training.save

    def saved_once(training: Training) -> None:
        save(training)
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(Training, "save", saved_once)
        assert train.main([*SMALL, "--out", str(part)]) == 130
    assert read_record(part / "agent")["steps"] < 64
    capsys.readouterr()
    assert train.main([*SMALL, "--out", str(part)]) == 2
    assert "holds a run already; use --resume, --overwrite" in capsys.readouterr().err
    assert train.main([*SMALL, "--out", str(part), "--resume", "--seed", "4"]) == 2
    assert "--resume: seed is 4" in capsys.readouterr().err
    assert train.main([*SMALL, "--out", str(part), "--resume"]) == 0
    for name, value in weights(whole).items():
        np.testing.assert_array_equal(weights(part)[name], value)
    (part / "agent" / "stale").touch()
    assert train.main([*SMALL, "--out", str(part), "--overwrite", "--seed", "4", "--total-timesteps", "32"]) == 0
    assert read_record(part / "agent")["seed"] == 4 and not (part / "agent" / "stale").exists()


def test_scenarios_and_rewards_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(SCENARIOS, "_here", dict(SCENARIOS._here))
    register_scenario("own-one", load_scenario("sharegpt"))
    text = (
        '[lengths]\ntypes = { prompt = [200, 64], output = [20, 100], weight = [1.0, 1.0] }\n[arrivals]\nprocess = "poisson"\nrate = 3.0\n'
    )
    (tmp_path / "own.toml").write_text(text + '[engine]\npreset = "vllm"\nnum_blocks = 600\n', encoding="utf-8")
    words = [*SMALL, "--scenarios", "own-one", str(tmp_path / "own.toml"), "--total-timesteps", "32", "--out", str(tmp_path / "run")]
    assert train.main([*words, "--reward", f"{__name__}:plain_reward"]) == 2
    assert "must be a built-in or compiled one" in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert train.main([*words, "--reward", f"{__name__}:my_reward"]) == 0
    assert read_config(tmp_path / "run" / "agent")["trained_on"]["scenarios"] == ["own-one", str(tmp_path / "own.toml")]
    agent = load_checkpoint(tmp_path / "run" / "agent")
    result = run_episode(agent, load_scenario("azure-conv").generate(0, rate=4.0, num_requests=10))
    assert result.summary.completed == 10


def test_torch_waits_passively_and_comes_with_the_run_alone() -> None:
    # The variable is read when torch's library is loaded: it is set by then, and reading the options loads nothing.
    code = """
import os, sys
os.environ.pop("OMP_WAIT_POLICY", None)
from llmsched_env.cli import train
assert train.main(["--help"]) == 0
print("torch" in sys.modules, os.environ.get("OMP_WAIT_POLICY"))
seen = []
real = train.require
train.require = lambda module, extra: (seen.append((module, os.environ.get("OMP_WAIT_POLICY"))), real(module, extra))[1]
train.main(["--out", "/dev/null/x"])
print(seen[0])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["False None", "('torch', 'passive')"]
