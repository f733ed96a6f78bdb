"""Iteration times learned from iterations: models that are known give their own coefficients back."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmsched_agents.adaptive_times import (
    KNOTS,
    OTHERS,
    UNITS,
    TimesRecord,
    eliminate,
    forget_times,
    knot_below,
    learn_times,
    note_iteration,
    seconds_of,
    times_record,
)
from llmsched_env.perf.batch import BatchSums

Row = tuple[int, float, int, float]
"""Decodes, context of each (tokens), prompt tokens, attention work of one of them."""


def batch_of(decodes: int, context: float, prefill: int, work: float) -> BatchSums:
    batch = BatchSums(model=np.zeros(1), memory=np.zeros(1))
    batch.decodes, batch.decode_kv = float(decodes), decodes * context
    batch.prefill_tokens, batch.prefill_work = float(prefill), prefill * work
    batch.batch_size = float(decodes + (prefill > 0))
    return batch


def learned(rows: Iterable[Row], seconds: Callable[..., float], budget: int = 2_048, every: int = 64) -> TimesRecord:
    """What is known after these iterations; coefficients are found again and again, as the agent does."""
    times = times_record(budget)
    forget_times(times)
    for i, row in enumerate(rows):
        note_iteration(times, batch_of(*row), seconds(*row))
        if i % every == every - 1:
            learn_times(times)
    learn_times(times)
    return times


def varied(n: int, seed: int = 0, budget: int = 2_048) -> list[Row]:
    """Batches of decodes alone, of prompts alone and of both, some of them full."""
    g = np.random.default_rng(seed)
    rows: list[Row] = []
    for _ in range(n):
        decodes = int(g.integers(0, min(257, budget)))
        prefill = int(g.choice([0, g.integers(1, 200), g.integers(1, budget), budget]))
        prefill = min(prefill, budget - decodes)
        if decodes + prefill > 0:
            rows.append((decodes, float(g.uniform(50, 2_000)), prefill, float(g.uniform(10, 1_500))))
    return rows


def linear(decodes: float, context: float, prefill: float, work: float) -> float:
    return 0.012 + 4e-5 * (decodes + prefill) + 2e-8 * decodes * context + 3e-9 * prefill * work + 1e-5 * decodes


def between_knots(decodes: float, context: float, prefill: float, work: float) -> float:
    """Flat to 128 tokens, then steps of different heights, straight between them."""
    at = [1, 128, 256, 384, 512, 768, 1_024, 1_536, 2_048]
    value = [0.02, 0.021, 0.031, 0.034, 0.05, 0.055, 0.08, 0.1, 0.14]
    return float(np.interp(decodes + prefill, at, value)) + 2e-8 * decodes * context + 3e-9 * prefill * work


def stairs(decodes: float, context: float, prefill: float, work: float) -> float:
    """Whole tiles of 128 tokens."""
    return 0.015 + 0.004 * float(np.ceil((decodes + prefill) / 128)) + 2e-8 * decodes * context + 3e-9 * prefill * work


@pytest.mark.parametrize("model", [linear, between_knots])
def test_a_model_of_this_form_is_found(model: Callable[..., float]) -> None:
    times = learned(varied(3_000), model)
    for row in varied(300, seed=1):
        assert seconds_of(times, *map(float, row)) == pytest.approx(model(*row), rel=2e-3)
    knots = times.knots.size
    assert times.found[knots] * UNITS[0] == pytest.approx(2e-8, rel=0.02)
    assert times.found[knots + 1] * UNITS[1] == pytest.approx(3e-9, rel=0.02)
    if model is linear:
        assert times.found[knots + 3] * UNITS[3] == pytest.approx(1e-5, rel=0.05)


def test_stairs_are_met_where_budgets_are_full() -> None:
    """Budgets are multiples of the tile and mostly full, so the ends of the steps are what is seen most."""
    g = np.random.default_rng(0)
    rows: list[Row] = []
    for _ in range(4_000):
        decodes = int(g.integers(1, 100))
        budget = int(g.choice([128, 256, 384, 512, 768, 1_024, 1_536, 2_048]))
        prefill = int(g.choice([0, budget - decodes, budget - decodes, g.integers(0, budget - decodes)], p=[0.4, 0.25, 0.3, 0.05]))
        rows.append((decodes, float(g.uniform(50, 2_000)), prefill, float(g.uniform(10, 1_500))))
    times = learned(rows, stairs)
    for tokens in (128, 256, 384, 512, 768, 1_024, 1_536, 2_048):
        row = (60.0, 500.0, tokens - 60.0, 400.0)
        assert seconds_of(times, *row) == pytest.approx(stairs(*row), rel=0.05)


def test_a_straight_line_goes_on_where_nothing_has_been() -> None:
    rows = [(d, c, min(p, 256 - d if d < 256 else 0), w) for d, c, p, w in varied(3_000)]
    times = learned(rows, linear, budget=16_384)
    for tokens in (300, 600, 2_048, 8_192, 16_384):
        row = (100.0, 500.0, tokens - 100.0, 300.0)
        assert seconds_of(times, *row) == pytest.approx(linear(*row), rel=0.03)


def test_a_straight_line_joins_what_has_been_seen_on_both_sides() -> None:
    rows = [(d, c, p, w) for d, c, p, w in varied(6_000) if d + p <= 256 or d + p >= 1_536]
    times = learned(rows, linear)
    for tokens in (320, 512, 1_024, 1_400):
        row = (100.0, 500.0, tokens - 100.0, 300.0)
        assert seconds_of(times, *row) == pytest.approx(linear(*row), rel=0.01)


@pytest.mark.parametrize("seed", range(4))
def test_more_never_takes_less(seed: int) -> None:
    """Whatever has been seen: here seconds that have nothing to do with the batch, and some that fall with it."""
    g = np.random.default_rng(seed)
    times = learned(varied(300, seed), lambda d, c, p, w: float(g.uniform(0.005, 0.1)) if seed % 2 else 1.0 / (10 + d + p))
    knots = times.knots.size
    assert np.isfinite(times.found).all()
    assert (np.diff(times.found[:knots]) >= 0).all() and (times.found[knots:] >= 0).all()
    before = 0.0
    for tokens in range(1, 3_000, 7):
        now = seconds_of(times, 1.0, 100.0, tokens - 1.0, 50.0)
        assert now >= before
        before = now


def test_newer_iterations_count_more() -> None:
    rows = varied(3_000)
    times = learned(rows, linear)
    for i, row in enumerate(varied(20_000, seed=2)):
        note_iteration(times, batch_of(*row), 2.0 * linear(*row))
        if i % 32 == 31:
            learn_times(times)
    row = (60.0, 500.0, 400.0, 200.0)
    assert seconds_of(times, *row) == pytest.approx(2.0 * linear(*row), rel=0.03)


def test_forgetting_leaves_nothing() -> None:
    times = learned(varied(200), linear)
    forget_times(times)
    again, fresh = times, times_record(2_048)
    forget_times(fresh)
    for record in (again, fresh):
        for row in varied(100, seed=3):
            note_iteration(record, batch_of(*row), between_knots(*row))
        learn_times(record)
    np.testing.assert_array_equal(again.found, fresh.found)
    np.testing.assert_array_equal(again.normal, fresh.normal)
    assert (again.iterations, again.scale) == (fresh.iterations, fresh.scale)


@pytest.mark.parametrize("iterations", [0, 1, 2])
def test_few_iterations_give_finite_times(iterations: int) -> None:
    times = learned(varied(200)[:iterations], linear)
    assert np.isfinite(times.found).all()
    assert 0 < seconds_of(times, 10.0, 100.0, 500.0, 50.0) < 10.0


@pytest.mark.parametrize("budget", [1, 2, 3, 16, 17, 100, 128, 2_048, 16_384, 65_536])
def test_knots_end_at_the_budget(budget: int) -> None:
    times = times_record(budget)
    knots = times.knots.tolist()
    assert knots == sorted(set(knots)) and len(knots) >= 2 and knots[-1] == max(budget, 2)
    assert set(knots[:-1]) <= set(KNOTS) and times.found.size == len(knots) + OTHERS
    for tokens in (0.0, 1.0, 2.0, 127.0, 128.0, 10.0 * budget):
        k = knot_below(times, tokens)
        assert 0 <= k <= len(knots) - 2
        assert tokens < knots[k + 1] or k == len(knots) - 2
        assert tokens >= knots[k] or k == 0


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_elimination_solves_positive_definite_systems(size: int, seed: int) -> None:
    g = np.random.default_rng(seed)
    root = g.normal(size=(size, size))
    matrix = root @ root.T + 0.01 * np.eye(size)
    right = g.normal(size=size)
    packed = np.column_stack([matrix, right]).ravel()
    out = np.zeros(size)
    eliminate(packed, size, out)
    np.testing.assert_allclose(out, np.linalg.solve(matrix, right), rtol=1e-6, atol=1e-8)
