"""What a policy does on a live server, counted: for Prometheus and for a JSON report.

vLLM's scheduler runs in a process of its own, and ``/metrics`` is answered by another. Counts pass
from one to the other through the multiprocess mode of ``prometheus_client``: the folder named in
``PROMETHEUS_MULTIPROC_DIR``, which vLLM itself uses for more than one API server
(``vllm/v1/metrics/prometheus.py``, 0.28.0).
"""

from __future__ import annotations

import functools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import require
from llmsched_hardware.live_gate import RELEASE_KINDS

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
_BUCKETS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 1.0)
_RECENT = 10_000
_GAUGE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Families:
    policy_seconds: Any
    gate_seconds: Any
    iterations: Any
    errors: Any
    releases: Any
    evictions: Any
    requests: Any
    fallback: Any


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
        errors=counter("llmsched:policy_errors", "Times the policy raised and vLLM's own admission took over.", ["policy"]),
        releases=counter("llmsched:guard_releases", "Requests released because they had waited too long.", ["policy", "queue"]),
        evictions=counter("llmsched:policy_evictions", "Requests evicted because the policy asked for it.", ["policy"]),
        requests=gauge(
            "llmsched:requests", "Requests outside, standing at a boundary, or held in the last iteration.", ["policy", "where"]
        ),
        fallback=gauge("llmsched:fallback", "1 while vLLM's own admission is in force because the policy raised.", ["policy"]),
    )


class PolicyMetrics:
    """Counts of one scheduler, exported and reported.

    Args:
        policy: label of every metric.
        report_path: JSON file rewritten every ``report_seconds`` and at the end; None for none.
    """

    def __init__(self, policy: str, report_path: Path | None = None, report_seconds: float = 10.0) -> None:
        families = _families()
        self.policy = policy
        self._policy_seconds = families.policy_seconds.labels(policy)
        self._gate_seconds = families.gate_seconds.labels(policy)
        self._iterations = {by: families.iterations.labels(policy, by) for by in ("policy", "repeat", "vllm")}
        self._errors = families.errors.labels(policy)
        self._releases = {kind: families.releases.labels(policy, kind) for kind in RELEASE_KINDS}
        self._evictions = families.evictions.labels(policy)
        self._requests = {where: families.requests.labels(policy, where) for where in ("outside", "boundary", "held")}
        self._fallback = families.fallback.labels(policy)
        self._fallback.set(0)
        self.counts = {"policy": 0, "repeat": 0, "vllm": 0}
        self.errors = self.evictions = 0
        self.releases = dict.fromkeys(RELEASE_KINDS, 0)
        self.in_fallback = False
        self._recent = {"policy_seconds": np.zeros(_RECENT), "gate_seconds": np.zeros(_RECENT)}
        self._at = dict.fromkeys(self._recent, 0)
        self._report_path, self._report_seconds = report_path, report_seconds
        self._started = time.time()
        self._next_gauge = self._next_report = 0.0

    def iteration(self, by: str) -> None:
        """One iteration, decided ``by`` the policy, by a repeat of nothing, or by vLLM."""
        self.counts[by] += 1
        self._iterations[by].inc()

    def took(self, policy_seconds: float | None, gate_seconds: float) -> None:
        """Seconds of one iteration; None where the policy was not asked."""
        self._gate_seconds.observe(gate_seconds)
        self._keep("gate_seconds", gate_seconds)
        if policy_seconds is not None:
            self._policy_seconds.observe(policy_seconds)
            self._keep("policy_seconds", policy_seconds)

    def _keep(self, name: str, seconds: float) -> None:
        self._recent[name][self._at[name] % _RECENT] = seconds
        self._at[name] += 1

    def error(self) -> None:
        """The policy raised."""
        self.errors += 1
        self._errors.inc()
        self.set_fallback(True)

    def set_fallback(self, on: bool) -> None:
        """Whether vLLM's own admission is in force."""
        self.in_fallback = on
        self._fallback.set(int(on))

    def evicted(self, count: int) -> None:
        """Requests evicted at the policy's wish."""
        if count:
            self.evictions += count
            self._evictions.inc(count)

    def released(self, totals: dict[str, int]) -> None:
        """Totals of the guard so far."""
        for kind, total in totals.items():
            if total != self.releases[kind]:
                self._releases[kind].inc(total - self.releases[kind])
                self.releases[kind] = total

    def present(self, now: float, outside: int, boundary: int, held: int) -> None:
        """Requests by where they are; exported at most once a second. Writes the report when it is due."""
        if now >= self._next_gauge:
            self._next_gauge = now + _GAUGE_SECONDS
            self._set_requests(outside, boundary, held)
        if self._report_path is not None and now >= self._next_report:
            self._next_report = now + self._report_seconds
            self.write_report()

    def empty(self) -> None:
        """The last request has left: no iteration will follow that could say so."""
        self._next_gauge = 0.0
        self._set_requests(0, 0, 0)

    def _set_requests(self, outside: int, boundary: int, held: int) -> None:
        for where, count in (("outside", outside), ("boundary", boundary), ("held", held)):
            self._requests[where].set(count)

    def summary(self) -> dict[str, Any]:
        """Totals since the start; seconds as mean and quantiles of the last 10,000 iterations."""
        result: dict[str, Any] = {
            "policy": self.policy,
            "started": self._started,
            "uptime_seconds": time.time() - self._started,
            "iterations": dict(self.counts),
            "policy_errors": self.errors,
            "in_fallback": self.in_fallback,
            "guard_releases": dict(self.releases),
            "policy_evictions": self.evictions,
        }
        for name, values in self._recent.items():
            known = values[: min(self._at[name], _RECENT)]
            quantiles = np.quantile(known, [0.5, 0.95, 0.99, 1.0]).tolist() if known.size else [None] * 4
            mean = float(known.mean()) if known.size else None
            result[name] = {"count": self._at[name], "mean": mean, **dict(zip(("p50", "p95", "p99", "max"), quantiles, strict=True))}
        return result

    def write_report(self) -> None:
        """Replace the report file in one go; a reader never sees half of it."""
        if self._report_path is None:
            return
        part = self._report_path.with_name(self._report_path.name + ".part")
        part.write_text(json.dumps(self.summary(), indent=1) + "\n", encoding="utf-8")
        os.replace(part, self._report_path)
