"""The policy's counts as metrics of ``prometheus_client``, written by a thread beside the scheduler's loop.

vLLM's scheduler runs in a process of its own, and ``/metrics`` is answered by another. Counts pass
from one to the other through the multiprocess mode of ``prometheus_client``: the folder named in
``PROMETHEUS_MULTIPROC_DIR``, which vLLM itself uses for more than one API server
(``vllm/v1/metrics/prometheus.py``, 0.28.0 and 0.32.0).

In that mode every value lies in a file that is mapped into memory (``prometheus_client/mmap_dict.py``, 0.26.0). The file is made with
holes, and a hole that is written to on a full disk ends the process with SIGBUS, which no Python code can catch. So the room is taken
with ``posix_fallocate`` before the first value is made; where that fails there are no metrics, and the server runs.
"""

from __future__ import annotations

import errno
import functools
import os
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmsched_env.errors import require
from llmsched_hardware.live_gate import RELEASE_KINDS

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
DECIDED_BY = ("policy", "repeat", "vllm")
PLACES = ("outside", "boundary", "held")
_BUCKETS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 1.0)
_FILES = ("counter", "histogram", "gauge_mostrecent")  # how prometheus_client names them: PREFIX_PID.db
_FILE_BYTES = 1 << 16  # as it makes them


class Timings:
    """A histogram in plain numbers: what a scheduler's loop adds to without a lock, a file or a call of a library.

    Attributes:
        counts: values at most each bound of the buckets, and one more for those above all, not cumulated.
        total: sum of the values, seconds.
    """

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(_BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """One value."""
        self.counts[bisect_left(_BUCKETS, seconds)] += 1
        self.total += seconds


@dataclass(frozen=True, slots=True)
class Totals:
    """Counts since the start, as the exporter reads them; its own to keep.

    Attributes:
        policy_seconds, gate_seconds: (counts per bucket, sum).
        iterations: by ``DECIDED_BY``; releases: by ``RELEASE_KINDS``; requests: present ones by ``PLACES``.
        errors, overdue, evictions: totals.
        fallback, stuck: present states.
    """

    policy_seconds: tuple[list[int], float]
    gate_seconds: tuple[list[int], float]
    iterations: dict[str, int]
    releases: dict[str, int]
    requests: dict[str, int]
    errors: int
    overdue: int
    evictions: int
    fallback: bool
    stuck: bool


@dataclass(frozen=True, slots=True)
class _Families:
    policy_seconds: Any
    gate_seconds: Any
    iterations: Any
    errors: Any
    overdue: Any
    releases: Any
    evictions: Any
    requests: Any
    fallback: Any
    stuck: Any


@functools.cache  # one registry a process takes a name once
def _families() -> _Families:
    prometheus: Any = require("prometheus_client", "vllm")
    histogram = functools.partial(prometheus.Histogram, buckets=_BUCKETS)
    gauge = functools.partial(prometheus.Gauge, multiprocess_mode="mostrecent")
    counter = prometheus.Counter
    return _Families(
        policy_seconds=histogram("llmsched:policy_seconds", "Time the policy took to decide, per iteration it was asked in.", ["policy"]),
        gate_seconds=histogram("llmsched:gate_seconds", "Time to show the policy the queues and to carry its decision out.", ["policy"]),
        iterations=counter(
            "llmsched:iterations", "Iterations: decided by the policy, repeated as nothing had changed, or vLLM's own.", ["policy", "by"]
        ),
        errors=counter("llmsched:policy_errors", "Times the policy failed and vLLM's own admission took over.", ["policy"]),
        overdue=counter("llmsched:policy_overdue", "Failures because the policy did not decide in time.", ["policy"]),
        releases=counter("llmsched:guard_releases", "Requests released because they had waited too long.", ["policy", "queue"]),
        evictions=counter("llmsched:policy_evictions", "Requests evicted because the policy asked for it.", ["policy"]),
        requests=gauge(
            "llmsched:requests", "Requests outside, standing at a boundary, or held in the last iteration.", ["policy", "where"]
        ),
        fallback=gauge("llmsched:fallback", "1 while vLLM's own admission is in force because the policy failed.", ["policy"]),
        stuck=gauge("llmsched:policy_stuck", "1 while a decision takes longer than a second, or one given up still runs.", ["policy"]),
    )


def take_room(folder: Path, pid: int) -> None:
    """Take the room on the disk that this process's values need, so that no write to them can fail.

    Raises:
        OSError: there is no such folder, it cannot be written, or its disk is full.
    """
    for prefix in _FILES:
        descriptor = os.open(folder / f"{prefix}_{pid}.db", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(descriptor, 0, _FILE_BYTES)
        finally:
            os.close(descriptor)


def is_full(error: OSError) -> bool:
    """Whether an error says that there is no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class Exporter:
    """The metrics of one policy in this process's registry.

    Args:
        policy: label of every metric.

    Raises:
        OSError: the folder of ``PROMETHEUS_MULTIPROC_DIR`` cannot be used.
    """

    def __init__(self, policy: str) -> None:
        folder = os.environ.get(MULTIPROCESS_FOLDER)
        if folder is not None:
            take_room(Path(folder), os.getpid())
        families = _families()
        self._timings = {"policy_seconds": families.policy_seconds.labels(policy), "gate_seconds": families.gate_seconds.labels(policy)}
        self._counters = {
            **{f"iterations {by}": families.iterations.labels(policy, by) for by in DECIDED_BY},
            **{f"releases {kind}": families.releases.labels(policy, kind) for kind in RELEASE_KINDS},
            "errors": families.errors.labels(policy),
            "overdue": families.overdue.labels(policy),
            "evictions": families.evictions.labels(policy),
        }
        self._requests = {where: families.requests.labels(policy, where) for where in PLACES}
        self._fallback, self._stuck = families.fallback.labels(policy), families.stuck.labels(policy)
        self._fallback.set(0)
        self._stuck.set(0)
        self._pushed: dict[str, float] = {}

    def push(self, totals: Totals) -> None:
        """Bring every metric to these totals."""
        for name in ("policy_seconds", "gate_seconds"):
            self._push_timings(name, *getattr(totals, name))
        for prefix, values in (("iterations", totals.iterations), ("releases", totals.releases)):
            for label, value in values.items():
                self._add(self._counters[f"{prefix} {label}"], f"{prefix} {label}", value)
        for name in ("errors", "overdue", "evictions"):
            self._add(self._counters[name], name, getattr(totals, name))
        for where, value in totals.requests.items():
            self._requests[where].set(value)
        self._fallback.set(int(totals.fallback))
        self._stuck.set(int(totals.stuck))

    def _push_timings(self, name: str, counts: Iterable[int], total: float) -> None:
        # A histogram has no public way to add many values at once, and one by one costs a microsecond or more each.
        histogram = self._timings[name]
        for i, count in enumerate(counts):
            self._add(histogram._buckets[i], f"{name} {i}", count)
        self._add(histogram._sum, f"{name} sum", total)

    def _add(self, child: Any, name: str, total: float) -> None:
        grown = total - self._pushed.get(name, 0)
        if grown > 0:
            child.inc(grown)
            self._pushed[name] = total
