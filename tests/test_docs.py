"""What README and the pages show works as it stands there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from llmsched_env.workload import load_scenario

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/extending.md", "docs/agents.md")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)


SNIPPETS = [(page, i) for page in PAGES for i in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), SNIPPETS)
def test_a_snippet_runs(page: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    source = blocks(page, "python")[number]
    if "LLMSchedHardware" in source:
        pytest.skip("needs vLLM: tests/real_vllm")
    if "stable_baselines3" in source:
        pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (extra: agents)")
    # what a reader runs for a minute is tried for a moment
    source = re.sub(r"total_timesteps=[\d_]+", "total_timesteps=256", source)
    exec(compile(source, f"{page}, block {number}", "exec"), {"__name__": "snippet"})
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("page", "number"), [(page, i) for page in PAGES for i in range(len(blocks(page, "toml")))])
def test_a_scenario_file_is_one(page: str, number: int, tmp_path: Path) -> None:
    source = blocks(page, "toml")[number]
    assert tomllib.loads(source)
    (tmp_path / "shown.toml").write_text(source, encoding="utf-8")
    assert len(load_scenario(str(tmp_path / "shown.toml")).generate(0, num_requests=5)) == 5


@pytest.mark.parametrize("page", sorted(str(path.relative_to(ROOT)) for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]))
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    top = "llmsched_env|baselines|agents|hardware|scripts|docs|tests|examples|requirements"
    named = set(re.findall(rf"`((?:{top})/[\w./-]+?)`", text))
    named |= {f"docs/{name}" for name in re.findall(r"\]\((?:docs/)?([\w-]+\.md)", text)}
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing


@pytest.mark.parametrize("page", ["README.md", "docs/extending.md", "docs/agents.md", "docs/deploy.md", "docs/hardware.md"])
def test_commands_that_a_page_names_are_there(page: str) -> None:
    pytest.importorskip("tyro", reason="tyro is not installed (extra: cli)")
    from llmsched_env.cli.commands import COMMANDS

    text = (ROOT / page).read_text(encoding="utf-8")
    assert {name for name in re.findall(r"(?<![\w-])llmsched ([a-z][a-z-]+)", text)} <= set(COMMANDS)
    assert all((ROOT / "scripts" / name).is_file() for name in re.findall(r"scripts/(\w+\.py)", text))
