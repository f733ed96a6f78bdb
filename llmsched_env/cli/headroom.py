"""``llmsched headroom``: what there is to learn in the environments, as a table and a page."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from llmsched_env.bench.headroom import FIRST_SEED, MEASURED, Headroom, Score, chosen, headroom
from llmsched_env.bench.plain_ppo import STEPS, train_plain_ppo
from llmsched_env.cli.frame import Command, Options, Outcome, Screen
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_file
from llmsched_env.markdown import write_page
from llmsched_env.metrics import mean_interval
from llmsched_env.pages.environments.page import page


@dataclass(frozen=True, kw_only=True)
class HeadroomOptions(Options):
    """How far the best policies and constant actions are from admitting everything, in each named environment."""

    environments: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="ID [ID ...]",
            help=f"Of {', '.join(e.id for e in MEASURED)}.",
            help_behavior_hint="(default: all)",
        ),
    ] = ()
    episodes: Annotated[int, tyro.conf.arg(metavar="N")] = 64
    """Episodes for everybody, at least 2."""
    ppo_steps: Annotated[int, tyro.conf.arg(metavar="N")] = STEPS
    """Decisions on which a plain PPO is trained in each; 0 for none (needs the extra agents otherwise)."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: the table on the screen alone)")] = None
    """The page; replaced."""


def run(options: HeadroomOptions, screen: Screen) -> Outcome:
    """Measure, print the table, write the page."""
    require("scipy", "cli")
    if options.episodes < 2:
        raise ConfigError(f"--episodes: {options.episodes}, must be at least 2: the table gives intervals")
    if options.ppo_steps < 0:
        raise ConfigError(f"--ppo-steps: {options.ppo_steps}, must be >= 0")
    if options.ppo_steps:
        require("stable_baselines3", "agents")
    if options.out is not None:
        check_file("--out", options.out)
    environments = chosen(options.environments)
    found: list[Headroom] = []
    with screen.progress(len(environments)) as progress:
        for environment in environments:
            progress.show(environment.id, done=len(found))
            one = headroom(environment, options.episodes)
            if options.ppo_steps:
                ppo = train_plain_ppo(environment.id, options.episodes, FIRST_SEED, steps=options.ppo_steps)
                learned = Score("plain PPO", mean_interval(-ppo.returns))
                one = dataclasses.replace(one, learned=learned, steps=ppo.steps, seconds=ppo.seconds)
            found.append(one)
    lines = page(found, options.episodes, screen.command)
    if not screen.quiet:
        screen.print("\n".join(lines))
    if options.out is not None:
        write_page(options.out, lines)
    return Outcome(found)


COMMAND = Command("headroom", HeadroomOptions, run, "what there is to learn in each environment")
main = COMMAND.main
