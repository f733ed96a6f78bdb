"""What a policy does on a live server, counted: for Prometheus and for a JSON report.

The scheduler's loop only adds to plain numbers. Two threads carry them out of the process: one to ``prometheus_client`` once a
second (``live_prometheus``), one to the report (``live_report``). Whatever goes wrong there is logged and tried again, and neither
ends nor holds up an iteration.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_env.errors import MissingExtraError
from llmsched_hardware import live_thread
from llmsched_hardware.live_background import Background
from llmsched_hardware.live_gate import RELEASE_KINDS
from llmsched_hardware.live_prometheus import DECIDED_BY, MULTIPROCESS_FOLDER, PLACES, Exporter, Timings, Totals, is_full
from llmsched_hardware.live_report import ReportWriter

logger = logging.getLogger("vllm.llmsched")

STUCK_SECONDS = 1.0
"""A decision that takes longer is reported while it lasts."""
_EXPORT_SECONDS = 1.0
_RECENT = 10_000


class PolicyMetrics:
    """Counts of one scheduler, exported and reported.

    Attributes:
        counts: iterations by who decided (``DECIDED_BY``).
        errors, overdue: how often the policy failed, and how often of these because it took too long.
        releases: of the guard, by where the request stood.
        requests: present ones by place (``PLACES``) in the last iteration.
        exported: whether ``prometheus_client`` has the counts.

    Args:
        policy: label of every metric.
        report_path: JSON file rewritten every ``report_seconds``; None for none.
    """

    def __init__(self, policy: str, report_path: Path | None = None, report_seconds: float = 10.0) -> None:
        self.policy = policy
        self.counts = dict.fromkeys(DECIDED_BY, 0)
        self.errors = self.overdue = self.evictions = 0
        self.releases = dict.fromkeys(RELEASE_KINDS, 0)
        self.requests = dict.fromkeys(PLACES, 0)
        self.in_fallback = False
        self._asked_at: float | None = None
        self._told = False
        self._timings = {"policy_seconds": Timings(), "gate_seconds": Timings()}
        self._recent = {name: np.zeros(_RECENT) for name in self._timings}
        self._at = dict.fromkeys(self._recent, 0)
        self._started, self._since = time.time(), time.monotonic()
        self._exporter = _exporter(policy)
        self.exported = self._exporter is not None
        self._export = Background("export of metrics", self._push, _EXPORT_SECONDS)
        self._report = None if report_path is None else ReportWriter(report_path, report_seconds, self.summary, self._progress)

    # --- what the scheduler's loop calls: no lock, no file, no library ---------------------------------------

    def iteration(self, by: str) -> None:
        """One iteration, decided ``by`` the policy, by a repeat of nothing, or by vLLM."""
        self.counts[by] += 1

    def asked(self, at: float) -> None:
        """The policy is asked at a time of ``time.perf_counter``; `took` or `error` follows."""
        self._asked_at = at

    def took(self, policy_seconds: float | None, gate_seconds: float) -> None:
        """Seconds of one iteration; None where the policy was not asked."""
        self._asked_at = None
        self._keep("gate_seconds", gate_seconds)
        if policy_seconds is not None:
            self._keep("policy_seconds", policy_seconds)

    def _keep(self, name: str, seconds: float) -> None:
        self._timings[name].add(seconds)
        at = self._at[name]
        self._recent[name][at % _RECENT] = seconds
        self._at[name] = at + 1

    def error(self, overdue: bool = False) -> None:
        """The policy failed, or did not decide in time."""
        self._asked_at = None
        self.errors += 1
        self.overdue += overdue
        self.in_fallback = True

    def set_fallback(self, on: bool) -> None:
        """Whether vLLM's own admission is in force."""
        self.in_fallback = on

    def evicted(self, count: int) -> None:
        """Requests evicted at the policy's wish."""
        self.evictions += count

    def released(self, totals: dict[str, int]) -> None:
        """Totals of the guard so far."""
        self.releases.update(totals)

    def present(self, outside: int, boundary: int, held: int) -> None:
        """Requests by where they are."""
        requests = self.requests
        requests["outside"], requests["boundary"], requests["held"] = outside, boundary, held

    def empty(self) -> None:
        """The last request has left: no iteration will follow that could say so."""
        self.present(0, 0, 0)

    # --- threads ------------------------------------------------------------------------------------------------

    def _progress(self) -> tuple[object, ...]:
        return (*self.counts.values(), *self.requests.values(), self.errors, self.in_fallback, self.stuck())

    def stuck(self) -> bool:
        """Whether a decision has taken longer than ``STUCK_SECONDS`` so far, or one that was given up still runs."""
        return self._waits() or live_thread.left_behind() > 0

    def _waits(self) -> bool:
        asked = self._asked_at
        return asked is not None and time.perf_counter() - asked > STUCK_SECONDS

    def totals(self) -> Totals:
        """A copy of all counts. The loop may go on meanwhile: a count may be an iteration behind another."""
        timings = {name: (list(t.counts), t.total) for name, t in self._timings.items()}
        return Totals(
            policy_seconds=timings["policy_seconds"],
            gate_seconds=timings["gate_seconds"],
            iterations=dict(self.counts),
            releases=dict(self.releases),
            requests=dict(self.requests),
            errors=self.errors,
            overdue=self.overdue,
            evictions=self.evictions,
            fallback=self.in_fallback,
            stuck=self.stuck(),
        )

    def _push(self) -> None:
        self._tell()
        if self._exporter is not None:
            self._exporter.push(self.totals())

    def _tell(self) -> None:
        """Of a policy that the engine waits for, once each time."""
        waits = self._waits()
        if waits and not self._told:
            with contextlib.suppress(Exception):
                logger.error("policy %s has not decided for more than %g s; the engine waits for it", self.policy, STUCK_SECONDS)
        self._told = waits

    def summary(self) -> dict[str, Any]:
        """Totals since the start; seconds as mean and quantiles of the last 10,000 iterations."""
        result: dict[str, Any] = {
            "policy": self.policy,
            "started": self._started,
            "uptime_seconds": time.monotonic() - self._since,
            "iterations": dict(self.counts),
            "requests": dict(self.requests),
            "policy_errors": self.errors,
            "policy_overdue": self.overdue,
            "policy_stuck": self.stuck(),
            "in_fallback": self.in_fallback,
            "guard_releases": dict(self.releases),
            "policy_evictions": self.evictions,
        }
        for name, values in self._recent.items():
            count = self._at[name]
            known = values[: min(count, _RECENT)].copy()
            quantiles = np.quantile(known, [0.5, 0.95, 0.99, 1.0]).tolist() if known.size else [None] * 4
            mean = float(known.mean()) if known.size else None
            result[name] = {"count": count, "mean": mean, **dict(zip(("p50", "p95", "p99", "max"), quantiles, strict=True))}
        return result

    def close(self) -> None:
        """Export and report a last time; a disk that hangs is waited for two seconds at most."""
        for thread in (self._export, self._report):
            if thread is not None:
                thread.close(1.0)


def _exporter(policy: str) -> Exporter | None:
    """None, and a warning, where the metrics have nowhere to go: a server is not refused for that."""
    try:
        return Exporter(policy)
    except MissingExtraError:
        raise
    except Exception as error:  # an old file of another process may hold anything
        hint = "; give it a disk with room" if isinstance(error, OSError) and is_full(error) else ""
        logger.warning("%s cannot be used, the policy's metrics stay in the report: %s%s", MULTIPROCESS_FOLDER, error, hint)
        return None
