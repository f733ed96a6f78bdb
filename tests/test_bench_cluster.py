"""Runs of routers on scenarios, paired figures, and the search for options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llmsched_baselines.routers import router_names, router_options
from llmsched_env import ConfigError
from llmsched_env.bench import router_tuning
from llmsched_env.bench.cluster import boundary, change, episode_seed, mean_of, run_router, run_task, run_to_file
from llmsched_env.bench.cluster_rows import Task
from llmsched_env.bench.router_tuning import GRIDS, TOGETHER, read_tuned, tune_all, tune_router, tuned_options, write_tuned
from llmsched_env.cluster.scenario import ClusterScenario
from llmsched_env.cluster.scenarios import load_cluster_scenario


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches run episodes of 300 calls."""

    def load(name: str) -> ClusterScenario:
        return dataclasses.replace(load_cluster_scenario(name), num_calls=300)

    monkeypatch.setattr(router_tuning, "load_cluster_scenario", load)


def test_seeds_of_purposes_differ() -> None:
    seeds = {episode_seed(purpose, n) for purpose in ("tuning", "evaluation", "boundary") for n in range(80)}
    assert len(seeds) == 240
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_rows_resume_and_do_not_depend_on_how_they_are_spread(tmp_path: Path) -> None:
    tasks = [Task.of(s, r, {}, "tuning", k, num_calls=300) for s in ("equal", "failing") for r in ("random", "cost") for k in (0, 1)]
    rows = run_to_file(tasks, tmp_path / "a.csv", jobs=1)
    lines = (tmp_path / "a.csv").read_text().splitlines()
    (tmp_path / "a.csv").write_text("\n".join(lines[:4]) + "\n")
    again = run_to_file(tasks, tmp_path / "a.csv", jobs=1)
    spread = run_to_file(tasks, tmp_path / "b.csv", jobs=2)
    for other in (again, spread):
        assert [dataclasses.replace(row, wall_seconds=0.0) for row in other] == [dataclasses.replace(row, wall_seconds=0.0) for row in rows]
    assert [row.task for row in rows] == tasks
    assert all(0.0 <= row.slo_misses <= 1.0 and row.completed == row.requests > 0 for row in rows)


def test_changes_are_paired() -> None:
    row = run_task(Task.of("equal", "random", {}, "tuning", 0, num_calls=300))
    rows = []
    for seed, (a, b) in enumerate([(2.0, 3.0), (4.0, 5.0), (6.0, 7.0)]):
        rows += [dataclasses.replace(row, router=name, seed=seed, latency_mean=x) for name, x in (("a", a), ("b", b))]
    found = change(rows, "equal", "b", "a", "latency_mean")
    assert (found.mean, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert mean_of(rows, "equal", "a", "latency_mean").mean == 4.0
    with pytest.raises(ConfigError, match="must be the same and at least one"):
        change(rows[:-1], "equal", "b", "a", "latency_mean")
    with pytest.raises(ConfigError, match="has several of seed 2, must be one"):
        mean_of([*rows, rows[-1]], "equal", "b", "latency_mean")


def test_more_replicas_bear_more_calls() -> None:
    scenario = dataclasses.replace(load_cluster_scenario("equal"), num_calls=300)
    four, eight = (run_router(scenario, "sticky", {}, 1, replicas=n) for n in (4, 8))
    assert len(eight.replica_requests) == 8
    assert eight.requests > 1.5 * four.requests


def test_the_boundary_is_where_the_limits_are_met_just_so() -> None:
    scenario = dataclasses.replace(load_cluster_scenario("equal"), num_calls=300)
    rate = boundary(scenario, "prefix-affinity", {}, seeds=1, low=4.0, high=80.0)
    goodput = [run_router(scenario, "prefix-affinity", {}, episode_seed("boundary", 0), rate=r).slo_goodput for r in (rate, 1.5 * rate)]
    assert goodput[0] >= 0.9 > goodput[1]
    with pytest.raises(ConfigError, match="rates: "):
        boundary(scenario, "prefix-affinity", {}, seeds=1, low=79.0, high=80.0)


def test_grids_are_options_whose_defaults_lie_on_them() -> None:
    assert set(GRIDS) <= set(router_names())
    for router, grid in GRIDS.items():
        options = router_options(router)
        assert all(options[name].default in values for name, values in grid.items()), router
        assert set(grid) == set(options)


def test_a_search_is_no_worse_than_what_ships_and_is_written_down(tmp_path: Path) -> None:
    path = tmp_path / "tuned.json"
    searches = [("prefix-affinity", ("equal",)), ("dynamo", ("equal", "heterogeneous")), ("random", ("equal",))]
    found = tune_all(searches, path, seeds=1, trials=5, report=lambda text: None)
    assert read_tuned(path) == found
    assert set(found) == {("equal", "prefix-affinity"), (TOGETHER, "dynamo"), ("equal", "random")}
    assert all(entry.value <= entry.default_value for entry in found.values())
    assert found["equal", "random"].trials == 1
    assert found[TOGETHER, "dynamo"].default_value == 1.0
    entry = found["equal", "prefix-affinity"]
    scenario = dataclasses.replace(load_cluster_scenario("equal"), num_calls=300)
    assert run_router(scenario, "prefix-affinity", entry.options, episode_seed("tuning", 0)).latency_mean == entry.value
    assert tuned_options("prefix-affinity", "equal", path) == entry.options
    assert tuned_options("dynamo", "equal", path) == found[TOGETHER, "dynamo"].options
    assert tuned_options("sticky", "equal", path) == {}


def test_a_search_that_was_made_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tuned.json"
    first = tune_all([("prefix-affinity", ("equal",))], path, seeds=1, trials=2, report=lambda text: None)
    monkeypatch.setattr(router_tuning, "tune_router", lambda *a, **b: pytest.fail("searched again"))
    assert tune_all([("prefix-affinity", ("equal",))], path, seeds=1, trials=2) == first


def test_errors() -> None:
    with pytest.raises(ConfigError, match="scenarios: none"):
        tune_router("cost", [])
    with pytest.raises(ConfigError, match="router: 'costs' is unknown"):
        run_task(Task.of("equal", "costs", {}, "tuning", 0))


def test_files_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ConfigError, match="not a file of tuned routers"):
        read_tuned(tmp_path / "a.json")
    write_tuned({}, tmp_path / "b.json")
    assert read_tuned(tmp_path / "b.json") == {}
