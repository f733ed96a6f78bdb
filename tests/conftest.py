"""Settings shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# The first example of a test pays for compilation, so a deadline would measure numba.
settings.register_profile("project", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

# Tests read what programs write to stderr, whether or not the cache of compiled code is full.
os.environ.setdefault("LLMSCHED_QUIET", "1")


@pytest.fixture
def own_workers() -> Iterator[None]:
    """Worker processes that nobody else has: joblib keeps those of an earlier test for minutes, with the import paths of that test."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor().shutdown(wait=True)
    yield
    get_reusable_executor().shutdown(wait=True)
