"""What predicted output lengths are worth: the same admission at several trusts, over cells of the suite and errors of the predictor."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from llmsched_agents.learned_shrinkage import LearnedShrinkage, with_fluid_budget
from llmsched_baselines.predicted import PredictedWork
from llmsched_env.bench.seeds import seed_of
from llmsched_env.bench.suite import MEMORY, Bench, Cell, cells, run_counted
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.metrics import Interval, mean_interval
from llmsched_env.runner import Policy
from llmsched_env.types import FloatArray
from llmsched_env.workload import PredictionModel

MODELS = {
    "perfect": PredictionModel(0.0),
    "sigma 0.3": PredictionModel(0.3),
    "sigma 0.6": PredictionModel(0.6),
    "sigma 1.0": PredictionModel(1.0),
    "sigma 0.6, biased": PredictionModel(0.6, (1.5,), 0.6),
    "sigma 0.6, heavy tail": PredictionModel(0.6, tail=3.0),
}
"""Errors of the predictor: without bias and with normal noise, but for the two that say otherwise."""

OTHERS = ("sigma 0.3", "sigma 0.6, biased", "sigma 0.6, heavy tail")
"""Measured in bursts alone."""

FRAME = "sigma 0.6"
"""The predictor in whose queues hidden lengths are measured."""

HIDDEN, HALF, RAW, LEARNED = "hidden", "half", "raw", "learned"
TRUSTS = {HIDDEN: 0.0, HALF: 0.5, RAW: 1.0}
"""Constant trusts."""


def chosen_cells() -> list[Cell]:
    """Cells that KV memory binds, at loads at which requests wait."""
    found = cells(("bursts", "daily", "stationary"), ("azure-conv", "sharegpt"), MEMORY, (1.0, 1.1))
    return sorted(found, key=lambda cell: ("bursts", "daily", "stationary").index(cell.part))


def trusts_of(cell: str, model: str) -> tuple[str, ...]:
    """Who is measured with a predictor; hidden lengths once for all, as the requests are the same."""
    if model == "perfect":
        return (RAW,)
    if model in OTHERS and not cell.startswith("bursts"):
        return ()
    return (HIDDEN, HALF, RAW, LEARNED) if model == FRAME else (RAW, LEARNED)


@dataclass(frozen=True, slots=True)
class Run:
    """One episode: ``latency_mean`` in seconds, and preemptions."""

    cell: str
    model: str
    trust: str
    seed: int
    latency_mean: float
    evictions: int


def run_seed(bench: Bench, cell: Cell, seed: int) -> list[Run]:
    """One seed of a cell: the same requests for everybody, predictions of every model drawn from the same noise."""
    requests, limits, backend = bench.workload(cell, "evaluation", seed), bench.limits(cell), SimBackend()
    found = []
    for model, error in MODELS.items():
        workload = error.predict(requests, seed_of("evaluation", seed))
        for trust in trusts_of(cell.key, model):
            policy = policy_of(bench, cell, error, trust)
            policy.reset()
            figures, _ = run_counted(policy, workload, backend, limits)
            found.append(Run(cell.key, model, trust, seed, figures.latency_mean, figures.evictions))
    return found


@functools.lru_cache(maxsize=32)  # tables take longer to make than an episode
def policy_of(bench: Bench, cell: Cell, error: PredictionModel, trust: str) -> Policy:
    """Who decides in a cell: all with the same queues, levels and token budget."""
    setting = with_fluid_budget(bench.setting(cell))
    setting = replace(setting, statistics=error.statistics(setting.statistics))
    return LearnedShrinkage(setting) if trust == LEARNED else PredictedWork(setting, shrink=TRUSTS[trust])


def values(runs: Sequence[Run], cell: str, model: str, trust: str) -> FloatArray:
    """(seeds,) mean latencies in the order of the seeds."""
    own = sorted((run.seed, run.latency_mean) for run in runs if (run.cell, run.model, run.trust) == (cell, model, trust))
    return np.array([latency for _, latency in own])


def change(runs: Sequence[Run], cell: str, model: str, trust: str) -> Interval:
    """Mean latency against hidden lengths, share of it, paired over the seeds: mean of the differences over the mean of the hidden."""
    hidden = values(runs, cell, FRAME, HIDDEN)
    return mean_interval((values(runs, cell, model, trust) - hidden) / hidden.mean())
