"""Pages in Markdown: the one table writer and the one page writer of reports and generated pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from llmsched_env.files import replacing

_RULES = {"l": "---", "r": "---:"}


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> list[str]:
    """The lines of a table.

    Args:
        rows: cells of one row each, as they are to stand there.
        align: a letter a column, ``l`` or ``r``; the last one holds for all columns that follow.

    Raises:
        ValueError: a row of another length than the heading.
    """
    rules = [_RULES[align[min(i, len(align) - 1)]] for i in range(len(headings))]
    lines = [_line(headings), _line(rules)]
    for row in rows:
        if len(row) != len(headings):
            raise ValueError(f"a row of {len(row)} cells under {len(headings)} headings: {row}")
        lines.append(_line(row))
    return lines


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def cell(text: str) -> str:
    """A text that may stand in a cell: bars do not end it, and nothing is a dash."""
    return text.replace("|", "\\|") or "-"


def write_page(path: Path, lines: Iterable[str]) -> None:
    """Write a page in one step, with one line break at its end."""
    with replacing(path) as file:
        file.write("\n".join(lines).rstrip("\n") + "\n")
