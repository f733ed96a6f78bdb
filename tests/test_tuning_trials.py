"""Searches with next to no trials."""

from __future__ import annotations

import pytest

from llmsched_env.bench import tuning
from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.suite import Bench, cells
from llmsched_env.bench.tuning import search, tune


def test_a_search_without_trials_finds_nothing() -> None:
    assert search([3, 3], [0, 0], 0, lambda point: 1.0) is None


@pytest.mark.parametrize("thetas", [(0.9, 1.1), (0.9, 1.0, 1.1)], ids=["defaults off the grid", "on it"])
def test_one_trial_is_the_policy_as_it_ships(thetas: tuple[float, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tuning.GRIDS, "reserve", {"theta": thetas})
    (cell,) = cells(("stationary",), ("azure-conv",), ("40GB",), (1.0,))
    found = tune(Bench(Boundaries.read(), 40), cell, "reserve", seeds=1, trials=1)
    assert (found.trials, found.options) == (1, {}) and found.value == found.default_value
