"""``llmsched calibrate from-bench``: a calibration from the result files of serving benchmarks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from llmsched_baselines.overrides import engine_keys, parse_overrides
from llmsched_env.cli.frame import Assignments, Options, Outcome, Screen, check_new_calibration, words
from llmsched_env.engine_config import EngineConfig
from llmsched_env.errors import ConfigError, require
from llmsched_env.perf import save_calibration
from llmsched_hardware.calibration.bench_fit import Interval
from llmsched_hardware.calibration.bench_metrics import ServerCounters, check_counters, read_counters
from llmsched_hardware.calibration.bench_results import BenchResult, read_results
from llmsched_hardware.calibration.from_bench import FIGURES, UNITS, BenchCalibration, Compared, calibrate, check_lengths, seen_range
from llmsched_hardware.options import setting_names

NEEDED = ("max_num_batched_tokens", "max_num_seqs", "num_blocks", "block_size")
"""Settings of the server on which what it does depends most; said where they are assumed."""


@dataclass(frozen=True, kw_only=True)
class FromBench(Options):
    """Calibrate from result files of serving benchmarks: vllm bench serve --save-result --save-detailed, GuideLLM, AIPerf.

    Fits iteration times and the front end's seconds so that the simulator, fed the same requests, gives the measured times to the first
    token and between tokens; says what the files do not determine. Several files of one server, at several rates, are fitted together.
    """

    results: Annotated[
        tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RESULT [RESULT ...]", help_behavior_hint="(at least one)")
    ]
    """Files to fit."""
    set: Assignments = ()
    """engine.FIELD of the server: max_num_batched_tokens, max_num_seqs, num_blocks, block_size, async_scheduling and so on."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json")]
    """The calibration; replaced."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the file's)")] = None
    """Name of the calibration."""
    hold_out: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RESULT [RESULT ...]", help_behavior_hint="(default: none)")] = ()
    """Files that are not fitted but predicted."""
    metrics_before: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """The server's /metrics before the benchmarks: KV blocks, preemptions, iterations are then known."""
    metrics_after: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """The server's /metrics after them."""


@dataclass(frozen=True)
class _Server:
    """What is known of the server; ``known_blocks``: its KV blocks are among that."""

    engine: EngineConfig
    counters: ServerCounters | None
    notes: list[str]
    known_blocks: bool


def run_from_bench(options: FromBench, screen: Screen) -> Outcome:
    """Read and check everything, fit, predict, write."""
    check_new_calibration(options.out, options.name)
    if (options.metrics_before is None) != (options.metrics_after is None):
        raise ConfigError("--metrics-before and --metrics-after: one is missing, both must be given")
    if not options.results:
        raise ConfigError("RESULT: none given, must be at least one result file")
    _no_file_twice(options)
    given = _settings(options)
    results = [result for path in options.results for result in read_results(path)]
    held_out = [result for path in options.hold_out for result in read_results(path)]
    server = _server(options, given, results, held_out)
    check_lengths([*results, *held_out], server.engine)
    require("scipy.optimize", "cli")
    found = calibrate(
        results, server.engine, options.name or options.out.stem, server.counters, held_out, server.notes, server.known_blocks
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_calibration(found.model, options.out)
    for text in report(found, options.out):
        screen.print(text)
    return Outcome(outcome(found, server, options.out))


def _no_file_twice(options: FromBench) -> None:
    seen: set[Path] = set()
    for path in (*options.results, *options.hold_out):
        if path.resolve() in seen:
            raise ConfigError(f"RESULT {path}: given twice")
        if path.resolve() == options.out.resolve():
            raise ConfigError(f"--out: {path} is also a RESULT, must be another file")
        seen.add(path.resolve())


def _settings(options: FromBench) -> dict[str, Any]:
    """The server's settings that were given."""
    allowed = {*setting_names(), "async_scheduling"}
    pairs = words(options.set)
    for pair in pairs:
        if not pair.startswith("engine."):
            raise ConfigError(f"--set {pair!r}: must be engine.FIELD=VALUE, such as engine.max_num_seqs=256")
    return dict(parse_overrides(pairs, {}, exclude_engine=set(engine_keys()) - allowed).engine)


def _server(options: FromBench, given: dict[str, Any], results: Sequence[BenchResult], held_out: Sequence[BenchResult]) -> _Server:
    """The engine by ``--set`` and by the server's own metrics.

    Raises:
        ConfigError: the two disagree, or no vLLM server can have such settings.
    """
    counters, notes = None, []
    values = dict(given)
    if options.metrics_before is not None and options.metrics_after is not None:
        counters = read_counters(options.metrics_before, options.metrics_after)
        notes += check_counters(counters, results)
        for name in ("num_blocks", "block_size"):
            stated = getattr(counters, name)
            if stated is None:
                continue
            if values.get(name, stated) != stated:
                raise ConfigError(f"--set engine.{name}: {values[name]}, but --metrics-after says {stated}")
            values[name] = stated
    missing = [name for name in NEEDED if name not in values]
    if "max_model_len" not in values:
        values["max_model_len"] = max(int((r.prompt_tokens + r.output_tokens).max()) for r in (*results, *held_out))
        if not values.get("enable_chunked_prefill", True):
            values["max_model_len"] = min(values["max_model_len"], values.get("max_num_batched_tokens", values["max_model_len"]))
    try:
        engine = EngineConfig.vllm(**values)
    except ConfigError as error:
        raise ConfigError(f"--set {error}") from error
    if missing:
        notes.append(f"engine settings not given: {', '.join(f'{name} = {getattr(engine, name)}' for name in missing)} assumed")
    return _Server(engine, counters, notes, "num_blocks" in values and "block_size" in values)


def report(found: BenchCalibration, out: Path) -> list[str]:
    """What the command prints."""
    lines = [f"{out}: formula from {sum(run.requests for run in found.runs):,} requests of {len(found.runs)} runs"]
    lines.append(f"{'seen':<12} {seen_range(found.fit)}")
    lines += [_coefficient(interval) for interval in found.fit.intervals]
    if not math.isnan(found.fit.spread):
        lines.append(f"{'noise':<12} single iterations spread by {100 * found.fit.spread:.0f} % about the formula (standard deviation)")
    for kind, runs in (("fitted", found.runs), ("held out", found.held_out)):
        for run in runs:
            lines += _run_lines(kind, run)
    lines += [f"{'note':<12} {note}" for note in found.notes]
    lines.append(f"{'use':<12} --calibration {out}; add {1e3 * found.frontend:.1f} ms to its times to the first token and latencies")
    return lines


def _coefficient(interval: Interval) -> str:
    scale, unit = UNITS[interval.name]
    value, low, high = (scale * x for x in (interval.value, interval.low, interval.high))
    share = "" if math.isnan(interval.share) else f", {100 * interval.share:.0f} % of the seconds"
    trade = f", trades with {interval.partner}" if interval.partner else ""
    verdict = "" if interval.determined else f"  NOT DETERMINED{trade}"
    return f"{interval.name:<12} {value:.4g} {unit}, 95 % {low:.3g} to {high:.3g}{share}{verdict}"


def _run_lines(kind: str, run: Compared) -> list[str]:
    lines = [f"{kind:<12} {run.label}: {run.requests} requests, {run.rate:.3g}/s; iterations {100 * run.drift:+.1f} % from the formula"]
    for name in FIGURES:
        label = name.replace("_", " ").replace("ttft", "TTFT").replace("tpot", "TPOT").replace("p99", "P99")
        lines.append(
            f"{'':<12} {label:<13} measured {1e3 * run.measured[name]:9.1f} ms  simulated {1e3 * run.simulated[name]:9.1f} ms  "
            f"{100 * run.error(name):+6.1f} %"
        )
    return lines


def outcome(found: BenchCalibration, server: _Server, out: Path) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "calibration": out,
        "frontend_seconds": found.frontend,
        "coefficients": {interval.name: interval for interval in found.fit.intervals},
        "knee": found.fit.parameters.knee,
        "iteration_spread": found.fit.spread,
        "seen": seen_range(found.fit),
        "fitted": [_errors(run) for run in found.runs],
        "held_out": [_errors(run) for run in found.held_out],
        "server": server.counters,
        "notes": list(found.notes),
        "provenance": found.model.provenance,
    }


def _errors(run: Compared) -> dict[str, Any]:
    return {
        "label": run.label,
        "rate": run.rate,
        "requests": run.requests,
        "measured": run.measured,
        "simulated": run.simulated,
        "error": {name: run.error(name) for name in FIGURES},
        "preemptions": run.preemptions,
        "iterations_off": run.drift,
    }
