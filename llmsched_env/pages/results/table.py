"""The table beside the page: every cell, variant and metric with mean and interval, as CSV."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from llmsched_env.bench.evaluation import METRICS
from llmsched_env.bench.results import Line
from llmsched_env.files import replacing
from llmsched_env.row_file import csv_writer

COLUMNS = ("cell", "variant", "options", "seeds", *(f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")))


def write_table(path: Path, table: Iterable[Line]) -> None:
    """Six significant digits; empty where a variant has no figure."""
    with replacing(path) as file:
        writer = csv_writer(file)
        writer.writerow(COLUMNS)
        for line in table:
            figures: list[str] = []
            for estimate in (line.figures[metric] for metric in METRICS):
                figures += [""] * 3 if estimate is None else [f"{x:.6g}" for x in (estimate.value, estimate.low, estimate.high)]
            writer.writerow([line.cell, line.variant, line.options, line.seeds, *figures])
