"""Imports point one way, and importing the environment costs no optional package."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Collection, Iterator
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
BASE = {"llmsched_env", "gymnasium", "numpy", "numba", "llvmlite"}  # llvmlite is a part of numba: it does not run without
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


# --- no circles -------------------------------------------------------------------------------------
def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(source: str, modules: Collection[str]) -> set[str]:
    """Modules that a source imports anywhere, in functions and under ``if TYPE_CHECKING`` too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # ``from a import b`` is module a.b where there is one
            both = [(f"{node.module}.{alias.name}", node.module or "") for alias in node.names]
            names = [inner if inner in modules else outer for inner, outer in both]
        found |= {name for name in names if name in modules}
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """One circle of modules, if there is any."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(imports[name]):
            found = walk(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in imports if (found := walk(name, []))), [])


def test_the_search_finds_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    source = "import a.b\nfrom c import d, e\ndef f():\n    from g import h\n    import i as j\n"
    assert imports_of(source, {"a.b", "c", "c.d", "g", "i"}) == {"a.b", "c.d", "c", "g", "i"}


def test_no_modules_import_each_other_in_a_circle() -> None:
    files = {module_name(path): path for package in ALLOWED if package != "scripts" for path in sorted((ROOT / package).rglob("*.py"))}
    assert len(files) > 80
    sources = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    # a package's own __init__ may gather its modules, and is run before them: it counts as a module that imports them
    found = circle({name: imports_of(source, files.keys()) - {name} for name, source in sources.items()})
    assert not found, " -> ".join(found)


def test_nothing_is_imported_by_a_string_but_backends_and_extras() -> None:
    """A string hides an import from the tests above: the environment has two, each with a table or a hint behind it."""
    found = []
    for path in sorted((ROOT / "llmsched_env").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if name in ("import_module", "__import__", "exec", "eval", "find_spec", "run_module", "spec_from_file_location"):
                found.append((module_name(path), name))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("importlib", "runpy", "pkgutil"):
                found += [(module_name(path), alias.name) for alias in node.names if alias.name not in ("resources", "metadata")]
    # errors.require imports optional packages alone, which the test below holds it to
    assert sorted(found) == [("llmsched_env.backend", "import_module"), ("llmsched_env.errors", "import_module")]


def test_the_strings_name_backends_and_extras() -> None:
    from llmsched_env.backend import _BACKENDS

    for target in _BACKENDS.values():
        module, _, attribute = target.partition(":")
        assert (ROOT / Path(*module.split("."))).with_suffix(".py").is_file() and attribute.isidentifier()
    for path in sorted((ROOT / "llmsched_env").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                (module, *_) = node.args
                assert isinstance(module, ast.Constant) and module.value.split(".")[0] in EXTRAS, f"{path}:{node.lineno}"


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
