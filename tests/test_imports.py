"""Imports point one way, and importing the environment costs no optional package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("llmsched_env", "baselines", "agents", "hardware", "scripts", "tests")
ALLOWED = {
    "llmsched_env": set(),
    "baselines": {"llmsched_env"},
    "agents": {"llmsched_env", "baselines"},
    "hardware": {"llmsched_env", "baselines"},
    "scripts": {"llmsched_env", "baselines", "agents", "hardware"},
}
BASE = {"llmsched_env", "gymnasium", "numpy", "numba"}
EXTRAS = ("torch", "stable_baselines3", "matplotlib", "scipy", "pygame", "vllm", "joblib", "rich", "jinja2")


def imported_at_module_level(source: str) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of imports that run when the module is imported, those under ``if TYPE_CHECKING`` included."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield node.lineno, (node.module or "").split(".")[0]
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))


def test_the_walk_sees_module_level_imports_alone() -> None:
    source = "import a.b\nif x:\n    from c import d\nclass K:\n    import e\n    def f(self):\n        import g\ndef h():\n    import i\n"
    assert {name for _, name in imported_at_module_level(source)} == {"a", "c", "e"}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package} has no module"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imported_at_module_level(path.read_text(encoding="utf-8"))
        if name in OURS and name != package and name not in ALLOWED[package]
    ]
    assert not wrong


def test_the_environment_needs_the_base_alone() -> None:
    allowed = BASE | set(sys.stdlib_module_names)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in sorted((ROOT / "llmsched_env").rglob("*.py"))
        for line, name in imported_at_module_level(path.read_text(encoding="utf-8"))
        if name not in allowed
    ]
    assert not wrong


WITHOUT_EXTRAS = """
import sys
for extra in {extras!r}:
    sys.modules[extra] = None  # importing it raises ImportError
import gymnasium
env = gymnasium.make("llmsched_env:LLMSched-v0", scenario="azure-conv", num_requests=5)
env.reset(seed=0)
env.action_space.seed(0)
while not any(env.step(env.action_space.sample())[2:4]):
    pass
print("ran an episode")
"""


def test_an_episode_runs_without_any_extra() -> None:
    program = WITHOUT_EXTRAS.format(extras=EXTRAS)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "ran an episode\n", done.stderr


def test_importing_loads_no_extra() -> None:
    # numba imports scipy where it is installed, so what counts is what comes on top of the base
    program = (
        "import sys, gymnasium, numba, numpy\nbefore = set(sys.modules)\nimport llmsched_env\n"
        f"print(sorted(m for m in set(sys.modules) - before if m.split('.')[0] in {EXTRAS!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
