"""The wheel holds the four packages with their data, and works in clean environments away from the checkout."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "llmsched_command": ROOT,
    "llmsched_env": ROOT,
    "llmsched_baselines": ROOT / "baselines",
    "llmsched_agents": ROOT / "agents",
    "llmsched_hardware": ROOT / "hardware",
}

EPISODE = """
import sys
import gymnasium
env = gymnasium.make("llmsched_env:LLMSched-v1", scenario="azure-conv", rate=6.0, num_requests=20)
env.reset(seed=1)
env.action_space.seed(1)
done = False
while not done:
    _, _, terminated, truncated, info = env.step(env.action_space.sample())
    done = terminated or truncated
import llmsched_agents, llmsched_baselines, llmsched_env, llmsched_hardware
from llmsched_baselines import Setting, make_policy
scenario = env.unwrapped.scenario
make_policy("wait", Setting(statistics=scenario.statistics, rate=4.0, engine=scenario.engine), overload=True)
print(int(info["summary"]["completed"]))
print(llmsched_env.__file__)
"""

OWN_AGENT = '''
from llmsched_baselines import Policy
from llmsched_env import Decision


class MyAgent(Policy):
    """Admits while fewer than 96 requests hold KV."""

    name = "my-agent"

    def decide(self, view):
        return Decision.of(run=[1], admit=[max(96 - view.num_residents, 0)])
'''


@dataclass(frozen=True)
class Site:
    """A virtual environment and a folder to work in, both outside the checkout."""

    venv: Path
    folder: Path

    def call(self, *command: object, code: int = 0) -> str:
        """What a program of the environment prints; Python's own settings do not reach it."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        words = [str(self.venv / "bin" / str(command[0])), *map(str, command[1:])]
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + (done.stderr if code else "")

    def install(self, *what: object) -> None:
        self.call("python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", *what)

    @property
    def packages(self) -> Path:
        (found,) = (self.venv / "lib").glob("python*/site-packages")
        return found


def make_site(folder: Path) -> Site:
    site = Site(folder / "venv", folder / "work")
    site.folder.mkdir()
    subprocess.run([sys.executable, "-m", "venv", str(site.venv)], check=True)
    return site


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT)], check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def with_command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Site:
    """An environment with the command, and a module of one's own in the folder one works in."""
    site = make_site(tmp_path_factory.mktemp("command"))
    site.install(f"{wheel}[cli]")
    (site.folder / "mypackage.py").write_text(OWN_AGENT, encoding="utf-8")
    return site


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    for package, root in PACKAGES.items():
        assert f"{package}/__init__.py" in names
        assert f"{package}/py.typed" in names
        files = (path for path in (root / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        sources = {str(path.relative_to(root)) for path in files}
        assert sources <= set(names)
    assert not [name for name in names if name.endswith((".pyc", ".nbi", ".nbc"))]


def test_installs_and_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    site = make_site(tmp_path)
    site.install(wheel)
    completed, file = site.call("python", "-c", EPISODE).splitlines()
    assert completed == "20"
    assert Path(file).is_relative_to(site.venv)
    # the command says what it lacks, in words that work for a package from a file
    said = site.call("llmsched", "compare", "--help", code=2)
    found = re.search(r"error: tyro is not installed; run: pip install '(llmsched-env\[cli\] @ file://\S+\.whl)'", said)
    assert found is not None
    site.call("python", "-m", "pip", "install", "--quiet", "--dry-run", "-c", ROOT / "constraints.txt", found[1])


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


SHORT: Sequence[object] = ("--num-requests", 40, "--seeds", 2, "--jobs", 1, "--quiet")


def test_the_command_compares_what_ships_and_what_one_writes(with_command: Site) -> None:
    site = with_command
    words = ("--scenario", "azure-conv", "--rates", 5, "--policies", "vllm", "generalist", "mypackage:MyAgent", "--out", "o")
    said = site.call("llmsched", "compare", *words, *SHORT)
    assert said == "Report: o/report.html\n"
    assert {row["policy"] for row in rows_of(site.folder / "o" / "summary.csv")} == {"vllm", "generalist", "my-agent"}
    assert (site.folder / "o" / "report.html").stat().st_size > 100_000
    assert "generalist" in site.call("llmsched", "compare", *words[:-1], "p", "--policies", "generalst", code=2)


def test_the_suite_runs_on_an_agent_of_ones_own(with_command: Site) -> None:
    site = with_command
    cell = ("--scenarios", "azure-conv", "--loads", 0.9, "--kv", "40GB", "--parts", "stationary", "--num-requests", 60, "--seeds", 2)
    words = ("--suite", "bench-v2", "--agent", "mypackage:MyAgent", "--policies", "sarathi", *cell, "--jobs", 1)
    site.call("llmsched", "evaluate", *words, "--rows", "rows.csv", "--out", "results.md")
    variants = {row["variant"] for row in rows_of(site.folder / "rows.csv")}
    assert variants == {"vllm (default)", "sarathi (default)", "my-agent"}
    assert "my-agent" in (site.folder / "results.md").read_text(encoding="utf-8")


def test_a_package_adds_a_policy_a_scenario_and_a_reward_from_outside(with_command: Site) -> None:
    site = with_command
    site.install("--no-deps", ROOT / "examples" / "llmsched-example")
    words = ("--scenario", "night-chat", "--policies", "vllm", "at-most", "--set", "policy.at-most.limit=4", "--out", "night")
    site.call("llmsched", "compare", *words, *SHORT)
    latency = {(row["policy"], row["seed"]): float(row["latency_mean"]) for row in rows_of(site.folder / "night" / "summary.csv")}
    assert all(latency["at-most", seed] > latency["vllm", seed] for seed in "01")
    program = (
        "import gymnasium as gym\n"
        "settings = dict(scenario='night-chat', action_set='admit', reward='few-waiting', num_requests=20)\n"
        "one = gym.make('llmsched_env:LLMSched-v1', backlog=5, **settings)\n"
        "many = gym.make_vec('llmsched_env:LLMSched-v1', num_envs=2, **settings)\n"
        "one.reset(seed=0), many.reset(seed=0)\n"
        "print(one.step(one.action_space.sample() * 0)[1] <= -0.05, many.step(many.action_space.sample())[1].shape)\n"
    )
    assert site.call("python", "-c", program) == "True (2,)\n"  # five requests wait from the start, nobody is admitted
    site.call("python", "-m", "pip", "uninstall", "--quiet", "--yes", "llmsched-example")


def lacking(site: Site, distribution: str) -> list[str]:
    """Files of an installed distribution that are no longer there."""
    (record,) = site.packages.glob(f"{distribution}-*.dist-info/RECORD")
    files = [row[0] for row in csv.reader(record.read_text(encoding="utf-8").splitlines())]
    return [name for name in files if not (site.packages / name).exists() and not name.endswith(".pyc")]


@pytest.mark.parametrize("first", ["ours", "openai-agents"])
def test_openai_agents_lives_beside_in_either_order(wheel: Path, tmp_path: Path, first: str) -> None:
    """Its import name is ``agents``; whichever comes second or leaves must not touch the other's files."""
    site = make_site(tmp_path)
    order = [wheel, "openai-agents"] if first == "ours" else ["openai-agents", wheel]
    for one in order:
        site.install("--no-deps", one)
    assert lacking(site, "openai_agents") == lacking(site, "llmsched_env") == []
    assert (site.packages / "agents" / "__init__.py").is_file()
    site.call("python", "-m", "pip", "uninstall", "--quiet", "--yes", "llmsched-env")
    assert lacking(site, "openai_agents") == []
    site.install("--no-deps", wheel)
    site.call("python", "-m", "pip", "uninstall", "--quiet", "--yes", "openai-agents")
    assert lacking(site, "llmsched_env") == []


@pytest.mark.slow
def test_openai_agents_and_ours_are_imported_in_one_program(with_command: Site) -> None:
    site = with_command
    site.call("python", "-m", "pip", "install", "--quiet", "openai-agents")
    program = "import agents, llmsched_agents, llmsched_env\nprint(agents.Agent.__module__, llmsched_agents.__name__)"
    assert site.call("python", "-c", program) == "agents.agent llmsched_agents\n"
