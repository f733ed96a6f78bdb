"""``llmsched vllm-diff`` on the versions on record and on made-up trees. Needs no vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llmsched_env.cli import vllm_diff
from llmsched_env.errors import ConfigError
from llmsched_hardware import fingerprints
from llmsched_hardware.vllm_symbols import SYMBOLS

QUEUE = "v1/core/sched/request_queue.py"
OLD = """
class FCFSRequestQueue(deque):
    def add_request(self, request):
        self.append(request)

    def peek_request(self):
        return self[0]
"""
NEW = """
class FCFSRequestQueue(deque):
    def add_request(self, request):
        # by priority
        self.appendleft(request)

    def prepend_request(self, request):
        self.appendleft(request)
"""


def write_tree(folder: Path, queue: str, version: str) -> str:
    path = folder / "vllm" / QUEUE
    path.parent.mkdir(parents=True)
    path.write_text(queue)
    (folder / "vllm" / "__init__.py").touch()
    (folder / "vllm" / "_version.py").write_text(f"__version__ = version = '{version}'\n")
    return str(folder)


@pytest.fixture
def trees(tmp_path: Path) -> tuple[str, str]:
    return write_tree(tmp_path / "old", OLD, "1.0.0"), write_tree(tmp_path / "new", NEW, "1.1.0")


Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Called:
    def called(*words: str) -> tuple[int, str, str]:
        code = vllm_diff.main(list(words))
        said = capsys.readouterr()
        return code, said.out, said.err

    return called


def test_gone_new_and_changed_with_their_lines(trees: tuple[str, str], call: Called) -> None:
    code, out, _ = call(*trees)
    lines = out.splitlines()
    assert code == 0
    assert [line.split()[:4] for line in lines[:-1]] == [
        ["changed", "+2", "-1", f"{QUEUE}:FCFSRequestQueue.add_request"],
        ["gone", "+0", "-2", f"{QUEUE}:FCFSRequestQueue.peek_request"],
        ["new", "+2", "-0", f"{QUEUE}:FCFSRequestQueue.prepend_request"],
    ]
    assert all(line.endswith("  called and mirrored: order of the waiting; rule 7") for line in lines[:-1])
    assert lines[-1] == (f"3 of {len(SYMBOLS)} symbols differ from 1.0.0 ({trees[0]}) to 1.1.0 ({trees[1]}), {len(SYMBOLS) - 3} do not")
    assert call(*trees, "--quiet")[1] == lines[-1] + "\n"


def test_versions_on_record_are_compared_without_lines(call: Called) -> None:
    first, *_, last = fingerprints.recorded_versions()
    code, out, _ = call(first, last)
    *rows, end = out.splitlines()
    known = fingerprints.recorded()
    assert code == 0 and len(rows) == len(fingerprints.differences(known[first], known[last])) > 20
    assert all(row.split()[0] in ("changed", "gone", "new") and " +" not in row for row in rows)
    assert end.startswith(f"{len(rows)} of {len(SYMBOLS)} symbols differ from {first} (on record) to {last} (on record)")


def test_json_holds_what_is_printed(trees: tuple[str, str], call: Called) -> None:
    code, out, _ = call(*trees, "--json", "-")
    found = json.loads(out)["found"]
    assert code == 0 and found["same"] == len(SYMBOLS) - 3 and found["recorded"] is None and found["diff"] == []
    assert found["differences"][0] == {
        "symbol": f"{QUEUE}:FCFSRequestQueue.add_request",
        "change": "changed",
        "added": 2,
        "removed": 1,
        "use": "called and mirrored",
        "why": "order of the waiting; rule 7",
    }
    version = fingerprints.recorded_versions()[0]
    rows = json.loads(call(version, trees[0], "--json", "-")[1])["found"]["differences"]
    assert rows and all(row["added"] is None and row["removed"] is None for row in rows)


def test_show_prints_a_unified_diff(trees: tuple[str, str], call: Called) -> None:
    _, out, _ = call(*trees, "--show", "FCFSRequestQueue.add_request")
    assert out.splitlines()[2:] == [
        "@@ -1,2 +1,3 @@",
        "     def add_request(self, request):",
        "-        self.append(request)",
        "+        # by priority",
        "+        self.appendleft(request)",
    ]
    assert call(*trees, "--show", f"{QUEUE}:FCFSRequestQueue.add_request")[1] == out
    same = call(trees[0], trees[0], "--show", "FCFSRequestQueue.add_request")[1]
    assert same.startswith(f"{QUEUE}:FCFSRequestQueue.add_request: the same in 1.0.0")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("FCFSRequestQueue.add_reqest", "must be a listed symbol or FILE.py:NAME; did you mean 'FCFSRequestQueue.add_request'?"),
        ("v1/nothing.py:f", "v1/nothing.py:f is in neither"),
        ("v1/nothing:f", "must be FILE.py:NAME"),
        ("v1/nothing.py:", "must be FILE.py:NAME"),
    ],
)
def test_a_symbol_that_there_is_not(trees: tuple[str, str], call: Called, word: str, message: str) -> None:
    code, out, err = call(*trees, "--show", word)
    assert code == 2 and out == "" and message in err


def test_what_is_no_version_is_refused(trees: tuple[str, str], call: Called) -> None:
    version = fingerprints.recorded_versions()[0]
    code, _, err = call(version.rpartition(".")[0], trees[0])
    assert code == 2 and err.startswith(f"error: OLD: {version.rpartition('.')[0]!r}, must be a version on record")
    assert f"did you mean {version!r}?" in err
    assert "must be a wheel of vLLM or a folder that holds vllm/" in call(trees[0], str(Path(trees[0]).parent))[2]
    assert f"of {version} (on record) digests are kept, but no sources" in call(version, trees[0], "--show", "Scheduler.schedule")[2]


def test_installed_is_the_package_that_would_be_imported(trees: tuple[str, str], call: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_diff, "installed_folder", lambda: Path(trees[1]))
    assert "to 1.1.0 (installed)" in call(trees[0], "installed")[1]

    def missing() -> Path:
        raise ConfigError("vllm is not installed here")

    monkeypatch.setattr(vllm_diff, "installed_folder", missing)
    assert call("installed", trees[0]) == (2, "", "error: vllm is not installed here\n")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The record of a checkout of its own."""
    path = tmp_path / "checkout" / "hardware" / "llmsched_hardware" / "fingerprints.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(fingerprints.RECORD.read_bytes())
    (tmp_path / "checkout" / "pyproject.toml").touch()
    monkeypatch.setattr(fingerprints, "RECORD", path)
    yield path
    fingerprints.recorded.cache_clear()


def test_a_version_is_recorded_and_then_known(trees: tuple[str, str], call: Called, checkout: Path) -> None:
    before = json.loads(checkout.read_text())
    code, out, _ = call(trees[0], trees[1], "--record", "1.1.0")
    assert code == 0 and out.splitlines()[-1] == f"Added 1.1.0 in {checkout}"
    after = json.loads(checkout.read_text())
    assert list(after) == [*before, "1.1.0"] and {name: after[name] for name in before} == before
    assert call("1.1.0", trees[1])[1].startswith(f"0 of {len(SYMBOLS)} symbols differ")
    assert call(trees[0], trees[1], "--record", "1.1.0")[1].splitlines()[-1] == f"Replaced 1.1.0 in {checkout}"


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("1.0.0", "--record: 1.0.0, but 1.1.0 ("),
        ("next", "version 'next', must be the number of a release"),
    ],
)
def test_what_is_not_recorded(trees: tuple[str, str], call: Called, checkout: Path, version: str, message: str) -> None:
    before = checkout.read_bytes()
    code, _, err = call(*trees, "--record", version)
    assert code == 2 and message in err and checkout.read_bytes() == before


def test_only_sources_in_a_checkout_are_recorded(trees: tuple[str, str], call: Called, checkout: Path) -> None:
    version = fingerprints.recorded_versions()[0]
    assert "has no sources to record" in call(trees[0], version, "--record", version)[2]
    (checkout.parents[2] / "pyproject.toml").unlink()
    assert "is not in a checkout of this project" in call(*trees, "--record", "1.1.0")[2]
