"""What README and the pages show works as it stands there: snippets run, commands are read by their own parsers, names exist."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from llmsched_env.workload import load_scenario

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *ROOT.glob("docs/**/*.md")]
)
SLOW = {"docs/index.md", "docs/tutorial/first-agent.md"}
"""Pages whose snippets take more than about ten seconds."""
RUN = {"docs/tutorial/trace.md", "docs/index.md"}
"""Pages whose ``llmsched`` commands are carried out, in their place between the snippets; those of others are read alone."""
SHELL = {"pip", "make", "python", "cat", "export", "curl", "vllm", "source", ".venv/bin/python"}
"""Other programs that a page may name in a block of commands."""

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?<=\n\n)((?:    .*\n)+)")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def fenced(page: str) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return _BLOCK.findall(text_of(page))


def blocks(page: str, language: str) -> list[str]:
    return [text for name, text in fenced(page) if name == language]


def lines_of_shell(block: str) -> list[list[str]]:
    """The words of each command line: lines joined, comments left out, the block's variables filled in, here-documents skipped."""
    block = re.sub(r"<<'?(\w+)'?(.*\n)(?:.*\n)*?\1\n", r"\2", block.replace("\\\n", " "))
    variables: dict[str, str] = {}
    found = []
    for line in block.splitlines():
        given = re.fullmatch(r'(\w+)="(.*)"', line.strip())
        if given:
            variables[given[1]] = given[2]
            continue
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            found.append(words)
    return found


def commands(page: str) -> list[list[str]]:
    """The words after ``llmsched`` of every command that the page shows, in fenced and indented blocks."""
    shell = [*blocks(page, "bash"), *_INDENTED.findall(re.sub(_BLOCK, "", text_of(page)))]
    found = []
    for block in shell:
        if "llmsched" not in block and "scripts/" not in block:
            continue
        try:
            lines = lines_of_shell(block)
        except ValueError:  # a drawing, no commands
            continue
        for words in lines:
            if words[0] == "llmsched":
                found.append(words[1:])
            elif len(words) > 1 and words[0] == "python" and (match := re.fullmatch(r"scripts/(\w+)\.py", words[1])):
                found.append([match[1].replace("_", "-"), *words[2:]])
    return [words for words in found if "..." not in words]


def carry_out(words: list[str]) -> None:
    pytest.importorskip("tyro", reason="tyro is not installed (extra: cli)")
    from llmsched_env.cli.commands import COMMANDS

    assert COMMANDS[words[0]].main([*words[1:], "--quiet"]) == 0, words


def run_page(page: str) -> None:
    """The snippets of a page, one after the other in one namespace."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for number, (language, source) in enumerate(fenced(page)):
        if language == "bash" and page in RUN:
            for words in lines_of_shell(source):
                if words[0] == "llmsched":
                    carry_out(words[1:])
        if language != "python" or "LLMSchedHardware" in source:  # the latter needs vLLM: tests/real_vllm
            continue
        # what a reader runs for a minute is tried for a moment
        source = re.sub(r"total_timesteps=[\d_]+", "total_timesteps=256", source).replace("n_eval_episodes=64", "n_eval_episodes=4")
        exec(compile(source, f"{page}, block {number}", "exec"), namespace)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES if blocks(page, "python")]
)
def test_the_snippets_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "stable_baselines3" in text_of(page):
        pytest.importorskip("stable_baselines3", reason="stable-baselines3 is not installed (extra: agents)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    run_page(page)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("page", "number"), [(page, i) for page in PAGES for i in range(len(blocks(page, "toml")))])
def test_a_scenario_file_is_one(page: str, number: int, tmp_path: Path) -> None:
    source = blocks(page, "toml")[number]
    assert tomllib.loads(source)
    (tmp_path / "shown.toml").write_text(source, encoding="utf-8")
    assert len(load_scenario(str(tmp_path / "shown.toml")).generate(0, num_requests=5)) == 5


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)])
def test_the_commands_of_a_page_are_read_by_their_parsers(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    tyro = pytest.importorskip("tyro", reason="tyro is not installed (extra: cli)")
    from llmsched_env.cli.commands import COMMANDS

    for words in commands(page):
        assert words[0] in COMMANDS, words
        try:
            tyro.cli(COMMANDS[words[0]].options, args=words[1:], config=(tyro.conf.FlagCreatePairsOff,))
        except SystemExit as stop:
            assert stop.code == 0, f"llmsched {shlex.join(words)}\n{capsys.readouterr().err}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_blocks_of_commands_hold_known_programs(page: str) -> None:
    for block in blocks(page, "bash"):
        for words in lines_of_shell(block):
            assert words[0] == "llmsched" or words[0] in SHELL, words


def test_languages_of_blocks_are_known() -> None:
    assert {language for page in PAGES for language, _ in fenced(page)} <= {"bash", "python", "toml", "text", "markdown", "json"}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_are_there(page: str) -> None:
    text = text_of(page)
    top = "llmsched_env|baselines|agents|hardware|scripts|docs|tests|examples|requirements|notebooks"
    named = set(re.findall(rf"`((?:{top})/[\w./-]+?)`", text))
    missing = sorted(name for name in named if not (ROOT / name).exists())
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_programs_that_a_page_names_are_there(page: str) -> None:
    pytest.importorskip("tyro", reason="tyro is not installed (extra: cli)")
    from llmsched_env.cli.commands import COMMANDS

    text = text_of(page)
    assert {name for name in re.findall(r"`llmsched ([a-z][a-z-]+)", text)} <= set(COMMANDS)
    assert all((ROOT / "scripts" / name).is_file() for name in re.findall(r"scripts/(\w+\.py)", text))


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_that_a_page_names_are_there(page: str) -> None:
    targets = set(re.findall(r"^([\w-]+(?: [\w-]+)*):(?!=)", text_of("Makefile"), flags=re.MULTILINE))
    known = {target for line in targets for target in line.split()} | {"test-lowest", "test-highest"}
    assert set(re.findall(r"`make ([a-z][a-z-]+)", text_of(page))) - {"docs"} <= known


def test_the_example_package_is_written_as_the_page_says() -> None:
    assert "examples/llmsched-example" in text_of("docs/extending.md")
    assert (ROOT / "examples/llmsched-example/pyproject.toml").is_file()
