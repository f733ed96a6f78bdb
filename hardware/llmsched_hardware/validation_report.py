"""A validation's tables: sim_to_real.csv and a Markdown page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmsched_env.files import replacing
from llmsched_env.markdown import table
from llmsched_env.row_file import csv_writer
from llmsched_hardware.calibration.from_log import LogFit
from llmsched_hardware.validation import SIM, Gap, Ranking, Run, Schedules, rankings
from llmsched_hardware.validation_iterations import IterationGap, Share, within_own_noise
from llmsched_hardware.validation_runs import Plan

ERRORS = (
    ("throughput", "throughput_tok_s"),
    ("latency", "latency_mean"),
    ("latency P99", "latency_p99"),
    ("TTFT", "ttft_mean"),
    ("TTFT P99", "ttft_p99"),
    ("TPOT", "tpot_mean"),
    ("TPOT P99", "tpot_p99"),
)
_ON_BATCHES, _OF_WARM_UPS = "## Iteration times on the engine's own batches", "## With iteration times of the warm-up runs"
ITERATION_HEADINGS = (_ON_BATCHES, _OF_WARM_UPS)
"""Headings of the parts about iteration times."""
DEFINITIONS = (
    "Error: simulator / engine - 1, of the mean over seeds; for evictions the difference of their numbers. "
    "Spread: (largest - smallest) / mean over the engine's counted repeats of the same workload. "
    "TTFT is the end of the iteration that yields the first output token minus arrival; latency the end of the last iteration minus "
    "arrival; TPOT (latency - TTFT) / (output tokens - 1). Throughput counts output tokens of completed requests. The engine's "
    "seconds are its measured clock: the sum of its own step times, arrivals on it, the policy's thinking not counted."
)


def facts(plan: Plan, machine: Mapping[str, Any], command: str, runs: Sequence[Run] = ()) -> list[tuple[str, str]]:
    """What a reader of the report must know.

    Args:
        machine: as ``llmsched_hardware.validation_runs.read_machine`` gives it.
        command: as the program was called.
        runs: those reported on.
    """
    validation, source = plan.validation, plan.calibration.provenance
    engine, statistics = validation.scenario.engine, validation.scenario.statistics
    simulated = [run.figures for run in runs if run.backend == SIM]
    out_of_range, iterations = sum(run.out_of_range for run in simulated), sum(run.iterations for run in simulated)
    scaled = f", lengths times {plan.length_scale:.4g}" if plan.length_scale != 1.0 else ""
    cut = f", cut to {plan.max_total_tokens} tokens" if plan.max_total_tokens else ""
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    lines = [
        ("Command", f"`{command}`"),
        ("Engine", f"{plan.engine.model} ({machine['dtype']}) on {machine['device']}{driver}, vLLM {machine['vllm']}, {machine['date']}"),
        (
            "Settings",
            f"{engine.num_blocks:,} blocks of {engine.block_size} tokens, max_num_seqs {engine.max_num_seqs}, max_num_batched_tokens "
            f"{engine.max_num_batched_tokens}, max_model_len {engine.max_model_len}; a policy may set its own token budget",
        ),
        ("Calibration", f"{source.name}: {source.gpu}; {source.source}. Fit: {source.fit_error}"),
        (
            "Workload",
            f"{validation.scenario.name}{scaled}{cut}: {validation.num_requests} requests a run, mean lengths {statistics.mean_prompt:.0f} "
            f"+ {statistics.mean_output:.0f}, {len(validation.seeds)} seed(s); fluid stability boundary {validation.boundary:.4g} "
            "requests/s",
        ),
    ]
    if out_of_range:
        share = 100 * out_of_range / iterations
        lines.append(("Extrapolated", f"{share:.2g} % of the simulator's iterations lie outside the calibration ({source.valid_range})"))
    if plan.clock != "virtual":
        counted = f"{validation.warm_ups} not counted, {validation.repeats} counted for each policy and rate"
        lines.append(("Engine runs", f"{counted} ({plan.clock} clock)"))
    if not source.gpu.startswith(machine["device"]):
        lines.append(("Attention", "the calibration was measured on another device than this engine runs on"))
    return lines


def write_table(path: Path, found: Sequence[Gap]) -> None:
    """Every metric of every policy and rate."""
    with replacing(path) as file:
        writer = csv_writer(file)
        writer.writerow(("rate", "policy", "metric", "sim", "engine", "engine_low", "engine_high", "repeats", "error", "spread"))
        writer.writerows((g.rate, g.policy, g.metric, g.sim, g.real, g.low, g.high, g.repeats, g.error, g.spread) for g in found)


def measured_page(
    title: str, facts: Sequence[tuple[str, str]], found: Sequence[Gap], ranks: Sequence[Ranking], iterations: Sequence[str] = ()
) -> str:
    """Markdown of a validation under the measured or wall clock; ``iterations``: parts about iteration times (``iteration_parts``)."""
    parts = [f"# {title}", _facts(facts), DEFINITIONS, "## Error of the simulator (spread of the engine)", error_table(found)]
    parts += [noise_sentence(found), *iterations]
    if ranks:
        swapped = sum(r.swapped_outside for r in ranks)
        parts += [
            "## Ranking of the policies",
            ranking_sentence(ranks),
            ranking_table(ranks),
            "Order: best to worst. Swapped pairs stand in another order on the simulator than on the engine; inside the spread where "
            "the engine's own ranges over repeats overlap, so that the engine itself does not tell the two apart."
            + (f" {swapped} swapped outside it." if swapped else ""),
        ]
    parts += ["## All figures", figure_table(found)]
    return "\n\n".join(parts) + "\n"


def noise_sentence(found: Sequence[Gap]) -> str:
    """How many mean latencies are as close as the engine is to itself."""
    good, count = within_own_noise(found)
    return f"{good} of {count} mean latencies lie within the larger of 5 % and twice the engine's own spread."


def iteration_parts(own: Sequence[IterationGap], where: Sequence[Share], refitted: Sequence[Gap], fit: LogFit | None) -> list[str]:
    """Parts of the page about iteration times: on the engine's own batches, and the simulator with those of the warm-up runs."""
    parts = []
    if own:
        rows = [
            (
                f"{g.rate:.4g}" if g.policy else "all",
                g.policy or "all",
                f"{g.iterations:,}",
                f"{g.measured:.3f}",
                f"{g.modelled:.3f}",
                _percent(g.error, signed=True),
                _percent(g.spread),
            )
            for g in own
        ]
        parts += [
            _ON_BATCHES,
            "Seconds of all counted runs: measured, and what the calibration gives for the same batches. Spread: (largest - smallest) / "
            "mean over repeats of measured over modelled seconds.",
            _table(("req/s", "policy", "iterations", "measured s", "modelled s", "error", "spread"), rows),
        ]
    if where:
        kinds = []
        for s in where:
            if s.iterations:
                error = _percent(s.modelled / s.measured - 1.0, signed=True)
                seconds = (f"{s.measured:.3f}", f"{s.modelled:.3f}")
                kinds.append((s.kind, f"{s.iterations:,}", *seconds, error, _percent(s.share)))
        parts += [
            "Where the error lies: each iteration is of the first kind that it fits; share of all measured less all modelled seconds.",
            _table(("iterations with", "iterations", "measured s", "modelled s", "error", "share"), kinds),
        ]
    if fit is not None and refitted:
        parts += [
            _OF_WARM_UPS,
            f"The simulator with times fitted to the runs that were not counted ({fit.held_out.count:,} iterations; the machine's speed "
            f"drifted by {_percent(fit.drift)}): what is left here is not the calibration's.",
            error_table(refitted),
            noise_sentence(refitted),
            ranking_sentence(rankings(refitted)),
        ]
    return parts


def virtual_page(title: str, facts: Sequence[tuple[str, str]], checks: Sequence[Schedules]) -> str:
    """Markdown of a validation under the virtual clock."""
    same = sum(check.identical for check in checks)
    parts = [
        f"# {title}",
        _facts(facts),
        f"{same} of {len(checks)} episodes are identical to the simulator's: every report of every step and all times of every request.",
        _table(
            ("req/s", "policy", "seed", "backend", "steps", "evictions", "against the simulator"),
            [
                (f"{c.rate:.4g}", c.policy, str(c.seed), c.backend, f"{c.steps:,}", f"{c.evictions:,}", c.difference or "identical")
                for c in checks
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def error_table(found: Sequence[Gap]) -> str:
    """A row for each rate and policy, a column for each metric of ``ERRORS``."""
    by_place = {(g.rate, g.policy, g.metric): g for g in found}
    places = list(dict.fromkeys((g.rate, g.policy) for g in found))
    rows = []
    for rate, policy in places:
        evictions = by_place[rate, policy, "evictions"]
        own = [by_place[rate, policy, metric] for _, metric in ERRORS]
        rows.append((f"{rate:.4g}", policy, *map(_error, own), f"{evictions.sim:.3g} / {evictions.real:.3g}"))
    return _table(("req/s", "policy", *(heading for heading, _ in ERRORS), "evictions sim / engine"), rows)


def figure_table(found: Sequence[Gap]) -> str:
    """A row for each rate, policy and metric."""
    rows = []
    for g in found:
        low_high = f"{_number(g.low)} to {_number(g.high)}" if g.repeats > 1 else "-"
        error = f"{g.error:+.3g}" if g.metric == "evictions" else _percent(g.error, signed=True)
        rows.append((f"{g.rate:.4g}", g.policy, g.metric, _number(g.sim), _number(g.real), low_high, error))
    return _table(("req/s", "policy", "metric", "sim", "engine", "engine's repeats", "error"), rows)


def ranking_table(ranks: Sequence[Ranking]) -> str:
    rows = [
        (
            f"{r.rate:.4g}",
            r.metric,
            ", ".join(r.real),
            "the same" if r.sim == r.real else ", ".join(r.sim),
            "-" if math.isnan(r.tau) else f"{r.tau:.2f}",
            str(r.swapped_inside),
            str(r.swapped_outside),
        )
        for r in ranks
    ]
    return _table(("req/s", "metric", "engine", "simulator", "Kendall's tau", "swapped inside the spread", "swapped outside"), rows)


def ranking_sentence(ranks: Sequence[Ranking]) -> str:
    """The rankings in one sentence."""
    same = sum(r.sim == r.real for r in ranks)
    pairs = sum(r.pairs for r in ranks)
    inside, outside = sum(r.swapped_inside for r in ranks), sum(r.swapped_outside for r in ranks)
    return (
        f"{same} of {len(ranks)} rankings (a rate and a metric each) are the same; of {pairs} pairs {outside} are swapped outside the "
        f"engine's spread and {inside} inside it."
    )


def summary_lines(found: Sequence[Gap], ranks: Sequence[Ranking]) -> list[str]:
    """What the program prints."""
    lines = []
    for heading, metric in ERRORS:
        own = [g for g in found if g.metric == metric and math.isfinite(g.error)]
        if own:
            mean = sum(abs(g.error) for g in own) / len(own)
            worst = max(own, key=lambda g: abs(g.error))
            spreads = [g.spread for g in own if math.isfinite(g.spread)]
            spread = f", engine's own spread {_percent(sum(spreads) / len(spreads))} in the mean" if spreads else ""
            lines.append(
                f"{heading:<12} error {_percent(mean)} in the mean, at most {_percent(worst.error, signed=True)} "
                f"({worst.policy} at {worst.rate:.4g} req/s){spread}"
            )
    lines.append(f"{'latency':<12} {noise_sentence(found)}")
    if ranks:
        lines.append(f"{'ranking':<12} {ranking_sentence(ranks)}")
    return lines


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in facts)


def _error(gap: Gap) -> str:
    spread = f" ({_percent(gap.spread)})" if math.isfinite(gap.spread) else ""
    return _percent(gap.error, signed=True) + spread


def _percent(value: float, *, signed: bool = False) -> str:
    if math.isnan(value):
        return "-"
    return f"{100 * value:+.1f} %" if signed else f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4g}"


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(table(heading, rows, "l"))
