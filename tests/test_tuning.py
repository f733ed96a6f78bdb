"""Searching the parameters of policies: in one cell, and one set for several."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.evaluation import variants_of
from llmsched_env.bench.suite import Bench, Cell, cells, warmup_seconds
from llmsched_env.bench.tuned import SHIPPED, Search, TunedFile, tuned_parameters
from llmsched_env.bench.tuning import GRIDS, THETAS, TOGETHER, Tuned, grid_of, search, tied, tune_together
from llmsched_env.bench.variants import make
from llmsched_env.cli import tune
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import summarize
from llmsched_env.runner import run_episode

CELL = Cell("stationary", "azure-conv", "40GB", 1.0)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Boundaries.read(), 60)


def test_no_more_residents_than_tokens() -> None:
    assert tied({"engine.max_num_batched_tokens": 128, "engine.max_num_seqs": 192, "theta": 1.0})["engine.max_num_seqs"] == 128
    assert tied({"budget": 512, "max_num_seqs": 64}) == {"budget": 512, "max_num_seqs": 64}
    assert tied({"engine.max_num_seqs": 192}) == {"engine.max_num_seqs": 192}


def test_the_search_finds_a_peak_to_the_last_step() -> None:
    asked: list[tuple[int, ...]] = []

    def cost(point: tuple[int, ...]) -> float:
        asked.append(point)
        return (point[0] - 37) ** 2 + 50 * (point[1] - 2) ** 2

    assert search([81, 6], (10, 5), 60, cost) == (37, 2)
    assert len(asked) == len(set(asked)) == 60, "no point twice, and every trial is used"


@pytest.mark.parametrize(("sizes", "trials"), [([81], 24), ([81, 6, 7], 40), ([5], 40), ([1, 2], 40)])
def test_every_search_has_its_trials(sizes: list[int], trials: int) -> None:
    asked: set[tuple[int, ...]] = set()

    def cost(point: tuple[int, ...]) -> float:
        asked.add(point)
        return float(hash(point) % 97)

    search(sizes, None, trials, cost)
    assert len(asked) == min(trials, math.prod(sizes))
    assert all(0 <= i < n for point in asked for i, n in zip(point, sizes, strict=True))


def test_a_search_without_a_feasible_point_finds_nothing() -> None:
    assert search([5, 5], None, 25, lambda point: math.inf) is None


def test_thetas_stand_a_hundredth_apart_and_every_grid_has_options_of_its_policy() -> None:
    np.testing.assert_allclose(np.diff(THETAS), 0.01)
    bench = Bench(Boundaries.read(), 60)
    for policy, grid in GRIDS.items():
        for name, values in grid.items():
            for value in (values[0], values[-1]):
                if policy in ("wait", "nested-wait") or (name, value) == ("engine.max_num_seqs", 32):
                    continue
                options = {name: value}
                if name == "engine.max_num_batched_tokens":  # an engine refuses more residents than tokens
                    options = tied({name: value, "engine.max_num_seqs": 256})
                assert make(policy, bench.setting(CELL), options).engine is not None


def test_tuning_helps_on_its_own_seeds_and_goes_on_where_it_was_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tuned.json"
    words = ["--scenarios", "azure-conv", "--kv", "40GB", "--loads", "1.0", "--parts", "stationary", "--policies", "reserve", "late-last"]
    words += ["--seeds", "2", "--trials", "12", "--num-requests", "300", "--jobs", "1", "--out", str(out)]
    assert tune.main(words) == 0
    first = out.read_text()
    record = json.loads(first)
    by_policy = {entry["policy"]: entry for entry in record["entries"]}
    assert set(by_policy) == {"reserve", "late-last"}
    assert by_policy["reserve"]["value"] <= by_policy["reserve"]["default_value"]
    assert by_policy["late-last"]["objective"] == "slo_goodput"
    assert by_policy["late-last"]["value"] >= by_policy["late-last"]["default_value"]
    assert {entry["trials"] for entry in record["entries"]} == {12}
    capsys.readouterr()
    assert tune.main(words) == 2
    assert "holds tuned parameters already" in capsys.readouterr().err and out.read_text() == first
    assert tune.main([*words, "--resume"]) == 0
    assert "0 searches" in capsys.readouterr().err
    assert out.read_text() == first
    # What is missing is searched for, and what is there stays.
    assert tune.main([*words, "--policies", "reserve", "sarathi", "--resume"]) == 0
    assert "1 searches" in capsys.readouterr().err
    assert {policy for _, policy in TunedFile.read(out).entries} == {"reserve", "late-last", "sarathi"}
    # Searches of other settings do not take the place of those that are there.
    kept = out.read_text()
    key = CELL.key
    for changes, now, then in (
        (["--seeds", "3"], "--seeds is 3", "2"),
        (["--trials", "13"], "--trials is 13", "12"),
        (["--num-requests", "310", "--trials", "14"], "--trials is 14, --num-requests is 310", "12, 300"),
    ):
        assert tune.main([*words, *changes, "--policies", "vllm-v0", "reserve", "--resume"]) == 2
        wanted = f"error: --resume: {now}, but {key} reserve in {out} was made with {then}; use --overwrite"
        assert wanted in capsys.readouterr().err and out.read_text() == kept
    # Fewer trials than were made are no reason to lose them, and searches of other cells or policies may have other settings.
    assert tune.main([*words, "--trials", "5", "--resume"]) == 0
    assert "0 searches" in capsys.readouterr().err and out.read_text() == kept
    assert tune.main([*words, "--seeds", "1", "--trials", "3", "--policies", "wait", "--resume"]) == 0
    assert tune.main([*words, "--seeds", "1", "--trials", "3", "--loads", "0.9", "--policies", "reserve", "--resume"]) == 0
    both = TunedFile.read(out).entries
    assert (both[key, "reserve"].trials, both[key, "wait"].trials) == (12, 3) and len(both) == 5
    # What is reported as tuned is what these options give.
    bench = Bench(Boundaries.read(), 300)
    entry = TunedFile.read(out).entries[CELL.key, "reserve"]
    assert entry.value == pytest.approx(tune_one(bench, CELL, "reserve", entry.options), rel=1e-12)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--policies", "fcfs"], "nothing to tune"),
        (["--policies", "resreve"], "did you mean"),
        (["--trials", "0"], "--trials"),
        (["--num-requests", "3"], "--num-requests"),
        (["--scenarios", "nowhere"], "nowhere"),
        (["--together", "--parts", "stationary"], "--together: no cell of the non-stationary part"),
        (["--together", "--scenarios", "lmsys"], "--together: no cell of the non-stationary part"),
        (["--together", "--parts", "burst"], "did you mean 'bursts'"),
    ],
)
def test_tune_refuses_before_any_work(words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([*words, "--out", str(tmp_path / "t.json")]) == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_one_set_of_parameters_for_several_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tuned.json"
    words = ["--together", "--scenarios", "azure-conv", "lmsys", "--kv", "40GB", "80GB", "--parts", "stationary", "bursts", "--seeds", "2"]
    words += ["--policies", "reserve", "late-last", "--trials", "10", "--num-requests", "200", "--jobs", "1", "--out", str(out)]
    assert tune.main(words) == 0
    assert "2 searches of 10 trials on 2 seeds each, each over 2 cells" in capsys.readouterr().err
    kept = TunedFile.read(out).entries
    assert set(kept) == {(TOGETHER, "reserve"), (TOGETHER, "late-last")}
    entry, late = kept[TOGETHER, "reserve"], kept[TOGETHER, "late-last"]
    assert entry.over == ("bursts/azure-conv/40GB/0.9", "bursts/azure-conv/80GB/0.9") and entry.runs == 10 * 2 * 2
    assert (entry.objective, entry.default_value) == ("relative_latency_mean", 1.0) and entry.value < 1.0
    assert late.objective == "slo_goodput" and 0 < late.default_value <= late.value <= 1
    before = out.read_text()
    assert tune.main([*words, "--resume"]) == 0
    assert "0 searches" in capsys.readouterr().err and out.read_text() == before
    # The value is that of these options: each cell's latency over that of the default, every cell alike.
    bench = Bench(Boundaries.read(), 200)
    ratios = []
    for cell in cells(["bursts"], ["azure-conv"]):
        own = tune_one(bench, cell, "reserve", entry.options)
        ratios.append(own / tune_one(bench, cell, "reserve", {}))
    assert entry.value == pytest.approx(np.mean(ratios), rel=1e-12)
    # Fewer cells are another search.
    assert tune.main([*words, "--kv", "40GB", "--resume"]) == 0
    assert "2 searches" in capsys.readouterr().err
    fresh = ["--kv", "40GB", "--policies", "reserve", "--trials", "3", "--overwrite", "--json", str(tmp_path / "f.json")]
    assert tune.main([*words, *fresh]) == 0
    (only,) = TunedFile.read(out).entries.values()
    (found,) = json.loads((tmp_path / "f.json").read_text())["found"]
    assert (only.policy, only.trials) == ("reserve", 3) and found["options"] == only.options


def test_a_grid_with_fewer_points_than_trials_is_done(bench: Bench) -> None:
    cell = cells(["stationary"], ["two-type"], ["80GB"], [1.0])[0]
    points = math.prod(len(values) for values in grid_of("reserve", cell).values())
    entry = Tuned(cell.key, "reserve", "latency_mean", {}, 1.0, 1.0, points, 2, bench.count(cell), 1.0)
    file = TunedFile({(cell.key, "reserve"): entry})
    asked = [Search(bench, (cell,), "reserve", 2, trials, False) for trials in (points - 1, points, points + 100)]
    assert all(file.holds(search) for search in asked) and [file.differences(search) for search in asked] == [{}] * 3
    file.check_same(Path("tuned.json"), asked)
    other = Search(bench, (cell,), "reserve", 3, points + 100, False)
    assert not file.holds(other) and file.differences(other) == {"seeds": (2, 3)}


def tune_one(bench: Bench, cell: Cell, name: str, options: dict[str, object]) -> float:
    """Mean latency over two tuning seeds, in the way of an evaluation."""
    policy = make(name, bench.setting(cell), options)
    values = []
    for seed in range(2):
        workload = bench.workload(cell, "tuning", seed)
        result = run_episode(policy, workload)
        values.append(summarize(result.log, result.counters, kv_capacity=1, warmup=warmup_seconds(workload)).latency_mean)
    return float(np.mean(values))


def test_cells_without_common_parameters_are_not_tuned_together(bench: Bench) -> None:
    for chosen in ([], [CELL, Cell("stationary", "two-type", "80GB", 1.0)]):
        with pytest.raises(ConfigError, match="must be at least one and agree"):
            tune_together(bench, chosen, "reserve", seeds=1, trials=2)


def test_parameters_tuned_together_run_where_they_were_searched(bench: Bench) -> None:
    moving = cells(["bursts", "daily"], ["azure-conv"], ["40GB"])
    entry = Tuned(TOGETHER, "reserve", "relative_latency_mean", {"theta": 1.3}, 0.9, 1.0, 5, 2, 60, 1.0, (moving[0].key,))
    tuned = {(TOGETHER, "reserve"): entry}
    found = {cell: [v.label for v in variants_of(cell, ["vllm", "reserve"], tuned, [], bench)] for cell in (CELL, *moving)}
    assert found[CELL] == found[moving[1]] == ["vllm (default)", "reserve (default)"]
    assert found[moving[0]] == ["vllm (default)", "reserve (default)", "reserve (tuned together)"]
    assert TunedFile(tuned).entries.keys() == {(TOGETHER, "reserve")}


def test_the_tuned_parameters_that_ship_are_found_by_name() -> None:
    assert tuned_parameters("--tuned", None) == {}
    shipped = tuned_parameters("--tuned", Path("shipped"))
    assert shipped == TunedFile.read(SHIPPED).entries and {(CELL.key, "reserve"), (TOGETHER, "reserve")} <= set(shipped)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"suite": "bench-v0", "entries": []}))
    with pytest.raises(ConfigError, match="bench-v0"):
        TunedFile.read(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="not a file of tuned parameters"):
        TunedFile.read(path)
