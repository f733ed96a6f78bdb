"""``@compiled``: numba's ``njit`` with a disk cache that holds machine code of exactly these sources.

numba recompiles a cached function when its own file changes, but not when a function it calls changes
in another file: after an upgrade or an edit it would go on running old code. Two things keep that from
happening. The cache folder, in ``NUMBA_CACHE_DIR`` or the user's cache folder, is named after a digest of
the environment's sources (this package without the programs that stand above it); folders of other
versions that nobody uses are removed. And a file in it is named after a digest of its function and of all
that numba freezes into the machine code: the functions it reaches, in whatever file or package they are,
and the constants they read.

A file is written whole or not at all and carries a checksum: a damaged one is compiled again, and a folder
that cannot be written to costs time, never the run. The first compilation of a process is announced on
stderr, unless it is a worker of another or ``LLMSCHED_QUIET=1``.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import os
import pickle
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import current_process
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.core import sigutils, types
from numba.core.compiler import CompilerBase, CompileResult, DefaultPassBuilder
from numba.core.dispatcher import _FunctionCompiler
from numba.core.serialize import dumps

_PACKAGE = __name__.partition(".")[0]
_PREFIX = f"{_PACKAGE}-"
_ABOVE = ("bench", "pages", "cli")
"""Folders of this package that stand above the environment: a page or a command that changes changes no engine."""
_KEEP_SECONDS = 30 * 24 * 3600.0
_DAY_SECONDS = 24 * 3600.0
_KEEP_FOLDERS = 10
_KEEP_VERSIONS = 64
"""Files a function keeps: one for each types of its arguments and state of the user's sources; the oldest go first."""


# --- the folder -------------------------------------------------------------------------------------
def _digest() -> str:
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(package.rglob("*.py")):
        place = source.relative_to(package)
        if place.parts[0] not in _ABOVE:
            digest.update(place.as_posix().encode())
            digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _base() -> Path:
    chosen = numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME")
    return Path(chosen).absolute() if chosen else Path.home() / ".cache"


def _temporary_base() -> Path:
    """A folder of this user alone: what lies in the cache is unpickled, so nobody else may write there."""
    user = os.getuid() if hasattr(os, "getuid") else 0
    base = Path(tempfile.gettempdir()) / f"{_PREFIX}user{user}"
    base.mkdir(mode=0o700, exist_ok=True)
    found = base.lstat()
    if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and (found.st_uid != user or found.st_mode & 0o022)):
        raise PermissionError(f"{base} belongs to somebody else")
    return base


def _folder() -> Path:
    """The cache folder of these sources, created; in the temporary folder where the user's can be neither written nor read."""
    name = f"{_PREFIX}{_digest()}"
    for base in (_base, _temporary_base):
        try:
            folder = base() / name
            folder.mkdir(parents=True, exist_ok=True)
            filled = any(folder.iterdir())
            with contextlib.suppress(OSError):
                os.utime(folder)
        except (OSError, RuntimeError):  # no home directory is a RuntimeError
            continue
        if filled or os.access(folder, os.W_OK):  # a full one that is read-only is worth more than an empty one
            return folder
    return Path(tempfile.gettempdir()) / name / "unusable"  # nothing is read or kept


def _remove_stale(folder: Path) -> None:
    """Folders of other versions: those unused for a month, and of those unused for a day all but the newest (every edit makes one)."""
    now = time.time()
    found = []
    with contextlib.suppress(OSError):
        for other in folder.parent.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError):  # another process may be removing it, too
                if other != folder and other.is_dir():
                    found.append((now - other.stat().st_mtime, other))
    for i, (age, other) in enumerate(sorted(found)):
        if age > _KEEP_SECONDS or (age > _DAY_SECONDS and i >= _KEEP_FOLDERS):
            shutil.rmtree(other, ignore_errors=True)


CACHE_FOLDER = _folder()
"""Of this package's sources; its name ends with their digest."""
_remove_stale(CACHE_FOLDER)


# --- what a compiled function is made of ------------------------------------------------------------
_CONSTANTS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), enum.Enum, np.dtype, numba.types.Type)
_NOT_FOLLOWED = ("numba", "numpy", "llvmlite")  # the first two's versions are in the key, the third's goes with numba's
_SETTINGS = ("BOUNDSCHECK", "OPT", "DEBUGINFO_DEFAULT", "FULL_TRACEBACKS")


class _Reach:
    """The functions and constants that a function reaches by the names in its code.

    Functions of the environment are described by their own code and closure alone: the rest is in the
    folder's name. Not seen are numba extensions (``overload``) that another package registers.
    """

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: set[int] = set()

    def _add(self, *parts: object) -> None:
        self.digest.update("\0".join(map(str, parts)).encode("utf-8", "backslashreplace") + b"\1")

    def function(self, function: FunctionType) -> None:
        module = function.__module__ or ""
        self._add("function", module, function.__qualname__)
        if id(function) in self._seen or module.partition(".")[0] in _NOT_FOLLOWED:
            return
        self._seen.add(id(function))
        names = self._code(function.__code__)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self.value(value, names)
        for cell in function.__closure__ or ():
            try:
                self.value(cell.cell_contents, names)
            except ValueError:
                self._add("empty cell")
        package, *inner = module.split(".")
        if package != _PACKAGE or inner[:1] in ([folder] for folder in _ABOVE):
            for name in names:
                if name in function.__globals__:
                    self._add("global", name)
                    self.value(function.__globals__[name], names)

    def _code(self, code: CodeType) -> list[str]:
        """Describe it and the code within it; the names it reads, in order."""
        names = set(code.co_names)
        self._add(code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self._add(code.co_argcount, code.co_kwonlyargcount, code.co_flags, code.co_exceptiontable.hex())
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                names.update(self._code(constant))
            else:
                self.value(constant, [])
        return sorted(names)

    def value(self, value: object, names: list[str]) -> None:
        """Describe a value; of a module, what it has by one of ``names``."""
        function = getattr(value, "__wrapped__", None)  # numba keeps it in compiled functions, ufuncs and intrinsics
        if isinstance(value, FunctionType):
            self.function(value)
        elif isinstance(function, FunctionType):
            self._add(type(value).__qualname__, sorted(getattr(value, "targetoptions", {}).items()))
            self.function(function)
        elif isinstance(value, _CONSTANTS):
            self._add(type(value).__qualname__, repr(value))
        elif isinstance(value, np.ndarray | np.generic):
            array = np.asarray(value)
            self._add("array", array.dtype, array.shape, array.tobytes().hex() if array.dtype != object else "")
        elif isinstance(value, tuple):
            self._add(type(value).__qualname__, len(value), getattr(value, "_fields", ()))
            for item in value:
                self.value(item, names)
        elif isinstance(value, frozenset):
            self._add("frozenset", sorted(map(repr, value)))
        elif isinstance(value, ModuleType):
            self._add("module", value.__name__)
            if id(value) in self._seen or value.__name__.partition(".")[0] in _NOT_FOLLOWED:
                return
            self._seen.add(id(value))
            for name in names:
                if name in vars(value):
                    self._add("attribute", name)
                    self.value(vars(value)[name], names)
        else:
            kind = value if isinstance(value, type) else type(value)
            self._add(kind.__module__, kind.__qualname__, getattr(value, "_fields", ()))


# --- several processes --------------------------------------------------------------------------------
_others: dict[str, subprocess.Popen[bytes]] = {}


def compile_elsewhere(functions: Iterable[Callable[..., Any]], code: str) -> None:
    """Have a second process compile functions into the cache while this one compiles others.

    Whoever comes to need one of them waits for that process; what it has not done is compiled here.

    Args:
        code: Python that compiles the functions.
    """
    setup = f"import sys; sys.path[:] = {sys.path!r}; "
    environment = {**os.environ, "LLMSCHED_QUIET": "1", "LLMSCHED_COMPILE_ALONE": "1"}
    with contextlib.suppress(OSError, ValueError):  # where no process may be started this one does it all
        process = subprocess.Popen(
            [sys.executable, "-c", setup + code],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        _others.update((_label(function), process) for function in functions)


def wait_for_others(label: str) -> bool:
    """Whether another process was to compile this function; it has ended then."""
    process = _others.pop(label, None)
    if process is None:
        return False
    try:
        process.wait(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
    return True


def _label(function: Any) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "", f"{function.__module__}.{function.__qualname__}")[-80:]


# --- the cache --------------------------------------------------------------------------------------
FIRST_USE = "10 to 30 seconds"
"""What compiling an environment and its vector form takes where nothing is kept: 8 s on 2 idle cores of a server, 25 s on busy ones."""
_said: set[str] = set()  # at most two kinds of lines


def _say(kind: str, line: str) -> None:
    """One line of each kind on stderr in a process; of compiling in the main one alone, as every worker would say it again."""
    if kind == "compiling" and current_process().name != "MainProcess":
        return
    if kind in _said or os.environ.get("LLMSCHED_QUIET", "0") not in ("", "0"):
        return
    _said.add(kind)
    if sys.stderr is not None:  # without a console there is none
        with contextlib.suppress(OSError, ValueError):
            print(f"llmsched_env: {line}", file=sys.stderr, flush=True)


def compiling_is_meant() -> None:
    """From now on compiling is not announced in this process: it is what it was started for."""
    _said.add("compiling")


class _Cache:
    """What numba's dispatcher asks of a cache, as one file for each types of the arguments.

    numba's own keeps a numbered list of files in an index. Two processes that compile one function for
    different types at once can give both the same number; here the name says what is in the file.
    """

    def __init__(self, function: FunctionType) -> None:
        self._function = function
        self._label = _label(function)
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(CACHE_FOLDER)

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def holds_any(self) -> bool:
        """Whether something is kept of the function, for whatever types."""
        with contextlib.suppress(OSError):
            return any(CACHE_FOLDER.glob(f"{self._label}-*.nbc"))
        return False

    def flush(self) -> None:
        """Remove what is kept of the function."""
        self._trim(0)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function for these types of arguments; None if it is to be compiled."""
        target_context.refresh()
        found = self._load(sig, target_context) if self._enabled else None
        if found is None and self._enabled and wait_for_others(self._label):
            found = self._load(sig, target_context)
        if found is None:
            where = f"; later runs load it from {CACHE_FOLDER}, and `llmsched warmup` fills it ahead" if self._enabled else ""
            _say("compiling", f"compiling for this machine, which takes {FIRST_USE}{where}")
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function, if that can be done."""
        if not self._enabled or data.library.has_dynamic_globals or any(not lifted.can_cache for lifted in data.lifted):
            return
        try:
            payload = dumps(data._reduce())
            self._write(self._path(sig, data.codegen), hashlib.sha256(payload).digest() + payload)
            self._trim(_KEEP_VERSIONS)
        except Exception as error:  # no space, no permission, something that cannot be pickled: the function itself works
            _say("cache", f"compiled code cannot be kept in {CACHE_FOLDER} ({type(error).__name__}: {error})")

    def _load(self, sig: Any, target_context: Any) -> Any:
        path = None
        try:
            path = self._path(sig, target_context.codegen())
            data = path.read_bytes()
            payload = memoryview(data)[32:]
            if hashlib.sha256(payload).digest() != data[:32]:
                raise ValueError("the file is damaged")
            found = CompileResult._rebuild(target_context, *pickle.loads(payload))
            if tuple(found.signature.args) != _arguments(sig):
                raise ValueError("the file is of other types")
            return found
        except FileNotFoundError:
            return None
        except Exception as error:  # unpickling raises whatever the file says
            _say("cache", f"{path or self._label} is compiled again ({type(error).__name__}: {error})")
            if path is not None:
                _remove(path)
            return None

    def _path(self, sig: Any, codegen: Any) -> Path:
        reach = _Reach()
        reach.function(self._function)
        settings = [getattr(numba.config, name, None) for name in _SETTINGS]
        versions = (numba.__version__, np.__version__, sys.implementation.cache_tag)
        key = repr((str(_arguments(sig)), codegen.magic_tuple(), versions, settings, reach.digest.hexdigest()))
        return CACHE_FOLDER / f"{self._label}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.nbc"

    @staticmethod
    def _write(path: Path, data: bytes) -> None:
        """All of it under a name of its own, then renamed: no reader sees a half, whoever else writes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:16]}")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _trim(self, keep: int) -> None:
        def written(path: Path) -> Iterator[float]:
            with contextlib.suppress(OSError):
                yield path.stat().st_mtime

        files = sorted((time, path) for path in CACHE_FOLDER.glob(f"{self._label}-*.nbc*") for time in written(path))
        for _, path in files[: max(len(files) - keep, 0)]:
            _remove(path)


def _arguments(sig: Any) -> tuple[Any, ...]:
    return tuple(sigutils.normalize_signature(sig)[0])


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# --- the decorators ---------------------------------------------------------------------------------
class _InnerPipeline(CompilerBase):
    """numba's own pipeline, but for the machine code: what is called from compiled code alone is only ever linked into its callers."""

    def define_pipelines(self) -> list[Any]:
        self.state.flags.no_compile = True
        return [DefaultPassBuilder.define_nopython_pipeline(self.state)]


class _InnerCompiler(_FunctionCompiler):
    def _compile_core(self, args: Any, return_type: Any) -> Any:
        # numba finds the code of a callee by its entry point, which these do not have: any builtin of its own will do.
        found = super()._compile_core(args, return_type)._replace(entry_point=[].append)
        self.targetdescr.target_context.insert_user_function(found.entry_point, found.fndesc, [found.library])
        return found


class Compiled:
    """A function that is machine code when it is called: from Python, by address, or from other compiled functions.

    For compiled callers it has neither machine code nor wrappers of its own, which are more than half of what compiling
    takes; where Python or an address needs them they are made then, and kept on disk.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.py_func = function
        alone = {"pipeline_class": _InnerPipeline, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
        inner: Any = numba.njit(nogil=True, **alone)(function)
        inner._compiler.__class__ = _InnerCompiler
        self._inner = inner
        self._outer: Any = None

    @property
    def dispatcher(self) -> Any:
        """numba's dispatcher with all that a call from Python needs."""
        if self._outer is None:
            self._outer = numba.njit(nogil=True, no_cfunc_wrapper=True)(self.py_func)  # machine code touches no Python object
            self._outer._cache = _Cache(cast(FunctionType, self.py_func))
        return self._outer

    def __call__(self, *args: Any) -> Any:
        return (self._outer or self.dispatcher)(*args)

    @property
    def _numba_type_(self) -> Any:
        return types.Dispatcher(self._inner)

    @property
    def signatures(self) -> Any:
        """Types of the arguments for which there is machine code of its own."""
        return self.dispatcher.signatures

    def __reduce__(self) -> str:
        return self.py_func.__qualname__  # as a function is pickled: by its name; a copy is the function itself


_MARK = "__llmsched_compiled__"
Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile to machine code at the first call, or load it from the cache; ordinary Python under ``NUMBA_DISABLE_JIT=1``.

    Other threads of Python run while the function does.
    """
    if numba.config.DISABLE_JIT:
        function.__dict__[_MARK] = True
        return function
    return cast(Function, Compiled(function))


def is_compiled(function: object) -> bool:
    """Whether ``compiled`` has decorated it."""
    return isinstance(function, Compiled) or _MARK in getattr(function, "__dict__", {})


def entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """What to call where a call counts: numba's dispatcher itself, a tenth of a microsecond sooner."""
    return function.dispatcher if isinstance(function, Compiled) else function
