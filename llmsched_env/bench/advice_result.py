"""What a search of ``llmsched advise`` found: the advised setting, its gain on requests that chose nothing, its price, what is unsure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmsched_agents.statistics import Estimate, mean_of, relative_difference
from llmsched_env.bench.advice import DEFAULT, FLAGS_ALONE, HIGHER, NAMES, Choice, Objective
from llmsched_env.bench.advice_search import Study, outside
from llmsched_env.bench.plots import COLOURS, load_pyplot, save_figure
from llmsched_env.bench.variants import split_options
from llmsched_env.engine_config import EngineConfig
from llmsched_env.markdown import cell, table
from llmsched_env.metrics import Summary
from llmsched_env.types import FloatArray
from llmsched_hardware.options import differing

HEADINGS = {
    "latency_mean": "latency",
    "latency_p99": "latency P99",
    "ttft_mean": "TTFT",
    "ttft_p99": "TTFT P99",
    "tpot_mean": "TPOT",
    "throughput_tok_s": "tok/s",
    "slo_goodput": "within limits",
}


DEAR = 0.2
"""A metric that is worse than the default's by more than this share is a price that must be said."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A setting on the parts that the search has not seen.

    Attributes:
        label: what it is, in one line: the policy, and every flag and option that is not the default's.
        selected: mean of the objective on the parts that chose it; better than on others by the luck of being chosen.
        figures: mean of each metric with its interval.
        gains: change of each metric against the default, paired part by part: -0.1 is 10 % less. Of ``slo_goodput`` the difference of
            the shares.
        against_best: the same change of the objective against the first entry.
        outside: share of iterations outside the calibration's range.
        boundary: requests/s of the fluid model's stability boundary on its engine.
        notes: of the policy.
    """

    choice: Choice
    label: str
    selected: float
    figures: Mapping[str, Estimate]
    gains: Mapping[str, Estimate]
    against_best: Estimate
    outside: float
    boundary: float
    notes: str


@dataclass(frozen=True, slots=True)
class Advice:
    """What was found.

    Attributes:
        objective: what was searched for.
        entries: from the best on the parts of the selection on; the default is the last.
        settings, simulations: tried, and run in all.
        tied: settings whose interval against the best of the selection includes zero, on the parts of the selection.
        shown: whether the first entry's gain is shown on other requests: its interval excludes zero on the better side.
        possible: whether any request of any setting met the limits; always where the objective is no share.
        warnings: what a reader must know.
    """

    objective: Objective
    entries: tuple[Entry, ...]
    settings: int
    simulations: int
    tied: int
    shown: bool
    possible: bool
    warnings: tuple[str, ...]

    @property
    def default(self) -> Entry:
        return self.entries[-1]

    @property
    def advised(self) -> Entry:
        """The first entry where its gain is shown, else the default."""
        return self.entries[0] if self.shown else self.default

    @property
    def equals(self) -> tuple[Entry, ...]:
        """Further settings, the default aside, whose interval against the first includes zero on the parts of the evaluation."""
        return tuple(one for one in self.entries[1:-1] if not one.against_best.excludes_zero)


def worse(change_of: Estimate, metric: str) -> float:
    """By what share a metric is worse than the default's; below 0 where it is better."""
    return -change_of.value if metric in HIGHER else change_of.value


def advice_of(study: Study, figures: Mapping[Choice, tuple[Summary, ...]]) -> Advice:
    """Everything that is said of a finished study.

    Args:
        figures: of ``study.chosen()`` and the default on the parts of the evaluation.
    """
    objective = study.case.objective
    chosen = study.chosen()
    best = chosen[0] if chosen else DEFAULT
    order = [*chosen, DEFAULT]
    values = {choice: {m: column(figures[choice], m) for m in objective.metrics} for choice in order}
    entries = tuple(_entry(study, choice, figures[choice], values, best) for choice in order)
    first = entries[0].gains[objective.metric]
    better = first.low > 0 if objective.higher_is_better else first.high < 0
    seen = [one for one in study.tried.values() if math.isfinite(one.cost)]
    at_best = column(study.tried[best].figures, objective.metric)
    tied = sum(not change(column(one.figures, objective.metric), at_best, objective.metric).excludes_zero for one in seen)
    possible = objective.metric != "slo_goodput" or any(f.slo_goodput > 0 for one in seen for f in one.figures)
    shown = bool(better and best != DEFAULT and study.tried[best].cost < study.tried[DEFAULT].cost and possible)
    found = Advice(objective, entries, len(study.tried), len(study.rows.rows), tied, shown, possible, ())
    return Advice(objective, entries, len(study.tried), len(study.rows.rows), tied, shown, possible, tuple(warnings_of(study, found)))


def label_of(choice: Choice, engine: EngineConfig, default: EngineConfig) -> str:
    """The policy, flags of its engine that differ from the default's, and its own options that are no flags."""
    if choice == DEFAULT:
        return "vllm, the default"
    words = [f"{setting.name}={asked}" for setting, asked, _ in differing(engine, default)]
    own, _ = split_options(dict(choice.options))
    if choice.policy not in FLAGS_ALONE:
        words += [f"{name}={value}" for name, value in own.items()]
    return f"{choice.policy}: {' '.join(words) or 'flags of the default'}"


def column(figures: Sequence[Summary], metric: str) -> FloatArray:
    """(S,) one metric over the parts."""
    return np.array([getattr(one, metric) for one in figures], dtype=np.float64)


def change(ours: FloatArray, theirs: FloatArray, metric: str) -> Estimate:
    """Paired over the parts: of a share the difference, of all else the relative difference."""
    return mean_of(ours - theirs) if metric == "slo_goodput" else relative_difference(ours, theirs)


def _entry(
    study: Study, choice: Choice, figures: Sequence[Summary], values: Mapping[Choice, Mapping[str, FloatArray]], best: Choice
) -> Entry:
    case, metric = study.case, study.case.objective.metric
    policy = case.build(choice)
    seen = study.tried[choice]
    return Entry(
        choice=choice,
        label=label_of(choice, policy.engine, case.scenario.engine),
        selected=float(column(seen.figures, metric).mean()),
        figures={name: mean_of(own) for name, own in values[choice].items()},
        gains={name: change(own, values[DEFAULT][name], name) for name, own in values[choice].items()},
        against_best=change(values[choice][metric], values[best][metric], metric),
        outside=outside([*seen.figures, *figures]),
        boundary=seen.boundary,
        notes=policy.notes,
    )


def warnings_of(study: Study, found: Advice) -> list[str]:
    """What a reader must know before he trusts it."""
    case, source = study.case, study.case.scenario.engine.time_model.provenance
    lines = []
    if not found.possible:
        fastest = min(f.ttft_p50 for one in study.tried.values() for f in one.figures)
        steps = min(f.tpot_p50 for one in study.tried.values() for f in one.figures)
        lines.append(
            f"No request of any setting tried met the limits ({found.objective.text}): the least median TTFT seen is {fastest:.4g} s, "
            f"the least median TPOT {steps:.4g} s. Nothing is advised."
        )
    for name, one in (("the advised setting", found.advised), ("the default", found.default)):
        if case.rate >= one.boundary:
            lines.append(
                f"The load, {case.rate:.4g} requests/s, is not below the stability boundary under {name}, {one.boundary:.4g}: queues grow "
                f"as long as it lasts, and every figure depends on the {case.num_requests:,} requests of a part."
            )
        if one.outside > 0:
            lines.append(
                f"Under {name} {percent(one.outside)} of the iterations lie outside the range of the calibration "
                f"({source.valid_range or 'not stated'}); their times are extrapolated."
            )
        if found.advised is found.default:
            break
    lines += [f"{count} of the settings tried are not advised, as they {reason}." for reason, count in study.left_out.items()]
    dear = [m for m in found.objective.metrics if m != "slo_goodput" and worse(found.advised.gains[m], m) > DEAR]
    if dear:
        prices = ", ".join(f"{HEADINGS[m]} {100 * found.advised.gains[m].value:+,.0f} %" for m in dear)
        lines.append(f"The advised setting has a price: {prices}. --at-most METRIC=FACTOR keeps such settings out.")
    trace = case.scenario.trace
    if trace is not None and trace.dropped:
        lines.append(f"{trace.dropped:,} rows of the trace are left out: {trace.dropped_reason}.")
    if case.windows:
        used = case.num_requests * (case.selection + case.evaluation)
        if used < case.scenario.num_requests:
            lines.append(f"The last {case.scenario.num_requests - used:,} requests of the trace fill no window and are not used.")
    if found.advised.notes:
        lines.append(f"{found.advised.choice.policy}: {found.advised.notes}.")
    if source.fit_error:
        lines.append(f"The calibration's own error: {source.fit_error.rstrip('.')}. A gain below it may not be there on the engine.")
    spread = [part for part in source.notes.split(". ") if "differs by" in part or "spread" in part]
    if spread:
        lines.append(f"The engine's own spread, as the calibration states it: {'. '.join(spread).rstrip('.')}. {_seen(found, spread)}")
    return lines


def _seen(found: Advice, spread: Sequence[str]) -> str:
    """Whether the gain would be seen on an engine with that spread."""
    gain = abs(found.entries[0].gains[found.objective.metric].value)
    stated = [float(number) / 100 for text in spread for number in re.findall(r"(\d+(?:\.\d+)?) ?%", text)]
    if found.shown and stated and gain < max(stated):
        return f"The gain, {100 * gain:.1f} %, is below it: do not expect to see it on the engine."
    return "A gain below it cannot be seen."


# --- in words -------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """Of a share that may be small."""
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def shown_value(one: Estimate, metric: str) -> str:
    """``value [low, high]``."""
    if metric == "slo_goodput":
        return f"{100 * one.value:.1f} % [{100 * one.low:.1f}, {100 * one.high:.1f}]"
    return f"{one.value:.4g} [{one.low:.4g}, {one.high:.4g}]"


def shown_change(one: Estimate, metric: str) -> str:
    """A change with its interval: per cent, of a share in points."""
    unit = "points" if metric == "slo_goodput" else "%"
    if math.isnan(one.low):
        return "-" if math.isnan(one.value) else f"{100 * one.value:+.1f} {unit}"
    return f"{100 * one.value:+.1f} {unit} [{100 * one.low:+.1f}, {100 * one.high:+.1f}]"


def verdict_lines(found: Advice, study: Study) -> list[str]:
    """What is advised and how sure that is."""
    case, metric = study.case, found.objective.metric
    first = found.entries[0]
    kind = "windows of the trace" if case.windows else "seeds"
    lines = []
    if found.shown:
        lines.append(f"Advised: {first.label}")
    else:
        lines.append("Advised: keep the default; no setting was shown to be better on requests that the search has not seen.")
    if len(found.entries) > 1:
        lines.append(
            f"{found.objective.name}: {shown_value(first.figures[metric], metric)} for {first.label}, "
            f"{shown_value(found.default.figures[metric], metric)} for the default; change {shown_change(first.gains[metric], metric)}"
        )
    plain = next((one for one in found.entries if one.choice.policy in FLAGS_ALONE), found.default)
    if found.shown and plain is not first and plain is not found.default:
        lines.append(
            f"The best of flags alone, without a policy of this project in the server: {plain.label}; "
            f"change {shown_change(plain.gains[metric], metric)}"
        )
    lines += [
        f"Settings were chosen on {case.selection} {kind}; figures and intervals (95 %, paired) are of {case.evaluation} others, "
        f"{case.num_requests:,} requests each at {case.rate:.4g} requests/s, so that the choice does not flatter them.",
        f"{found.settings} settings of {len(case.policies)} policies tried, {found.simulations} simulations. "
        f"{len(found.equals)} of the other {max(len(found.entries) - 2, 0)} settings in the table cannot be told from the first on those "
        f"{kind}, and {found.tied} of all tried on the {case.selection} that chose.",
    ]
    if found.equals and found.shown:
        simplest = min((first, *found.equals), key=lambda one: (one.choice.policy != DEFAULT.policy, len(one.choice.options)))
        if simplest is not first:
            lines.append(f"The simplest of those: {simplest.label}")
    return lines


def rows_of(found: Advice) -> tuple[list[str], list[list[str]]]:
    """Headings and cells of the table: the objective, and the change of every metric against the default."""
    metric = found.objective.metric
    changes = [f"{HEADINGS[m]}, change" for m in found.objective.metrics]
    headings = ["setting", HEADINGS[metric] if metric == "slo_goodput" else NAMES[metric], *changes]
    rows = []
    for i, one in enumerate(found.entries):
        mark = " **advised**" if i == 0 and found.shown else ""
        changes = [shown_change(one.gains[m], m) if one.choice != DEFAULT else "" for m in found.objective.metrics]
        rows.append([cell(one.label) + mark, shown_value(one.figures[metric], metric), *changes])
    return headings, rows


def default_line(found: Advice) -> str:
    """The default's own figures, to which the changes refer."""
    figures = found.default.figures
    shown = (f"{NAMES[m]} {100 * figures[m].value:.1f} %" if m == "slo_goodput" else f"{NAMES[m]} {figures[m].value:.4g}" for m in figures)
    return f"The default: {', '.join(shown)}."


def short_rows(found: Advice) -> tuple[list[str], list[list[str]]]:
    """The same for a screen: settings by their number, an interval for the objective alone."""
    metric = found.objective.metric
    others = [m for m in found.objective.metrics if m != metric]
    headings = ["", NAMES[metric], "change", *(HEADINGS[m] for m in others)]
    rows = []
    for i, one in enumerate(found.entries):
        texts = [shown_change(one.gains[metric], metric), *(f"{100 * one.gains[m].value:+,.0f} %" for m in others)]
        rows.append([str(i + 1), shown_value(one.figures[metric], metric), *(texts if one.choice != DEFAULT else [""] * len(texts))])
    return headings, rows


def page(found: Advice, study: Study, about: Sequence[tuple[str, str]], command: str, how: str, engine: Sequence[str] = ()) -> list[str]:
    """The lines of report.md.

    Args:
        about: (name, text) of what was searched on what.
        command: that starts the server.
        how: this program's command line.
        engine: the section of a check on an engine.
    """
    headings, rows = rows_of(found)
    lines = [f"# Settings for {study.case.scenario.name}: {found.objective.name}", ""]
    lines += [line for text in verdict_lines(found, study) for line in (text, "")]
    lines += ["## Start with", "", "```bash", command, "```", ""]
    lines += ["## Settings", "", *table(headings, rows, "lr"), "", default_line(found), ""]
    lines += [
        "Values with 95 % bootstrap intervals (BCa) that resample the parts of the evaluation; a change is paired part by part. A setting "
        "is a policy with vLLM's flags; what it does not name is left at the default.",
        "",
        "![Change of the objective, and of every metric for the first setting](advice.png)",
        "",
    ]
    lines += engine
    if found.warnings:
        lines += ["## To know", "", *(f"* {text}" for text in found.warnings), ""]
    lines += ["## What was searched", "", *table(("", ""), [(name, cell(text)) for name, text in about], "l"), "", f"`{how}`", ""]
    return lines


def plot(found: Advice, path: Path) -> None:
    """Left: every setting's change of the objective with its interval. Right: every metric's change under the first setting."""
    pyplot = load_pyplot()
    metric = found.objective.metric
    others = [one for one in found.entries if one.choice != DEFAULT]
    height = 1.6 + 0.5 * max(len(others), len(found.objective.metrics))
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12.5, height), layout="constrained")
    _dots(left, [(_wrapped(one.label), one.gains[metric], metric) for one in others])
    unit = "points" if metric == "slo_goodput" else "%"
    left.set_xlabel(f"{HEADINGS[metric]}: change against the default ({unit})")
    first = found.entries[0]
    _dots(right, [(HEADINGS[m], first.gains[m], m) for m in found.objective.metrics])
    right.set_xlabel("change against the default (%; of a share in points)")
    right.set_title(_wrapped(first.label), fontsize=9)
    save_figure(pyplot, figure, path)


def _dots(axes: Any, lines: Sequence[tuple[str, Estimate, str]]) -> None:
    for y, (_, one, metric) in enumerate(reversed(lines)):
        better = one.value > 0 if metric in HIGHER else one.value < 0
        colour = COLOURS[2] if better and one.excludes_zero else COLOURS[1] if one.excludes_zero else COLOURS[7]
        axes.plot([100 * one.value], [y], "o", color=colour, markersize=5)
        if not math.isnan(one.low):
            axes.plot([100 * one.low, 100 * one.high], [y, y], "-", color=colour, linewidth=1.6)
    axes.axvline(0, color="#555555", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(lines)), [name for name, _, _ in reversed(lines)], fontsize=8)
    axes.set_ylim(-0.6, max(len(lines) - 0.4, 0.6))


def _wrapped(text: str, width: int = 44) -> str:
    """In lines of about so many characters."""
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
