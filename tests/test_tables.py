"""Cells of tables and plots of comparisons."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from llmsched_env.bench.plots import plot_against_rate
from llmsched_env.bench.tables import Cell, Column, short_footnotes
from llmsched_env.metrics import Interval


def make_cell(policy: str, rate: float, mean: float, half: float, **changes: Any) -> Cell:
    interval = Interval(mean, mean - half, mean + half, 5)
    metrics = ("latency_mean", "latency_p99", "ttft_mean", "ttft_p99", "throughput_tok_s", "evictions", "kv_mean")
    base = Cell(policy, rate, 5, 100, 100, False, (), dict.fromkeys(metrics, interval))
    return dataclasses.replace(base, **changes)


@pytest.mark.parametrize(
    ("mean", "half", "expected"),
    [
        (5.2649, 0.3271, "5.26 ± 0.33"),
        (1234.5, 12.0, "1,234 ± 12"),
        (0.34567, 0.05, "0.346 ± 0.050"),
        (0.0, 0.0, "0 ± 0"),
        (40.0, 0.0004, "40.0 ± 0.0004"),
        (7.0, math.nan, "7.00"),
        (math.nan, math.nan, "-"),
    ],
)
def test_numbers_in_tables(mean: float, half: float, expected: str) -> None:
    assert Column("x", "latency_mean", decimals=3).show(make_cell("vllm", 1, mean, half)) == expected


def test_marks_follow_the_policy_into_the_table() -> None:
    cell = make_cell("wait", 7, 1, 0.1, known_lengths=True, notes=("overload: rho = 1.2",), completed=98)
    assert cell.marks == ("known lengths", "overload")
    lines = short_footnotes([cell, make_cell("vllm", 7, 1, 0.1)])
    assert lines == ["overload: wait at 7 req/s, outside the region its theory covers", "wait at 7 req/s: 2 of 100 requests not completed"]


@pytest.mark.parametrize("boundary", [5.5, 400.0, math.inf])
def test_plots_bear_nan_single_seeds_and_intervals_below_zero(tmp_path: Path, boundary: float) -> None:
    table = [make_cell("a", 4, 1, math.nan), make_cell("a", 6, 3, 9.0, notes=("overload: x",)), make_cell("b", 4, math.nan, math.nan)]
    plot_against_rate(tmp_path / "x.png", table, (("latency_mean", "s"), ("ttft_mean", "s")), {"a": "a", "b": "b"}, boundary, 5)
    assert (tmp_path / "x.png").stat().st_size > 10_000
