"""What a validation's own iterations say: the calibration on the engine's batches, and the simulator with times fitted to the warm-up runs.

A simulated figure can be wrong because iteration times are, or because the simulator schedules otherwise. The first table shows the times
alone, on batches that the engine ran; the second shows the simulator with times of the same minutes, so that what is left is not the
calibration's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from llmsched_env.engine.record_backend import RecordView
from llmsched_env.engine.simulator import SimBackend
from llmsched_env.engine_config import EngineConfig, EpisodeLimits
from llmsched_env.errors import ConfigError
from llmsched_env.perf import IterationTimeModel
from llmsched_env.perf.batch import FINISHED, PREFILLS, STARTED
from llmsched_env.types import QueueLayout, Workload
from llmsched_hardware.calibration.from_log import LogFit, fit_log, iterations_of
from llmsched_hardware.calibration.iteration_log import IterationLog
from llmsched_hardware.calibration.traffic_fit import new_shapes
from llmsched_hardware.validation import ENGINE, SIM, Gap, Run, Task, Validation, gaps, run_task


@dataclass(frozen=True, slots=True)
class IterationGap:
    """The iteration times of one policy at one rate (``policy`` empty: of all), counted runs only.

    Attributes:
        iterations, measured, modelled: their number, and seconds in total: the engine's, and the calibration's for the same batches.
        spread: (largest - smallest) / mean over repeats of measured / modelled seconds: the machine's speed. NaN for one.
    """

    policy: str
    rate: float
    iterations: int
    measured: float
    modelled: float
    spread: float

    @property
    def error(self) -> float:
        """Modelled over measured - 1."""
        return self.modelled / self.measured - 1.0


@dataclass(frozen=True, slots=True)
class Share:
    """A kind of iterations, and how much of the calibration's error lies in it.

    Attributes:
        kind: which iterations; each is of the first kind that it fits.
        iterations, measured, modelled: as in ``IterationGap``.
        share: of the difference between all measured and all modelled seconds; NaN where there is none.
    """

    kind: str
    iterations: int
    measured: float
    modelled: float
    share: float


def shares(log: IterationLog, model: IterationTimeModel, shapes: int = 32) -> list[Share]:
    """Where the error of iteration times lies, over all counted runs.

    Args:
        shapes: a number of tokens is new where it is not among so many last ones; vLLM's CPU build keeps 32 (``TrafficTime``).
    """
    counted = chosen(log, warm_up=False)
    if not len(counted):
        return []
    data, _ = iterations_of(counted)
    modelled, b = model.seconds_of(data.batches), data.batches
    left = np.ones(len(data), dtype=bool)
    missing = float(data.seconds.sum() - modelled.sum())
    found = []
    for kind, which in (
        (f"a number of tokens that is not among the last {shapes}", new_shapes(data.tokens, data.engine, shapes)),
        ("several prompts at once", b[:, PREFILLS] > 1),
        ("one prompt", b[:, PREFILLS] == 1),
        ("decodes alone, somebody started or ended before", b[:, STARTED] + b[:, FINISHED] > 0),
        ("decodes alone, the batch as before", left),
    ):
        own = left & which
        left = left & ~which
        measured, by_model = float(data.seconds[own].sum()), float(modelled[own].sum())
        found.append(Share(kind, int(own.sum()), measured, by_model, (measured - by_model) / missing if missing else math.nan))
    return found


def chosen(log: IterationLog, *, warm_up: bool) -> IterationLog:
    """The iterations of the runs that are not counted, or of those that are; runs that were broken off and begun again count once."""
    last: dict[tuple[Any, ...], int] = {}
    for number, about in log.segments.items():
        if "policy" in about and bool(about.get("warm_up")) == warm_up:
            last[tuple(about.get(key) for key in ("policy", "rate", "seed", "repeat"))] = number
    keep = np.isin(log.column("segment"), list(last.values()))
    return dataclasses.replace(log, table=log.table[keep], segments={k: log.segments[k] for k in last.values()})


def iteration_gaps(log: IterationLog, model: IterationTimeModel) -> list[IterationGap]:
    """By rate and policy, then of all; nothing where the log holds no counted run."""
    counted = chosen(log, warm_up=False)
    if not len(counted):
        return []
    data, _ = iterations_of(counted)
    modelled = model.seconds_of(data.batches)
    segment = counted.column("segment").astype(int)
    by_place: dict[tuple[float, str], list[tuple[int, int]]] = {}
    for number, about in counted.segments.items():
        by_place.setdefault((float(about["rate"]), str(about["policy"])), []).append((int(about["repeat"]), number))
    found = [_gap(policy, rate, own, segment, data.seconds, modelled) for (rate, policy), own in sorted(by_place.items())]
    every = list(itertools.chain(*by_place.values()))
    return [*found, _gap("", math.nan, every, segment, data.seconds, modelled)]


def _gap(policy: str, rate: float, own: Sequence[tuple[int, int]], segment: Any, seconds: Any, modelled: Any) -> IterationGap:
    ratios = []
    for repeat in sorted({r for r, _ in own}):
        inside = np.isin(segment, [number for r, number in own if r == repeat])
        if inside.any():
            ratios.append(float(seconds[inside].sum() / modelled[inside].sum()))
    inside = np.isin(segment, [number for _, number in own])
    spread = float(np.ptp(ratios) / np.mean(ratios)) if len(ratios) > 1 else math.nan
    return IterationGap(policy, rate, int(inside.sum()), float(seconds[inside].sum()), float(modelled[inside].sum()), spread)


def fit_to_warm_ups(log: IterationLog) -> LogFit | None:
    """Iteration times of the runs that were not counted; None where they are too few."""
    own = chosen(log, warm_up=True)
    try:
        return fit_log(own, "warm-up runs") if len(own) else None
    except ConfigError:  # too few
        return None


class _OtherTimes(SimBackend):
    """The simulator with iteration times that its policies do not know of."""

    def __init__(self, model: IterationTimeModel) -> None:
        super().__init__()
        self._other = model

    def reset(
        self,
        workload: Workload,
        layout: QueueLayout,
        engine: EngineConfig,
        limits: EpisodeLimits,
        *,
        reveal_output_length: bool = False,
    ) -> RecordView:
        engine = engine.replace(time_model=self._other)
        return super().reset(workload, layout, engine, limits, reveal_output_length=reveal_output_length)


def gaps_with(validation: Validation, model: IterationTimeModel, runs: Sequence[Run]) -> list[Gap]:
    """The gaps as they were if the simulator had other iteration times. Policies decide by the calibration's, as they did on the engine."""
    backend = _OtherTimes(model)
    tasks = [Task(p, rate, seed, ENGINE) for rate, seed, p in itertools.product(validation.rates, validation.seeds, validation.policies)]
    simulated = [replace(run_task(validation, task, backend), backend=SIM) for task in tasks]
    return gaps([*simulated, *(run for run in runs if run.backend != SIM)], validation.policies)


def within_own_noise(found: Sequence[Gap], least: float = 0.05) -> tuple[int, int]:
    """(how many, of how many) mean latencies lie within the larger of ``least`` and twice the engine's own spread."""
    own = [gap for gap in found if gap.metric == "latency_mean" and math.isfinite(gap.error)]
    good = sum(abs(gap.error) <= max(least, 2.0 * gap.spread if math.isfinite(gap.spread) else 0.0) for gap in own)
    return good, len(own)
