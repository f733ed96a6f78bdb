"""``llmsched tenants``: tables, file and page."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from llmsched_env.bench.tenants import TenantRow, interval, shown, tables
from llmsched_env.cli import main
from llmsched_env.cli.tenants import BEGIN, END
from llmsched_env.row_file import read_rows
from llmsched_env.tenant_metrics import TenantFigures

pytest.importorskip("scipy", reason="needs the extra cli")


def test_it_writes_tables_file_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "tenants.csv", tmp_path / "page.md"
    page.write_text(f"# Before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    words = ["tenants", "--policies", "fcfs", "vtc", "--seeds", "2", "--num-requests", "60", "--out", str(out), "--page", str(page)]
    assert main(words) == 0
    rows = read_rows(out, TenantRow)
    assert len(rows) == 2 * 2 * 4 and [row.figures.name for row in rows[:4]] == ["chat", "assistant", "premium", "batch"]
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\nafter\n") and "old" not in text and text.count(BEGIN) == 1
    printed = capsys.readouterr().out
    assert "| vtc |" in printed and all(line in text for line in printed.splitlines() if line.startswith("|"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scenario", "azure-conv"], "'azure-conv' has no tenants"),
        (["--seeds", "1"], "--seeds: 1, must be at least 2"),
        (["--rate", "0"], "--rate: 0, must be finite and > 0"),
        (["--policies", "vtk"], "did you mean 'vtc'"),
        (["--page", "nowhere.md"], "--page: nowhere.md cannot be read"),
    ],
)
def test_it_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tenants", *words]) != 0
    assert message in capsys.readouterr().err


def test_a_page_needs_its_two_comments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{END}\n{BEGIN}\n")
    assert main(["tenants", "--page", str(page)]) != 0
    assert "must have one line" in capsys.readouterr().err


def row(policy: str, seed: int, latency: float) -> TenantRow:
    figures = TenantFigures("a", 2.0, 3, 3, 10.0, 0.0, 1.0, latency, latency, latency, latency)
    return TenantRow(policy, seed, figures, math.nan, 0.0, latency, 1.0)


def test_differences_are_paired_by_seed_and_what_is_undefined_is_left_out() -> None:
    rows = [row("x", 0, 1.0), row("y", 0, 3.0), row("x", 1, 5.0), row("y", 1, 7.0), row("x", 2, math.nan), row("y", 2, 1.0)]
    found = interval(rows, "y", lambda one: one.figures.latency_mean, "x")
    assert (found.mean, found.n, found.half_width) == (2.0, 2, 0.0) and shown(found, 1, signed=True) == "+2.0 ± 0.0"
    assert shown(interval(rows, "x", lambda one: one.jain), 2) == "-"
    assert sum(line.startswith("| a | 2 | ") for line in tables(rows, ["x", "y"])) == 2
