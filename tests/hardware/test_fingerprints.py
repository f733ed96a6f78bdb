"""Digests of vLLM's symbols, and the versions that are accepted by them. Needs no vLLM: the trees are made up here."""

from __future__ import annotations

import ast
import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmsched_env.errors import ConfigError
from llmsched_hardware import fingerprints, versions, vllm_sources
from llmsched_hardware.fingerprints import ALLOW_UNTESTED, UntestedVersionWarning, differences, differing, digests_of, judge
from llmsched_hardware.vllm_sources import Source, Tree, installed_folder
from llmsched_hardware.vllm_symbols import SYMBOLS, Symbol

HARDWARE = Path(__file__).resolve().parents[2] / "hardware" / "llmsched_hardware"

SCHEDULER = '''
from dataclasses import dataclass, field

class Scheduler(Base):
    """Schedules."""

    budget: "int | None" = 8
    """Tokens."""

    def schedule(self, throttle: bool = False) -> Output:
        """One iteration."""
        left: int = self.budget  # tokens
        late: dict[str, int]
        for request in self.running:
            left -= request.tokens if request.tokens < 16 else 16
            log(f"left {left:>{self.width}} of {self.budget!r}" " tokens")
        return Output(left, **self.more)

    @property
    def paused(self): return self._paused

    @paused.setter
    def paused(self, value): self._paused = value
'''


SYNTAX = """
async def everything(a, /, b: int = -1, *rest: str, key=b"\\x00", **more):
    global seen
    async with a as x, b: y = [i async for i in x if i]
    numbers = 1_000, 0x10, 2.50, 3e400, 1j, True, None, ..., "\\u00e9\\u0378" "\\ud800", u"u"
    words = f"{a}{b:}{b!s:>{key}.{2}}{{}}" rf"\\{a=}" "" f"{'a' if b else f'{x:%H:%M}'}"
    f = lambda z, *, w=2: (z := w, *rest, {**more, "k": {1, 2}}, z[1:2, ...], -z ** ~w, not z and a or b)
    match a:
        case {"k": [1, *_], **left} | Point(x=0) if b: del left
        case None | -1 | "t" as t: assert t, "none"
        case _: raise ValueError(t) from None
    try: await f(*rest, key=1)
    except* (OSError, TypeError) as error: return (yield_ for yield_ in rest)
    else: b @= a; a.b: int = 3; a.c: "str"
    finally: nonlocal_ = a < b <= y is not None not in words
    for i in y: continue
    else:
        while i: break
        else: pass
    class Inner(Base, metaclass=Meta): field: "list[int]" = 3
"""


def digest_of(text: str, name: str) -> str | None:
    return Source("made up", text.encode()).digest(name)


def same(text: str, name: str = "Scheduler.schedule") -> bool:
    return digest_of(text, name) == digest_of(SCHEDULER, name)


def test_a_digest_is_the_same_under_every_python() -> None:
    """The values were found with Python 3.11.7, 3.12.1 and 3.13.0 alike."""
    names = ("Scheduler", "Scheduler.schedule", "Scheduler.budget", "Scheduler.paused")
    assert {name: digest_of(SCHEDULER, name) for name in names} == {
        "Scheduler": "2d0de851994e98a5",
        "Scheduler.schedule": "bccc3d2d9aff1449",
        "Scheduler.budget": "3c9bdffd27f8a663",
        "Scheduler.paused": "9c91732eddff4b7b",
    }
    assert digest_of(SYNTAX, "everything") == "fd2f53a8df0df1d3"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # tokens", ""),
        ("        for request", "\n        # one by one\n        for request"),
        ('        """One iteration."""\n', ""),
        ('"""One iteration."""', '"""An iteration, at last."""'),
        ("request.tokens if request.tokens < 16 else 16", "(request.tokens\n                if request.tokens < 16 else 0x10)"),
        ("throttle: bool = False) -> Output", "throttle: 'bool'=False)"),
        ("left: int = self", "left = self"),
        ("        late: dict[str, int]\n", ""),
        ('" " tokens")', ' tokens")'),
    ],
)
def test_comments_docstrings_formatting_and_annotations_of_a_function_do_not_count(old: str, new: str) -> None:
    assert SCHEDULER.count(old) == 1
    assert same(SCHEDULER.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("< 16", "< 17"),
        ("< 16", "<= 16"),
        ("left -=", "left +="),
        ("throttle: bool = False", "throttle: bool = True"),
        ("self.budget!r", "self.budget!s"),
        (" of {", " from {"),
        ("**self.more", "*self.more"),
        ("    def schedule", "    @traced\n    def schedule"),
        ("    def schedule", "    async def schedule"),
        ("else 16\n", "else 16.0\n"),
    ],
)
def test_what_runs_counts(old: str, new: str) -> None:
    assert SCHEDULER.count(old) == 1
    assert not same(SCHEDULER.replace(old, new))


def test_a_class_is_its_head_and_its_fields() -> None:
    assert same(SCHEDULER.replace("< 16", "< 17"), "Scheduler")
    assert same(SCHEDULER.replace('"int | None"', "int | None"), "Scheduler")
    assert same(SCHEDULER.replace('    """Tokens."""\n', ""), "Scheduler")
    assert not same(SCHEDULER.replace("= 8", "= 9"), "Scheduler")
    assert not same(SCHEDULER.replace('"int | None"', '"int"'), "Scheduler")
    assert not same(SCHEDULER.replace("(Base)", "(Base, Other)"), "Scheduler")
    assert not same(SCHEDULER.replace("budget: ", "tokens: "), "Scheduler")


def test_a_field_a_property_and_what_there_is_not() -> None:
    assert same(SCHEDULER.replace("(Base)", "()"), "Scheduler.budget")
    assert not same(SCHEDULER.replace("= 8", "= 9"), "Scheduler.budget")
    assert not same(SCHEDULER.replace("self._paused = value", "pass"), "Scheduler.paused")  # the setter counts, too
    assert digest_of(SCHEDULER, "Scheduler.nothing") is None
    assert digest_of(SCHEDULER, "Other.schedule") is None


def test_definitions_under_conditions_are_found_and_signatures_for_type_checkers_are_not() -> None:
    text = "if X:\n    def f(): return 1\nelse:\n    def f(): return 2\ntry:\n    import g\nexcept ImportError:\n    g = None\n"
    assert digest_of(text, "f") and digest_of(text, "g")
    assert digest_of(text.replace("return 2", "return 3"), "f") != digest_of(text, "f")
    plain = "def f(x): return x\n"
    assert digest_of("@overload\ndef f(x: int): ...\n@typing.overload\ndef f(x: str): ...\n" + plain, "f") == digest_of(plain, "f")


def test_the_lines_of_a_class_are_those_of_its_digest() -> None:
    source = Source("made up", SCHEDULER.encode())
    assert [line.strip() for line in source.lines("Scheduler") if line.strip()] == [
        "class Scheduler(Base):", '"""Schedules."""', 'budget: "int | None" = 8', '"""Tokens."""'
    ]  # fmt: skip
    assert source.lines("Scheduler.paused") == [line for line in SCHEDULER.splitlines() if "paused" in line or "@property" in line]
    assert source.lines("Nothing") == []


# --- trees -----------------------------------------------------------------------------------------------------------
MADE_UP = (
    Symbol("v1/core/sched/scheduler.py", "Scheduler.schedule", "called and mirrored", "one iteration"),
    Symbol("v1/core/sched/scheduler.py", "Scheduler.budget", "called", "tokens"),
    Symbol("v1/core/sched/scheduler.py", "Scheduler.later", "called", "only in some versions"),
    Symbol("v1/queue.py", "Queue", "called", "moved in some versions"),
)
QUEUE = "class Queue(list):\n    longest = 4\n"


def write_tree(folder: Path, files: dict[str, str], version: str = "1.0.0") -> Path:
    """A folder that holds a ``vllm/`` of these files."""
    contents = {"__init__.py": "", "_version.py": f"__version__ = version = '{version}'\n", **files}
    for name, text in contents.items():
        path = folder / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder


def files(scheduler: str = SCHEDULER, queue: str = QUEUE) -> dict[str, str]:
    return {"v1/core/sched/scheduler.py": scheduler, "v1/queue.py": queue}


@pytest.fixture
def own_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Two made-up versions on record, 1.0.0 and 1.2.0, which has ``later`` and another budget; their trees."""
    monkeypatch.setattr(fingerprints, "SYMBOLS", MADE_UP)
    monkeypatch.setattr(fingerprints, "FILES", tuple(sorted({symbol.file for symbol in MADE_UP})))
    monkeypatch.setattr(fingerprints, "RECORD", tmp_path / "fingerprints.json")
    monkeypatch.delenv(ALLOW_UNTESTED, raising=False)
    (tmp_path / "fingerprints.json").write_text("{}")
    fingerprints.recorded.cache_clear()
    trees = {
        "1.0.0": write_tree(tmp_path / "1.0.0", files()),
        "1.2.0": write_tree(tmp_path / "1.2.0", files(SCHEDULER.replace("= 8", "= 9") + "    def later(self): return 1\n"), "1.2.0"),
    }
    for version in reversed(trees):
        fingerprints.record(version, digests_of(Tree(trees[version])))
    yield tmp_path
    fingerprints.recorded.cache_clear()


def named(found: tuple[fingerprints.Difference, ...]) -> list[str]:
    return [f"{one.symbol.name} {one.change}" for one in found]


def test_differences_between_versions(own_record: Path) -> None:
    known = fingerprints.recorded()
    assert fingerprints.recorded_versions() == tuple(known) == ("1.0.0", "1.2.0")
    assert named(differences(known["1.0.0"], known["1.2.0"])) == ["Scheduler.budget changed", "Scheduler.later new"]
    assert named(differences(known["1.2.0"], known["1.0.0"])) == ["Scheduler.budget changed", "Scheduler.later gone"]
    assert named(differing("1.2.0")) == ["Scheduler.budget changed", "Scheduler.later new"]
    assert differing(own_record / "1.2.0") == ()
    with pytest.raises(ConfigError, match="must be a wheel of vLLM or a folder that holds vllm/"):
        differing("1.1.0")


def test_a_symbol_that_moved_is_followed_by_its_import(own_record: Path) -> None:
    moved = {**files(queue="from vllm.v1.line import Line as Queue\n"), "v1/line/__init__.py": "from .real import Line\n"}
    tree = write_tree(own_record / "moved", {**moved, "v1/line/real.py": QUEUE.replace("Queue", "Line")})
    assert named(differing(tree)) == ["Queue changed"]  # by its name alone
    same = {"v1/line/__init__.py": "from .real import Queue as Line\n", "v1/line/real.py": QUEUE}
    assert differing(write_tree(tree, same)) == ()
    for elsewhere in ("from collections import deque as Queue\n", "from vllm.v1.queue import Queue\n", "from vllm.gone import Queue\n"):
        assert named(differing(write_tree(tree, {"v1/queue.py": elsewhere}))) == ["Queue gone"]


def test_a_damaged_file_in_a_wheel_is_named(tmp_path: Path) -> None:
    """The list of contents is whole, the packed bytes of one file are not."""
    wheel = tmp_path / "damaged.whl"
    text = "\n".join(f"number_{i} = {i * i}" for i in range(500))
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("vllm/__init__.py", "")
        archive.writestr("vllm/v1/request.py", text)
        start = archive.getinfo("vllm/v1/request.py").header_offset + 60
    content = bytearray(wheel.read_bytes())
    content[start : start + 200] = bytes(b ^ 0xFF for b in content[start : start + 200])
    wheel.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match=r"damaged\.whl: vllm/v1/request\.py cannot be read"):
        Tree(wheel).file_digest("v1/request.py")


def test_a_wheel_is_read_as_a_folder_is(own_record: Path) -> None:
    folder = own_record / "1.2.0"
    wheel = own_record / "vllm-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in folder.rglob("*.py"):
            archive.write(path, path.relative_to(folder))
    assert digests_of(Tree(wheel)) == digests_of(Tree(folder)) == digests_of(Tree(folder / "vllm"))
    assert Tree(wheel).version() == Tree(folder).version() == "1.2.0"
    (own_record / "broken.whl").write_bytes(b"no archive")
    with pytest.raises(ConfigError, match=r"broken\.whl: cannot be read as a wheel"):
        Tree(own_record / "broken.whl")


def test_a_file_that_is_no_python_is_named(own_record: Path) -> None:
    tree = write_tree(own_record / "1.3.0", files(queue="class Queue(:\n"))
    with pytest.raises(ConfigError, match=r"vllm/v1/queue\.py: cannot be read as Python"):
        digests_of(Tree(tree))


@pytest.mark.parametrize("version", ["", "0.33", "0.34.0rc1", "installed"])
def test_only_releases_are_recorded(own_record: Path, version: str) -> None:
    with pytest.raises(ConfigError, match="must be the number of a release"):
        fingerprints.record(version, {})


# --- the rule of acceptance --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("version", ["1.0.0", "1.0.0+cpu"])
def test_a_tested_version_is_accepted_without_a_word(own_record: Path, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tree, "digest", None)  # its files are those on record: nothing is parsed
    verdict = judge(version, own_record / "1.0.0")
    assert verdict.accepted and verdict.tested and verdict.compared == "1.0.0" and verdict.differences == () and verdict.message == ""
    with warnings.catch_warnings(action="error"):
        verdict.enforce()


def test_a_tested_version_that_was_reformatted_is_the_same(own_record: Path) -> None:
    write_tree(own_record / "1.0.0", files(SCHEDULER.replace("  # tokens", "  # of this iteration")))
    assert judge("1.0.0", own_record / "1.0.0").message == ""


def test_a_tested_version_that_was_patched_is_accepted_with_a_warning(own_record: Path) -> None:
    write_tree(own_record / "1.0.0", files(SCHEDULER.replace("< 16", "< 32")))
    verdict = judge("1.0.0", own_record / "1.0.0")
    assert verdict.accepted and verdict.tested
    with pytest.warns(UntestedVersionWarning, match=r"vLLM 1\.0\.0 .*vllm/v1/core/sched/scheduler\.py:Scheduler\.schedule differ"):
        verdict.enforce()


def test_an_unknown_version_that_differs_is_refused_and_the_nearest_is_named(own_record: Path) -> None:
    tree = write_tree(own_record / "1.3.0", files(SCHEDULER.replace("= 8", "= 9"), QUEUE.replace("4", "5")))
    verdict = judge("1.3.0", tree)
    assert not verdict.accepted and not verdict.tested
    assert verdict.compared == "1.2.0" and named(verdict.differences) == ["Scheduler.later gone", "Queue changed"]
    with pytest.raises(ConfigError) as refusal:
        verdict.enforce()
    text = str(refusal.value)
    assert text.startswith("vLLM 1.3.0 is not supported (tested: 1.0.0, 1.2.0). From 1.2.0, the nearest of them, differ: ")
    assert "vllm/v1/core/sched/scheduler.py:Scheduler.later (gone), vllm/v1/queue.py:Queue. Install one" in text
    assert "llmsched vllm-diff 1.2.0 installed" in text and f"{ALLOW_UNTESTED}=1" in text


def test_at_most_a_dozen_symbols_are_named(own_record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = tuple(Symbol("v1/many.py", f"f{i}", "called", "") for i in range(20))
    monkeypatch.setattr(fingerprints, "SYMBOLS", many)
    monkeypatch.setattr(fingerprints, "FILES", ("v1/many.py",))
    tree = write_tree(own_record / "many", {"v1/many.py": "".join(f"def f{i}(): return {i}\n" for i in range(20))})
    message = judge("2.0.0", tree).message
    assert message.count("v1/many.py:f") == 12 and "f11 (new) and 8 more. Install" in message


def test_an_unknown_version_without_a_difference_is_accepted_with_a_warning(own_record: Path) -> None:
    tree = write_tree(own_record / "1.0.1", files(), "1.0.1")
    verdict = judge("1.0.1", tree)
    assert verdict.accepted and not verdict.tested and verdict.differences == ()
    with pytest.warns(UntestedVersionWarning, match=r"vLLM 1\.0\.1 is not supported .* the same as in 1\.0\.0"):
        verdict.enforce()


def test_the_variable_turns_a_refusal_into_a_loud_warning(own_record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(own_record / "1.3.0", files(queue=QUEUE.replace("4", "5")))
    for value in ("", "0", " 0 "):
        monkeypatch.setenv(ALLOW_UNTESTED, value)
        assert not judge("1.3.0", tree).accepted
    monkeypatch.setenv(ALLOW_UNTESTED, "1")
    verdict = judge("1.3.0", tree)
    assert verdict.accepted and not verdict.tested
    with pytest.warns(UntestedVersionWarning, match=r"LLMSCHED_ALLOW_UNTESTED=1: vLLM 1\.3\.0 .*vllm/v1/queue\.py:Queue"):
        verdict.enforce()


@pytest.mark.parametrize("value", ["yes", "2", "true", "-1"])
def test_another_value_of_the_variable_is_refused(own_record: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_UNTESTED, value)
    with pytest.raises(ConfigError, match=rf"LLMSCHED_ALLOW_UNTESTED: '{value}', must be 1 .*, 0 or empty"):
        judge("1.0.0", own_record / "1.0.0")


def test_a_version_may_be_on_record_and_not_be_supported(own_record: Path) -> None:
    verdict = judge("1.2.0", own_record / "1.2.0", supported=["1.0.0"])
    assert verdict.accepted and not verdict.tested and "(tested: 1.0.0)" in verdict.message and "the same as in 1.2.0" in verdict.message


def test_the_installed_version_is_judged(own_record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every adapter asks before it imports vLLM."""
    monkeypatch.setattr(versions, "SUPPORTED_VERSIONS", ("1.0.0", "1.2.0"))
    monkeypatch.setattr(versions, "installed", lambda: ("vllm", "1.0.0"))
    monkeypatch.setattr(versions, "installed_folder", lambda: own_record / "1.0.0")
    assert versions.check_version() == "1.0.0"
    monkeypatch.setattr(versions, "installed", lambda: ("vllm", "1.1.0"))
    with pytest.warns(UntestedVersionWarning, match="the same as in 1\\.0\\.0"):
        assert versions.check_version() == "1.1.0"
    write_tree(own_record / "1.0.0", files(queue=QUEUE.replace("4", "5")))
    with pytest.raises(ConfigError, match=r"vLLM 1\.1\.0 is not supported \(tested: 1\.0\.0, 1\.2\.0\)"):
        versions.check_version()


def test_a_folder_without_vllm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be a wheel of vLLM or a folder that holds vllm/"):
        judge("1.0.0", tmp_path)


def test_an_installed_package_is_found_and_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tree(tmp_path / "site", {"__init__.py": "raise RuntimeError('imported')\n"})
    monkeypatch.setattr(vllm_sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="vllm is not installed here"):
        installed_folder()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert installed_folder() == tmp_path / "site"


# --- the record that ships ----------------------------------------------------------------------------------------------
def test_every_version_on_record_has_every_symbol_and_file() -> None:
    text = fingerprints.RECORD.read_text(encoding="utf-8")
    kept = json.loads(text)
    assert text == json.dumps(kept, indent=1) + "\n"
    wanted = {symbol.key for symbol in SYMBOLS} | set(fingerprints.FILES)
    assert len({symbol.key for symbol in SYMBOLS}) == len(SYMBOLS) > 150
    for version, digests in kept.items():
        assert set(digests) == wanted, f"{version}: record it again (llmsched vllm-diff {version} FOLDER --record {version})"
        assert sum(digest is None for digest in digests.values()) < 10
    for key in wanted:
        assert any(digests[key] for digests in kept.values()), f"{key} is in no version on record"
    assert len({json.dumps(digests) for digests in kept.values()}) == len(kept)


def test_the_supported_versions_are_those_on_record() -> None:
    assert fingerprints.recorded_versions() == versions.SUPPORTED_VERSIONS


def test_what_the_adapters_import_and_override_is_on_the_list() -> None:
    names = {symbol.name for symbol in SYMBOLS}
    heads = {name.split(".")[0] for name in names}
    constants = {"MULTIMODAL_REGISTRY": "MultiModalRegistry", "current_platform": "Platform"}
    imported, overridden = set(), set()
    for path in sorted(HARDWARE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                imported |= {constants.get(alias.name, alias.name) for alias in node.names}
            if path.name in ("gated_scheduler.py", "serve.py") and isinstance(node, ast.Attribute) and isinstance(node.value, ast.Call):
                called = node.value.func
                if isinstance(called, ast.Name) and called.id == "super" and node.attr != "__new__":  # which is object's
                    overridden.add(f"Scheduler.{node.attr}")
    assert len(imported) > 8 and imported <= heads, sorted(imported - heads)
    assert len(overridden) > 4 and overridden <= names, sorted(overridden - names)
