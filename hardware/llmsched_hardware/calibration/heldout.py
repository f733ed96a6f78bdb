"""A fitted model on a workload it has not seen: the same requests on the engine and on the simulator."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_baselines import Setting, make_policy
from llmsched_env.backend import View
from llmsched_env.backends import make_backend
from llmsched_env.engine.record_backend import RecordBackend
from llmsched_env.engine_config import EngineConfig
from llmsched_env.fluid import stability_boundary
from llmsched_env.metrics import Summary
from llmsched_env.perf import IterationTimeModel
from llmsched_env.perf.base import FloatArray
from llmsched_env.runner import Policy, run_episode
from llmsched_env.types import IterationReport, Workload
from llmsched_env.workload import Lognormal, Poisson
from llmsched_hardware.calibration.fit import FitError, fit_error
from llmsched_hardware.calibration.iteration_log import IterationLog, read_iteration_log
from llmsched_hardware.calibration.settings import backend_settings, engine_config
from llmsched_hardware.progress import Progress
from llmsched_hardware.real_engine import EngineOptions

LOAD = 0.7
"""Arrival rate as a share of the fluid stability boundary."""
MOST, PILOT = 300, 20
"""Requests of the workload, and of the pilot that tells how many the time allows."""
PASSES = 3
MARGIN = 1.3
SEED = 20_251_121
TRAFFIC_LOADS, TRAFFIC_POLICIES, TRAFFIC_REQUESTS, TRAFFIC_ROUNDS = (0.5, 0.8, 1.1), ("vllm", "sarathi"), 150, 10
"""Of the traffic that is logged to be fitted: shares of the boundary, policies, requests of an episode, most rounds through all."""


@dataclass(frozen=True, slots=True)
class ModelCheck:
    """A fitted model on the held-out workload.

    Attributes:
        iterations: of the warm passes; first: of the pass in which batch shapes are new.
        latency, ttft, tpot: relative error of the means, simulator with this model against the engine's warm passes.
    """

    iterations: FitError
    first: FitError
    latency: float
    ttft: float
    tpot: float

    def __str__(self) -> str:
        return (
            f"iterations {self.iterations} (first pass, new shapes: MAPE {100 * self.first.mape:.1f} %); "
            f"simulated mean latency {100 * self.latency:+.1f} %, TTFT {100 * self.ttft:+.1f} %, TPOT {100 * self.tpot:+.1f} %"
        )


@dataclass(frozen=True, slots=True)
class HeldOut:
    """The held-out workload.

    Attributes:
        description: its requests.
        passes: over the engine, the first one not counted.
        spread: (largest - smallest) / mean of the mean latency over the warm passes; NaN for one.
        checks: by form.
    """

    description: str
    passes: int
    spread: float
    checks: dict[str, ModelCheck]


@dataclass(frozen=True, slots=True)
class _Pass:
    """One run of the workload on the engine: (n, BATCH_FIELDS) batches, (n,) seconds, the summary; how long the run took."""

    batches: FloatArray
    seconds: FloatArray
    summary: Summary
    wall_seconds: float


def _lengths(options: EngineOptions) -> Lognormal:
    """Lengths of requests that an engine takes."""
    longest = options.max_model_len
    return Lognormal(
        prompt_mean=longest / 12,
        prompt_sigma=0.8,
        output_mean=longest / 24,
        output_sigma=0.8,
        max_prompt=longest // 2,
        max_output=longest // 2,
        max_total=longest,
    )


def record_traffic(
    model: IterationTimeModel, options: EngineOptions, num_blocks: int, deadline: float, progress: Progress, log: Path
) -> IterationLog | None:
    """Run workloads at several loads under two policies and log every iteration; as many rounds as there is time for.

    Args:
        model: sets the arrival rates.
        log: where the iterations go; replaced.

    Returns:
        None where nothing of use fits before the deadline.
    """
    log.unlink(missing_ok=True)
    engine, lengths = engine_config(options, model, num_blocks), _lengths(options)
    statistics = lengths.statistics()
    boundary = stability_boundary(statistics, engine)
    backend: Any = make_backend("vllm", clock="measured", iteration_log=log, **backend_settings(options))
    rounds = 0
    try:
        with progress(TRAFFIC_ROUNDS) as bar:
            bar.show("traffic to fit")
            for number in range(TRAFFIC_ROUNDS):
                begin = time.monotonic()
                # A policy with other engine settings means building the engine anew: it keeps its turn for all loads.
                for name, load in itertools.product(TRAFFIC_POLICIES, TRAFFIC_LOADS):
                    backend.about_episode = {"policy": name, "rate": load * boundary, "seed": number + 1, "repeat": 0, "warm_up": False}
                    policy = make_policy(name, Setting(statistics, load * boundary, engine))
                    run_episode(policy, _poisson(lengths, load * boundary, TRAFFIC_REQUESTS, SEED + 1 + number), backend=backend)
                    if time.monotonic() > deadline:
                        break
                rounds += 1
                bar.advance()
                if time.monotonic() + (time.monotonic() - begin) > deadline:
                    break
    finally:
        backend.close()
    return read_iteration_log(log) if rounds else None


def hold_out(
    models: Mapping[str, IterationTimeModel], options: EngineOptions, num_blocks: int, deadline: float, progress: Progress, most: int = MOST
) -> HeldOut | None:
    """Run a workload on the engine, and on the simulator with each fitted model.

    Args:
        models: by form; ``formula`` sets the arrival rate.
        options: of the engine, which is built here.
        num_blocks: its usable KV blocks.
        deadline: ``time.monotonic()`` by which to be done; None is returned where nothing of use fits before it.
        most: requests of the workload; fewer where the time is short.

    Raises:
        EngineError: the engine cannot start or dies.
    """
    engine = engine_config(options, models["formula"], num_blocks)
    lengths = _lengths(options)
    statistics = lengths.statistics()
    rate = LOAD * stability_boundary(statistics, engine)
    policies = {form: make_policy("vllm", Setting(statistics, rate, engine.replace(time_model=m))) for form, m in models.items()}
    policy = policies["formula"]
    backend = make_backend("vllm", clock="measured", **backend_settings(options))
    passes: list[_Pass] = []
    try:
        pilot = _poisson(lengths, rate, min(PILOT, most))
        _observed(policy, pilot, backend)  # compiles what is still to be compiled
        each = _observed(policy, pilot, backend).wall_seconds / len(pilot)
        size = min(most, int((deadline - time.monotonic()) / (MARGIN * PASSES * each)))
        if size < len(pilot):
            return None
        workload = _poisson(lengths, rate, size)
        with progress(PASSES) as bar:
            bar.show("held-out workload")
            while len(passes) < PASSES:
                passes.append(_observed(policy, workload, backend))
                bar.advance()
                if len(passes) > 1 and time.monotonic() + passes[-1].wall_seconds > deadline:
                    break
    finally:
        backend.close()
    first, warm = passes[0], passes[1:]
    mean_latency = [p.summary.latency_mean for p in warm]
    return HeldOut(
        description=f"{size} requests, Poisson {rate:.3g}/s ({LOAD:g} of the fluid boundary), mean lengths "
        f"{statistics.mean_prompt:.0f} + {statistics.mean_output:.0f}, policy vllm",
        passes=len(passes),
        spread=float(np.ptp(mean_latency) / np.mean(mean_latency)) if len(warm) > 1 else math.nan,
        checks={form: _check(model, policies[form], workload, first, warm) for form, model in models.items()},
    )


def compile_simulator() -> None:
    """What numba compiles at first use takes up to a minute."""
    setting = Setting(Lognormal(8, 0.5, 4, 0.5).statistics(), 1.0, EngineConfig.vllm())
    run_episode(make_policy("vllm", setting), Workload.of([0.0], [8], [2]))


def _poisson(lengths: Lognormal, rate: float, size: int, seed: int = SEED) -> Workload:
    times, sizes = (np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(2))
    return Workload.of(Poisson(rate).sample(times, size), *lengths.sample(sizes, size))


def _observed(policy: Policy, workload: Workload, backend: Any) -> _Pass:
    assert isinstance(backend, RecordBackend)
    batches: list[FloatArray] = []
    seconds: list[float] = []

    def on_step(report: IterationReport, view: View) -> None:
        if not report.idle:
            batches.append(backend.record.batch.array())
            seconds.append(report.duration)

    begin = time.monotonic()
    summary = run_episode(policy, workload, backend=backend, on_step=on_step).summary
    return _Pass(np.array(batches), np.array(seconds), summary, time.monotonic() - begin)


def _check(model: IterationTimeModel, policy: Policy, workload: Workload, first: _Pass, warm: Sequence[_Pass]) -> ModelCheck:
    simulated = run_episode(policy, workload).summary
    errors = {}
    for name in ("latency_mean", "ttft_mean", "tpot_mean"):
        measured = float(np.mean([getattr(p.summary, name) for p in warm]))
        errors[name.removesuffix("_mean")] = float(getattr(simulated, name)) / measured - 1.0
    return ModelCheck(
        iterations=fit_error(model, np.concatenate([p.batches for p in warm]), np.concatenate([p.seconds for p in warm])),
        first=fit_error(model, first.batches, first.seconds),
        **errors,
    )
