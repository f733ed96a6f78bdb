"""The performance page: verdicts, what is written and what is refused. How fast the machine is is no test's business."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from llmsched_env.cli import benchmark
from llmsched_env.pages.performance import environments, kernel
from llmsched_env.pages.performance.figure import Figure, median_and_best, same_imports
from llmsched_env.pages.performance.page import PARTS, page

FAST = Figure("steps/s", "200", "CartPole: 100", 2.0, 1.4)
SLOW = Figure("seconds", "9.0 s", bar=6.0, rate=9.0, higher_is_better=False, reason="compiling")


def test_a_figure_is_held_against_its_bar_from_the_right_side() -> None:
    assert FAST.holds and not SLOW.holds
    assert Figure("x", "1", ratio=0.5, bar=1.0, rate=2.0).holds, "where there is a rate the bar is about it"
    assert Figure("x", "1", ratio=0.2, bar=0.2, higher_is_better=False).holds
    assert SLOW.describe()["holds"] is False and SLOW.describe()["reason"] == "compiling"


def test_the_page_says_what_was_missed_and_where_the_time_goes() -> None:
    text = "\n".join(page([FAST, SLOW], (100.0, 90.0)))
    assert "| steps/s | 200 | CartPole: 100 | 2.00 | ratio >= 1.4 | holds |" in text
    assert "| seconds | 9.0 s | - | - | <= 6 | **missed** |" in text
    assert "| seconds | 50% | compiling |" in text
    assert "Bars missed" in text and "Bars missed" not in "\n".join(page([FAST], (100.0, 90.0)))


def test_the_command_writes_page_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(benchmark, "version", lambda package: "1.0")  # nothing here trains
    monkeypatch.setattr(benchmark, "PARTS", {"one": lambda repeats: [FAST] * repeats, "two": lambda repeats: [SLOW]})
    monkeypatch.setattr(benchmark, "cartpole_speed", lambda repeats: 100.0)
    out, record = tmp_path / "deep" / "page.md", tmp_path / "figures.json"
    assert benchmark.main(["--repeats", "2", "--out", str(out), "--json", str(record)]) == 0
    text, err = capsys.readouterr()
    assert out.read_text(encoding="utf-8") in text and text.count("| steps/s |") == 2
    assert "one ..." in err and "two ..." in err
    found = json.loads(record.read_text(encoding="utf-8"))["found"]
    assert [figure["holds"] for figure in found["figures"]] == [True, True, False] and "numba" in found["machine"]


def test_what_would_fail_after_minutes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "PARTS", {"never": lambda repeats: pytest.fail("measured")})
    for words, option in ((["--repeats", "0"], "--repeats"), (["--out", str(tmp_path)], "--out"), (["--json", str(tmp_path)], "--json")):
        assert benchmark.main(words) == 2
        assert capsys.readouterr().err.startswith(f"error: {option}")

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(benchmark, "version", missing)
    assert benchmark.main([]) == 2
    assert "torch is not installed" in capsys.readouterr().err


def test_the_parts_measure_something() -> None:
    assert set(PARTS) >= {"scalar environment", "vector environment", "kernel", "a fleet", "training", "start"}
    rate, speed = kernel.kernel_rate(8, 1, constant=False)
    assert rate > 0 and speed > 0
    assert environments.second_thread(1) > 0
    assert median_and_best(iter([3.0, 1.0, 2.0]).__next__, 3) == (2.0, 3.0)


def test_a_process_of_its_own_finds_the_same_packages(tmp_path: Path) -> None:
    program = "import os, llmsched_env, llmsched_baselines; print(llmsched_env.__file__, os.environ['EXTRA'])"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=same_imports(EXTRA="7"), capture_output=True, text=True)
    import llmsched_env

    assert done.stdout.split() == [llmsched_env.__file__, "7"], done.stderr
