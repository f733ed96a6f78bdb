"""llmsched serve-check: what a server would refuse is refused, what it would announce is said, and decisions are timed. Needs no vLLM."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmsched_baselines import Setting
from llmsched_env.backend import View
from llmsched_env.cli import serve_check
from llmsched_env.engine_config import EngineConfig
from llmsched_env.types import Decision, QueueLayout
from llmsched_hardware import live_start
from llmsched_hardware.live_config import LiveConfig
from llmsched_hardware.live_start import announcement, start, trial

SMALL = ("engine.max_model_len=512", "engine.num_blocks=512", "engine.max_num_seqs=32", "engine.max_num_batched_tokens=256")
SETTINGS: dict[str, Any] = {
    "lengths": {"prompt": [24, 90], "output": [12, 40], "weight": [1, 1]},
    "rate": 20.0,
    "options": {"segment_ends": [12]},
    "max_wait_seconds": 2.0,
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LLMSCHED_POLICY", "LLMSCHED_POLICY_CONFIG"):
        monkeypatch.delenv(name, raising=False)


def config_file(tmp_path: Path, **values: Any) -> str:
    path = tmp_path / "policy.json"
    path.write_text(json.dumps(values))
    return str(path)


class Own:
    """A policy of an operator's own: everything enters and runs, until decision number ``until``, which raises."""

    name, known_lengths, notes = "own", False, ""
    layout = QueueLayout()

    def __init__(self, setting: Setting, until: int = 10**9, wrong: bool = False) -> None:
        self.engine, self.until, self.wrong, self.decisions = setting.engine, until, wrong, 0

    def reset(self) -> None:
        pass

    def decide(self, view: View) -> Decision:
        self.decisions += 1
        if self.decisions > self.until:
            if self.wrong:
                return Decision.greedy(3)
            raise ArithmeticError("a mistake in the policy")
        return Decision.greedy(1)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> str:
    module = ModuleType("operators_own")
    module.Own = Own  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "operators_own", module)
    return "operators_own:Own"


def test_a_policy_that_will_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, found = config_file(tmp_path, **SETTINGS), tmp_path / "found.json"
    words = ["--policy", "nested-wait", "--config", config, "--requests", "40", "--json", str(found), "--set", *SMALL]
    assert serve_check.main(words) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == (
        "policy nested-wait: 1 classes by single, segments end at [12]; 20 requests/s planned for; a request waits at most 2 s in one queue"
    )
    assert "policy nested-wait: no calibration given: iteration times of a100-llama2-7b-vllm assumed" in lines
    assert any(line.startswith("policy nested-wait: engine settings not given: ") and "watermark = 0.0" in line for line in lines)
    assert any("40 of 40 requests completed in" in line and "Poisson 20/s" in line for line in lines)
    assert lines[-1] == (
        f"start with   LLMSCHED_POLICY=nested-wait LLMSCHED_POLICY_CONFIG={config} vllm serve MODEL "
        "--scheduler-cls llmsched_hardware.serve.PolicyScheduler --max-num-batched-tokens 256 --max-num-seqs 32 --block-size 16 "
        "--max-model-len 512 --num-gpu-blocks-override 513"
    )
    assert err == ""
    record = json.loads(found.read_text())["found"]
    assert record["policy"] == "nested-wait" and record["flags"][-1] == "--num-gpu-blocks-override 513"
    assert 0 < record["trial"]["mean"] < 1 and record["trial"]["decisions"] > 40 and record["trial"]["failure"] == ""


def test_what_is_said_is_what_a_server_logs(tmp_path: Path) -> None:
    config = LiveConfig.from_environment({"LLMSCHED_POLICY": "reserve"})
    live, mirror = start(config, EngineConfig.vllm())
    first, *notes = announcement(config, live)
    assert first.startswith("1 classes by single, segments end at completion; 5.314 requests/s planned for")
    assert tuple(notes) == live.notes and len(mirror) == 0 and mirror.view.layout == live.policy.layout


def test_variables_stand_in_for_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LLMSCHED_POLICY", "nested-wait")
    monkeypatch.setenv("LLMSCHED_POLICY_CONFIG", config_file(tmp_path, **SETTINGS))
    assert serve_check.main(["--requests", "10"]) == 0
    assert "segments end at [12]" in capsys.readouterr().out
    assert serve_check.main(["--requests", "10", "--config", config_file(tmp_path, rate=3.0), "--policy", "vllm"]) == 0
    assert "3 requests/s planned for" in capsys.readouterr().out


def test_agents_that_ship_go_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("safetensors")
    words = ["--policy", "generalist", "--requests", "20"]
    assert serve_check.main(words) == 2
    assert "start vllm serve with --max-num-batched-tokens 256" in capsys.readouterr().err
    assert serve_check.main([*words, "--set", "engine.max_num_batched_tokens=256"]) == 0
    out = capsys.readouterr().out
    assert "policy generalist: " in out and "LLMSCHED_POLICY=generalist vllm serve MODEL" in out


@pytest.mark.parametrize(
    ("words", "values", "message"),
    [
        ([], {}, "LLMSCHED_POLICY is not set"),
        (["--policy", "nested-wiat"], {}, "did you mean 'nested-wait'"),
        (["--policy", "wait"], {}, 'set "assume_max_tokens": true'),
        (["--policy", "vllm"], {"max_wait": 3}, "'max_wait' is unknown; did you mean 'max_wait_seconds'"),
        (["--policy", "nested-wait"], {"rate": 500.0}, 'set "overload": true'),
        (["--policy", "sarathi"], {}, "start vllm serve with --max-num-batched-tokens 512 --max-num-seqs 128 --watermark 0.01"),
        (["--policy", "vllm", "--config", "no/such.json"], None, "no/such.json"),
        (["--policy", "vllm", "--requests", "0"], {}, "--requests: 0, must be >= 1"),
        (["--policy", "vllm", "--set", "engine.max_num_seq=3"], {}, "did you mean 'max_num_seqs'"),
        (["--policy", "vllm", "--set", "engine.late_after=3"], {}, "unknown key"),
        (["--policy", "vllm", "--set", "engine.num_blocks=2"], {}, "--set engine.max_model_len: 4096, must fit the KV cache"),
        (["--policy", "reserve", "--set", "policy.reserve.theta=0.5"], {}, "options stand in --config"),
        (["--policy", "operators_own:Own"], {"options": {"until": 0}}, "fails on an almost empty server: ArithmeticError: a mistake"),
        (["--policy", "operators_own:Own"], {"options": {"until": 1, "wrong": True}}, "fails on an almost empty server"),
    ],
)
def test_what_a_server_would_refuse(
    words: list[str], values: dict[str, Any] | None, message: str, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if values is None else ["--config", config_file(tmp_path, **values)]
    assert serve_check.main([*words, *given]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and message in err


@pytest.mark.parametrize(("wrong", "words"), [(False, "ArithmeticError: a mistake in the policy"), (True, "Error: ")])
def test_a_policy_that_fails_later(wrong: bool, words: str, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_file(tmp_path, **{**SETTINGS, "options": {"until": 100, "wrong": wrong}})
    assert serve_check.main(["--policy", own, "--config", config]) == 1
    out, err = capsys.readouterr()
    assert "policy own: " in out and "start with" not in out
    assert "policy 'own' starts, but fails in the episode" in err and words in err and "vLLM's own admission" in err


def test_an_own_policy_and_its_options(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_file(tmp_path, **{**SETTINGS, "options": {}})
    assert serve_check.main(["--policy", own, "--config", config, "--requests", "20"]) == 0
    assert "20 of 20 requests completed" in capsys.readouterr().out


def test_a_trial_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_start, "MOST_DECISIONS", 30)
    live, _ = start(LiveConfig("vllm"), EngineConfig.vllm())
    found = trial(live, 50)
    assert found.decisions == 30 and found.completed < 50 and found.iteration_seconds > 0
