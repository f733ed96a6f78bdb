"""Imports point one way, and importing the environment costs no optional package."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "llmsched_command": ROOT,
    "llmsched_env": ROOT,
    "llmsched_baselines": ROOT / "baselines",
    "llmsched_agents": ROOT / "agents",
    "llmsched_hardware": ROOT / "hardware",
}
LAYERS = (
    "llmsched_env",
    "llmsched_baselines",
    "llmsched_agents",
    "llmsched_hardware",
    "llmsched_env.bench",
    "llmsched_env.pages",
    "llmsched_env.cli",
    "llmsched_command",
)
"""From the ground up: a module imports its own layer and those below."""
PROGRAMS = ROOT / "scripts"
BASE = {"llmsched_env", "gymnasium", "numpy", "numba", "llvmlite"}  # llvmlite is a part of numba: it does not run without
EXTRAS = (
    *("torch", "stable_baselines3", "matplotlib", "scipy", "pygame", "vllm", "joblib", "rich", "jinja2", "tyro"),
    *("pyarrow", "datasketches"),
)


def layer_of(module: str) -> int:
    """The layer of a module by the longest name that fits."""
    fitting = [i for i, layer in enumerate(LAYERS) if module == layer or module.startswith(f"{layer}.")]
    return max(fitting, key=lambda i: len(LAYERS[i]))


def modules() -> dict[str, Path]:
    """Every module of the installed packages."""
    return {module_name(path, root): path for name, root in FOLDERS.items() for path in sorted((root / name).rglob("*.py"))}


def imported(source: str) -> Iterator[tuple[int, str, bool]]:
    """(line, module, runs when the module is imported) of every import, those under ``if TYPE_CHECKING`` and in functions included."""
    pending: list[tuple[ast.AST, bool]] = [(ast.parse(source), True)]
    while pending:
        node, runs = pending.pop()
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, runs) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}", runs) for alias in node.names)
        else:
            inside = runs and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            pending.extend((child, inside) for child in ast.iter_child_nodes(node))


def test_the_walk_sees_imports_at_every_level() -> None:
    source = "import a.b\nif x:\n    from c import d\nclass K:\n    import e\n    def f(self):\n        import g\ndef h():\n    import i\n"
    assert {name for _, name, runs in imported(source) if runs} == {"a.b", "c.d", "e"}
    assert {name for _, name, runs in imported(source) if not runs} == {"g", "i"}


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer: str) -> None:
    own = {name: path for name, path in modules().items() if LAYERS[layer_of(name)] == layer}
    assert own, f"{layer} has no module"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for name, path in own.items()
        for line, target, _ in imported(path.read_text(encoding="utf-8"))
        if target.split(".")[0] in FOLDERS and layer_of(target) > layer_of(name)
        # the console command looks its table up when it is called, so that it can say which extra is missing
    ]
    assert not wrong


def test_no_module_imports_a_program_and_no_program_another() -> None:
    programs = {path.stem for path in PROGRAMS.glob("*.py")}
    assert len(programs) > 10
    wrong = []
    for path in [*modules().values(), *PROGRAMS.rglob("*.py")]:
        for line, target, _ in imported(path.read_text(encoding="utf-8")):
            if target.split(".")[0] in ("scripts", "tests") or (path.parent == PROGRAMS and target.split(".")[0] in programs):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert not wrong


def test_programs_are_short() -> None:
    programs = sorted(PROGRAMS.glob("*.py"))
    assert len(programs) <= 28
    assert all(len(path.read_text(encoding="utf-8").splitlines()) <= 150 for path in programs)
    listed = (PROGRAMS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in programs if f"`{path.name}`" not in listed] == []


@pytest.mark.parametrize("above", ["bench", "pages", "cli"])
def test_the_environment_needs_the_base_alone(above: str) -> None:
    allowed = BASE | set(sys.stdlib_module_names)
    ground = {name: path for name, path in modules().items() if LAYERS[layer_of(name)] == "llmsched_env"}
    assert f"llmsched_env.{above}" not in ground
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in ground.values()
        for line, target, runs in imported(path.read_text(encoding="utf-8"))
        if runs and target.split(".")[0] not in allowed
    ]
    assert not wrong


# --- no circles -------------------------------------------------------------------------------------
def module_name(path: Path, root: Path) -> str:
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
    files = modules()
    assert len(files) > 150
    sources = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    # a package's own __init__ may gather its modules, and is run before them: it counts as a module that imports them
    found = circle({name: imports_of(source, files.keys()) - {name} for name, source in sources.items()})
    assert not found, " -> ".join(found)


def test_nothing_is_imported_by_a_string_but_what_people_name() -> None:
    """A string hides an import from the tests above: optional packages, and what a person or a package names, are imported so."""
    found = []
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            used = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if used in ("import_module", "__import__", "exec", "run_module", "spec_from_file_location"):
                found.append((name, used))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("importlib", "runpy", "pkgutil"):
                found += [(name, alias.name) for alias in node.names if alias.name in ("import_module", "run_module", "run_path")]
    assert sorted(found) == [("llmsched_env.errors", "import_module"), ("llmsched_env.registry", "import_module")]


def test_no_two_files_of_tests_have_one_name() -> None:
    """Pytest imports them by their names alone: of two in different folders the second is an error when all are collected."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def test_entry_points_of_this_project_name_what_is_there() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    targets = [target for group in project["entry-points"].values() for target in group.values()] + list(project["scripts"].values())
    assert len(targets) >= 3
    known = modules()
    for target in targets:
        module, _, attribute = target.partition(":")
        tree = ast.parse(known[module].read_text(encoding="utf-8"))
        assert attribute in {node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def test_a_missing_extra_is_asked_for_by_an_extra_that_there_is() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"])
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                extra = node.args[1]
                assert isinstance(extra, ast.Constant) and extra.value in extras, f"{path}:{node.lineno}"


WITHOUT_EXTRAS = """
import sys
for extra in {extras!r}:
    sys.modules[extra] = None  # importing it raises ImportError
import gymnasium
env = gymnasium.make("llmsched_env:LLMSched-v1", scenario="azure-conv", num_requests=5)
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
