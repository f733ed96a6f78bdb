"""The wheel holds the four packages with their data, and works in a clean environment away from the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("llmsched_env", "baselines", "agents", "hardware")

EPISODE = """
import sys
import gymnasium
env = gymnasium.make("llmsched_env:LLMSched-v0", scenario="azure-conv", rate=6.0, num_requests=20)
env.reset(seed=1)
env.action_space.seed(1)
done = False
while not done:
    _, _, terminated, truncated, info = env.step(env.action_space.sample())
    done = terminated or truncated
import llmsched_agents, baselines, hardware, llmsched_env
from llmsched_baselines import Setting, make_policy
scenario = env.unwrapped.scenario
make_policy("wait", Setting(statistics=scenario.statistics, rate=4.0, engine=scenario.engine), overload=True)
print(int(info["summary"]["completed"]))
print(llmsched_env.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT))
    (path,) = folder.glob("*.whl")
    return path


def run(*command: str, cwd: Path = ROOT) -> str:
    """Standard output of a command that must succeed; Python's own settings do not reach it."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    sources = {str(path.relative_to(ROOT)) for path in files if path.suffix in (".py", ".json")}
    assert sources <= set(names)
    assert any(name.endswith(".json") for name in names)
    assert not [name for name in names if name.endswith((".pyc", ".nbi", ".nbc"))]


def test_installs_and_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", str(venv))
    python = str(venv / "bin" / "python")
    run(python, "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt"), str(wheel))
    completed, file = run(python, "-c", EPISODE, cwd=tmp_path).splitlines()
    assert completed == "20"
    assert Path(file).is_relative_to(venv)
