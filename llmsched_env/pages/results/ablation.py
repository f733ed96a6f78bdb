"""The section of the page about an ablation."""

from __future__ import annotations

import math

from llmsched_agents.statistics import Estimate
from llmsched_env.bench.ablation_table import REFERENCE_ROW, Ablation, Figures
from llmsched_env.bench.results import interval, percent
from llmsched_env.markdown import table


def section(ablation: Ablation, own: bool) -> list[str]:
    """Markdown; ``own`` says whether the checkpoint is one of the agents that the page evaluates."""
    seeds, cells, reference = ablation.seeds, ablation.cells, f"{ablation.reference:g}"
    least, most = ablation.num_requests
    counts = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    other = "" if own else " **No agent evaluated on this page is this checkpoint.**"
    numbers = f"{seeds[0]} to {seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    headings = ("variant", "with the network", "worst cell", f"constant: {reference}, or as named", "worst cell")
    return [
        "## What was tried",
        "",
        f"What each part of the recipe of `{ablation.agent}` is worth (`scripts/ablation.py`): one part changed, all else as it ships, "
        f"with its network and with the constant level {reference} in place of the network.{other}",
        "",
        f"These are **{len(seeds)} development seeds** ({numbers} of the tuning stream: neither those of tuning nor of "
        f"evaluation), in {len(cells)} cells with {counts} requests a run, {len(ablation.rows) * len(cells) * len(seeds):,} "
        f"runs. Mean over the cells of the mean latency, against the recipe as it ships at the constant level {reference} on "
        "the same requests, with 95 % bootstrap intervals that resample seeds; then the cell in which it is worst. "
        "A dash stands where the network does not fit the variant, or where only one of the two can differ.",
        "",
        *table(headings, _rows(ablation), "l"),
        "",
    ]


def _rows(ablation: Ablation) -> list[list[str]]:
    by_name: dict[str, dict[bool, Figures]] = {}
    for row in ablation.rows:
        by_name.setdefault(row.variant, {})[row.constant is not None] = row
    rows = []
    for name, found in by_name.items():
        cells = [text for constant in (False, True) for text in (texts(found[constant]) if constant in found else ("-", "-"))]
        if found.get(True) and found[True].constant == ablation.reference and name == REFERENCE_ROW:
            cells[2:] = ["0 (the reference)", "-"]
        rows.append([name, *cells])
    return rows


def texts(row: Figures) -> tuple[str, str]:
    """The mean with its interval, and the worst cell."""
    value, low, high, worst = (math.nan if x is None else x for x in (row.value, row.low, row.high, row.worst))
    return interval(Estimate(value, low, high, 0)), f"{percent(worst)} ({row.worst_cell})"
