"""What the parts of an agent's recipe are worth: the variants, their figures and the section of the page."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is not installed (extra: checkpoints)")

from llmsched_agents.checkpoint import save_checkpoint
from llmsched_agents.domain import Domain
from llmsched_agents.interface import Interface
from llmsched_agents.network import Network
from llmsched_agents.recipe import Recipe
from llmsched_baselines import Setting
from llmsched_env.bench.ablation import FIRST_SEED, Candidate, Plan, Run, candidates, constant_agent, figures, part_changes, run_cell
from llmsched_env.bench.ablation_table import REFERENCE_ROW, Ablation
from llmsched_env.bench.boundary import Boundaries
from llmsched_env.bench.suite import Bench, Cell, warmup_seconds
from llmsched_env.cli import ablation, evaluate
from llmsched_env.metrics import summarize
from llmsched_env.pages.results.ablation import section, texts
from llmsched_env.row_file import read_rows
from llmsched_env.runner import run_episode
from llmsched_env.workload import load_scenario

LEVELS = (0.3, 0.97, 1.0)
RECIPE = Recipe(
    action_set="peak", num_classes=16, num_segments=1, order="expected", token_budget="fluid", levels=LEVELS, hold=16, features=True
)
CELL = Cell("stationary", "azure-conv", "40GB", 1.1)
PAPER = Cell("stationary", "two-type", "40GB", 1.0)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(Boundaries.read(), 250)


def network_of(recipe: Recipe, setting: Setting) -> Network:
    """One with random weights."""
    interface = Interface(recipe, setting)
    rng = np.random.default_rng(0)
    outputs = sum(interface.components)
    head = (rng.standard_normal((outputs, interface.width)).astype(np.float32), np.zeros(outputs, np.float32))
    return Network(np.zeros(interface.width, np.float32), np.ones(interface.width, np.float32), (), head, interface.components)


def checkpoint(folder: Path, recipe: Recipe = RECIPE) -> Path:
    scenario = load_scenario("azure-conv")
    network = network_of(recipe, Setting(scenario.statistics, 5.0, scenario.engine))
    domain, layout = Domain(scenarios=("azure-conv",)), recipe.layout_for(scenario.statistics)
    save_checkpoint(folder, network, recipe, domain, layout, name=folder.name, deterministic=True, record={"algorithm": "none"})
    return folder


# --- variants -------------------------------------------------------------------------------------
@pytest.mark.parametrize("level", [0.3, 0.97, 0.99])
def test_a_constant_agent_takes_its_level_whatever_it_sees(level: float, bench: Bench) -> None:
    agent = constant_agent(RECIPE, bench.setting(CELL), level)
    seen = np.random.default_rng(1).normal(scale=100, size=(50, agent.network.width)).astype(np.float32)
    assert {agent.recipe.choices[int(i)] for (i,) in agent.predict(seen)} == {level}
    assert set(agent.recipe.choices) == {*LEVELS, level}, "levels that the recipe lacks join it"


def test_a_low_level_keeps_requests_waiting(bench: Bench) -> None:
    workload = bench.workload(CELL, "tuning", 100)
    low, high = (run_episode(constant_agent(RECIPE, bench.setting(CELL), x), workload).summary.latency_mean for x in (0.3, 0.99))
    assert low > 1.5 * high


def test_every_part_is_changed_once_and_nothing_else() -> None:
    found = candidates(RECIPE)
    assert len({(c.name, c.constant) for c in found}) == len(found)
    assert [(c.name, c.recipe, c.constant) for c in found[:2]] == [(REFERENCE_ROW, RECIPE, None), (REFERENCE_ROW, RECIPE, 0.99)]
    changed = {}
    for c in found:
        old, new = RECIPE.as_dict(), c.recipe.as_dict()
        changed.setdefault(c.name, []).append(({k: new[k] for k in new if new[k] != old[k]}, c.constant))
    for order in ("arrival", "class", "work"):
        assert changed[f"order `{order}`"] == [({"order": order}, None), ({"order": order}, 0.99)]
    assert changed["8 classes"] == [({"num_classes": 8}, None), ({"num_classes": 8}, 0.99)]
    assert "32 classes" not in changed and "order `expected`" not in changed, "what it has, and more classes, are no ablation"
    assert changed["token budget of the engine"][0] == ({"token_budget": "engine"}, None)
    assert changed["token budget 1,024"][0] == ({"token_budget": "engine", "engine": {"max_num_batched_tokens": 1_024}}, None)
    assert [changed[f"hold {n}"] for n in (1, 64)] == [[({"hold": n}, None)] for n in (1, 64)]
    assert changed["`reserve`, theta 1.3, in place of the predicted peak"] == [({"action_set": "reserve", "levels": [1.3]}, 1.3)]
    assert changed["constant level 0.97"] == [({}, 0.97)]


def test_spare_is_a_part_where_a_recipe_has_it() -> None:
    wide = Recipe(action_set="peak", num_classes=64, num_segments=1, order="expected", token_budget="fluid", spare=1.0)
    assert part_changes(wide)["spare 0"] == {"spare": 0.0}
    assert {"8 classes", "32 classes"} <= set(part_changes(wide))
    assert "spare 0" not in part_changes(dataclasses.replace(wide, spare=0.0))


def test_the_paper_preset_has_no_token_budget_to_fix(bench: Bench) -> None:
    candidate = next(c for c in candidates(RECIPE) if c.name == "token budget 256" and c.constant is not None)
    found = [candidate.build(network_of(RECIPE, bench.setting(cell)), bench.setting(cell), True).engine for cell in (CELL, PAPER)]
    assert found[0].max_num_batched_tokens == 256
    assert found[1].max_num_batched_tokens == bench.setting(PAPER).engine.max_num_batched_tokens


# --- figures --------------------------------------------------------------------------------------
def test_runs_are_of_the_development_seeds_and_paired(bench: Bench) -> None:
    setting = bench.setting(CELL)
    network = network_of(RECIPE, setting)
    chosen = (Candidate(REFERENCE_ROW, RECIPE), Candidate("x", RECIPE, 0.97))
    plan = Plan(bench, "a", "digest", network, True, chosen, (CELL,), (FIRST_SEED, FIRST_SEED + 1))
    runs = run_cell(plan, CELL)
    assert [(run.cell, run.variant, run.constant, run.seed) for run in runs] == [
        (CELL.key, name, constant, seed) for name, constant in ((REFERENCE_ROW, ""), ("x", "0.97")) for seed in (100, 101)
    ]
    workload = bench.workload(CELL, "tuning", 101)
    result = run_episode(constant_agent(RECIPE, setting, 0.97), workload)
    summary = summarize(result.log, result.counters, kv_capacity=1, warmup=warmup_seconds(workload))
    assert runs[3].figures.latency_mean == summary.latency_mean and all(run.wall_seconds > 0 for run in runs)
    assert plan.whole(runs) == {CELL.key} and plan.whole(runs[:3]) == set(), "a cell counts when all of it is there"


def test_an_ablation_is_of_the_runs_of_its_cells(bench: Bench) -> None:
    chosen = (Candidate(REFERENCE_ROW, RECIPE), Candidate(REFERENCE_ROW, RECIPE, 0.99))
    setting = bench.setting(CELL)
    plan = Plan(bench, "a", "digest", network_of(RECIPE, setting), True, chosen, (CELL,), (100,))
    runs = run_cell(plan, CELL)
    other = dataclasses.replace(runs[0], cell=PAPER.key)
    found = plan.ablation([*runs, other])
    assert (found.agent, found.digest, found.cells, found.num_requests) == ("a", "digest", (CELL.key,), (250, 250))
    expected = runs[0].figures.latency_mean / runs[1].figures.latency_mean - 1
    assert found.rows[0].value == pytest.approx(expected, abs=1e-6) and found.rows[1].value == 0.0
    left_over = dataclasses.replace(runs[0], figures=dataclasses.replace(runs[0].figures, completed=1))
    assert plan.ablation([left_over, runs[1]]).rows[0].value is None


def test_figures_count_all_cells_alike() -> None:
    cells = [CELL, Cell("daily", "sharegpt", "80GB", 0.85)]
    chosen = [Candidate(REFERENCE_ROW, RECIPE), Candidate(REFERENCE_ROW, RECIPE, 0.99), Candidate("x", RECIPE, 0.97)]
    base = np.array([[10.0, 14.0], [1.0, 3.0]])  # cells x seeds
    network, reference, other = figures(chosen, cells, np.array([0.9 * base, base, base * [[1.2], [1.0]]]))
    assert network.value == pytest.approx(-0.1) and network.low == pytest.approx(-0.1)
    assert (reference.value, reference.worst) == (0.0, 0.0)
    assert other.value == pytest.approx(0.1) and other.worst == pytest.approx(0.2)
    assert other.worst_cell == "azure-conv, 40 GB, load 1.1"
    worse = figures(chosen, cells, np.array([base * [[1.0], [1.3]], base, base]))[0]
    assert worse.worst_cell == "daily: sharegpt, 80 GB, load 0.85"
    left_over = figures(chosen, cells, np.array([base * [[np.nan, 1.0], [1.0, 1.0]], base, base]))[0]
    assert left_over.value is None and left_over.worst is None and texts(left_over)[0] == "-"


# --- the whole, small -----------------------------------------------------------------------------
def test_an_ablation_from_checkpoint_to_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = checkpoint(tmp_path / "levels"), tmp_path / "ablation.json"
    words = ["--scenarios", "azure-conv", "--kv", "40GB", "--parts", "stationary", "bursts", "--loads", "1.0", "--num-requests", "60"]
    words += ["--jobs", "1"]
    assert ablation.main(["--agent", str(folder), "--seeds", "2", "--out", str(out), *words]) == 0
    said, notes = capsys.readouterr()
    assert "left out: 8 classes with the network" in notes, "its observation is told class by class"
    found = Ablation.read(out)
    assert found.seeds == (100, 101) and found.agent == "levels" and len(found.cells) == 2 and found.num_requests == (60, 60)
    names = {row.variant for row in found.rows}
    assert {"order `class`", "8 classes", "token budget 256", "hold 64", "constant level 0.97"} <= names
    assert all(row.value is not None and row.worst is not None for row in found.rows)
    assert "\n".join(section(found, own=True)) in said

    page = tmp_path / "results.md"
    given = [*words, "--seeds", "2", "--policies", "vllm", "--rows", str(tmp_path / "rows.csv"), "--out", str(page), "--ablation", str(out)]
    assert evaluate.main([*given, "--agents", str(folder)]) == 0
    text = page.read_text()
    assert "\n".join(section(found, own=True)) in text and "## What was tried" in text
    assert "**2 development seeds** (100 to 101 of the tuning stream" in text
    row = next(line for line in text.splitlines() if line.startswith("| order `class` |"))
    network, constant = (next(r for r in found.rows if r.variant == "order `class`" and r.constant == c) for c in (None, 0.99))
    assert row == "| order `class` | " + " | ".join([*texts(network), *texts(constant)]) + " |"
    assert "| 0 (the reference) | - |" in text and "| 8 classes | - | - | " in text
    # The page says so where the ablation is of another checkpoint.
    dataclasses.replace(found, digest="0").write(out)
    assert evaluate.main([*given, "--agents", str(folder), "--report-only"]) == 0
    assert "No agent evaluated on this page is this checkpoint" in page.read_text()


def test_an_ablation_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = checkpoint(tmp_path / "levels"), tmp_path / "o" / "ablation.json"
    words = ["--agent", str(folder), "--seeds", "1", "--out", str(out), "--scenarios", "azure-conv", "--kv", "40GB", "80GB"]
    words += ["--parts", "stationary", "--loads", "1.0", "--num-requests", "60", "--jobs", "1"]

    def interrupted(backend: str, jobs: int, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Generator[Any]:
        yield function(*arguments[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as changed:
        changed.setattr(ablation, "unordered", interrupted)
        assert ablation.main(words) == 130
    assert "go on with --resume" in capsys.readouterr().err and not out.exists()
    path = out.with_suffix(".runs.csv")
    kept = read_rows(path, Run)
    assert len({run.cell for run in kept}) == 1
    assert ablation.main(words) == 2
    assert "holds an ablation already" in capsys.readouterr().err
    assert ablation.main([*words, "--seeds", "2", "--resume"]) == 2
    assert "--resume: seeds is [100, 101]" in capsys.readouterr().err
    # A kill in the middle of the second cell: its part is run again, the first cell is not.
    text = path.read_text()
    path.write_text(text + text.splitlines()[1].replace("/40GB/", "/80GB/") + "\n" + text.splitlines()[2][:30])
    assert ablation.main([*words, "--resume"]) == 0
    runs = read_rows(path, Run)
    assert runs[: len(kept)] == kept and len(runs) == 2 * len(kept)
    whole = Ablation.read(out)
    assert ablation.main([*words, "--overwrite"]) == 0
    assert Ablation.read(out).rows == whole.rows
    # A checkpoint that was trained on is another one.
    checkpoint(folder, dataclasses.replace(RECIPE, hold=8))
    assert ablation.main([*words, "--resume"]) == 2
    assert "--resume: digest is" in capsys.readouterr().err


def test_only_checkpoints_have_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ablation.main(["--agent", "reserve", "--out", str(tmp_path / "x.json")]) == 2
    assert "--agent: 'reserve' is no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--seeds", "0"], "--seeds"),
        (["--scenarios", "nowhere"], "nowhere"),
        (["--agent", "/nowhere/agent"], "/nowhere/agent"),
        (["--out", "/"], "--out"),
    ],
)
def test_ablation_refuses_before_any_work(words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "a")
    assert ablation.main(["--agent", str(folder), "--out", str(tmp_path / "x.json"), *words]) == 2
    assert named in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_agent_without_levels_of_the_peak_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "a", Recipe(action_set="reserve"))
    assert ablation.main(["--agent", str(folder), "--out", str(tmp_path / "x.json")]) == 2
    assert "'reserve', must be 'peak'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"suite": "bench-v2", "rows": [], "num_requests": [1, 2]})])
def test_a_file_of_something_else_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    for written in (None, text):
        if written is not None:
            path.write_text(written)
        words = ["--ablation", str(path), "--rows", str(tmp_path / "rows.csv"), "--out", str(tmp_path / "r.md")]
        assert evaluate.main(words) == 2
        assert "not a file of scripts/ablation.py" in capsys.readouterr().err
