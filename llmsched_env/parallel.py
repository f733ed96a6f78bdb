"""Work spread over processes through joblib, on this machine or on a Ray cluster."""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmsched_env.errors import ConfigError, require

BACKENDS = ("loky", "ray")
PACKAGES = ("llmsched_env", "llmsched_baselines", "llmsched_agents")
"""What a worker imports; found where this process finds them, in a checkout or installed."""
WAVE = 4
"""Calls for each Ray worker between two deliveries of results."""


@contextmanager
def sigint_ignored() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C: it is the main process's business, which then ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def start_workers(backend: str, jobs: int | None) -> int:
    """Make ``backend`` ready; returns how many calls it runs at once.

    Args:
        backend: ``loky`` (processes of this machine) or ``ray`` (the cluster that RAY_ADDRESS names, else
            one on this machine). The machines of a cluster need the packages this project depends on;
            the project itself is sent to them.
        jobs: None for all cores of the machine or the cluster.

    Raises:
        ConfigError: the cluster cannot be reached, or refuses.
        MissingExtraError: a package is not installed.
    """
    if backend == "loky":
        return jobs or os.cpu_count() or 1
    ray = require("ray", "ray")
    require("ray.util.joblib", "ray").register_ray()
    with sigint_ignored():
        if address := os.environ.get("RAY_ADDRESS"):
            sent = {"py_modules": [str(folder) for folder in _folders()]}
            try:
                ray.init(log_to_driver=False, logging_level="error", runtime_env=sent)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ConfigError(f"--backend ray: no connection to RAY_ADDRESS={address} ({error})") from error
        else:
            # From the same folders, so that the compiled code in the cache is found.
            parents = dict.fromkeys(str(folder.parent) for folder in _folders())
            path = os.pathsep.join(filter(None, (*parents, os.environ.get("PYTHONPATH"))))
            local = {"num_cpus": jobs or os.cpu_count(), "include_dashboard": False, "runtime_env": {"env_vars": {"PYTHONPATH": path}}}
            ray.init(log_to_driver=False, logging_level="error", **local)
    return jobs or int(ray.cluster_resources()["CPU"])


def _folders() -> list[Path]:
    found = [importlib.util.find_spec(name) for name in PACKAGES]
    return [Path(spec.origin).parent for spec in found if spec is not None and spec.origin]


def unordered(backend: str, jobs: int, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Generator[Any]:
    """``function(*a)`` for each ``a``, results as they are ready: one by one from ``loky``, in waves from ``ray``."""
    joblib = require("joblib", "cli")
    calls = (joblib.delayed(function)(*a) for a in arguments)
    jobs = min(jobs, max(len(arguments), 1))
    if backend != "loky":
        yield from _in_waves(joblib.Parallel(n_jobs=jobs, backend=backend), calls, WAVE * jobs)
        return
    with sigint_ignored():
        results: Generator[Any] = joblib.Parallel(n_jobs=jobs, return_as="generator_unordered")(calls)
    try:
        yield from results
    finally:
        with sigint_ignored():  # a second Ctrl-C must not break off the end of the workers
            results.close()


def _in_waves(parallel: Any, calls: Iterator[Any], size: int) -> Generator[Any]:
    """Ray's backend of joblib has no generators: the results of ``size`` calls at a time."""
    with parallel:
        while wave := list(itertools.islice(calls, size)):
            yield from parallel(wave)
