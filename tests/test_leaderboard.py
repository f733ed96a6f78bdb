"""The leaderboard: what a submission may say, and its figures on a tiny part of the suite."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmsched_agents.statistics import Estimate
from llmsched_env.bench import leaderboard as bench
from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.evaluation import run_cell
from llmsched_env.bench.leaderboard import FAILED_RUN, Entry, Score, claims_text, page, plan_of, score
from llmsched_env.bench.submissions import read_submission
from llmsched_env.bench.suite import Bench, cells
from llmsched_env.cli import leaderboard
from llmsched_env.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "leaderboard" / "submissions"
CELLS = ("stationary/azure-conv/40GB/1", "stationary/azure-conv/40GB/1.1")
GOOD = 'name = "mine"\nauthors = ["A", "B"]\npolicy = "reserve"\nknown_lengths = false\n'


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two seeds of runs that are short and yet queue up."""
    monkeypatch.setitem(bench.SEEDS, "quick", 2)
    monkeypatch.setitem(bench.REQUESTS, "quick", 60)


def written(tmp_path: Path, text: str, name: str = "mine.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_the_submissions_that_are_here_can_be_read_and_run(path: Path) -> None:
    submission = read_submission(path)
    plan_of(submission, Bench(Boundaries.read(), 60), cells(("stationary",), ("azure-conv",), ("40GB",), (1.0,)))


def test_a_submission_is_read_whole(tmp_path: Path) -> None:
    text = GOOD + "[options]\ntheta = 0.9\n[engine]\nmax_num_seqs = 64\n[claimed.quick]\nspeedup = 1\nslo_goodput = 0.5\n"
    found = read_submission(written(tmp_path, text))
    assert (found.name, found.authors, found.known_lengths) == ("mine", ("A", "B"), False)
    assert found.claimed == {"quick": {"speedup": 1.0, "slo_goodput": 0.5}}
    (cell,) = cells(("stationary",), ("azure-conv",), ("40GB",), (1.0,))
    policy: Any = found.variant.build(Bench(Boundaries.read(), 60), cell)
    assert policy.engine.max_num_seqs == 64 and found.variant.label == "mine"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD.replace('name = "mine"\n', ""), "name: is missing"),
        (GOOD + "parameters = 3\n", "parameters: no field of a submission"),
        (GOOD.replace('["A", "B"]', '"A"'), "authors: 'A', must be a list"),
        (GOOD.replace('["A", "B"]', "[]"), "authors: "),
        (GOOD.replace("reserve", "reserv"), "policy: 'reserv' is unknown; did you mean 'reserve'"),
        (GOOD.replace('"reserve"', "3"), "policy: 3"),
        (GOOD.replace("false", '"no"'), "known_lengths: 'no'"),
        (GOOD + "[engine]\nnum_blocks = 9999\n", "engine.num_blocks: belongs to the suite"),
        (GOOD + "[engine]\nmax_num_seqs = 0\n", "engine.max_num_seqs: 0"),
        (GOOD + "[claimed.fast]\nspeedup = 2\n", "claimed.fast: no level"),
        (GOOD + "[claimed.quick]\nspeed = 2\n", "claimed.quick.speed: no figure"),
        (GOOD + '[claimed.quick]\nspeedup = "2"\n', "claimed.quick.speedup: '2', must be a number"),
        (GOOD.replace('"mine"', '"a|b"'), "name: 'a|b'"),
        ("name = \n", "is no TOML"),
    ],
)
def test_a_bad_file_is_refused_by_the_name_of_the_field(text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as refusal:
        read_submission(path)
    assert named in str(refusal.value) and path.name in str(refusal.value)
    assert leaderboard.main(["--submissions", str(path), "--cells", CELLS[0]]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD.replace("reserve", "oracle-sjf"), "known_lengths: false, but 'oracle-sjf' is told output lengths"),
        (GOOD + "[options]\nthetta = 1\n", "thetta"),
        (GOOD + "[options]\ntheta = -1\n", "theta"),
    ],
)
def test_what_cannot_run_is_refused_before_any_run(text: str, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert leaderboard.main(["--submissions", str(written(tmp_path, text)), "--cells", CELLS[0]]) == 2
    assert named in capsys.readouterr().err


def test_options_of_the_command_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path, GOOD))
    again = str(written(tmp_path, GOOD, "again.toml"))
    for words, named in (
        (["--submissions", path, "--cells", "stationary/azure"], "--cells: 'stationary/azure' is no cell"),
        (["--submissions", path, "--first-seed", "-1"], "--first-seed"),
        (["--submissions", path, "--jobs", "0"], "--jobs"),
        (["--submissions", path, "--cells", CELLS[0], "--out", str(tmp_path / "t.md")], "--out"),
        (["--submissions", str(tmp_path / "none.toml")], "none.toml"),
        (["--submissions", path, again], "is another submission's"),
    ):
        assert leaderboard.main(words) == 2
        assert named in capsys.readouterr().err


def test_claims_are_held_against_what_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, GOOD)
    words = ["--submissions", str(path), "--cells", *CELLS, "--jobs", "1", "--quiet", "--json", str(tmp_path / "found.json")]
    assert leaderboard.main(words) == 0
    (found,) = json.loads((tmp_path / "found.json").read_text())["found"]
    measured = found["score"]
    assert measured["cells"] == 2 and measured["seeds"] == 2 and measured["failed"] == 0 and measured["worst"] in CELLS
    assert 0.2 < measured["worst_cell"] <= measured["speedup"]["value"] * 1.5
    assert "claims: none at this level" in capsys.readouterr().out
    for share, code, word in ((1.0, 0, "holds"), (0.5, 0, "holds"), (1.1, 1, "does not hold")):
        claim = f"[claimed.quick]\nspeedup = {share * measured['speedup']['value']}\nslo_goodput = {measured['slo_goodput']}\n"
        written(tmp_path, GOOD + claim)
        assert leaderboard.main(words) == code
        assert f": {word}" in capsys.readouterr().out


def test_greedy_itself_has_a_speedup_of_one() -> None:
    chosen = cells(("stationary",), ("azure-conv",), ("40GB",), (1.0,))
    own = Bench(Boundaries.read(), 60)
    submission = read_submission(FOLDER / "reserve.toml")
    plan = plan_of(submission, own, chosen)
    greedy = plan[chosen[0]][0]
    rows = [row for seed in range(2) for row in run_cell(own, chosen[0], seed, [greedy])]
    twin = type(plan[chosen[0]][1])("reserve", "agent", agent=submission.policy)
    rows += [dataclasses.replace(row, variant=twin.label, options="", digest="") for row in rows]
    found = score({chosen[0]: [greedy, twin]}, rows)
    assert found.speedup.value == pytest.approx(1.0) and found.worst_cell == 1.0 and found.failed == 0
    lost = [
        dataclasses.replace(row, figures=dataclasses.replace(row.figures, completed=row.figures.completed - 1))
        if row.variant == "reserve" and row.seed == 0
        else row
        for row in rows
    ]
    worse = score({chosen[0]: [greedy, twin]}, lost)
    assert worse.failed == 1 and worse.speedup.value == pytest.approx(np.sqrt(FAILED_RUN))


def test_the_table_is_sorted_and_says_what_does_not_hold(tmp_path: Path) -> None:
    def entry(name: str, speedup: float, claim: float | None) -> Entry:
        text = GOOD.replace("mine", name) + (f"[claimed.quick]\nspeedup = {claim}\n" if claim else "")
        one = Estimate(speedup, speedup - 0.1, speedup + 0.1, 2)
        return Entry(read_submission(written(tmp_path, text)), "quick", Score(one, one, 0.9, "a/b", 0.5, 72, 2, 3))

    slow, fast = entry("slow", 1.0, 2.0), entry("fast", 1.5, 1.5)
    assert not slow.holds and fast.holds and claims_text(fast) == "hold"
    lines = page([slow, fast], "quick", 5, "llmsched leaderboard x")
    text = "\n".join(lines)
    assert text.index("| 1 | fast |") < text.index("| 2 | slow |")
    assert "do not hold: speedup 2 claimed" in text and "seeds 5 to 6" in text and "fast: 3; slow: 3" in text
