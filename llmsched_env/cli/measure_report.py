"""The report of a measurement, from its summary; what a step did not find is not in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmsched_env.markdown import cell, table
from llmsched_hardware.validation_report import ERRORS


def report(summary: Mapping[str, Any]) -> list[str]:
    """Its lines."""
    machine, found = summary["machine"], summary["found"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [f"# Measured: {summary['model']}", "", f"- Command: `{summary['command']}`", f"- Date: {machine['date']}"]
    lines += [f"- GPU: {gpu}" for gpu in machine["gpus"]] or ["- GPU: none"]
    lines += [f"- System: {machine['system']}", f"- Versions: {versions}"]
    lines.append(f"- Time: {summary['seconds']:.0f} of {summary['budget_seconds']:.0f} s")
    rows = [(s["name"], s["status"], f"{s['seconds']:.0f}", f"{s['budget']:.0f}", cell(s["reason"])) for s in summary["steps"]]
    lines += ["", "## Steps", "", *table(("step", "", "seconds", "given", "why"), rows, "llrrl")]
    if found.get("sweep"):
        lines += _sweep_lines(summary["model"], found["sweep"])
    fit = found.get("check") or found.get("fit")
    if fit:
        lines += _fit_lines(fit)
    for name, title in (("traffic", "The sweep, on the traffic"), ("held-out", "The fit, on other traffic")):
        if found.get(name):
            lines += ["", f"## {title}", "", *(_gap_table(found[name]["gaps"]) if found[name]["gaps"] else ["No run was counted."])]
            if found[name].get("left_out"):
                lines += ["", f"{found[name]['left_out']} runs on the engine were left out for lack of time."]
    schedules = found.get("schedules")
    if schedules:
        same = sum(row["identical"] for row in schedules)
        lines += ["", "## Schedules", "", f"{same} of {len(schedules)} episodes are identical to the simulator's, step by step."]
    return lines


def _sweep_lines(model: str, sweep: Mapping[str, Any]) -> list[str]:
    engine = sweep["machine"]
    return [
        "",
        "## Sweep",
        "",
        f"{sweep['points']} batches of {model} ({engine['dtype']}) on {engine['device']}, vLLM {engine['vllm']}, "
        f"{engine['num_blocks']:,} blocks of {engine['block_size']} tokens; the engine started in {sweep['build_seconds']:.0f} s.",
    ]


def _fit_lines(fit: Mapping[str, Any]) -> list[str]:
    rows = [
        (name, *(f"{100 * error[key]:.1f}" for key in ("mape", "median", "p90", "bias")), f"{error['count']:,}")
        for name, error in (("each run, by a fit to the others", fit["held_out"]), ("held-out traffic", fit.get("checked")))
        if error
    ]
    headings = ("iterations", "mean error, %", "median, %", "P90, %", "total, %", "count")
    lines = ["", "## The fit, on single iterations", "", *table(headings, rows, "lr"), ""]
    lines.append(f"The machine's speed varies by {100 * fit['drift']:.1f} % over stretches of the log (standard deviation).")
    if fit["not_covered"]:
        lines += ["", *(f"- Not covered: {line}" for line in fit["not_covered"])]
    return lines


def _gap_table(gaps: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {metric: name for name, metric in (*ERRORS, ("evictions", "evictions"))}
    shown = [g for g in gaps if g["metric"] in names]
    rows = [(g["policy"], f"{g['rate']:.4g}", names[g["metric"]], _number(g["sim"]), _number(g["real"]), _error(g)) for g in shown]
    return table(("policy", "requests/s", "metric", "simulator", "engine", "error"), rows, "lrlrrr")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _error(gap: Mapping[str, Any]) -> str:
    if gap["error"] is None:
        return "-"
    return f"{gap['error']:+.0f}" if gap["metric"] == "evictions" else f"{100 * gap['error']:+.1f} %"
