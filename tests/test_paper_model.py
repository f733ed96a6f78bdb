"""The page of the paper's linear model: what an interruption keeps, what is refused, and its claims."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from llmsched_env.cli import paper_table
from llmsched_env.pages.paper_model.page import by_line, claims, page
from llmsched_env.pages.paper_model.runs import Line, Run, lines, run_line
from llmsched_env.row_file import read_rows

LINES = lines()


def made_up(line: Line, seed: int) -> Run:
    """A run whose figures tell line and seed."""
    figure = [known.key for known in LINES].index(line.key) + seed / 10
    return Run(line.d0, line.label, line.capacity, seed, figure, figure, figure, 0, line.capacity, False)


def test_an_interruption_keeps_the_finished_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Line, int]] = []

    def run(line: Line, seed: int) -> Run:
        asked.append((line, seed))
        if len(asked) == 10:
            raise KeyboardInterrupt
        return made_up(line, seed)

    monkeypatch.setattr(paper_table, "run_line", run)
    out, results = tmp_path / "page.md", tmp_path / "results"
    words = ["--seeds", "2", "--jobs", "1", "--quiet", "--out", str(out), "--results", str(results)]
    assert paper_table.main(words) == 130
    assert "--resume" in capsys.readouterr().err and not out.exists()
    kept = read_rows(results / "runs.csv", Run)
    assert len(kept) == 9
    assert paper_table.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: --results: {results} holds finished runs already")
    assert paper_table.main([*words, "--resume"]) == 0
    assert len(asked) == 10 + 2 * len(LINES) - 9, "what was finished is not run again"
    everything = [made_up(line, seed) for line in LINES for seed in range(2)]
    assert out.read_text(encoding="utf-8") == "\n".join(page(by_line(everything), 2))
    # more seeds are added to those that are there; fewer are a part of them
    assert paper_table.main([*words, "--seeds", "3", "--resume"]) == 0
    assert len(asked) == 10 + 3 * len(LINES) - 9
    assert paper_table.main([*words, "--resume"]) == 0
    assert out.read_text(encoding="utf-8") == "\n".join(page(by_line(everything), 2))
    assert paper_table.main([*words, "--overwrite"]) == 0
    assert len(asked) == 10 + 5 * len(LINES) - 9


def test_runs_of_other_experiments_are_not_mixed_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paper_table, "run_line", made_up)
    words = ["--seeds", "2", "--jobs", "1", "--quiet", "--out", str(tmp_path / "page.md"), "--results", str(tmp_path)]
    assert paper_table.main(words) == 0
    changed = [replace(LINES[0], thresholds=(3, 1)), *LINES[1:]]
    monkeypatch.setattr(paper_table, "lines", lambda: changed)
    assert paper_table.main([*words, "--resume"]) == 2
    assert "--resume: WAIT (2,1), d0 = 0.1, C = 750 is" in capsys.readouterr().err
    assert paper_table.main(["--seeds", "1"]) == 2
    assert "--seeds: 1, must be >= 2" in capsys.readouterr().err


def test_a_run_of_each_policy_and_its_record(tmp_path: Path) -> None:
    for line in (LINES[0], LINES[1], LINES[4]):
        short = replace(line, horizon=400.0)
        found = run_line(short, 0)
        assert found == run_line(short, 0) and found.line == line.key
        assert found.throughput > 20 and found.latency > found.ttft > 0 and found.kv_peak <= line.capacity
    assert json.loads(json.dumps(LINES[0].describe()))["thresholds"] == [2, 1]


def test_claims_hold_and_fail_as_their_figures_say() -> None:
    runs = [made_up(line, seed) for line in LINES for seed in range(2)]
    assert [claim.holds for claim in claims(by_line(runs))] == [True, False, True, False]
    collapsing = [replace(run, evictions=5000, latency=1000.0) if "M^pi" in run.label or run.label == "FCFS" else run for run in runs]
    assert [claim.holds for claim in claims(by_line(collapsing))] == [True, True, True, True]
