"""validate.py on vLLM's CPU build: the same schedule under the virtual clock, reported figures under the measured one."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:  # importing it would read its settings before the backend has made them
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_env.cli import hardware_page, validate
from llmsched_env.perf import FormulaTime, Provenance, save_calibration
from llmsched_env.row_file import read_rows
from llmsched_hardware.calibration.iteration_log import read_iteration_log
from llmsched_hardware.validation import METRICS, Run, Schedules
from llmsched_hardware.versions import cpu_block_size

POLICIES = ("vllm", "sarathi", "wait", "nested-wait")
# About as fast as a CPU runs the tiny model; only the virtual clock depends on it.
SOURCE = Provenance(name="made-up", gpu="none", num_blocks=512 // cpu_block_size(), block_size=cpu_block_size())
MODEL = FormulaTime(2e-3, 5e-6, 2e-3, 5e-6, 3e-7, 0.0, 5e-9, 2e-5, provenance=SOURCE)
ENGINE = ("engine.max_model_len=256", "engine.max_num_seqs=24", "engine.max_num_batched_tokens=256")
SARATHI = ("policy.sarathi.budget=64", "policy.sarathi.max_num_seqs=16")


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    save_calibration(MODEL, tmp_path / "made-up.json")
    return tmp_path / "made-up.json"


def words(calibration: Path, out: Path, *more: object, policies: tuple[str, ...] = POLICIES) -> list[str]:
    chosen = SARATHI if "sarathi" in policies else ()
    given = ["--calibration", calibration, "--model", "tiny", "--scenario", "lmsys", "--policies", *policies, "--out", out, "--quiet"]
    return [str(word) for word in (*given, "--set", *ENGINE, *chosen, *more)]


def test_under_the_virtual_clock_every_step_is_the_simulator_s(
    calibration: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "virtual"
    lengths = ("--length-scale", 0.2, "--max-total-tokens", 256)
    given = words(calibration, out, "--clock", "virtual", *lengths, "--num-requests", 60, "--loads", 2)
    assert validate.main(given) == 0
    assert "8 of 8 schedules identical" in capfd.readouterr().out
    rows = read_rows(out / "schedules.csv", Schedules)
    assert {(r.policy, r.backend) for r in rows} == {(p, b) for p in POLICIES for b in ("vllm", "vllm-scheduler")}
    assert all(r.identical and r.steps > 60 for r in rows)
    assert sum(r.evictions for r in rows if r.backend == "vllm") > 40  # or nothing much was compared
    assert "8 of 8 episodes are identical" in (out / "report.md").read_text()
    page = tmp_path / "llmsched_hardware.md"
    assert hardware_page.main(["--validations", str(out), "--out", str(page)]) == 0
    assert "**8 of 8 episodes identical**" in page.read_text() and "**This part is open.**" in page.read_text()


def test_a_quick_validation_reports_errors_spread_and_ranking_and_can_be_resumed(
    calibration: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "measured"
    given = words(calibration, out, "--quick", "--num-requests", 12, "--loads", 0.9, policies=("vllm", "nested-wait"))
    given += ["--log-iterations", str(out / "iterations.csv")]
    assert validate.main(given) == 0
    printed = capfd.readouterr().out
    assert "latency " in printed and "ranking " in printed
    runs = read_rows(out / "runs.csv", Run)
    assert len(runs) == 2 * (1 + 1 + 2)  # policies; simulator, warm-up, repeats
    assert all(r.figures.requests == r.figures.completed == 12 for r in runs)
    assert all(r.thinking_seconds > 0 for r in runs if r.backend == "vllm")
    assert len((out / "sim_to_real.csv").read_text().splitlines()) == 1 + 2 * len(METRICS)
    report = (out / "report.md").read_text()
    for text in ("lengths times", "## Ranking of the policies", "Kendall's tau", "measured on another device", "2 counted"):
        assert text in report, text

    log = read_iteration_log(out / "iterations.csv")
    wanted = [
        {"policy": r.policy, "rate": r.rate, "seed": r.seed, "repeat": r.repeat, "warm_up": r.warm_up} for r in runs if r.backend == "vllm"
    ]
    assert [{k: v for k, v in s.items() if k != "file"} for s in log.segments.values()] == wanted
    assert log.column("started").sum() >= 12 * len(wanted) and (log.seconds() > 0).all() and (log.column("execute_seconds") > 0).all()

    # A kill after five rows and in the middle of the sixth.
    lines = (out / "runs.csv").read_text().splitlines(keepends=True)
    (out / "runs.csv").write_text("".join(lines[:6]) + lines[6][:20])
    (out / "report.md").unlink()
    assert validate.main(given) == 2
    assert "holds a validation already; use --resume, --overwrite or another place" in capfd.readouterr().err
    assert validate.main([*given, "--resume"]) == 0
    again = read_rows(out / "runs.csv", Run)
    assert [r.task for r in again] == [r.task for r in runs] and list(map(repr, again[:5])) == list(map(repr, runs[:5]))

    # Everything is there: no engine is built, the report comes from the rows.
    capfd.readouterr()
    (out / "report.md").unlink()
    assert validate.main([*given, "--resume"]) == 0
    assert (out / "report.md").exists()

    # Other settings, another machine.
    assert validate.main([*given, "--resume", "--max-total-tokens", "64"]) == 2
    assert "--resume: length_scale is" in capfd.readouterr().err
    machine = json.loads((out / "machine.json").read_text())
    (out / "machine.json").write_text(json.dumps(machine | {"device": "another"}))
    (out / "runs.csv").write_text("".join(lines[:6]))
    assert validate.main([*given, "--resume"]) == 2
    assert "runs in" in (error := capfd.readouterr().err) and "'another'" in error
