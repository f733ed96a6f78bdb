"""``@compiled``: numba's ``njit`` with a disk cache that belongs to exactly these sources.

numba recompiles a cached function when its own file changes, but not when a function it calls
changes in another file: after an upgrade or an edit it would go on running old code. So the cache
folder is named after a digest of the whole package, in ``NUMBA_CACHE_DIR`` or the user's cache
folder. Folders of other versions that nobody has used for a month are removed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_PREFIX = "llmsched_env-"
_KEEP_SECONDS = 30 * 24 * 3600.0


def _digest() -> str:
    package = Path(__file__).resolve().parent
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(package.rglob("*.py")):
        digest.update(source.relative_to(package).as_posix().encode())
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _base() -> Path:
    chosen = numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME")
    return Path(chosen) if chosen else Path.home() / ".cache"


def _folder() -> Path:
    """The cache folder of these sources, created; in the temporary folder where the user's cannot be written."""
    for base in (_base, lambda: Path(tempfile.gettempdir())):
        try:
            folder = base() / f"{_PREFIX}{_digest()}"
            folder.mkdir(parents=True, exist_ok=True)
            os.utime(folder)
        except (OSError, RuntimeError):  # no home directory is a RuntimeError
            continue
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.mkdtemp(prefix=_PREFIX))


def _remove_stale(folder: Path) -> None:
    limit = time.time() - _KEEP_SECONDS
    for other in folder.parent.glob(f"{_PREFIX}*"):
        if other != folder and other.is_dir() and other.stat().st_mtime < limit:
            shutil.rmtree(other, ignore_errors=True)


CACHE_FOLDER = _folder()
_remove_stale(CACHE_FOLDER)


def _compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    before = numba.config.CACHE_DIR
    # numba reads the setting when it decorates, so other packages keep theirs.
    numba.config.CACHE_DIR = str(CACHE_FOLDER)
    try:
        result: Callable[..., Any] = numba.njit(cache=True, **options)(function)
    finally:
        numba.config.CACHE_DIR = before
    return result


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile to machine code at the first call, or load it from the cache; ordinary Python under ``NUMBA_DISABLE_JIT=1``."""
    return _compile(function)


def parallel(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with ``numba.prange`` loops spread over threads."""
    return _compile(function, parallel=True)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same, for a function of the hot path: an array costs a dozen machine words to pass, so it is merged into its callers."""
    return _compile(function, forceinline=True)
