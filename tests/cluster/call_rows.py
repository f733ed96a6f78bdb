"""Finished calls made up for tests: plausible ones, and any that a cluster may write."""

from __future__ import annotations

import numpy as np

from llmsched_env.cluster.finished import FINISHED_DTYPE
from llmsched_env.cluster.metrics import Rows


def drawn(n: int, seed: int = 0, *, replicas: int = 3, rejected: float = 0.1, single: float = 0.2) -> Rows:
    """``n`` calls in the order of their completion, about every second of which ends a program."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(n, dtype=FINISHED_DTYPE)
    rows["number"] = np.arange(n)
    rows["program"] = np.arange(n) // 2
    rows["arrival"] = np.sort(rng.uniform(0.0, n / 100, n))
    rows["program_start"] = rows["arrival"] - rng.exponential(2.0, n).clip(max=rows["arrival"])
    rows["admitted"] = rows["arrival"] + rng.exponential(0.2, n)
    rows["first_token"] = rows["admitted"] + rng.lognormal(-2.0, 1.0, n)
    rows["prompt"] = rng.integers(1, 2000, n)
    rows["cached"] = (rows["prompt"] * rng.uniform(size=n)).astype(np.int32)
    rows["output"] = np.where(rng.uniform(size=n) < single, 1, rng.integers(1, 300, n))
    rows["completed"] = rows["first_token"] + (rows["output"] - 1) * rng.lognormal(-3.0, 0.7, n)
    rows["turn"] = rng.integers(0, 5, n)
    rows["replica"] = rng.integers(0, replicas, n)
    rows["evictions"] = rng.poisson(0.3, n)
    rows["routed"] = 1 + rng.poisson(0.1, n)
    rows["ends_program"] = rng.integers(0, 2, n)
    out = rng.uniform(size=n) < rejected
    rows["rejected"] = out
    rows["replica"][out] = -1
    rows["cached"][out] = 0
    for name in ("admitted", "first_token", "completed"):
        rows[name][out] = np.nan
    return rows[np.argsort(np.where(out, rows["arrival"], rows["completed"]), kind="stable")]
