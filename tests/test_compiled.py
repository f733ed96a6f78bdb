"""The cache of compiled functions: never old code, never the end of a run."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest

from llmsched_env import compiled as module
from llmsched_env.compiled import _Reach, compiled

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="nothing is compiled")


def run(folder: Path, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh process in ``folder`` whose cache is ``folder/cache``."""
    variables = {name: value for name, value in os.environ.items() if name not in ("LLMSCHED_QUIET", "NUMBA_DISABLE_JIT")}
    variables |= {"NUMBA_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"} | environment
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=variables, check=True, capture_output=True, text=True)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, nothing said yet."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(module, "CACHE_FOLDER", folder)
    monkeypatch.setattr(module, "_said", set())
    monkeypatch.delenv("LLMSCHED_QUIET", raising=False)
    return folder


def plus_three(x: int) -> int:
    return x + 3


def fresh() -> Any:
    """As a new process has it: nothing compiled yet."""
    return compiled(plus_three)


def only_file(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


def hits(function: Any) -> int:
    return sum(function.dispatcher.stats.cache_hits.values())


# --- old code ---------------------------------------------------------------------------------------
RULE = """
from llmsched_env.compiled import compiled
from {package} import helper, numbers
from {package}.helper import twice
from {package}.numbers import OFFSET

@compiled
def rule(x):
    return twice(x) + helper.more(x) + OFFSET + numbers.SCALE * x
"""
HELPER = """
from llmsched_env.compiled import compiled

@compiled
def twice(x):
    return {factor} * x

@compiled
def more(x):
    return x + {more}
"""


def write_package(folder: Path, factor: int = 2, more: int = 10, offset: int = 100, scale: int = 1000) -> None:
    package, other = folder / "mine", folder / "shared"
    for place in (package, other):
        place.mkdir(exist_ok=True)
        (place / "__init__.py").write_text("")
    (package / "rule.py").write_text(RULE.format(package="shared"))
    (other / "helper.py").write_text(HELPER.format(factor=factor, more=more))
    (other / "numbers.py").write_text(f"OFFSET = {offset}\nSCALE = {scale}\n")
    for place in (package, other):
        shutil.rmtree(place / "__pycache__", ignore_errors=True)


def test_a_changed_helper_or_constant_of_another_file_is_compiled_again(tmp_path: Path) -> None:
    ask = "from mine.rule import rule; print(rule(1), sum(rule.dispatcher.stats.cache_hits.values()))"
    write_package(tmp_path)
    assert run(tmp_path, ask).stdout.split() == ["1113", "0"]
    assert run(tmp_path, ask).stdout.split() == ["1113", "1"]  # nothing changed: loaded
    for changed, answer in (({"factor": 3}, "1114"), ({"more": 20}, "1123"), ({"offset": 200}, "1213"), ({"scale": 2000}, "2113")):
        write_package(tmp_path, **changed)
        assert run(tmp_path, ask).stdout.split() == [answer, "0"], changed
    write_package(tmp_path)
    assert run(tmp_path, ask).stdout.split() == ["1113", "1"]  # and back: still there


def test_code_without_a_file_is_compiled_and_kept(tmp_path: Path) -> None:
    code = "from llmsched_env.compiled import compiled\n@compiled\ndef f(x): return x + {}\n"
    code += "print(f(1), sum(f.dispatcher.stats.cache_hits.values()))"
    wrapped = "exec(compile('''" + code + "''', '<typed>', 'exec'))"
    for add, expected in ((1, ["2", "0"]), (1, ["2", "1"]), (2, ["3", "0"])):
        assert run(tmp_path, wrapped.format(add)).stdout.split() == expected


RECORD = """
from llmsched_env.records import Record, reader

class Mine(Record):
{fields}

mine_at = reader(Mine)
"""
READER = """
from llmsched_env.compiled import compiled
from shared.declared import Mine, mine_at

@compiled
def by_record(mine):
    return mine.wanted

@compiled
def by_handle(handle):
    return mine_at(handle).wanted
"""


def test_a_changed_record_of_another_file_is_read_where_its_fields_are_now(tmp_path: Path) -> None:
    """The functions stay as they are, byte for byte; the memory they read does not."""
    write_package(tmp_path)
    (tmp_path / "mine" / "reads.py").write_text(READER)
    ask = (
        "from mine.reads import Mine, by_handle, by_record; m = Mine(); m.wanted, m.other = 2, 5\n"
        "print(by_record(m), by_handle(m.handle), *(sum(f.dispatcher.stats.cache_hits.values()) for f in (by_record, by_handle)))"
    )
    layouts = ("    wanted: int\n    other: int", "    other: int\n    wanted: int", "    other: int\n    wanted: float")
    for fields in layouts:
        (tmp_path / "shared" / "declared.py").write_text(RECORD.format(fields=fields))
        shutil.rmtree(tmp_path / "shared" / "__pycache__", ignore_errors=True)
        answers = ["2.0", "2.0"] if "float" in fields else ["2", "2"]
        assert run(tmp_path, ask).stdout.split() == [*answers, "0", "0"]
        assert run(tmp_path, ask).stdout.split() == [*answers, "1", "1"]


def test_a_function_called_from_compiled_code_alone_is_linked_into_its_caller(cache: Path) -> None:
    helper: Any = compiled(plus_three)
    caller: Any = outside("@compiled\ndef f(x): return 2 * helper(x)", helper=helper)
    assert caller(1) == 8 and helper._outer is None and only_file(cache).name.startswith("theirs.f-")
    again: Any = outside("@compiled\ndef f(x): return 2 * helper(x)", helper=fresh())
    assert again(1) == 8 and hits(again) == 1
    assert len(again.py_func.__globals__["helper"]._inner.overloads) == 0  # loaded code needs no callee
    assert helper(1) == 4 and hits(helper) == 0 and len(list(cache.iterdir())) == 2  # Python asks for code of its own
    loaded = fresh()
    assert loaded(1) == 4 and hits(loaded) == 1
    assert helper(1.5) == 4.5 and caller(1.5) == 9.0 and len(list(cache.iterdir())) == 4  # one for each types


def test_a_function_whose_address_is_asked_for_is_kept_too(cache: Path) -> None:
    from llmsched_env.perf.batch import BatchSums
    from llmsched_env.pointers import address_of

    source = "@compiled\ndef f(batch): return batch.model[0] + {}"
    first, again, other = (outside(source.format(n)) for n in (1, 1, 2))
    assert address_of(first, (BatchSums,), float) == address_of(first, (BatchSums,), float) > 0
    only_file(cache)
    assert address_of(again, (BatchSums,), float) > 0 and hits(again) == 1 and only_file(cache)
    assert address_of(other, (BatchSums,), float) > 0 and hits(other) == 0 and len(list(cache.iterdir())) == 2


def reach(function: Callable[..., Any]) -> str:
    found = _Reach()
    found.function(function)  # type: ignore[arg-type]
    return found.digest.hexdigest()


def outside(source: str, **names: Any) -> Any:
    """``f`` of a module that is not ours."""
    space: dict[str, Any] = {"__name__": "theirs", "np": np, "compiled": compiled, "njit": numba.njit, **names}
    exec(source, space)
    return space["f"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f(x): return x + 1", "def f(x): return x + 2"),
        ("def f(x, y=1): return x + y", "def f(x, y=2): return x + y"),
        ("def f(x): return x + 0.0", "def f(x): return x + -0.0"),
        ("def f(x): return x + 1", "def f(x): return x + 1.0"),
        ("def f(x): return x + 1", "def f(x): return x + True"),
        ("def f(x): return (lambda y: y + 1)(x)", "def f(x): return (lambda y: y + 2)(x)"),
        ("def g(x): return 1\ndef f(x): return g(x)", "def g(x): return 2\ndef f(x): return g(x)"),
        ("@compiled\ndef g(x): return x\ndef f(x): return g(x)", "@njit\ndef g(x): return x\ndef f(x): return g(x)"),
        ("@compiled\ndef g(x): return 1\ndef f(x): return g(x)", "@compiled\ndef g(x): return 2\ndef f(x): return g(x)"),
        ("@njit\ndef g(x): return x\ndef f(x): return g(x)", "@njit(fastmath=True)\ndef g(x): return x\ndef f(x): return g(x)"),
        ("K = 1\ndef f(x): return K", "K = 2\ndef f(x): return K"),
        ("K = (1, (2, 3))\ndef f(x): return K", "K = (1, (2, 4))\ndef f(x): return K"),
        ("K = np.array([1.0, 2.0])\ndef f(x): return K", "K = np.array([1.0, 3.0])\ndef f(x): return K"),
        ("K = np.array([1])\ndef f(x): return K", "K = np.array([1], np.int32)\ndef f(x): return K"),
        ("K = np.float32(1)\ndef f(x): return K", "K = np.float64(1)\ndef f(x): return K"),
        ("def h(k):\n def f(x): return x + k\n return f\nf = h(1)", "def h(k):\n def f(x): return x + k\n return f\nf = h(2)"),
        ("K = 1\ndef f(x): return [K for _ in range(x)]", "K = 2\ndef f(x): return [K for _ in range(x)]"),
    ],
)
def test_the_key_sees_what_the_machine_code_is_made_of(before: str, after: str) -> None:
    assert reach(outside(before)) == reach(outside("\n\n" + before)) != reach(outside(after))


def test_the_key_follows_modules_intrinsics_and_circles() -> None:
    from numba import njit, vectorize
    from numba.extending import intrinsic

    def make(number: int) -> Any:
        constants = types.ModuleType("constants")
        constants.K = number  # type: ignore[attr-defined]
        constants.itself = constants  # type: ignore[attr-defined]
        return outside("def g(x): return f(x)\ndef f(x): return m.itself.K if x else g(x)", m=constants)

    assert reach(make(1)) == reach(make(1)) != reach(make(2))
    for decorate in (njit, vectorize, vectorize(["int64(int64)"])):
        first, second = (decorate(outside(f"def f(x): return x + {n}")) for n in (1, 2))
        assert reach(outside("def f(x): return g(x)", g=first)) != reach(outside("def f(x): return g(x)", g=second)), decorate
    first, second = (outside(f"def f(typingctx, x): return {n}") for n in (1, 2))
    assert reach(outside("def f(x): return g(x)", g=intrinsic(first))) != reach(outside("def f(x): return g(x)", g=intrinsic(second)))


def test_the_key_does_not_depend_on_the_process(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.append({str(ROOT / 'tests')!r})\n"
        "from llmsched_agents.kernel import advance_range, agent_rule\n"
        "from test_compiled import outside, reach\n"
        """print(reach(agent_rule.py_func), reach(advance_range.py_func), reach(outside("def f(x): return x in {'a', 'b', 'c'}")))"""
    )
    assert len({run(tmp_path, code, PYTHONHASHSEED=str(seed)).stdout for seed in (1, 2)}) == 1


# --- damage -----------------------------------------------------------------------------------------
def test_a_truncated_file_is_a_miss_and_written_again(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fresh()(1) == 4
    file = only_file(cache)
    whole = file.read_bytes()
    for length in (0, 1, 31, 32, 33, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        again = fresh()
        assert again(1) == 4 and hits(again) == 0
        assert only_file(cache) == file
        loaded = fresh()
        assert loaded(1) == 4 and hits(loaded) == 1
    assert capfd.readouterr().err.count("\n") == 2  # it compiles, and the first damaged file


def test_a_flipped_bit_is_never_run(cache: Path) -> None:
    fresh()(1)
    file = only_file(cache)
    whole = file.read_bytes()
    for place in np.linspace(0, len(whole) - 1, 6).astype(int):
        data = bytearray(whole)
        data[place] ^= 1
        file.write_bytes(bytes(data))
        again = fresh()
        assert again(1) == 4 and hits(again) == 0


@pytest.mark.parametrize("damage", ["garbage", "directory", "full directory", "unreadable", "dangling link", "loop"])
def test_whatever_lies_in_the_place_of_a_file(cache: Path, damage: str) -> None:
    fresh()(1)
    file = only_file(cache)
    if damage == "garbage":
        file.write_bytes(b"\x80\x04garbage" * 1000)
    elif damage == "unreadable":
        file.chmod(0)
    else:
        file.unlink()
        if damage == "dangling link":
            file.symlink_to(cache / "nowhere")
        elif damage == "loop":
            file.symlink_to(file)
        else:
            file.mkdir()
            if damage == "full directory":
                (file / "something").write_text("x")
    assert fresh()(1) == 4
    assert fresh()(1) == 4
    assert only_file(cache).is_file()


def test_a_file_of_other_types_is_not_run(cache: Path) -> None:
    fresh()(1)
    file = only_file(cache)
    other = file.read_bytes()
    file.unlink()
    fresh()(1.5)
    only_file(cache).write_bytes(other)  # whole, but of integers
    again = fresh()
    assert again(1.5) == 4.5 and hits(again) == 0


def test_a_folder_that_cannot_be_written_costs_time_only(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cache.write_text("a file in the folder's place")
    assert fresh()(1) == 4
    assert fresh()(2) == 5
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and sum("cannot be kept" in line or "compiled again" in line for line in lines) == 1


def test_a_full_disk_costs_time_only(cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert fresh()(1) == 4
    assert list(cache.iterdir()) == []  # no half-written file stays
    assert "No space left" in capfd.readouterr().err


def test_versions_of_a_function_are_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEEP_VERSIONS", 2)
    for number in range(4):
        outside(f"@compiled\ndef f(x): return x + {number}")(1)
        newest = max(cache.iterdir(), key=lambda path: path.stat().st_mtime)
        os.utime(newest, (number, number))
    assert len(list(cache.iterdir())) == 2
    last = outside("@compiled\ndef f(x): return x + 3")
    assert last(1) == 4 and hits(last) == 1
    last.dispatcher.recompile()
    assert last(1) == 4 and len(list(cache.iterdir())) == 1


def test_two_processes_at_once(tmp_path: Path) -> None:
    write_package(tmp_path)
    code = "from mine.rule import rule; print(rule(1), rule(1.0))"
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    both = [subprocess.Popen([sys.executable, "-c", code], env=variables, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].split() for process in both] == [["1113", "1113.0"]] * 2
    assert run(tmp_path, code).stderr == ""  # all of it can be loaded


# --- what it says, and the rest ---------------------------------------------------------------------
def test_the_first_compilation_is_announced_once(tmp_path: Path) -> None:
    write_package(tmp_path)
    only_import = "import mine.rule"
    code = "from mine.rule import rule; rule(1); rule(1.0)"
    assert run(tmp_path, only_import).stderr == ""
    assert run(tmp_path, code, NUMBA_DISABLE_JIT="1").stderr == ""
    assert run(tmp_path, code, LLMSCHED_QUIET="1", NUMBA_CACHE_DIR=str(tmp_path / "other")).stderr == ""
    (line,) = run(tmp_path, code).stderr.splitlines()
    assert line.startswith("llmsched_env: compiling for this machine")
    assert run(tmp_path, code).stderr == ""


def test_names_and_options() -> None:
    assert module.CACHE_FOLDER.name.rpartition("-")[2].isalnum()
    function: Any = compiled(plus_three)
    for dispatcher in (function.dispatcher, function._inner):
        assert dispatcher.targetoptions["nogil"] is True and dispatcher.targetoptions["nopython"] is True
    assert function.__name__ == "plus_three" and function.py_func is function.__wrapped__ is plus_three
    assert function.signatures == function.dispatcher.signatures == []
    assert function(1) == 4 and len(function.signatures) == 1


def test_a_compiled_function_is_copied_and_pickled_by_its_name() -> None:
    from llmsched_env.reward import CompiledReward, latency_reward

    assert copy.deepcopy(latency_reward) is pickle.loads(pickle.dumps(latency_reward)) is latency_reward
    for copied in (copy.deepcopy, lambda reward: pickle.loads(pickle.dumps(reward))):
        again = copied(CompiledReward(latency_reward, [1.0, 2.0], memory=3))
        assert again.function is latency_reward and again.address == CompiledReward(latency_reward).address
        assert again.numbers.parameters.tolist() == [1.0, 2.0] and again.numbers.memory.tolist() == [0, 0, 0]
    inside: Any = outside("@compiled\ndef f(x): return x + 1")
    assert copy.deepcopy(inside) is inside


def test_without_numba_the_decorator_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.config.DISABLE_JIT", 1)
    assert compiled(plus_three) is plus_three


def test_the_temporary_folder_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    base = module._temporary_base()
    assert base.stat().st_mode & 0o077 == 0
    base.chmod(0o777)
    with pytest.raises(PermissionError):
        module._temporary_base()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("numba.config.CACHE_DIR", str(tmp_path / "file"))
    assert not module._folder().exists()  # neither place serves: nothing is kept, and nothing fails
    base.chmod(0o700)
    assert module._folder().parent == base


def test_old_versions_go_and_the_own_stays(tmp_path: Path) -> None:
    mine, old, new = (tmp_path / f"llmsched_env-{name}" for name in ("mine", "old", "new"))
    for folder in (mine, old, new):
        folder.mkdir()
    for folder in (mine, old):
        os.utime(folder, (0, 0))
    module._remove_stale(mine)
    assert mine.is_dir() and new.is_dir() and not old.exists()
    module._remove_stale(tmp_path / "nowhere" / "x")


def test_edits_leave_a_bounded_number_of_folders(tmp_path: Path) -> None:
    now = time.time()
    for i in range(30):
        folder = tmp_path / f"llmsched_env-{i}"
        folder.mkdir()
        os.utime(folder, (now - i * 6 * 3600, now - i * 6 * 3600))
    module._remove_stale(tmp_path / "llmsched_env-0")
    assert sorted(int(path.name.rpartition("-")[2]) for path in tmp_path.iterdir()) == list(range(11))


def test_a_page_or_a_command_that_changes_leaves_the_cache_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    for name in ("compiled.py", "engine/step.py", "cli/compare.py", "pages/results/page.py", "bench/suite.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("x = 1\n", encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(package / "compiled.py"))
    before = module._digest()
    for name in ("cli/compare.py", "pages/results/page.py", "bench/suite.py"):
        (package / name).write_text("x = 2\n", encoding="utf-8")
        assert module._digest() == before
    (package / "engine" / "step.py").write_text("x = 2\n", encoding="utf-8")
    assert module._digest() != before
