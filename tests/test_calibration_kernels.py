"""llmsched calibrate kernels on the CPU in small: the plan, the files, resuming, and a calibration that an environment runs on."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium as gym
import pytest

from llmsched_env.cli import calibrate
from llmsched_env.errors import ConfigError
from llmsched_env.perf import TableTime, load_calibration
from llmsched_hardware.calibration.importers.vidur_profile import PER_LAYER, read_csv_profile
from llmsched_hardware.calibration.kernels import Point, Reach, measure, plan

torch = pytest.importorskip("torch", reason="PyTorch is not installed (extra: agents)")

REACH = ("--max-tokens", "32", "--max-context", "64", "--max-batch", "2", "--repeats", "1", "--device", "cpu", "--quiet")
ROWS = 6 + 2 + 6 + 6


@pytest.fixture
def config(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "vocab_size": 64, **sizes}), encoding="utf-8")
    return path


def run(config: Path, out: Path, *more: str) -> int:
    return calibrate.main(["kernels", "--config", str(config), "--out", str(out), *REACH, *more])


def test_the_plan_goes_from_coarse_to_fine() -> None:
    points = plan(Reach(tokens=64, context=128, requests=16))
    assert len(points) == len(set(points))
    first = points[: points.index(Point("tokens", 2))]
    assert {p.count for p in first if p.kind == "decode"} == {1, 8, 16} and {p.context for p in first if p.kind == "decode"} == {16, 128}
    assert {p.count for p in points if p.kind == "tokens"} == {1, 2, 4, 8, 16, 32, 64}
    assert all(p.count + p.context <= 128 for p in points if p.kind == "prefill")


def test_measured_kernels_become_a_calibration_that_an_environment_runs_on(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "profile"
    assert run(config, out) == 0
    profile = read_csv_profile(out)
    assert set(profile.operators) == {*PER_LAYER, "emb"} and set(profile.operators["add"]) == {1, 2, 4, 8, 16, 32}
    assert set(profile.decode) == {(n, k) for n in (1, 2) for k in (16, 32, 64)}
    assert set(profile.prefill) == {(c, x) for c in (16, 32) for x in (0, 16, 32)}
    assert all(seconds > 0 for cells in profile.operators.values() for seconds in cells.values())
    assert profile.meta["attention"] == "sdpa" and profile.meta["torch"] == torch.__version__
    file = tmp_path / "mine.npz"
    words = ["import", "--format", "vidur", str(out), "--config", str(config), "--name", "mine", "--out", str(file), "--quiet"]
    assert calibrate.main(words) == 0
    model = load_calibration(str(file))
    assert isinstance(model, TableTime) and model.sequences.size == 2 and model.provenance.engine.startswith("none: kernels of PyTorch")
    env = gym.make("llmsched_env:LLMSched-v1", engine={"time_model": str(file)})
    env.reset(seed=0)
    for _ in range(5):
        env.step(env.action_space.sample())
    env.close()


def test_an_interrupted_run_goes_on(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile"
    assert run(config, out, "--budget-seconds", "1e-9") == 0
    assert "points are left; go on with --resume" in capsys.readouterr().out
    assert run(config, out) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(config, out, "--resume") == 0
    mlp = (out / "mlp.csv").read_text(encoding="utf-8")
    (out / "mlp.csv").write_text(mlp[:-30], encoding="utf-8")  # a kill in the middle of a line
    assert run(config, out, "--resume") == 0
    assert f"{ROWS} rows" in capsys.readouterr().out
    again = (out / "mlp.csv").read_text(encoding="utf-8").splitlines()
    assert again[:-1] == mlp.splitlines()[:-1] and len(again) == len(mlp.splitlines())


def test_rows_of_two_models_do_not_stand_in_one_file(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "profile"
    assert run(config, out, "--budget-seconds", "1e-9") == 0
    config.write_text(config.read_text(encoding="utf-8").replace('"intermediate_size": 64', '"intermediate_size": 128'), encoding="utf-8")
    assert run(config, out, "--resume") == 2
    assert "--resume: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--max-tokens", "1"), "--max-tokens: 1, must be >= 2"),
        (("--budget-seconds", "nan"), "--budget-seconds: nan"),
        (("--repeats", "0"), "--repeats: 0, must be >= 1"),
        (("--attention", "flash_attn"), "--attention: flash_attn, needs a GPU"),
        (("--attention", "flex"), "--attention: flex, needs a GPU and Triton"),
    ],
)
def test_refusals(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str) -> None:
    assert run(config, tmp_path / "profile", *more) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmsched_hardware.calibration.importers.dense_model import read_model

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device: cuda, but PyTorch finds no GPU"):
        measure(read_model(config), tmp_path / "profile", Reach(4, 4, 2), deadline=0.0, device="cuda")
    assert not (tmp_path / "profile").exists()
