"""``llmsched predictions``: which runs there are, the page of them, and the command itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.predictions import FRAME, HIDDEN, LEARNED, MODELS, RAW, Run, change, chosen_cells, run_seed, trusts_of
from llmsched_env.bench.suite import Bench
from llmsched_env.cli.predictions import main
from llmsched_env.pages.predictions.page import page

CELLS = [cell.key for cell in chosen_cells()]
GAINS = {"perfect": 0.8, FRAME: 0.9, "sigma 1.0": 0.98}


def runs(loss: float = 0.98) -> list[Run]:
    """Seeds on which everybody gains the same share, and the first cell more than its bar."""
    found = []
    for i, cell in enumerate(CELLS):
        for seed in range(3):
            for model in MODELS:
                for trust in trusts_of(cell, model):
                    share = 1.0 if trust == HIDDEN else GAINS.get(model, 0.95)
                    share = loss if (model, trust) == ("sigma 1.0", LEARNED) else share
                    share = 0.97 if i > 0 and model == FRAME and trust == LEARNED else share
                    found.append(Run(cell, model, trust, seed, (10.0 + seed) * share, 0))
    return found


def test_cells_are_those_that_memory_binds() -> None:
    assert len(CELLS) == 16 and CELLS[0].startswith("bursts") and not any("code" in cell for cell in CELLS)
    assert trusts_of("stationary/x", "sigma 0.3") == () and trusts_of("bursts/x", "sigma 0.3") == (RAW, LEARNED)


def test_changes_are_paired_over_the_seeds() -> None:
    found = change(runs(), CELLS[0], "perfect", RAW)
    assert found.mean == pytest.approx(-0.2) and found.n == 3


@pytest.mark.parametrize(("loss", "word"), [(0.98, "met"), (1.005, "met"), (1.02, "missed")])
def test_the_page_says_which_bars_are_met(loss: float, word: str) -> None:
    text = "\n".join(page(runs(loss), "llmsched predictions"))
    assert f"met in 1 of 16 cells (`{CELLS[0]}`)" in text
    assert "where perfect predictions gain 20.0 to 20.0 %" in text
    assert f"1 % above hidden: {word}" in text
    assert text.count("\n| `bursts/") == 8 and "-20.0 ± " in text


def test_a_seed_is_the_same_every_time() -> None:
    cell = chosen_cells()[1]
    bench = Bench(Boundaries.read(), 60)
    one, other = run_seed(bench, cell, 3), run_seed(bench, cell, 3)
    assert one == other and {(run.model, run.trust) for run in one} == {(m, t) for m in MODELS for t in trusts_of(cell.key, m)}
    assert all(run.latency_mean > 0 for run in one)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--out", str(tmp_path / "p.md")]) == 2
    assert "--seeds: 1, must be at least 2" in capsys.readouterr().err
    (tmp_path / "there.md").write_text("x")
    assert main(["--out", str(tmp_path / "there.md")]) == 2


@pytest.mark.slow
def test_the_command_writes_its_page_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "p.md"
    arguments = ["--num-requests", "40", "--jobs", "1", "--quiet", "--out", str(out)]
    assert main(["--seeds", "2", *arguments]) == 0
    assert "2 seeds of evaluation" in out.read_text()
    assert main(["--seeds", "3", "--resume", *arguments]) == 0
    assert "3 seeds of evaluation" in out.read_text()
