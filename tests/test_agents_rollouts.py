"""Learning from paired roll-outs: what is compared, caution, and a training that ends in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra: agents)")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed (extra: agents)")

from llmsched_agents.checkpoint import load_checkpoint, read_record
from llmsched_agents.domain import Domain
from llmsched_agents.hyperparameters import read_hyperparameters
from llmsched_agents.rollout_training import RolloutTraining
from llmsched_env import ConfigError
from llmsched_env.runner import run_episode

DOMAIN = Domain(("azure-conv",), (0.9, 1.2), (600,))
SMALL = {"n_envs": 4, "env_kwargs": {"num_requests": 120, "backlog": [0, 30]}, "recipe.num_classes": 4}
PLAN = {"rollouts.rounds": 1, "rollouts.states": 4, "rollouts.epochs": 5, "rollouts.held_out": 0.25}


def training(out: Path, entry: str = "generalist", reward: Any = "latency", **changes: Any) -> RolloutTraining:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    hyper = read_hyperparameters("paired-rollouts", entry, changes={**SMALL, **PLAN, **named})
    return RolloutTraining(hyper, DOMAIN.grid(), DOMAIN, out, seed=3, reward=reward, threads=1)


@pytest.mark.parametrize(("entry", "reward"), [("generalist", "latency"), ("slo", {"name": "slo_goodput", "ttft": 1.0, "tpot": 0.1})])
def test_costs_are_relative_to_the_choice_whatever_their_sign(entry: str, reward: Any, tmp_path: Path) -> None:
    run = training(tmp_path, entry, reward)
    run.run()
    data = run.rollouts.data
    assert data is not None and len(data) > 4
    assert not np.take_along_axis(data.costs, data.chosen[:, None], axis=1).any()
    assert np.isfinite(data.costs).all() and np.abs(data.costs).max() > 0
    agent = load_checkpoint(tmp_path / "agent")
    workload = DOMAIN.grid()[0].scenario.generate(1, rate=3.0, num_requests=20)
    assert run_episode(agent, workload).summary.completed == 20
    assert read_record(tmp_path / "agent")["algorithm"] == "paired-rollouts"


def test_a_gain_below_the_caution_changes_nothing(tmp_path: Path) -> None:
    bold, careful = training(tmp_path / "a", rollouts__caution=0.0), training(tmp_path / "b", rollouts__caution=0.9)
    for run in (bold, careful):
        run.run()
    first = careful.rollouts.first
    assert careful.hyper.recipe.choices[first] == 0.99
    seen = careful.rollouts.data
    assert seen is not None
    chosen = load_checkpoint(tmp_path / "b" / "agent").predict(seen.observations)[:, 0]
    assert (chosen == first).all()
    assert (load_checkpoint(tmp_path / "a" / "agent").predict(seen.observations)[:, 0] != first).any()
    with pytest.raises(ConfigError, match="caution"):
        training(tmp_path / "c", rollouts__caution=1.0)


def test_a_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = training(tmp_path / "a", rollouts__rounds=2)
    whole.run()
    part = training(tmp_path / "b", rollouts__rounds=2)
    part.rollouts.round()
    part.save()
    resumed = training(tmp_path / "b", rollouts__rounds=2)
    resumed.restore()
    resumed.run()
    for name, value in whole.rollouts.network().tensors().items():
        np.testing.assert_allclose(resumed.rollouts.network().tensors()[name], value, atol=1e-5)
