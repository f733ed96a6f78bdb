"""The hyper-parameters for rl_zoo3: every entry is read, accepted and documented; the search is what it says it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

for _name in ("torch", "stable_baselines3", "yaml", "scipy", "tyro"):
    pytest.importorskip(_name, reason="needs the extras agents and cli")

import llmsched_env.bench.zoo as search  # noqa: E402
from llmsched_agents.zoo import POLICY, WRAPPER, ZOO_FILES, ZOO_FOLDER, ZooEntry, ppo_options, read_zoo, zoo_text  # noqa: E402
from llmsched_env.bench.zoo import CANDIDATES, TASKS, ZooPlan, ZooRow, ZooTask, best_constant, everything, result  # noqa: E402
from llmsched_env.cli import main  # noqa: E402
from llmsched_env.errors import ConfigError  # noqa: E402
from llmsched_env.row_file import read_rows  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hyperparameters.md"
SHIPPED = {action_set: read_zoo(ZOO_FOLDER / name) for action_set, name in ZOO_FILES.items()}
MEASURED = [task for task in TASKS if task.environment.id in SHIPPED[task.action_set]]
"""In the order of the tasks."""
ZOO_OWN = {
    "n_envs", "n_timesteps", "policy", "env_wrapper", "normalize", "env_kwargs", "policy_kwargs", "frame_stack",
    "vec_env_wrapper", "callback", "monitor_kwargs",
}  # fmt: skip
"""Keys that rl_zoo3 2.9.2 takes for itself (``rl_zoo3/exp_manager.py``); the rest go to the algorithm's constructor."""
SMALL: dict[str, Any] = {
    "n_envs": 2,
    "n_timesteps": 1.0e3,
    "policy": POLICY,
    "env_wrapper": WRAPPER,
    "normalize": {"norm_obs": True, "norm_reward": True},
    "env_kwargs": {"num_requests": 20},
    "n_steps": 8,
    "batch_size": 16,
    "learning_rate": "lin_1.0e-3",
}


def task(name: str) -> ZooTask:
    return next(task for task in TASKS if task.name == name)


def test_entries_and_page_are_of_the_same_environments() -> None:
    rows = [line.split("`")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `LLMSched")]
    assert rows == [task.name for task in MEASURED] * 2, "a row in each of the two tables"
    assert sum(len(entries) for entries in SHIPPED.values()) == len(MEASURED), "no entry of an unknown environment"
    assert {"LLMSched-v1", "LLMSched-v1:operate"} <= set(rows)


@pytest.mark.parametrize("one", MEASURED, ids=lambda task: task.name)
def test_every_entry_is_accepted(one: ZooTask) -> None:
    entry = SHIPPED[one.action_set][one.environment.id]
    assert dict(entry.env_kwargs) == one.env_kwargs
    assert set(entry.values()) <= ZOO_OWN | set(ppo_options())
    assert entry.n_envs * entry.options["n_steps"] % entry.options["batch_size"] == 0, "PPO would cut a batch off"
    # a few hundred decisions of short episodes: everything of the entry but the amounts
    options = {**entry.options, "n_steps": 256 // entry.n_envs, "batch_size": 128}
    agent = dataclasses.replace(entry, options=options, env_kwargs={**entry.env_kwargs, "num_requests": 40}).train(0, steps=512)
    assert agent.steps == 512
    played = agent.returns(3, 0)
    assert played.shape == (3,) and np.all(played < 0)


@pytest.mark.parametrize("one", MEASURED, ids=lambda task: task.name)
def test_the_page_says_what_ships(one: ZooTask) -> None:
    entry = SHIPPED[one.action_set][one.environment.id]
    lines = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith(f"| `{one.name}` |")]
    scores, costs = lines
    who = costs[2].strip(" `")
    assert entry == one.entry(who, entry.n_timesteps)
    assert entry.n_timesteps <= int(costs[3].replace(",", ""))
    threshold = one.environment.reward_threshold
    assert scores[6].strip() == ("-" if threshold is None else f"{threshold:g}")


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "ppo.yml"
    entries = {one.environment.id: one.entry(who, 1000) for one, who in zip(TASKS, CANDIDATES, strict=False) if not one.action_set}
    path.write_text(zoo_text(entries, "One.\n\nTwo."))
    assert path.read_text().startswith("# One.\n#\n# Two.\n\nLLMSched")
    assert read_zoo(path) == entries


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_step": 8}, "n_step: unknown to rl_zoo3 and to PPO; did you mean 'n_steps'?"),
        ({"seed": 3}, "seed: unknown"),
        ({"policy": "CnnPolicy"}, "policy: 'CnnPolicy', must be 'MlpPolicy'"),
        ({"env_wrapper": None}, "env_wrapper: None, must be"),
        ({"n_envs": 0}, "n_envs: 0, must be an integer >= 1"),
        ({"n_timesteps": "1e6"}, "n_timesteps: '1e6', must be an integer"),
        ({"normalize": {"norm_obs": 1}}, "normalize: {'norm_obs': 1}, must have"),
        ({"normalize": "true"}, "normalize: 'true', must be a mapping"),
        ({"env_kwargs": ["operate"]}, "env_kwargs: ['operate'], must be a mapping"),
        ({"learning_rate": "cos_1"}, "must be a number or lin_NUMBER"),
    ],
)
def test_it_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ZooEntry.of("LLMSched-v1", {**SMALL, **changes})
    assert message in str(refused.value)


def test_the_environment_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ConfigError, match="action_set"):
        ZooEntry.of("LLMSched-v1", {**SMALL, "env_kwargs": {"action_set": "operates"}}).train(0)


def test_files_that_are_none(tmp_path: Path) -> None:
    for text, message in (("a: [", "is not YAML"), ("- a", "has no entries"), ("a: 1", "hyperparameters.a: 1, must be a mapping")):
        path = tmp_path / "ppo.yml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_zoo(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_zoo(tmp_path / "nowhere.yml")


def test_the_same_seed_is_the_same_agent() -> None:
    entry = ZooEntry.of("LLMSched-v1", SMALL)
    first, second, other = (entry.train(seed, steps=64).returns(4, 7) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, second)
    assert first.shape == other.shape == (4,)


def test_yardsticks_are_played_on_the_episodes_of_the_table() -> None:
    one = task("LLMSchedEasy-v1")
    admits, constant = everything(one, 3), best_constant(one, 3)
    assert admits.who == "fcfs" and constant.who == "level 0.9"
    assert len(admits.values) == len(constant.values) == 3 and np.all(constant.values > admits.values)


@pytest.fixture
def small_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two candidates with small roll-outs, of whom one goes on."""
    small = {**CANDIDATES["plain"], "n_envs": 4, "n_steps": 16, "batch_size": 32, "n_epochs": 1}
    monkeypatch.setattr(search, "CANDIDATES", {"plain": small, "fast": {**small, "learning_rate": "lin_1.0e-2"}})
    monkeypatch.setattr(search, "FINALISTS", 1)
    monkeypatch.setattr(search, "TUNING_EPISODES", 4)
    monkeypatch.setattr("llmsched_env.pages.hyperparameters.page.CANDIDATES", search.CANDIDATES)


@pytest.mark.usefixtures("small_search")
def test_a_search_is_resumed_and_chooses_by_the_long_round() -> None:
    one, plan = task("LLMSchedEasy-v1"), ZooPlan(short_steps=64, steps=128, episodes=2, trainings=2)
    rows = list(plan.rows(one, []))
    assert [row.round for row in rows] == ["everything", "constant", *["short"] * 4, *["long"] * 4, "last", "last"]
    assert [row.seed for row in rows] == [-1, -1, 0, 1, 0, 1, 0, 1, 0, 1, 100, 101]
    assert [len(row.values) for row in rows] == [2, 2, *[4] * 8, 2, 2]
    assert [row.steps for row in rows] == [0, 0, *[64] * 4, *[128] * 6]
    best = max(("plain", "fast"), key=lambda who: sum(row.score for row in rows[6:10] if row.who == who))
    assert {row.who for row in rows[10:]} == {best}
    for cut in (1, 4, 7, 11):
        again = list(plan.rows(one, rows[:cut]))
        assert [dataclasses.replace(row, seconds=0.0, processor_seconds=0.0) for row in again] == [
            dataclasses.replace(row, seconds=0.0, processor_seconds=0.0) for row in rows[cut:]
        ]
    found = result(one, rows)
    assert found is not None and found.who == best
    assert found.learned.mean == pytest.approx(np.mean([row.score for row in rows[-2:]]))
    assert found.difference.mean == pytest.approx(found.learned.mean - rows[1].score)
    assert result(one, rows[:10]) is None


@pytest.mark.usefixtures("small_search")
def test_the_command_writes_rows_page_and_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page, folder = tmp_path / "rows", tmp_path / "page.md", tmp_path / "files"
    amounts = ["--short-steps", "64", "--steps", "128", "--episodes", "2", "--trainings", "1"]
    words = ["zoo", "--environments", "LLMSchedEasy-v1", *amounts, "--out", str(out), "--page", str(page), "--hyperparams", str(folder)]
    assert main([*words, "--machine", "On this one."]) == 0
    text, printed = page.read_text(), capsys.readouterr().out
    assert text.strip() == printed.strip() and "On this one." in text and "## What was tried" in text
    rows = read_rows(out / "trainings.csv", ZooRow)
    assert read_zoo(folder / "ppo.yml") == {"LLMSchedEasy-v1": task("LLMSchedEasy-v1").entry(rows[-1].who, 128)}
    assert not (folder / "ppo-operate.yml").exists()
    assert main(words) == 2 and "--resume" in capsys.readouterr().err
    assert main([*words, "--resume", "--quiet"]) == 0
    assert read_rows(out / "trainings.csv", ZooRow) == rows, "nothing was missing"
    assert main([*words, "--resume", "--steps", "256"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--environments", "LLMSchedEasy-v1:operate"], "environments: 'LLMSchedEasy-v1:operate', must be among LLMSched-v1, "),
        (["--candidates", "plainer"], "--candidates: 'plainer', must be among plain, "),
        (["--episodes", "1"], "--episodes: 1, must be at least 2"),
        (["--steps", "0"], "--steps: 0"),
        (["--shipped", "--hyperparams", "x"], "--hyperparams: nothing is chosen with --shipped"),
    ],
)
def test_the_command_refuses(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", *words, "--out", str(tmp_path / "rows")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "rows").exists()
