"""Demonstrations, behaviour cloning and DAgger."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra: agents)")
pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed (extra: agents)")
pytest.importorskip("safetensors", reason="safetensors is not installed (extra: agents)")

import torch as th

from llmsched_agents.agent import Agent
from llmsched_agents.checkpoint import load_checkpoint, read_record
from llmsched_agents.cloning import clone_policy, fit
from llmsched_agents.demonstrations import Demonstrations, expert_recipe, read_demonstrations, read_episode, record_episode, write_episode
from llmsched_agents.domain import Domain
from llmsched_agents.network import network_of, set_actor
from llmsched_baselines import Policy, make_policy
from llmsched_env import ConfigError
from llmsched_env.cli import collect
from llmsched_env.runner import run_episode

DOMAIN = Domain(("azure-conv",), (0.95,), (400,), ("a100-llama2-7b-c10",))
SETTING = DOMAIN.grid()[0]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    th.set_num_threads(1)


def expert(name: str = "reserve") -> Policy:
    return make_policy(name, SETTING.setting, overload=True, **({"theta": 1.0} if name == "reserve" else {}))


def demonstrations(episodes: int, name: str = "reserve", requests: int = 60) -> Demonstrations:
    policy = expert(name)
    recipe = expert_recipe(policy, 6, features=name == "reserve")
    made = []
    for seed in range(episodes):
        workload = SETTING.scenario.generate(seed, rate=SETTING.rate, num_requests=requests)
        made.append(record_episode(policy, recipe, SETTING, workload)[0])
    return Demonstrations.joined(made)


def test_recorded_episodes_are_the_experts_own() -> None:
    policy = expert()
    workload = SETTING.scenario.generate(1, rate=SETTING.rate, num_requests=80)
    episode, inexact = record_episode(policy, expert_recipe(policy, 16), SETTING, workload)
    assert inexact == 0
    truth = run_episode(expert(), workload)
    assert -episode.rewards.sum() == pytest.approx(truth.summary.latency_mean, rel=1e-4)
    assert episode.seconds.sum() == pytest.approx(truth.counters.clock, rel=1e-5)
    chosen = np.concatenate([np.zeros((len(episode), 1), int), episode.actions], axis=1)
    assert chosen.shape[1] == 3
    columns = episode.actions + np.array([0, 2])
    assert np.take_along_axis(episode.masks, columns.astype(np.int64), axis=1)[:, 1].all()  # every count was legal


def test_decisions_beyond_the_action_space_are_counted() -> None:
    policy = make_policy("reserve", SETTING.setting, theta=0.5)
    workload = SETTING.scenario.generate(1, rate=SETTING.rate, num_requests=60).with_backlog(60)  # many enter at once, not all
    _, inexact = record_episode(policy, expert_recipe(policy, 2), SETTING, workload, max_steps=20_000)
    assert inexact > 0


def test_experts_with_known_lengths_can_be_recorded() -> None:
    policy = make_policy("wait", SETTING.setting, overload=True)
    recipe = expert_recipe(policy, 8)
    assert recipe.known_lengths and recipe.layout is not None and recipe.layout.reveals_output_length
    workload = SETTING.scenario.generate(2, rate=SETTING.rate, num_requests=30)
    episode, _ = record_episode(policy, recipe, SETTING, workload)
    assert len(episode) > 100


def test_a_clone_decides_as_its_expert_and_performs_like_it() -> None:
    data = demonstrations(10)
    policy = clone_policy(data, [64, 64], 1, 6, seed=0)
    report = fit(policy, data, epochs=25, seed=0)
    assert report.accuracy > 0.9
    recipe = expert_recipe(expert(), 6, features=True)
    agent = Agent(network_of(policy), recipe, SETTING.setting, deterministic=True)
    ours, theirs, greedy = [], [], []
    for seed in range(100, 104):
        workload = SETTING.scenario.generate(seed, rate=SETTING.rate, num_requests=80)
        ours.append(run_episode(agent, workload).summary.latency_mean)
        theirs.append(run_episode(expert(), workload).summary.latency_mean)
        greedy.append(run_episode(make_policy("vllm", SETTING.setting), workload).summary.latency_mean)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=0.08)
    # the weights that are kept are the best seen, and equal in numpy and torch
    observed = data.observations[:50]
    padded = th.as_tensor(observed)
    np.testing.assert_allclose(agent.network.logits(observed), policy.logits(padded).detach().numpy(), atol=1e-4)
    copy = clone_policy(data, [64, 64], 1, 6, seed=9)
    set_actor(copy, agent.network)
    th.testing.assert_close(copy.logits(padded), policy.logits(padded))
    with pytest.raises(ConfigError, match="layers"):
        set_actor(clone_policy(data, [8], 1, 6), agent.network)


def test_data_of_another_shape_is_refused() -> None:
    data = demonstrations(1, requests=10)
    with pytest.raises(ConfigError, match="components"):
        fit(clone_policy(data, [8], 2, 6), data)
    other = Demonstrations(data.observations[:, :-1], data.masks, data.actions, data.rewards, data.seconds, data.starts)
    with pytest.raises(ConfigError, match="observations"):
        fit(clone_policy(data, [8], 1, 6), other)


def test_episodes_survive_the_disk(tmp_path: Path) -> None:
    data = demonstrations(1, requests=10)
    write_episode(tmp_path / "episode-00000.npz", data)
    back = read_episode(tmp_path / "episode-00000.npz")
    for name in ("observations", "masks", "actions", "rewards", "seconds"):
        np.testing.assert_array_equal(getattr(back, name), getattr(data, name))
    (tmp_path / "episode-00001.npz").write_bytes(b"cut off")
    with pytest.raises(ConfigError, match="episode-00001"):
        read_episode(tmp_path / "episode-00001.npz")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_demonstrations(tmp_path)
    assert not list(tmp_path.glob(".*"))


# --- llmsched collect -----------------------------------------------------------------------------------
COMMAND = ["--expert", "reserve", "--set", "policy.theta=1.0", "--loads", "0.9", "--kv", "400", "--num-requests", "30", "--max-admit", "6"]


def run(out: Path, *words: str, episodes: int = 2) -> int:
    return collect.main([*COMMAND, "--out", str(out), "--episodes", str(episodes), "--quiet", *words])


def test_collect_goes_on_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demos"
    assert run(out) == 0
    first = (out / "episode-00000.npz").stat().st_mtime_ns
    (out / "episode-00001.npz").unlink()
    capsys.readouterr()
    assert run(out, episodes=3) == 2
    assert "holds recordings already; use --resume" in capsys.readouterr().err
    assert run(out, "--resume", episodes=3) == 0
    assert (out / "episode-00000.npz").stat().st_mtime_ns == first
    data, description = read_demonstrations(out)
    assert len(list(data.episodes())) == 3 and description["expert"] == "reserve"
    assert sum(rows.stop - rows.start for rows in data.episodes()) == len(data)
    capsys.readouterr()
    assert run(out, "--resume", "--no-features") == 2
    assert "--resume: recipe is" in capsys.readouterr().err
    assert run(out, "--overwrite", "--no-features", "--json", str(tmp_path / "found.json"), episodes=1) == 0
    assert [path.name for path in sorted(out.glob("*.npz"))] == ["episode-00000.npz"], "those of the other recipe are gone"
    assert json.loads((tmp_path / "found.json").read_text())["found"]["decisions"] == len(read_demonstrations(out)[0])


def test_an_interrupted_recording_keeps_its_episodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = collect.Recorder.episode

    def interrupted(recorder: collect.Recorder, number: int) -> tuple[Demonstrations, int]:
        if number == 1:
            raise KeyboardInterrupt
        return whole(recorder, number)

    with monkeypatch.context() as changed:
        changed.setattr(collect.Recorder, "episode", interrupted)
        assert run(tmp_path / "a") == 130
    assert len(list((tmp_path / "a").glob("*.npz"))) == 1
    assert run(tmp_path / "a", "--resume") == 0 == run(tmp_path / "b")
    ours, theirs = (read_demonstrations(tmp_path / name)[0] for name in "ab")
    np.testing.assert_array_equal(ours.actions, theirs.actions)


def test_an_expert_of_ones_own_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_module = "from llmsched_baselines import make_policy\n\n\ndef expert(setting, theta: float = 1.0):\n"
    (tmp_path / "own_expert.py").write_text(own_module + '    return make_policy("reserve", setting, theta=theta)\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["--set", "policy.theta=0.7", "--loads", "0.9", "--kv", "400", "--num-requests", "30", "--max-admit", "6", "--episodes", "1"]
    for name, expert in (("own", "own_expert:expert"), ("reserve", "reserve"), ("agent", "generalist")):
        given = words[2:] if name == "agent" else words
        assert collect.main(["--expert", expert, *given, "--out", str(tmp_path / name), "--quiet"]) == 0
    own, theirs, agent = (read_demonstrations(tmp_path / name)[0] for name in ("own", "reserve", "agent"))
    np.testing.assert_array_equal(own.actions, theirs.actions)
    assert len(agent) > 10


def test_collect_clones_and_improves_the_clone(tmp_path: Path) -> None:
    folder = tmp_path / "clone"
    assert run(tmp_path / "demos", "--clone", str(folder), "--dagger", "1", "--epochs", "3", "--net-arch", "16") == 0
    agent = load_checkpoint(folder)
    assert agent.name == "reserve-clone" and agent.layout == expert().layout
    record = read_record(folder)
    assert [r["decisions"] for r in record["rounds"]] == sorted(r["decisions"] for r in record["rounds"])
    assert len(record["rounds"]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--expert", "reserv"], "did you mean"),
        (["--episodes", "0"], "--episodes"),
        (["--scenario", "azure"], "scenario"),
        (["--set", "policy.thet=1"], "theta"),
    ],
)
def test_collect_refuses(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert collect.main([*COMMAND, "--out", str(tmp_path / "x"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_collect_exports_to_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    minari = pytest.importorskip("minari", reason="minari is not installed (extra: minari)")
    pytest.importorskip("h5py", reason="h5py is not installed (extra: minari)")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    assert run(tmp_path / "demos", "--minari", "llmsched/reserve-v0") == 0
    data, _ = read_demonstrations(tmp_path / "demos")
    dataset = minari.load_dataset("llmsched/reserve-v0")
    assert dataset.total_episodes == 2 and dataset.total_steps == len(data)
    first = next(iter(dataset.iterate_episodes()))
    rows = next(iter(data.episodes()))
    np.testing.assert_array_equal(first.observations[:-1], data.observations[rows])
    np.testing.assert_array_equal(first.actions, data.actions[rows])
    assert json.loads(dataset.storage.metadata["description"])["expert"] == "reserve"
