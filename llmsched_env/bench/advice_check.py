"""The default and the advised setting on a real vLLM engine, in turns, beside what the simulator said of the same requests.

One engine after the other: on a GPU two would not share its memory. Each time an engine is built it first serves requests that do not
count, as the first batches of a new engine are slower.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_agents.statistics import Estimate
from llmsched_env.backends import make_backend
from llmsched_env.bench.advice import DEFAULT, Case, Choice
from llmsched_env.bench.advice_result import Advice, change, column, shown_change
from llmsched_env.errors import ConfigError
from llmsched_env.markdown import table
from llmsched_env.metrics import Summary, summarize
from llmsched_env.row_file import RowFile
from llmsched_env.runner import run_episode
from llmsched_env.types import Workload
from llmsched_hardware.calibration.settings import backend_settings
from llmsched_hardware.real_engine import EngineOptions
from llmsched_hardware.validation_runs import keep_machine

RUNS_FILE = "engine.csv"
SIM, ENGINE = "sim", "vllm"


@dataclass(frozen=True, slots=True)
class Run:
    """One episode: a line of ``engine.csv``; the columns are these fields, the figures' own in their place.

    Attributes:
        setting: ``Choice.text``.
        backend: ``sim`` or ``vllm``; the latter ``repeat`` times.
        warm_up: not counted.
    """

    setting: str
    backend: str
    seed: int
    repeat: int
    warm_up: bool
    figures: Summary

    @property
    def key(self) -> tuple[str, str, int, int, bool]:
        return self.setting, self.backend, self.seed, self.repeat, self.warm_up


@dataclass(frozen=True, slots=True)
class Check:
    """A check on an engine.

    Attributes:
        model: of the engine.
        advised: against ``DEFAULT``.
        seeds: parts of the evaluation.
        repeats: runs of the same requests on the engine, for each setting.
        num_requests: the first so many of each part.
    """

    case: Case
    model: str
    advised: Choice
    seeds: tuple[int, ...]
    repeats: int
    num_requests: int

    def workload(self, seed: int) -> Workload:
        """The first requests of a part."""
        whole, n = self.case.workload(seed), self.num_requests
        return Workload.of(whole.arrival[:n], whole.prompt_tokens[:n], whole.output_tokens[:n], whole.type_id[:n])

    def visits(self) -> Iterator[tuple[Choice, int]]:
        """(setting, repeat): in turns, and who comes first takes turns too, so that a machine that drifts meets both alike."""
        for repeat in range(self.repeats):
            pair = (DEFAULT, self.advised)
            yield from ((choice, repeat) for choice in (pair if repeat % 2 == 0 else pair[::-1]))

    @property
    def total(self) -> int:
        """Runs in all."""
        return 2 * len(self.seeds) * (1 + self.repeats) + 2 * self.repeats


def check_engine(check: Check) -> EngineOptions:
    """Refuse an engine that vLLM could not have, before any is built.

    Raises:
        ConfigError: settings that no engine here can have.
    """
    try:
        return EngineOptions.of(check.case.build(DEFAULT).engine, model=check.model)
    except ConfigError as error:
        raise ConfigError(f"--validate: {error}") from error


def run_check(check: Check, rows: RowFile[Run], folder: Path, bar: Any) -> None:
    """Every run that has no row yet; one count of the bar for each.

    Args:
        rows: open; takes each run as it ends.
        folder: where the machine is written down.

    Raises:
        ConfigError: earlier rows are from another machine, or vLLM refuses the settings.
        EngineError: the engine cannot start or has died.
    """
    done = {row.key for row in rows.rows}
    for choice in (DEFAULT, check.advised):
        for seed in check.seeds:
            if (choice.text, SIM, seed, 0, False) not in done:
                rows.append(_episode(check, choice, seed, None, 0, False))
            bar.advance(description=f"sim: {choice.text}"[:44])
    backend: Any = None
    try:
        for choice, repeat in check.visits():
            missing = [seed for seed in check.seeds if (choice.text, ENGINE, seed, repeat, False) not in done]
            if missing:
                if backend is None:
                    backend = make_backend(ENGINE, clock="measured", **backend_settings(check_engine(check)))
                bar.show(f"vllm: {choice.text}, warm-up"[:44])
                warm = _episode(check, choice, check.seeds[0], backend, repeat, True)
                keep_machine(folder, dataclasses.asdict(backend.machine()))
                rows.append(warm)
            bar.advance()
            for seed in check.seeds:
                if seed in missing:
                    rows.append(_episode(check, choice, seed, backend, repeat, False))
                bar.advance(description=f"vllm: {choice.text}"[:44])
    finally:
        if backend is not None:
            backend.close()


def _episode(check: Check, choice: Choice, seed: int, backend: Any, repeat: int, warm_up: bool) -> Run:
    policy = check.case.build(choice)
    result = run_episode(policy, check.workload(seed), backend=backend)
    limits = {"ttft_limit": check.case.objective.ttft_limit, "tpot_limit": check.case.objective.tpot_limit}
    figures = summarize(result.log, result.counters, kv_capacity=policy.engine.kv_capacity, **limits)
    return Run(choice.text, SIM if backend is None else ENGINE, seed, repeat, warm_up, figures)


@dataclass(frozen=True, slots=True)
class Seen:
    """One metric of both settings on the engine and on the simulator, the same requests.

    Attributes:
        predicted: change from the default to the advised setting on the simulator.
        measured: the same on the engine, paired by repeat and part, with its 95 % interval.
        sim_default, sim_advised, default, advised: the values themselves, means over the parts.
        spread: (largest - least) / mean over the repeats on the engine, the larger of both settings.
    """

    metric: str
    predicted: float
    measured: Estimate
    sim_default: float
    sim_advised: float
    default: float
    advised: float
    spread: float


def seen(check: Check, rows: Sequence[Run]) -> list[Seen]:
    """By metric; only repeats of which both settings have every part."""
    found = []
    for metric in check.case.objective.metrics:
        sim = {c: _mean(_of(rows, c, SIM, 0, check.seeds), metric) for c in (DEFAULT, check.advised)}
        by_repeat: dict[Choice, list[float]] = {DEFAULT: [], check.advised: []}
        runs: dict[Choice, list[Run]] = {DEFAULT: [], check.advised: []}
        for repeat in range(check.repeats):
            both = {c: _of(rows, c, ENGINE, repeat, check.seeds) for c in by_repeat}
            if all(len(own) == len(check.seeds) for own in both.values()):
                for c, own in both.items():
                    by_repeat[c].append(_mean(own, metric))
                    runs[c] += sorted(own, key=lambda run: run.seed)
        if not by_repeat[DEFAULT]:
            continue
        pairs = {c: column([run.figures for run in own], metric) for c, own in runs.items()}
        real = {c: float(np.mean(own)) for c, own in by_repeat.items()}
        spreads = [(max(own) - min(own)) / real[c] if real[c] else math.nan for c, own in by_repeat.items()]
        found.append(
            Seen(
                metric=metric,
                predicted=_change(sim[check.advised], sim[DEFAULT], metric),
                measured=change(pairs[check.advised], pairs[DEFAULT], metric),
                sim_default=sim[DEFAULT],
                sim_advised=sim[check.advised],
                default=real[DEFAULT],
                advised=real[check.advised],
                spread=max(spreads),
            )
        )
    return found


def _of(rows: Sequence[Run], choice: Choice, backend: str, repeat: int, seeds: Sequence[int]) -> list[Run]:
    own = (r for r in rows if (r.setting, r.backend, r.repeat, r.warm_up) == (choice.text, backend, repeat, False))
    return [row for row in own if row.seed in seeds]


def _mean(rows: Sequence[Run], metric: str) -> float:
    return float(column([row.figures for row in rows], metric).mean()) if rows else math.nan


def _change(ours: float, theirs: float, metric: str) -> float:
    if metric == "slo_goodput":
        return ours - theirs
    return ours / theirs - 1.0 if theirs else math.nan


def check_lines(check: Check, found: Sequence[Seen], advice: Advice, machine: Mapping[str, Any]) -> list[str]:
    """The section of the report."""
    headings = ("metric", "default, simulated", "measured", "other, simulated", "measured", "predicted", "measured change", "spread")
    rows = []
    for one in found:
        rows.append(
            (
                one.metric,
                f"{one.sim_default:.4g}",
                f"{one.default:.4g}",
                f"{one.sim_advised:.4g}",
                f"{one.advised:.4g}",
                f"{100 * one.predicted:+.1f} {'points' if one.metric == 'slo_goodput' else '%'}",
                shown_change(one.measured, one.metric),
                f"{100 * one.spread:.1f} %",
            )
        )
    parts = f"{len(check.seeds)} parts of the evaluation" if len(check.seeds) > 1 else "one part of the evaluation"
    first, metric = advice.entries[0], check.case.objective.metric
    return [
        "## On the engine",
        "",
        f"vLLM {machine['vllm']}, {check.model}, {machine['dtype']}, on {machine['device']}: the first {check.num_requests:,} requests of "
        f"{parts}, {check.repeats} repeats of each setting in turns, measured clock. *Spread* is the engine's own: the range over the "
        "repeats as a share of the mean, the larger of both settings. A measured change is paired by repeat and part, with its interval.",
        "",
        *table(headings, rows, "lr"),
        "",
        f"The other setting is {first.label}{', as advised' if advice.shown else ', the best of the search, which is not advised'}. Over "
        f"all parts of the evaluation the simulator predicts {shown_change(first.gains[metric], metric)}.",
        "",
    ]


def check_summary(check: Check, found: Sequence[Seen]) -> str:
    """The objective in a line."""
    one = next(seen for seen in found if seen.metric == check.case.objective.metric)
    unit = "points" if one.metric == "slo_goodput" else "%"
    said = (
        f"On the engine: {check.case.objective.name} changed by {shown_change(one.measured, one.metric)} (95 %, {one.measured.seeds} pairs "
        f"of runs); the simulator said {100 * one.predicted:+.1f} {unit} of the same requests"
    )
    if not one.measured.excludes_zero:
        return f"{said}. The engine shows neither gain nor loss: the same setting differs by {100 * one.spread:.1f} % between its repeats."
    agrees = "they agree in sign" if one.predicted * one.measured.value > 0 else "they do NOT agree in sign"
    inside = "lies" if one.measured.low <= one.predicted <= one.measured.high else "does not lie"
    return f"{said}: {agrees}, and the prediction {inside} in the interval."
