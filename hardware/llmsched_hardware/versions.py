"""Which vLLM is installed, and what it reads from the environment when it is imported. Imports nothing of vLLM."""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from llmsched_env.errors import ConfigError, MissingExtraError, install_command

SUPPORTED_VERSIONS = ("0.28.0",)
CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder of the project, where this module runs from one."""
_ENVIRONMENT = (
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),  # the engine in this process: its scheduler must be at hand
    ("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB; a number of blocks that is given wins
    ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),  # binding threads to cores would bind the whole program
    ("VLLM_NO_USAGE_STATS", "1"),
    ("VLLM_LOGGING_LEVEL", "ERROR"),
)


def check_version() -> str:
    """The installed vLLM version.

    Raises:
        MissingExtraError: neither vllm nor vllm-cpu is installed.
        ConfigError: a version these modules were not tested with.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        if version.split("+")[0] not in SUPPORTED_VERSIONS:
            raise ConfigError(f"{name} {version} is not supported (tested: {', '.join(SUPPORTED_VERSIONS)})")
        return version
    raise MissingExtraError(f"vllm is not installed; run: {install_command('vllm')}{_without_gpu()}")


def _without_gpu() -> str:
    """What a checkout has for machines without a GPU; nothing where this package was installed without its Makefile."""
    makefile = CHECKOUT / "Makefile"
    return " (CPU only: make setup-vllm)" if makefile.is_file() and "setup-vllm:" in makefile.read_text(encoding="utf-8") else ""


def prepare_environment() -> None:
    """What vLLM reads when it is imported; values the user has set win. Call before the first ``import vllm``.

    Raises:
        MissingExtraError, ConfigError: as ``check_version``.
    """
    check_version()
    for name, value in _ENVIRONMENT:
        os.environ.setdefault(name, value)
