"""vLLM's sources, read and not imported: an installed package, an unpacked folder or a wheel, and the definition of a symbol in them.

The digest of a symbol is of its syntax tree, walked here, so that it is the same under every Python that reads the file. Comments,
formatting and docstrings do not count, nor do the annotations of functions, which change nothing that runs.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.util
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from llmsched_env.errors import ConfigError
from llmsched_hardware.vllm_symbols import Symbol

_MOST_IMPORTS = 3
"""How often a name is followed to the file that it is imported from."""
_LEFT_OUT = ("ctx", "type_comment")
_ANNOTATIONS = ("annotation", "returns")
Function = (ast.FunctionDef, ast.AsyncFunctionDef)
Definition = (*Function, ast.ClassDef)


# --- the digest -----------------------------------------------------------------------------------------------
def digest(nodes: Iterable[ast.stmt]) -> str:
    """16 hexadecimal digits of the syntax of these definitions; of a class those of its head and its fields."""
    parts: list[str] = []
    for node in nodes:
        _write(node, parts, local=False, shell=True)
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _write(node: ast.AST, out: list[str], *, local: bool, shell: bool = False) -> None:
    """Append a node's type and, by name, its fields that are not empty: what another Python's nodes have besides is empty here.

    Args:
        local: the node stands in a function.
        shell: leave out the methods and inner classes of a class.
    """
    if isinstance(node, ast.Constant):
        out.append(f"{type(node.value).__name__} {node.value!a}")  # what repr escapes depends on the Python
        return
    if isinstance(node, ast.JoinedStr):
        _write_text(node, out, local)
        return
    inside = isinstance(node, Function) or (local and not isinstance(node, ast.ClassDef))
    out.append(type(node).__name__)
    for name in node._fields:
        value = getattr(node, name, None)
        if value is None or value == [] or name in _LEFT_OUT or (name in _ANNOTATIONS and not isinstance(node, ast.AnnAssign)):
            continue
        out.append(f".{name}")
        if name == "annotation" and isinstance(value, ast.Constant):
            value = _unquoted(value)
        for item in value if isinstance(value, list) else (value,):
            if isinstance(item, ast.stmt):
                if not (shell and isinstance(item, Definition)):
                    _write_statement(item, out, inside)
            elif isinstance(item, ast.AST):
                _write(item, out, local=inside)
            else:
                out.append(f"= {item!a}")  # a name or a number; None for the key of ``{**other}``
    out.append(")")


def _write_statement(node: ast.stmt, out: list[str], local: bool) -> None:
    """A statement, unless it does nothing: a docstring, a string under a field, ``pass``, an annotation of a variable."""
    if isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return
    if local and isinstance(node, ast.AnnAssign):
        if node.value is None:
            return
        node = ast.Assign(targets=[node.target], value=node.value)
    _write(node, out, local=local)


def _write_text(node: ast.JoinedStr, out: list[str], local: bool) -> None:
    """An f-string: in how many pieces its text is kept differs between Pythons."""
    out.append("JoinedStr")
    text = ""
    for part in node.values:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            text += part.value
            continue
        if text:
            out.append(f"str {text!a}")
            text = ""
        _write(part, out, local=local)
    if text:
        out.append(f"str {text!a}")
    out.append(")")


def _unquoted(annotation: ast.Constant) -> ast.expr:
    """The annotation of a field that may be written as a string."""
    try:
        return ast.parse(annotation.value, mode="eval").body if isinstance(annotation.value, str) else annotation
    except SyntaxError:
        return annotation


# --- a file ------------------------------------------------------------------------------------------------------
class Source:
    """The definitions of one file.

    Raises:
        ConfigError: not Python that this interpreter reads.
    """

    def __init__(self, label: str, content: bytes) -> None:
        try:
            self.text = content.decode("utf-8")
            tree = _parsed(self.text)
        except (SyntaxError, ValueError) as error:
            raise ConfigError(f"{label}: cannot be read as Python: {error}") from error
        self._names: dict[str, list[ast.stmt]] = {}
        self._imports: dict[str, tuple[int, str, str]] = {}
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    self._imports[alias.asname or alias.name] = (node.level, node.module or "", alias.name)
            for name in _defined(node):
                self._names.setdefault(name, []).append(node)

    def definitions(self, name: str) -> list[ast.stmt]:
        """Every definition of a qualified name, in order: a property and its setter are two; empty where there is none."""
        first, _, rest = name.partition(".")
        found = self._names.get(first, [])
        while rest:
            first, _, rest = rest.partition(".")
            bodies = [node.body for node in found if isinstance(node, ast.ClassDef)]
            found = [node for body in bodies for node in _statements(body) if first in _defined(node)]
        return [node for node in found if not _is_overload(node)]

    def imported(self, name: str) -> tuple[int, str, str] | None:
        """(level, module, name) of the ``from`` import that brings a name in."""
        return self._imports.get(name)

    def digest(self, name: str) -> str | None:
        """The digest of a definition; None where there is none."""
        found = self.definitions(name)
        return digest(found) if found else None

    def lines(self, name: str) -> list[str]:
        """The source lines of a definition, of a class those without its methods."""
        lines = self.text.splitlines()
        chosen: list[str] = []
        for node in self.definitions(name):
            kept = set(_span(node))
            if isinstance(node, ast.ClassDef):
                kept -= {n for inner in node.body if isinstance(inner, Definition) for n in _span(inner)}
            chosen += [lines[n - 1] for n in sorted(kept)]
        return chosen


def _parsed(text: str) -> ast.Module:
    """A syntax tree, made in a third less time: while it grows nothing of it is garbage."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(text)
    finally:
        if collects:
            gc.enable()


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module or a class, those under ``if`` and ``try`` included."""
    for node in body:
        yield node
        if isinstance(node, ast.If):
            yield from _statements([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            yield from _statements([*node.body, *(inner for handler in node.handlers for inner in handler.body), *node.orelse])


def _defined(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, Definition):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [node.target.id] if isinstance(node.target, ast.Name) else []
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _is_overload(node: ast.stmt) -> bool:
    """A signature for type checkers."""
    named = [d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "") for d in getattr(node, "decorator_list", ())]
    return "overload" in named


def _span(node: ast.stmt) -> range:
    """Line numbers of a definition with its decorators."""
    start = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
    return range(start, (node.end_lineno or node.lineno) + 1)


# --- a tree ----------------------------------------------------------------------------------------------------
class Tree:
    """One version of vLLM's sources: a folder or a wheel.

    Attributes:
        label: how it is named in what people read.

    Raises:
        ConfigError: there is no such place, or it holds no ``vllm/``.
    """

    def __init__(self, place: Path, label: str = "") -> None:
        self.label = label or str(place)
        self._wheel: zipfile.ZipFile | None = None
        self._package = place
        self._sources: dict[str, Source | None] = {}
        if place.suffix == ".whl" and place.is_file():
            try:
                self._wheel = zipfile.ZipFile(place)
                held = "vllm/__init__.py" in self._wheel.namelist()
            except (zipfile.BadZipFile, OSError) as error:
                raise ConfigError(f"{place}: cannot be read as a wheel: {error}") from error
        else:
            self._package = place if place.name == "vllm" and not (place / "vllm").is_dir() else place / "vllm"
            held = (self._package / "__init__.py").is_file()
        if not held:
            raise ConfigError(f"{place}: must be a wheel of vLLM or a folder that holds vllm/")

    def version(self) -> str:
        """What ``vllm/_version.py`` says; empty where it says nothing."""
        content = self._read("_version.py") or b""
        found = re.search(r"^(?:__version__ = )?version = ['\"]([^'\"]+)", content.decode("utf-8", "replace"), re.MULTILINE)
        return found[1] if found else ""

    def file_digest(self, file: str) -> str | None:
        """16 hexadecimal digits of the bytes of a file below ``vllm/``; None where there is none."""
        content = self._read(file)
        return None if content is None else hashlib.sha256(content).hexdigest()[:16]

    def stamp(self, files: Iterable[str]) -> tuple[tuple[int, int] | None, ...]:
        """(time of the last change in ns, bytes) of each file of a folder; None where there is none, and in a wheel."""
        found = (self._package / file for file in files)
        return tuple((path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None for path in found)

    def digest(self, symbol: Symbol) -> str | None:
        """A symbol's digest; None where this version has no such symbol."""
        source, name = self._where(symbol)
        return None if source is None else source.digest(name)

    def lines(self, symbol: Symbol) -> list[str]:
        """A symbol's source lines; empty where this version has no such symbol."""
        source, name = self._where(symbol)
        return [] if source is None else source.lines(name)

    def _where(self, symbol: Symbol) -> tuple[Source | None, str]:
        """The file that defines a symbol, which may have moved and be imported where it was, and its name there."""
        file, name = symbol.file, symbol.name
        for _ in range(_MOST_IMPORTS):
            source = self._source(file)
            first, dot, rest = name.partition(".")
            brought = None if source is None or source.definitions(first) else source.imported(first)
            if brought is None:
                return source, name
            level, module, name_there = brought
            found = self._file_of(file, level, module)
            if found is None:
                return None, name
            file, name = found, name_there + dot + rest
        return None, name

    def _file_of(self, file: str, level: int, module: str) -> str | None:
        """The file of a module that another one imports from; None outside vLLM."""
        if level:
            folder = PurePosixPath(file).parents[level - 1]
        elif module.split(".")[0] == "vllm":
            folder, module = PurePosixPath("."), module.partition(".")[2]
        else:
            return None
        stem = folder.joinpath(*module.split(".")) if module else folder
        options = (f"{stem}.py", f"{stem}/__init__.py")
        return next((option for option in options if self._source(option) is not None), None)

    def _source(self, file: str) -> Source | None:
        if file not in self._sources:
            if len(self._sources) > _MOST_IMPORTS:  # syntax trees are large, and a server lives long
                self._sources.clear()
            content = self._read(file)
            self._sources[file] = None if content is None else Source(f"{self.label}: vllm/{file}", content)
        return self._sources[file]

    def _read(self, file: str) -> bytes | None:
        """The content of a file below ``vllm/``; None where there is none."""
        try:
            return (self._package / file).read_bytes() if self._wheel is None else self._wheel.read(f"vllm/{file}")
        except (FileNotFoundError, NotADirectoryError, KeyError):
            return None
        except (OSError, zipfile.BadZipFile, zlib.error) as error:  # damaged
            raise ConfigError(f"{self.label}: vllm/{file} cannot be read: {error}") from error


def installed_folder() -> Path:
    """The folder that holds the installed ``vllm/``; it is looked for, not imported.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        found = importlib.util.find_spec("vllm")
    except ValueError:  # a module that was put there by hand
        found = None
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        if (Path(place) / "__init__.py").is_file():
            return Path(place).parent
    raise ConfigError("vllm is not installed here, so there are no sources of it to read")
