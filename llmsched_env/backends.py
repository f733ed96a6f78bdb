"""Backends by name: the simulator, and whatever installed packages offer for the same environment."""

from __future__ import annotations

import inspect
from typing import Any

from llmsched_env.backend import Backend
from llmsched_env.engine.simulator import PrefixCachingBackend, SimBackend
from llmsched_env.errors import ConfigError
from llmsched_env.registry import BACKENDS

# vLLM's scheduler and engine are entry points of this project itself (pyproject.toml): what stands above is not imported from here.
BACKENDS.built_in({"sim": SimBackend, "sim-prefix-cache": PrefixCachingBackend})


def make_backend(name: str, **config: Any) -> Backend:
    """Build a backend by name; a package that offers it is imported only then.

    Raises:
        ConfigError: unknown name (the nearest one is given), or ``config`` that the backend does not take.
        MissingExtraError: it needs a package that is not installed.
    """
    made = BACKENDS.find(name)
    try:
        inspect.signature(made).bind(**config)
    except TypeError as error:
        raise ConfigError(f"backend_config of {name!r}: {error}") from error
    backend: Backend = made(**config)
    return backend
