"""``llmsched calibrate from-log``: a calibration from the iterations that an engine has logged of live traffic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from llmsched_env.cli.frame import Options, Outcome, Screen, check_new_calibration
from llmsched_env.errors import ConfigError, require
from llmsched_env.perf import save_calibration
from llmsched_hardware.calibration.from_log import Form, Repeats, check_model, fit_log
from llmsched_hardware.calibration.iteration_log import read_iteration_logs


@dataclass(frozen=True, kw_only=True)
class FromLog(Options):
    """Fit iteration times to the iterations that a server or a backend has logged of live traffic.

    Any policy's log will do, vllm's too. Terms are chosen by cross-validation over runs: what several prompts at once cost, a request that
    starts or ends, a batch that has changed, a number of tokens that was not seen lately. What the logs do not cover is said.
    """

    logs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="LOG [LOG ...]")]
    """Iteration logs of one engine."""
    out: Annotated[Path, tyro.conf.arg(metavar="FILE.json")]
    """The calibration; replaced."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the file's)")] = None
    """Name of the calibration."""
    form: Form = "traffic"
    """What is fitted: traffic (all terms), formula (the compact one) or linear (the paper's two)."""
    repeats: Repeats = "apart"
    """Runs of the same batches (validate --clock virtual --repeats N): apart, or of each iteration the median or the fastest one."""
    check: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="LOG [LOG ...]", help_behavior_hint="(default: none)")] = ()
    """Logs that are not fitted: how far the calibration is off on their iterations."""


def run_from_log(options: FromLog, screen: Screen) -> Outcome:
    """Read, fit, write, say how well."""
    check_new_calibration(options.out, options.name)
    if not options.logs:
        raise ConfigError("LOG: none given, must be at least one iteration log")
    require("scipy.optimize", "cli")
    log = read_iteration_logs(options.logs)
    others = read_iteration_logs(options.check) if options.check else None
    found = fit_log(log, options.name or options.out.stem, options.form, options.repeats)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_calibration(found.model, options.out)
    screen.print(f"{options.out}: {found.form}, {len(log):,} iterations")
    for line in found.lines():
        screen.print(line)
    outcome: dict[str, Any] = {
        "calibration": options.out,
        "held_out": found.held_out,
        "groups": found.groups,
        "drift": found.drift,
        "worth": found.worth,
        "not_covered": found.coverage,
        "model": {"form": found.form, "shapes": found.shapes},
    }
    if others is not None:
        error, groups = check_model(found.model, others, options.repeats)
        screen.print(f"{'checked':<12} {error}")
        for group in groups:
            screen.print(f"{'':<12} {group.name}: total {100 * group.error:+.1f} %, {group.count:,} iterations")
        outcome |= {"checked": error, "checked_groups": groups}
    return Outcome(outcome)
