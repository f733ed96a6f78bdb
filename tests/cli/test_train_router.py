"""``llmsched train-router`` from its options to a router that loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("cmaes", reason="cmaes is not installed (extra: agents)")
pytest.importorskip("safetensors", reason="safetensors is not installed (extra: agents)")

from llmsched_agents.router_agent import load_router, read_router_record
from llmsched_env.cli.train_router import main

SMALL = (
    *("--scenarios", "equal", "--seconds", "8", "--replicas", "2", "--first-generations", "1", "--generations", "1"),
    *("--population", "4", "--hidden", "2", "--validation", "1", "--quiet"),
)


def test_it_trains_refuses_to_overwrite_and_starts_from_another_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "router", tmp_path / "report.json"
    assert main([*SMALL, "--out", str(out), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["found"]["trials"][0][0] == 0
    trained = load_router(out)
    assert main([*SMALL, "--out", str(out)]) == 2
    assert "holds a training already; use --resume, --overwrite" in capsys.readouterr().err
    assert main([*SMALL, "--out", str(out), "--resume"]) == 0  # nothing is left to do
    assert load_router(out).vector().tobytes() == trained.vector().tobytes()
    assert main([*SMALL, "--out", str(tmp_path / "next"), "--start", str(out)]) == 0
    assert read_router_record(tmp_path / "next")["started_from"] == read_router_record(out)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--scenarios", "eqal"), "did you mean 'equal'"),
        (("--population", "3"), "training.population: 3"),
        (("--start", "no-such-folder"), "checkpoint: no-such-folder is not one"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str) -> None:
    assert main([*SMALL, "--out", str(tmp_path / "router"), *words]) == 2
    assert says in capsys.readouterr().err and not (tmp_path / "router").exists()
