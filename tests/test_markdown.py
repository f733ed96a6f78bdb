"""Tables and pages of reports."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsched_env.markdown import cell, table, write_page


def test_a_table_is_aligned_by_column() -> None:
    lines = table(["what", "a", "b"], [["x", 1, 2.5], ("y", "-", "")], "lr")
    assert lines == ["| what | a | b |", "| --- | ---: | ---: |", "| x | 1 | 2.5 |", "| y | - |  |"]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells under 3 headings"):
        table(["a", "b", "c"], [[1, 2]], "l")


def test_cells_bear_bars_and_nothing() -> None:
    assert cell("a | b") == "a \\| b"
    assert cell("") == "-"


def test_a_page_ends_with_one_line_break(tmp_path: Path) -> None:
    write_page(tmp_path / "deep" / "page.md", ["# x", "", "y", ""])
    assert (tmp_path / "deep" / "page.md").read_text() == "# x\n\ny\n"
