"""``llmsched collect``: an expert's decisions recorded, and a clone of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from llmsched_agents.checkpoint import save_checkpoint
from llmsched_agents.demonstrations import DESCRIPTION, Demonstrations, read_episode, write_episode
from llmsched_agents.domain import Domain
from llmsched_agents.lookup import NamedPolicy, named_policy, option_owners
from llmsched_agents.minari_export import export
from llmsched_agents.recording import Recorder
from llmsched_baselines.overrides import parse_overrides
from llmsched_env import __version__
from llmsched_env.cli.frame import Assignments, Command, Outcome, Resumable, Screen, check_counts, words
from llmsched_env.errors import ConfigError, require
from llmsched_env.files import check_folder, check_same_settings, goes_on, write_settings

EPISODES = "episode-*.npz"


@dataclass(frozen=True, kw_only=True)
class Collect(Resumable):
    """Record an expert's decisions, one file an episode, and clone it.

    With --resume the episodes that are missing are recorded. --clone fits a policy to all of them, --dagger goes on from there: the
    clone acts, the expert says what it would have done, and the clone is fitted again.
    """

    expert: Annotated[str, tyro.conf.arg(metavar="POLICY")]
    """Name of a policy or a shipped agent, folder of a checkpoint, or module:attribute."""
    set: Assignments = ()
    """engine.FIELD or policy.OPTION."""
    scenario: Annotated[str, tyro.conf.arg(metavar="NAME")] = "azure-conv"
    """A scenario that ships, is registered or offered by a package, or a .toml file."""
    loads: Annotated[tuple[float, ...], tyro.conf.arg(metavar="X [X ...]")] = (0.7, 0.8, 0.9)
    """Shares of the stability boundary, in turn."""
    kv: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: the scenario's)")] = None
    """KV blocks."""
    episodes: Annotated[int, tyro.conf.arg(metavar="N")] = 12
    """How many to record."""
    num_requests: Annotated[int, tyro.conf.arg(metavar="N")] = 500
    """Requests of an episode."""
    seed: Annotated[int, tyro.conf.arg(metavar="N")] = 100_000
    """Seed of the first episode; the others count up."""
    max_admit: Annotated[int, tyro.conf.arg(metavar="N")] = 16
    """Largest count in an action."""
    no_features: bool = False
    """Record the environment's observation alone, without what the agents compute from it."""
    out: Annotated[Path, tyro.conf.arg(metavar="FOLDER")]
    """Where the recordings go."""
    clone: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: none)")] = None
    """Fit a policy and write it there as a checkpoint."""
    net_arch: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N [N ...]")] = (64, 64)
    """Hidden layers of the clone."""
    epochs: Annotated[int, tyro.conf.arg(metavar="N")] = 30
    """Most passes over the data."""
    dagger: Annotated[int, tyro.conf.arg(metavar="ROUNDS")] = 0
    """Rounds in which the clone acts and the expert labels."""
    minari: Annotated[str | None, tyro.conf.arg(metavar="ID", help_behavior_hint="(default: none)")] = None
    """Write a Minari data set, such as llmsched/reserve-v0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A recording, fully checked.

    Attributes:
        description: what it is made with, as plain values.
        resumed: the episodes that are there stay.
    """

    expert: NamedPolicy
    domain: Domain
    recorder: Recorder
    description: Mapping[str, Any]
    resumed: bool


def plan(options: Collect) -> Plan:
    """What the options ask for; nothing is written.

    Raises:
        ConfigError: an option that cannot be carried out.
    """
    check_folder("--out", options.out)
    if options.clone is not None:
        check_folder("--clone", options.clone)
    check_counts(episodes=options.episodes, num_requests=options.num_requests, epochs=options.epochs, max_admit=options.max_admit)
    for name, value in (("dagger", options.dagger), ("seed", options.seed)):
        if value < 0:
            raise ConfigError(f"--{name}: {value}, must be >= 0")
    if not options.loads:
        raise ConfigError("--loads: none given, must be at least one")
    expert = named_policy(options.expert)
    overrides = parse_overrides(words(options.set), option_owners({expert.name: expert}))
    domain = Domain((options.scenario,), options.loads, (options.kv,) if options.kv else ())
    recorder = Recorder.of(
        expert,
        domain.grid(),
        overrides,
        num_requests=options.num_requests,
        seed=options.seed,
        max_admit=options.max_admit,
        features=not options.no_features,
    )
    there = (options.out / DESCRIPTION).exists() or any(options.out.glob(EPISODES))
    resumed = goes_on(options.out, there, resume=options.resume, overwrite=options.overwrite, what="recordings")
    description = {
        "version": __version__,
        "expert": options.expert,
        "set": dict(overrides.items()),
        "domain": domain.describe(),
        "num_requests": options.num_requests,
        "seed": options.seed,
        "recipe": recorder.recipe.as_dict(),
    }
    if resumed:
        check_same_settings(options.out / DESCRIPTION, description)
    return Plan(expert, domain, recorder, description, resumed)


def recordings(options: Collect, plan: Plan, screen: Screen) -> Demonstrations:
    """Record what is missing, each episode on disk as it is there; all of them.

    Raises:
        ConfigError: a corrupt file.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    if not plan.resumed:
        for path in options.out.glob(EPISODES):
            path.unlink()
    write_settings(options.out / DESCRIPTION, plan.description)
    episodes, inexact = [], 0
    with screen.progress(options.episodes) as bar:
        for i in range(options.episodes):
            path = options.out / EPISODES.replace("*", f"{i:05d}")
            if path.exists():
                episodes.append(read_episode(path))
            else:
                episode, lost = plan.recorder.episode(i)
                write_episode(path, episode)
                episodes.append(episode)
                inexact += lost
            bar.advance(description=f"{len(episodes[-1]):,} decisions, return {episodes[-1].rewards.sum():.3f}")
    if inexact:
        screen.note(f"{inexact:,} decisions of the episodes recorded now are beyond the action space")
    return Demonstrations.joined(episodes)


def fit_clone(options: Collect, plan: Plan, folder: Path, data: Demonstrations, screen: Screen) -> None:
    """The checkpoint is written after each round."""
    from llmsched_agents.dagger import clones  # imports torch

    made = clones(plan.recorder, data, net_arch=options.net_arch, epochs=options.epochs, rounds=options.dagger, progress=screen.say)
    for clone in made:
        save_checkpoint(
            folder,
            clone.network,
            plan.recorder.recipe,
            plan.domain,
            plan.recorder.layout,
            name=f"{plan.expert.name}-clone",
            deterministic=True,
            record={
                "algorithm": clone.algorithm,
                "seed": options.seed,
                "expert": plan.description,
                "rounds": clone.rounds,
            },
        )
        last, turn = clone.rounds[-1], len(clone.rounds) - 1
        equal = f"{100 * last['accuracy']:.2f} % of held-out decisions equal the expert's"
        screen.say(f"clone, round {turn}: {equal} ({last['decisions']:,} decisions)")
    screen.print(f"Agent: {folder}")


def run(options: Collect, screen: Screen) -> Outcome:
    """Record, then clone and export where that was asked for."""
    require("rich", "cli")
    if options.clone is not None:
        for module in ("torch", "stable_baselines3", "sb3_contrib", "safetensors"):
            require(module, "agents")
    if options.minari is not None:
        require("minari", "minari")
    planned = plan(options)
    data = recordings(options, planned, screen)
    if options.clone is not None:
        fit_clone(options, planned, options.clone, data, screen)
    if options.minari is not None:
        description = json.dumps(planned.description)
        export(data, planned.recorder, dataset=options.minari, expert=planned.expert.name, description=description)
    screen.print(f"{len(data):,} decisions of {options.expert} in {options.out}")
    return Outcome({"decisions": len(data), "episodes": options.episodes, "out": options.out, "clone": options.clone})


COMMAND = Command("collect", Collect, run, "record an expert's decisions, and clone it")
main = COMMAND.main
