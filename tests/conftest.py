"""Settings shared by all tests."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings


def _cache_folder() -> str:
    """A folder for compiled code that belongs to exactly these sources.

    numba recompiles a cached function when its own file changes, not when a function that it calls
    changes in another file: with the default cache a change in one kernel file could go untested.
    Constants are compiled in too, so the whole folders count that compiled code imports from.
    """
    digest = hashlib.sha256()
    package = Path(__file__).resolve().parents[1] / "llmsched_env"
    for source in sorted(package.rglob("*.py")):
        text = source.read_bytes()
        if source.parent.name in ("engine", "perf") or b"njit" in text:
            digest.update(text)
    return str(Path(tempfile.gettempdir()) / f"llmsched-env-numba-{digest.hexdigest()[:16]}")


os.environ.setdefault("NUMBA_CACHE_DIR", _cache_folder())  # before anything imports numba

# The first example of a test pays for compilation, so a deadline would measure numba.
settings.register_profile("project", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")
