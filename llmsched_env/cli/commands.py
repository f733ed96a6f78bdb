"""The table of commands, and the choice among them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmsched_env import __version__
from llmsched_env.cli import (
    ablation,
    advise,
    benchmark,
    build_statistics,
    calibrate,
    cluster,
    cluster_scale,
    cluster_tune,
    collect,
    compare,
    demo,
    ensemble,
    evaluate,
    fidelity,
    film,
    gpu_measure,
    hardware_page,
    headroom,
    leaderboard,
    paper_table,
    predictions,
    replay,
    reproduce,
    serve_check,
    swap_backends,
    tenants,
    traces,
    train,
    train_router,
    tune,
    validate,
    vllm_diff,
    warmup,
    zoo,
)
from llmsched_env.cli.frame import DONE, REFUSED, Command
from llmsched_env.errors import did_you_mean

MODULES = (
    demo,
    compare,
    tenants,
    cluster,
    cluster_tune,
    cluster_scale,
    advise,
    replay,
    traces,
    film,
    evaluate,
    leaderboard,
    tune,
    ablation,
    train,
    train_router,
    collect,
    ensemble,
    calibrate,
    validate,
    gpu_measure,
    serve_check,
    swap_backends,
    vllm_diff,
    build_statistics,
    warmup,
    headroom,
    predictions,
    zoo,
    benchmark,
    fidelity,
    reproduce,
    paper_table,
    hardware_page,
)
COMMANDS: dict[str, Command[Any]] = {module.COMMAND.name: module.COMMAND for module in MODULES}
USAGE = "usage: llmsched COMMAND [OPTIONS]      (llmsched COMMAND --help: its options)"


def dispatch(words: Sequence[str]) -> int:
    """Carry the command out that the first word names; the exit code."""
    if not words or words[0] in ("-h", "--help", "help"):
        print("\n".join([USAGE, "", *(f"  {name:<18} {command.summary}" for name, command in COMMANDS.items())]))
        return DONE if words else REFUSED
    if words[0] == "--version":
        print(f"llmsched-env {__version__}")
        return DONE
    if words[0] not in COMMANDS:
        print(f"error: {words[0]!r} is no command{did_you_mean(words[0], COMMANDS)} (commands: {', '.join(COMMANDS)})", file=sys.stderr)
        return REFUSED
    return COMMANDS[words[0]].main(words[1:])
