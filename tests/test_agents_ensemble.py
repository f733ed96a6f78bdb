"""Several agents as one: the mean of their logits, whatever their scaling, and a checkpoint like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("safetensors", reason="safetensors is not installed (extra: agents)")

from test_agents_checkpoint import DOMAIN, RECIPES, network_for

from llmsched_agents.checkpoint import load_checkpoint, read_record, save_checkpoint
from llmsched_agents.ensemble import averaged, with_bonus
from llmsched_agents.network import Network
from llmsched_agents.recipe import Recipe
from llmsched_env import ConfigError
from llmsched_env.cli.ensemble import main
from llmsched_env.runner import run_episode


def member(seed: int) -> Network:
    """Each with a scaling of its own, within whose limits observations from 0 to 1 stay."""
    network = network_for(RECIPES["peak"], seed)
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 3.0, network.width).astype(np.float32)
    return dataclasses.replace(network, scale=scale)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_logits_are_the_mean_of_the_members(count: int) -> None:
    members = [member(seed) for seed in range(count)]
    x = np.random.default_rng(9).random((50, members[0].width)).astype(np.float32)
    found = averaged(members).logits(x)
    np.testing.assert_allclose(found, np.mean([m.logits(x) for m in members], axis=0), atol=2e-4)
    lifted = with_bonus(averaged(members), 2, -1.5).logits(x)
    np.testing.assert_allclose(lifted - found, np.where(np.arange(found.shape[1]) == 2, -1.5, 0.0)[None, :].repeat(50, 0), atol=1e-5)


def test_members_must_be_alike() -> None:
    one, other = member(0), network_for(RECIPES["admit-only"])
    flat = Network(one.mean, one.scale, (), (np.zeros((12, one.width), np.float32), np.zeros(12, np.float32)), one.components)
    for bad in ([], [one, other], [flat]):
        with pytest.raises(ConfigError, match="ensemble"):
            averaged(bad)
    dead = dataclasses.replace(one, scale=np.zeros_like(one.scale))
    with pytest.raises(ConfigError, match="scale"):
        averaged([dead, one])


def write(folder: Path, seed: int, recipe: Recipe = RECIPES["peak"]) -> Path:
    record = {"algorithm": "paired-rollouts", "seed": seed, "steps": 5, "wall_seconds": 2.0, "environment_seconds": 1.0, "curve": []}
    layout = recipe.layout_for(DOMAIN.grid()[0].scenario.statistics)
    network = network_for(recipe, seed)
    save_checkpoint(
        folder, network, recipe, DOMAIN, layout, name="one", deterministic=True, record={**record, "versions": {}, "settings": []}
    )
    return folder


def test_the_program_writes_a_checkpoint_that_runs(tmp_path: Path) -> None:
    folders = [write(tmp_path / str(seed), seed) for seed in range(3)]
    assert main([*map(str, folders), "--out", str(tmp_path / "all"), "--name", "three", "--bonus", "0.97", "-1"]) == 0
    setting = DOMAIN.grid()[0]
    agent = load_checkpoint(tmp_path / "all", setting.setting)
    assert agent.name == "three" and agent.network.layers[0][0].shape[0] == 3 * 8
    record = read_record(tmp_path / "all")
    assert record["algorithm"] == "mean of 3 by paired-rollouts" and record["wall_seconds"] == 6.0
    assert [m["seed"] for m in record["members"]] == [0, 1, 2] and record["bonus"] == {"level": 0.97, "logits": -1.0}
    result = run_episode(agent, setting.scenario.generate(0, rate=setting.rate, num_requests=60))
    assert result.summary.completed == 60


def test_the_program_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write(tmp_path / "a", 0), write(tmp_path / "b", 1)
    other = write(tmp_path / "c", 2, RECIPES["reserve"])
    out = ["--out", str(tmp_path / "out")]
    for words, message in (
        ([str(a), *out], "at least 2"),
        ([str(a), str(other), *out], "another recipe"),
        ([str(a), str(tmp_path / "none"), *out], "is not one"),
        ([str(a), str(b), *out, "--bonus", "0.123", "1"], "--bonus: level 0.123"),
        ([str(a), str(b), "--out", str(a / "config.json")], "--out"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
