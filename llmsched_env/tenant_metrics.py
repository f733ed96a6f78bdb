"""What each tenant received: service, goodput against its own limits, latency, and how evenly service was shared.

*Service* is in weighted tokens, 1 a prompt token and 2 an output token (arXiv 2401.00588: w_p = 1, w_q = 2). From a per-request log
it is known at a request's first admission (its prompt), at its first token and at its completion; between the latter two its output
tokens are taken to come evenly. A request that is still running counts its prompt, and its first token once that has come out.

*Contended* time is made of windows of ``WINDOW_SECONDS`` during all of which at least two tenants were backlogged: a tenant is
backlogged while a request of its own has arrived and has not yet been admitted a first time. Only then does it say anything that one
received less than another; over a drained episode everybody receives what it asked for, whatever the policy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llmsched_env.engine.state import INPUT_PRICE, OUTPUT_PRICE
from llmsched_env.errors import ConfigError
from llmsched_env.metrics import jain_index, latency, tpot, ttft
from llmsched_env.tenant_terms import TenantTerms, check_terms
from llmsched_env.types import BoolArray, FloatArray, RequestLog

WINDOW_SECONDS = 5.0
"""Length of a window. A window must be short against a burst and long against a request's prefill."""


@dataclass(frozen=True, slots=True)
class TenantFigures:
    """One tenant in one episode. NaN where no request has the metric.

    Attributes:
        name, weight: of the tenant.
        requests, completed: of its own.
        service: weighted tokens of the whole episode.
        contended_service: of these, in contended windows in which it was backlogged.
        goodput: share of its requests that completed within its own limits.
        latency_mean, latency_p99, ttft_mean, ttft_p99: seconds.
    """

    name: str
    weight: float
    requests: int
    completed: int
    service: float
    contended_service: float
    goodput: float
    latency_mean: float
    latency_p99: float
    ttft_mean: float
    ttft_p99: float


@dataclass(frozen=True, slots=True)
class TenantSummary:
    """All tenants in one episode.

    Attributes:
        tenants: in the order of ``Workload.tenant``.
        jain: Jain's index of service over weight (``metrics.jain_index``) of the n tenants that were backlogged all through a
            contended window, mean over these windows; 1 is equal, 1/n all for one. NaN where there was no such window.
        contended_seconds: length of all these windows.
        fair_latency: mean of the tenants' mean latencies, by weight, seconds (minus the return of the reward of this name).
        weighted_goodput: mean of the tenants' goodputs, by weight.
    """

    tenants: tuple[TenantFigures, ...]
    jain: float
    contended_seconds: float
    fair_latency: float
    weighted_goodput: float


def summarize_tenants(log: RequestLog, terms: Sequence[TenantTerms], *, window: float = WINDOW_SECONDS) -> TenantSummary:
    """The summary of an episode.

    Args:
        log: of the episode; without ``log.tenant`` all requests are the first tenant's.
        terms: at least one for every tenant that has requests.
        window: seconds, > 0.

    Raises:
        ConfigError: a request of a tenant without terms, or a window that is no time.
    """
    known = check_terms("terms", tuple(terms))
    if not (math.isfinite(window) and window > 0):
        raise ConfigError(f"window: {window}, must be finite and > 0 seconds")
    owner = np.zeros(len(log), dtype=np.int64) if log.tenant is None else log.tenant.astype(np.int64)
    if owner.size and int(owner.max()) >= len(known):
        raise ConfigError(f"terms: {len(known)} given, must be one for each tenant, up to number {int(owner.max())}")
    edges = _edges(log, window)
    served = np.array([_service_until(log, owner == j, edges) for j in range(len(known))]).reshape(len(known), -1)
    shares = np.diff(served, axis=1)  # (J, windows)
    backlogged = np.array([_backlogged(log, owner == j, edges) for j in range(len(known))]).reshape(shares.shape)
    contended = backlogged.sum(axis=0) >= 2
    backlogged &= contended[None, :]
    weights = np.array([one.weight for one in known])
    figures = tuple(
        _figures(log, owner == j, one, float(served[j, -1]), float(shares[j, backlogged[j]].sum())) for j, one in enumerate(known)
    )
    present = np.array([one.requests > 0 for one in figures], dtype=np.bool_)
    return TenantSummary(
        tenants=figures,
        jain=_jain(shares / weights[:, None], backlogged, contended),
        contended_seconds=float(np.count_nonzero(contended)) * window,
        fair_latency=_weighted(weights, present, [one.latency_mean for one in figures]),
        weighted_goodput=_weighted(weights, present, [one.goodput for one in figures]),
    )


def _edges(log: RequestLog, window: float) -> FloatArray:
    """Ends of the windows, from 0 until after the last event."""
    events = np.concatenate([log.arrival, log.admitted, log.first_token, log.completed])
    last = float(np.max(events[np.isfinite(events)], initial=0.0))
    count = math.floor(last / window) + 1
    edges: FloatArray = np.arange(count + 1, dtype=np.float64) * window
    return edges


def _service_until(log: RequestLog, mine: BoolArray, times: FloatArray) -> FloatArray:
    """(T,) weighted tokens that these requests have received by ``times``."""
    admitted = log.admitted[mine]
    come = np.isfinite(admitted)
    order = np.argsort(admitted[come], kind="stable")
    prompts = np.concatenate([[0.0], np.cumsum(log.prompt_tokens[mine][come][order], dtype=np.float64)])
    total = np.zeros(times.shape, dtype=np.float64)
    total += INPUT_PRICE * prompts[np.searchsorted(admitted[come][order], times, side="right")]
    first, last, output = log.first_token[mine], log.completed[mine], log.output_tokens[mine].astype(np.float64)
    for begin, end, tokens in zip(first, last, output, strict=True):
        if not math.isfinite(begin):
            continue
        total += OUTPUT_PRICE * (times >= begin)
        if math.isfinite(end) and end > begin:
            total += OUTPUT_PRICE * (tokens - 1.0) * np.clip((times - begin) / (end - begin), 0.0, 1.0)
    return total


def _backlogged(log: RequestLog, mine: BoolArray, edges: FloatArray) -> BoolArray:
    """(windows,) whether a request was waiting for its first admission all through each window."""
    keep = mine & ~log.rejected
    begin = log.arrival[keep]
    end = np.where(np.isfinite(log.admitted[keep]), log.admitted[keep], np.inf)
    found = np.zeros(edges.size - 1, dtype=np.bool_)
    since, until = math.nan, -math.inf
    for start, stop in zip(begin.tolist(), end.tolist(), strict=True):  # arrivals are in order: join what overlaps
        if start > until:
            if until > -math.inf:
                found |= (edges[:-1] >= since) & (edges[1:] <= until)
            since = start
        until = max(until, stop)
    if until > -math.inf:
        found |= (edges[:-1] >= since) & (edges[1:] <= until)
    return found


def _jain(rates: FloatArray, backlogged: BoolArray, contended: BoolArray) -> float:
    """Mean over the contended windows of Jain's index over the backlogged tenants; a window in which none received anything is equal."""
    values = [jain_index(rates[backlogged[:, i], i]) for i in np.flatnonzero(contended)]
    return float(np.mean(values)) if values else math.nan


def _figures(log: RequestLog, mine: BoolArray, terms: TenantTerms, service: float, contended: float) -> TenantFigures:
    whole, first, each = latency(log)[mine], ttft(log)[mine], tpot(log)[mine]
    count = int(np.count_nonzero(mine))
    done = np.isfinite(whole)
    within = done & (first <= terms.ttft) & ~(each > terms.tpot)
    return TenantFigures(
        name=terms.name,
        weight=terms.weight,
        requests=count,
        completed=int(np.count_nonzero(done)),
        service=service,
        contended_service=contended,
        goodput=float(np.count_nonzero(within)) / count if count else math.nan,
        latency_mean=_mean(whole),
        latency_p99=_p99(whole),
        ttft_mean=_mean(first),
        ttft_p99=_p99(first),
    )


def _mean(values: FloatArray) -> float:
    present = values[np.isfinite(values)]
    return float(present.mean()) if present.size else math.nan


def _p99(values: FloatArray) -> float:
    present = values[np.isfinite(values)]
    return float(np.percentile(present, 99)) if present.size else math.nan


def _weighted(weights: FloatArray, present: BoolArray, values: Sequence[float]) -> float:
    """Mean by weight over the tenants that have requests."""
    if not present.any():
        return math.nan
    return float(weights[present] @ np.asarray(values)[present] / weights[present].sum())
