"""The programs in examples/ run with the real libraries, and what they print is true. Each in a process of its own.

``make test-tools`` runs them in the environments of ``requirements/tools-*.txt``; elsewhere those whose library is missing are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
SAME = "the loaded (model takes the same actions|policy is the same): True"


def need(modules: str, requirements: str) -> None:
    """Skip where a module cannot be found, with the command that installs it."""
    for name in modules.split():  # packages before what lies in them: to look into one that is missing is an error
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; run: pip install {requirements}")


def run(folder: Path, *command: str) -> str:
    """What a program prints, run in ``folder`` with one thread for torch."""
    variables = os.environ | {"OMP_NUM_THREADS": "1", "MINARI_DATASETS_PATH": str(folder / "minari"), "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run([sys.executable, *command], cwd=folder, env=variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def example(name: str, folder: Path, budget: int) -> str:
    return run(folder, str(EXAMPLES / f"{name}.py"), str(budget))


def seconds(text: str) -> list[float]:
    """Latencies that a program printed: every one a positive number."""
    found = [float(value) for value in re.findall(r"(-?\d+\.\d+|nan) s\b", text)]
    assert found and all(0.0 < value < 1000.0 for value in found), text
    return found


@pytest.mark.slow
def test_sb3_ppo(tmp_path: Path) -> None:
    need("stable_baselines3", "-e '.[agents]'")
    found = example("sb3_ppo", tmp_path, 4096)
    assert re.search(SAME, found)
    kept = {"best_model.zip", "evaluations.npz", "model.zip", "normalization.pkl"}
    assert {path.name for path in (tmp_path / "sb3_ppo").iterdir()} == kept


@pytest.mark.slow
def test_sb3_maskable_ppo(tmp_path: Path) -> None:
    need("stable_baselines3 sb3_contrib", "-e '.[agents]'")
    found = example("sb3_maskable_ppo", tmp_path, 2048)
    assert "every action was legal: True" in found and re.search(SAME, found) and seconds(found)


@pytest.mark.slow
def test_cleanrl_ppo(tmp_path: Path) -> None:
    need("torch", "-e '.[agents]'")
    assert len(seconds(example("cleanrl_ppo", tmp_path, 3))) == 3


@pytest.mark.slow
def test_minari_dataset(tmp_path: Path) -> None:
    need("minari h5py", "-e '.[minari]'")
    need("torch", "-e '.[agents]'")
    shares = [float(share) for share in re.findall(r"([\d.]+)% of the components", example("minari_dataset", tmp_path, 3))]
    assert shares[-1] >= 99.0 > shares[0], shares
    assert (tmp_path / "minari" / "llmsched" / "busy-admit-v0" / "data" / "main_data.hdf5").is_file()


@pytest.mark.slow
def test_gymnasium_vectors(tmp_path: Path) -> None:
    lines = dict(line.split(":") for line in example("gymnasium_vectors", tmp_path, 1200).strip().splitlines())
    assert lines["sync"] == lines["async"] == lines["vector_entry_point"], "the native environment is the scalar ones, step by step"
    assert int(lines["native, SAME_STEP"].split()[0]) >= int(lines["sync"].split()[0]) > 4
    assert len(lines) == 5 + ("scalar, filmed" in lines)
    assert ("scalar, filmed" in lines) == bool(list(tmp_path.glob("videos/*.mp4")))


@pytest.mark.slow
def test_rllib_ppo(tmp_path: Path) -> None:
    need("ray ray.rllib torch tree", "-r requirements/tools-rllib.txt")
    found = example("rllib_ppo", tmp_path, 1)
    assert re.search(SAME, found) and seconds(found) and (tmp_path / "rllib_ppo" / "rllib_checkpoint.json").is_file()


@pytest.mark.slow
def test_rllib_cluster(tmp_path: Path) -> None:
    need("ray ray.rllib torch tree", "-r requirements/tools-rllib.txt")
    found = example("rllib_cluster", tmp_path, 1)
    assert re.search(SAME, found) and "every choice can take the call: True" in found
    assert (tmp_path / "rllib_cluster" / "rllib_checkpoint.json").is_file()


@pytest.mark.slow
def test_torchrl_gym(tmp_path: Path) -> None:
    need("torchrl", "-r requirements/tools-torchrl.txt")
    found = example("torchrl_gym", tmp_path, 2)
    assert "specs hold" in found
    assert [int(n) > 0 for n in re.findall(r"(\d+) episodes", found)] == [True, True]


@pytest.mark.slow
def test_tianshou_ppo(tmp_path: Path) -> None:
    need("tianshou", "-r requirements/tools-tianshou.txt")
    found = example("tianshou_ppo", tmp_path, 1)
    assert re.search(SAME, found) and seconds(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo.yml", "ppo-operate.yml"])
def test_rl_zoo3(tmp_path: Path, name: str) -> None:
    need("rl_zoo3", "-r requirements/tools-zoo.txt")
    short = ["num_requests:20", *(["action_set:'operate'"] if name == "ppo-operate.yml" else [])]
    common = ["--algo", "ppo", "--env", "LLMSched-v1", "--gym-packages", "llmsched_env", "--env-kwargs", *short]
    file = ROOT / "agents" / "llmsched_agents" / "hyperparams" / "rl_zoo3" / name
    settings = ["--conf-file", str(file), "--eval-env-kwargs", *short]
    run(tmp_path, "-m", "rl_zoo3.train", *common, *settings, "-n", "2048", "--eval-freq", "1000", "--eval-episodes", "2", "--seed", "0")
    folder = tmp_path / "logs" / "ppo" / "LLMSched-v1_1"
    assert (folder / "LLMSched-v1.zip").is_file() and (folder / "LLMSched-v1" / "vecnormalize.pkl").is_file()
    found = run(tmp_path, "-m", "rl_zoo3.enjoy", *common, "--folder", "logs", "--no-render", "-n", "200")
    assert re.search(r"Mean reward: -\d+\.\d+", found), found


@pytest.mark.slow
def test_openenv_server(tmp_path: Path) -> None:
    need("openenv uvicorn", "-r requirements/tools-zoo.txt")
    found = example("openenv_server", tmp_path, 10)
    steps = re.search(r"10 requests in (\d+) steps, return -([\d.]+)", found)
    assert steps and int(steps[1]) > 1
    assert seconds(found) == [pytest.approx(float(steps[2]), abs=2e-4)], "the return is minus the mean latency"


def test_openenv_environment() -> None:
    need("openenv", "-r requirements/tools-zoo.txt")
    from llmsched_agents.openenv import SchedulingAction, SchedulingEnvironment
    from llmsched_env import ConfigError, LLMSchedEnv

    env, plain = SchedulingEnvironment(num_requests=5), LLMSchedEnv(num_requests=5)
    seen, (features, info) = env.reset(seed=3, episode_id="mine"), plain.reset(seed=3)
    while not seen.done:
        assert {name: array.tolist() for name, array in features.items()} == seen.features
        assert seen.action_mask == info["action_mask"].tolist() and seen.clock == info["clock"]
        seen = env.step(SchedulingAction(values=[2, 0]))
        features, reward, *_, info = plain.step([2, 0])
        assert seen.reward == reward
    assert seen.summary == info["summary"] and not seen.truncated and env.state.episode_id == "mine"
    assert env.state.episode_return == pytest.approx(-seen.summary["latency_mean"])
    with pytest.raises(ConfigError, match="action"):
        env.step(SchedulingAction(values=[99, 0]))
    with pytest.raises(ConfigError, match="options"):
        env.reset(rates=3.0)


@pytest.mark.slow
def test_program_search(tmp_path: Path) -> None:
    found = example("program_search", tmp_path, 4)
    scores = [float(score) for score in re.findall(r"limit .*: score (\S+)", found)]
    assert len(scores) == 5 and scores[-1] == float("-inf") and "SyntaxError" in found
    assert float(found.split()[-1]) == max(scores) > scores[0]


def test_examples_are_short_and_listed() -> None:
    programs = sorted(EXAMPLES.glob("*.py"))
    assert len(programs) >= 9
    assert [path.name for path in programs if len(path.read_text(encoding="utf-8").splitlines()) > 60] == []
    page = (ROOT / "docs" / "tools.md").read_text(encoding="utf-8")
    assert [path.name for path in programs if f"examples/{path.name}" not in page] == []
