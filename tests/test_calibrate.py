"""llmsched calibrate: profiles in, calibration files out; refusals; and --calibration in the commands that use one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsched_baselines import Setting
from llmsched_baselines.overrides import Overrides, with_calibration
from llmsched_env import EngineConfig
from llmsched_env.cli import calibrate, compare, replay
from llmsched_env.errors import ConfigError
from llmsched_env.pages.fidelity.evidence import Paths
from llmsched_env.perf import TableTime, load_calibration
from llmsched_env.types import LengthStatistics
from llmsched_hardware.calibration.importers.vidur import ARRAYS, read_iterations

SHIPPED = Path(__file__).resolve().parents[1] / "llmsched_env" / "perf" / "calibrations"
ITERATIONS = "n_decode,decode_kv_total,n_prefill,prefill_tokens,prefill_sq_sum,prefill_ctx_total,prefill_cross_sum,iteration_s"


def raw_tables(**changes: Any) -> dict[str, Any]:
    """A profile in Vidur's form, far smaller than the real one."""
    arrays: dict[str, Any] = {
        "linear_tokens": np.arange(8, 65, 8),
        "linear_s": np.linspace(0.01, 0.02, 8, dtype=np.float32),
        "decode_batch": np.arange(1, 5),
        "decode_kv": np.arange(0, 257, 64),
        "decode_attn_s": np.outer(np.arange(1, 5), np.arange(5)).astype(np.float32) * 1e-4,
        "prefill_kv": np.array([0, 64]),
        "prefill_chunk": np.arange(1, 33),
        "prefill_attn_s": np.ones((2, 32), np.float32) * 1e-3,
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    folder = tmp_path / "profile"
    folder.mkdir()
    np.savez(folder / "tiny_tables.npz", **raw_tables())
    return folder


def words(source: Path, out: Path, *, model: str = "llama-2-7b", name: str = "tiny", form: str = "vidur") -> list[str]:
    return ["import", "--format", form, str(source), "--model", model, "--name", name, "--out", str(out)]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = calibrate.main(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_profile_becomes_a_calibration_with_provenance(profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "tiny.npz"
    code, text, err = run(capsys, *words(profile, out))
    assert (code, err) == (0, "")
    assert "KV capacity  7,424 blocks of 16 tokens" in text
    model = load_calibration(str(out))
    assert isinstance(model, TableTime) and model.lookup == "vidur" and model.beyond == "extrapolate"
    assert model.provenance.name == "tiny"
    assert model.provenance.valid_range.startswith("up to 64 tokens a batch, 4 decode requests of at most 256 tokens")
    assert model.provenance.fit_error == "not measured against iteration times"
    assert model.decode[3, 4] == np.float32(16) * np.float32(1e-4)
    again = tmp_path / "again.npz"
    assert run(capsys, *words(profile / "tiny_tables.npz", again))[0] == 0
    assert again.read_bytes() == out.read_bytes()


def test_the_fit_error_is_measured_where_iteration_times_lie_beside_the_tables(profile: Path, tmp_path: Path, capsys: Any) -> None:
    # 4 decodes of 100 tokens: linear[8] + decode[4, 128] = 0.01 + 8e-4, recorded 10 % too high.
    (profile / "tiny_iterations.csv").write_text(f"{ITERATIONS}\n4,400,0,0,0,0,0,{0.0108 / 1.1:.9f}\n")
    assert run(capsys, *words(profile, tmp_path / "t.npz"))[0] == 0
    assert load_calibration(str(tmp_path / "t.npz")).provenance.fit_error.startswith("MAPE 1e+01 %")


def _paths() -> Paths:
    try:
        return Paths.find()
    except ConfigError as error:
        pytest.skip(str(error))


def test_the_shipped_calibration_from_vidur_is_what_its_profile_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = _paths().calibration / "vidur_a100_llama2_7b_tables.npz"
    if not source.exists():
        pytest.skip(f"{source} is absent")
    out = tmp_path / "a100-llama2-7b-vidur.npz"
    assert run(capsys, *words(source, out, name="a100-llama2-7b-vidur"))[0] == 0
    assert out.read_bytes() == (SHIPPED / out.name).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: words(folder, folder / "x.json"), "--out: {folder}/x.json, must end in .npz for a TableTime"),
        (lambda folder: words(folder, folder), "--out: {folder} is also --source, must be another file"),
        (lambda folder: words(folder / "absent", folder / "x.npz"), "SOURCE: {folder}/absent does not exist"),
        (lambda folder: words(folder, folder / "x.npz", model="llama-9"), "--model: 'llama-9', must be one of llama-2-7b"),
        (lambda folder: words(folder, folder / "x.npz", name=" "), "--name: empty"),
        (lambda folder: words(folder.parent, folder / "x.npz"), "holds 0 files *_tables.npz, must hold one"),
    ],
)
def test_refusals_before_any_work(
    profile: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], list[str]], message: str
) -> None:
    before = sorted(profile.iterdir())
    code, out, err = run(capsys, *change(profile))
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message.format(folder=profile) in err and err.count("\n") == 1
    assert sorted(profile.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "messages"),
    [
        (lambda folder: words(folder, folder / "x.npz", form="vidour"), ("--format", "'vidour'", "'vidur'")),
        (lambda folder: words(folder, folder / "x.npz")[:-2], ("Required options", "--out")),
        (lambda folder: words(folder, folder / "x.npz")[1:], ("import", "engine")),
    ],
)
def test_words_that_are_no_options_are_refused(
    profile: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], list[str]], messages: tuple[str, ...]
) -> None:
    before = sorted(profile.iterdir())
    code, out, err = run(capsys, *change(profile))
    assert code == 2 and out == "" and all(message in err for message in messages)
    assert sorted(profile.iterdir()) == before


@pytest.mark.parametrize("array", list(ARRAYS))
def test_a_missing_array_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], array: str) -> None:
    np.savez(tmp_path / "x.npz", **raw_tables(**{array: None}))
    code, _, err = run(capsys, *words(tmp_path / "x.npz", tmp_path / "out.npz"))
    assert code == 2 and f"lacks the array '{array}'" in err
    assert not (tmp_path / "out.npz").exists()


def test_a_file_of_another_format_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    np.save(tmp_path / "x.npy", np.ones(3))
    np.savez(tmp_path / "shape.npz", **raw_tables(linear_s=np.ones(3)))
    for name, message in (
        ("x.csv", "is not an NPZ file"),
        ("x.npy", "is one array, must be an NPZ file"),
        ("shape.npz", "time_model.linear: shape (3,), must be (8,)"),
    ):
        code, _, err = run(capsys, *words(tmp_path / name, tmp_path / "out.npz"))
        assert code == 2 and message in err


def test_a_missing_column_of_iteration_times_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x_iterations.csv"
    path.write_text("n_decode,iteration_s\n1,0.1\n")
    with pytest.raises(ConfigError, match="column 'decode_kv_total' is missing"):
        read_iterations(path)
    with pytest.raises(ConfigError, match=r"absent\.csv"):
        read_iterations(tmp_path / "absent.csv")


# --- --calibration in replay and compare ------------------------------------------------------


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,100,20\n0.5,200,30\n")
    return path


def replay_engine(trace: Path, calibration: str, *assignments: str) -> EngineConfig:
    given = replay.ReplayTrace(trace=trace, policy="vllm", out=trace.with_name("out.csv"), calibration=calibration, set=(assignments,))
    return replay.plan(given).policy.engine


def test_replay_takes_time_model_and_kv_capacity_from_a_calibration(trace: Path, profile: Path, tmp_path: Path, capsys: Any) -> None:
    engine = replay_engine(trace, "a100-llama2-7b-vidur")
    assert engine.time_model is load_calibration("a100-llama2-7b-vidur")
    assert engine.num_blocks == 7424
    assert replay_engine(trace, "a100-llama2-7b-vidur", "engine.num_blocks=2816").num_blocks == 2816
    assert replay_engine(trace, "a100-llama2-7b-c10").num_blocks == EngineConfig.vllm().num_blocks
    assert run(capsys, *words(profile, tmp_path / "t.npz"))[0] == 0
    assert replay_engine(trace, str(tmp_path / "t.npz")).time_model.provenance.name == "tiny"


def test_the_calibration_reaches_the_run(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = []
    for name in ("a100-llama2-7b-vidur", "a100-llama2-7b-c10"):
        arguments = ["--trace", str(trace), "--policy", "vllm", "--out", str(trace.with_name(f"{name}.csv")), "--calibration", name]
        assert replay.main(arguments) == 0
        seconds.append(trace.with_name(f"{name}.csv").read_text())
    assert seconds[0] != seconds[1]
    assert "out of range" not in capsys.readouterr().out


def test_compare_takes_a_calibration(tmp_path: Path) -> None:
    given = compare.Compare(scenario="azure-conv", policies=("vllm", "sarathi"), out=tmp_path / "o", calibration="a100-llama2-7b-vidur")
    comparison = compare.plan(given)
    assert comparison.engine.time_model is load_calibration("a100-llama2-7b-vidur")
    assert comparison.policy("sarathi", 4.0).engine.num_blocks == 7424


def test_what_the_user_sets_wins_over_the_calibration_but_not_a_second_time_model() -> None:
    mine = Overrides({"num_blocks": 100}, {"vllm": {}})
    assert with_calibration(mine, None) is mine
    merged = with_calibration(mine, "a100-llama2-7b-vidur")
    assert merged.engine == {"time_model": "a100-llama2-7b-vidur", "num_blocks": 100, "block_size": 16}
    assert merged.policy == mine.policy
    for name in ("time_model", "d0", "d1"):
        with pytest.raises(ConfigError, match=rf"engine\.{name}: the time model is --calibration"):
            with_calibration(Overrides({name: "x"}, {}), "a100-llama2-7b-vidur")
    with pytest.raises(ConfigError, match=r"--calibration: .*did you mean 'a100-llama2-7b-vidur'"):
        with_calibration(mine, "a100-llama2-7b-vidr")


def test_a_setting_built_from_a_calibration_serves_a_policy() -> None:
    setting = Setting(LengthStatistics.of(100, 50, 1.0), 1.0, EngineConfig.vllm(), overrides={"time_model": "a100-llama2-7b-vidur"})
    assert setting.engine_for().time_model is load_calibration("a100-llama2-7b-vidur")
