"""``llmsched ensemble``: one agent of several that were trained alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_agents.ensemble import combine
from llmsched_env.cli.frame import Command, Options, Outcome, Screen
from llmsched_env.files import check_folder


@dataclass(frozen=True, kw_only=True)
class Ensemble(Options):
    """Make one agent of several that were trained alike: the mean of what their networks say."""

    agents: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="AGENT AGENT [AGENT ...]", help_behavior_hint="(required)")
    ]
    """Folders of checkpoints of one recipe, or names of shipped agents."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """The new checkpoint."""
    name: Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="(default: the first one's)")] = None
    """Name of the agent, in tables."""
    bonus: Annotated[tuple[float, float] | None, tyro.conf.arg(metavar="LEVEL LOGITS", help_behavior_hint="(default: none)")] = None
    """What one level's logit gets on top. After paired roll-outs -1 takes one per cent of cost of their caution back."""


def run(options: Ensemble, screen: Screen) -> Outcome:
    """Write the checkpoint."""
    check_folder("--out", options.out)
    combine(options.agents, options.out, name=options.name, bonus=options.bonus)
    screen.print(f"Agent: {options.out}")
    return Outcome({"agent": options.out})


COMMAND = Command("ensemble", Ensemble, run, "make one agent of several")
main = COMMAND.main
