"""The site: every page is built without a warning, is reached, and says what the sources say; the notebooks run."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BUDGET = {"LLMSCHED_NOTEBOOK_TIMESTEPS": "256", "LLMSCHED_NOTEBOOK_REQUESTS": "1200"}
"""What the notebooks do for minutes is tried for a moment."""


def module_at(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return module_at(DOCS / "hooks.py")


# --- what the hooks do --------------------------------------------------------------------------


def test_links_out_of_docs_lead_to_the_repository_or_become_names(hooks: ModuleType) -> None:
    page = (
        "See [the environment](../llmsched_env/env.py#L3), [`env.py`](../llmsched_env/env.py), [results](results.md) and [x](https://a.b)."
    )
    assert hooks.linked(page, "index.md", "") == (
        "See the environment (`llmsched_env/env.py`), `env.py`, [results](results.md) and [x](https://a.b)."
    )
    assert "[the environment](https://forge.test/o/n/blob/main/llmsched_env/env.py)" in hooks.linked(
        page, "index.md", "https://forge.test/o/n/"
    )
    assert hooks.linked("[up](../../Makefile)", "tutorial/index.md", "") == "up (`Makefile`)"


def test_a_page_named_as_code_becomes_a_link_but_not_in_code_blocks(hooks: ModuleType) -> None:
    assert hooks.linked("In `docs/theory.md`.", "tutorial/index.md", "") == "In [`theory.md`](../theory.md)."
    for text in ("In `docs/no-such-page.md`.", "```\n`docs/theory.md`\n```", "[`docs/theory.md`](theory.md)"):
        assert hooks.linked(text, "index.md", "") == text


def test_tables_of_docstrings_become_markdown(hooks: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text('"""Words.\n\n====  =====\na     b c\n====  =====\n``x``  1\nyy    two\n      a|b\n====  =====\n"""\n')
    assert hooks.module_table(tmp_path / "m.py") == "| a | b c |\n| --- | --- |\n| `x` | 1 |\n| yy | two a\\|b |"
    with pytest.raises(ValueError, match="no table"):
        hooks.module_table(ROOT / "tests/conftest.py")


def test_every_environment_has_a_page_with_its_docstring(hooks: ModuleType) -> None:
    from llmsched_env import CLUSTER_ID, ENVIRONMENTS

    specs = hooks.registered()
    assert {spec.id for spec in specs} == {CLUSTER_ID, *(environment.id for environment in ENVIRONMENTS)}
    for spec in specs:
        page = hooks.environment_page(spec)
        assert page.startswith(f"# {spec.id}\n") and "## Description" in page
        assert spec.reward_threshold is None or f"| Reward threshold | {spec.reward_threshold:g} |" in page


def test_the_picture_is_what_its_program_draws(tmp_path: Path) -> None:
    module_at(DOCS / "picture.py").write(tmp_path)
    for name in ("system-light.svg", "system-dark.svg"):
        assert (tmp_path / name).read_text() == (DOCS / "assets" / name).read_text()


# --- pages --------------------------------------------------------------------------------------


def pages_of_the_navigation() -> set[str]:
    return set(re.findall(r"^ +- (?:[^:\n]+: )?([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.glob("**/*.md")}
    assert not sorted(pages - pages_of_the_navigation())
    # pages that another program writes may not be there yet; docs/hooks.py leaves them out
    assert pages_of_the_navigation() - pages <= {"tools.md", "environments.md"}


def anchors(page: Path) -> set[str]:
    found = re.findall(r"^#+ (.+?)\s*$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in found}


@pytest.mark.parametrize("page", sorted(DOCS.glob("**/*.md")), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    generated = re.compile(r"environments/[\w-]+\.md")  # docs/hooks.py
    for target in re.findall(r"\]\(([^()\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target) or generated.search(name):
            continue
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), target
        assert not anchor or other.suffix != ".md" or anchor in anchors(other), target


def test_every_module_of_the_reference_is_there() -> None:
    for page in DOCS.glob("api/*.md"):
        for name in re.findall(r"^::: ([\w.]+)", page.read_text(), flags=re.MULTILINE):
            assert _defined(name), f"{page.name}: {name}"


def _defined(name: str) -> bool:
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        for root in (ROOT, ROOT / "baselines", ROOT / "agents", ROOT / "hardware"):
            path = root.joinpath(*parts[:count])
            source = path.with_suffix(".py") if path.with_suffix(".py").is_file() else path / "__init__.py"
            if source.is_file():
                names = {getattr(node, "name", None) for node in ast.parse(source.read_text()).body}
                return count == len(parts) or (count == len(parts) - 1 and parts[-1] in names)
    return False


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
        pytest.importorskip(module, reason=f"{module} is not installed (extra: docs)")
    run = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    theory = (tmp_path / "site/theory/index.html").read_text(encoding="utf-8")
    assert "<math" in theory and 'class="arithmatex"' not in theory
    assert not (tmp_path / "site/hooks.py").exists()
    fetched = re.compile(r'<(?:script|img)[^>]* src="https?:|<link[^>]* rel="stylesheet"[^>]* href="https?:')
    for page in (tmp_path / "site").glob("**/*.html"):
        assert not fetched.search(page.read_text(encoding="utf-8")), f"{page} fetches from elsewhere"


# --- notebooks ----------------------------------------------------------------------------------


def cells(notebook: Path) -> list[dict[str, Any]]:
    return list(json.loads(notebook.read_text(encoding="utf-8"))["cells"])


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_small_and_says_where_the_package_comes_from(notebook: Path) -> None:
    assert notebook.stat().st_size < 200_000
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    assert "\nSOURCE = " in "".join(code[0]["source"])


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_the_cells_of_a_notebook_run(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plt = pytest.importorskip("matplotlib.pyplot", reason="matplotlib is not installed (extra: cli)")
    if "stable_baselines3" in notebook.read_text(encoding="utf-8"):
        pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (extra: agents)")
    monkeypatch.chdir(tmp_path)
    plt.switch_backend("agg")
    for name, value in BUDGET.items():
        monkeypatch.setenv(name, value)
    namespace: dict[str, Any] = {"__name__": "notebook"}
    for i, cell in enumerate(cells(notebook)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook.name}, cell {i}", "exec"), namespace)
    plt.close("all")


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_in_a_kernel(notebook: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name, value in BUDGET.items():
        monkeypatch.setenv(name, value)
    nbclient.NotebookClient(nbformat.read(notebook, as_version=4), timeout=300).execute()
