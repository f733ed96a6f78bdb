"""Intervals on logarithmic axes: positive, around the mean, and with the coverage they promise."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as hs

from llmsched_env.bench import plots
from llmsched_env.bench.tables import Cell
from llmsched_env.metrics import Interval, mean_interval
from llmsched_env.pages.reproduction.figures import Curve, bars_of, draw, figure

ROOT = Path(__file__).parents[1]
POSITIVE = hs.lists(hs.floats(1e-6, 1e6), min_size=2, max_size=12)


@given(POSITIVE)
def test_interval_of_positive_values_stays_positive_around_their_mean(values: list[float]) -> None:
    interval = mean_interval(values)
    own = interval.on_log_axis()
    assert own.mean == interval.mean and own.n == interval.n
    assert 0 < own.low <= own.mean * (1 + 1e-12) and own.high >= own.mean * (1 - 1e-12)
    assert own.low >= interval.low - 1e-9 * own.mean  # it reaches less far down
    assert math.log(own.high / own.mean) == pytest.approx(math.log(own.mean / own.low), rel=1e-6, abs=1e-9)


def test_narrow_intervals_are_equal_to_the_symmetric_one() -> None:
    interval = mean_interval([10.0, 10.01, 9.99, 10.02])
    own = interval.on_log_axis()
    assert own.low == pytest.approx(interval.low, rel=1e-5) and own.high == pytest.approx(interval.high, rel=1e-5)


@pytest.mark.parametrize(
    ("interval", "low", "high"),
    [
        (Interval(0.0, 0.0, 0.0, 3), 0.0, 0.0),
        (Interval(0.0, -1.0, 1.0, 3), math.nan, math.nan),
        (Interval(-2.0, -3.0, -1.0, 3), math.nan, math.nan),
        (Interval(2.0, math.nan, math.nan, 1), math.nan, math.nan),
        (Interval(math.nan, math.nan, math.nan, 2), math.nan, math.nan),
        (Interval(2.0, 0.0, 4.0, 2), 2 / math.e, 2 * math.e),
    ],
)
def test_bounds_where_there_is_no_logarithm(interval: Interval, low: float, high: float) -> None:
    own = interval.on_log_axis()
    assert (own.low, own.high) == pytest.approx((low, high), nan_ok=True)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_coverage_is_no_lower_than_that_of_the_symmetric_interval(n: int) -> None:
    values = np.exp(np.random.default_rng(0).normal(0.0, 0.7, (1500, n)))
    truth = math.exp(0.7**2 / 2)
    plain = [mean_interval(row) for row in values]
    own = [interval.on_log_axis() for interval in plain]
    covered, symmetric = (sum(i.low <= truth <= i.high for i in some) / len(some) for some in (own, plain))
    assert covered >= symmetric
    assert covered > 0.88


def cell(rate: float, mean: float, half: float) -> Cell:
    return Cell("a", rate, 5, 1, 1, False, (), {"latency_mean": Interval(mean, mean - half, mean + half, 5)})


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path, table: list[Cell]) -> Any:
    """The axes of a comparison's plot, before they are closed."""
    kept: list[Any] = []
    monkeypatch.setattr(plots, "save_figure", lambda pyplot, picture, _: kept.append(picture))
    plots.plot_against_rate(path, table, (("latency_mean", "s"),), {"a": "a"}, 5.0, 5)
    return kept[0].axes[0]


def test_bands_of_a_comparison_end_inside_the_axis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    axes = drawn(monkeypatch, tmp_path / "x.png", [cell(4, 10.0, 15.0), cell(5, 20.0, 1.0)])
    low = min(path.vertices[:, 1].min() for band in axes.collections for path in band.get_paths())
    assert low == pytest.approx(10 / math.exp(1.5))
    bottom, top = axes.get_ylim()
    assert bottom < low and top > 10 * math.exp(1.5)


def test_a_huge_interval_does_not_squeeze_the_means(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    axes = drawn(monkeypatch, tmp_path / "x.png", [cell(4, 10.0, 200.0), cell(5, 20.0, 1.0)])
    bottom, top = axes.get_ylim()
    assert bottom > 0.5 and top < 250


@pytest.mark.parametrize("scale", ["y", "xy", "symlog"])
def test_error_bars_of_pages_stay_above_zero(tmp_path: Path, scale: Any) -> None:
    curve = Curve("a", (1.0, 2.0, 3.0), (Interval(1, -1, 3, 3), Interval(0, 0, 0, 3), Interval(5, math.nan, math.nan, 1)), 0)
    with figure(tmp_path / "x.png", 1, 1) as axes:
        draw(axes[0][0], [curve], scale=scale)
        (bars,) = axes[0][0].containers[0].lines[2]
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        assert axes[0][0].get_yscale() == ("symlog" if scale == "symlog" else "log")
    assert ends[0].tolist() == pytest.approx([math.exp(-2), math.exp(2)])
    assert ends[1].tolist() == [0, 0] and ends[2].tolist() == [5, 5]


def test_linear_axes_keep_the_symmetric_interval(tmp_path: Path) -> None:
    assert bars_of([Interval(1, -1, 3, 3), dataclasses.replace(Interval(2, 2, 2, 1), low=math.nan)]).tolist() == [[2, 0], [2, 0]]


def functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_no_function_draws_the_symmetric_interval_on_a_logarithmic_axis() -> None:
    """What draws intervals by hand and sets a logarithmic y axis must ask for the interval that belongs to it."""
    for path in sorted((ROOT / "llmsched_env").rglob("*.py")):
        for text in functions(path):
            if re.search(r"\.errorbar\(|fill_between\(", text) and re.search(r"set_yscale\('(sym)?log", text):
                assert "on_log_axis()" in text, (path, text)
