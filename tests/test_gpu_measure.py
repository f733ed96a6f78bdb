"""Steps of a measurement: each within its share of the time, failures recorded, an archive whole at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmsched_env.cli import gpu_measure, measure_steps
from llmsched_env.cli.measure_report import report
from llmsched_env.cli.measure_steps import Measurement, SkipStep, Step
from llmsched_env.errors import ConfigError
from llmsched_hardware import versions

MACHINE = {"date": "2026-01-01", "system": "any", "gpus": [], "versions": {"numpy": "2"}}


def nothing(summary: Mapping[str, Any]) -> list[str]:
    return ["# Report"]


@pytest.fixture
def measurement(tmp_path: Path) -> Measurement:
    return Measurement(tmp_path / "work", tmp_path / "out.tar.gz", 3600.0, nothing, lambda _: None)


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words of a step are a program of Python and what it is given; it prints, finds and exits as it likes."""
    real = measure_steps.run_command

    def run(words: Sequence[str], log: Path, seconds: float) -> int | None:
        return real([sys.executable, "-c", textwrap.dedent(words[3]), *words[4:]], log, seconds)

    monkeypatch.setattr(measure_steps, "run_command", run)


def step(name: str, program: str, **changes: Any) -> Step:
    given: dict[str, Any] = {"weight": 1.0, "least": 1.0, "needs": ()} | changes
    return Step(name, command=lambda seconds: [program], **given)


def members(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        return {m.name: (archive.extractfile(m) or SimpleNamespace(read=bytes)).read().decode() for m in archive.getmembers()}


FIND = """
    import json, sys
    path = sys.argv[sys.argv.index("--json") + 1]
    json.dump({"found": {"points": 7}}, open(path, "w"))
    print("done")
"""
FAIL = """
    import sys
    print("error: the engine died", file=sys.stderr)
    print("and more")
    sys.exit(1)
"""


@pytest.mark.usefixtures("python")
def test_a_step_that_fails_is_recorded_and_the_rest_goes_on(measurement: Measurement) -> None:
    def skip(seconds: float) -> list[object]:
        raise SkipStep("no such thing here")

    def refuse(seconds: float) -> list[object]:
        raise ConfigError("--loads: 0")

    measurement.run(
        [
            step("a", FIND),
            step("b", FAIL),
            step("c", FIND, needs=("a", "b")),
            step("d", FIND, needs=("a",)),
            Step("e", 1.0, 1.0, skip),
            Step("f", 1.0, 1.0, refuse),
            step("g", FIND, least=1e6),
        ]
    )
    records = {r.name: r for r in measurement.records}
    assert [r.status for r in records.values()] == ["done", "failed", "skipped", "done", "skipped", "failed", "skipped"]
    assert (records["b"].code, records["b"].reason) == (1, "the engine died")
    assert (records["c"].reason, records["e"].reason, records["f"].reason) == ("needs b", "no such thing here", "--loads: 0")
    assert "s left, needs 1000000" in records["g"].reason
    found = members(measurement.out)
    assert json.loads(found["out/summary.json"])["found"] == dict.fromkeys("abcdefg") | {key: {"points": 7} for key in "ad"}
    assert found["out/report.md"] == "# Report\n" and found["out/logs/a.txt"] == "done\n" and "error: the engine" in found["out/logs/b.txt"]
    assert not list(measurement.out.parent.glob(".*part"))


@pytest.mark.usefixtures("python")
def test_time_is_shared_by_weight_and_a_step_never_gets_more_than_is_left(tmp_path: Path) -> None:
    given: list[float] = []

    def command(seconds: float) -> list[object]:
        given.append(seconds)
        return ["pass"]

    measurement = Measurement(tmp_path / "work", tmp_path / "out.tar.gz", 1000.0, nothing, lambda _: None)
    measurement._begin = time.monotonic() - 400.0  # 600 are left, 12 of them for the end
    measurement.run([Step("a", 3.0, 1.0, command), Step("b", 1.0, 500.0, command), Step("c", 1.0, 1.0, command)])
    assert given[0] == pytest.approx(588 * 3 / 5, rel=0.05) and given[1] == pytest.approx(500, rel=0.05)
    assert given[2] == pytest.approx(588, rel=0.1)  # the others did not use theirs


@pytest.mark.usefixtures("python")
def test_a_step_out_of_time_is_stopped_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure_steps, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(measure_steps, "STOP_SECONDS", 1.0)
    children = tmp_path / "children"
    stubborn = f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(children)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(600)
    """
    measurement = Measurement(tmp_path / "work", tmp_path / "out.tar.gz", 8.0, nothing, lambda _: None)
    measurement.run([step("a", stubborn)])
    assert measurement.records[0].status == "out of time" and measurement.records[0].code is None
    for number in children.read_text().split():
        assert not _runs(int(number))
    assert "out/summary.json" in members(measurement.out)


def _runs(number: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_an_archive_and_no_process(tmp_path: Path, sent: signal.Signals) -> None:
    program = f"""
        import signal, sys
        from pathlib import Path
        from llmsched_env.cli import measure_steps
        from llmsched_env.cli.measure_steps import Measurement, Step
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it, and their children, too
        real = measure_steps.run_command
        measure_steps.run_command = lambda words, log, seconds: real([sys.executable, "-c", words[3]], log, seconds)
        work = Path({str(tmp_path)!r})
        measurement = Measurement(work / "work", work / "out.tar.gz", 600.0, lambda summary: ["# R"], lambda _: None)
        wait = f"import os, time; open({{str(work / 'number')!r}}, 'w').write(str(os.getpid())); time.sleep(600)"
        measurement.run([Step(name, 1.0, 1.0, lambda s, name=name: [wait if name == "b" else "pass"]) for name in "abc"])
    """
    number = tmp_path / "number"
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stderr=subprocess.DEVNULL) as process:
        try:
            while not (number.exists() and number.read_text()):
                assert process.poll() is None
                time.sleep(0.02)
            os.kill(process.pid, sent)
            assert process.wait(60) != 0
        finally:
            process.kill()
    assert not _runs(int(number.read_text()))
    summary = json.loads(members(tmp_path / "out.tar.gz")["out/summary.json"])
    assert [s["status"] for s in summary["steps"]] == ["done", "interrupted", "skipped"]


# --- the command ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--out", "x.zip"], "--out: x.zip, must end in .tar.gz"),
        (["--budget-seconds", "5"], "--budget-seconds: 5"),
        (["--loads", "0"], "--loads: 0"),
        (["--held-out-loads", "nan"], "--held-out-loads: nan"),
        (["--set", "engine.max_num_seq=3"], "did you mean"),
        (["--scenario", "azure-con"], "did you mean"),
        (["--policies", "nested-wai"], "did you mean"),
    ],
)
def test_what_no_step_could_do_is_refused(
    words: list[str], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["--model", "tiny", *([] if "--out" in words else ["--out", "m.tar.gz"]), *words]
    assert gpu_measure.main(given) == 2
    assert why in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_an_archive_that_is_there_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.tar.gz").write_text("mine")
    assert gpu_measure.main(["--model", "tiny", "--out", str(tmp_path / "m.tar.gz")]) == 2
    assert "is there already" in capsys.readouterr().err and (tmp_path / "m.tar.gz").read_text() == "mine"


def test_a_machine_without_vllm_still_leaves_a_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step fails, and says why."""
    monkeypatch.setattr(gpu_measure, "check_version", lambda: "0.32.0")
    if versions.DISTRIBUTIONS and _installed():
        pytest.skip("vLLM is installed here")
    out = tmp_path / "m.tar.gz"
    assert gpu_measure.main(["--model", "tiny", "--out", str(out), "--budget-seconds", "60", "--quiet"]) == 1
    found = members(out)
    summary = json.loads(found["m/summary.json"])
    assert [s["status"] for s in summary["steps"]][:6] == ["failed"] + ["skipped"] * 5
    assert "vllm is not installed" in summary["steps"][0]["reason"] and summary["machine"]["gpus"] == []
    assert "| sweep | failed |" in found["m/report.md"] and "vllm is not installed" in capsys.readouterr().out


def _installed() -> bool:
    try:
        versions.installed()
    except ImportError:
        return False
    return True


def test_the_report_shows_what_was_found() -> None:
    gap = {"policy": "vllm", "rate": 3.0, "metric": "ttft_mean", "sim": 1.0, "real": 2.0, "error": -0.5}
    error = {"mape": 0.1, "median": 0.05, "p90": 0.2, "bias": -0.01, "count": 1000}
    engine = {"model": "m", "dtype": "float32", "device": "cpu", "vllm": "0.32.0", "num_blocks": 512, "block_size": 16}
    summary = {
        "model": "tiny", "command": "llmsched gpu-measure", "machine": MACHINE, "seconds": 10.0, "budget_seconds": 60.0,
        "steps": [{"name": "sweep", "status": "done", "seconds": 5.0, "budget": 6.0, "reason": ""}],
        "found": {
            "sweep": {"points": 12, "build_seconds": 3.0, "machine": engine},
            "fit": {"held_out": error, "drift": 0.02, "not_covered": ["large batches"]},
            "held-out": {"gaps": [gap, gap | {"metric": "evictions", "error": 2.0}, gap | {"metric": "ttft_p50"}], "left_out": 1},
            "traffic": {"gaps": [], "left_out": 3},
            "schedules": [{"identical": True}, {"identical": False}],
        },
    }  # fmt: skip
    text = "\n".join(report(summary))
    for line in (
        "| each run, by a fit to the others | 10.0 | 5.0 | 20.0 | -1.0 | 1,000 |",
        "| vllm | 3 | TTFT | 1 | 2 | -50.0 % |",
        "| vllm | 3 | evictions | 1 | 2 | +2 |",
        "- Not covered: large batches",
        "12 batches of tiny (float32) on cpu",
        "1 of 2 episodes are identical",
        "No run was counted.",
        "- GPU: none",
    ):
        assert line in text, line
    assert "ttft_p50" not in text
    bare = report(summary | {"found": dict.fromkeys(["sweep", "fit"]), "steps": []})
    assert "## Sweep" not in bare
