"""gpu_measure.py on vLLM's CPU build, in a small form. How much fits into the time is the machine's to say; no test asserts it."""

from __future__ import annotations

import importlib.util
import json
import tarfile
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed here (make test-vllm)", allow_module_level=True)

from llmsched_env.cli import gpu_measure
from llmsched_env.perf import load_calibration
from llmsched_hardware.calibration.iteration_log import read_iteration_log

ENGINE = ("engine.max_model_len=256", "engine.max_num_seqs=16", "engine.max_num_batched_tokens=256", "engine.num_blocks=64")
STEPS = ["sweep", "traffic", "fit", "held-out", "check", "schedules", "kernels"]
LEFT = {
    "sweep": ["sweep/sweep.json", "sweep/sweep.npz", "sweep/sweep.points.jsonl"],
    "traffic": ["traffic.csv.gz", "traffic/runs.csv", "traffic/report.md", "traffic/sim_to_real.csv"],
    "fit": ["fit/traffic.json"],
    "held-out": ["held-out.csv.gz", "held-out/report.md"],
    "check": ["fit/checked.json"],
    "schedules": ["schedules/schedules.csv"],
    "kernels": ["kernels/config.json", "kernels/profile/meta.json"],
}


@pytest.mark.slow
def test_one_archive_holds_what_every_step_has_left(tmp_path: Path) -> None:
    out = tmp_path / "small.tar.gz"
    given = ["--model", "tiny", "--set", *ENGINE, "--out", str(out), "--budget-seconds", "300", "--quiet", "--scenario", "lmsys"]
    code = gpu_measure.main([*given, "--policies", "vllm", "nested-wait", "--loads", "0.8", "--held-out-loads", "0.6"])
    with tarfile.open(out) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "small"
    summary = json.loads((folder / "summary.json").read_text())
    status = {step["name"]: step["status"] for step in summary["steps"]}
    assert list(status) == STEPS and set(status.values()) <= {"done", "out of time", "skipped"}, summary["steps"]
    assert code == ("out of time" in status.values())
    done = [name for name in STEPS if status[name] == "done"]
    assert done[:3] == STEPS[:3]
    report = (folder / "report.md").read_text()
    for name in done:
        assert summary["found"][name] is not None and (folder / "logs" / f"{name}.txt").exists() and f"| {name} | done |" in report
        for file in LEFT[name]:
            assert (folder / file).is_file(), file
    assert load_calibration(str(folder / "fit" / "traffic.json")).provenance.name == "traffic"
    log = read_iteration_log(folder / "traffic.csv.gz")
    assert len(log) > 50 and {about["policy"] for about in log.segments.values()} == {"vllm", "nested-wait"}
    assert "vllm" in str(summary["machine"]["versions"]) and (folder / "machine" / "packages.txt").stat().st_size > 0
