"""``llmsched calibrate kernels``: a raw profile of a dense decoder's kernels, measured on this machine with PyTorch alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.cli.frame import Outcome, Resumable, Screen, check_counts
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_folder, goes_on
from llmsched_hardware.calibration.importers.dense_model import chosen_model
from llmsched_hardware.calibration.kernel_operators import REPEATS, Attention, Device
from llmsched_hardware.calibration.kernels import META, Reach, measure


@dataclass(frozen=True, kw_only=True)
class Kernels(Resumable):
    """Measure kernels of a dense decoder on this machine, without an engine.

    With PyTorch alone: GEMMs, attention and the operators between them, from coarse to fine, as CSV profiles in Vidur's form, which
    llmsched calibrate import --format vidur reads. Every row is on disk before the next is measured.
    """

    model: Annotated[str, tyro.conf.arg(metavar="MODEL", help_behavior_hint="(default: the one of --config)")] = ""
    """llama-2-7b or the name of another shape; with --config, how to call that one."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """The config.json of a dense decoder."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """The profile: attention.csv, mlp.csv, per_sequence.csv and meta.json."""
    budget_seconds: Annotated[float, tyro.conf.arg(metavar="S")] = 600.0
    """Begin no row after this many seconds."""
    device: Device = "auto"
    """Where to measure; auto takes a GPU if PyTorch finds one."""
    attention: Attention = "auto"
    """Whose attention; auto takes flash_attn on a GPU that has it, else PyTorch's scaled_dot_product_attention."""
    max_tokens: Annotated[int, tyro.conf.arg(metavar="N")] = 8192
    """Most tokens of a batch and of a chunk."""
    max_context: Annotated[int, tyro.conf.arg(metavar="N")] = 16384
    """Longest context."""
    max_batch: Annotated[int, tyro.conf.arg(metavar="N")] = 256
    """Most decodes in a batch."""
    repeats: Annotated[int, tyro.conf.arg(metavar="N")] = REPEATS
    """Most repeats of each kernel."""


def run_kernels(options: Kernels, screen: Screen) -> Outcome:
    """Measure what is missing until the budget is spent."""
    started = time.monotonic()
    model = chosen_model(options.model, options.config)
    check_folder("--out", options.out)
    if not (math.isfinite(options.budget_seconds) and options.budget_seconds > 0):
        raise ConfigError(f"--budget-seconds: {options.budget_seconds:g}, must be finite and > 0")
    for name, value in (("max-tokens", options.max_tokens), ("max-context", options.max_context), ("max-batch", options.max_batch)):
        if value < 2:
            raise ConfigError(f"--{name}: {value}, must be >= 2, the ends of an axis")
    check_counts(repeats=options.repeats)
    there = (options.out / META).exists()
    resume = goes_on(options.out, there, resume=options.resume, overwrite=options.overwrite, what="measured kernels")
    require("rich.progress", "cli")

    with contextlib.ExitStack() as stack:

        def begun(total: int) -> Callable[[str], None]:
            bar = stack.enter_context(screen.progress(total))
            return lambda name: bar.advance(1, name)

        result = measure(
            model,
            options.out,
            Reach(options.max_tokens, options.max_context, options.max_batch),
            deadline=started + options.budget_seconds,
            device=options.device,
            attention=options.attention,
            repeats=options.repeats,
            resume=resume,
            begun=begun,
        )
    screen.print(f"{options.out}: {result.rows:,} rows in {result.seconds:.0f} s")
    if result.left:
        screen.print(f"{result.left:,} points are left; go on with --resume")
    if result.too_large:
        screen.print(f"{result.too_large:,} points left out: their keys and values are too large for this memory")
    given = f"--config {options.config}" if options.config is not None else f"--model {options.model}"
    screen.print(f"llmsched calibrate import --format vidur {options.out} {given} --name NAME --out NAME.npz")
    return Outcome({"profile": options.out, "measured": result})
